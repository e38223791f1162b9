/* search: does what somebody with all rights on the host does who wants what is in a pod: looks for a pattern in all memory
 * of a process that is there (proc(5): maps, pagemap, mem), and prints at how many places it was.
 *   search PID SEED     the pattern is the pod guest's (docs/pod-guest.md), its first 64 bytes */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int die(const char *what) { perror(what); exit(2); }

static int file(const char *pid, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/%s", pid, name);
    int fd = open(path, O_RDONLY);
    if (fd < 0) die(path);
    return fd;
}

/* splitmix64 */
static uint64_t next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: search PID SEED\n"); return 2; }
    uint64_t state = strtoull(argv[2], 0, 10), pattern[8];
    for (int i = 0; i < 8; i++) pattern[i] = next(&state);
    int memory = file(argv[1], "mem"), pages = file(argv[1], "pagemap");
    FILE *maps = fdopen(file(argv[1], "maps"), "r");
    char line[512], page[4096], access[5];
    unsigned long found = 0, looked = 0, start, end;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %4s", &start, &end, access) != 3 || access[0] != 'r') continue;
        for (unsigned long at = start; at < end; at += sizeof page) {
            uint64_t entry;
            if (pread(pages, &entry, 8, at / sizeof page * 8) != 8 || !(entry >> 63)) continue;
            if (pread(memory, page, sizeof page, at) != sizeof page) continue;
            looked++;
            for (char *from = page; (from = memmem(from, page + sizeof page - from, pattern, sizeof pattern)); from++) found++;
        }
    }
    fprintf(stderr, "note %lu pages are there to look at\n", looked);
    printf("%lu\n", found);
    return 0;
}
