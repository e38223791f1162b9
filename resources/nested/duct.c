/* duct: one stream connection tied to standard input and output, for the rig's vsock case. Static, so that it runs in a
 * host and in a pod that have no libraries.
 *   duct vsock-connect CID PORT | vsock-listen PORT | unix-listen PATH | unix-connect PATH [LINE]
 * LINE is sent first and one line of answer is read and must begin with "OK " (the CONNECT of a hybrid vsock socket).
 * A listener makes the file that DUCT_READY names once connections can come, and takes one.
 * The end of standard input shuts the sending side down; the program ends when the peer has done the same. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static int die(const char *what) { perror(what); exit(1); }

static void put(int fd, const char *data, ssize_t length) {
    while (length > 0) {
        ssize_t wrote = write(fd, data, length);
        if (wrote <= 0) die("write");
        data += wrote; length -= wrote;
    }
}

static void greet(int fd, const char *line) {
    char answer[64]; size_t at = 0;
    put(fd, line, strlen(line)); put(fd, "\n", 1);
    do if (at == sizeof answer - 1 || read(fd, answer + at, 1) != 1) die("no answer"); while (answer[at++] != '\n');
    answer[at] = 0;
    if (strncmp(answer, "OK ", 3)) { fprintf(stderr, "answer: %s", answer); exit(1); }
}

static void copy(int from, int to, const char *what) {
    static char data[65536];
    ssize_t got;
    while ((got = read(from, data, sizeof data)) > 0) put(to, data, got);
    if (got < 0) die(what);
}

/* One process for each direction, so that neither waits for the other. */
static void carry(int fd) {
    pid_t sender = fork();
    if (sender < 0) die("fork");
    if (sender == 0) { copy(0, fd, "read from standard input"); shutdown(fd, SHUT_WR); _exit(0); }
    copy(fd, 1, "read from the peer");
    int status;
    waitpid(sender, &status, 0);
    if (status) { fprintf(stderr, "the sending side failed\n"); exit(1); }
}

int main(int argc, char **argv) {
    if (argc < 3) { fprintf(stderr, "usage: see duct.c\n"); return 2; }
    int vsock = !strncmp(argv[1], "vsock-", 6), connects = !!strstr(argv[1], "-connect");
    struct sockaddr_vm vm = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = atoi(argv[argc - 1])};
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    if (vsock && connects) vm.svm_cid = atoi(argv[2]);
    strncpy(un.sun_path, argv[2], sizeof un.sun_path - 1);
    struct sockaddr *address = vsock ? (void *)&vm : (void *)&un;
    socklen_t length = vsock ? sizeof vm : sizeof un;
    int fd = socket(vsock ? AF_VSOCK : AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0) die("socket");
    if (connects) {
        if (connect(fd, address, length)) die("connect");
        if (!vsock && argc > 3) greet(fd, argv[3]);
    } else {
        if (bind(fd, address, length) || listen(fd, 1)) die("listen");
        const char *ready = getenv("DUCT_READY");
        if (ready && open(ready, O_CREAT | O_WRONLY, 0644) < 0) die(ready);
        if ((fd = accept(fd, 0, 0)) < 0) die("accept");
    }
    carry(fd);
    return 0;
}
