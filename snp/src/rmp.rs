//! What the emulation knows of each guest page, as an RMP and KVM's memory attributes would: private or shared,
//! validated or not, imported by the launch or not. Fixed-size bitmaps, one bit a page, changed a 64-bit word at a time;
//! nothing a guest does makes them grow. Contents of pages are not this file's business.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use podvisor_firmware::plan::PAGE_SIZE;

/// One attribute of the pages of one region.
struct Bitmap(Box<[AtomicU64]>);

/// The bits of `range` that lie in word `word`.
fn mask(range: &Range<u64>, word: u64) -> u64 {
    let first = word * 64;
    let low = range.start.saturating_sub(first).min(64);
    let high = range.end.saturating_sub(first).min(64);
    let below = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    below(high) & !below(low)
}

/// The words that `range` (of bits) touches.
fn words(range: &Range<u64>) -> Range<u64> {
    range.start / 64..range.end.div_ceil(64)
}

impl Bitmap {
    fn new(bits: u64) -> Self {
        Self((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(index).ok()?)
    }

    fn load(&self, index: u64) -> u64 {
        self.word(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets or clears the bits of `mask` in word `index`; the bits that changed.
    fn put(&self, index: u64, mask: u64, value: bool) -> u64 {
        let Some(word) = self.word(index) else { return 0 };
        if value {
            mask & !word.fetch_or(mask, Ordering::AcqRel)
        } else {
            mask & word.fetch_and(!mask, Ordering::AcqRel)
        }
    }

    fn set(&self, range: &Range<u64>, value: bool) {
        for index in words(range) {
            self.put(index, mask(range, index), value);
        }
    }

    fn all(&self, range: &Range<u64>) -> bool {
        words(range).all(|index| {
            let mask = mask(range, index);
            self.load(index) & mask == mask
        })
    }

    fn none(&self, range: &Range<u64>) -> bool {
        words(range).all(|index| self.load(index) & mask(range, index) == 0)
    }
}

/// The pages of one RAM region.
struct Region {
    first_gfn: u64,
    pages: u64,
    private: Bitmap,
    validated: Bitmap,
    launched: Bitmap,
}

impl Region {
    /// `[gfn, gfn + pages)` relative to the region, cut to it; None when they do not meet.
    fn clip(&self, gfns: &Range<u64>) -> Option<Range<u64>> {
        let start = gfns.start.max(self.first_gfn);
        let end = gfns.end.min(self.first_gfn + self.pages);
        (start < end).then(|| start - self.first_gfn..end - self.first_gfn)
    }
}

/// What became of a validation (PVALIDATE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validation {
    /// Every page changed.
    Changed,
    /// At least one page was in the asked state already; the others changed (carry flag).
    Unchanged,
    /// A page is shared or not RAM; nothing changed.
    NotPrivate,
}

/// A range of guest frames that leaves RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest frames {first:#x}..{end:#x} are not all RAM")]
pub struct NotRam {
    /// First frame.
    pub first: u64,
    /// One past the last frame.
    pub end: u64,
}

/// The state of every RAM page of one guest.
pub struct PageStates {
    /// Sorted, not overlapping.
    regions: Box<[Region]>,
}

impl PageStates {
    /// All pages of `ram` (start and length in bytes, whole pages), shared at first.
    #[must_use]
    pub fn new(ram: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut regions: Vec<Region> = ram
            .into_iter()
            .map(|(start, len)| {
                let pages = len / PAGE_SIZE;
                Region {
                    first_gfn: start / PAGE_SIZE,
                    pages,
                    private: Bitmap::new(pages),
                    validated: Bitmap::new(pages),
                    launched: Bitmap::new(pages),
                }
            })
            .collect();
        regions.sort_by_key(|region| region.first_gfn);
        Self {
            regions: regions.into_boxed_slice(),
        }
    }

    /// The parts of `gfns` that are RAM.
    fn parts(&self, gfns: Range<u64>) -> impl Iterator<Item = (&Region, Range<u64>)> {
        self.regions
            .iter()
            .filter_map(move |region| region.clip(&gfns).map(|part| (region, part)))
    }

    /// Whether every frame of `gfns` is RAM.
    #[must_use]
    pub fn is_ram(&self, gfns: &Range<u64>) -> bool {
        let covered: u64 = self.parts(gfns.clone()).map(|(_, part)| part.end - part.start).sum();
        gfns.start < gfns.end && covered == gfns.end - gfns.start
    }

    /// # Errors
    /// [`NotRam`] unless every frame of `gfns` is RAM.
    pub fn check_ram(&self, gfns: &Range<u64>) -> Result<(), NotRam> {
        self.is_ram(gfns).then_some(()).ok_or(NotRam {
            first: gfns.start,
            end: gfns.end,
        })
    }

    /// Whether every byte of `[gpa, gpa + len)` is RAM that devices may touch. An empty range at a shared page is.
    /// Lock-free.
    #[must_use]
    pub fn is_shared(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len.max(1)) else {
            return false;
        };
        let gfns = gpa / PAGE_SIZE..end.div_ceil(PAGE_SIZE);
        self.is_ram(&gfns) && self.parts(gfns).all(|(region, part)| region.private.none(&part))
    }

    /// Whether every frame of `gfns` is private RAM.
    #[must_use]
    pub fn is_private(&self, gfns: Range<u64>) -> bool {
        self.is_ram(&gfns) && self.parts(gfns).all(|(region, part)| region.private.all(&part))
    }

    /// Whether every frame of `gfns` is validated RAM.
    #[must_use]
    pub fn is_validated(&self, gfns: Range<u64>) -> bool {
        self.is_ram(&gfns) && self.parts(gfns).all(|(region, part)| region.validated.all(&part))
    }

    /// Makes the RAM of `gfns` private or shared. A page that changes loses its validated state and its contents:
    /// `changed` is called for each run of pages that changes (first frame, pages), while the run counts as private.
    ///
    /// # Errors
    /// What `changed` says. The pages of that run and of those behind it stay as they were, but for what they held; those
    /// before it have changed.
    pub fn convert<E>(
        &self,
        gfns: Range<u64>,
        private: bool,
        mut changed: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = gfns.start;
        while let Some(run) = self.next_run(at..gfns.end, !private) {
            at = run.end;
            for (region, part) in self.parts(run.clone()) {
                region.validated.set(&part, false);
                region.launched.set(&part, false);
                // Scrubbed before devices may see it, and hidden from them before it is scrubbed.
                region.private.set(&part, true);
            }
            let result = changed(run.start, run.end - run.start);
            if private != result.is_ok() {
                for (region, part) in self.parts(run) {
                    region.private.set(&part, false);
                }
            }
            result?;
        }
        Ok(())
    }

    /// The first run of RAM in `gfns` whose pages are all private, or all shared.
    fn next_run(&self, gfns: Range<u64>, private: bool) -> Option<Range<u64>> {
        let mut run: Option<Range<u64>> = None;
        for (region, part) in self.parts(gfns) {
            for index in words(&part) {
                let mask = mask(&part, index);
                let now = region.private.load(index);
                let wanted = mask & if private { now } else { !now };
                let first = region.first_gfn + index * 64;
                for bits in runs(wanted) {
                    let next = first + bits.start..first + bits.end;
                    match &mut run {
                        Some(open) if open.end == next.start => open.end = next.end,
                        Some(_) => return run,
                        None => run = Some(next),
                    }
                }
            }
        }
        run
    }

    /// Makes all RAM shared as it is. Only the emulation can do that: no real guest's contents outlive a conversion.
    pub fn share_in_place(&self) {
        for region in &self.regions {
            let all = 0..region.pages;
            region.validated.set(&all, false);
            region.launched.set(&all, false);
            region.private.set(&all, false);
        }
    }

    /// Whether the launch has imported any frame of `gfns`.
    #[must_use]
    pub fn any_launched(&self, gfns: Range<u64>) -> bool {
        self.parts(gfns).any(|(region, part)| !region.launched.none(&part))
    }

    /// Marks `gfns` as imported by the launch: validated.
    pub fn mark_launched(&self, gfns: Range<u64>) {
        for (region, part) in self.parts(gfns) {
            region.launched.set(&part, true);
            region.validated.set(&part, true);
        }
    }

    /// The guest's PVALIDATE of each 4 KiB page of `gfns`.
    #[must_use]
    pub fn validate(&self, gfns: Range<u64>, validate: bool) -> Validation {
        if !self.is_private(gfns.clone()) {
            return Validation::NotPrivate;
        }
        let mut outcome = Validation::Changed;
        for (region, part) in self.parts(gfns) {
            for index in words(&part) {
                let mask = mask(&part, index);
                if region.validated.put(index, mask, validate) != mask {
                    outcome = Validation::Unchanged;
                }
            }
        }
        outcome
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.pages * PAGE_SIZE).sum()
    }
}

