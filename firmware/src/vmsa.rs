//! The VMSA page (AMD APM vol. 2, table B-4): read into a [`VcpuState`], and written exactly as KVM writes it when
//! it finishes an SNP launch (`sev_es_sync_vmsa`, Linux 7.2 arch/x86/kvm/svm/sev.c). A monitor cannot hand KVM a
//! VMSA page, only registers, so a page that KVM would not rebuild byte for byte must be refused before the launch.

use std::mem::offset_of;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::plan::{Segment, VcpuState};

/// Bytes in a VMSA page.
pub const VMSA_SIZE: usize = 4096;
/// SEV_FEATURES bit 0: SNP is active.
pub const SEV_FEATURE_SNP: u64 = 1;
/// EFER.SVME, which KVM always sets in a VMSA.
pub const EFER_SVME: u64 = 0x1000;
/// CR4.MCE, which KVM takes over from the host.
pub const CR4_MCE: u64 = 0x40;
/// The only DR7 that KVM lets a launch finish with.
pub const DR7_RESET: u64 = 0x400;

const EFER_LME: u64 = 0x100;
const EFER_LMA: u64 = 0x400;
const CR0_NW_CD: u64 = 0x6000_0000;
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 0x8000_0000;
const CR4_PAE: u64 = 0x20;
const RFLAGS_FIXED: u64 = 2;

/// Why a VMSA page is not one that KVM would build.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum VmsaError {
    /// Not one page.
    #[error("the VMSA has {0} bytes; it must have 4096")]
    Size(usize),
    /// A field KVM sets itself, or cannot be told.
    #[error("VMSA field {field} (offset {offset:#x}): {reason}")]
    NotReproducible {
        /// Name of the field.
        field: &'static str,
        /// Offset of the field in the page.
        offset: usize,
        /// What KVM does instead.
        reason: String,
    },
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawSegment {
    selector: u16,
    attrib: u16,
    limit: u32,
    base: u64,
}

impl RawSegment {
    fn new(s: &Segment) -> Self {
        Self {
            selector: s.selector,
            attrib: s.attrib & 0xFFF,
            limit: s.limit,
            base: s.base,
        }
    }

    /// Descriptor-table registers: KVM writes limit and base only.
    fn table(s: &Segment) -> Self {
        Self {
            selector: 0,
            attrib: 0,
            limit: s.limit,
            base: s.base,
        }
    }

    fn state(self) -> Segment {
        Segment {
            selector: self.selector,
            attrib: self.attrib,
            limit: self.limit,
            base: self.base,
        }
    }
}

/// The save area; what is reserved or never written by KVM's sync is in the gaps.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawVmsa {
    es: RawSegment,
    cs: RawSegment,
    ss: RawSegment,
    ds: RawSegment,
    fs: RawSegment,
    gs: RawSegment,
    gdtr: RawSegment,
    ldtr: RawSegment,
    idtr: RawSegment,
    tr: RawSegment,
    shadow_stacks: [u64; 5],
    reserved_c8: u16,
    vmpl: u8,
    cpl: u8,
    reserved_cc: u32,
    efer: u64,
    reserved_d8: [u64; 13],
    xss: u64,
    cr4: u64,
    cr3: u64,
    cr0: u64,
    dr7: u64,
    dr6: u64,
    rflags: u64,
    rip: u64,
    dr0_3: [u64; 4],
    dr_masks: [u64; 4],
    reserved_1c0: [u64; 3],
    rsp: u64,
    supervisor_cet: [u64; 3],
    rax: u64,
    syscall_msrs: [u64; 4],
    kernel_gs_base: u64,
    sysenter_msrs: [u64; 3],
    cr2: u64,
    reserved_248: [u64; 4],
    pat: u64,
    lbr_msrs: [u64; 5],
    reserved_298: [u64; 9],
    spec_ctrl: u64,
    pkru_and_tsc_aux: [u64; 4],
    rcx: u64,
    rdx: u64,
    rbx: u64,
    reserved_320: u64,
    rbp: u64,
    rsi: u64,
    rdi: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    reserved_380: [u64; 2],
    exit_info: [u64; 4],
    sev_features: u64,
    vintr_ctrl: u64,
    guest_error_code: u64,
    virtual_tom: u64,
    tlb_and_pcpu_id: [u64; 2],
    event_inject: u64,
    xcr0: u64,
    xsave_valid_bitmap: [u64; 2],
    x87_dp: u64,
    mxcsr: u32,
    x87_ftw: u16,
    x87_fsw: u16,
    x87_fcw: u16,
    x87_op: u16,
    x87_ds: u16,
    x87_cs: u16,
    x87_rip: u64,
    x87_registers: [u8; 80],
    xmm_registers: [u8; 256],
    ymm_registers: [u8; 256],
    padding: [u8; 2448],
}

