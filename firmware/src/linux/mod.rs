//! Kernels without an IGVM file around them. Tells the formats apart; each format's plan is in its own file.

pub mod bzimage;
pub mod elf;
pub mod pvh;

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

#[cfg(test)]
mod tests {
    use super::*;

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
