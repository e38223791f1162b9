#!/usr/bin/env bash
# Boots an unmodified Debian Linux as a pod of podvisor, inside one Linux under software emulation of AMD virtualisation:
# real drivers, real ACPI, nested page tables, on any machine, with no /dev/kvm.
#   bash resources/nested/run.sh [--podvisor PATH] [CASE...]     cases: devices hotplug reset (default: all)
# Prints "CASE name ok" or "CASE name FAILED: why" with what the pod and podvisor said; ends with 1 if one failed.
# Packages and what is made of them are kept in ${XDG_CACHE_HOME:-~/.cache}/podvisor/nested, by package version.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../setup.sh"
need_nested
podvisor=$here/../../${CARGO_TARGET_DIR:-target}/release/podvisor
[ -z "${CARGO_TARGET_DIR:-}" ] || podvisor=$CARGO_TARGET_DIR/release/podvisor
if [ "${1:-}" = --podvisor ]; then podvisor=$2; shift 2; fi
[ -x "$podvisor" ] || { echo "no podvisor at $podvisor: build it, or give --podvisor PATH" >&2; exit 2; }
cases=${*:-devices hotplug reset}

# The kernel package: downloaded and unpacked once a version.
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p' | head -1)
version=$(apt-cache policy "$package" | sed -n 's/ *Candidate: //p')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/podvisor/nested/$package-$version
if [ ! -e "$cache/complete" ]; then
    say "fetching $package $version"
    rm -rf "$cache"; mkdir -p "$cache"
    (cd "$cache" && apt-get download -qq "$package" 2>/dev/null && dpkg-deb -x ./*.deb . && rm ./*.deb)
    python3 "$here/vmlinux.py" "$cache"/boot/vmlinuz-* "$cache/vmlinux"
    touch "$cache/complete"
fi
modules=$(echo "$cache"/lib/modules/*/kernel)

# pack DIR FILE: an initramfs
pack() { (cd "$1" && find . -print0 | cpio --null -o -H newc --quiet | gzip -1) >"$2"; }
# base DIR: what both have
base() { mkdir -p "$1"/{bin,dev,proc,sys,tmp,modules,lib,lib64}; cp /bin/busybox "$1/bin/busybox"; }

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
base "$work/l2"; cp "$here/l2/init" "$work/l2/init"
for m in virtio/virtio virtio/virtio_ring virtio/virtio_pci_modern_dev virtio/virtio_pci_legacy_dev virtio/virtio_pci \
         block/virtio_blk char/hw_random/virtio-rng char/virtio_console; do cp "$modules/drivers/$m.ko" "$work/l2/modules/"; done
cp "$modules"/fs/fuse/{fuse,virtiofs}.ko "$modules"/net/vmw_vsock/{vsock,vmw_vsock_virtio_transport_common,vmw_vsock_virtio_transport}.ko \
    "$work/l2/modules/"
base "$work/l1"; cp "$here/l1/init" "$work/l1/init"; echo "$cases" >"$work/l1/cases"
cp "$modules"/virt/lib/irqbypass.ko "$modules"/arch/x86/kvm/{kvm,kvm-amd}.ko "$work/l1/modules/"
mkdir "$work/l1/pod"; pack "$work/l2" "$work/l1/pod/initramfs"; cp "$cache/vmlinux" "$work/l1/pod/"
cp "$podvisor" "$work/l1/bin/podvisor"
ldd "$podvisor" | grep -o '/[^ ]*' | while read -r lib; do cp "$lib" "$work/l1/lib/"; done
cp /lib64/ld-linux-x86-64.so.2 "$work/l1/lib64/"
chmod +x "$work"/l?/init; pack "$work/l1" "$work/initramfs"

timeout 600 qemu-system-x86_64 -accel tcg -cpu max,+svm -m 2G -nographic -no-reboot -kernel "$cache"/boot/vmlinuz-* \
    -initrd "$work/initramfs" -append "console=ttyS0 quiet panic=-1" </dev/null >"$work/out" 2>&1 || true
sed -n '/CASE /,$p' "$work/out" | tr -d '\r' | grep -v 'reboot: Power down' || true
for name in $cases; do grep -q "CASE $name ok" "$work/out" || failed=1; done
if [ -n "${failed:-}" ]; then echo "-- the end of the emulated machine's console:"; tail -n 20 "$work/out"; exit 1; fi
