//! Digests against vectors that others computed, and the digest's own properties.

use super::*;
use crate::testing::{hex, synthetic_page, synthetic_plan, synthetic_state};
use podvisor_firmware::plan::{Step, VpContext};

/// The vectors of the synthetic IGVM image; agreed by the igvm crate, igvmmeasure and an independent chain.
#[test]
fn synthetic_vectors() {
    let cases = [
        (
            0x1000,
            PageKind::Normal,
            1,
            "739d79fd54b5a7a9cfb436593f04df7c66c2172f687da1cda43be3f49ba039240316f2feb87e780836383a562016f58e",
        ),
        (
            0x1000,
            PageKind::Zero,
            1,
            "0dbbd1efd2653fa92742c3c6ab2d1f5a17aa026b8c488ccada86d19d381222f472a8f360664bf958f19860b1634aba25",
        ),
        (
            0x1000,
            PageKind::Zero,
            2,
            "428aaa259bc38731d5af711634cfa0fc0704b78a77860d0d71ac1938dca3c4adcdb07d498ceb8449bff43d522044752a",
        ),
        (
            0x2000,
            PageKind::Normal,
            1,
            "30659cc9161e36937fae602f555f0487f0630d7c62c543f5f4526d8f148ba65195fba31b42cb09a453d5d0529861ccd5",
        ),
        (
            0x2000,
            PageKind::Zero,
            1,
            "f9e2a36507be117b1b795f7151698ed3ef477466eccf359992a8ec18499c3784a711aa4813de80fa2f559c7d6f73e29b",
        ),
    ];
    for (area, zero, vcpus, want) in cases {
        let got = predict(&synthetic_plan(area, zero), vcpus).unwrap();
        assert_eq!(hex(&got.digest), want, "area {area:#x}, {zero:?}, {vcpus} vCPUs");
        assert_eq!(got.pages, 6 + area / 4096 + u64::from(vcpus));
        let normal = if zero == PageKind::Normal { 3 } else { 2 };
        assert_eq!(got.measured_bytes, (normal + u64::from(vcpus)) * 4096);
    }
}

#[test]
fn synthetic_vmsa_page() {
    assert_eq!(
        hex(&sha384(&vmsa_page(&synthetic_state())[..])),
        "68a2fbf7a0e1905534b1d66de33afb5513843868d26fb5449a121a0b907e45b8f966e1dc16b6ff5f78ab3c1a17fa3eb8"
    );
}

/// The measured order of OVMF.amdsev.fd after its image pages, from the published digest of those pages.
#[test]
fn ovmf_page_order_from_the_image_digest() {
    let unhex = |text: &str| -> [u8; 48] {
        let bytes: Vec<u8> = (0..48)
            .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        bytes.try_into().unwrap()
    };
    let mut chain = LaunchDigest {
        current: unhex(
            "9d0dd8be18c86e3fe3bf0038ed75ebf5340bee69fd2632c8ff9409964575960ae1f7e84be387d2e3467bc3508d1e4806",
        ),
        pages: 1024,
    };
    let zero = [0; 48];
    let mut range = |kind, start: u64, len: u64| {
        for gpa in (start..start + len).step_by(4096) {
            chain.update(kind, gpa, &zero);
        }
    };
    range(PageKind::Zero, 0x80_0000, 0x9000);
    range(PageKind::Zero, 0x80_a000, 0x3000);
    range(PageKind::Secrets, 0x80_d000, 0x1000);
    range(PageKind::Cpuid, 0x80_e000, 0x1000);
    range(PageKind::Zero, 0x80_f000, 0x1000);
    range(PageKind::Zero, 0x81_1000, 0x1_f000);
    range(PageKind::Zero, 0x81_0000, 0x1000);
    let bsp = unhex("77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a");
    let ap = unhex("8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4");
    let mut got = Vec::new();
    for vcpu in 0..4 {
        chain.chain(TYPE_VMSA, KVM_VMSA_GPA, if vcpu == 0 { &bsp } else { &ap });
        got.push(hex(&chain.clone().finish()));
    }
    assert_eq!(
        got[0],
        "d74bd3ea40b240c3228edc5177ce6193561ebff633dbd0be76d6c143b876d65102425c0e2e8a930857c48daa5eacda58"
    );
    assert_eq!(
        got[1],
        "a3c946257b3cef8f1e25dd03cb84f9f01313ae9135c32acc7e01f4204aa447aaa196530d5999be0f114462d2546cd02d"
    );
    assert_eq!(
        got[3],
        "13a6ae9fbaa31c91ade309c36bd5214729438abac318e01176e02a97b8bec11a4bce86b4d2b1fba2ec0481dd24ff525f"
    );
}

