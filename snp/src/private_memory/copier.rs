//! Loading private memory from within: no host can write it, so a vCPU that has not run yet copies. What is to be private
//! lies in the shared half; a slot for the time of the copy shows that half to the guest at addresses above its RAM, and a
//! few instructions of long mode, in a slot of their own, move it. Then both slots go and the vCPU's registers come back.

use std::ops::Range;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region2};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::kvm;
use crate::digest::PAGE_LEN;

/// What a page of the copier's page directory covers, and how slots are aligned.
const LARGE: u64 = 2 << 20;
/// Slot numbers that no RAM and no device has (KVM has at least 509 and numbers them from 0).
const STAGING_SLOT: u32 = 508;
const COPIER_SLOT: u32 = 507;
/// The copier's slot: page tables, then code.
const COPIER_LEN: usize = 4 * PAGE_LEN;
const CODE: u64 = 3 * PAGE_SIZE;
/// Where the copier has things in its address space: itself, two large pages to copy from, two to copy to.
const SOURCE: u64 = LARGE;
const TARGET: u64 = 3 * LARGE;
/// Says that a copy is done. Nothing in the kernel answers this port.
const PORT: u8 = 0xE9;
/// `cld; rep movsq; out PORT, al; hlt`.
const COPY: [u8; 7] = [0xFC, 0xF3, 0x48, 0xA5, 0xE6, PORT, 0xF4];

/// Why private memory could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// KVM or the host refused.
    #[error("filling private memory: {what}: {source}")]
    Host {
        /// The call.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The copier did not get to its end.
    #[error("filling private memory: the vCPU left with {0}")]
    Exit(String),
    /// A range that is not RAM.
    #[error("filling private memory: frame {0:#x} is not RAM")]
    NotRam(u64),
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> CopyError {
    move |source| CopyError::Host { what, source }
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CopyError {
    move |error| CopyError::Host {
        what,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}

/// A slot for the time of a copy.
struct TemporarySlot<'v> {
    vm: &'v VmFd,
    number: u32,
    gpa: u64,
}

impl<'v> TemporarySlot<'v> {
    fn new(vm: &'v VmFd, number: u32, gpa: u64, memory: &GuestMemoryMmap<()>, at: u64) -> Result<Self, CopyError> {
        let unmapped = || std::io::Error::from_raw_os_error(libc::EFAULT);
        let (region, _) = memory
            .to_region_addr(GuestAddress(at))
            .ok_or_else(unmapped)
            .map_err(host("the shared half"))?;
        let address = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| unmapped())
            .map_err(host("the shared half"))?;
        let slot = kvm_userspace_memory_region2 {
            slot: number,
            guest_phys_addr: gpa,
            memory_size: region.len(),
            userspace_addr: address.expose_provenance() as u64,
            ..kvm_userspace_memory_region2::default()
        };
        kvm::set_region(vm, slot, memory).map_err(host("a slot for the time of the copy"))?;
        Ok(Self { vm, number, gpa })
    }
}

impl Drop for TemporarySlot<'_> {
    fn drop(&mut self) {
        let slot = kvm_userspace_memory_region2 {
            slot: self.number,
            guest_phys_addr: self.gpa,
            ..kvm_userspace_memory_region2::default()
        };
        // A slot that KVM has can be removed.
        let _ = kvm::set_region(self.vm, slot, &GuestMemoryMmap::default());
    }
}

/// Copies the shared half of `ranges` (frames) into the private one. `shared` is the RAM's shared half.
///
/// # Errors
/// [`CopyError`]; the vCPU's registers are undefined then.
pub(super) fn run(
    vm: &VmFd,
    vcpu: &VcpuFd,
    shared: &GuestMemoryMmap<()>,
    ranges: &[Range<u64>],
) -> Result<(), CopyError> {
    let end = shared.iter().map(|region| region.last_addr().raw_value()).max();
    let above = end.unwrap_or(0).max(1 << 32).next_multiple_of(1 << 30);
    let code = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), COPIER_LEN)])
        .map_err(|error| host("memory for the copier")(std::io::Error::other(error)))?;
    let copier_slot = TemporarySlot::new(vm, COPIER_SLOT, above, &code, 0)?;
    let mut copier = Copier {
        vcpu: kvm::vcpu_handle(vm, vcpu).map_err(host("another handle of the vCPU"))?,
        code: &code,
        at: copier_slot.gpa,
    };
    let regs = vcpu.get_regs().map_err(refused("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    for region in shared.iter() {
        let first = region.start_addr().raw_value();
        let inside = first / PAGE_SIZE..(first + region.len()) / PAGE_SIZE;
        let parts = ranges
            .iter()
            .map(|range| range.start.max(inside.start)..range.end.min(inside.end))
            .filter(|part| !part.is_empty());
        let mut staging = None;
        for part in parts {
            if staging.is_none() {
                staging = Some(TemporarySlot::new(vm, STAGING_SLOT, above + LARGE, shared, first)?);
            }
            let mut at = part.start * PAGE_SIZE;
            while at < part.end * PAGE_SIZE {
                let len = LARGE.min(part.end * PAGE_SIZE - at);
                copier.copy(&sregs, above + LARGE + (at - first), at, len)?;
                at += len;
            }
        }
    }
    if let Some(gfn) = ranges.iter().find_map(|range| not_ram(shared, range)) {
        return Err(CopyError::NotRam(gfn));
    }
    copier.finish(&sregs, &regs)
}

