# Debian packages for the nested rig and for pod images, kept outside the tree by their content. Sourced, after ../setup.sh,
# by scripts that set $here to their own directory.
#   package NAME SUITE    makes sure that the newest such package is there and sets $package_file to it (a .deb)
#   unpacked NAME SUITE   the same, and sets $package_dir to a directory with its files (read them, do not write there)
#   kernel WHICH          sets $kernel_dir to a directory that holds boot/vmlinuz-*, the modules, and of a Debian kernel
#                         vmlinux (the ELF inside it). WHICH is 6.1, 6.12, or such a directory (a path with a slash)
# SUITE is one of $suites: bookworm and bookworm-backports, unless the script that sources this sets $cache and $suites. The machine's own apt is only asked for its mirror: lists and settings live in an
# apt root of the rig's own, so that the same packages come whatever Debian release runs it. Several scripts may ask at once.

nested=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/podvisor/nested
suites=(bookworm bookworm-backports)
lists_are_good_for=1440 # minutes

# The rig's apt, on its own root.
rig_apt() {
    local command=$1; shift
    "$command" -o Dir="$cache/apt" -o Dir::State::status="$cache/apt/status" -o Dir::Etc::sourceparts=- \
        -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Debug::NoLocking=1 -o APT::Sandbox::User= -q "$@"
}

# alone COMMAND...: runs it while no other script that shares the cache does such a thing
alone() {
    local status=0
    mkdir -p "$cache"
    exec 8>"$cache/lock"; flock 8
    "$@" || status=$?
    exec 8>&-
    return $status
}

# refresh_lists: writes the apt root and updates its lists, at most once a day; without a network, what is there serves.
refresh_lists() { lists_are_fresh || alone update_lists; }
lists_are_fresh() { [ -n "$(find "$cache/apt/refreshed" -mmin -$lists_are_good_for 2>/dev/null)" ]; }
update_lists() {
    ! lists_are_fresh || return 0
    local mirror
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        grep -v '^ *#' |
        grep -oE '(https?|file|mirror\+file):[^ ]*/debian/?( |$)' | head -1 | tr -d ' ' || true)
    [ -n "$mirror" ] || { echo "apt's sources name no Debian mirror: add one to /etc/apt/sources.list" >&2; return 1; }
    mkdir -p "$cache"/apt/{lists/partial,archives/partial,etc/apt/preferences.d,var/lib/apt/lists/partial,var/cache/apt/archives/partial}
    : >"$cache/apt/status"
    local suite
    for suite in "${suites[@]}"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done >"$cache/apt/sources.list"
    if rig_apt apt-get update >"$cache/apt/log" 2>&1; then touch "$cache/apt/refreshed"
    else echo "note: the package lists could not be refreshed (see $cache/apt/log)" >&2; fi
}

# package_sha NAME SUITE: sets $package_sha to the SHA-256 that the signed lists give
package_sha() {
    refresh_lists || return
    package_sha=$(rig_apt apt-cache show "$1/$2" 2>/dev/null | sed -n 's/^SHA256: //p' | head -1)
    [ -n "$package_sha" ] || { echo "no package $1 in $2 (see $cache/apt/log)" >&2; return 1; }
}

package() {
    package_sha "$1" "$2" || return
    package_file=$cache/packages/$package_sha.deb
    [ -e "$package_file" ] || alone fetch "$1" "$2"
}
# fetch NAME SUITE: what package does when it is not there
fetch() {
    [ ! -e "$package_file" ] || return 0
    say "fetching $1 from $2"
    local into; mkdir -p "$cache/packages"; into=$(mktemp -d "$cache/packages/fetch.XXXXXX")
    (cd "$into" && rig_apt apt-get download "$1/$2" >"$cache/apt/log" 2>&1 &&
        sha256sum --check --quiet <<<"$package_sha  $(echo *.deb)" && mv ./*.deb "$package_file") ||
        { tail -n 5 "$cache/apt/log" >&2; rm -rf "$into"; return 1; }
    rm -rf "$into"
}

unpacked() {
    package_sha "$1" "$2" || return
    package_dir=$cache/unpacked/$package_sha
    [ -e "$package_dir" ] || { package "$1" "$2" && alone unpack; }
}
# unpack: what unpacked does when it is not there; the directory appears when it is complete
unpack() {
    [ ! -e "$package_dir" ] || return 0
    local into; mkdir -p "$cache/unpacked"; into=$(mktemp -d "$cache/unpacked/unpack.XXXXXX")
    dpkg-deb -x "$package_file" "$into" && rm -rf "$into/usr/share/doc" && chmod 755 "$into" && mv "$into" "$package_dir" ||
        { rm -rf "$into"; return 1; }
}

kernel() {
    local suite name
    case $1 in
        6.1) suite=bookworm ;;
        6.12) suite=bookworm-backports ;;
        */*)
            compgen -G "$1/boot/vmlinuz-*" >/dev/null || { echo "$1 is no kernel's directory: there is no boot/vmlinuz-*" >&2; return 1; }
            kernel_dir=$(cd "$1" && pwd); return ;;
        *) echo "no kernel $1: 6.1, 6.12 and directories (with a slash) are known" >&2; return 1 ;;
    esac
    refresh_lists || return
    name=$(rig_apt apt-cache show "linux-image-cloud-amd64/$suite" | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p' | head -1)
    [ -n "$name" ] || { echo "no package linux-image-cloud-amd64 in $suite (see $cache/apt/log)" >&2; return 1; }
    package_sha "$name" "$suite" || return
    kernel_dir=$cache/kernels/$package_sha
    kernel_is_there || { package "$name" "$suite" && alone unpack_kernel; }
}
# kernel_is_there: the directory is complete, and its two files are those that were put there
kernel_is_there() { (cd "$kernel_dir" && sha256sum --check --status --strict complete) 2>/dev/null; }
unpack_kernel() {
    ! kernel_is_there || return 0
    local into; mkdir -p "$cache/kernels"; into=$(mktemp -d "$cache/kernels/unpack.XXXXXX")
    dpkg-deb -x "$package_file" "$into" && python3 "$nested/vmlinux.py" "$into"/boot/vmlinuz-* "$into/vmlinux" &&
        (cd "$into" && rm -rf usr && sha256sum boot/vmlinuz-* vmlinux >complete) || { rm -rf "$into"; return 1; }
    [ ! -e "$kernel_dir" ] || mv "$kernel_dir" "$into/old"
    mv "$into" "$kernel_dir"
    rm -rf "$kernel_dir/old" "$package_file"
}
