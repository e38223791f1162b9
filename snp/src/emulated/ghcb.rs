//! VMGEXIT with a GHCB page (AMD 56421): the events that an SNP guest may ask for. The page is copied once before it is
//! looked at, so that a second vCPU changing it meanwhile changes nothing that was checked.

use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::runtime::{HV_FEATURES, Runtime};
use crate::digest::{PAGE_LEN, Page};

const RAX: u64 = 0x1F8;
const RBX: u64 = 0x318;
const EXIT_CODE: u64 = 0x390;
const EXIT_INFO_1: u64 = 0x398;
const EXIT_INFO_2: u64 = 0x3A0;
const SCRATCH: u64 = 0x3A8;
const VALID_BITMAP: u64 = 0x3F0;
const SHARED_BUFFER: u64 = 0x800;
const SHARED_BUFFER_END: u64 = 0xFF0;
const VERSION: u64 = 0xFFA;
const USAGE: u64 = 0xFFC;

/// Events (`SVM_VMGEXIT_*`).
mod event {
    pub(super) const PSC: u64 = 0x8000_0010;
    pub(super) const GUEST_REQUEST: u64 = 0x8000_0011;
    pub(super) const EXT_GUEST_REQUEST: u64 = 0x8000_0012;
    pub(super) const HV_FEATURES: u64 = 0x8000_FFFD;
    pub(super) const TERMINATION: u64 = 0x8000_FFFE;
}

/// Reasons of a malformed request (`GHCB_ERR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Malformed {
    Usage = 2,
    ScratchArea = 3,
    MissingInput = 4,
    InvalidInput = 5,
    UnknownEvent = 6,
}

/// sw_exit_info_1 of a malformed request.
const MALFORMED: u64 = 2;
/// Page-state change: the header of the descriptor is wrong.
const PSC_INVALID_HEADER: u64 = 1 << 32 | 1;
/// Page-state change: an entry is wrong.
const PSC_INVALID_ENTRY: u64 = 1 << 32 | 2;
/// Most entries of a descriptor.
const PSC_MAX_ENTRIES: u16 = 253;
const PSC_HEADER: u64 = 8;
const PSC_ENTRY: u64 = 8;
/// Extended guest request: too few pages for the certificates.
const TOO_FEW_PAGES: u64 = 1 << 32;

/// How a VMGEXIT ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Done,
    Terminate { set: u8, code: u8 },
}

