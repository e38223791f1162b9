//! Images with stage0, put together by hand: what the image builder makes is tested elsewhere, and a test wants to lie.

use std::borrow::Cow;

use podvisor_firmware::acpi::{AcpiMachine, AcpiTables};
use podvisor_firmware::igvm::{BuildOptions, build};
use podvisor_firmware::plan::{
    GpaRange, LaunchPlan, PAGE_SIZE, PageKind, ParameterKind, Platform, Segment, Step, VcpuState,
};
use podvisor_firmware::stage0::abi::{self, Fixup, Manifest, Payload, Span};
use podvisor_firmware::stage0::{ENTRY, IMAGE, MEMORY_LEN};
use zerocopy::IntoBytes;

use super::kernel::kernel;

pub(crate) const KERNEL_DEST: u64 = 0x0100_0000;
const INITRD_DEST: u64 = 0x0180_0000;
pub(crate) const KERNEL_STAGED: u64 = 0x0200_0000;
pub(crate) const INITRD_STAGED: u64 = 0x0280_0000;
pub(crate) const CHUNKS: u64 = 0x0300_0000;

fn sha256(bytes: &[u8]) -> [u8; 32] {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes)
        .as_ref()
        .try_into()
        .unwrap()
}

/// What an image is made of.
pub(crate) struct Parts {
    pub(crate) platform: Platform,
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Vec<u8>,
    pub(crate) command_line: String,
    /// Whether the payloads are where they are used; under SEV-SNP they are measured then.
    pub(crate) in_place: bool,
}

impl Parts {
    pub(crate) fn new(platform: Platform, command_line: &str) -> Self {
        Self {
            platform,
            kernel: kernel(),
            initrd: b"this is the initrd".repeat(20),
            command_line: command_line.to_owned(),
            in_place: false,
        }
    }

    fn payload(&self, bytes: &[u8], staged: u64, dest: u64, entry: u64) -> Payload {
        Payload {
            staged: if self.in_place { dest } else { staged },
            dest,
            len: bytes.len() as u64,
            memory_len: bytes.len() as u64 + 0x10_0000,
            entry,
        }
    }

    pub(crate) fn chunks(&self) -> Vec<u8> {
        let len = usize::try_from(abi::CHUNK_SIZE).unwrap();
        let chunks = self.kernel.chunks(len).chain(self.initrd.chunks(len));
        chunks.flat_map(sha256).collect()
    }

