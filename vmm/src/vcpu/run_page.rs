//! What the kvm-ioctls exits do not tell: the element size of string port I/O and the details of an internal error.
#![expect(unsafe_code, reason = "fields of unions in the kvm_run page")]

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_OUT};
use kvm_ioctls::VcpuFd;

/// Port I/O is at most this long in the run page: one page.
const MAX_PIO: usize = 4096;

/// One element of port I/O.
pub(crate) enum Pio<'a> {
    /// IN: fill it.
    In(u16, &'a mut [u8]),
    /// OUT.
    Out(u16, &'a [u8]),
}

/// Calls `each` for every element of the port I/O that `vcpu` has just exited with (`rep ins` and `rep outs` carry
/// many).
pub(crate) fn for_each_pio(vcpu: &mut VcpuFd, mut each: impl FnMut(Pio<'_>)) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return;
    }
    // SAFETY: exit_reason says that `io` is the member in use; it is plain data.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size).clamp(1, 8);
    let len = size * usize::try_from(io.count).unwrap_or(0).min(MAX_PIO / size);
    let Ok(offset) = usize::try_from(io.data_offset) else {
        return;
    };
    // SAFETY: KVM keeps the data of port I/O in the page after kvm_run (`data_offset`), inside the same mapping, and
    // never more than a page of it; this thread owns the vCPU, so that nobody else touches it now.
    let data = unsafe { std::slice::from_raw_parts_mut((&raw mut *run).cast::<u8>().add(offset), len) };
    for element in data.chunks_exact_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            each(Pio::Out(io.port, element));
        } else {
            each(Pio::In(io.port, element));
        }
    }
}

/// The `suberror` of `KVM_EXIT_INTERNAL_ERROR`.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return 0;
    }
    // SAFETY: exit_reason says that `internal` is the member in use; it is plain data.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
