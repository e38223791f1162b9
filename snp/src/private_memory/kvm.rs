//! The calls of private memory that have no safe wrapper, or none that works on a second handle of the VM.
#![expect(
    unsafe_code,
    reason = "descriptors that KVM makes, memory slots, and KVM_SET_MEMORY_ATTRIBUTES on a handle without a VmFd"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes, kvm_userspace_memory_region2};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

/// `_IOW(KVMIO, 0xd2, struct kvm_memory_attributes)`.
const KVM_SET_MEMORY_ATTRIBUTES: libc::Ioctl = 0x4020_AED2;

fn os(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// Another handle of `vm`.
pub(super) fn handle(vm: &VmFd) -> io::Result<OwnedFd> {
    // SAFETY: `vm` keeps the descriptor open for the length of the call.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }.try_clone_to_owned()
}

/// Another handle of `vcpu`, with the same run page.
pub(super) fn vcpu_handle(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<VcpuFd> {
    // SAFETY: `vcpu` keeps the descriptor open for the length of the call.
    let copy = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: a vCPU's descriptor that nobody else owns.
    unsafe { vm.create_vcpu_from_rawfd(copy.into_raw_fd()) }.map_err(os)
}

/// The file that KVM has just made, and its number as memory slots take it.
pub(super) fn owned(fd: RawFd) -> (File, u32) {
    // SAFETY: KVM has just returned the descriptor, so nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    (file, fd.unsigned_abs())
}

/// Registers a slot whose shared half is in `memory`, or removes one (no bytes).
///
/// # Errors
/// EFAULT when the slot is not all in `memory`; as KVM.
pub(super) fn set_region(
    vm: &VmFd,
    region: kvm_userspace_memory_region2,
    memory: &GuestMemoryMmap<()>,
) -> io::Result<()> {
    if region.memory_size > 0 && !in_memory(memory, region.userspace_addr, region.memory_size) {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    // SAFETY: the range is inside a mapping of `memory`, of which the caller keeps a handle for as long as the slot is.
    unsafe { vm.set_user_memory_region2(region) }.map_err(os)
}

/// Whether the host addresses are all inside one region of `memory`.
fn in_memory(memory: &GuestMemoryMmap<()>, host: u64, len: u64) -> bool {
    use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress};
    memory.iter().any(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0));
        start.is_ok_and(|start| {
            let offset = host.checked_sub(start.addr() as u64);
            offset
                .and_then(|offset| offset.checked_add(len))
                .is_some_and(|end| end <= region.len())
        })
    })
}

/// `KVM_SET_MEMORY_ATTRIBUTES`.
pub(super) fn set_attributes(vm: &OwnedFd, address: u64, size: u64, private: bool) -> io::Result<()> {
    let attributes = kvm_memory_attributes {
        address,
        size,
        attributes: if private {
            KVM_MEMORY_ATTRIBUTE_PRIVATE.into()
        } else {
            0
        },
        flags: 0,
    };
    loop {
        // SAFETY: the kernel reads one `kvm_memory_attributes`, which outlives the call.
        let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_MEMORY_ATTRIBUTES, &raw const attributes) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // A signal that is pending ends the call and is no failure.
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

/// `FALLOC_FL_PUNCH_HOLE` of `[offset, offset + len)`.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (libc::off64_t::try_from(offset), libc::off64_t::try_from(len)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: plain integers on a descriptor that `file` keeps open; no memory is passed.
        let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}
