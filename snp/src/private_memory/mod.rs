//! Private guest memory as KVM has it: each RAM slot has a `guest_memfd` behind it beside the monitor's mapping, and a
//! page's attribute says which of the two halves the guest sees. Here the slots are made and pages change over so that no
//! page is held twice and none carries data across. Which page is in which state is [`crate::rmp::PageStates`]'s to know,
//! for KVM does not tell; the guest's request for it is `hypercall`'s.

mod copier;
pub mod hypercall;
mod kvm;

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_SW_PROTECTED_VM,
    kvm_create_guest_memfd, kvm_enable_cap, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

pub use self::copier::CopyError;
use crate::processor::MemoryRegion;
use crate::scrub;

/// `KVM_CREATE_VM`'s type for a VM whose private memory needs no confidential processor (Linux
/// `Documentation/virt/kvm/api.rst` 4.2; the kernel has it with `CONFIG_KVM_SW_PROTECTED_VM`).
pub const SOFTWARE_PROTECTED_VM: u64 = KVM_X86_SW_PROTECTED_VM as u64;
/// `KVM_CAP_VM_TYPES`, `KVM_CAP_MEMORY_ATTRIBUTES`, `KVM_CAP_GUEST_MEMFD` (Linux `include/uapi/linux/kvm.h`).
const CAP_VM_TYPES: u64 = 235;
const CAP_MEMORY_ATTRIBUTES: u64 = 233;
const CAP_GUEST_MEMFD: u64 = 234;

/// Why private memory failed.
#[derive(Debug, thiserror::Error)]
pub enum PrivateMemoryError {
    /// KVM or the host refused.
    #[error("{what}: {source}")]
    Host {
        /// The call.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Pages that are no slot's.
    #[error("guest frames {0:#x}..{1:#x} are in no slot with private memory")]
    NoSlot(u64, u64),
    /// The monitor's half could not be given up.
    #[error("giving up the shared half: {0}")]
    Shared(#[from] GuestMemoryError),
}

impl PrivateMemoryError {
    fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Host {
            what,
            source: std::io::Error::from_raw_os_error(error.errno()),
        }
    }

    /// errno of the failure, EINVAL where there was none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Host { source, .. } => source.raw_os_error().unwrap_or(libc::EINVAL),
            Self::NoSlot(..) | Self::Shared(_) => libc::EINVAL,
        }
    }
}

/// What this host's KVM lacks for VMs of type [`SOFTWARE_PROTECTED_VM`]; none: it has them.
#[must_use]
pub fn missing(kvm: &Kvm) -> Option<&'static str> {
    let bit = |capability: u64, bit: u32| kvm.check_extension_raw(capability) & (1i32 << bit) != 0;
    let wanted = [
        (
            bit(CAP_VM_TYPES, KVM_X86_SW_PROTECTED_VM),
            "VM type KVM_X86_SW_PROTECTED_VM (a kernel with CONFIG_KVM_SW_PROTECTED_VM)",
        ),
        (kvm.check_extension_raw(CAP_GUEST_MEMFD) > 0, "KVM_CAP_GUEST_MEMFD"),
    ];
    wanted.into_iter().find_map(|(there, what)| (!there).then_some(what))
}

/// One slot.
struct Slot {
    /// Its frames.
    gfns: Range<u64>,
    /// The private half.
    private: File,
}

/// The private memory of one VM.
pub struct PrivateMemory {
    vm: OwnedFd,
    /// The shared half.
    shared: GuestMemoryMmap<()>,
    /// In the order in which they were made; as many as the VM has RAM regions.
    slots: Mutex<Vec<Slot>>,
}

