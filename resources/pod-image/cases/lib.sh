# What the pod image's cases have at hand beside the rig's words. Their pods have the kernel, the initrd and the root of the
# image for $kernel, and come up in the way of $mode.
image=/pod-image/$kernel
ln -sf $image/initrd /pod/initramfs
root=$(cat $image/cmdline) root=${root##*podvisor.root=} blocks=${root%:*} hash=${root#*:}
# pod MORE_OPTIONS...: boots the image in the background with the root disk $disk, whose root hash is $hash, and the directory
# ./share as its containers. serial, log and api as with start.
memory=256M,shared=on disk=$image/root.img
pod() {
    mkdir -p share; more_cmdline=podvisor.root=$blocks:$hash
    start --disk path=$disk,readonly=on,serial=podvisor-root --fs tag=pod,shared_dir=share "$@"
}
# container NAME MEMORY SCRIPT: an OCI bundle in ./share with busybox, which runs SCRIPT with at most MEMORY bytes (0: no
# limit); it has ./share/NAME/host as /host
container() {
    mkdir -p share/$1/rootfs/bin share/$1/rootfs/proc share/$1/rootfs/dev share/$1/rootfs/host share/$1/host
    cp /bin/busybox share/$1/rootfs/bin/
    for applet in $(busybox --list); do ln -s busybox share/$1/rootfs/bin/$applet 2>/dev/null; done
    printf %s "$3" >share/$1/rootfs/script
    limit=; [ $2 = 0 ] || limit="\"limit\": $2"
    cat >share/$1/config.json <<END
{"ociVersion": "1.0.2", "hostname": "$1", "root": {"path": "rootfs"},
 "process": {"args": ["/bin/sh", "/script"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
 "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/host", "type": "bind", "source": "/share/$1/host", "options": ["bind"]}],
 "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
           "resources": {"memory": {$limit}}}}
END
}
# until_is FILE: waits for it, as long as the pod is there
until_is() {
    until [ -e "$1" ]; do
        [ -e /proc/$monitor ] || [ -e "$1" ] || fail "podvisor ended before there was $1: $(tail -n 3 serial)"
        usleep 50000
    done
}
# exited NAME CODE: waits until the container has ended, which must be with that code
exited() { until_is share/$1/exit; [ "$(cat share/$1/exit)" = "$2" ] || fail "$1 ended with $(cat share/$1/exit), not $2: $(cat share/$1/out)"; }
# The seed's crash: "writer" writes $marker, and then until it cannot (bid writer fill); it removes that (bid writer remove).
# "neighbour" answers a question, and then needs 96 MiB for a moment (bid neighbour work); meanwhile it keeps the least memory
# that was available and the number of processes killed for want of it (./share/neighbour/host/least, killed). Neither has a
# memory limit of its own.
marker="plain text of the pod"
writer_and_neighbour() {
    container writer 0 "
step() { echo \$2 >/host/\$1.new; mv /host/\$1.new /host/\$1; }
told() { until [ -e /host/\$1 ]; do usleep 500000; done; }
yes '$marker' | head -c 4194304 >/marked; sync; step marked
told fill; dd if=/dev/zero of=/full bs=64k 2>/host/error; step full \$?
told remove; rm /full; sync; step removed"
    container neighbour 0 "
step() { echo \$2 >/host/\$1.new; mv /host/\$1.new /host/\$1; }
least=999999999
until [ -e /host/work ]; do
    while read -r key now unit; do
        case \$key in MemAvailable:) [ \$now -ge \$least ] || least=\$now; break ;; esac
    done </proc/meminfo
    usleep 500000
done
step least \$least
dd if=/dev/zero of=/dev/null bs=96M count=1 2>/dev/null; step worked \$?
step killed \$(sed -n 's/^oom_kill //p' /proc/vmstat)
read question </host/work; step answer \"\$question back\""
}
bid() { echo hello >share/$1/host/$2.new; mv share/$1/host/$2.new share/$1/host/$2; }
# told NAME STEP: waits until the container has said so, and prints what
told() { until_is share/$1/host/$2; cat share/$1/host/$2; }