/// The first frame of `range` that is not in `memory`.
fn not_ram(memory: &GuestMemoryMmap<()>, range: &Range<u64>) -> Option<u64> {
    let mut at = range.start;
    while at < range.end {
        let Some((region, offset)) = memory.to_region_addr(GuestAddress(at * PAGE_SIZE)) else {
            return Some(at);
        };
        at += (region.len() - offset.0) / PAGE_SIZE;
    }
    None
}

struct Copier<'c> {
    vcpu: VcpuFd,
    code: &'c GuestMemoryMmap<()>,
    /// The copier's slot in the guest's address space.
    at: u64,
}

impl Copier<'_> {
    /// Has the vCPU copy `len` bytes, at most [`LARGE`].
    fn copy(&mut self, was: &kvm_sregs, from: u64, to: u64, len: u64) -> Result<(), CopyError> {
        self.map(from, to)
            .map_err(|error| host("memory for the copier")(std::io::Error::other(error)))?;
        // Also flushes what the vCPU knows of the tables.
        self.vcpu
            .set_sregs(&long_mode(was, self.at))
            .map_err(refused("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: CODE,
            rsi: SOURCE + from % LARGE,
            rdi: TARGET + to % LARGE,
            rcx: len / 8,
            rflags: 2,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => return Ok(()),
                Ok(exit) => return Err(CopyError::Exit(format!("{exit:?}"))),
                // A signal to this thread.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => return Err(refused("KVM_RUN")(error)),
            }
        }
    }

    /// Writes the tables (AMD 24593 5.3) and the code: an identity map of nothing but what this copy needs.
    fn map(&self, from: u64, to: u64) -> Result<(), vm_memory::GuestMemoryError> {
        const TABLE: u64 = 0b11;
        const PAGE: u64 = 0b1000_0011;
        let put = |at: u64, value: u64| self.code.write_obj(value, GuestAddress(at));
        put(0, (self.at + PAGE_SIZE) | TABLE)?;
        put(PAGE_SIZE, (self.at + 2 * PAGE_SIZE) | TABLE)?;
        let (from, to) = (from / LARGE * LARGE, to / LARGE * LARGE);
        let pages = [self.at, from, from + LARGE, to, to + LARGE];
        for (entry, page) in (0..).zip(pages) {
            put(2 * PAGE_SIZE + entry * 8, page | PAGE)?;
        }
        self.code.write_slice(&COPY, GuestAddress(CODE))
    }

    /// Ends the last port access and gives the vCPU its registers back.
    fn finish(mut self, sregs: &kvm_sregs, regs: &kvm_regs) -> Result<(), CopyError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let outcome = match self.vcpu.run() {
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(error) => Err(refused("KVM_RUN")(error)),
            Ok(exit) => Err(CopyError::Exit(format!("{exit:?}"))),
        };
        self.vcpu.set_kvm_immediate_exit(0);
        outcome?;
        self.vcpu.set_sregs(sregs).map_err(refused("KVM_SET_SREGS"))?;
        self.vcpu.set_regs(regs).map_err(refused("KVM_SET_REGS"))
    }
}

/// 64-bit mode with the tables at `cr3`, interrupts and descriptor tables as they were.
fn long_mode(was: &kvm_sregs, cr3: u64) -> kvm_sregs {
    let segment = |selector, type_, l| kvm_segment {
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..kvm_segment::default()
    };
    let (code, data) = (segment(8, 11, 1), segment(16, 3, 0));
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            limit: 0xFFFF,
            selector: 24,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        },
        // Paging, write protection, protected mode.
        cr0: 0x8001_0011,
        cr3,
        cr4: 0x20,
        // Long mode, enabled and active.
        efer: 0x500,
        ..*was
    }
}
