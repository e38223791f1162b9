//! The launch plan: the ordered list of steps that turns empty guest memory into a pod about to run.
//! Holds the plan's types only; the sources that make plans are `igvm` and `linux`, the executors are elsewhere.

use std::borrow::Cow;

use crate::vmsa::vmsa_page;

/// Bytes in a guest page; the unit of everything the SNP firmware measures.
pub const PAGE_SIZE: u64 = 4096;

/// GPA of the VMSA page as KVM measures it: u64::MAX page-aligned and cut to bits 47..12.
pub const KVM_VMSA_GPA: u64 = 0xFFFF_FFFF_F000;

/// The isolation a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Platform {
    /// No isolation: an ordinary VM.
    Native,
    /// AMD SEV-SNP.
    SevSnp,
}

/// How the pages of a [`Step::Pages`] enter the guest, with the SNP page type each becomes
/// (AMD 56860 8.17.2; `KVM_SEV_SNP_PAGE_TYPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Contents measured (type 1).
    Normal,
    /// Zeros, measured as a ZERO page (type 3). Only plans built with `ZeroPages::AsZero` hold it.
    Zero,
    /// Contents loaded, only the address measured (type 4).
    Unmeasured,
    /// Filled by the firmware with the guest's secrets (type 5).
    Secrets,
    /// Filled with the CPUID table (type 6).
    Cpuid,
    /// Host-visible memory: contents placed, not measured, never handed to the firmware.
    Shared,
}

/// One thing the launch does. Steps run in order; the SNP digest depends on that order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Put pages at `gpa`. On [`Platform::SevSnp`] `gpa` and `len` are multiples of [`PAGE_SIZE`]; on
    /// [`Platform::Native`] any byte range (an ELF segment).
    Pages {
        /// Guest physical address of the first byte.
        gpa: u64,
        /// Length in bytes of the memory filled; `data` may be shorter, the rest is zero.
        len: u64,
        /// How the pages enter the guest.
        kind: PageKind,
        /// Contents, borrowed from the image where possible; empty means zeros.
        data: Cow<'a, [u8]>,
    },
    /// Put parameter area `area` (an index into [`LaunchPlan::areas`]) at `gpa`, filled from the machine at launch.
    /// Under SNP every page of it is of the Unmeasured type.
    Parameters {
        /// Guest physical address of the first byte, page-aligned.
        gpa: u64,
        /// Index into [`LaunchPlan::areas`].
        area: usize,
    },
    /// The initial state of the vCPUs (an index into [`LaunchPlan::vps`]). KVM measures VMSAs at the finish,
    /// whatever the position of this step.
    Vcpu {
        /// Index into [`LaunchPlan::vps`].
        vp: usize,
    },
}

/// What a parameter is filled with (IGVM parameter directives, igvm_defs `IGVM_VHT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// u32 count of vCPUs.
    VpCount,
    /// Array of 24-byte memory-map entries, sorted, ended by an entry of zero pages.
    MemoryMap,
    /// NUL-terminated ASCII.
    CommandLine,
    /// ACPI MADT.
    Madt,
    /// ACPI SRAT.
    Srat,
    /// ACPI SLIT.
    Slit,
    /// ACPI PPTT.
    Pptt,
    /// The two MMIO ranges.
    MmioRanges,
    /// u32 of environment flags (bit 0: memory is shared at start).
    EnvironmentInfo,
}

/// A value written into a parameter area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// What to write.
    pub kind: ParameterKind,
    /// Offset in bytes from the area's start.
    pub offset: u32,
}

/// A parameter area: zero or more pages of host-provided, unmeasured data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterArea<'a> {
    /// Size in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
    /// Initial contents (may be shorter than `len`).
    pub initial: Cow<'a, [u8]>,
    /// Values written over the initial contents, in file order.
    pub parameters: Vec<Parameter>,
}

/// A segment register in VMSA form (AMD APM vol. 2, table B-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// type | s<<4 | dpl<<5 | p<<7 | avl<<8 | l<<9 | db<<10 | g<<11.
    pub attrib: u16,
    /// Limit in bytes, already scaled.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// The register state one vCPU starts with. Platform-neutral: VMSA pages and native contexts are read into it,
/// and both KVM's registers and the measured VMSA page are made from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "registers, by their architectural names")]
pub struct VcpuState {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub idtr: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub efer: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr6: u64,
    pub dr7: u64,
    pub pat: u64,
    pub xcr0: u64,
    pub mxcsr: u32,
    pub x87_fcw: u16,
    /// SEV_FEATURES of the VMSA (bit 0: SNP active); 0 on [`Platform::Native`].
    pub sev_features: u64,
}

