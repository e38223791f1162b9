//! A vCPU's start state and KVM's registers: told to KVM by [`apply`] (the plain boot uses it too), and read back by
//! [`read`] when the emulation seals a vCPU. What the VMSA page looks like is not here.

use kvm_bindings::{Msrs, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use podvisor_firmware::plan::{Segment, VcpuState};
use podvisor_firmware::vmsa::EFER_SVME;

use crate::fpu;

/// IA32_PAT.
const MSR_IA32_PAT: u32 = 0x277;
/// DR6 and DR7 after reset; a state with zeros gets these.
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR7_RESET: u64 = 0x400;
/// PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Segment attribute bit: present.
const ATTRIB_PRESENT: u16 = 1 << 7;

/// A register ioctl that KVM refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {}: {hint}", std::io::Error::from_raw_os_error(*errno))]
pub struct RegisterError {
    /// The ioctl, by KVM's name.
    pub op: &'static str,
    /// errno.
    pub errno: i32,
    /// What usually causes it.
    pub hint: &'static str,
}

fn failed(op: &'static str, hint: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegisterError {
    move |error| RegisterError {
        op,
        errno: error.errno(),
        hint,
    }
}

/// Gives `vcpu` the registers of `state`: segments, control registers (EFER.SVME left out: KVM adds it under SNP),
/// general registers, FPU control words, XCR0, PAT and debug registers. The APIC base stays as it is. PAT, XCR0, DR6,
/// DR7, MXCSR and the x87 control word are left at their reset values where `state` has zero (a native context has
/// no place for them).
///
/// The vCPU's CPUID must be set before: KVM takes EFER.LME and XCR0 only from a CPU that has them.
///
/// # Errors
/// [`RegisterError`] names the ioctl.
pub fn apply(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), RegisterError> {
    let current = vcpu
        .get_sregs()
        .map_err(failed("KVM_GET_SREGS", "the vCPU is running or sealed"))?;
    vcpu.set_sregs(&sregs(state, &current)).map_err(failed(
        "KVM_SET_SREGS",
        "CR0, CR3, CR4 or EFER has a bit that the vCPU's CPUID does not allow (a C-bit in CR3 needs SNP hardware)",
    ))?;
    vcpu.set_regs(&regs(state))
        .map_err(failed("KVM_SET_REGS", "the vCPU is running or sealed"))?;
    fpu::set(vcpu, or_reset(state.x87_fcw, 0x37F), or_reset(state.mxcsr, 0x1F80))
        .map_err(failed("KVM_SET_XSAVE", "MXCSR has a reserved bit"))?;
    if state.xcr0 > 1 {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        if let Some(first) = xcrs.xcrs.first_mut() {
            first.value = state.xcr0;
        }
        vcpu.set_xcrs(&xcrs)
            .map_err(failed("KVM_SET_XCRS", "XCR0 has a feature that the vCPU's CPUID lacks"))?;
    }
    let debug = kvm_debugregs {
        dr6: or_reset(state.dr6, DR6_RESET),
        dr7: or_reset(state.dr7, DR7_RESET),
        ..kvm_debugregs::default()
    };
    vcpu.set_debug_regs(&debug)
        .map_err(failed("KVM_SET_DEBUGREGS", "DR6 or DR7 has a bit above 31"))?;
    set_pat(vcpu, or_reset(state.pat, PAT_RESET))
}

fn or_reset<T: Default + PartialEq>(value: T, reset: T) -> T {
    if value == T::default() { reset } else { value }
}

fn set_pat(vcpu: &VcpuFd, pat: u64) -> Result<(), RegisterError> {
    const HINT: &str = "PAT has a memory type that does not exist";
    let refused = RegisterError {
        op: "KVM_SET_MSRS(PAT)",
        errno: libc::EINVAL,
        hint: HINT,
    };
    let msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MSR_IA32_PAT,
        data: pat,
        ..kvm_msr_entry::default()
    }])
    .map_err(|_| refused)?;
    match vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS(PAT)", HINT))? {
        1 => Ok(()),
        _ => Err(refused),
    }
}

