/* files: work on a file system, for the rig's cases of virtio-fs and disks. The same seed does the same, so that what a pod
 * left in a directory can be held against what the host left in one of its own. Every step is checked against a model.
 *   files churn DIR SEED STEPS    names: what git does to its objects, index and locks; files made, linked, moved, removed
 *   files write FILE SEED STEPS   content: four writers at random places, by write, O_DIRECT, mmap, holes and copies
 *   files large FILE              content beyond 4 GiB
 * Exit code 0: all was as it should be; else the step that was not is told. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int step;
#define NO(...) do { int e = errno; fprintf(stderr, "step %d: ", step); fprintf(stderr, __VA_ARGS__); \
    fprintf(stderr, " (%s)\n", strerror(e)); exit(1); } while (0)
#define MUST(x, ...) do { errno = 0; if (!(x)) NO(__VA_ARGS__); } while (0)

static uint64_t state;
static uint32_t any(uint32_t below) {
    state += 0x9e3779b97f4a7c15; /* splitmix64, public domain, Sebastiano Vigna */
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9; z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (uint32_t)((z ^ (z >> 31)) % below);
}

/* -- churn: DIRS directories, whose names change; in them NAMES names, for files of which several may be one. */
enum { DIRS = 12, NAMES = 40, NONE = -1, LINK = -2, LARGEST = 40000 };
static struct node { uint32_t seed, size; int links; mode_t mode; } nodes[DIRS * NAMES * 64];
static int node_count, name[DIRS][NAMES], moved[DIRS], inner[DIRS];

static unsigned char byte(uint32_t seed, uint32_t at) { return (unsigned char)(((seed + at) * 2654435761u) >> 24); }

static const char *dir_path(int d) {
    static char path[2][32]; static int turn;
    turn = !turn; snprintf(path[turn], 32, moved[d] ? "moved-%02d" : "dir-%02d", d);
    return path[turn];
}
static const char *path_of(int d, int n) {
    static char path[2][64]; static int turn;
    turn = !turn; snprintf(path[turn], 64, "%s/name-%02d", dir_path(d), n);
    return path[turn];
}
static void put(int fd, struct node *node, uint32_t length) {
    unsigned char data[LARGEST];
    for (uint32_t i = 0; i < length; i++) data[i] = byte(node->seed, node->size + i);
    MUST(write(fd, data, length) == (ssize_t)length, "write of %u", length);
    node->size += length;
}
static void look(int d, int n) {
    const char *path = path_of(d, n);
    struct stat found;
    int is = name[d][n];
    if (is == NONE) { MUST(lstat(path, &found) < 0 && errno == ENOENT, "%s is there", path); return; }
    MUST(lstat(path, &found) == 0, "%s is not there", path);
    if (is == LINK) { MUST(S_ISLNK(found.st_mode), "%s is no link", path); return; }
    struct node *node = &nodes[is];
    MUST(found.st_size == node->size && (int)found.st_nlink == node->links && (found.st_mode & 07777) == node->mode,
        "%s: %ld bytes, %ld links, mode %o and not %u, %d, %o", path, (long)found.st_size, (long)found.st_nlink,
        found.st_mode & 07777, node->size, node->links, node->mode);
}
static void read_all(int d, int n) {
    unsigned char data[LARGEST + 1];
    struct node *node = &nodes[name[d][n]];
    int fd = open(path_of(d, n), O_RDONLY);
    MUST(fd >= 0, "open %s", path_of(d, n));
    ssize_t got = 0, more;
    while ((more = read(fd, data + got, sizeof data - got)) > 0) got += more;
    MUST(more == 0 && got == node->size, "read %s: %zd", path_of(d, n), got);
    for (uint32_t i = 0; i < node->size; i++) MUST(data[i] == byte(node->seed, i), "%s differs at %u", path_of(d, n), i);
    close(fd);
}
static void drop(int d, int n) { if (name[d][n] >= 0) nodes[name[d][n]].links--; name[d][n] = NONE; }

