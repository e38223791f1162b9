//! What runs stage0, behind one trait: a plain VM, the emulated SEV-SNP processor, or SEV-SNP hardware. What only hardware
//! needs is written from the specifications (AMD 24593 APM volumes 2 and 3, 56421 GHCB) and **has not run on hardware**.

mod ghcb;
mod native;
mod snp;

use stage0::accept::PIECE;
use stage0::layout;
use stage0::manifest::Range;
use stage0::refusal::Refusal;

pub(crate) use native::Native;
pub(crate) use snp::{Emulated, Hardware};

/// PVALIDATE's outcome for the first page that did not change, or could not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stuck {
    /// Its return code.
    pub(crate) code: u32,
    /// Whether the page was in the wanted state already.
    pub(crate) unchanged: bool,
}

/// What stage0 asks of whatever runs it.
pub(crate) trait Platform: Sync {
    /// Whether memory is to be accepted.
    fn confidential(&self) -> bool;

    /// Whether Linux is a guest of SEV-SNP too, and is told where its pages are.
    fn stays_confidential(&self) -> bool {
        false
    }

    /// Agrees on how to talk to the hypervisor. First of all.
    ///
    /// # Errors
    /// [`Refusal::Ghcb`] when there is no agreement.
    fn start(&self) -> Result<(), Refusal>;

    /// A CPUID leaf as it may be believed; zeros when there is none.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// Writes a byte to an I/O port.
    fn port_write(&self, port: u16, value: u8);

    /// Whether other processors are started with INIT and SIPI.
    fn starts_others(&self) -> bool;

    /// Accepts every page of a range that does not cross a multiple of [`PIECE`]. Any processor may.
    ///
    /// # Errors
    /// The first page that was accepted before, or cannot be.
    fn accept(&self, range: &Range) -> Result<(), Stuck>;

    /// Takes pages back that the host shares, and accepts them. The first processor only.
    ///
    /// # Errors
    /// [`Refusal::Ghcb`] or [`Refusal::Accept`].
    fn take_back(&self, range: &Range) -> Result<(), Refusal>;

    /// The last thing before the kernel: nothing is asked after it.
    ///
    /// # Errors
    /// [`Refusal::Ghcb`] or [`Refusal::Accept`].
    fn hand_over(&self) -> Result<(), Refusal>;

    /// Ends the pod, with a reason code of podvisor's set.
    fn end(&self, code: u8) -> !;
}

/// Accepts a range of any length.
///
/// # Errors
/// [`Refusal::Accept`].
pub(crate) fn accept(platform: &dyn Platform, range: &Range) -> Result<(), Refusal> {
    let mut at = range.start;
    while at < range.end {
        let piece = Range {
            start: at,
            end: range.end.min((at / PIECE + 1) * PIECE),
        };
        platform.accept(&piece).map_err(|stuck| Refusal::Accept {
            start: piece.start,
            end: piece.end,
            code: stuck.code,
            unchanged: stuck.unchanged,
        })?;
        at = piece.end;
    }
    Ok(())
}

/// The serial port: COM1. Every byte costs an exit, so stage0 is silent unless it refuses.
pub(crate) struct Serial<'a>(pub(crate) &'a dyn Platform);

impl core::fmt::Write for Serial<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            self.0.port_write(layout::SERIAL_PORT, byte);
        }
        Ok(())
    }
}
