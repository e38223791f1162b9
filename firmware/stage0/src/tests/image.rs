//! The manifest.

use proptest::prelude::*;
use zerocopy::FromBytes;

use super::manifest;
use crate::abi::{self, Manifest};
use crate::codes;
use crate::manifest::{length, read};

#[test]
fn a_manifest_is_read() {
    let bytes = manifest(|_| {});
    assert_eq!(length(&bytes), Ok(bytes.len()));
    let image = read(&bytes, true).unwrap();
    assert_eq!(
        (image.chunk_count, image.payloads().count(), image.fixups.len()),
        (5, 2, 1)
    );
    assert_eq!(image.pages.start, abi::MANIFEST_START);
    let alone = manifest(|head| {
        head.initrd = abi::Payload::default();
        head.chunk_count = 4;
    });
    assert_eq!(read(&alone, false).unwrap().payloads().count(), 1);
    let in_place = manifest(|head| head.kernel.staged = head.kernel.dest);
    assert!(read(&in_place, false).is_ok());
    assert!(read(&in_place, true).is_err(), "shared pages are not used in place");
}

#[test]
fn every_wrong_field_is_refused_by_its_name() {
    type Change = fn(&mut Manifest);
    let cases: [(Change, &str); 20] = [
        (|head| head.magic[0] = 0, "no manifest"),
        (|head| head.version = 2, "version"),
        (|head| head.flags = 2, "flags"),
        (|head| head.len = 100, "length"),
        (|head| head.len = 0x1_B001, "length"),
        (|head| head.len += 1, "length"),
        (|head| head.setup_header.offset = 0, "setup_header"),
        (|head| head.setup_header.len = 0xA0, "setup_header.len"),
        (|head| head.command_line.len -= 1, "command_line has no end"),
        (|head| head.command_line.len = 0, "command_line has no end"),
        (|head| head.acpi.offset = u32::MAX, "acpi"),
        (|head| head.fixups.len = 15, "fixups"),
        (
            |head| head.kernel.entry = head.kernel.dest + head.kernel.len,
            "kernel.entry",
        ),
        (|head| head.kernel.entry = head.kernel.dest - 1, "kernel.entry"),
        (|head| head.kernel.memory_len = 1 << 20, "memory_len"),
        (|head| head.initrd.dest = head.kernel.dest + (4 << 20) - 4096, "dest"),
        (|head| head.initrd.staged += 1, "staged"),
        (|head| head.initrd.dest = abi::STAGE0_END - 4096, "dest"),
        (|head| head.chunks = u64::MAX & !4095, "chunks"),
        (|head| head.chunk_count = 6, "chunk_count"),
    ];
    for (change, words) in cases {
        let bytes = manifest(change);
        let refusal = read(&bytes, true).unwrap_err();
        assert_eq!(refusal.code(), codes::MANIFEST);
        assert!(refusal.to_string().contains(words), "{refusal} is not {words}");
    }
    let mut bytes = manifest(|_| {});
    let (head, _) = Manifest::read_from_prefix(&bytes).unwrap();
    for (offset, byte, words) in [
        (0x202, 0, "setup_header.header"),
        (0x207, 1, "setup_header.version"),
        (0x236, 0, "setup_header.xloadflags"),
        (0x263, 0x7F, "setup_header.init_size"),
        (0x238, 4, "command_line.len"),
    ] {
        let at = head.setup_header.offset as usize + offset - 0x1F1;
        let before = std::mem::replace(&mut bytes[at], byte);
        let refusal = read(&bytes, true).unwrap_err();
        assert!(refusal.to_string().contains(words), "{refusal} is not {words}");
        bytes[at] = before;
    }
}

proptest! {
    #[test]
    fn whatever_is_taken_keeps_its_places_apart(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        snp in any::<bool>(),
    ) {
        let mut bytes = manifest(|_| {});
        for (at, byte) in changes {
            let at = at.index(size_of::<Manifest>());
            bytes[at] = byte;
        }
        if let Ok(image) = read(&bytes, snp) {
            let mut places = vec![image.chunk_pages()];
            for payload in image.payloads() {
                places.push(crate::manifest::pages(payload.dest, payload.memory_len));
                if payload.staged != payload.dest {
                    places.push(crate::manifest::pages(payload.staged, payload.len));
                }
            }
            for (index, place) in places.iter().enumerate() {
                prop_assert!(place.start >= abi::STAGE0_END && place.end <= 0xC000_0000);
                prop_assert!(places[..index].iter().all(|other| !other.meets(place)));
            }
        }
    }
}