const _: () = assert!(size_of::<RawVmsa>() == VMSA_SIZE);
const _: () = assert!(offset_of!(RawVmsa, efer) == 0xD0);
const _: () = assert!(offset_of!(RawVmsa, cr4) == 0x148);
const _: () = assert!(offset_of!(RawVmsa, rip) == 0x178);
const _: () = assert!(offset_of!(RawVmsa, rsp) == 0x1D8);
const _: () = assert!(offset_of!(RawVmsa, rax) == 0x1F8);
const _: () = assert!(offset_of!(RawVmsa, pat) == 0x268);
const _: () = assert!(offset_of!(RawVmsa, rcx) == 0x308);
const _: () = assert!(offset_of!(RawVmsa, sev_features) == 0x3B0);
const _: () = assert!(offset_of!(RawVmsa, xcr0) == 0x3E8);
const _: () = assert!(offset_of!(RawVmsa, mxcsr) == 0x408);
const _: () = assert!(offset_of!(RawVmsa, x87_fcw) == 0x410);

/// The fields in page order, to name the one that differs.
macro_rules! fields {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), offset_of!(RawVmsa, $name))),*] };
}

const FIELDS: [(&str, usize); 74] = fields![
    es,
    cs,
    ss,
    ds,
    fs,
    gs,
    gdtr,
    ldtr,
    idtr,
    tr,
    shadow_stacks,
    reserved_c8,
    vmpl,
    cpl,
    reserved_cc,
    efer,
    reserved_d8,
    xss,
    cr4,
    cr3,
    cr0,
    dr7,
    dr6,
    rflags,
    rip,
    dr0_3,
    dr_masks,
    reserved_1c0,
    rsp,
    supervisor_cet,
    rax,
    syscall_msrs,
    kernel_gs_base,
    sysenter_msrs,
    cr2,
    reserved_248,
    pat,
    lbr_msrs,
    reserved_298,
    spec_ctrl,
    pkru_and_tsc_aux,
    rcx,
    rdx,
    rbx,
    reserved_320,
    rbp,
    rsi,
    rdi,
    r8,
    r9,
    r10,
    r11,
    r12,
    r13,
    r14,
    r15,
    reserved_380,
    exit_info,
    sev_features,
    vintr_ctrl,
    guest_error_code,
    virtual_tom,
    tlb_and_pcpu_id,
    event_inject,
    xcr0,
    xsave_valid_bitmap,
    x87_dp,
    mxcsr,
    x87_ftw,
    x87_fsw,
    x87_fcw,
    x87_registers,
    xmm_registers,
    ymm_registers
];

