//! What the host gives: whatever passes the checks has what the rest of stage0 relies on.

use proptest::prelude::*;

use super::map_page;
use crate::accept::{PIECE, Ranges};
use crate::codes;
use crate::layout;
use crate::madt;
use crate::manifest::Range;
use crate::map::{MAX_RANGES, MemoryMap};

const LOW: (u64, u64, u64) = (0, 0xA_0000, 0);

#[test]
fn a_map_as_podvisor_gives_it_is_taken() {
    let page = map_page(&[
        LOW,
        (0x10_0000, 0xC000_0000, 0),
        (0xE800_0000, 0xF800_0000, 1),
        (1 << 32, 9 << 30, 0),
    ]);
    let map = MemoryMap::read(&page, 40).unwrap();
    assert_eq!((map.ranges().count(), map.ram().count()), (4, 3));
    let range = |start, end| Range { start, end };
    map.check_ram(range(0x10_0000, 0xC000_0000), "test").unwrap();
    map.check_ram(range(1 << 32, 9 << 30), "test").unwrap();
    for (start, end) in [
        (0, 0xA_0001),
        (0x9_F000, 0x10_1000),
        (0xE800_0000, 0xE800_1000),
        (8 << 30, (9 << 30) + 1),
    ] {
        let refusal = map.check_ram(range(start, end), "test").unwrap_err();
        assert_eq!(refusal.code(), codes::NOT_RAM, "{start:#x}..{end:#x}");
    }
}

#[test]
fn ranges_that_touch_are_one_to_what_needs_them() {
    let page = map_page(&[LOW, (0x10_0000, 0x20_0000, 0), (0x20_0000, 0x40_0000, 0)]);
    let map = MemoryMap::read(&page, 40).unwrap();
    map.check_ram(
        Range {
            start: 0x18_0000,
            end: 0x30_0000,
        },
        "test",
    )
    .unwrap();
}

#[test]
fn maps_that_lie_are_refused() {
    let narrow: &[(u64, u64, u64)] = &[(1 << 39, 1 << 39 | 0x1000, 0)];
    let flags: &[(u64, u64, u64)] = &[(0, 0x1000, 1 << 16)];
    let kind: &[(u64, u64, u64)] = &[(0, 0x1000, 2)];
    let many: Vec<_> = (0..=MAX_RANGES as u64)
        .map(|index| (0x10_0000 + index * 0x2000, 0x10_1000 + index * 0x2000, 0))
        .collect();
    let cases: [(&[(u64, u64, u64)], &str); 9] = [
        (&[LOW, LOW], "not sorted"),
        (&[(0, 0xA_1000, 0)], "RAM where devices are"),
        (&[(0xFEE0_0000, 0xFEE0_1000, 0)], "RAM where devices are"),
        (narrow, "RAM where devices are"),
        (&[(0x10_0000, 1 << 41, 0)], "outside the address space"),
        (&[(u64::MAX & !0xFFF, u64::MAX & !0xFFF, 0)], "not an end"),
        (kind, "type"),
        (flags, "flags"),
        (&many, "too many entries"),
    ];
    for (entries, words) in cases {
        let refusal = MemoryMap::read(&map_page(entries), 40).unwrap_err();
        assert_eq!(refusal.code(), codes::MEMORY_MAP);
        assert!(refusal.to_string().contains(words), "{refusal} is not {words}");
    }
    let endless = [1u64.to_le_bytes(), 1u64.to_le_bytes(), 1u64.to_le_bytes()].concat();
    assert!(
        MemoryMap::read(&endless, 40)
            .unwrap_err()
            .to_string()
            .contains("no end")
    );
}

/// Any entries, most of them of a plausible size and place.
fn entries() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
    let number = prop_oneof![0u64..0x1000, 0u64..1 << 21, any::<u64>()];
    prop::collection::vec((number.clone(), number, 0u64..3), 0..70)
}

/// A map that is taken: gaps and lengths in pages.
fn good_map() -> impl Strategy<Value = MemoryMap> {
    prop::collection::vec((0u64..0x4_0000, 1u64..0x4_0000, any::<bool>()), 1..20).prop_map(|parts| {
        let mut at = 1 << 20;
        let mut entries = vec![(0, 0x9_F000, 0)];
        for (gap, len, ram) in parts {
            let start = at + gap;
            at = start + len;
            entries.push((start << 12, at << 12, u64::from(!ram)));
        }
        MemoryMap::read(&map_page(&entries), 46).unwrap()
    })
}