static void list(int d) {
    int expected = inner[d], found = 0;
    for (int n = 0; n < NAMES; n++) expected += name[d][n] != NONE;
    DIR *open_dir = opendir(dir_path(d));
    MUST(open_dir, "opendir %s", dir_path(d));
    for (struct dirent *entry; (entry = readdir(open_dir));) found += entry->d_name[0] != '.';
    closedir(open_dir);
    MUST(found == expected, "%s has %d entries and not %d", dir_path(d), found, expected);
}
/* What git does with an object and its index: a file made beside, written, moved over the name. */
static void make(int d, int n) {
    char lock[64];
    snprintf(lock, sizeof lock, "%s/.lock", dir_path(d));
    struct node *node = &nodes[node_count];
    *node = (struct node){.seed = any(1u << 31), .links = 1, .mode = 0644};
    int fd = open(lock, O_CREAT | O_EXCL | O_WRONLY, 0644);
    MUST(fd >= 0, "create %s", lock);
    MUST(open(lock, O_CREAT | O_EXCL | O_WRONLY, 0644) < 0 && errno == EEXIST, "%s made twice", lock);
    put(fd, node, any(8) ? any(3000) : any(LARGEST));
    if (!any(4)) MUST(fsync(fd) == 0, "fsync");
    MUST(close(fd) == 0, "close");
    MUST(rename(lock, path_of(d, n)) == 0, "rename %s", lock);
    drop(d, n); name[d][n] = node_count++;
}
static void change(int d, int n) {
    struct node *node = &nodes[name[d][n]];
    const char *path = path_of(d, n);
    int fd;
    switch (any(4)) {
    case 0:
        node->mode = any(2) ? 0600 : 0444; MUST(chmod(path, node->mode) == 0, "chmod %s", path); break;
    case 1:
        node->size = any(node->size + 1); MUST(truncate(path, node->size) == 0, "truncate %s", path); break;
    default:
        MUST((fd = open(path, O_WRONLY | O_APPEND)) >= 0, "open %s", path);
        put(fd, node, any(LARGEST - node->size + 1) % 5000);
        MUST(close(fd) == 0, "close");
    }
}
static void name_step(void) {
    int d = any(DIRS), n = any(NAMES), d2 = any(DIRS), n2 = any(NAMES), is = name[d][n], other = name[d2][n2];
    char path[64];
    switch (any(12)) {
    case 0: case 1: case 2: make(d, n); break;
    case 3:
        if (is < 0 || other != NONE) break;
        MUST(link(path_of(d, n), path_of(d2, n2)) == 0, "link %s", path_of(d, n));
        nodes[is].links++; name[d2][n2] = is; break;
    case 4:
        if (is == NONE) { MUST(unlink(path_of(d, n)) < 0 && errno == ENOENT, "unlink of nothing"); break; }
        MUST(unlink(path_of(d, n)) == 0, "unlink %s", path_of(d, n)); drop(d, n); break;
    case 5: case 6:
        if (is == NONE || (d == d2 && n == n2)) break;
        MUST(rename(path_of(d, n), path_of(d2, n2)) == 0, "rename %s", path_of(d, n));
        if (is >= 0 && is == other) break; /* two names of one file: rename(2) does nothing */
        drop(d2, n2); name[d2][n2] = is; name[d][n] = NONE; break;
    case 7:
        if (is != NONE) { MUST(symlink("x", path_of(d, n)) < 0 && errno == EEXIST, "symlink over a name"); break; }
        snprintf(path, sizeof path, "../%s", path_of(d2, n2));
        MUST(symlink(path, path_of(d, n)) == 0, "symlink %s", path_of(d, n)); name[d][n] = LINK; break;
    case 8: if (is >= 0) change(d, n); break;
    case 9: if (is >= 0) read_all(d, n); break;
    case 10:
        snprintf(path, sizeof path, "%s", dir_path(d)); moved[d] = !moved[d];
        MUST(rename(path, dir_path(d)) == 0, "rename %s", path); list(d); break;
    default:
        snprintf(path, sizeof path, "%s/inner", dir_path(d));
        if (inner[d]) { MUST(rmdir(path) == 0, "rmdir %s", path); inner[d] = 0; }
        else { MUST(mkdir(path, 0755) == 0, "mkdir %s", path); inner[d] = 1; }
        MUST(rmdir(dir_path(d)) < 0 && (errno == ENOTEMPTY || !inner[d]), "rmdir of %s", dir_path(d));
    }
    look(d, n); look(d2, n2);
}
static void churn(int steps) {
    for (int d = 0; d < DIRS; d++) {
        MUST(mkdir(dir_path(d), 0755) == 0, "mkdir");
        for (int n = 0; n < NAMES; n++) name[d][n] = NONE;
        make(d, 0); /* never empty for long */
    }
    for (step = 1; step <= steps; step++) {
        name_step();
        for (int d = 0; d < DIRS; d++) { int some = inner[d]; for (int n = 0; n < NAMES; n++) some += name[d][n] != NONE; if (!some) make(d, 0); }
    }
    for (int d = 0; d < DIRS; d++) for (int n = 0; n < NAMES; n++) { look(d, n); if (name[d][n] >= 0) read_all(d, n); }
}

/* -- write: FILE in areas of AREA bytes; area i is the (i % WRITERS)th writer's, who knows what is in it. */
enum { WRITERS = 4, AREA = 16384, AREAS = 1024, PAGE = 4096 };
static unsigned char *known; /* all of the file, of which a writer only looks at its own */

