//! The state of a vCPU as KVM tells it, for snapshots: read while the vCPU stands still, written before its first entry.
#![expect(unsafe_code, reason = "KVM_SET_XSAVE, and a second handle of a vCPU")]

use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// `IA32_TSC_DEADLINE`: armed last, when the time-stamp counter and the local APIC are what they were.
const TSC_DEADLINE: u32 = 0x6E0;

/// What a vCPU holds.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// Why a state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error("{what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// An MSR that this processor does not take.
    #[error("MSR {index:#x} cannot be {value:#x} here: restore the snapshot on a processor like the one it is from")]
    Msr {
        /// Which.
        index: u32,
        /// What it was.
        value: u64,
    },
    /// The instruction that the vCPU is in does not come to its end.
    #[error("vCPU is in the middle of an access to a device: resume, pause and try again")]
    Busy,
    /// No descriptor.
    #[error("a second handle of the vCPU: {0}")]
    Handle(#[from] io::Error),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

/// A second handle of vCPU `fd` of `vm`. The thread that has the first must be parked while this one is used.
pub(super) fn second_handle(vm: &VmFd, fd: RawFd) -> Result<VcpuFd, StateError> {
    // SAFETY: the caller has it from the parked thread that owns it, which closes it only when it is joined.
    let copy: OwnedFd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    // SAFETY: a vCPU's descriptor that nobody else owns.
    unsafe { vm.create_vcpu_from_rawfd(copy.into_raw_fd()) }.map_err(kvm("mapping the vCPU's run page"))
}

/// Finishes the instruction whose device access was the last exit, without entering the guest.
fn finish_access(vcpu: &mut VcpuFd) -> Result<(), StateError> {
    vcpu.set_kvm_immediate_exit(1);
    let outcome = match vcpu.run() {
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(()),
        Err(e) => Err(kvm("KVM_RUN")(e)),
        // The rest of an access in parts: it is the run loop's to serve.
        Ok(_) => Err(StateError::Busy),
    };
    vcpu.set_kvm_immediate_exit(0);
    outcome
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    (vcpu.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice().first().map(|e| e.data))?
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run. `msrs` are KVM's (`KVM_GET_MSR_INDEX_LIST`); those that this
    /// vCPU does not have are left out.
    ///
    /// # Errors
    /// When KVM refuses, or the vCPU is within an access to a device.
    pub fn read(vcpu: &mut VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        finish_access(vcpu)?;
        Ok(Self {
            mp_state: vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            msrs: msrs
                .iter()
                .filter_map(|&index| Some((index, read_msr(vcpu, index)?)))
                .collect(),
            events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?,
        })
    }

    /// Puts the state into a vCPU that has its CPUID and has not run.
    ///
    /// # Errors
    /// When KVM refuses a part: another processor, or a state that was made up.
    pub fn write(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        if vcpu.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(kvm("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: no feature that grows the area beyond this structure is enabled for this process (those need
        // ARCH_REQ_XCOMP_GUEST_PERM), so that KVM reads its 4 KiB and no more.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let (last, first): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|(index, _)| *index == TSC_DEADLINE);
        for &(index, data) in first.into_iter().chain(last) {
            let entry = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let taken = Msrs::from_entries(&[entry]).is_ok_and(|msrs| vcpu.set_msrs(&msrs).is_ok_and(|n| n == 1));
            // Some are there to be read, and are the same anyway.
            if !taken && read_msr(vcpu, index) != Some(data) {
                return Err(StateError::Msr { index, value: data });
            }
        }
        vcpu.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }
}
