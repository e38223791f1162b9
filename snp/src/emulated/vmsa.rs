//! The VMSA page as KVM builds it at the finish of a launch (`sev_es_sync_vmsa`), from a live vCPU's registers.
//! Layout: AMD APM volume 2, table B-4. On purpose not shared with `podvisor_firmware::vmsa`, on which predictions stand:
//! the digest of the emulation is a second opinion.

use podvisor_firmware::plan::{Segment, VcpuState};

use crate::digest::{PAGE_LEN, Page};

/// EFER.SVME: KVM sets it in every SNP guest's VMSA.
pub(super) const EFER_SVME: u64 = 1 << 12;
/// CR4.MCE: the host's, ORed into the guest's VMSA.
pub(super) const CR4_MCE: u64 = 1 << 6;
/// CR0.CD and CR0.NW: cleared by KVM (`KVM_X86_QUIRK_CD_NW_CLEARED`).
pub(super) const CR0_CD_NW: u64 = 1 << 30 | 1 << 29;
/// SEV_FEATURES bit 0: SNP active.
pub(super) const SEV_FEATURE_SNP: u64 = 1;
/// The only DR7 that KVM seals.
pub(super) const DR7_FIXED: u64 = 0x400;

/// What KVM makes of `state`: bits it adds and drops, descriptor-table registers without selector and attributes.
#[must_use]
pub(super) fn as_kvm_builds(state: &VcpuState) -> VcpuState {
    let table = |from: Segment| Segment {
        selector: 0,
        attrib: 0,
        ..from
    };
    VcpuState {
        efer: state.efer | EFER_SVME,
        cr0: state.cr0 & !CR0_CD_NW,
        cr4: state.cr4 | CR4_MCE,
        gdtr: table(state.gdtr),
        idtr: table(state.idtr),
        sev_features: state.sev_features | SEV_FEATURE_SNP,
        ..state.clone()
    }
}

/// The VMSA page that holds `state`; every field that [`VcpuState`] has no name for is zero. The VMPL is 0 and the CPL
/// is the stack segment's DPL.
#[must_use]
pub(super) fn page(state: &VcpuState) -> Page {
    let mut page = [0; PAGE_LEN];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(to) = page.get_mut(offset..offset + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    let segments = [
        state.es, state.cs, state.ss, state.ds, state.fs, state.gs, state.gdtr, state.ldtr, state.idtr, state.tr,
    ];
    for (index, segment) in segments.iter().enumerate() {
        put(index * 16, &segment.selector.to_le_bytes());
        put(index * 16 + 2, &segment.attrib.to_le_bytes());
        put(index * 16 + 4, &segment.limit.to_le_bytes());
        put(index * 16 + 8, &segment.base.to_le_bytes());
    }
    let cpl = state.ss.attrib.to_le_bytes().first().map_or(0, |low| low >> 5 & 3);
    put(0xCB, &[cpl]);
    let words = [
        (0x0D0, state.efer),
        (0x148, state.cr4),
        (0x150, state.cr3),
        (0x158, state.cr0),
        (0x160, state.dr7),
        (0x168, state.dr6),
        (0x170, state.rflags),
        (0x178, state.rip),
        (0x1D8, state.rsp),
        (0x1F8, state.rax),
        (0x268, state.pat),
        (0x308, state.rcx),
        (0x310, state.rdx),
        (0x318, state.rbx),
        (0x328, state.rbp),
        (0x330, state.rsi),
        (0x338, state.rdi),
        (0x340, state.r8),
        (0x348, state.r9),
        (0x350, state.r10),
        (0x358, state.r11),
        (0x360, state.r12),
        (0x368, state.r13),
        (0x370, state.r14),
        (0x378, state.r15),
        (0x3B0, state.sev_features),
        (0x3E8, state.xcr0),
    ];
    for (offset, value) in words {
        put(offset, &value.to_le_bytes());
    }
    put(0x408, &state.mxcsr.to_le_bytes());
    put(0x410, &state.x87_fcw.to_le_bytes());
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use podvisor_firmware::vmsa::vmsa_page;
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = Segment> {
        (any::<u16>(), 0u16..0x1000, any::<u32>(), any::<u64>()).prop_map(|(selector, attrib, limit, base)| Segment {
            selector,
            attrib,
            limit,
            base,
        })
    }

    proptest! {
        /// The page that predictions stand on, written by other code.
        #[test]
        fn both_writers_of_the_page_agree(
            segments in proptest::array::uniform10(segment()),
            words in proptest::array::uniform32(any::<u64>()),
            mxcsr: u32,
            x87_fcw: u16,
        ) {
            let [es, cs, ss, ds, fs, gs, gdtr, idtr, ldtr, tr] = segments;
            let [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, rip, flags, ..] = words;
            let [.., efer, cr0, cr3, cr4, dr6, dr7, pat, xcr0, sev_features] = words;
            let state = VcpuState {
                rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, rip,
                // KVM sets bit 1 in the register itself.
                rflags: flags | 2,
                es, cs, ss, ds, fs, gs, gdtr, idtr, ldtr, tr, efer, cr0, cr3, cr4, dr6, dr7, pat, xcr0, mxcsr,
                x87_fcw, sev_features,
            };
            prop_assert_eq!(&page(&as_kvm_builds(&state))[..], &vmsa_page(&state)[..]);
        }
    }
}