/// The runs of ones in `word`, lowest first.
fn runs(mut word: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0u64;
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let skip = word.trailing_zeros();
        word >>= skip;
        let ones = word.trailing_ones();
        let start = at + u64::from(skip);
        let end = start + u64::from(ones);
        word = if ones == 64 { 0 } else { word >> ones };
        at = end;
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn states() -> PageStates {
        PageStates::new([(0x10_0000, 100 * 4096), (0, 70 * 4096), (0x1_0000_0000, 4096 * 1000)])
    }

    /// Converts, and tells the runs that changed.
    fn convert(states: &PageStates, gfns: Range<u64>, private: bool) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let note = |first, pages| {
            runs.push((first, pages));
            Ok::<(), ()>(())
        };
        states.convert(gfns, private, note).unwrap();
        runs
    }

    #[test]
    fn a_page_is_shared_only_when_every_byte_is() {
        let states = states();
        assert!(states.is_shared(0, 70 * 4096));
        assert!(!states.is_shared(0, 70 * 4096 + 1), "runs out of RAM");
        assert!(!states.is_shared(u64::MAX, 2), "wraps");
        assert!(!states.is_shared(u64::MAX, 0));
        convert(&states, 10..11, true);
        assert!(states.is_shared(9 * 4096, 4096));
        assert!(!states.is_shared(9 * 4096, 4097));
        assert!(!states.is_shared(11 * 4096 - 1, 1));
        assert!(states.is_shared(11 * 4096, 1));
        assert!(!states.is_shared(10 * 4096, 0));
    }

    #[test]
    fn a_conversion_tells_each_run_once_and_drops_validation() {
        let states = states();
        assert_eq!(convert(&states, 0..70, true), [(0, 70)]);
        assert_eq!(states.validate(0..70, true), Validation::Changed);
        assert_eq!(states.validate(60..65, true), Validation::Unchanged);
        assert_eq!(convert(&states, 63..65, false), [(63, 2)]);
        assert!(states.is_shared(63 * 4096, 8192));
        convert(&states, 0..70, true);
        assert!(!states.is_validated(63..64), "a converted page is not validated");
        assert!(states.is_validated(0..63));
        assert_eq!(states.validate(69..71, true), Validation::NotPrivate);
        assert_eq!(states.validate(0..0, true), Validation::NotPrivate);
    }

    #[test]
    fn all_is_shared_in_place_at_once() {
        let states = states();
        convert(&states, 0..70, true);
        states.mark_launched(3..5);
        states.share_in_place();
        assert!(states.is_shared(0, 70 * 4096) && states.is_shared(0x1_0000_0000, 1000 * 4096));
        assert!(!states.any_launched(0..70) && !states.is_validated(3..4));
    }

    #[test]
    fn launched_pages_are_known_and_validated() {
        let states = states();
        convert(&states, 0..70, true);
        states.mark_launched(3..5);
        assert!(states.any_launched(0..4));
        assert!(!states.any_launched(0..3));
        assert!(states.is_validated(3..5));
        assert_eq!(states.validate(3..4, true), Validation::Unchanged);
        assert_eq!(states.ram_bytes(), 1170 * 4096);
    }

    #[test]
    fn a_conversion_over_two_regions_that_touch_is_one_run() {
        let states = PageStates::new([(0, 70 * 4096), (70 * 4096, 70 * 4096)]);
        assert_eq!(convert(&states, 3..100, true), [(3, 97)]);
        assert_eq!(convert(&states, 0..140, true), [(0, 3), (100, 40)]);
    }

    proptest! {
        /// Against one boolean a page; some runs are refused.
        #[test]
        fn ranges_agree_with_a_plain_model(
            ops in proptest::collection::vec((0u64..300, 0u64..200, any::<bool>(), 0usize..6), 1..40)
        ) {
            let states = PageStates::new([(0, 100 * 4096), (100 * 4096, 156 * 4096)]);
            let mut model = [false; 256];
            for (start, len, private, refused) in ops {
                let mut told = Vec::new();
                let mut runs = 0;
                let result = states.convert(start..start + len, private, |first, pages| {
                    // While the run changes, no device may touch it.
                    for page in first..first + pages {
                        assert!(!states.is_shared(page * 4096, 4096));
                    }
                    runs += 1;
                    if runs == refused + 1 && refused < 3 {
                        return Err(first);
                    }
                    told.extend(first..first + pages);
                    Ok(())
                });
                let mut want = Vec::new();
                for (page, state) in (0u64..).zip(&mut model) {
                    let until = result.err().unwrap_or(u64::MAX);
                    if (start..start + len).contains(&page) && *state != private && page < until {
                        want.push(page);
                        *state = private;
                    }
                }
                prop_assert_eq!(told, want);
                for (page, private) in (0u64..).zip(&model) {
                    prop_assert_eq!(states.is_shared(page * 4096, 4096), !private);
                    prop_assert_eq!(states.is_private(page..page + 1), *private);
                }
            }
        }
    }
}
