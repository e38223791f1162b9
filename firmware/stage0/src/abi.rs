//! What the image builder and stage0 agree on: where things lie in guest memory, and the measured manifest that says what
//! is to be booted. Shared by both as source, so it needs no standard library. What the monitor alone decides (the memory
//! map, the vCPU count, the MADT) comes in IGVM parameters and is not described here.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The CPUID page (SEV-SNP), filled by the firmware's rules.
pub const CPUID_PAGE: u64 = 0x10_0000;
/// The secrets page (SEV-SNP), filled by the firmware.
pub const SECRETS_PAGE: u64 = 0x10_1000;
/// Parameter area of one page: the vCPU count, a u32. Untrusted.
pub const VP_COUNT_PAGE: u64 = 0x10_2000;
/// Parameter area of one page: the memory map (IGVM_VHS_MEMORY_MAP_ENTRY). Untrusted.
pub const MEMORY_MAP_PAGE: u64 = 0x10_3000;
/// Parameter area of one page: the ACPI MADT; all zero when the loader does not know that parameter. Untrusted.
pub const MADT_PAGE: u64 = 0x10_4000;
/// The manifest, measured, in whole pages from here.
pub const MANIFEST_START: u64 = 0x10_5000;
/// End of the room for the manifest.
pub const MANIFEST_END: u64 = 0x12_0000;
/// stage0 itself, measured. What it has beyond its file (zeros, stacks, page tables, the GHCB page) follows and is no part of the
/// image: under SEV-SNP stage0 accepts it itself, which is faster than a launch update of each page.
pub const STAGE0_START: u64 = 0x12_0000;
/// End of all that stage0 uses below the payloads.
pub const STAGE0_END: u64 = 0x20_0000;

/// EBX at the entry (32-bit protected mode, paging off) on a plain VM.
pub const PLATFORM_NATIVE: u32 = 0;
/// EBX at the entry under SEV-SNP.
pub const PLATFORM_SNP: u32 = 1;

/// First bytes of a manifest.
pub const MAGIC: [u8; 8] = *b"PVSTAGE0";
/// Version of this layout.
pub const VERSION: u32 = 1;
/// The payloads are hashed in chunks of this many bytes; the last one of a payload may be shorter.
pub const CHUNK_SIZE: u64 = 1 << 20;
/// Most chunks in an image: 1 GiB of payload.
pub const MAX_CHUNKS: usize = 1024;
/// Bytes of one digest, SHA-256.
pub const DIGEST_LEN: usize = 32;

/// Bytes inside the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Span {
    /// From the start of the manifest.
    pub offset: u32,
    /// Length in bytes.
    pub len: u32,
}

/// Something that the host puts into memory that it can write, and that stage0 takes over: it is copied to `dest`
/// (unless it lies there already), and only the copy is hashed and used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Payload {
    /// GPA, page-aligned, where the image puts it: in shared pages under SEV-SNP. It may equal `dest`; under SEV-SNP both
    /// payloads and the chunk digests are measured, private pages then.
    pub staged: u64,
    /// GPA, page-aligned, where it is used.
    pub dest: u64,
    /// Its length in bytes; 0: there is none.
    pub len: u64,
    /// Bytes of RAM that it needs at `dest`; at least `len`. The kernel's `init_size`, or the end of its last segment.
    pub memory_len: u64,
    /// Entry point of the kernel by the 64-bit boot protocol (GPA); 0 for an initrd.
    pub entry: u64,
}

/// A 64-bit number in the DSDT that depends on how wide the guest's physical addresses are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Fixup {
    /// Offset of its 8 bytes (little-endian) from the start of the DSDT.
    pub offset: u32,
    /// [`FIXUP_MMIO_START`] or [`FIXUP_TOP`].
    pub base: u32,
    /// Added to the base, wrapping: offsets below the base are negative.
    pub addend: u64,
}

/// [`Fixup::base`]: `mmio_start` of the device area (`podvisor_firmware::layout::device_area`).
pub const FIXUP_MMIO_START: u32 = 0;
/// [`Fixup::base`]: the end of the address space that the device area is laid out in, 1 << min(bits, 43).
pub const FIXUP_TOP: u32 = 1;

/// The head of the measured manifest; the spans' bytes follow it. All numbers are little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Manifest {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: u32,
    /// Zero.
    pub flags: u32,
    /// Length in bytes of all of the manifest, this head included.
    pub len: u32,
    /// Number of chunk digests: those of the kernel, then those of the initrd.
    pub chunk_count: u32,
    /// The setup header of the kernel, from offset 0x1F1 of a bzImage on (Linux x86 boot protocol), made up for an ELF
    /// kernel: what goes to 0x1F1 of `boot_params`.
    pub setup_header: Span,
    /// The kernel command line, with its NUL.
    pub command_line: Span,
    /// ACPI tables, one after the other, each 16-aligned from the start of the span: DSDT first, then FADT and MCFG.
    /// stage0 fills in the FADT's pointer to the DSDT and adds MADT, XSDT and RSDP.
    pub acpi: Span,
    /// Array of [`Fixup`].
    pub fixups: Span,
    /// The kernel.
    pub kernel: Payload,
    /// The initrd.
    pub initrd: Payload,
    /// GPA, page-aligned, of the chunk digests (unmeasured, shared under SEV-SNP).
    pub chunks: u64,
    /// SHA-256 over the chunk digests: it pins them, and they pin the payloads.
    pub chunks_digest: [u8; DIGEST_LEN],
}