/// The initial state of one virtual processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VpContext<'a> {
    /// Virtual processor index; a vCPU without a context of its own starts from index 0's.
    pub index: u16,
    /// GPA of the VMSA page in the file ([`KVM_VMSA_GPA`] for KVM); 0 on [`Platform::Native`].
    pub gpa: u64,
    /// The registers.
    pub state: VcpuState,
    /// The VMSA page as the image carries it (4096 bytes); empty on [`Platform::Native`].
    pub vmsa: Cow<'a, [u8]>,
}

/// A public key in the image's SNP ID block (`IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY`); coordinates are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdPublicKey {
    /// Curve: 2 is P-384.
    pub curve: u32,
    /// X, 72 bytes little-endian.
    pub qx: [u8; 72],
    /// Y, 72 bytes little-endian.
    pub qy: [u8; 72],
}

/// An ECDSA signature in the image's SNP ID block; values are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdSignature {
    /// R, 72 bytes little-endian.
    pub r: [u8; 72],
    /// S, 72 bytes little-endian.
    pub s: [u8; 72],
}

/// The SNP ID block an image carries (AMD 56860 8.18).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// Expected launch digest.
    pub ld: [u8; 48],
    /// Family id.
    pub family_id: [u8; 16],
    /// Image id.
    pub image_id: [u8; 16],
    /// Version, 1.
    pub version: u32,
    /// Guest SVN.
    pub guest_svn: u32,
    /// Algorithm of the ID key: 1 is ECDSA P-384 with SHA-384.
    pub id_key_algorithm: u32,
    /// Algorithm of the author key.
    pub author_key_algorithm: u32,
    /// Signature over the 96-byte ID block.
    pub id_block_signature: IdSignature,
    /// The ID key.
    pub id_key: IdPublicKey,
    /// Whether an author key is present.
    pub author_key_enabled: bool,
    /// Signature over the ID key by the author key.
    pub id_key_signature: IdSignature,
    /// The author key.
    pub author_key: IdPublicKey,
}

/// A range of guest physical memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GpaRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Everything needed to launch a pod, from any source. See `docs/architecture.md`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchPlan<'a> {
    /// What it is for.
    pub platform: Platform,
    /// SNP guest policy from the image's init headers.
    pub policy: Option<u64>,
    /// Steps in file order. Adjacent pages of one kind whose data is adjacent in the file are one step.
    pub steps: Vec<Step<'a>>,
    /// Parameter areas, referred to by [`Step::Parameters`].
    pub areas: Vec<ParameterArea<'a>>,
    /// Initial vCPU states, referred to by [`Step::Vcpu`]; indices are unique.
    pub vps: Vec<VpContext<'a>>,
    /// RAM that must exist.
    pub required_memory: Vec<GpaRange>,
    /// RAM that the image reserves for error information (`IGVM_VHT_ERROR_RANGE`).
    pub error_ranges: Vec<GpaRange>,
    /// The ID block, if the image carries one.
    pub id_block: Option<IdBlock>,
}

impl<'a> LaunchPlan<'a> {
    /// An empty plan for `platform`.
    #[must_use]
    pub fn new(platform: Platform) -> Self {
        Self {
            platform,
            policy: None,
            steps: Vec::new(),
            areas: Vec::new(),
            vps: Vec::new(),
            required_memory: Vec::new(),
            error_ranges: Vec::new(),
            id_block: None,
        }
    }

    /// Adds a parameter area of one page for each of `parameters`: where it is, and what fills it.
    pub fn add_parameter_pages(&mut self, parameters: &[(u64, ParameterKind)]) {
        for (gpa, kind) in parameters {
            self.steps.push(Step::Parameters {
                gpa: *gpa,
                area: self.areas.len(),
            });
            self.areas.push(ParameterArea {
                len: PAGE_SIZE,
                initial: Cow::Borrowed(&[]),
                parameters: vec![Parameter { kind: *kind, offset: 0 }],
            });
        }
    }

    /// Adds vCPU 0 with `state`, which all others start with too; under SEV-SNP with the VMSA that KVM makes of it.
    pub fn add_first_vcpu(&mut self, state: VcpuState) {
        let (gpa, vmsa) = match self.platform {
            Platform::Native => (0, Cow::Borrowed(&[][..])),
            Platform::SevSnp => (KVM_VMSA_GPA, Cow::Owned(vmsa_page(&state).to_vec())),
        };
        self.steps.push(Step::Vcpu { vp: self.vps.len() });
        self.vps.push(VpContext {
            index: 0,
            gpa,
            state,
            vmsa,
        });
    }

    /// The initial state of vCPU `index`: its own context, else that of index 0.
    #[must_use]
    pub fn vcpu_state(&self, index: u16) -> Option<&VpContext<'a>> {
        self.vps
            .iter()
            .find(|vp| vp.index == index)
            .or_else(|| self.vps.iter().find(|vp| vp.index == 0))
    }
}
