# What the cases of the pod image need in the rig: the image for each kernel in use, in /pod-image/KERNEL, and their words.
for version in $(tr ' ' '\n' <<<"$kernels" | sort -u); do
    bash "$here/../pod-image/build.sh" --kernel "$version" --output "$work/image-$version"
    for name in initrd root.img root.files cmdline; do
        host_items+=("file=/pod-image/$version/$name:$work/image-$version/$name")
    done
done
host_items+=("file=/pod-image/lib.sh:$here/../pod-image/cases/lib.sh")