/// The registers a VMSA page holds, as they stand in it; fields that [`VcpuState`] has no place for are left out.
///
/// # Errors
/// [`VmsaError::Size`] unless the page has 4096 bytes.
pub fn state_of(vmsa: &[u8]) -> Result<VcpuState, VmsaError> {
    let v = RawVmsa::read_from_bytes(vmsa).map_err(|_| VmsaError::Size(vmsa.len()))?;
    Ok(VcpuState {
        rax: v.rax,
        rbx: v.rbx,
        rcx: v.rcx,
        rdx: v.rdx,
        rsi: v.rsi,
        rdi: v.rdi,
        rbp: v.rbp,
        rsp: v.rsp,
        r8: v.r8,
        r9: v.r9,
        r10: v.r10,
        r11: v.r11,
        r12: v.r12,
        r13: v.r13,
        r14: v.r14,
        r15: v.r15,
        rip: v.rip,
        rflags: v.rflags,
        es: v.es.state(),
        cs: v.cs.state(),
        ss: v.ss.state(),
        ds: v.ds.state(),
        fs: v.fs.state(),
        gs: v.gs.state(),
        gdtr: v.gdtr.state(),
        idtr: v.idtr.state(),
        ldtr: v.ldtr.state(),
        tr: v.tr.state(),
        efer: v.efer,
        cr0: v.cr0,
        cr3: v.cr3,
        cr4: v.cr4,
        dr6: v.dr6,
        dr7: v.dr7,
        pat: v.pat,
        xcr0: v.xcr0,
        mxcsr: v.mxcsr,
        x87_fcw: v.x87_fcw,
        sev_features: v.sev_features,
    })
}

/// The VMSA page KVM builds from `state`: EFER.SVME and CR4.MCE set, CR0.CD and CR0.NW cleared, CPL from SS,
/// descriptor tables without selector and attributes, RFLAGS bit 1 and SEV_FEATURES bit 0 set.
#[must_use]
pub fn vmsa_page(state: &VcpuState) -> Box<[u8; VMSA_SIZE]> {
    let s = state;
    let mut v = RawVmsa::new_zeroed();
    (v.es, v.cs, v.ss) = (RawSegment::new(&s.es), RawSegment::new(&s.cs), RawSegment::new(&s.ss));
    (v.ds, v.fs, v.gs) = (RawSegment::new(&s.ds), RawSegment::new(&s.fs), RawSegment::new(&s.gs));
    (v.ldtr, v.tr) = (RawSegment::new(&s.ldtr), RawSegment::new(&s.tr));
    (v.gdtr, v.idtr) = (RawSegment::table(&s.gdtr), RawSegment::table(&s.idtr));
    v.cpl = u8::try_from(s.ss.attrib >> 5 & 3).unwrap_or(0);
    v.efer = s.efer | EFER_SVME;
    v.cr0 = s.cr0 & !CR0_NW_CD;
    (v.cr3, v.cr4) = (s.cr3, s.cr4 | CR4_MCE);
    (v.dr6, v.dr7) = (s.dr6, s.dr7);
    (v.rflags, v.rip) = (s.rflags | RFLAGS_FIXED, s.rip);
    (v.rax, v.rbx, v.rcx, v.rdx) = (s.rax, s.rbx, s.rcx, s.rdx);
    (v.rsi, v.rdi, v.rbp, v.rsp) = (s.rsi, s.rdi, s.rbp, s.rsp);
    (v.r8, v.r9, v.r10, v.r11) = (s.r8, s.r9, s.r10, s.r11);
    (v.r12, v.r13, v.r14, v.r15) = (s.r12, s.r13, s.r14, s.r15);
    (v.pat, v.xcr0) = (s.pat, s.xcr0);
    (v.mxcsr, v.x87_fcw) = (s.mxcsr, s.x87_fcw);
    v.sev_features = s.sev_features | SEV_FEATURE_SNP;
    Box::new(zerocopy::transmute!(v))
}

/// Checks that KVM, told the registers in `vmsa`, builds the same page again, and returns those registers.
///
/// # Errors
/// [`VmsaError`] naming the first field that KVM would write differently or would refuse to be told.
pub fn kvm_reproducible(vmsa: &[u8]) -> Result<VcpuState, VmsaError> {
    let state = state_of(vmsa)?;
    check_acceptable(&state)?;
    let rebuilt = vmsa_page(&state);
    let Some(at) = vmsa.iter().zip(rebuilt.iter()).position(|(a, b)| a != b) else {
        return Ok(state);
    };
    let (field, offset) = FIELDS
        .iter()
        .rev()
        .find(|(_, start)| *start <= at)
        .copied()
        .unwrap_or(("padding", at));
    let (image, kvm) = (
        vmsa.get(at).copied().unwrap_or(0),
        rebuilt.get(at).copied().unwrap_or(0),
    );
    Err(VmsaError::NotReproducible {
        field,
        offset,
        reason: format!(
            "byte {at:#x} is {image:#04x} in the image but KVM builds {kvm:#04x}; {}",
            remedy(field)
        ),
    })
}