    fn manifest(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut span = |bytes: &[u8]| {
            body.resize(body.len().next_multiple_of(16), 0);
            let offset = u32::try_from(size_of::<Manifest>().next_multiple_of(16) + body.len()).unwrap();
            body.extend_from_slice(bytes);
            Span {
                offset,
                len: u32::try_from(bytes.len()).unwrap(),
            }
        };
        let mut head = Manifest {
            magic: abi::MAGIC,
            version: abi::VERSION,
            setup_header: span(&setup_header()),
            command_line: span(format!("{}\0", self.command_line).as_bytes()),
            acpi: span(&tables()),
            fixups: span(
                Fixup {
                    offset: 36,
                    base: abi::FIXUP_TOP,
                    addend: 5,
                }
                .as_bytes(),
            ),
            kernel: self.payload(&self.kernel, KERNEL_STAGED, KERNEL_DEST, KERNEL_DEST + 0x200),
            initrd: self.payload(&self.initrd, INITRD_STAGED, INITRD_DEST, 0),
            chunks: CHUNKS,
            chunk_count: u32::try_from(self.chunks().len() / 32).unwrap(),
            chunks_digest: sha256(&self.chunks()),
            ..Manifest::default()
        };
        let mut bytes = vec![0; size_of::<Manifest>().next_multiple_of(16)];
        head.len = u32::try_from(bytes.len() + body.len()).unwrap();
        bytes[..size_of::<Manifest>()].copy_from_slice(head.as_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The plan, in which tests replace what they like.
    pub(crate) fn plan(&self) -> LaunchPlan<'static> {
        let snp = self.platform == Platform::SevSnp;
        let mut plan = LaunchPlan::new(self.platform);
        plan.policy = snp.then_some(0x3_0000);
        plan.add_parameter_pages(&[
            (abi::VP_COUNT_PAGE, ParameterKind::VpCount),
            (abi::MEMORY_MAP_PAGE, ParameterKind::MemoryMap),
            (abi::MADT_PAGE, ParameterKind::Madt),
        ]);
        let pages = |gpa, kind, data: Vec<u8>| Step::Pages {
            gpa,
            len: (data.len() as u64).next_multiple_of(PAGE_SIZE).max(PAGE_SIZE),
            kind,
            data: Cow::Owned(data),
        };
        if snp {
            plan.steps.push(pages(abi::CPUID_PAGE, PageKind::Cpuid, Vec::new()));
            plan.steps.push(pages(abi::SECRETS_PAGE, PageKind::Secrets, Vec::new()));
        }
        let staged = if snp && !self.in_place {
            PageKind::Shared
        } else {
            PageKind::Normal
        };
        let place = |staged, dest| if self.in_place { dest } else { staged };
        plan.steps.extend([
            pages(abi::MANIFEST_START, PageKind::Normal, self.manifest()),
            pages(abi::STAGE0_START, PageKind::Normal, IMAGE.to_vec()),
            pages(place(KERNEL_STAGED, KERNEL_DEST), staged, self.kernel.clone()),
            pages(place(INITRD_STAGED, INITRD_DEST), staged, self.initrd.clone()),
            pages(CHUNKS, staged, self.chunks()),
        ]);
        plan.add_first_vcpu(entry_state(snp));
        plan.required_memory.push(GpaRange {
            start: abi::CPUID_PAGE,
            len: abi::STAGE0_END - abi::CPUID_PAGE,
        });
        assert!(MEMORY_LEN > IMAGE.len() as u64);
        plan
    }
}

/// The image file of a plan, its steps in the plan's order.
pub(crate) fn file(plan: &LaunchPlan<'_>) -> Vec<u8> {
    let options = BuildOptions {
        preserve_order: true,
        ..BuildOptions::default()
    };
    build(std::slice::from_ref(plan), &options).unwrap()
}

/// From 0x1F1 of a bzImage on: protocol 2.15, loaded high, a 64-bit entry point, a command line of at most 255 bytes.
fn setup_header() -> Vec<u8> {
    let mut header = vec![0; 0x268 - 0x1F1];
    let mut put = |offset: usize, bytes: &[u8]| header[offset - 0x1F1..][..bytes.len()].copy_from_slice(bytes);
    put(0x1FE, &0xAA55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &[1]);
    put(0x238, &255u32.to_le_bytes());
    put(0x260, &0x1000u32.to_le_bytes());
    header
}

/// DSDT, FADT, MCFG.
fn tables() -> Vec<u8> {
    let machine = AcpiMachine {
        vcpus: 1,
        max_vcpus: 2,
        segments: 1,
        memory_slots: 0,
        phys_bits: 46,
        serial: true,
    };
    let all = AcpiTables::build(&machine).unwrap().bytes;
    let mut tables = Vec::new();
    let mut at = 48;
    for kept in [true, true, false, true] {
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        if kept {
            tables.resize(tables.len().next_multiple_of(16), 0);
            tables.extend_from_slice(&all[at..at + len]);
        }
        at = (at + len).next_multiple_of(16);
    }
    tables
}

/// 32-bit protected mode without paging, EBX = the platform.
fn entry_state(snp: bool) -> VcpuState {
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
    VcpuState {
        rip: ENTRY,
        rbx: u64::from(if snp { abi::PLATFORM_SNP } else { abi::PLATFORM_NATIVE }),
        cr0: 0x11,
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        sev_features: u64::from(snp),
        ..VcpuState::reset()
    }
}
