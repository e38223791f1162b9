//! A part of the guest's address space of which only some blocks hold memory at a time: the area for memory that is
//! plugged later. It is mapped in whole, once; which of it devices may touch is asked here.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SharedPages;

/// The most blocks that one area has: a bitmap of 1 MiB.
pub const MAX_BLOCKS: u64 = 1 << 23;
/// Blocks in one word of the bitmap.
const WORD: u64 = u64::BITS as u64;

/// An area that cannot be.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "memory area {start:#x}+{len:#x} of {block}-byte blocks: the block must be a power of two from 4096 on, start and \
     length whole blocks, at least 1 and at most {MAX_BLOCKS}"
)]
pub struct BlocksError {
    start: u64,
    len: u64,
    block: u64,
}

/// Which blocks of an area hold memory. Changed by one thread, read by any without a lock.
pub struct Blocks {
    start: u64,
    len: u64,
    block: u64,
    plugged: AtomicU64,
    words: Box<[AtomicU64]>,
}

impl Blocks {
    /// The area `[start, start + len)` in blocks of `block` bytes, none of which holds memory.
    ///
    /// # Errors
    /// [`BlocksError`].
    pub fn new(start: u64, len: u64, block: u64) -> Result<Self, BlocksError> {
        let whole = |value: u64| value.is_multiple_of(block);
        let fits = block.is_power_of_two()
            && block >= 4096
            && len > 0
            && whole(start)
            && whole(len)
            && len / block <= MAX_BLOCKS
            && start.checked_add(len).is_some();
        if !fits {
            return Err(BlocksError { start, len, block });
        }
        let words = (len / block).div_ceil(WORD);
        Ok(Self {
            start,
            len,
            block,
            plugged: AtomicU64::new(0),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// First guest physical address of the area.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the area.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.block
    }

    /// Bytes of the area that hold memory.
    #[must_use]
    pub fn plugged_size(&self) -> u64 {
        self.plugged.load(Ordering::Acquire) * self.block
    }

    /// The numbers of the blocks that `count` blocks from `gpa` on are; None when they are not all in the area, are
    /// none, or `gpa` is not the start of one.
    #[must_use]
    pub fn range(&self, gpa: u64, count: u64) -> Option<Range<u64>> {
        let offset = gpa
            .checked_sub(self.start)
            .filter(|offset| offset.is_multiple_of(self.block))?;
        let first = offset / self.block;
        let end = first.checked_add(count).filter(|end| *end <= self.len / self.block)?;
        (count > 0).then_some(first..end)
    }

    /// How many blocks of `blocks` hold memory.
    #[must_use]
    pub fn count(&self, blocks: Range<u64>) -> u64 {
        masks(blocks)
            .filter_map(|(word, mask)| Some(self.words.get(word)?.load(Ordering::Acquire) & mask))
            .map(|bits| u64::from(bits.count_ones()))
            .sum()
    }

    /// Says of all of `blocks` whether they hold memory. Blocks beyond the area are left out.
    pub fn set(&self, blocks: Range<u64>, plugged: bool) {
        let blocks = blocks.start..blocks.end.min(self.len / self.block);
        let (mut came, mut went) = (0, 0);
        for (word, mask) in masks(blocks) {
            let Some(word) = self.words.get(word) else { continue };
            if plugged {
                let before = word.fetch_or(mask, Ordering::AcqRel);
                came += u64::from((mask & !before).count_ones());
            } else {
                let before = word.fetch_and(!mask, Ordering::AcqRel);
                went += u64::from((mask & before).count_ones());
            }
        }
        self.plugged.fetch_add(came, Ordering::AcqRel);
        self.plugged.fetch_sub(went, Ordering::AcqRel);
    }

    /// The runs of blocks that hold memory, as (GPA, length in bytes).
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for number in (0..self.len / self.block).filter(|n| self.count(*n..n + 1) == 1) {
            let gpa = self.start + number * self.block;
            match runs.last_mut() {
                Some((start, len)) if *start + *len == gpa => *len += self.block,
                _ => runs.push((gpa, self.block)),
            }
        }
        runs
    }
}

/// The bitmap words that `blocks` lie in, each with the bits of them.
fn masks(blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (blocks.start / WORD..blocks.end.div_ceil(WORD)).filter_map(move |word| {
        let first = word * WORD;
        let from = blocks.start.saturating_sub(first);
        let to = (blocks.end - first).min(WORD);
        let ones = u64::MAX.checked_shr(u32::try_from(WORD - to.checked_sub(from)?).ok()?)?;
        Some((usize::try_from(word).ok()?, ones << from))
    })
}

impl SharedPages for Blocks {
    fn is_shared(&self, gpa: u64, len: u64) -> bool {
        let Some(offset) = gpa.checked_sub(self.start) else {
            return false;
        };
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.len) else {
            return false;
        };
        let blocks = offset / self.block..end.div_ceil(self.block);
        self.count(blocks.clone()) == blocks.end.saturating_sub(blocks.start)
    }
}

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, len, plugged) = (self.start, self.len, self.plugged_size());
        write!(f, "Blocks({start:#x}+{len:#x}, {plugged:#x} plugged)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn areas_are_whole_blocks() {
        for (start, len, block) in [
            (0, 0, 4096),
            (0, 4096, 0),
            (0, 6000, 3000),
            (0, 2048, 2048),
            (1, 4096, 4096),
            (4096, 4097, 4096),
            (u64::MAX - 4095, 4096, 4096),
            (0, (MAX_BLOCKS + 1) * 4096, 4096),
        ] {
            assert!(Blocks::new(start, len, block).is_err(), "{start:#x} {len:#x} {block}");
        }
        let blocks = Blocks::new(4 << 30, 6 * MIB, 2 * MIB).unwrap();
        assert_eq!(
            (blocks.start(), blocks.size(), blocks.block_size()),
            (4 << 30, 6 * MIB, 2 * MIB)
        );
        assert!(Blocks::new(0, MAX_BLOCKS * 4096, 4096).is_ok());
    }

    #[test]
    fn what_holds_memory_may_be_touched() {
        let start = 4 << 30;
        let blocks = Blocks::new(start, 200 * 2 * MIB, 2 * MIB).unwrap();
        assert_eq!(blocks.range(start, 200), Some(0..200));
        for (gpa, count) in [
            (start, 201),
            (start, 0),
            (start + 1, 1),
            (start - 2 * MIB, 1),
            (u64::MAX, 1),
        ] {
            assert_eq!(blocks.range(gpa, count), None, "{gpa:#x} {count}");
        }
        assert_eq!(blocks.range(start, u64::MAX), None);
        blocks.set(60..130, true);
        blocks.set(64..65, false);
        blocks.set(199..400, true);
        assert_eq!(blocks.plugged_size(), 70 * 2 * MIB);
        let at = |block: u64| start + block * 2 * MIB;
        assert_eq!(
            blocks.runs(),
            [(at(60), 8 * MIB), (at(65), 130 * MIB), (at(199), 2 * MIB)]
        );
        assert!(blocks.is_shared(at(60), 8 * MIB) && blocks.is_shared(at(64) - 1, 1));
        assert!(!blocks.is_shared(at(64) - 1, 2) && !blocks.is_shared(at(60) - 1, 2));
        assert!(blocks.is_shared(at(199), 2 * MIB) && !blocks.is_shared(at(199), 2 * MIB + 1));
        assert!(!blocks.is_shared(at(65), u64::MAX) && !blocks.is_shared(0, 1));
    }

    proptest! {
        #[test]
        fn the_bitmap_agrees_with_a_list(ops in proptest::collection::vec((0u64..150, 0u64..150, any::<bool>()), 1..30)) {
            let blocks = Blocks::new(0, 150 * 4096, 4096).unwrap();
            let mut list = [false; 150];
            for (a, b, on) in ops {
                let (from, to) = (a.min(b), a.max(b));
                blocks.set(from..to, on);
                list[from as usize..to as usize].fill(on);
                let plugged = list.iter().filter(|on| **on).count() as u64;
                prop_assert_eq!(blocks.plugged_size(), plugged * 4096);
                let inside = list[from as usize..to as usize].iter().filter(|on| **on).count() as u64;
                prop_assert_eq!(blocks.count(from..to), inside);
                prop_assert_eq!(blocks.runs().iter().map(|(_, len)| len).sum::<u64>(), plugged * 4096);
                for block in 0..150 {
                    prop_assert_eq!(blocks.is_shared(block * 4096, 4096), list[block as usize]);
                }
            }
        }
    }
}
