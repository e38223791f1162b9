# A host kernel of the nested rig's own, built from Debian's linux-source-6.12: its KVM offers KVM_X86_SW_PROTECTED_VM, that is
# guest_memfd and memory attributes with no confidential processor. Sourced after ../setup.sh and packages.sh.
#   built_kernel   makes sure that it is there and sets $kernel_dir to its directory: boot/vmlinuz-built, config, modules.builtin
# It takes about six minutes of two processors, once: the directory is named by the SHA-256 of the source package's, the
# configuration and $recipe, and kept outside the tree.

recipe=1 # another number builds it again

# What building a kernel needs beside need_nested.
need_kernel_build() {
    apt_need make build-essential
    apt_need flex flex
    apt_need bison bison
    apt_need bc bc
    apt_need perl perl
    [ -e /usr/include/libelf.h ] || apt_need /none libelf-dev
}

built_kernel() {
    local key
    package_sha linux-source-6.12 bookworm-backports || return
    key=$(printf '%s %s %s' "$package_sha" "$(sha256sum <"$nested/kernel.config")" "$recipe" | sha256sum | cut -d' ' -f1)
    kernel_dir=$cache/built/$key
    [ -e "$kernel_dir/complete" ] || { package linux-source-6.12 bookworm-backports && alone build_kernel; }
}

# build_kernel: what built_kernel does when it is not there; the sources go again, what the build said stays in $cache/built/log
build_kernel() {
    [ ! -e "$kernel_dir/complete" ] || return 0
    need_kernel_build
    say "building a host kernel with KVM_SW_PROTECTED_VM (some six minutes on two processors, once)"
    local tree started=$SECONDS log=$cache/built/log
    mkdir -p "$cache/built"; tree=$(mktemp -d "$cache/built/build.XXXXXX")
    # What no x86 configuration reads is not unpacked: more than half of it.
    dpkg-deb --fsys-tarfile "$package_file" | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        tar -xJ -C "$tree" --strip-components=1 --anchored --exclude='linux-source-6.12/drivers/gpu/drm/*.[ch]' \
            --exclude='linux-source-6.12/sound/*.[ch]' --exclude='linux-source-6.12/arch/[!Kx]*.[chS]' \
            --exclude='linux-source-6.12/arch/[!Kx]*.dts*' --exclude='linux-source-6.12/tools/testing/*'
    if ! make_kernel "$tree" >"$log" 2>&1; then
        rm -rf "$tree"
        tail -n 30 "$log" >&2; echo "the host kernel does not build; all that was said: $log" >&2
        return 1
    fi
    rm -rf "$kernel_dir"; mkdir -p "$kernel_dir/boot"
    cp "$tree/arch/x86/boot/bzImage" "$kernel_dir/boot/vmlinuz-built"
    cp "$tree/.config" "$kernel_dir/config"
    # There the builder of initramfs sees that a case's module is built in.
    printf '%s.ko\n' kvm kvm-amd tun irqbypass >"$kernel_dir/modules.builtin"
    touch "$kernel_dir/complete"
    rm -rf "$tree" "$package_file"
    say "built in $((SECONDS - started)) s: $(stat -c %s "$kernel_dir/boot/vmlinuz-built") bytes"
}

# make_kernel DIR: configures and builds it, for the same bytes from the same input
make_kernel() (
    cd "$1" || exit
    export KBUILD_BUILD_TIMESTAMP=1970-01-01 KBUILD_BUILD_USER=podvisor KBUILD_BUILD_HOST=podvisor
    make KCONFIG_ALLCONFIG="$nested/kernel.config" allnoconfig || exit
    # Kconfig drops what it cannot have without a word.
    grep -E '^CONFIG_|^# CONFIG_' "$nested/kernel.config" | { grep -vxFf .config || true; } >wanted
    if [ -s wanted ]; then echo "the configuration does not take:"; cat wanted; exit 1; fi
    make -j"$(nproc)" bzImage
)
