//! A vCPU's x87 control word and MXCSR by way of its XSAVE area: `KVM_SET_FPU` and `KVM_GET_FPU` leave MXCSR out.
#![expect(
    unsafe_code,
    reason = "KVM_SET_XSAVE reads as much as the process's permitted features need"
)]

use kvm_bindings::kvm_xsave;
use kvm_ioctls::{Error, VcpuFd};

/// In 32-bit words of the area: FCW and FSW, MXCSR, XSTATE_BV (AMD APM volume 2, 11.5.2 and 11.5.9).
const FCW: usize = 0;
const MXCSR: usize = 6;
const XSTATE_BV: usize = 128;
/// x87 and SSE state are in the area.
const X87_AND_SSE: u32 = 3;

/// Sets both; everything else of the FPU is as after reset.
pub(crate) fn set(vcpu: &VcpuFd, fcw: u16, mxcsr: u32) -> Result<(), Error> {
    let mut xsave = kvm_xsave::default();
    for (at, value) in [(FCW, u32::from(fcw)), (MXCSR, mxcsr), (XSTATE_BV, X87_AND_SSE)] {
        if let Some(word) = xsave.region.get_mut(at) {
            *word = value;
        }
    }
    // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only for features (AMX) that a process has asked for with
    // ARCH_REQ_XCOMP_GUEST_PERM; nothing in podvisor asks.
    unsafe { vcpu.set_xsave(&xsave) }
}

/// Reads both.
pub(crate) fn get(vcpu: &VcpuFd) -> Result<(u16, u32), Error> {
    let xsave = vcpu.get_xsave()?;
    let word = |at: usize| xsave.region.get(at).copied().unwrap_or(0);
    let [low, high, ..] = word(FCW).to_le_bytes();
    Ok((u16::from_le_bytes([low, high]), word(MXCSR)))
}
