# What the pod image's cases have at hand beside the rig's words. Their pods boot the image of $kernel in the way of $mode.
image=/pod-image/$kernel
memory=256M,shared=on
cmdline=$(cat "$image/cmdline") root=${cmdline##*podvisor.root=} blocks=${root%:*} hash=${root#*:}
# pod MORE_OPTIONS...: boots the image in the background with the root disk $root, the command line $cmdline, the directory
# ./share as its containers. serial, log and api as with start.
root=$image/root.img
pod() {
    : >serial; mkdir -p share
    set -- --cpus boot=$cpus --memory size=$memory --serial file=serial --console off \
        --disk path=$root,readonly=on,serial=podvisor-root --fs tag=pod,shared_dir=share "$@"
    platform=
    case $mode in
        pvh) set -- --kernel $image/vmlinux --initramfs $image/initrd --cmdline "$cmdline" "$@" ;;
        bzimage) set -- --kernel $image/vmlinuz --initramfs $image/initrd --cmdline "$cmdline" "$@" ;;
        igvm) pod_igvm native; set -- --igvm image "$@" ;;
        igvm-snp) pod_igvm snp; set -- --igvm image --platform isolation=snp-emulated "$@" ;;
    esac
    podvisor -v --api-socket api "$@" </dev/null 2>log &
    monitor=$!
}
# pod_igvm PLATFORM: the pod image with the command line in it, as ./image
pod_igvm() {
    podvisor igvm build --kernel $image/vmlinuz --initrd $image/initrd --cmdline "$cmdline" --platform $1 --output image >build 2>&1 ||
        fail "podvisor igvm build: $(cat build)"
}
# container NAME MEMORY SCRIPT: an OCI bundle in ./share with busybox, which runs SCRIPT with at most MEMORY bytes
container() {
    mkdir -p share/$1/rootfs/bin share/$1/rootfs/proc share/$1/rootfs/dev
    cp /bin/busybox share/$1/rootfs/bin/
    for applet in $(busybox --list); do ln -s busybox share/$1/rootfs/bin/$applet 2>/dev/null; done
    printf %s "$3" >share/$1/rootfs/script
    cat >share/$1/config.json <<END
{"ociVersion": "1.0.2", "hostname": "$1", "root": {"path": "rootfs"},
 "process": {"args": ["/bin/sh", "/script"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
 "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
 "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
           "resources": {"memory": {"limit": $2}}}}
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
