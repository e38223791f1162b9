#!/usr/bin/env python3
"""initramfs.py OUT [--kernel DIR] [--library DIR]... ITEM...: writes an uncompressed initramfs (cpio "newc", Linux
Documentation/driver-api/early-userspace/buffer-format.rst). The same input gives the same bytes.

ITEM is
  file=GUEST_PATH:HOST_PATH     a file (0755 if it is executable here, else 0644)
  tree=GUEST_PATH:HOST_PATH     a directory with all files below it
  program=GUEST_PATH:HOST_PATH  a program with its shared libraries: those that ldd names or, with --library, those from
                                such directories of unpacked packages
  link=GUEST_PATH:TARGET        a symbolic link
  dir=GUEST_PATH                an empty directory
  module=NAME                   a module of the kernel unpacked in DIR, with all it depends on; they are put at
                                /modules/NNN-NAME.ko in the order in which they can be loaded. One that is built into
                                the kernel adds nothing; one that is in neither is an error.
"""
import lzma
import os
import re
import subprocess
import sys


class Modules:
    """The modules of one unpacked kernel package."""

    def __init__(self, root):
        self.paths, self.builtin = {}, set()
        for folder, _, names in os.walk(root):
            for name in names:
                if match := re.fullmatch(r"(.+)\.ko(\.xz)?", name):
                    self.paths[match[1].replace("-", "_")] = os.path.join(folder, name)
                elif name == "modules.builtin":
                    for line in open(os.path.join(folder, name), encoding="ascii"):
                        self.builtin.add(os.path.basename(line.strip())[:-3].replace("-", "_"))

    def add(self, name, wanted):
        """Puts the module `name` into the dict `wanted` (name to content), after those it depends on."""
        name = name.replace("-", "_")
        if name in wanted or name in self.builtin:
            return
        if name not in self.paths:
            sys.exit(f"the kernel has no module {name}, and it is not built in")
        path = self.paths[name]
        content = (lzma.open if path.endswith(".xz") else open)(path, "rb").read()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in (depends[1].decode() if depends else "").split(","):
            if other:
                self.add(other, wanted)
        wanted[name] = content


class Archive:
    """A cpio archive in memory: parents are made as needed, entries are written in the order of their names."""

    def __init__(self, libraries=()):
        self.entries, self.libraries = {}, libraries

    def put(self, path, content, mode):
        path = path.strip("/")
        for end in [at for at, c in enumerate(path) if c == "/"]:
            self.entries.setdefault(path[:end], (b"", 0o040755))
        self.entries[path] = (content, mode)

    def file(self, path, host):
        with open(host, "rb") as opened:
            self.put(path, opened.read(), 0o100755 if os.access(host, os.X_OK) else 0o100644)

    def program(self, path, host):
        self.file(path, host)
        if self.libraries:
            self.needed(host)
            return
        listed = subprocess.run(["ldd", host], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/[^ ]+) \(0x", listed):
            # The loader is named by its full path; the others are looked for in /lib.
            self.file(library if "/ld-linux" in library else "/lib/" + os.path.basename(library), library)

    def needed(self, host):
        """Adds the loader and the libraries that the ELF file `host` asks for, and what those ask for, from packages."""
        told = subprocess.run(["readelf", "-W", "-l", "-d", host], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"program interpreter: ([^\]]+)\]|Shared library: \[([^\]]+)\]", told):
            path = name[0] or "/lib/" + name[1]
            if path.strip("/") in self.entries or (name[1].startswith("ld-linux")):
                continue
            for folder in self.libraries:
                found = [os.path.join(folder, base, "lib/x86_64-linux-gnu", os.path.basename(path)) for base in ("", "usr")]
                if found := [file for file in found if os.path.exists(file)]:
                    self.file(path, found[0])
                    self.needed(found[0])
                    break
            else:
                sys.exit(f"{host} needs {path}, which is in none of {' '.join(self.libraries)}")

    def write(self, out):
        with open(out, "wb") as file:
            entries = sorted(self.entries.items()) + [("TRAILER!!!", (b"", 0))]
            for inode, (name, (content, mode)) in enumerate(entries, 1):
                fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
                head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
                file.write(head + bytes(-len(head) % 4))
                file.write(content + bytes(-len(content) % 4))


def collect(items):
    """The archive that the command line's options and items describe."""
    options = {"--kernel": [], "--library": []}
    while items[:1] and items[0] in options:
        options[items[0]].append(items[1])
        items = items[2:]
    archive, wanted = Archive(options["--library"]), {}
    modules = Modules(options["--kernel"][0]) if options["--kernel"] else None
    for item in items:
        kind, _, value = item.partition("=")
        guest, _, host = value.partition(":")
        if kind == "file":
            archive.file(guest, host)
        elif kind == "tree":
            for folder, _, names in os.walk(host):
                for name in names:
                    path = os.path.join(folder, name)
                    archive.file(guest + "/" + os.path.relpath(path, host), path)
        elif kind == "program":
            archive.program(guest, host)
        elif kind == "link":
            archive.put(guest, host.encode(), 0o120777)
        elif kind == "dir":
            archive.put(guest, b"", 0o040755)
        elif kind == "module" and modules:
            modules.add(value, wanted)
        else:
            sys.exit(f"{item}: not understood (see the head of this file)")
    for order, (name, content) in enumerate(wanted.items()):
        archive.put(f"modules/{order:03}-{name}.ko", content, 0o100644)
    return archive


if __name__ == "__main__":
    collect(sys.argv[2:]).write(sys.argv[1])
