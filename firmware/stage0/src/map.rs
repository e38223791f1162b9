//! The host's memory map (IGVM parameter), read from a page that the host filled.

use crate::manifest::Range;
use crate::refusal::Refusal;
use crate::{PAGE, layout, number};

/// Most ranges that a map may have.
pub const MAX_RANGES: usize = 64;
const ENTRY: usize = 24;
/// Types (igvm_defs `MemoryMapEntryType`).
const MEMORY: u64 = 0;
const PLATFORM_RESERVED: u64 = 1;

/// A memory map that is sorted, does not overlap and has RAM only where RAM can be.
#[derive(Clone, Copy, Debug)]
pub struct MemoryMap {
    ranges: [(Range, bool); MAX_RANGES],
    count: usize,
}

impl MemoryMap {
    /// Reads a map for a machine of `phys_bits` physical address bits.
    ///
    /// # Errors
    /// [`Refusal::MemoryMap`] naming the entry.
    pub fn read(page: &[u8], phys_bits: u8) -> Result<Self, Refusal> {
        let mut map = Self {
            ranges: [(Range::default(), false); MAX_RANGES],
            count: 0,
        };
        let mut above = 0;
        for (index, entry) in page.chunks_exact(ENTRY).enumerate() {
            let first = number::<8>(entry, 0).unwrap_or(0);
            let count = number::<8>(entry, 8).unwrap_or(0);
            let rest = number::<8>(entry, 16).unwrap_or(0);
            let wrong = |what| Refusal::MemoryMap {
                what,
                entry: index,
                start: first.wrapping_mul(PAGE),
                end: first.wrapping_add(count).wrapping_mul(PAGE),
            };
            if count == 0 {
                return if first | rest == 0 {
                    Ok(map)
                } else {
                    Err(wrong("not an end"))
                };
            }
            let limit = 1u64 << phys_bits.clamp(32, 52);
            let end = first.checked_add(count).and_then(|end| end.checked_mul(PAGE));
            let range = match end {
                Some(end) if end <= limit => Range {
                    start: first * PAGE,
                    end,
                },
                _ => return Err(wrong("outside the address space")),
            };
            if range.start < above {
                return Err(wrong("not sorted"));
            }
            above = range.end;
            let ram = match rest & 0xFFFF {
                MEMORY => true,
                PLATFORM_RESERVED => false,
                _ => return Err(wrong("type")),
            };
            if rest >> 16 != 0 {
                return Err(wrong("flags"));
            }
            if ram && !may_be_ram(&range, phys_bits) {
                return Err(wrong("RAM where devices are"));
            }
            match map.ranges.get_mut(map.count) {
                Some(place) => *place = (range, ram),
                None => return Err(wrong("too many entries")),
            }
            map.count += 1;
        }
        Err(Refusal::MemoryMap {
            what: "no end",
            entry: page.len() / ENTRY,
            start: 0,
            end: 0,
        })
    }

    /// The ranges, lowest first, and whether each is RAM.
    pub fn ranges(&self) -> impl Iterator<Item = &(Range, bool)> {
        self.ranges.iter().take(self.count)
    }

    /// The ranges of RAM.
    pub fn ram(&self) -> impl Iterator<Item = &Range> {
        self.ranges().filter_map(|(range, ram)| ram.then_some(range))
    }

    /// Checks that all of `wanted` is RAM.
    ///
    /// # Errors
    /// [`Refusal::NotRam`] with `what`.
    pub fn check_ram(&self, wanted: Range, what: &'static str) -> Result<(), Refusal> {
        let mut covered = wanted.start;
        for range in self.ram() {
            if range.start <= covered && covered < range.end {
                covered = range.end;
            }
        }
        if covered >= wanted.end {
            return Ok(());
        }
        Err(Refusal::NotRam {
            what,
            start: wanted.start,
            end: wanted.end,
        })
    }
}

/// RAM is not at the legacy hole, not in the 32-bit device hole, and not where 64-bit devices are.
fn may_be_ram(range: &Range, phys_bits: u8) -> bool {
    let holes = [
        Range {
            start: layout::EBDA_START,
            end: layout::HIGH_RAM_START,
        },
        Range {
            start: layout::MEM_32BIT_RESERVED_START,
            end: layout::RAM_64BIT_START,
        },
        Range {
            start: layout::device_area(phys_bits).mmio_start,
            end: u64::MAX,
        },
    ];
    !holes.iter().any(|hole| hole.meets(range))
}
