//! The reason codes that stage0 gives up with, in words; `docs/stage0.md` lists them too. Shared with the monitor as source.

/// Reason code set of the GHCB termination request that is podvisor's (AMD 56421 2.3.1: 0 is general, 1 is Linux's).
pub const REASON_SET: u8 = 2;

/// The CPUID page is not one that the image can run with.
pub const CPUID: u8 = 1;
/// Memory could not be accepted, or was before.
pub const ACCEPT: u8 = 2;
/// The hypervisor did not do its part of the GHCB protocol.
pub const GHCB: u8 = 3;
/// The manifest is not one.
pub const MANIFEST: u8 = 4;
/// The host's memory map.
pub const MEMORY_MAP: u8 = 5;
/// The host's vCPU count.
pub const VCPU_COUNT: u8 = 6;
/// The host's MADT.
pub const MADT: u8 = 7;
/// What the image needs is not RAM.
pub const NOT_RAM: u8 = 8;
/// The chunk list is not the measured one.
pub const CHUNK_LIST: u8 = 9;
/// A payload is not the measured one.
pub const PAYLOAD: u8 = 10;
/// The measured ACPI tables.
pub const ACPI: u8 = 11;
/// The boot parameters.
pub const BOOT_PARAMS: u8 = 12;
/// A processor exception.
pub const EXCEPTION: u8 = 13;
/// An error of stage0 itself.
pub const INTERNAL: u8 = 14;

/// What a code of [`REASON_SET`] means.
#[must_use]
pub fn words(code: u8) -> &'static str {
    match code {
        CPUID => "the CPUID page is not one that the image can run with",
        ACCEPT => "memory could not be accepted, or was accepted before",
        GHCB => "the hypervisor did not do its part of the GHCB protocol",
        MANIFEST => "the manifest is malformed",
        MEMORY_MAP => "the memory map is malformed",
        VCPU_COUNT => "the vCPU count is wrong",
        MADT => "the MADT is malformed",
        NOT_RAM => "the memory map has no RAM where the image needs it",
        CHUNK_LIST => "the chunk list is not the measured one",
        PAYLOAD => "the kernel or the initrd is not the measured one",
        ACPI => "the ACPI tables do not fit together",
        BOOT_PARAMS => "the boot parameters have no room for the memory map",
        EXCEPTION => "a processor exception",
        INTERNAL => "an error of stage0 itself",
        _ => "a reason that this podvisor does not know",
    }
}
