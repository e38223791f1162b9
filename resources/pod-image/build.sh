#!/usr/bin/env bash
# Builds a pod image from Debian packages: a kernel, an initrd that opens a dm-verity root, that root with crun and an init,
# and the command line that holds the root's hash. The same packages give the same bytes. docs/pod-image.md tells more.
#   bash resources/pod-image/build.sh [--kernel 6.1|6.12] --output DIR
# Writes into DIR: vmlinuz, vmlinux, initrd, root.img, cmdline; and, for people, root.files (what is in root.img) and
# packages (of what it is made).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../setup.sh"
. "$here/../nested/packages.sh"

usage() { sed -n 's/^#   bash //p' "$here/build.sh" >&2; exit 2; }
version=6.1 output=
while [ $# -gt 0 ]; do
    case $1 in
        --kernel) version=${2:?--kernel needs a version}; shift 2 ;;
        --output) output=${2:?--output needs a directory}; shift 2 ;;
        *) usage ;;
    esac
done
[ -n "$output" ] || usage
need_nested
mkdir -p "$output"
export LC_ALL=C

# add NAME: unpacks a package for the image, and says which it was
libraries=()
: >"$output/packages"
add() {
    unpacked "$1" bookworm
    libraries+=(--library "$package_dir")
    echo "$1 $package_sha" >>"$output/packages"
}
add busybox-static; busybox=$package_dir/bin/busybox
add crun; crun=$package_dir/usr/bin/crun
add e2fsprogs; mke2fs=$package_dir/sbin/mke2fs
for name in libc6 libcap2 libseccomp2 libyajl2 libsystemd0 libgcrypt20 libgpg-error0 liblz4-1 liblzma5 libzstd1 \
    libext2fs2 libblkid1 libuuid1 libcom-err2; do add "$name"; done
kernel "$version"
echo "linux-image-cloud-amd64 $version $(basename "$kernel_dir")" >>"$output/packages"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -Os -static -s -Wl,--build-id=none -o "$work/dm" "$here/dm.c"

items=("file=/init:$here/initrd/init" "file=/bin/busybox:$busybox" "file=/bin/dm:$work/dm"
    dir=/dev dir=/proc dir=/sys dir=/tmp dir=/root)
for module in virtio_pci virtio_blk sha256_ssse3 dm_verity erofs; do items+=("module=$module"); done
python3 "$here/../nested/initramfs.py" "$output/initrd" --kernel "$kernel_dir" "${items[@]}"

items=("file=/init:$here/root/init" "file=/bin/busybox:$busybox" "file=/bin/dm:$work/dm" "program=/bin/crun:$crun"
    "program=/bin/mke2fs:$mke2fs" dir=/dev dir=/proc dir=/sys dir=/tmp dir=/run dir=/layers dir=/share)
for applet in $("$busybox" --list); do
    case $applet in busybox | mke2fs) ;; *) items+=("link=/bin/$applet:busybox") ;; esac
done
for module in xts aesni_intel dm_crypt overlay virtiofs; do items+=("module=$module"); done
read -r blocks hash < <(python3 "$here/root.py" "$output" "${libraries[@]}" --kernel "$kernel_dir" "${items[@]}")

printf 'console=ttyS0 quiet panic=-1 podvisor.root=%s:%s\n' "$blocks" "$hash" >"$output/cmdline"
cp "$kernel_dir"/boot/vmlinuz-* "$output/vmlinuz"
cp "$kernel_dir/vmlinux" "$output/vmlinux"