proptest! {
    #[test]
    fn whatever_map_is_taken_is_sorted_and_in_place(entries in entries(), bits in 0u8..=64) {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(first, count, rest)| [*first, *count, *rest])
            .flat_map(u64::to_le_bytes)
            .collect();
        let mut page = bytes;
        page.resize(4096, 0);
        if let Ok(map) = MemoryMap::read(&page, bits) {
            let mut above = 0;
            for (range, ram) in map.ranges() {
                prop_assert!(range.start >= above && range.start < range.end);
                above = range.end;
                let hole = |start, end| !range.meets(&Range { start, end });
                prop_assert!(!ram || hole(0xA_0000, 0x10_0000) && hole(0xC000_0000, 1 << 32));
                prop_assert!(!ram || range.end <= layout::device_area(bits).mmio_start);
            }
        }
    }

    #[test]
    fn all_ram_is_accepted_once(map in good_map(), known in prop::collection::vec((0u64..0x60_0000, 1u64..0x1_0000), 0..12)) {
        let mut apart = Ranges::default();
        for (first, count) in known {
            // Those that meet another are not there.
            let _ = apart.add(Range { start: first << 12, end: (first + count) << 12 });
        }
        let left = Ranges::remaining(&map, &apart).unwrap();
        let mut pieces = Vec::new();
        for index in 0..left.pieces() {
            let piece = left.piece(index).unwrap();
            prop_assert!(!piece.is_empty() && piece.start / PIECE == (piece.end - 1) / PIECE);
            prop_assert!(map.check_ram(piece, "piece").is_ok());
            prop_assert!(apart.iter().all(|range| !range.meets(&piece)));
            pieces.push(piece);
        }
        prop_assert!(left.piece(left.pieces()).is_none());
        prop_assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let inside: u64 = apart.iter().map(|range| {
            map.ram().map(|ram| ram.end.min(range.end).saturating_sub(ram.start.max(range.start))).sum::<u64>()
        }).sum();
        let ram: u64 = map.ram().map(Range::len).sum();
        prop_assert_eq!(pieces.iter().map(Range::len).sum::<u64>() + inside, ram);
    }

    #[test]
    fn a_made_madt_is_taken_and_any_other_byte_refused(vcpus in 1u32..200, at in any::<prop::sample::Index>(), flip in 1u8..=255) {
        let mut page = vec![0; 4096];
        let len = madt::make(&mut page, vcpus).unwrap();
        prop_assert_eq!(madt::check(&page, vcpus), Ok(Some(len)));
        prop_assert_eq!(madt::check(&page, vcpus + 1).unwrap_err().code(), codes::VCPU_COUNT);
        page[at.index(len)] ^= flip;
        prop_assert!(madt::check(&page, vcpus).is_err());
    }

    #[test]
    fn any_madt_is_checked_to_its_end(bytes in prop::collection::vec(any::<u8>(), 0..300), vcpus in 1u32..4) {
        let mut table = vec![0; 4096];
        madt::make(&mut table, vcpus).unwrap();
        let room = 44..44 + bytes.len();
        table[room].copy_from_slice(&bytes);
        let len = 44 + bytes.len();
        table[4..8].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
        table[9] = table[9].wrapping_sub(madt::sum(&table[..len]));
        if let Ok(Some(taken)) = madt::check(&table, vcpus) {
            prop_assert_eq!(taken, len);
        }
    }
}

#[test]
fn vcpu_counts_have_bounds() {
    assert!(madt::check_count(1).is_ok() && madt::check_count(madt::MAX_VCPUS).is_ok());
    for count in [0, madt::MAX_VCPUS + 1, u32::MAX] {
        assert_eq!(madt::check_count(count).unwrap_err().code(), codes::VCPU_COUNT);
    }
    assert_eq!(madt::check(&[0; 4096], 1), Ok(None));
    let mut small = [0; 100];
    assert_eq!(madt::make(&mut small, 3), None);
    let mut largest = vec![0; madt::MAX_LEN];
    assert_eq!(madt::make(&mut largest, madt::MAX_VCPUS), Some(madt::MAX_LEN));
}
