//! OVMF (a firmware volume with SEV metadata, `OVMF.amdsev.fd`) as a launch plan for SEV-SNP: the volume below 4 GiB, the
//! sections that its metadata names, and the reset state of each vCPU as the hypervisor that will run it has it. The table
//! of hashes by which such firmware pins kernel, initrd and command line is laid out here; hashing is the caller's.
//! Source: edk2 OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm and Ia16/ResetVectorVtf0.asm; QEMU target/i386/sev.c.

use std::borrow::Cow;

use crate::plan::{KVM_VMSA_GPA, LaunchPlan, PAGE_SIZE, PageKind, Platform, Segment, Step, VcpuState, VpContext};
use crate::vmsa::vmsa_page;

const FOUR_GIB: u64 = 1 << 32;
/// [`PAGE_SIZE`], as lengths in the file and of sections have it.
const PAGE: u32 = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);
/// The reset vector's page segment ends here; the table of GUIDed entries ends 32 bytes before the end of the volume.
const TABLE_END: usize = 32;
/// A table entry ends with its length (u16, all of it) and its GUID.
const ENTRY_TAIL: usize = 18;
/// Where a processor starts after reset.
const RESET_VECTOR: u32 = 0xFFFF_FFF0;
/// Most metadata sections; OVMF has seven.
const MAX_SECTIONS: u32 = 64;
/// Most bytes of a section: the largest that OVMF has is 124 KiB.
const MAX_SECTION: u32 = 16 << 20;

/// A GUID in its in-memory form: the first three fields little-endian (UEFI 2.10, appendix A).
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7],
    ]
}

const TABLE_FOOTER: [u8; 16] = guid(
    0x96b5_82de,
    0x1fb2,
    0x45f7,
    [0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d],
);
const SEV_METADATA: [u8; 16] = guid(
    0xdc88_6566,
    0x984a,
    0x4798,
    [0xa7, 0x5e, 0x55, 0x85, 0xa7, 0xbf, 0x67, 0xcc],
);
const ES_RESET_BLOCK: [u8; 16] = guid(
    0x00f7_71de,
    0x1a7e,
    0x4fcb,
    [0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e],
);
const HASH_TABLE_AREA: [u8; 16] = guid(
    0x7255_371f,
    0x3a3b,
    0x4b04,
    [0x92, 0x7b, 0x1d, 0xa6, 0xef, 0xa8, 0xd4, 0x54],
);
const HASH_TABLE: [u8; 16] = guid(
    0x9438_d606,
    0x4f22,
    0x4cc9,
    [0xb4, 0x79, 0xa7, 0x93, 0xd4, 0x11, 0xfd, 0x21],
);
const HASH_KERNEL: [u8; 16] = guid(
    0x4de7_9437,
    0xabd2,
    0x427f,
    [0xb8, 0x35, 0xd5, 0xb1, 0x72, 0xd2, 0x04, 0x5b],
);
const HASH_INITRD: [u8; 16] = guid(
    0x44ba_f731,
    0x3a2f,
    0x4bd7,
    [0x9a, 0xf1, 0x41, 0xe2, 0x91, 0x69, 0x78, 0x1d],
);
const HASH_CMDLINE: [u8; 16] = guid(
    0x97d0_2dd8,
    0xbd20,
    0x4c94,
    [0xaa, 0x78, 0xe7, 0x71, 0x4d, 0x36, 0xab, 0x2a],
);

/// The hypervisor whose initial registers are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hypervisor {
    /// QEMU on KVM, and podvisor.
    #[default]
    Qemu,
    /// Amazon EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

/// SHA-256 digests of what the firmware is to boot (QEMU `-kernel` with `kernel-hashes=on`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootHashes {
    /// Of the kernel file.
    pub kernel: [u8; 32],
    /// Of the initrd file; of nothing when there is none.
    pub initrd: [u8; 32],
    /// Of the command line with its NUL; of the NUL alone when there is none.
    pub command_line: [u8; 32],
}

/// What the plan is made for.
#[derive(Clone, Copy, Debug, Default)]
pub struct OvmfOptions {
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    /// vCPUs: each adds its registers.
    pub vcpus: u16,
    /// CPUID Fn0000_0001 EAX of the vCPUs, which QEMU leaves in RDX.
    pub signature: u32,
    /// SEV_FEATURES of the vCPUs.
    pub sev_features: u64,
    /// What is booted directly, if anything.
    pub hashes: Option<BootHashes>,
}

