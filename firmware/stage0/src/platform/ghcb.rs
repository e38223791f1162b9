//! The guest-hypervisor communication block (AMD 56421): the MSR protocol, and the page.

use stage0::PAGE;
use stage0::manifest::Range;
use stage0::refusal::Refusal;

use crate::machine::{cpu, memory};

const MSR_GHCB: u32 = 0xC001_0130;
/// Entries of a page-state change that fit into the page.
const PSC_ENTRIES: u64 = 253;
const LARGE: u64 = 2 << 20;
const PRIVATE: u64 = 1;
const SHARED: u64 = 2;

mod offset {
    //! Fields of the page.
    pub(super) const RAX: u64 = 0x1F8;
    pub(super) const EXIT_CODE: u64 = 0x390;
    pub(super) const EXIT_INFO_1: u64 = 0x398;
    pub(super) const EXIT_INFO_2: u64 = 0x3A0;
    pub(super) const SCRATCH: u64 = 0x3A8;
    pub(super) const VALID: u64 = 0x3F0;
    pub(super) const BUFFER: u64 = 0x800;
    /// Protocol version in bits 31:16, usage in 63:32.
    pub(super) const VERSION: u64 = 0xFF8;
}

fn wrong(what: &'static str, answer: u64) -> Refusal {
    Refusal::Ghcb { what, answer }
}

/// The way to the hypervisor.
pub(super) struct Ghcb {
    /// The request is done at the WRMSR, and there is no VMGEXIT.
    emulated: bool,
}

impl Ghcb {
    /// As the emulated processor has it.
    pub(super) const fn emulated() -> Self {
        Self { emulated: true }
    }

    /// As hardware has it.
    pub(super) const fn hardware() -> Self {
        Self { emulated: false }
    }

    /// One exchange by the MSR protocol.
    pub(super) fn exchange(&self, request: u64) -> u64 {
        cpu::wrmsr(MSR_GHCB, request);
        if !self.emulated {
            cpu::vmgexit();
        }
        cpu::rdmsr(MSR_GHCB)
    }

    /// Agrees on the protocol, shares the GHCB page and registers it.
    pub(super) fn start(&self) -> Result<(), Refusal> {
        let info = self.exchange(0x002);
        let (most, least) = (info >> 48, info >> 32 & 0xFFFF);
        if info & 0xFFF != 0x001 || least > 2 || most < 2 {
            return Err(wrong("GHCB protocol version 2 is not offered", info));
        }
        let features = self.exchange(0x080);
        if features & 0xFFF != 0x081 || features >> 12 & 1 == 0 {
            return Err(wrong("SEV-SNP is not offered", features));
        }
        self.change_page(SHARED)?;
        let page = memory::ghcb();
        let registered = self.exchange(0x012 | page);
        if registered != 0x013 | page {
            return Err(wrong("the GHCB page was not registered", registered));
        }
        for word in 0..PAGE / 8 {
            memory::ghcb_write(word * 8, 0);
        }
        Ok(())
    }

    /// Changes the state of the GHCB page itself.
    fn change_page(&self, operation: u64) -> Result<(), Refusal> {
        let answer = self.exchange(0x014 | memory::ghcb() | operation << 52);
        if answer == 0x015 {
            Ok(())
        } else {
            Err(wrong("the GHCB page's state was not changed", answer))
        }
    }

    /// The page is the guest's again; it is to be accepted.
    pub(super) fn forget(&self) -> Result<(), Refusal> {
        self.change_page(PRIVATE)
    }

    /// VMGEXIT with the page; exit information 1 and 2.
    fn exit(&self, code: u64, info_1: u64, rax: Option<u64>, scratch: bool) -> (u64, u64) {
        let mut valid = [0u64; 2];
        let mut put = |at: u64, value: u64| {
            memory::ghcb_write(at, value);
            let bit = at / 8;
            if let Some(word) = valid.get_mut((bit / 64) as usize) {
                *word |= 1 << (bit % 64);
            }
        };
        put(offset::EXIT_CODE, code);
        put(offset::EXIT_INFO_1, info_1);
        put(offset::EXIT_INFO_2, 0);
        if let Some(rax) = rax {
            put(offset::RAX, rax);
        }
        if scratch {
            put(offset::SCRATCH, memory::ghcb() + offset::BUFFER);
        }
        let [low, high] = valid;
        memory::ghcb_write(offset::VALID, low);
        memory::ghcb_write(offset::VALID + 8, high);
        memory::ghcb_write(offset::VERSION, 2 << 16);
        cpu::wrmsr(MSR_GHCB, memory::ghcb());
        if !self.emulated {
            cpu::vmgexit();
        }
        let info_1 = memory::ghcb_read(offset::EXIT_INFO_1) & 0xFFFF_FFFF;
        (info_1, memory::ghcb_read(offset::EXIT_INFO_2))
    }

    /// Page-state change to private, in batches, by 2 MiB where the range allows it. The pages are to be accepted then.
    pub(super) fn make_private(&self, range: &Range) -> Result<(), Refusal> {
        let mut at = range.start;
        while at < range.end {
            let mut count = 0;
            while at < range.end && count < PSC_ENTRIES {
                let large = at.is_multiple_of(LARGE) && range.end - at >= LARGE;
                let entry = at | PRIVATE << 52 | u64::from(large) << 56;
                memory::ghcb_write(offset::BUFFER + 8 + count * 8, entry);
                at += if large { LARGE } else { PAGE };
                count += 1;
            }
            self.change(count)?;
        }
        Ok(())
    }

    /// Has the hypervisor do the first `count` entries of the page's buffer.
    fn change(&self, count: u64) -> Result<(), Refusal> {
        const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
        memory::ghcb_write(offset::BUFFER, (count - 1) << 16);
        // The hypervisor may stop early and want to be called again; it may not do so for ever.
        for _ in 0..=count {
            let (error, info) = self.exit(PAGE_STATE_CHANGE, 0, None, true);
            if error != 0 || info != 0 {
                return Err(wrong("page-state change refused", info));
            }
            let header = memory::ghcb_read(offset::BUFFER);
            if header & 0xFFFF > header >> 16 & 0xFFFF {
                return Ok(());
            }
        }
        Err(wrong("page-state change makes no progress", count))
    }

    /// Writes a byte to an I/O port by exit (hardware; exit code IOIO).
    pub(super) fn port_write(&self, port: u16, value: u8) {
        const IOIO: u64 = 0x7B;
        const BYTE_OUT: u64 = 1 << 4 | 1 << 9;
        let _ = self.exit(IOIO, u64::from(port) << 16 | BYTE_OUT, Some(u64::from(value)), false);
    }
}
