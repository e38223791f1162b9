//! Tests on the host: what is checked, against what it lets through.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod describe;
mod hash;
mod host;
mod image;

use crate::abi::{self, Fixup, Manifest, Payload, Span};
use crate::madt;
use zerocopy::IntoBytes;

/// The entries of a memory map: start, end, type.
fn map_page(entries: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut page: Vec<u8> = entries
        .iter()
        .flat_map(|(start, end, kind)| [start / 4096, (end - start) / 4096, *kind])
        .flat_map(u64::to_le_bytes)
        .collect();
    page.resize(4096, 0);
    page
}

/// A setup header of protocol 2.15 with a 64-bit entry point, an `init_size` of 1 MiB and command lines of 255 bytes.
fn setup_header() -> Vec<u8> {
    let mut header = vec![0; 0x268 - 0x1F1];
    let mut put = |offset: usize, bytes: &[u8]| header[offset - 0x1F1..][..bytes.len()].copy_from_slice(bytes);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &255u32.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    header
}

/// A table of `len` bytes.
fn table(signature: [u8; 4], len: usize) -> Vec<u8> {
    let mut table = vec![0; len];
    table[..4].copy_from_slice(&signature);
    table[4..8].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
    table[9] = 0u8.wrapping_sub(madt::sum(&table));
    table.resize(len.next_multiple_of(16), 0);
    table
}

/// A manifest of a kernel of 3 MiB and a byte, and an initrd of 10 bytes; `change` may change its head.
fn manifest(change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
    let head_len = size_of::<Manifest>().next_multiple_of(16);
    let mut body: Vec<u8> = Vec::new();
    let mut span = |bytes: &[u8]| {
        body.resize(body.len().next_multiple_of(16), 0);
        let offset = u32::try_from(head_len + body.len()).unwrap();
        body.extend_from_slice(bytes);
        Span {
            offset,
            len: u32::try_from(bytes.len()).unwrap(),
        }
    };
    let acpi = [table(*b"DSDT", 100), table(*b"FACP", 276), table(*b"MCFG", 60)].concat();
    let fixup = Fixup {
        offset: 40,
        base: abi::FIXUP_MMIO_START,
        addend: u64::MAX,
    };
    let mut head = Manifest {
        magic: abi::MAGIC,
        version: abi::VERSION,
        setup_header: span(&setup_header()),
        command_line: span(b"quiet\0"),
        acpi: span(&acpi),
        fixups: span(fixup.as_bytes()),
        kernel: Payload {
            staged: 0x400_0000,
            dest: 0x100_0000,
            len: (3 << 20) + 1,
            memory_len: 4 << 20,
            entry: 0x100_0200,
        },
        initrd: Payload {
            staged: 0x500_0000,
            dest: 0x200_0000,
            len: 10,
            memory_len: 10,
            entry: 0,
        },
        chunks: 0x600_0000,
        chunk_count: 5,
        ..Manifest::default()
    };
    head.len = u32::try_from(head_len + body.len()).unwrap();
    change(&mut head);
    let mut bytes = vec![0; head_len];
    bytes[..size_of::<Manifest>()].copy_from_slice(head.as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}