/// QEMU's reset-vector VMSA of an EPYC-v4 (signature 0x800f12), as the published vectors hold it.
fn epyc_v4(rip: u64, cs_base: u64) -> podvisor_firmware::plan::VcpuState {
    use podvisor_firmware::plan::{Segment, VcpuState};
    let segment = |selector, attrib, base| Segment {
        selector,
        attrib,
        limit: 0xffff,
        base,
    };
    let data = segment(0, 0x93, 0);
    VcpuState {
        cs: segment(0xf000, 0x9b, cs_base),
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        gdtr: segment(0, 0, 0),
        idtr: segment(0, 0, 0),
        ldtr: segment(0, 0x82, 0),
        tr: segment(0, 0x8b, 0),
        cr0: 0x6000_0010,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        rflags: 2,
        rip,
        pat: 0x0007_0406_0007_0406,
        rdx: 0x80_0f12,
        xcr0: 1,
        mxcsr: 0x1f80,
        x87_fcw: 0x37f,
        ..VcpuState::default()
    }
}

#[test]
fn kvm_builds_the_published_vmsa_pages() {
    let built = |rip, base| hex(&sha384(&vmsa_page(&epyc_v4(rip, base))[..]));
    assert_eq!(
        built(0xfff0, 0xffff_0000),
        "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a"
    );
    assert_eq!(
        built(0xb004, 0x80_0000),
        "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"
    );
}

#[test]
fn a_step_split_in_two_measures_the_same() {
    let mut plan = synthetic_plan(0x1000, PageKind::Normal);
    let whole = predict(&plan, 1).unwrap();
    let mut data = synthetic_page(1);
    data.extend(synthetic_page(2));
    plan.steps.splice(
        0..2,
        [Step::Pages {
            gpa: 0x10_0000,
            len: 0x2000,
            kind: PageKind::Normal,
            data: Cow::Owned(data),
        }],
    );
    assert_eq!(predict(&plan, 1).unwrap(), whole);
}

#[test]
fn order_and_address_matter_and_shared_pages_do_not() {
    let mut plan = synthetic_plan(0x1000, PageKind::Normal);
    let want = predict(&plan, 1).unwrap();
    plan.steps.push(Step::Pages {
        gpa: 0x20_0000,
        len: 0x4000,
        kind: PageKind::Shared,
        data: Cow::Owned(vec![1, 2, 3]),
    });
    assert_eq!(predict(&plan, 1).unwrap(), want);
    plan.steps.swap(0, 1);
    assert_ne!(predict(&plan, 1).unwrap().digest, want.digest);
}

#[test]
fn short_data_is_padded_with_zeros() {
    let step = |data: Vec<u8>| {
        let mut plan = synthetic_plan(0x1000, PageKind::Normal);
        plan.steps[0] = Step::Pages {
            gpa: 0x10_0000,
            len: 0x3000,
            kind: PageKind::Normal,
            data: Cow::Owned(data),
        };
        predict(&plan, 1).unwrap()
    };
    let mut padded = vec![7; 5000];
    let short = step(padded.clone());
    padded.resize(0x3000, 0);
    assert_eq!(short, step(padded));
}

#[test]
fn each_vcpu_is_measured_with_its_own_context() {
    let mut plan = synthetic_plan(0x1000, PageKind::Normal);
    let same = predict(&plan, 2).unwrap();
    let mut second = plan.vps[0].clone();
    second.index = 1;
    second.state.rip = 0x1234;
    plan.vps.push(VpContext { ..second });
    assert_ne!(predict(&plan, 2).unwrap().digest, same.digest);
    assert_eq!(
        predict(&plan, 1).unwrap(),
        predict(&synthetic_plan(0x1000, PageKind::Normal), 1).unwrap()
    );
}

#[test]
fn plans_that_cannot_be_launched_are_refused() {
    let pages = |gpa, len, data: Vec<u8>| Step::Pages {
        gpa,
        len,
        kind: PageKind::Unmeasured,
        data: Cow::Owned(data),
    };
    let base = synthetic_plan(0x1000, PageKind::Normal);
    let with = |step| {
        let mut plan = base.clone();
        plan.steps.push(step);
        predict(&plan, 1).unwrap_err()
    };
    assert!(matches!(
        with(pages(1, 4096, vec![])),
        PredictError::Range { step: 8, .. }
    ));
    assert!(matches!(with(pages(0, 4095, vec![])), PredictError::Range { .. }));
    assert!(matches!(
        with(pages(0, 4096, vec![0; 4097])),
        PredictError::Range { .. }
    ));
    assert!(matches!(with(pages(!0xfff, 8192, vec![])), PredictError::Range { .. }));
    assert_eq!(with(pages(0, 1 << 60, vec![])), PredictError::TooManyPages);
    assert!(matches!(
        with(Step::Parameters { gpa: 0, area: 1 }),
        PredictError::Reference { index: 1, .. }
    ));
    assert!(matches!(
        with(Step::Vcpu { vp: 9 }),
        PredictError::Reference { index: 9, .. }
    ));
    assert_eq!(predict(&base, 0), Err(PredictError::Vcpus(0)));
    assert_eq!(predict(&base, 65537), Err(PredictError::Vcpus(65537)));
    let mut native = base.clone();
    native.platform = Platform::Native;
    assert_eq!(predict(&native, 1), Err(PredictError::Platform(Platform::Native)));
    let mut none = base;
    none.vps.clear();
    none.steps.pop();
    assert_eq!(predict(&none, 1), Err(PredictError::NoContext));
}
