#!/usr/bin/env bash
# Installs what building and testing podvisor needs on Debian 12, if it is missing. Sourced by the other scripts:
#   need_build   a C compiler and a Rust toolchain
#   need_tests   what the tests run beside that
#   need_nested  what the nested rig runs
set -euo pipefail

say() { printf '\n== %s\n' "$*"; }

# apt_need COMMAND PACKAGE...: installs the packages if COMMAND is not there.
apt_need() {
    local command=$1; shift
    command -v "$command" >/dev/null 2>&1 && return
    say "installing $*"
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# cargo_need COMMAND CRATE: installs a cargo tool if it is not there.
cargo_need() {
    command -v "$1" >/dev/null 2>&1 && return
    say "installing $2"
    cargo install --locked --quiet "$2"
}

need_build() {
    apt_need cc build-essential
    export PATH="$HOME/.cargo/bin:$PATH"
    if ! command -v cargo >/dev/null 2>&1; then
        echo "podvisor needs Rust 1.88 or newer (Debian 12's own is too old): install it with rustup, then run this again." >&2
        exit 1
    fi
}

need_tests() {
    need_build
    apt_need python3 python3
    apt_need qemu-img qemu-utils
    apt_need mkfs.ext4 e2fsprogs
    apt_need file file
    apt_need openssl openssl
    need_nested
    cargo_need cargo-nextest cargo-nextest
    cargo_need cargo-deny cargo-deny
    cargo_need cargo-fuzz cargo-fuzz
}

# What boots Linux pods in an emulated host.
need_nested() {
    apt_need qemu-system-x86_64 qemu-system-x86
    # Debian 12 has it in qemu-system-common, which came just now; later ones have a package of its own.
    [ -x /usr/lib/qemu/virtiofsd ] || apt_need /usr/libexec/virtiofsd virtiofsd
    apt_need cc build-essential
    apt_need mkfs.ext4 e2fsprogs
    apt_need lz4 lz4
    apt_need xz xz-utils
    apt_need zstd zstd
    apt_need python3 python3
    # The static one: its command has the same name as the other.
    case $(ldd /bin/busybox 2>&1 || true) in
        *"not a dynamic executable"* | *"statically linked"*) ;;
        *) apt_need /none busybox-static ;;
    esac
}
