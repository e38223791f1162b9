# Debian's kernels for the nested rig, kept outside the tree. Sourced by run.sh.
#   kernel 6.1|6.12   makes sure that the newest such kernel is there and sets $kernel_dir to its directory, which holds
#                     boot/vmlinuz-*, vmlinux (the ELF inside it) and the modules
# The machine's own apt is only asked for its mirror: lists and settings live in an apt root of the rig's own, so that both
# kernels come whatever Debian release runs it. A kernel's directory is named by the SHA-256 of its package.

cache=${XDG_CACHE_HOME:-$HOME/.cache}/podvisor/nested
lists_are_good_for=1440 # minutes

# The rig's apt, on its own root.
rig_apt() {
    local command=$1; shift
    "$command" -o Dir="$cache/apt" -o Dir::State::status="$cache/apt/status" -o Dir::Etc::sourceparts=- \
        -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Debug::NoLocking=1 -o APT::Sandbox::User= -q "$@"
}

# refresh_lists: writes the apt root and updates its lists, at most once a day; without a network, what is there serves.
refresh_lists() {
    [ -z "$(find "$cache/apt/refreshed" -mmin -$lists_are_good_for 2>/dev/null)" ] || return 0
    local mirror
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        grep -v '^ *#' |
        grep -oE '(https?|file|mirror\+file):[^ ]*/debian/?( |$)' | head -1 | tr -d ' ' || true)
    [ -n "$mirror" ] || { echo "apt's sources name no Debian mirror: add one to /etc/apt/sources.list" >&2; return 1; }
    mkdir -p "$cache"/apt/{lists/partial,archives/partial,etc/apt/preferences.d,var/lib/apt/lists/partial,var/cache/apt/archives/partial}
    : >"$cache/apt/status"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$mirror" bookworm "$mirror" bookworm-backports >"$cache/apt/sources.list"
    if rig_apt apt-get update >"$cache/apt/log" 2>&1; then touch "$cache/apt/refreshed"
    else echo "note: the package lists could not be refreshed (see $cache/apt/log)" >&2; fi
}

kernel() {
    local suite package record sha path
    case $1 in
        6.1) suite=bookworm ;;
        6.12) suite=bookworm-backports ;;
        *) echo "no kernel $1: 6.1 and 6.12 are known" >&2; return 1 ;;
    esac
    refresh_lists
    package=$(rig_apt apt-cache show "linux-image-cloud-amd64/$suite" | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p' | head -1)
    [ -n "$package" ] || { echo "no package linux-image-cloud-amd64 in $suite (see $cache/apt/log)" >&2; return 1; }
    record=$(rig_apt apt-cache show "$package/$suite")
    sha=$(sed -n 's/^SHA256: //p' <<<"$record" | head -1)
    kernel_dir=$cache/kernels/$sha
    [ ! -e "$kernel_dir/complete" ] || return 0
    say "fetching $package ($(sed -n 's/^Size: //p' <<<"$record" | head -1) bytes)"
    rm -rf "$kernel_dir"; mkdir -p "$kernel_dir"
    (cd "$kernel_dir" && rig_apt apt-get download "$package/$suite" >"$cache/apt/log" 2>&1) ||
        { tail -n 5 "$cache/apt/log" >&2; return 1; }
    path=$(echo "$kernel_dir"/*.deb)
    echo "$sha  $path" | sha256sum --check --quiet
    dpkg-deb -x "$path" "$kernel_dir"
    rm "$path"; rm -rf "$kernel_dir/usr/share"
    python3 "$here/vmlinux.py" "$kernel_dir"/boot/vmlinuz-* "$kernel_dir/vmlinux"
    touch "$kernel_dir/complete"
}
