/* dm: sets up the two device-mapper targets of a pod image, by the ioctls of <linux/dm-ioctl.h>. Static, so that it also runs
 * in an initrd that has no libraries.
 *   dm verity NAME DEVICE BLOCKS ROOT_HASH   DEVICE read-only: BLOCKS blocks of 4096 bytes, then their hash tree (SHA-256, no
 *                                            salt, no superblock; Linux admin-guide/device-mapper/verity.rst)
 *   dm crypt NAME DEVICE                     DEVICE under AES-256-XTS with a key that is made here and is kept nowhere but in
 *                                            this Linux; discards pass (admin-guide/device-mapper/dm-crypt.rst)
 * Prints the path of the device that it made. Exit code 1, with a message: it could not. */
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <linux/fs.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { SECTOR = 512, BLOCK = 4096, KEY = 64 };

/* What the kernel takes: a head, and for a table load one target with its parameters, a string. */
struct request { struct dm_ioctl head; struct dm_target_spec target; char parameters[512]; };

static int die(const char *what) { perror(what); exit(1); }

static int call(int control, unsigned long what, struct request *request, const char *name, unsigned flags) {
    memset(&request->head, 0, sizeof request->head);
    request->head.version[0] = DM_VERSION_MAJOR;
    request->head.data_size = sizeof *request;
    request->head.data_start = offsetof(struct request, target);
    request->head.target_count = what == DM_TABLE_LOAD;
    /* The kernel wipes its copy of the request: it holds the key. */
    request->head.flags = flags | DM_SECURE_DATA_FLAG;
    strcpy(request->head.name, name);
    return ioctl(control, what, request);
}

/* Makes the device NAME of one target; request->parameters is what the target is told. */
static void create(const char *name, const char *type, __u64 sectors, unsigned flags, struct request *request) {
    int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
    if (control < 0) die("/dev/mapper/control");
    memset(&request->target, 0, sizeof request->target);
    request->target.length = sectors;
    strcpy(request->target.target_type, type);
    if (call(control, DM_DEV_CREATE, request, name, 0)) die("creating the device");
    if (call(control, DM_TABLE_LOAD, request, name, flags)) die("loading the table");
    explicit_bzero(request->parameters, sizeof request->parameters);
    if (call(control, DM_DEV_SUSPEND, request, name, 0)) die("starting the device"); /* without DM_SUSPEND_FLAG: resume */
    printf("/dev/dm-%u\n", minor(request->head.dev));
}

static int make_verity(const char *name, const char *device, const char *blocks, const char *hash) {
    struct request request = {0};
    char *end;
    __u64 count = strtoull(blocks, &end, 10);
    if (*end || !count || count > 1ULL << 40) { fprintf(stderr, "%s: not a number of blocks\n", blocks); return 1; }
    if (strspn(hash, "0123456789abcdef") != 64 || strlen(hash) != 64) { fprintf(stderr, "%s: not a SHA-256\n", hash); return 1; }
    if (snprintf(request.parameters, sizeof request.parameters, "1 %s %s %d %d %llu %llu sha256 %s -",
                 device, device, BLOCK, BLOCK, count, count, hash) >= (int)sizeof request.parameters) return 1;
    create(name, "verity", count * (BLOCK / SECTOR), DM_READONLY_FLAG, &request);
    return 0;
}

static int make_crypt(const char *name, const char *device) {
    struct request request = {0};
    unsigned char key[KEY];
    char hex[2 * KEY + 1];
    __u64 bytes;
    int disk = open(device, O_RDONLY | O_CLOEXEC);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &bytes)) die(device);
    /* Waits, at an early boot, until the kernel's generator is seeded. */
    if (getrandom(key, sizeof key, 0) != sizeof key) die("getrandom");
    for (int at = 0; at < KEY; at++) sprintf(hex + 2 * at, "%02x", key[at]);
    if (snprintf(request.parameters, sizeof request.parameters, "aes-xts-plain64 %s 0 %s 0 2 allow_discards sector_size:%d",
                 hex, device, BLOCK) >= (int)sizeof request.parameters) return 1;
    explicit_bzero(key, sizeof key);
    explicit_bzero(hex, sizeof hex);
    create(name, "crypt", bytes / BLOCK * (BLOCK / SECTOR), 0, &request);
    return 0;
}

int main(int count, char **words) {
    if (count > 2 && strlen(words[2]) >= DM_NAME_LEN) { fprintf(stderr, "%s: too long\n", words[2]); return 1; }
    if (count == 6 && !strcmp(words[1], "verity")) return make_verity(words[2], words[3], words[4], words[5]);
    if (count == 4 && !strcmp(words[1], "crypt")) return make_crypt(words[2], words[3]);
    fprintf(stderr, "dm verity NAME DEVICE BLOCKS ROOT_HASH | dm crypt NAME DEVICE\n");
    return 1;
}