fn remedy(field: &str) -> &'static str {
    match field {
        "efer" => "set EFER.SVME (0x1000)",
        "cr4" => "set CR4.MCE (0x40)",
        "cr0" => "clear CR0.CD and CR0.NW",
        "cpl" => "make it the DPL of SS",
        "gdtr" | "idtr" => "clear selector and attributes",
        "rflags" => "set bit 1",
        "sev_features" => "set bit 0 (SNP active)",
        "es" | "cs" | "ss" | "ds" | "fs" | "gs" | "ldtr" | "tr" => "clear attribute bits 15..12",
        _ => "leave the field zero",
    }
}

/// States that `KVM_SET_SREGS` and its kin, or the launch finish, refuse.
fn check_acceptable(s: &VcpuState) -> Result<(), VmsaError> {
    let refuse = |field, offset, reason: String| Err(VmsaError::NotReproducible { field, offset, reason });
    if s.dr7 != DR7_RESET {
        return refuse(
            "dr7",
            offset_of!(RawVmsa, dr7),
            format!("{:#x}; KVM finishes a launch only with {DR7_RESET:#x}", s.dr7),
        );
    }
    if s.dr6 >> 32 != 0 {
        return refuse(
            "dr6",
            offset_of!(RawVmsa, dr6),
            format!("{:#x}; the upper half must be zero", s.dr6),
        );
    }
    let efer_at = offset_of!(RawVmsa, efer);
    if s.efer & EFER_LME != 0 && s.cr0 & CR0_PG != 0 {
        if s.efer & EFER_LMA == 0 {
            return refuse("efer", efer_at, format!("{:#x}: LME with paging on needs LMA", s.efer));
        }
        if s.cr4 & CR4_PAE == 0 {
            return refuse(
                "cr4",
                offset_of!(RawVmsa, cr4),
                format!("{:#x}: long mode needs PAE", s.cr4),
            );
        }
    } else if s.efer & EFER_LMA != 0 {
        return refuse("efer", efer_at, format!("{:#x}: LMA without LME and paging", s.efer));
    } else if s.cs.attrib & 0x200 != 0 {
        return refuse(
            "cs",
            offset_of!(RawVmsa, cs),
            format!("attributes {:#x}: a 64-bit code segment outside long mode", s.cs.attrib),
        );
    }
    if s.cr0 & CR0_PG != 0 && s.cr0 & CR0_PE == 0 {
        return refuse(
            "cr0",
            offset_of!(RawVmsa, cr0),
            format!("{:#x}: paging without protection", s.cr0),
        );
    }
    if s.xcr0 & 1 == 0 {
        return refuse(
            "xcr0",
            offset_of!(RawVmsa, xcr0),
            format!("{:#x}; bit 0 (x87) must be set", s.xcr0),
        );
    }
    if s.mxcsr & 0xFFFF_0000 != 0 {
        return refuse(
            "mxcsr",
            offset_of!(RawVmsa, mxcsr),
            format!("{:#x}; bits 31..16 are reserved", s.mxcsr),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_mode() -> VcpuState {
        let data = Segment {
            selector: 0x18,
            attrib: 0xC93,
            limit: u32::MAX,
            base: 0,
        };
        VcpuState {
            rip: 0x10_0000,
            rsp: 0x9000,
            rdx: 0xA0_0F11,
            rflags: 2,
            cs: Segment {
                selector: 0x10,
                attrib: 0xA9B,
                ..data
            },
            ds: data,
            es: data,
            ss: data,
            fs: data,
            gs: data,
            gdtr: Segment {
                limit: 0xFFFF,
                ..Default::default()
            },
            idtr: Segment {
                limit: 0xFFFF,
                ..Default::default()
            },
            ldtr: Segment {
                attrib: 0x82,
                limit: 0xFFFF,
                ..Default::default()
            },
            tr: Segment {
                attrib: 0x8B,
                limit: 0xFFFF,
                ..Default::default()
            },
            efer: 0x1D00,
            cr0: 0x8000_0031,
            cr3: 0x8_0000_0000_2000,
            cr4: 0x60,
            dr6: 0xFFFF_0FF0,
            dr7: 0x400,
            pat: 0x0007_0406_0007_0406,
            xcr0: 1,
            mxcsr: 0x1F80,
            x87_fcw: 0x37F,
            sev_features: 1,
            ..Default::default()
        }
    }

    #[test]
    fn a_page_kvm_builds_reads_back_as_the_same_state() {
        let state = long_mode();
        assert_eq!(kvm_reproducible(vmsa_page(&state).as_slice()).unwrap(), state);
    }

    #[test]
    fn offsets_agree_with_the_igvm_crate() {
        use zerocopy::FromBytes as _;
        let mut state = long_mode();
        (state.r15, state.rbp, state.gs.base) = (15, 0xB9, 0x6500);
        let page = vmsa_page(&state);
        let v = igvm::snp_defs::SevVmsa::read_from_bytes(page.as_slice()).unwrap();
        assert_eq!(
            (v.rip, v.rsp, v.rdx, v.r15, v.rbp),
            (0x10_0000, 0x9000, 0xA0_0F11, 15, 0xB9)
        );
        assert_eq!(
            (v.cr0, v.cr3, v.cr4, v.efer),
            (state.cr0, state.cr3, state.cr4, state.efer)
        );
        assert_eq!(
            (v.dr6, v.dr7, v.pat, v.xcr0),
            (state.dr6, state.dr7, state.pat, state.xcr0)
        );
        assert_eq!((v.mxcsr, v.x87_fcw, u64::from(v.sev_features)), (0x1F80, 0x37F, 1));
        assert_eq!(
            (v.cs.attrib, v.tr.attrib, v.idtr.limit, v.gs.base),
            (0xA9B, 0x8B, 0xFFFF, 0x6500)
        );
    }

    #[test]
    fn kvm_fixes_what_it_fixes() {
        let mut state = long_mode();
        state.efer = 0;
        state.cr0 = 0x6000_0010;
        state.cr4 = 0;
        state.cs.attrib = 0x9B;
        state.sev_features = 0;
        state.gdtr = Segment {
            selector: 7,
            attrib: 9,
            limit: 0xFF,
            base: 0x1000,
        };
        let rebuilt = state_of(vmsa_page(&state).as_slice()).unwrap();
        assert_eq!(
            (rebuilt.efer, rebuilt.cr0, rebuilt.cr4, rebuilt.sev_features),
            (0x1000, 0x10, 0x40, 1)
        );
        assert_eq!(
            rebuilt.gdtr,
            Segment {
                selector: 0,
                attrib: 0,
                limit: 0xFF,
                base: 0x1000
            }
        );
    }

    #[test]
    fn what_kvm_cannot_rebuild_is_named() {
        let good = vmsa_page(&long_mode());
        let cases: [(&str, usize, u8); 12] = [
            ("efer", 0xD1, 0x0D),
            ("cr4", 0x148, 0x20),
            ("cpl", 0xCB, 3),
            ("vmpl", 0xCA, 1),
            ("gdtr", 0x60, 8),
            ("dr7", 0x160, 1),
            ("cr2", 0x240, 1),
            ("spec_ctrl", 0x2E0, 1),
            ("syscall_msrs", 0x200, 1),
            ("virtual_tom", 0x3C8, 1),
            ("xmm_registers", 0x470, 1),
            ("sev_features", 0x3B0, 0),
        ];
        for (field, at, value) in cases {
            let mut page = good.clone();
            page[at] = value;
            match kvm_reproducible(page.as_slice()) {
                Err(VmsaError::NotReproducible { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        assert_eq!(kvm_reproducible(&[0; 12]), Err(VmsaError::Size(12)));
    }
}
