//! The guest-hypervisor communication block (AMD 56421): the MSR protocol and the page, which is the first page of the
//! shared window. The exits for port and memory-mapped I/O are for hardware only; they have not run on hardware.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::layout;
use crate::ring0;
use crate::window::Shared;

/// Termination reason sets and codes of the GHCB protocol.
const TERMINATE: u64 = 0x100;
const PAGE: u64 = 4096;

mod offset {
    //! Fields of the page.
    pub(super) const RAX: usize = 0x1F8;
    pub(super) const RBX: usize = 0x318;
    pub(super) const EXIT_CODE: usize = 0x390;
    pub(super) const EXIT_INFO_1: usize = 0x398;
    pub(super) const EXIT_INFO_2: usize = 0x3A0;
    pub(super) const SCRATCH: usize = 0x3A8;
    pub(super) const VALID: usize = 0x3F0;
    pub(super) const BUFFER: usize = 0x800;
    pub(super) const VERSION: usize = 0xFFA;
    pub(super) const USAGE: usize = 0xFFC;
}

/// Entries of a page-state change that fit into the page.
pub const PSC_ENTRIES: usize = 253;

static EMULATED: AtomicBool = AtomicBool::new(false);

/// Says whether the processor is emulated: then VMGEXIT must not be executed.
pub fn set_emulated(emulated: bool) {
    EMULATED.store(emulated, Ordering::Relaxed);
}

fn exchange(value: u64) -> u64 {
    ring0::ghcb_exchange(value, EMULATED.load(Ordering::Relaxed))
}

fn page() -> Shared {
    Shared::ghcb()
}

/// Agrees on the protocol, shares the GHCB page and registers it.
///
/// # Errors
/// Says what the hypervisor refused.
pub fn start() -> Result<(), &'static str> {
    let gfn = layout::WINDOW_START / PAGE;
    let info = exchange(0x002);
    let (max, min) = (info >> 48, info >> 32 & 0xFFFF);
    if info & 0xFFF != 0x001 || min > 2 || max < 2 {
        return Err("GHCB protocol version 2 is not offered");
    }
    let features = exchange(0x080);
    if features & 0xFFF != 0x081 || features >> 12 & 1 == 0 {
        return Err("the hypervisor does not offer SEV-SNP");
    }
    if exchange(0x014 | gfn << 12 | 2 << 52) != 0x015 {
        return Err("the GHCB page could not be shared");
    }
    if exchange(0x012 | gfn << 12) != 0x013 | gfn << 12 {
        return Err("the GHCB page was not registered");
    }
    page().clear();
    Ok(())
}

/// Ends the guest by the MSR protocol: reason set 0, general.
pub fn terminate() {
    let _ = exchange(TERMINATE);
}

/// An exit's inputs.
#[derive(Default)]
struct Exit {
    code: u64,
    info_1: u64,
    info_2: u64,
    rax: Option<u64>,
    rbx: Option<u64>,
    scratch: bool,
}

/// What an exit gave back.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// SW_EXITINFO1: 0, or 2 for an error of the protocol.
    pub info_1: u64,
    /// SW_EXITINFO2.
    pub info_2: u64,
    /// RBX.
    pub rbx: u64,
}

fn vmgexit(exit: &Exit) -> Answer {
    let page = page();
    let mut valid = [0_u64; 2];
    let mut put = |at: usize, value: u64| {
        page.set(at, value);
        let bit = at / 8;
        if let Some(word) = valid.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    };
    put(offset::EXIT_CODE, exit.code);
    put(offset::EXIT_INFO_1, exit.info_1);
    put(offset::EXIT_INFO_2, exit.info_2);
    if let Some(rax) = exit.rax {
        put(offset::RAX, rax);
    }
    if let Some(rbx) = exit.rbx {
        put(offset::RBX, rbx);
    }
    if exit.scratch {
        put(offset::SCRATCH, layout::WINDOW_START + offset::BUFFER as u64);
    }
    page.set(offset::VALID, valid[0]);
    page.set(offset::VALID + 8, valid[1]);
    page.set(offset::VERSION, 2_u16);
    page.set(offset::USAGE, 0_u32);
    let _ = exchange(layout::WINDOW_START);
    Answer {
        info_1: page.get::<u64>(offset::EXIT_INFO_1) & 0xFFFF_FFFF,
        info_2: page.get(offset::EXIT_INFO_2),
        rbx: page.get(offset::RBX),
    }
}

/// Changes the state of at most [`PSC_ENTRIES`] pages: each entry is a frame number and whether it stands for 2 MiB.
///
/// # Errors
/// When the hypervisor refuses.
pub fn change_page_state(
    entries: impl ExactSizeIterator<Item = (u64, bool)>,
    private: bool,
) -> Result<(), &'static str> {
    let count = entries.len();
    if count == 0 || count > PSC_ENTRIES {
        return Err("page-state change of no or too many entries");
    }
    let buffer = page().part(offset::BUFFER, 8 + count * 8);
    let operation = if private { 1_u64 } else { 2 };
    buffer.set(0, (count as u64 - 1) << 16);
    for (index, (gfn, large)) in entries.enumerate() {
        buffer.set(8 + index * 8, gfn << 12 | operation << 52 | u64::from(large) << 56);
    }
    // The hypervisor may stop early and want to be called again; it may not do so for ever.
    for _ in 0..=count {
        let answer = vmgexit(&Exit {
            code: 0x8000_0010,
            scratch: true,
            ..Exit::default()
        });
        if answer.info_1 != 0 || answer.info_2 != 0 {
            return Err("page-state change refused");
        }
        let header: u64 = buffer.get(0);
        if header & 0xFFFF > header >> 16 & 0xFFFF {
            return Ok(());
        }
    }
    Err("page-state change makes no progress")
}

/// A guest request over two shared pages; with `certificates` the extended one, whose third place receives the
/// certificate table.
#[must_use]
pub fn guest_request(request: Shared, response: Shared, certificates: Option<Shared>) -> Answer {
    vmgexit(&Exit {
        code: if certificates.is_some() {
            0x8000_0012
        } else {
            0x8000_0011
        },
        info_1: request.address(),
        info_2: response.address(),
        rax: certificates.map(|area| area.address()),
        rbx: certificates.map(|area| area.len() as u64 / PAGE),
        scratch: false,
    })
}

/// Reads a device register by exit (hardware).
#[must_use]
pub fn mmio_read(address: u64, len: u64) -> u64 {
    page().set(offset::BUFFER, 0_u64);
    let _ = vmgexit(&Exit {
        code: 0x8000_0001,
        info_1: address,
        info_2: len,
        scratch: true,
        ..Exit::default()
    });
    page().get(offset::BUFFER)
}

/// Writes a device register by exit (hardware).
pub fn mmio_write(address: u64, len: u64, value: u64) {
    page().set(offset::BUFFER, value);
    let _ = vmgexit(&Exit {
        code: 0x8000_0002,
        info_1: address,
        info_2: len,
        scratch: true,
        ..Exit::default()
    });
}

/// Writes a byte to an I/O port by exit (hardware; exit code IOIO).
pub fn port_write(port: u16, value: u8) {
    const IOIO: u64 = 0x7B;
    const BYTE_OUT: u64 = 1 << 4 | 1 << 9;
    let info_1 = u64::from(port) << 16 | BYTE_OUT;
    let _ = vmgexit(&Exit {
        code: IOIO,
        info_1,
        rax: Some(u64::from(value)),
        ..Exit::default()
    });
}
