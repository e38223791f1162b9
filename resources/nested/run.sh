#!/usr/bin/env bash
# Boots unmodified Debian Linux as a pod of podvisor, inside one Linux under software emulation of AMD virtualisation: real
# drivers, real ACPI, nested page tables, on any machine, with no /dev/kvm. docs/nested-rig.md tells more.
#   bash resources/nested/run.sh [--podvisor PATH] [--boot MODE] [--pod-kernel 6.1|6.12] [--host-kernel 6.1|6.12|DIR] [--cases DIR] [-v] [--list] [CASE[@MODE-KERNEL]...]
# MODE is how the pod's kernel comes into it: pvh, bzimage, igvm or igvm-snp. Cases are the directories under cases/, or under
# each --cases DIR instead; CASE may be "all" (as it is with none given), and all run in one boot of the host. As they end it
# prints a line for each:
#   CASE name ok (N s)     or     CASE name FAILED: why, and what the pod and podvisor said (with -v always)
#   CASE name skipped: why, where a case says that it cannot be in that mode
# Exit code: 0 none failed, 1 one did, 2 wrong usage or the rig itself did not work.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../setup.sh"
. "$here/packages.sh"
PATH=$PATH:/usr/sbin:/sbin

usage() { sed -n 's/^#   bash //p' "$here/run.sh" >&2; exit 2; }
wrong() { echo "$*" >&2; exit 2; }
target=${CARGO_TARGET_DIR:-$here/../../target}
podvisor=$target/release/podvisor host_kernel=6.12 pod_kernel=6.1 boot=pvh verbose='' list='' folders=()
while [[ "${1:-}" = -* ]]; do
    case $1 in
        --podvisor) podvisor=${2:?--podvisor needs a path}; shift 2 ;;
        --host-kernel) host_kernel=${2:?--host-kernel needs a version or a directory}; shift 2 ;;
        --boot) boot=${2:?--boot needs pvh, bzimage, igvm or igvm-snp}; shift 2 ;;
        --pod-kernel) pod_kernel=${2:?--pod-kernel needs a version}; shift 2 ;;
        --cases) folders+=("${2:?--cases needs a directory}"); shift 2 ;;
        -v) verbose=1; shift ;;
        --list) list=1; shift ;;
        *) usage ;;
    esac