/// Why a file is no OVMF that can be launched under SEV-SNP.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum OvmfError {
    /// Its size.
    #[error("a firmware volume of {0} bytes: it must be whole pages, at least one, below 1 GiB")]
    Size(usize),
    /// The table of GUIDed entries before the reset vector.
    #[error("no OVMF: {0}")]
    Table(&'static str),
    /// The SEV metadata.
    #[error("SEV metadata: {0}")]
    Metadata(&'static str),
    /// A section of the metadata.
    #[error("SEV metadata section {index} ({base:#x}+{len:#x}, type {kind:#x}): {rule}")]
    Section {
        /// Which.
        index: u32,
        /// First byte.
        base: u32,
        /// Length.
        len: u32,
        /// Type.
        kind: u32,
        /// What it breaks.
        rule: &'static str,
    },
    /// A kernel was given, and the firmware has no place for its hash.
    #[error("the firmware has no table of kernel hashes (built without it): leave kernel, initrd and cmdline out")]
    NoHashTable,
}

/// CPUID Fn0000_0001 EAX of a model of QEMU's, by its name with or without a version (target/i386/cpu.c).
#[must_use]
pub fn cpu_signature(name: &str) -> Option<u32> {
    let (family, model, stepping) = match name {
        "EPYC" | "EPYC-v1" | "EPYC-v2" | "EPYC-v3" | "EPYC-v4" | "EPYC-IBPB" => (23, 1, 2),
        "EPYC-Rome" | "EPYC-Rome-v1" | "EPYC-Rome-v2" | "EPYC-Rome-v3" | "EPYC-Rome-v4" => (23, 49, 0),
        "EPYC-Milan" | "EPYC-Milan-v1" | "EPYC-Milan-v2" => (25, 1, 1),
        "EPYC-Genoa" | "EPYC-Genoa-v1" | "EPYC-Genoa-v2" => (25, 17, 0),
        "EPYC-Turin" | "EPYC-Turin-v1" => (26, 0, 0),
        _ => return None,
    };
    Some(signature(family, model, stepping))
}

/// CPUID Fn0000_0001 EAX of a family from 15 on (AMD APM vol. 3, E.3.2).
const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    (family - 15) << 20 | (model >> 4) << 16 | 15 << 8 | (model & 15) << 4 | stepping
}

/// Whether `file` ends as OVMF does.
#[must_use]
pub fn is_ovmf(file: &[u8]) -> bool {
    Table::of(file).is_ok()
}

/// Plans the launch of `file`.
///
/// # Errors
/// [`OvmfError`].
pub fn plan<'a>(file: &'a [u8], options: &OvmfOptions) -> Result<LaunchPlan<'a>, OvmfError> {
    let size = file.len() as u64;
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size >= 1 << 30 {
        return Err(OvmfError::Size(file.len()));
    }
    let table = Table::of(file)?;
    let reset = table.word(&ES_RESET_BLOCK).ok_or(OvmfError::Table(
        "the entry with the start address of secondary processors is missing",
    ))?;
    let mut plan = volume(file);
    let sections = sections(file, &table)?;
    let hashes = options.hashes.map(|hashes| hash_page(&table, &hashes)).transpose()?;
    if hashes.is_some() && !sections.iter().any(|section| section.kind == KERNEL_HASHES) {
        return Err(OvmfError::NoHashTable);
    }
    // EC2 puts the CPUID page after all other sections.
    let cpuid_last = options.hypervisor == Hypervisor::Ec2;
    let first = sections.iter().filter(|section| !cpuid_last || section.kind != CPUID);
    let last = sections.iter().filter(|section| cpuid_last && section.kind == CPUID);
    for section in first.chain(last) {
        plan.steps.push(section.step(options.hypervisor, hashes.as_deref()));
    }
    for index in 0..options.vcpus {
        let entry = if index == 0 { RESET_VECTOR } else { reset };
        let state = reset_state(entry, options);
        plan.steps.push(Step::Vcpu { vp: usize::from(index) });
        plan.vps.push(VpContext {
            index,
            gpa: KVM_VMSA_GPA,
            vmsa: Cow::Owned(vmsa_page(&state).to_vec()),
            state,
        });
    }
    Ok(plan)
}

