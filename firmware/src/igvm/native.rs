//! The x64 VP context of the native platform (igvm_defs `IgvmNativeVpContextX64`) to and from [`VcpuState`].
//! Registers the context has no place for start with their reset values; a state that differs there cannot be
//! written as one.

use igvm_defs::IgvmNativeVpContextX64;
use zerocopy::{FromBytes, IntoBytes};

use super::error::Reason;
use crate::plan::{PAGE_SIZE, Segment, VcpuState};

/// IA32_PAT after reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Attributes are type, S, DPL, P in bits 7..0 and AVL, L, D/B, G in bits 15..12; the VMSA packs the latter
/// into 11..8.
fn to_vmsa_attributes(attributes: u16) -> u16 {
    attributes & 0xFF | attributes >> 4 & 0xF00
}

fn from_vmsa_attributes(attributes: u16) -> u16 {
    attributes & 0xFF | (attributes & 0xF00) << 4
}

/// Reads a context from the page of file data that holds it.
pub(super) fn read(data: &[u8]) -> Result<VcpuState, Reason> {
    let (c, rest) = IgvmNativeVpContextX64::read_from_prefix(data).map_err(|_| Reason::Truncated {
        what: "a native x64 VP context",
        needed: size_of::<IgvmNativeVpContextX64>() as u64,
        have: data.len() as u64,
    })?;
    let field = |field, value: u64, rule| Err(Reason::Field { field, value, rule });
    if let Some(byte) = rest.iter().find(|byte| **byte != 0) {
        return field(
            "context padding",
            u64::from(*byte),
            "must be zero up to the end of the page",
        );
    }
    for (name, attributes) in [
        ("code_attributes", c.code_attributes),
        ("data_attributes", c.data_attributes),
    ] {
        if attributes & 0xF00 != 0 {
            return field(name, u64::from(attributes), "bits 11..8 must be zero");
        }
    }
    if let Some(reserved) = c.reserved.iter().find(|value| **value != 0) {
        return field("context reserved", u64::from(*reserved), "must be zero");
    }
    let data = Segment {
        selector: c.data_selector,
        attrib: to_vmsa_attributes(c.data_attributes),
        limit: c.data_limit,
        base: u64::from(c.data_base),
    };
    Ok(VcpuState {
        rax: c.rax,
        rbx: c.rbx,
        rcx: c.rcx,
        rdx: c.rdx,
        rsi: c.rsi,
        rdi: c.rdi,
        rbp: c.rbp,
        rsp: c.rsp,
        r8: c.r8,
        r9: c.r9,
        r10: c.r10,
        r11: c.r11,
        r12: c.r12,
        r13: c.r13,
        r14: c.r14,
        r15: c.r15,
        rip: c.rip,
        rflags: c.rflags,
        cs: Segment {
            selector: c.code_selector,
            attrib: to_vmsa_attributes(c.code_attributes),
            limit: c.code_limit,
            base: u64::from(c.code_base),
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: Segment {
            base: c.gs_base,
            ..data
        },
        gdtr: Segment {
            limit: u32::from(c.gdtr_limit),
            base: c.gdtr_base,
            ..Segment::default()
        },
        idtr: Segment {
            limit: u32::from(c.idtr_limit),
            base: c.idtr_base,
            ..Segment::default()
        },
        efer: c.efer,
        cr0: c.cr0,
        cr3: c.cr3,
        cr4: c.cr4,
        ..VcpuState::reset()
    })
}

/// Writes a context and pads it to a page, as the igvm crate wants it.
///
/// # Errors
/// The name of the first register that the context cannot hold.
pub(super) fn write(state: &VcpuState) -> Result<Vec<u8>, &'static str> {
    let base = |segment: &Segment, name| u32::try_from(segment.base).map_err(|_| name);
    let limit = |segment: &Segment, name| u16::try_from(segment.limit).map_err(|_| name);
    let context = IgvmNativeVpContextX64 {
        rax: state.rax,
        rcx: state.rcx,
        rdx: state.rdx,
        rbx: state.rbx,
        rsp: state.rsp,
        rbp: state.rbp,
        rsi: state.rsi,
        rdi: state.rdi,
        r8: state.r8,
        r9: state.r9,
        r10: state.r10,
        r11: state.r11,
        r12: state.r12,
        r13: state.r13,
        r14: state.r14,
        r15: state.r15,
        rip: state.rip,
        rflags: state.rflags,
        idtr_base: state.idtr.base,
        idtr_limit: limit(&state.idtr, "idtr.limit")?,
        reserved: [0; 2],
        gdtr_limit: limit(&state.gdtr, "gdtr.limit")?,
        gdtr_base: state.gdtr.base,
        code_selector: state.cs.selector,
        code_attributes: from_vmsa_attributes(state.cs.attrib),
        code_base: base(&state.cs, "cs.base")?,
        code_limit: state.cs.limit,
        data_selector: state.ds.selector,
        data_attributes: from_vmsa_attributes(state.ds.attrib),
        data_base: base(&state.ds, "ds.base")?,
        data_limit: state.ds.limit,
        gs_base: state.gs.base,
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer,
    };
    let mut page = context.as_bytes().to_vec();
    page.resize(usize::try_from(PAGE_SIZE).unwrap_or(page.len()), 0);
    let kept = read(&page).map_err(|_| "context")?;
    let differs = [
        ("cs", kept.cs != state.cs),
        ("ds", kept.ds != state.ds),
        ("es", kept.es != state.es),
        ("ss", kept.ss != state.ss),
        ("fs", kept.fs != state.fs),
        ("gs", kept.gs != state.gs),
        ("gdtr", kept.gdtr != state.gdtr),
        ("idtr", kept.idtr != state.idtr),
        ("ldtr", kept.ldtr != state.ldtr),
        ("tr", kept.tr != state.tr),
        ("dr6", kept.dr6 != state.dr6),
        ("dr7", kept.dr7 != state.dr7),
        ("pat", kept.pat != state.pat),
        ("xcr0", kept.xcr0 != state.xcr0),
        ("mxcsr", kept.mxcsr != state.mxcsr),
        ("x87_fcw", kept.x87_fcw != state.x87_fcw),
        ("sev_features", kept.sev_features != state.sev_features),
    ];
    match differs.into_iter().find(|(_, differs)| *differs) {
        Some((name, _)) => Err(name),
        None if kept == *state => Ok(page),
        None => Err("context"),
    }
}