done
[ ${#folders[@]} -gt 0 ] || folders=("$here/cases")
# Where each case is, by its name.
declare -A at=()
for folder in "${folders[@]}"; do
    for script in "$folder"/*/host; do
        [ -f "$script" ] || wrong "no cases in $folder: there is no NAME/host"
        name=$(basename "$(dirname "$script")")
        [ -z "${at[$name]:-}" ] || wrong "two cases have the name $name: ${at[$name]} and $(dirname "$script")"
        at[$name]=$(dirname "$script")
    done
done
all=$(printf '%s\n' "${!at[@]}" | sort)
[ -z "$list" ] || { echo "$all"; exit; }
# What is to be run, a line each: label, case, mode, kernel; and the sum of the limits.
runs='' seconds=120
# add LABEL CASE MODE KERNEL
add() {
    local script=${at[$2]:-}/host mode why
    [ -f "$script" ] || wrong "no case $2; there are: $(echo $all)"
    [[ $3 =~ ^(pvh|bzimage|igvm|igvm-snp)$ ]] || wrong "no mode $3: pvh, bzimage, igvm and igvm-snp are known"
    [[ $4 =~ ^(6.1|6.12)$ ]] || wrong "no kernel $4 for a pod: 6.1 and 6.12 are known"
    while IFS=: read -r mode why; do
        case $3-$4 in ${mode# }) echo "CASE $1 skipped:$why"; return ;; esac
    done < <(sed -n 's/^# not in://p' "$script")
    runs+="$1 $2 $3 $4"$'\n'
    seconds=$((seconds + $(limit "$script")))
}
limit() { sed -n 's/^# limit: \([0-9]*\) s$/\1/p' "$1" | grep . || echo 120; }
[ $# -gt 0 ] || set -- all
for spec; do
    mode=$boot version=$pod_kernel
    case $spec in *@*) suffix=${spec##*@}; mode=${suffix%-*} version=${suffix##*-} ;; esac
    case ${spec%%@*} in
        all) for name in $all; do add "$name${spec#all}" "$name" "$mode" "$version"; done ;;
        *) add "$spec" "${spec%%@*}" "$mode" "$version" ;;
    esac
done
[ -n "$runs" ] || { echo "RIG done"; exit; }
cases=$(cut -d' ' -f2 <<<"$runs" | sort -u) kernels=$(cut -d' ' -f4 <<<"$runs" | sort -u)
[ -x "$podvisor" ] || wrong "no podvisor at $podvisor: build it, or give --podvisor PATH"
need_nested
kernel "$host_kernel"; host=$kernel_dir

work=$(mktemp -d)
qemu=
cleanup() {
    if [ -n "$qemu" ]; then kill "$qemu" 2>/dev/null && wait "$qemu" || true; fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM

pod_items=("file=/bin/busybox:/bin/busybox" "file=/init:$here/l2/init"
    dir=/dev dir=/proc dir=/sys dir=/tmp)
for module in virtio_pci virtio_blk virtio-rng virtio_console virtiofs vmw_vsock_virtio_transport virtio_net virtio_balloon virtio_mem \
    virtio_pmem nd_pmem pvpanic-pci ptp_kvm button evdev; do pod_items+=("module=$module"); done
printf %s "$runs" >"$work/run-these"
host_items=(--kernel "$host" "file=/bin/busybox:/bin/busybox" "file=/init:$here/l1/init"
    "file=/lib.sh:$here/l1/lib.sh" "file=/run-these:$work/run-these"
    "program=/bin/podvisor:$podvisor"
    "program=/bin/mkfs.ext4:$(command -v mkfs.ext4)" "program=/bin/e2fsck:$(command -v e2fsck)"
    dir=/dev dir=/proc dir=/sys dir=/tmp module=kvm_amd module=tun)
for tool in duct files; do
    cc -O2 -static -o "$work/$tool" "$here/$tool.c"
    host_items+=("file=/bin/$tool:$work/$tool") pod_items+=("file=/bin/$tool:$work/$tool")
done
# Debian 12 has it in qemu-system-common, with options of its own; later ones have a package.
if [ -x /usr/libexec/virtiofsd ]; then host_items+=("program=/bin/virtiofsd:/usr/libexec/virtiofsd")
elif [ -x /usr/lib/qemu/virtiofsd ]; then
    touch "$work/of-qemu"
    host_items+=("program=/bin/virtiofsd:/usr/lib/qemu/virtiofsd" "file=/etc/virtiofsd-of-qemu:$work/of-qemu")
fi
if [ -n "$verbose" ]; then touch "$work/verbose"; host_items+=("file=/verbose:$work/verbose"); fi
for name in $cases; do
    host_items+=("tree=/cases/$name:${at[$name]}")
    [ ! -f "${at[$name]}/pod" ] || pod_items+=("file=/cases/$name:${at[$name]}/pod")
done
# What a directory of cases needs beside: its rig.sh adds to host_items and pod_items, may use $work for what it makes, and
# finds the kernels in use in $kernels.
for folder in "${folders[@]}"; do if [ -f "$folder/rig.sh" ]; then . "$folder/rig.sh"; fi; done
for version in $kernels; do
    kernel "$version"
    python3 "$here/initramfs.py" "$work/pod-$version" --kernel "$kernel_dir" "${pod_items[@]}"
    host_items+=("file=/pod/$version/initramfs:$work/pod-$version")
    modes=$(awk -v version="$version" '$4 == version {print $3}' <<<"$runs")
    case $modes in *pvh*) host_items+=("file=/pod/$version/vmlinux:$kernel_dir/vmlinux") ;; esac
    case $modes in *bzimage* | *igvm*) host_items+=("file=/pod/$version/vmlinuz:$(echo "$kernel_dir"/boot/vmlinuz-*)") ;; esac
done
python3 "$here/initramfs.py" "$work/host" "${host_items[@]}"

# Without cmpxchg16b: QEMU 7.2 loses the flags when a nested exit comes right after one, and newer kernels use it to allocate.
processor=max,+svm,-cx16
# However long the emulation is kept from running, the host's clock stays the TSC, or kvmclock has no pair to give; its
# kernel does not take a late timer for a broken one; and it is told the TSC's frequency, or its seconds have another length.
cc -O2 -o "$work/tsc" "$here/tsc.c"
clock="tsc=reliable tsc_early_khz=$("$work/tsc") no_timer_check"
# Its console goes to a file, its second serial port carries the results.
# Open at both ends from here on, so that nobody waits for a machine that does not start.
mkfifo "$work/results"; exec 3<>"$work/results"
sed -u 's/\r$//' <"$work/results" 3>&- | tee "$work/out" 3>&- & printer=$!
# Should this script be killed outright, they go with it.
setpriv --pdeathsig TERM timeout -k 5 "$seconds" setpriv --pdeathsig KILL \
    qemu-system-x86_64 -accel tcg -cpu "$processor" -m 3G -display none -no-reboot -nodefaults -no-user-config \
    -kernel "$host"/boot/vmlinuz-* -initrd "$work/host" -append "console=ttyS0 quiet panic=-1 $clock rdinit=/init" \
    -serial "file:$work/console" -serial "file:$work/results" </dev/null 3>&- >"$work/qemu" 2>&1 &
qemu=$!
wait "$qemu" || true
qemu=
exec 3>&-
wait "$printer" || true
if ! grep -q '^RIG done' "$work/out"; then
    echo "-- the emulated machine did not come to its end; its console:"
    cat "$work/qemu"; grep -v "^$" "$work/console" | tail -n 80
    exit 2
fi
[ "$(grep -c '^CASE [^ ]* ok' "$work/out")" = "$(wc -l <"$work/run-these")" ]