/// The part of [`plan`] that is the volume alone: its digest is what sev-snp-measure calls the OVMF hash, from which others
/// go on with metadata and registers.
#[must_use]
pub fn volume(file: &[u8]) -> LaunchPlan<'_> {
    let size = file.len() as u64;
    let mut plan = LaunchPlan::new(Platform::SevSnp);
    plan.steps.push(Step::Pages {
        gpa: FOUR_GIB.saturating_sub(size),
        len: size,
        kind: PageKind::Normal,
        data: Cow::Borrowed(file),
    });
    plan
}

/// The GUIDed entries, from the last to the first.
#[derive(Clone, Copy)]
struct Table<'a>(&'a [u8]);

impl<'a> Table<'a> {
    fn of(file: &'a [u8]) -> Result<Self, OvmfError> {
        let end = file.len().checked_sub(TABLE_END);
        let body = end.and_then(|end| file.get(..end)).unwrap_or_default();
        let (len, _, before) = tail(body)
            .filter(|(_, guid, _)| *guid == TABLE_FOOTER)
            .ok_or(OvmfError::Table(
                "the table of GUIDed entries before the reset vector is missing",
            ))?;
        let start = usize::from(len)
            .checked_sub(ENTRY_TAIL)
            .and_then(|len| before.len().checked_sub(len))
            .ok_or(OvmfError::Table("its table of entries is longer than the file"))?;
        Ok(Self(before.get(start..).unwrap_or_default()))
    }

    /// The data of the entry `wanted`; none if it is not there, or the table breaks off before it.
    fn entry(self, wanted: &[u8; 16]) -> Option<&'a [u8]> {
        let mut rest = self.0;
        loop {
            let (len, guid, before) = tail(rest)?;
            let start = rest.len().checked_sub(usize::from(len))?;
            let data = before.get(start..)?;
            if guid == *wanted {
                return Some(data);
            }
            rest = rest.get(..start)?;
        }
    }

    fn word(self, wanted: &[u8; 16]) -> Option<u32> {
        word(self.entry(wanted)?, 0)
    }
}

