#!/usr/bin/env python3
"""vmlinux.py BZIMAGE OUT: takes the ELF kernel out of a bzImage (Linux x86 boot protocol 2.08, payload_offset and
payload_length), whichever of lz4, xz, gzip and zstd it is packed with."""
import struct
import subprocess
import sys

image = open(sys.argv[1], "rb").read()
setup = (image[0x1F1] or 4) + 1
offset, length = struct.unpack_from("<II", image, 0x248)
payload = image[setup * 512 + offset :][:length]
TOOLS = {
    b"\x02\x21\x4c\x18": ["lz4", "-dc"],
    b"\x04\x22\x4d\x18": ["lz4", "-dc"],
    b"\xfd7zXZ": ["xz", "-dc", "--single-stream"],
    b"\x1f\x8b": ["gzip", "-dc"],
    b"\x28\xb5\x2f\xfd": ["zstd", "-dc"],
}
for magic, tool in TOOLS.items():
    if payload.startswith(magic):
        # The last four bytes are the unpacked size; tools complain of them after having unpacked all.
        kernel = subprocess.run(tool, input=payload, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
        if kernel[:4] != b"\x7fELF":
            sys.exit(f"{sys.argv[1]}: what {tool[0]} unpacks is no ELF file")
        open(sys.argv[2], "wb").write(kernel)
        break
else:
    sys.exit(f"{sys.argv[1]}: packed in a way unknown here ({payload[:6].hex()})")
