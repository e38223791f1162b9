//! What several test modules of this crate share: the plan of the synthetic digest vectors.

use std::borrow::Cow;

use podvisor_firmware::plan::{
    KVM_VMSA_GPA, LaunchPlan, PageKind, Parameter, ParameterArea, ParameterKind, Platform, Segment, Step, VcpuState,
    VpContext,
};

/// Page `s` of the synthetic vectors: byte `i` is `(s + 7 * i) mod 256`.
pub(crate) fn synthetic_page(s: u8) -> Vec<u8> {
    (0..16)
        .flat_map(|_| 0..=u8::MAX)
        .map(|i| s.wrapping_add(i.wrapping_mul(7)))
        .collect()
}

/// The vCPU state of the synthetic vectors.
pub(crate) fn synthetic_state() -> VcpuState {
    let data = Segment {
        selector: 0x18,
        attrib: 0xc93,
        limit: 0xffff_ffff,
        base: 0,
    };
    let limit = |attrib| Segment {
        selector: 0,
        attrib,
        limit: 0xffff,
        base: 0,
    };
    VcpuState {
        cs: Segment {
            selector: 0x10,
            attrib: 0xa9b,
            limit: 0xffff_ffff,
            base: 0,
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        gdtr: limit(0),
        idtr: limit(0),
        ldtr: limit(0x82),
        tr: limit(0x8b),
        efer: 0x1d00,
        cr0: 0x8000_0031,
        cr3: 0x8_0000_0000_2000,
        cr4: 0x60,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        rflags: 2,
        rip: 0x10_0000,
        rsp: 0x9000,
        pat: 0x0007_0406_0007_0406,
        rdx: 0xa0_0f11,
        sev_features: 1,
        xcr0: 1,
        mxcsr: 0x1f80,
        x87_fcw: 0x37f,
        ..VcpuState::default()
    }
}

/// The plan of the synthetic vectors, with a parameter area of `area_len` bytes and the data-less page of `zero` kind.
pub(crate) fn synthetic_plan(area_len: u64, zero: PageKind) -> LaunchPlan<'static> {
    let pages = |gpa, kind, data: Vec<u8>| Step::Pages {
        gpa,
        len: 4096,
        kind,
        data: Cow::Owned(data),
    };
    let mut plan = LaunchPlan::new(Platform::SevSnp);
    plan.policy = Some(0x30000);
    plan.areas.push(ParameterArea {
        len: area_len,
        initial: Cow::Borrowed(&[]),
        parameters: vec![
            Parameter {
                kind: ParameterKind::VpCount,
                offset: 0,
            },
            Parameter {
                kind: ParameterKind::MemoryMap,
                offset: 8,
            },
        ],
    });
    let state = synthetic_state();
    plan.vps.push(VpContext {
        index: 0,
        gpa: KVM_VMSA_GPA,
        vmsa: Cow::Owned(podvisor_firmware::vmsa::vmsa_page(&state).to_vec()),
        state,
    });
    plan.steps = vec![
        pages(0x10_0000, PageKind::Normal, synthetic_page(1)),
        pages(0x10_1000, PageKind::Normal, synthetic_page(2)),
        pages(0x10_2000, zero, Vec::new()),
        pages(0x10_3000, PageKind::Unmeasured, synthetic_page(3)),
        pages(0x10_4000, PageKind::Secrets, Vec::new()),
        pages(0x10_5000, PageKind::Cpuid, Vec::new()),
        Step::Parameters {
            gpa: 0x10_6000,
            area: 0,
        },
        Step::Vcpu { vp: 0 },
    ];
    plan
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
