//! Which pages are to be accepted (validated): all RAM of the map but what the launch imported, each exactly once, in
//! pieces that several processors can share out.

use crate::manifest::Range;
use crate::map::{MAX_RANGES, MemoryMap};
use crate::refusal::Refusal;

/// Most ranges that the launch imported or that are accepted apart.
pub const MAX_KNOWN: usize = 16;
/// A piece does not cross a multiple of this.
pub const PIECE: u64 = 1 << 30;
const MAX: usize = MAX_RANGES + MAX_KNOWN;

/// A sorted list of ranges that do not meet.
#[derive(Clone, Copy, Debug)]
pub struct Ranges {
    ranges: [Range; MAX],
    count: usize,
}

impl Default for Ranges {
    fn default() -> Self {
        Self {
            ranges: [Range::default(); MAX],
            count: 0,
        }
    }
}

impl Ranges {
    /// Adds a range; one that is empty is left out.
    ///
    /// # Errors
    /// When it meets another, or there is no more room.
    pub fn add(&mut self, range: Range) -> Result<(), Refusal> {
        if range.is_empty() {
            return Ok(());
        }
        if self.iter().any(|other| other.meets(&range)) {
            return Err(Refusal::Internal("ranges overlap"));
        }
        let at = self.iter().take_while(|other| other.start < range.start).count();
        let mut carried = range;
        for place in self
            .ranges
            .get_mut(at..=self.count)
            .ok_or(Refusal::Internal("too many ranges"))?
        {
            core::mem::swap(place, &mut carried);
        }
        self.count += 1;
        Ok(())
    }

    /// The ranges, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = &Range> {
        self.ranges.iter().take(self.count)
    }

    /// All RAM of `map` that is not in `known`.
    ///
    /// # Errors
    /// When there is no room for that many ranges.
    pub fn remaining(map: &MemoryMap, known: &Self) -> Result<Self, Refusal> {
        let mut left = Self::default();
        for ram in map.ram() {
            let mut at = ram.start;
            for other in known.iter().filter(|other| other.meets(ram)) {
                left.add(Range {
                    start: at,
                    end: other.start,
                })?;
                at = at.max(other.end);
            }
            left.add(Range {
                start: at,
                end: ram.end,
            })?;
        }
        Ok(left)
    }

    /// How many pieces there are.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.iter().map(pieces).sum()
    }

    /// Piece `index`, counted from 0.
    #[must_use]
    pub fn piece(&self, index: usize) -> Option<Range> {
        let mut left = index;
        for range in self.iter() {
            let here = pieces(range);
            if left < here {
                let first = range.start / PIECE + left as u64;
                return Some(Range {
                    start: range.start.max(first * PIECE),
                    end: range.end.min((first + 1) * PIECE),
                });
            }
            left -= here;
        }
        None
    }
}

fn pieces(range: &Range) -> usize {
    (range.end.div_ceil(PIECE) - range.start / PIECE) as usize
}
