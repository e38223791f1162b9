//! SEV-SNP: accepting memory, with PVALIDATE on hardware and with the validation MSR on the emulated processor
//! (`docs/emulated-processor.md`). What needs the GHCB is in `ghcb`.

use stage0::PAGE;
use stage0::abi;
use stage0::codes::REASON_SET;
use stage0::manifest::Range;
use stage0::refusal::Refusal;

use super::ghcb::Ghcb;
use super::{Platform, Stuck};
use crate::machine::{cpu, memory};

/// SEV_STATUS: SEV, SEV-ES and SEV-SNP are active.
const MSR_SEV_STATUS: u32 = 0xC001_0131;
const SNP_ACTIVE: u64 = 0b111;
/// PVALIDATE: the host maps the page in another size; go on by 4 KiB.
const SIZE_MISMATCH: u32 = 6;
const LARGE: u64 = 2 << 20;
/// The leaf whose EDX is the number of the emulation's hand-over MSR.
const EMULATION_LEAF: u32 = 0x4000_0101;
/// GHCB MSR protocol: termination.
const TERMINATE: u64 = 0x100;

/// The CPUID page: a leaf, or zeros.
fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    const HEADER: usize = 16;
    const ENTRY: usize = 48;
    let page = memory::read(abi::CPUID_PAGE, PAGE as usize);
    let word = |bytes: &[u8], at: usize| {
        bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |word| u32::from_le_bytes(*word))
    };
    let count = word(page, 0) as usize;
    page.get(HEADER..)
        .unwrap_or(&[])
        .chunks_exact(ENTRY)
        .take(count)
        .find(|entry| word(entry, 0) == leaf && word(entry, 4) == subleaf)
        .map_or([0; 4], |entry| [24, 28, 32, 36].map(|at| word(entry, at)))
}

fn check_status() -> Result<(), Refusal> {
    let status = cpu::rdmsr(MSR_SEV_STATUS);
    if status & SNP_ACTIVE == SNP_ACTIVE {
        return Ok(());
    }
    Err(Refusal::Ghcb {
        what: "SEV_STATUS says that SEV-SNP is off",
        answer: status,
    })
}

fn refused(range: &Range, stuck: Stuck) -> Refusal {
    Refusal::Accept {
        start: range.start,
        end: range.end,
        code: stuck.code,
        unchanged: stuck.unchanged,
    }
}

fn end(ghcb: &Ghcb, code: u8) -> ! {
    let _ = ghcb.exchange(TERMINATE | u64::from(REASON_SET) << 12 | u64::from(code) << 16);
    cpu::stop()
}

/// The emulated processor. It protects nothing.
pub(crate) struct Emulated(Ghcb);

impl Emulated {
    pub(crate) const fn new() -> Self {
        Self(Ghcb::emulated())
    }
}

impl Platform for Emulated {
    fn confidential(&self) -> bool {
        true
    }

    fn start(&self) -> Result<(), Refusal> {
        check_status()?;
        memory::map_shared();
        self.0.start()
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        cpuid(leaf, subleaf)
    }

    fn port_write(&self, port: u16, value: u8) {
        cpu::out8(port, value);
    }

    fn starts_others(&self) -> bool {
        true
    }

    fn accept(&self, range: &Range) -> Result<(), Stuck> {
        const MSR: u32 = 0x504F_4456;
        const MAX_ORDER: u32 = 18;
        const VALIDATE: u64 = 1;
        let mut at = range.start;
        while at < range.end {
            let order = ((range.end - at) / PAGE).max(1).ilog2().min(MAX_ORDER);
            let try_order = |order: u32| {
                cpu::wrmsr(MSR, at | u64::from(order) << 1 | VALIDATE);
                let outcome = cpu::rdmsr(MSR);
                Stuck {
                    code: outcome as u32 & 0xFF,
                    unchanged: outcome & 0x100 != 0,
                }
            };
            let (mut order, mut outcome) = (order, try_order(order));
            if outcome.code == SIZE_MISMATCH && order > 0 {
                (order, outcome) = (0, try_order(0));
            }
            if outcome.code != 0 || outcome.unchanged {
                return Err(outcome);
            }
            at += PAGE << order;
        }
        Ok(())
    }

    fn take_back(&self, range: &Range) -> Result<(), Refusal> {
        self.0.make_private(range)?;
        self.accept(range).map_err(|stuck| refused(range, stuck))
    }

    /// Linux does not speak the emulated protocol: from here on the emulation is an ordinary VM.
    fn hand_over(&self) -> Result<(), Refusal> {
        const NONE: Refusal = Refusal::Cpuid("the emulated processor has no hand-over to a kernel");
        const ALL_SHARED: u64 = 1;
        let [_, _, _, msr] = cpuid(EMULATION_LEAF, 0);
        if msr == 0 {
            return Err(NONE);
        }
        cpu::wrmsr(msr, ALL_SHARED);
        Ok(())
    }

    fn end(&self, code: u8) -> ! {
        end(&self.0, code)
    }
}

/// SEV-SNP hardware. The CPUID, I/O and HLT instructions would leave for a handler that stage0 does not have, but for the
/// last, which is not intercepted as an exception.
pub(crate) struct Hardware(Ghcb);

impl Hardware {
    pub(crate) const fn new() -> Self {
        Self(Ghcb::hardware())
    }
}

impl Platform for Hardware {
    fn confidential(&self) -> bool {
        true
    }

    fn stays_confidential(&self) -> bool {
        true
    }

    fn start(&self) -> Result<(), Refusal> {
        check_status()?;
        memory::map_shared();
        self.0.start()
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        cpuid(leaf, subleaf)
    }

    fn port_write(&self, port: u16, value: u8) {
        self.0.port_write(port, value);
    }

    /// They would begin where the first one did, in the measured state; the first one does all of the work.
    fn starts_others(&self) -> bool {
        false
    }

    fn accept(&self, range: &Range) -> Result<(), Stuck> {
        let offset = memory::reach(range).wrapping_sub(range.start);
        let mut at = range.start;
        while at < range.end {
            let large = at.is_multiple_of(LARGE) && range.end - at >= LARGE;
            let mut done = cpu::pvalidate(at.wrapping_add(offset), large, true);
            let mut len = if large { LARGE } else { PAGE };
            if large && done.code == SIZE_MISMATCH {
                done = cpu::pvalidate(at.wrapping_add(offset), false, true);
                len = PAGE;
            }
            if done.code != 0 || done.unchanged {
                return Err(Stuck {
                    code: done.code,
                    unchanged: done.unchanged,
                });
            }
            at += len;
        }
        Ok(())
    }

    fn take_back(&self, range: &Range) -> Result<(), Refusal> {
        self.0.make_private(range)?;
        super::accept(self, range)
    }

    /// Linux registers a GHCB of its own, and takes this page for RAM.
    fn hand_over(&self) -> Result<(), Refusal> {
        let page = Range {
            start: memory::ghcb(),
            end: memory::ghcb() + PAGE,
        };
        self.0.forget()?;
        super::accept(self, &page)
    }

    fn end(&self, code: u8) -> ! {
        end(&self.0, code)
    }
}
