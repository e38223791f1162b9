//! The two calls to KVM that the emulation makes itself and that have no safe wrapper.
#![expect(
    unsafe_code,
    reason = "KVM_SET_BOOT_CPU_ID has no wrapper; a memslot hands host memory to the kernel"
)]

use std::os::fd::AsRawFd;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// `_IO(KVMIO, 0x78)`.
const KVM_SET_BOOT_CPU_ID: libc::Ioctl = 0xAE78;

/// Whether `vm` has a vCPU: KVM refuses to be told the boot processor (0 is its default) once there is one.
pub(super) fn vcpus_exist(vm: &VmFd) -> bool {
    // SAFETY: takes an integer by value; `vm` keeps the descriptor open.
    let rc = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_BOOT_CPU_ID, 0) };
    rc < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY)
}

/// Registers a memslot.
pub(super) fn set_region(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the caller has checked that the range is the RAM of the `GuestMemoryMmap` that the emulated processor owns a
    // handle to, so it stays mapped for as long as the processor lives, which is as long as the VM runs.
    unsafe { vm.set_user_memory_region(region) }
}