/// Length and GUID at the end of `bytes`, and what is before them.
fn tail(bytes: &[u8]) -> Option<(u16, [u8; 16], &[u8])> {
    let (before, tail) = bytes.split_at_checked(bytes.len().checked_sub(ENTRY_TAIL)?)?;
    let (len, guid) = tail.split_at_checked(2)?;
    let len = u16::from_le_bytes(len.try_into().ok()?);
    // An entry holds itself.
    (usize::from(len) >= ENTRY_TAIL).then_some((len, guid.try_into().ok()?, before))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

const SEC_MEM: u32 = 1;
const SECRETS: u32 = 2;
const CPUID: u32 = 3;
const SVSM_CAA: u32 = 4;
const KERNEL_HASHES: u32 = 0x10;

/// A range that the metadata has the hypervisor put into memory.
#[derive(Clone, Copy)]
struct Section {
    base: u32,
    len: u32,
    kind: u32,
}

impl Section {
    fn step<'a>(self, hypervisor: Hypervisor, hashes: Option<&[u8]>) -> Step<'a> {
        let (kind, data) = match self.kind {
            SEC_MEM if hypervisor == Hypervisor::Gce => (PageKind::Unmeasured, &[][..]),
            SECRETS => (PageKind::Secrets, &[][..]),
            CPUID => (PageKind::Cpuid, &[][..]),
            KERNEL_HASHES => match hashes {
                Some(page) => (PageKind::Normal, page),
                None => (PageKind::Zero, &[][..]),
            },
            _ => (PageKind::Zero, &[][..]),
        };
        Step::Pages {
            gpa: u64::from(self.base),
            len: u64::from(self.len),
            kind,
            data: Cow::Owned(data.to_vec()),
        }
    }
}

fn sections(file: &[u8], table: &Table<'_>) -> Result<Vec<Section>, OvmfError> {
    let from_end = table.word(&SEV_METADATA).ok_or(OvmfError::Metadata(
        "missing: this OVMF was not built for SEV-SNP (OvmfPkg/AmdSev or a newer OvmfPkgX64)",
    ))?;
    let header = usize::try_from(from_end)
        .ok()
        .and_then(|offset| file.len().checked_sub(offset))
        .and_then(|start| file.get(start..))
        .ok_or(OvmfError::Metadata("lies outside of the file"))?;
    if header.get(..4) != Some(b"ASEV") {
        return Err(OvmfError::Metadata("has not the signature ASEV"));
    }
    if word(header, 8) != Some(1) {
        return Err(OvmfError::Metadata("has a version other than 1"));
    }
    let count = word(header, 12).filter(|count| *count <= MAX_SECTIONS);
    let count = count.ok_or(OvmfError::Metadata("has more than 64 sections"))?;
    let mut sections = Vec::new();
    for index in 0..count {
        let at = 16 + index as usize * 12;
        let field = |offset| word(header, at + offset).ok_or(OvmfError::Metadata("breaks off inside its sections"));
        let (base, len, kind) = (field(0)?, field(4)?, field(8)?);
        let refuse = |rule| OvmfError::Section {
            index,
            base,
            len,
            kind,
            rule,
        };
        if ![SEC_MEM, SECRETS, CPUID, SVSM_CAA, KERNEL_HASHES].contains(&kind) {
            return Err(refuse("an unknown type"));
        }
        if !base.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || len == 0 || len > MAX_SECTION {
            return Err(refuse("must be whole pages, at least one, at most 16 MiB"));
        }
        if kind != SEC_MEM && kind != SVSM_CAA && len != PAGE {
            return Err(refuse("must be one page"));
        }
        if u64::from(base) + u64::from(len) > FOUR_GIB - file.len() as u64 {
            return Err(refuse("must lie below the firmware volume"));
        }
        sections.push(Section { base, len, kind });
    }
    Ok(sections)
}

/// The page that holds the table of hashes, where the firmware looks for it (QEMU `PaddedSevHashTable`).
fn hash_page(table: &Table<'_>, hashes: &BootHashes) -> Result<Vec<u8>, OvmfError> {
    let area = table.word(&HASH_TABLE_AREA).filter(|area| *area != 0);
    let offset = (area.ok_or(OvmfError::NoHashTable)? % PAGE) as usize;
    let entries = [
        (HASH_CMDLINE, hashes.command_line),
        (HASH_INITRD, hashes.initrd),
        (HASH_KERNEL, hashes.kernel),
    ];
    const ENTRY: u16 = 16 + 2 + 32;
    let mut page = vec![0; offset];
    page.extend_from_slice(&HASH_TABLE);
    page.extend_from_slice(&(16 + 2 + 3 * ENTRY).to_le_bytes());
    for (guid, hash) in entries {
        page.extend_from_slice(&guid);
        page.extend_from_slice(&ENTRY.to_le_bytes());
        page.extend_from_slice(&hash);
    }
    if page.len() > PAGE as usize {
        return Err(OvmfError::Table("its table of kernel hashes crosses a page"));
    }
    page.resize(PAGE as usize, 0);
    Ok(page)
}

/// Real mode at `entry`, as the hypervisor leaves a vCPU after reset.
fn reset_state(entry: u32, options: &OvmfOptions) -> VcpuState {
    let ec2 = options.hypervisor == Hypervisor::Ec2;
    let qemu = options.hypervisor == Hypervisor::Qemu;
    let segment = |attrib| Segment {
        selector: 0,
        attrib,
        limit: 0xFFFF,
        base: 0,
    };
    let data = segment(0x93);
    VcpuState {
        rip: u64::from(entry & 0xFFFF),
        cs: Segment {
            selector: 0xF000,
            base: u64::from(entry & 0xFFFF_0000),
            ..segment(if ec2 && entry == RESET_VECTOR { 0x9A } else { 0x9B })
        },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: segment(if ec2 { 0x92 } else { 0x93 }),
        gdtr: segment(0),
        idtr: segment(0),
        ldtr: segment(0x82),
        tr: segment(if ec2 { 0x83 } else { 0x8B }),
        cr0: 0x10,
        rdx: if qemu { u64::from(options.signature) } else { 0x600 },
        pat: if options.hypervisor == Hypervisor::Gce {
            0x0007_0106
        } else {
            0x0007_0406_0007_0406
        },
        mxcsr: if qemu { 0x1F80 } else { 0 },
        x87_fcw: if qemu { 0x37F } else { 0 },
        sev_features: options.sev_features,
        ..VcpuState::reset()
    }
}

#[cfg(test)]
mod tests;