/// Reads the registers of `vcpu` as a VMSA would hold them. SEV_FEATURES is not a register: 0.
///
/// # Errors
/// [`RegisterError`] names the ioctl.
pub fn read(vcpu: &VcpuFd) -> Result<VcpuState, RegisterError> {
    const HINT: &str = "the vCPU is running or sealed";
    let s = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS", HINT))?;
    let r = vcpu.get_regs().map_err(failed("KVM_GET_REGS", HINT))?;
    let (x87_fcw, mxcsr) = fpu::get(vcpu).map_err(failed("KVM_GET_XSAVE", HINT))?;
    let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS", HINT))?;
    let debug = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS", HINT))?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
    Ok(VcpuState {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rbp: r.rbp,
        rsp: r.rsp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
        es: vmsa_segment(&s.es),
        cs: vmsa_segment(&s.cs),
        ss: vmsa_segment(&s.ss),
        ds: vmsa_segment(&s.ds),
        fs: vmsa_segment(&s.fs),
        gs: vmsa_segment(&s.gs),
        gdtr: vmsa_table(&s.gdt),
        idtr: vmsa_table(&s.idt),
        ldtr: vmsa_segment(&s.ldt),
        tr: vmsa_segment(&s.tr),
        efer: s.efer,
        cr0: s.cr0,
        cr3: s.cr3,
        cr4: s.cr4,
        dr6: debug.dr6,
        dr7: debug.dr7,
        pat: get_pat(vcpu)?,
        xcr0: xcr0.map_or(1, |xcr| xcr.value),
        mxcsr,
        x87_fcw,
        sev_features: 0,
    })
}

fn get_pat(vcpu: &VcpuFd) -> Result<u64, RegisterError> {
    let refused = RegisterError {
        op: "KVM_GET_MSRS(PAT)",
        errno: libc::EINVAL,
        hint: "the vCPU has no PAT",
    };
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MSR_IA32_PAT,
        ..kvm_msr_entry::default()
    }])
    .map_err(|_| refused)?;
    vcpu.get_msrs(&mut msrs)
        .map_err(failed("KVM_GET_MSRS(PAT)", refused.hint))?;
    msrs.as_slice().first().map(|entry| entry.data).ok_or(refused)
}

fn regs(state: &VcpuState) -> kvm_regs {
    kvm_regs {
        rax: state.rax,
        rbx: state.rbx,
        rcx: state.rcx,
        rdx: state.rdx,
        rsi: state.rsi,
        rdi: state.rdi,
        rsp: state.rsp,
        rbp: state.rbp,
        r8: state.r8,
        r9: state.r9,
        r10: state.r10,
        r11: state.r11,
        r12: state.r12,
        r13: state.r13,
        r14: state.r14,
        r15: state.r15,
        rip: state.rip,
        rflags: state.rflags | 2,
    }
}

fn sregs(state: &VcpuState, current: &kvm_sregs) -> kvm_sregs {
    kvm_sregs {
        cs: kvm_segment_of(&state.cs),
        ds: kvm_segment_of(&state.ds),
        es: kvm_segment_of(&state.es),
        fs: kvm_segment_of(&state.fs),
        gs: kvm_segment_of(&state.gs),
        ss: kvm_segment_of(&state.ss),
        tr: kvm_segment_of(&state.tr),
        ldt: kvm_segment_of(&state.ldtr),
        gdt: kvm_table(&state.gdtr),
        idt: kvm_table(&state.idtr),
        cr0: state.cr0,
        cr2: 0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer & !EFER_SVME,
        ..*current
    }
}

fn bits(attrib: u16, shift: u16, width: u16) -> u8 {
    (attrib >> shift & ((1 << width) - 1)).to_le_bytes()[0]
}

fn kvm_segment_of(segment: &Segment) -> kvm_segment {
    let attrib = segment.attrib;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(attrib, 0, 4),
        s: bits(attrib, 4, 1),
        dpl: bits(attrib, 5, 2),
        present: bits(attrib, 7, 1),
        avl: bits(attrib, 8, 1),
        l: bits(attrib, 9, 1),
        db: bits(attrib, 10, 1),
        g: bits(attrib, 11, 1),
        unusable: u8::from(attrib & ATTRIB_PRESENT == 0),
        padding: 0,
    }
}

fn vmsa_segment(segment: &kvm_segment) -> Segment {
    let bit = |value: u8, shift: u16| u16::from(value) << shift;
    let present = segment.present & u8::from(segment.unusable == 0);
    Segment {
        selector: segment.selector,
        attrib: bit(segment.type_ & 15, 0)
            | bit(segment.s & 1, 4)
            | bit(segment.dpl & 3, 5)
            | bit(present & 1, 7)
            | bit(segment.avl & 1, 8)
            | bit(segment.l & 1, 9)
            | bit(segment.db & 1, 10)
            | bit(segment.g & 1, 11),
        limit: segment.limit,
        base: segment.base,
    }
}

fn kvm_table(segment: &Segment) -> kvm_dtable {
    kvm_dtable {
        base: segment.base,
        limit: u16::try_from(segment.limit).unwrap_or(u16::MAX),
        padding: [0; 3],
    }
}

fn vmsa_table(table: &kvm_dtable) -> Segment {
    Segment {
        limit: u32::from(table.limit),
        base: table.base,
        ..Segment::default()
    }
}