/// Reads a little-endian number of `N` bytes; every caller's offset is inside the page.
fn read<const N: usize>(page: &Page, offset: u64) -> [u8; N] {
    usize::try_from(offset)
        .ok()
        .and_then(|offset| page.get(offset..)?.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

/// The copy of a guest's GHCB.
struct Ghcb {
    gpa: u64,
    page: Box<Page>,
}

impl Ghcb {
    fn raw(&self, offset: u64) -> u64 {
        u64::from_le_bytes(read(&self.page, offset))
    }

    /// The field at `offset`, which the guest must have marked valid.
    fn field(&self, offset: u64) -> Result<u64, Malformed> {
        let bitmap = u128::from_le_bytes(read(&self.page, VALID_BITMAP));
        if bitmap >> (offset / 8) & 1 == 1 {
            Ok(self.raw(offset))
        } else {
            Err(Malformed::MissingInput)
        }
    }
}

/// Handles the GHCB at `gpa`, a page that the caller knows to be shared.
///
/// # Errors
/// When guest memory cannot be read or written: it is not RAM.
pub(super) fn handle(runtime: &Runtime, gpa: u64) -> Result<Exit, GuestMemoryError> {
    let mut page = Box::new([0; PAGE_LEN]);
    runtime.memory().read_slice(&mut page[..], GuestAddress(gpa))?;
    let ghcb = Ghcb { gpa, page };
    let answer = match dispatch(runtime, &ghcb) {
        Ok(Outcome::Terminate { set, code }) => return Ok(Exit::Terminate { set, code }),
        Ok(Outcome::Answer { info_2, rbx }) => Answer { info_1: 0, info_2, rbx },
        Err(reason) => Answer {
            info_1: MALFORMED,
            info_2: reason as u64,
            rbx: None,
        },
    };
    // A page that the request itself made private is not written any more.
    if runtime.pages().is_shared(gpa, PAGE_SIZE) {
        write_answer(runtime, &ghcb, &answer)?;
    }
    Ok(Exit::Done)
}

struct Answer {
    info_1: u64,
    info_2: u64,
    rbx: Option<u64>,
}

enum Outcome {
    Answer { info_2: u64, rbx: Option<u64> },
    Terminate { set: u8, code: u8 },
}

fn write_answer(runtime: &Runtime, ghcb: &Ghcb, answer: &Answer) -> Result<(), GuestMemoryError> {
    let mut bitmap = 1u128 << (EXIT_INFO_1 / 8) | 1u128 << (EXIT_INFO_2 / 8);
    let mut fields = vec![(EXIT_INFO_1, answer.info_1), (EXIT_INFO_2, answer.info_2)];
    if let Some(rbx) = answer.rbx {
        fields.push((RBX, rbx));
        bitmap |= 1 << (RBX / 8);
    }
    bitmap |= u128::from_le_bytes(read(&ghcb.page, VALID_BITMAP));
    for (offset, value) in fields {
        let at = GuestAddress(ghcb.gpa + offset);
        runtime.memory().write_slice(&value.to_le_bytes(), at)?;
    }
    let at = GuestAddress(ghcb.gpa + VALID_BITMAP);
    runtime.memory().write_slice(&bitmap.to_le_bytes(), at)
}

fn dispatch(runtime: &Runtime, ghcb: &Ghcb) -> Result<Outcome, Malformed> {
    let version = u16::from_le_bytes(read(&ghcb.page, VERSION));
    let usage = u32::from_le_bytes(read(&ghcb.page, USAGE));
    if !(1..=2).contains(&version) || usage != 0 {
        return Err(Malformed::Usage);
    }
    let code = ghcb.field(EXIT_CODE)?;
    let (info_1, info_2) = (ghcb.field(EXIT_INFO_1)?, ghcb.field(EXIT_INFO_2)?);
    let answer = |info_2| Outcome::Answer { info_2, rbx: None };
    match code {
        event::PSC => Ok(answer(page_state_change(runtime, ghcb)?)),
        event::HV_FEATURES => Ok(answer(HV_FEATURES)),
        event::TERMINATION => {
            let [low, high, ..] = info_1.to_le_bytes();
            Ok(Outcome::Terminate {
                set: low & 0xF,
                code: low >> 4 | high << 4,
            })
        }
        event::GUEST_REQUEST => {
            check_message_pages(runtime, info_1, info_2)?;
            Ok(answer(u64::from(runtime.guest_message(info_1, info_2))))
        }
        event::EXT_GUEST_REQUEST => {
            check_message_pages(runtime, info_1, info_2)?;
            extended(runtime, ghcb, info_1, info_2)
        }
        _ => Err(Malformed::UnknownEvent),
    }
}

/// Request and response pages: aligned, distinct, shared.
fn check_message_pages(runtime: &Runtime, request: u64, response: u64) -> Result<(), Malformed> {
    let aligned = request.is_multiple_of(PAGE_SIZE) && response.is_multiple_of(PAGE_SIZE);
    let shared = |gpa| runtime.pages().is_shared(gpa, PAGE_SIZE);
    if aligned && request != response && shared(request) && shared(response) {
        Ok(())
    } else {
        Err(Malformed::InvalidInput)
    }
}

/// The extended request: the certificate table goes to the pages at RAX, if RBX says there are enough of them.
fn extended(runtime: &Runtime, ghcb: &Ghcb, request: u64, response: u64) -> Result<Outcome, Malformed> {
    let (rax, rbx) = (ghcb.field(RAX)?, ghcb.field(RBX)?);
    let table = runtime
        .guest()
        .as_ref()
        .map(|guest| guest.certificates())
        .unwrap_or_default();
    let needed = (table.len() as u64).div_ceil(PAGE_SIZE);
    if rbx < needed {
        return Ok(Outcome::Answer {
            info_2: TOO_FEW_PAGES,
            rbx: Some(needed),
        });
    }
    let pages = rax..rax.saturating_add(needed * PAGE_SIZE);
    let clash = pages.contains(&request) || pages.contains(&response) || pages.contains(&ghcb.gpa);
    let fits = rax.is_multiple_of(PAGE_SIZE) && runtime.pages().is_shared(rax, needed * PAGE_SIZE);
    if needed > 0 {
        if clash || !fits {
            return Err(Malformed::InvalidInput);
        }
        let mut bytes = table.to_vec();
        bytes.resize(usize::try_from(needed * PAGE_SIZE).unwrap_or(0), 0);
        runtime
            .memory()
            .write_slice(&bytes, GuestAddress(rax))
            .map_err(|_| Malformed::InvalidInput)?;
    }
    Ok(Outcome::Answer {
        info_2: u64::from(runtime.guest_message(request, response)),
        rbx: None,
    })
}

/// The batch of page-state changes in the shared buffer; sw_exit_info_2 of the answer.
fn page_state_change(runtime: &Runtime, ghcb: &Ghcb) -> Result<u64, Malformed> {
    let scratch = ghcb.field(SCRATCH)?;
    let offset = scratch.checked_sub(ghcb.gpa).ok_or(Malformed::ScratchArea)?;
    if !(SHARED_BUFFER..=SHARED_BUFFER_END - PSC_HEADER).contains(&offset) {
        return Err(Malformed::ScratchArea);
    }
    let first = u16::from_le_bytes(read(&ghcb.page, offset));
    let last = u16::from_le_bytes(read(&ghcb.page, offset + 2));
    let end = offset + PSC_HEADER + PSC_ENTRY * (u64::from(last) + 1);
    if last >= PSC_MAX_ENTRIES {
        return Ok(PSC_INVALID_HEADER);
    }
    if end > SHARED_BUFFER_END {
        return Err(Malformed::ScratchArea);
    }
    let mut buffer = PscBuffer { runtime, gpa: ghcb.gpa };
    for index in first..=last {
        let at = offset + PSC_HEADER + PSC_ENTRY * u64::from(index);
        let Some(done) = change_entry(runtime, ghcb.raw(at)) else {
            return Ok(PSC_INVALID_ENTRY);
        };
        buffer.write(at, &done.to_le_bytes());
        buffer.write(offset, &(index + 1).to_le_bytes());
    }
    Ok(0)
}

/// Writes progress to the descriptor for as long as its page stays shared.
struct PscBuffer<'r> {
    runtime: &'r Runtime,
    gpa: u64,
}

impl PscBuffer<'_> {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        if self.runtime.pages().is_shared(self.gpa, PAGE_SIZE) {
            // RAM and shared, so this cannot fail; the guest would see its own entry unchanged.
            let _ = self
                .runtime
                .memory()
                .write_slice(bytes, GuestAddress(self.gpa + offset));
        }
    }
}

/// Does one entry; the entry with its page count done, or None when it is invalid.
fn change_entry(runtime: &Runtime, entry: u64) -> Option<u64> {
    let current = entry & 0xFFF;
    let gfn = entry >> 12 & ((1 << 40) - 1);
    let pages = if entry >> 56 & 1 == 1 { 512 } else { 1 };
    if current > pages || !gfn.is_multiple_of(pages) {
        return None;
    }
    let gfns = gfn + current..gfn + pages;
    let private = match entry >> 52 & 0xF {
        1 => true,
        2 => false,
        _ => return Some(entry & !0xFFF | pages),
    };
    if !gfns.is_empty() {
        runtime.convert(gfns, private).ok()?;
    }
    Some(entry & !0xFFF | pages)
}
