# What a case's host script has at hand. It runs in an empty directory; whatever it starts is killed when it ends.

# start MORE_OPTIONS...: boots the case's pod in the background: $cpus vCPUs, serial port into ./serial, podvisor's own
# words into ./log, API at ./api, standard input and output $keys and $screen. The kernel and its initramfs, which are at
# /pod/, come into it in the way of $mode. $platform: what --platform has beside the isolation, which is the mode's.
cpus=1 memory=256M serial=file=serial console=off keys=/dev/null screen=/dev/null more_cmdline= platform=
start() {
    : >serial
    set -- --cpus boot=$cpus --memory size=$memory --serial $serial --console $console "$@"
    cmdline="console=ttyS0 quiet panic=-1 case=$name $more_cmdline"
    isolation=
    case $mode in
        pvh) set -- --kernel /pod/vmlinux --initramfs /pod/initramfs --cmdline "$cmdline" "$@" ;;
        bzimage) set -- --kernel /pod/vmlinuz --initramfs /pod/initramfs --cmdline "$cmdline" "$@" ;;
        igvm) image native; set -- --igvm image "$@" ;;
        igvm-snp) image snp; set -- --igvm image "$@"; isolation=${platform:+,}isolation=snp-emulated ;;
    esac
    [ -z "$platform$isolation" ] || set -- --platform "$platform$isolation" "$@"
    podvisor -v --api-socket api "$@" <$keys >>$screen 2>log &
    monitor=$!
}
# image PLATFORM: the case's image, with its command line and PCI segments in it, as ./image
image() {
    rm -f image; segments=$(echo "$platform" | sed -n 's/.*num_pci_segments=\([0-9]*\).*/\1/p')
    podvisor igvm build --kernel /pod/vmlinuz --initrd /pod/initramfs --cmdline "$cmdline" --platform $1 \
        --segments ${segments:-1} --output image --sbom none >build 2>&1 || fail "podvisor igvm build: $(cat build)"
}
fail() { echo "FAILED: $*"; exit 1; }
# check WHAT COMMAND...: fails the case, naming WHAT, unless COMMAND succeeds
check() { what=$1; shift; "$@" || fail "$what"; }
# said STEP [TIMES]: waits until the pod has said "pod: ok STEP"
said() {
    until [ "$(grep -c "pod: ok $1" serial)" -ge "${2:-1}" ]; do
        ! grep -q "pod: failed" serial || { sleep 1; fail "in the pod: $(sed -n 's/.*pod: failed //p' serial | head -n 1)"; }
        [ -e "/proc/$monitor" ] || grep -q "pod: ok $1" serial || fail "podvisor ended before the pod said \"$1\""
        usleep 50000
    done
}
# word NAME: what the pod has said after "pod: NAME "
word() { sed -n "s/^.*pod: $1 //p" serial | tr -d '\r'; }
# tell TEXT: prints it at once
tell() { echo "    $*" >/dev/ttyS1; }
# ended CODE: waits for podvisor's end, which must be with that exit code
ended() { wait $monitor; code=$?; [ $code = "$1" ] || fail "podvisor ended with $code, not $1"; }
ctl() { podvisor ctl --api-socket api "$@"; }
# tree DIR: names, kinds, sizes and content of all that is below DIR, as one checksum; the same in host and pod
tree() { (cd "$1" && { find . | sort | xargs stat -c '%n %f %h'; find . -type f | sort | xargs sha256sum
    find . -type l | sort | xargs -n 1 readlink; }) | sha256sum; }
# serve DIR: Debian's virtiofsd for ./DIR at ./DIR.sock, its words in ./DIR.log, its process $server
serve() {
    if [ -e /etc/virtiofsd-of-qemu ]; then
        virtiofsd -f -o sandbox=chroot -o source=$PWD/$1 -o allow_direct_io --socket-path=$1.sock >$1.log 2>&1 &
    else virtiofsd --sandbox=chroot --shared-dir=$PWD/$1 --allow-direct-io --socket-path=$1.sock >$1.log 2>&1 &
    fi
    server=$!
    until [ -S $1.sock ]; do [ -e /proc/$server ] || fail "virtiofsd: $(cat $1.log)"; usleep 20000; done
}