impl VcpuState {
    /// Registers after a reset, as KVM has them, for what neither segments nor control registers say: the start
    /// from which a source of plans fills in its own.
    #[must_use]
    pub fn reset() -> Self {
        Self {
            rflags: 2,
            ldtr: Segment {
                attrib: 0x82,
                limit: 0xFFFF,
                ..Segment::default()
            },
            tr: Segment {
                attrib: 0x8B,
                limit: 0xFFFF,
                ..Segment::default()
            },
            dr6: 0xFFFF_0FF0,
            dr7: 0x400,
            pat: PAT_RESET,
            xcr0: 1,
            mxcsr: 0x1F80,
            x87_fcw: 0x37F,
            ..Self::default()
        }
    }

    /// 32-bit protected mode without paging, flat segments, EBX = `platform`: how the bare-metal programs of podvisor's
    /// images start. Without paging every access of an encrypted guest is to private memory, so that they need no C-bit
    /// before they know where they are.
    #[must_use]
    pub fn protected_mode(entry: u64, platform: u32, snp: bool) -> Self {
        const PROTECTED: u64 = 0x11;
        let code = Segment {
            selector: 0x08,
            attrib: 0xC9B,
            limit: u32::MAX,
            base: 0,
        };
        let data = Segment {
            selector: 0x10,
            attrib: 0xC93,
            ..code
        };
        Self {
            rip: entry,
            rbx: u64::from(platform),
            cr0: PROTECTED,
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            sev_features: u64::from(snp),
            ..Self::reset()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_it_can_hold_comes_back() {
        let data = Segment {
            selector: 0x18,
            attrib: 0xC93,
            limit: u32::MAX,
            base: 0,
        };
        let state = VcpuState {
            rip: 0x10_0000,
            r15: 15,
            cs: Segment {
                selector: 0x10,
                attrib: 0xA9B,
                ..data
            },
            ds: data,
            es: data,
            ss: data,
            fs: data,
            gs: Segment {
                base: 0x7_0000_0000,
                ..data
            },
            gdtr: Segment {
                limit: 0x1F,
                base: 0x500,
                ..Segment::default()
            },
            cr0: 0x8000_0011,
            cr3: 0x9000,
            cr4: 0x20,
            efer: 0x500,
            ..VcpuState::reset()
        };
        let page = write(&state).unwrap();
        assert_eq!(page.len(), 4096);
        let context = IgvmNativeVpContextX64::read_from_prefix(&page).unwrap().0;
        assert_eq!((context.code_attributes, context.data_attributes), (0xA09B, 0xC093));
        assert_eq!(read(&page).unwrap(), state);
    }

    #[test]
    fn a_state_it_cannot_hold_is_refused_by_register() {
        let state = |change: fn(&mut VcpuState)| {
            let mut state = VcpuState::reset();
            change(&mut state);
            write(&state)
        };
        assert_eq!(state(|s| s.fs.base = 1), Err("fs"));
        assert_eq!(state(|s| s.dr7 = 0), Err("dr7"));
        assert_eq!(state(|s| s.sev_features = 1), Err("sev_features"));
        assert_eq!(state(|s| s.gdtr.limit = 0x1_0000), Err("gdtr.limit"));
        assert!(state(|s| s.rax = 1).is_ok());
    }

    #[test]
    fn bad_contexts_are_refused() {
        let page = write(&VcpuState::reset()).unwrap();
        let mut padded = page.clone();
        padded[4095] = 1;
        assert!(matches!(
            read(&padded),
            Err(Reason::Field {
                field: "context padding",
                value: 1,
                ..
            })
        ));
        let mut attributes = page.clone();
        let at = std::mem::offset_of!(IgvmNativeVpContextX64, code_attributes);
        attributes[at + 1] = 1;
        assert!(matches!(
            read(&attributes),
            Err(Reason::Field {
                field: "code_attributes",
                ..
            })
        ));
        assert!(matches!(read(&page[..100]), Err(Reason::Truncated { .. })));
    }
}
