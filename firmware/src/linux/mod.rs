//! Kernels without an IGVM file around them. Tells the formats apart; each format's plan is in its own file.

pub mod boot64;
pub mod bzimage;
pub mod elf;
pub mod place;
pub mod pvh;

use self::boot64::Boot64Error;
use self::place::Given;
use self::pvh::PvhError;
use crate::plan::LaunchPlan;

/// What a file to boot is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// An IGVM file.
    Igvm,
    /// An ELF file; a kernel if it has a PVH note.
    Elf,
    /// A compressed x86 Linux kernel (Documentation/arch/x86/boot.rst).
    BzImage,
    /// None of these.
    Unknown,
}

/// Tells what `file` is. At least the first 518 bytes are needed to know a bzImage.
#[must_use]
pub fn detect(file: &[u8]) -> ImageKind {
    let at = |start: usize, magic: &[u8]| file.get(start..).is_some_and(|rest| rest.starts_with(magic));
    if at(0, b"IGVM") {
        ImageKind::Igvm
    } else if at(0, b"\x7FELF") {
        ImageKind::Elf
    } else if at(0x1FE, &[0x55, 0xAA]) && at(0x202, b"HdrS") {
        ImageKind::BzImage
    } else {
        ImageKind::Unknown
    }
}

/// Why a kernel cannot be booted directly.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum KernelError {
    /// Not a kernel.
    #[error(
        "the kernel is {0}; a bzImage (vmlinuz) or an uncompressed ELF kernel (vmlinux) with a PVH entry is needed"
    )]
    Format(&'static str),
    /// An ELF kernel that cannot be booted.
    #[error(transparent)]
    Pvh(#[from] PvhError),
    /// A bzImage that cannot be booted.
    #[error(transparent)]
    Boot64(#[from] Boot64Error),
}

/// Plans the boot of `kernel` on the native platform, by what it is, with the initrd high in low memory, and the ACPI
/// tables if there are any. The command line is `given`'s own; that of its machine is for IGVM.
///
/// # Errors
/// [`KernelError`].
pub fn plan<'a>(kernel: &'a [u8], given: &Given<'a, '_>) -> Result<LaunchPlan<'a>, KernelError> {
    match detect(kernel) {
        ImageKind::Elf => Ok(pvh::plan(kernel, given)?),
        ImageKind::BzImage => Ok(boot64::plan(kernel, given)?),
        ImageKind::Igvm => Err(KernelError::Format("an IGVM file")),
        ImageKind::Unknown => Err(KernelError::Format(unknown(kernel))),
    }
}

/// A word for what is no kernel: forms that people have at hand.
fn unknown(file: &[u8]) -> &'static str {
    let starts = |magic: &[u8]| file.starts_with(magic);
    match () {
        () if file.is_empty() => "an empty file",
        () if starts(b"MZ") && file.get(4..8) == Some(b"zimg") => {
            "an EFI zboot image, which EFI firmware alone can unpack"
        }
        () if starts(b"MZ") => "an EFI program",
        () if starts(&[0x1F, 0x8B]) => "compressed with gzip: unpack it first",
        () if starts(&[0x28, 0xB5, 0x2F, 0xFD]) => "compressed with zstd: unpack it first",
        () if starts(&[0xFD, b'7', b'z', b'X', b'Z']) => "compressed with xz: unpack it first",
        () => "of no known format",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::MachineDescription;

    #[test]
    fn what_is_no_kernel_is_told_by_name() {
        let machine = MachineDescription {
            vcpus: 1,
            max_vcpus: 1,
            memory: Vec::new(),
            mmio: [crate::plan::GpaRange { start: 0, len: 0 }; 2],
            command_line: String::new(),
            memory_is_shared: false,
        };
        let given = Given {
            initrd: None,
            cmdline: "",
            machine: &machine,
            acpi: None,
        };
        for (file, words) in [
            (&b"IGVM"[..], "an IGVM file"),
            (b"", "an empty file"),
            (b"MZ\0\0zimg", "EFI zboot"),
            (b"MZ\x90\0", "an EFI program"),
            (b"\x1F\x8B\x08", "gzip"),
            (b"\x28\xB5\x2F\xFD", "zstd"),
            (b"\xFD7zXZ\0", "xz"),
            (b"#!/bin/sh", "no known format"),
        ] {
            let error = plan(file, &given).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("bzImage (vmlinuz)"), "{error}");
        }
    }

    #[test]
    fn formats_are_told_apart() {
        let mut linux = vec![0; 0x210];
        linux[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(detect(&linux), ImageKind::Unknown);
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(detect(&linux), ImageKind::BzImage);
        assert_eq!(detect(&linux[..0x205]), ImageKind::Unknown);
        assert_eq!(detect(b"\x7FELF\x02"), ImageKind::Elf);
        assert_eq!(detect(b"IGVM\x01"), ImageKind::Igvm);
        assert_eq!(detect(b""), ImageKind::Unknown);
    }
}
