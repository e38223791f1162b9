#!/usr/bin/env python3
"""root.py DIR OPTION_OR_ITEM...: writes the root file system of a pod image from the items that nested/initramfs.py knows:
  DIR/root.img     EROFS, not compressed (Linux fs/erofs/erofs_fs.h), and behind it the hash tree of dm-verity (Linux
                   admin-guide/device-mapper/verity.rst: version 1, SHA-256, blocks of 4096 bytes, no salt)
  DIR/root.files   what is in it, a line each: mode, size, first block (or -), SHA-256 of the content (or -), path
and prints the number of blocks before the hash tree and the root hash. The same input gives the same bytes: owner 0, times 0,
order by name."""
import hashlib
import os
import stat
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../nested"))
from initramfs import collect

BLOCK = 4096
MAGIC = 0xE0F5E1E2  # EROFS_SUPER_MAGIC_V1
SUPERBLOCK_AT = 1024  # EROFS_SUPER_OFFSET
SLOT = 32  # a compact inode; also the unit of node numbers
# EROFS_FT_*: kinds in directory entries
KINDS = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}


def blocks(length):
    return -(-length // BLOCK)


def directory(entries):
    """A directory's content: in each block first its entries, then their names. `entries`: (name, node, kind) by name."""
    content, at = b"", 0
    while at < len(entries):
        count, size = 0, 0
        while at + count < len(entries) and size + 12 + len(entries[at + count][0]) <= BLOCK:
            size += 12 + len(entries[at + count][0])
            count += 1
        heads, names = b"", b""
        for name, node, kind in entries[at : at + count]:
            heads += struct.pack("<QHBB", node, 12 * count + len(names), kind, 0)
            names += name
        at += count
        content += heads + names
        if at < len(entries):
            content += bytes(-len(content) % BLOCK)
    return content


def erofs(entries):
    """The file system with `entries` (path to content and mode), and a list of what is where."""
    entries = {"": (b"", 0o040755), **entries}
    # One slot for each inode, from the block after the superblock's; the content follows, each in whole blocks. The first slot
    # stays empty: 0 is no inode number.
    nodes = {path: number for number, path in enumerate(sorted(entries), 1)}
    children = {path: [] for path, (_, mode) in entries.items() if stat.S_ISDIR(mode)}
    for path in sorted(entries):
        if path:
            children[os.path.dirname(path)].append(path)
    data_at = 1 + blocks((1 + len(nodes)) * SLOT)
    inodes, data, listed = bytes(SLOT), [], []
    for path, number in nodes.items():
        content, mode = entries[path]
        links = 1
        if stat.S_ISDIR(mode):
            below = children[path]
            links = 2 + sum(stat.S_ISDIR(entries[child][1]) for child in below)
            names = [(os.path.basename(child).encode(), nodes[child], KINDS[stat.S_IFMT(entries[child][1])]) for child in below]
            names += [(b".", number, 2), (b"..", nodes[os.path.dirname(path)], 2)]
            content = directory(sorted(names))
        # i_format 0: compact, plain.
        inodes += struct.pack("<HHHHIIIIHHI", 0, 0, mode, links, len(content), 0, data_at if content else 0, number, 0, 0, 0)
        plain = stat.S_ISREG(mode)
        listed.append((f"{mode:o}", len(content), data_at if content else "-",
                       hashlib.sha256(content).hexdigest() if plain else "-", "/" + path))
        data.append(content + bytes(-len(content) % BLOCK))
        data_at += blocks(len(content))
    superblock = struct.pack("<IIIBBHQQIIII16s16sIHHHBBIQ24s", MAGIC, 0, 0, 12, 0, nodes[""], len(nodes), 0, 0, data_at, 1, 0,
                             b"podvisor-pod-img", b"", 0, 0, 0, 0, 0, 0, 0, 0, b"")
    assert len(superblock) == 128
    first = bytes(SUPERBLOCK_AT) + superblock
    image = first + bytes(-len(first) % BLOCK) + inodes + bytes(-len(inodes) % BLOCK) + b"".join(data)
    assert len(image) == data_at * BLOCK
    return image, listed


def verity(image):
    """The hash tree, its top first, and the root hash."""
    level, tree = image, []
    while True:
        digests = [hashlib.sha256(level[at : at + BLOCK]).digest() for at in range(0, len(level), BLOCK)]
        if len(digests) == 1:
            return b"".join(reversed(tree)), digests[0].hex()
        level = b"".join(digests)
        level += bytes(-len(level) % BLOCK)
        tree.append(level)


def main(out, items):
    entries = collect(items).entries
    image, listed = erofs(entries)
    tree, root = verity(image)
    with open(os.path.join(out, "root.img"), "wb") as file:
        file.write(image + tree)
    with open(os.path.join(out, "root.files"), "w", encoding="utf-8") as file:
        file.writelines(" ".join(map(str, line)) + "\n" for line in listed)
    print(len(image) // BLOCK, root)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