impl PrivateMemory {
    /// The private memory of `vm`, which has none yet; `shared` is the monitor's half of the RAM. The guest's
    /// `KVM_HC_MAP_GPA_RANGE` leaves the kernel from now on.
    ///
    /// # Errors
    /// When the VM is of a kind without private memory.
    pub fn new(vm: &VmFd, shared: GuestMemoryMmap<()>) -> Result<Self, PrivateMemoryError> {
        let attributes = vm.check_extension_raw(CAP_MEMORY_ATTRIBUTES);
        if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE.cast_signed() == 0 {
            let source = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            return Err(PrivateMemoryError::host(
                "KVM_CAP_MEMORY_ATTRIBUTES: this VM has no private memory",
            )(source));
        }
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_EXIT_HYPERCALL,
            args: [1 << hypercall::KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
            ..kvm_enable_cap::default()
        })
        .map_err(PrivateMemoryError::kvm("KVM_CAP_EXIT_HYPERCALL"))?;
        Ok(Self {
            vm: kvm::handle(vm).map_err(PrivateMemoryError::host("another handle of the VM"))?,
            shared,
            slots: Mutex::default(),
        })
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `KVM_CREATE_GUEST_MEMFD` and `KVM_SET_USER_MEMORY_REGION2`: the slot has a private half from now on, and shows the
    /// shared one. `region` is a part of the RAM that the VM was given, in whole pages.
    ///
    /// # Errors
    /// As KVM.
    pub fn map(&self, vm: &VmFd, region: &MemoryRegion) -> Result<(), PrivateMemoryError> {
        let memory = kvm_create_guest_memfd {
            size: region.len,
            ..kvm_create_guest_memfd::default()
        };
        let created = vm.create_guest_memfd(memory);
        let (private, number) = kvm::owned(created.map_err(PrivateMemoryError::kvm("KVM_CREATE_GUEST_MEMFD"))?);
        let slot = kvm_userspace_memory_region2 {
            slot: region.slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: region.host_addr,
            guest_memfd_offset: 0,
            guest_memfd: number,
            ..kvm_userspace_memory_region2::default()
        };
        kvm::set_region(vm, slot, &self.shared).map_err(PrivateMemoryError::host("KVM_SET_USER_MEMORY_REGION2"))?;
        let first = region.gpa / PAGE_SIZE;
        self.slots().push(Slot {
            gfns: first..first + region.len / PAGE_SIZE,
            private,
        });
        Ok(())
    }

    /// Has the guest see the private half of `pages` pages from frame `gfn`, or the shared one. Both read as zeros
    /// afterwards and neither holds memory, whatever they held. Callers do this for one range at a time.
    ///
    /// # Errors
    /// When a page is no slot's, or the host refuses; then the guest sees the half that it saw.
    pub fn convert(&self, gfn: u64, pages: u64, private: bool) -> Result<(), PrivateMemoryError> {
        let gfns = gfn..gfn.saturating_add(pages);
        let slots = self.slots();
        let clip = |slot: &Slot| gfns.start.max(slot.gfns.start)..gfns.end.min(slot.gfns.end);
        let covered: u64 = slots.iter().map(|slot| range_len(&clip(slot))).sum();
        if covered != pages {
            return Err(PrivateMemoryError::NoSlot(gfns.start, gfns.end));
        }
        if private {
            // A device that still holds a slice writes into the half that nobody reads.
            self.set(gfn, pages, true)?;
            return self.empty_shared(gfn, pages).or_else(|error| {
                self.set(gfn, pages, false)?;
                Err(error)
            });
        }
        // Each half is emptied while the guest sees the other.
        self.empty_shared(gfn, pages)?;
        self.set(gfn, pages, false)?;
        let emptied = slots
            .iter()
            .map(|slot| (slot, clip(slot)))
            .filter(|(_, part)| !part.is_empty())
            .try_for_each(|(slot, part)| slot.empty(&part));
        emptied.or_else(|error| {
            self.set(gfn, pages, true)?;
            Err(error)
        })
    }

    /// Drops what the shared half holds of `pages` pages from frame `gfn`.
    ///
    /// # Errors
    /// When a page is not RAM.
    pub fn empty_shared(&self, gfn: u64, pages: u64) -> Result<(), PrivateMemoryError> {
        Ok(scrub::give_up(&self.shared, gfn, pages)?)
    }

    fn set(&self, gfn: u64, pages: u64, private: bool) -> Result<(), PrivateMemoryError> {
        kvm::set_attributes(&self.vm, gfn * PAGE_SIZE, pages * PAGE_SIZE, private)
            .map_err(PrivateMemoryError::host("KVM_SET_MEMORY_ATTRIBUTES"))
    }

    /// Fills the private half of `ranges` (frames) with what the shared half holds there, by having `vcpu` copy it: no
    /// host can write it. The vCPU's registers are as before afterwards.
    ///
    /// # Errors
    /// When the guest cannot be made to, or did not.
    pub fn fill(&self, vm: &VmFd, vcpu: &VcpuFd, ranges: &[Range<u64>]) -> Result<(), CopyError> {
        copier::run(vm, vcpu, &self.shared, ranges)
    }
}

fn range_len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

impl Slot {
    /// Gives back the private half's memory of `gfns`, which lie in the slot.
    fn empty(&self, gfns: &Range<u64>) -> Result<(), PrivateMemoryError> {
        let offset = (gfns.start - self.gfns.start) * PAGE_SIZE;
        kvm::punch(&self.private, offset, range_len(gfns) * PAGE_SIZE)
            .map_err(PrivateMemoryError::host("FALLOC_FL_PUNCH_HOLE of a guest_memfd"))
    }
}
