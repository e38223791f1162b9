//! SEV-SNP: bringing memory into use, and changing pages between private and shared. On hardware PVALIDATE does it, on the
//! emulated processor an MSR (docs/emulated-processor.md).

use crate::window::Shared;
use crate::{cpuid, ghcb, layout, ring0};

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
/// PVALIDATE: the page is mapped by the host in another size; go on by 4 KiB.
const SIZE_MISMATCH: u32 = 6;

/// A confidential pod's own view of its pages.
pub struct Pages {
    /// The emulated processor's validation MSR.
    emulation: Option<u32>,
}

impl Pages {
    /// Opens the shared window and validates the heap and the scratch range. Nothing outside the image and the parameter
    /// pages may be used before.
    ///
    /// # Errors
    /// Says what the hypervisor refused or got wrong.
    pub fn start(emulated: bool) -> Result<Self, &'static str> {
        ghcb::set_emulated(emulated);
        ghcb::start()?;
        let window = layout::WINDOW_START..layout::WINDOW_START + layout::WINDOW_LEN;
        ghcb::change_page_state(LargeFrames::new(window.start, window.end), false)?;
        let pages = Self {
            emulation: emulated.then(cpuid::emulation_msr),
        };
        pages.validate(layout::HEAP_START, layout::HEAP_LEN, true)?;
        pages.validate(layout::CONVERT_START, layout::CONVERT_LEN, true)?;
        Ok(pages)
    }

    /// Validates (or rescinds) `[start, start + len)`, all of which must change.
    fn validate(&self, start: u64, len: u64, validate: bool) -> Result<(), &'static str> {
        let mut at = start;
        let end = start + len;
        while at < end {
            at += match self.emulation {
                Some(msr) => validate_emulated(msr, at, end, validate)?,
                None => validate_hardware(at, end, validate)?,
            };
        }
        Ok(())
    }

    /// Turns private pages into shared ones, or back. Their contents are lost.
    ///
    /// # Errors
    /// Says what the hypervisor refused or got wrong.
    pub fn convert(&self, area: Shared, private: bool) -> Result<(), &'static str> {
        let (start, len) = (area.address(), area.len() as u64);
        if !private {
            self.validate(start, len, false)?;
        }
        let frames: u64 = start / PAGE;
        let count = area.len() / PAGE as usize;
        for first in (0..count).step_by(ghcb::PSC_ENTRIES) {
            let batch = first..count.min(first + ghcb::PSC_ENTRIES);
            ghcb::change_page_state(batch.map(|index| (frames + index as u64, false)), private)?;
        }
        if private {
            self.validate(start, len, true)
        } else {
            Ok(())
        }
    }
}

/// The 2 MiB frames of a range.
struct LargeFrames {
    next: u64,
    end: u64,
}

impl LargeFrames {
    fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }
}

impl Iterator for LargeFrames {
    type Item = (u64, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.next;
        (at < self.end).then(|| {
            self.next = at + LARGE;
            (at / PAGE, true)
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.end.saturating_sub(self.next) / LARGE) as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for LargeFrames {}

fn checked(code: u32, unchanged: bool) -> Result<(), &'static str> {
    match (code, unchanged) {
        (0, false) => Ok(()),
        // A page that is valid already is one the host has mapped twice: an attack.
        (0, true) => Err("a page was valid before it was validated"),
        _ => Err("validation of memory failed"),
    }
}

fn validate_emulated(msr: u32, at: u64, end: u64, validate: bool) -> Result<u64, &'static str> {
    const MAX_ORDER: u32 = 18;
    let outcome = |order: u32| {
        ring0::wrmsr(msr, at | u64::from(order) << 1 | u64::from(validate));
        let outcome = ring0::rdmsr(msr);
        (outcome as u32 & 0xFF, outcome & 0x100 != 0)
    };
    let order = ((end - at) / PAGE).ilog2().min(MAX_ORDER);
    if order > 0 {
        let (code, unchanged) = outcome(order);
        if code != SIZE_MISMATCH {
            return checked(code, unchanged).map(|()| PAGE << order);
        }
    }
    let (code, unchanged) = outcome(0);
    checked(code, unchanged).map(|()| PAGE)
}

fn validate_hardware(at: u64, end: u64, validate: bool) -> Result<u64, &'static str> {
    if at.is_multiple_of(LARGE) && end - at >= LARGE {
        let outcome = ring0::pvalidate(at, true, validate);
        if outcome.code != SIZE_MISMATCH {
            return checked(outcome.code, outcome.unchanged).map(|()| LARGE);
        }
    }
    let outcome = ring0::pvalidate(at, false, validate);
    checked(outcome.code, outcome.unchanged).map(|()| PAGE)
}