static void same(const unsigned char *got, size_t at, size_t length, const char *how) {
    for (size_t i = 0; i < length; i++) MUST(got[i] == known[at + i], "%s differs at %zu of %zu bytes at %zu", how, i, length, at);
}
static void writer(const char *path, int mine, int steps) {
    unsigned char *data;
    int fd = open(path, O_RDWR), direct = open(path, O_RDWR | O_DIRECT);
    MUST(fd >= 0 && direct >= 0, "open %s", path);
    MUST(posix_memalign((void **)&data, PAGE, AREA) == 0, "memory");
    unsigned char *map = mmap(0, (size_t)AREA * AREAS, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(map != MAP_FAILED, "mmap %s", path);
    for (step = 1; step <= steps; step++) {
        size_t area = (size_t)AREA * (any(AREAS / WRITERS) * WRITERS + mine), other = (size_t)AREA * (any(AREAS / WRITERS) * WRITERS + mine);
        size_t from = any(AREA), length = 1 + any(AREA - from), at = area + from;
        for (size_t i = 0; i < length; i++) data[i] = (unsigned char)any(256);
        switch (any(9)) {
        case 0: case 1: case 2:
            MUST(pwrite(fd, data, length, at) == (ssize_t)length, "pwrite"); memcpy(known + at, data, length); break;
        case 3:
            from &= ~(PAGE - 1); length = (length + PAGE - 1) & ~(size_t)(PAGE - 1);
            if (from + length > AREA) length = AREA - from;
            at = area + from;
            MUST(pwrite(direct, data, length, at) == (ssize_t)length, "pwrite with O_DIRECT"); memcpy(known + at, data, length); break;
        case 4:
            memcpy(map + at, data, length); memcpy(known + at, data, length);
            MUST(msync(map + (at & ~(size_t)(PAGE - 1)), length + (at & (PAGE - 1)), MS_SYNC) == 0, "msync"); break;
        case 5:
            MUST(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length) == 0, "fallocate of a hole");
            memset(known + at, 0, length); break;
        case 6: {
            off_t in = area, out = other;
            if (area == other) break;
            MUST(copy_file_range(fd, &in, fd, &out, AREA, 0) == AREA, "copy_file_range");
            memcpy(known + other, known + area, AREA); at = other; length = AREA; break; }
        case 7: MUST(pread(direct, data, AREA, area) == AREA, "pread with O_DIRECT"); same(data, area, AREA, "O_DIRECT"); break;
        default: MUST((any(2) ? fsync(fd) : fdatasync(fd)) == 0, "fsync");
        }
        MUST(pread(fd, data, length, at) == (ssize_t)length, "pread"); same(data, at, length, "pread");
        same(map + at, at, length, "the map");
    }
    MUST(fsync(fd) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0, "fsync");
    for (int i = mine; i < AREAS; i += WRITERS) {
        size_t at = (size_t)i * AREA;
        MUST(pread(fd, data, AREA, at) == AREA, "pread at the end"); same(data, at, AREA, "at the end");
    }
    exit(0);
}
static void content(const char *path, uint64_t seed, int steps) {
    known = calloc(AREAS, AREA);
    int fd = open(path, O_CREAT | O_RDWR, 0644), bad = 0, status;
    MUST(known && fd >= 0 && ftruncate(fd, (off_t)AREA * AREAS) == 0, "create %s", path);
    for (int mine = 0; mine < WRITERS; mine++) {
        pid_t pid = fork();
        MUST(pid >= 0, "fork");
        if (pid == 0) { state = seed * WRITERS + mine; writer(path, mine, steps); }
    }
    while (wait(&status) > 0) bad |= status;
    if (bad) exit(1);
}

static void large(const char *path) {
    enum { LENGTH = 300000 };
    static unsigned char out[LENGTH], in[LENGTH];
    off_t at = (5LL << 30) + 12345;
    int fd = open(path, O_CREAT | O_RDWR, 0644);
    struct stat found;
    for (int i = 0; i < LENGTH; i++) out[i] = (unsigned char)any(256);
    MUST(fd >= 0 && pwrite(fd, out, LENGTH, at) == LENGTH && fsync(fd) == 0, "write beyond 4 GiB");
    MUST(fstat(fd, &found) == 0 && found.st_size == at + LENGTH, "size %ld", (long)found.st_size);
    MUST(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0 && pread(fd, in, LENGTH, at) == LENGTH && !memcmp(in, out, LENGTH), "read back");
    MUST(pread(fd, in, 4096, at - (1LL << 32)) == 4096 && !memcmp(in, (unsigned char[4096]){0}, 4096), "the hole is not empty");
    MUST(lseek(fd, 0, SEEK_END) == at + LENGTH, "seek to the end");
}

int main(int argc, char **argv) {
    umask(022);
    state = argc > 3 ? strtoull(argv[3], 0, 10) : 1;
    if (argc == 5 && !strcmp(argv[1], "churn")) {
        MUST(chdir(argv[2]) == 0, "%s", argv[2]);
        churn(atoi(argv[4]));
    } else if (argc == 5 && !strcmp(argv[1], "write")) content(argv[2], state, atoi(argv[4]));
    else if (argc == 3 && !strcmp(argv[1], "large")) large(argv[2]);
    else { fprintf(stderr, "usage: see files.c\n"); return 2; }
    return 0;
}
