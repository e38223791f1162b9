//! A kernel as stage0 takes it: one run of bytes, where it goes, how much RAM it needs, its entry point by the 64-bit boot
//! protocol and a setup header. Made from a bzImage, which unpacks itself, or from an ELF vmlinux, flattened.

use std::borrow::Cow;

use super::unpack::{MAX_UNPACKED, UnpackError, unpack};
use crate::linux::bzimage::{BzImage, BzImageError, ENTRY_64, SETUP_HEADER_OFFSET as SETUP_HEADER};
use crate::linux::elf::{Elf, ElfError};
use crate::linux::{ImageKind, detect};
use crate::plan::PAGE_SIZE;
use crate::stage0::abi::STAGE0_END;

/// Longest command line of an ELF kernel, which has no header to say it: x86's COMMAND_LINE_SIZE without its NUL.
const ELF_CMDLINE_SIZE: usize = 2047;
/// Last byte that an initrd may have with it, as Linux's own header says.
const ELF_INITRD_MAX: u64 = 0x7FFF_FFFF;
/// Where a kernel goes that may be anywhere and asks for a place that is stage0's.
const USUAL_ADDRESS: u64 = 16 << 20;

/// What of a bzImage is put into an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unpacking {
    /// The bzImage, which unpacks itself in the guest.
    #[default]
    ByGuest,
    /// The vmlinux that is packed in it: larger, and nothing is unpacked in the guest.
    Now,
}

/// What a kernel was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelForm {
    /// A bzImage.
    BzImage,
    /// An ELF file.
    Elf,
}

impl KernelForm {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BzImage => "bzImage",
            Self::Elf => "vmlinux",
        }
    }
}

/// Why a file is no kernel for an image.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Nothing that is known.
    #[error("neither a bzImage nor an ELF kernel, as it is or packed with gzip, zstd or lz4")]
    Unknown,
    /// An IGVM file.
    #[error("this is an IGVM image already")]
    Igvm,
    /// A packed file that cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Not a bzImage that can be booted.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// Not an ELF file that can be loaded.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A field of an ELF kernel.
    #[error("ELF kernel: {what} {value:#x}: {rule}")]
    ElfKernel {
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// What is packed in the bzImage is in a form that is not known here.
    #[error("the kernel in this bzImage is packed with {0}, which podvisor does not unpack; leave it to the guest")]
    Packing(&'static str),
    /// A load address that stage0 uses itself.
    #[error("the kernel must be loaded at {address:#x}, and below {limit:#x} is stage0; use a relocatable kernel", limit = STAGE0_END)]
    Address {
        /// Where it wants to be.
        address: u64,
    },
}

/// A kernel, ready to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// What it was made from.
    pub form: KernelForm,
    /// What is put into memory.
    pub payload: Cow<'a, [u8]>,
    /// GPA where it is used, page-aligned.
    pub dest: u64,
    /// Bytes of RAM it needs there, whole pages.
    pub memory_len: u64,
    /// Its entry point, a GPA in the payload.
    pub entry: u64,
    /// The setup header, from 0x1F1 on.
    pub setup_header: Vec<u8>,
    /// Last byte that an initrd may have.
    pub initrd_addr_max: u64,
    /// Longest command line, without its NUL.
    pub cmdline_size: usize,
}

impl<'a> Kernel<'a> {
    /// Reads `file`, which is not packed any more (see [`unpack`]).
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn read(file: &'a [u8], unpacking: Unpacking) -> Result<Self, KernelError> {
        match detect(file) {
            ImageKind::BzImage => {
                let image = BzImage::read(file)?;
                match unpacking {
                    Unpacking::ByGuest => Self::packed(&image),
                    Unpacking::Now => Self::unpacked(&image),
                }
            }
            ImageKind::Elf => Self::elf(file),
            ImageKind::Igvm => Err(KernelError::Igvm),
            ImageKind::Unknown => Err(KernelError::Unknown),
        }
    }

    fn packed(image: &BzImage<'a>) -> Result<Self, KernelError> {
        let address = image.pref_address;
        let dest = if address >= STAGE0_END && address.is_multiple_of(PAGE_SIZE) {
            address
        } else if image.relocatable {
            USUAL_ADDRESS.next_multiple_of(image.alignment)
        } else {
            return Err(KernelError::Address { address });
        };
        Ok(Self {
            form: KernelForm::BzImage,
            payload: Cow::Borrowed(image.code),
            dest,
            memory_len: image.init_size.next_multiple_of(PAGE_SIZE),
            entry: dest.saturating_add(ENTRY_64),
            setup_header: image.setup_header.to_vec(),
            initrd_addr_max: image.initrd_addr_max,
            cmdline_size: image.cmdline_size,
        })
    }

    fn unpacked(image: &BzImage<'_>) -> Result<Self, KernelError> {
        let packed = packed_kernel(image).unwrap_or_default();
        for (name, magic) in [
            ("xz", &[0xFD, b'7', b'z', b'X', b'Z'][..]),
            ("lzma", &[0x5D, 0, 0]),
            ("bzip2", b"BZh"),
            ("lzo", &[0x89, b'L', b'Z', b'O']),
        ] {
            if packed.starts_with(magic) {
                return Err(KernelError::Packing(name));
            }
        }
        let elf = unpack(packed)?;
        if detect(&elf) != ImageKind::Elf {
            return Err(KernelError::Packing("something unknown"));
        }
        let kernel = Kernel::elf(&elf)?;
        Ok(Self {
            payload: Cow::Owned(kernel.payload.into_owned()),
            initrd_addr_max: image.initrd_addr_max,
            cmdline_size: image.cmdline_size,
            setup_header: made_up_header(
                kernel.dest,
                kernel.memory_len,
                image.initrd_addr_max,
                image.cmdline_size,
            ),
            ..kernel
        })
    }

    fn elf(file: &'a [u8]) -> Result<Self, KernelError> {
        const CLASS_64: u8 = 2;
        let elf = Elf::read(file)?;
        let refuse = |what, value, rule| Err(KernelError::ElfKernel { what, value, rule });
        if file.get(4) != Some(&CLASS_64) {
            return refuse("EI_CLASS", 1, "a 32-bit kernel has no 64-bit entry point");
        }
        let Some(base) = elf.segments.iter().map(|segment| segment.paddr).min() else {
            return refuse("loadable segments", 0, "there must be one");
        };
        if base < STAGE0_END {
            return Err(KernelError::Address { address: base });
        }
        if !base.is_multiple_of(PAGE_SIZE) {
            return refuse("p_paddr", base, "must be a multiple of 4096");
        }
        let (mut end, mut file_end) = (base, base);
        for segment in &elf.segments {
            let last = segment.paddr.saturating_add(segment.memsz);
            if last - base > MAX_UNPACKED {
                return refuse("p_paddr", segment.paddr, "segments are farther apart than 512 MiB");
            }
            end = end.max(last);
            if !segment.data.is_empty() {
                file_end = file_end.max(segment.paddr + segment.data.len() as u64);
            }
        }
        let entry = file
            .get(24..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |entry| u64::from_le_bytes(*entry));
        if !(base..file_end).contains(&entry) {
            return refuse("e_entry", entry, "must be a physical address in the kernel");
        }
        let memory_len = (end - base).next_multiple_of(PAGE_SIZE);
        Ok(Self {
            form: KernelForm::Elf,
            payload: flatten(&elf, base, file_end - base)?,
            dest: base,
            memory_len,
            entry,
            setup_header: made_up_header(base, memory_len, ELF_INITRD_MAX, ELF_CMDLINE_SIZE),
            initrd_addr_max: ELF_INITRD_MAX,
            cmdline_size: ELF_CMDLINE_SIZE,
        })
    }
}

/// What a bzImage unpacks, without the unpacked length behind it (`payload_offset`, `payload_length`).
fn packed_kernel<'a>(image: &BzImage<'a>) -> Option<&'a [u8]> {
    let field = |offset: usize| {
        let field = image.setup_header.get(offset - SETUP_HEADER..)?.first_chunk()?;
        usize::try_from(u32::from_le_bytes(*field)).ok()
    };
    let (start, len) = (field(0x248)?, field(0x24C)?);
    let payload = image.code.get(start..start.checked_add(len)?)?;
    payload.split_last_chunk::<4>().map(|(packed, _)| packed)
}

/// The contents of the segments at their places in `len` bytes from `base`.
fn flatten<'a>(elf: &Elf<'a>, base: u64, len: u64) -> Result<Cow<'a, [u8]>, KernelError> {
    if let [only] = elf.segments.as_slice() {
        return Ok(Cow::Borrowed(only.data));
    }
    let mut segments = elf.segments.clone();
    segments.sort_by_key(|segment| segment.paddr);
    let mut flat = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    let mut taken = base;
    for segment in segments {
        if segment.paddr < taken {
            return Err(KernelError::ElfKernel {
                what: "p_paddr",
                value: segment.paddr,
                rule: "two segments overlap",
            });
        }
        taken = segment.paddr + segment.memsz;
        if !segment.data.is_empty() {
            flat.resize(usize::try_from(segment.paddr - base).unwrap_or(0), 0);
            flat.extend_from_slice(segment.data);
        }
    }
    Ok(Cow::Owned(flat))
}

/// A setup header of protocol 2.15 for a kernel that has none.
fn made_up_header(dest: u64, memory_len: u64, initrd_addr_max: u64, cmdline_size: usize) -> Vec<u8> {
    const END: usize = 0x26C;
    const VERSION: u16 = 0x20F;
    const LOADED_HIGH: u8 = 1;
    const ALIGNMENT: u32 = 2 << 20;
    const XLF_KERNEL_64: u16 = 1;
    let init_size = u32::try_from(memory_len).unwrap_or(u32::MAX);
    let initrd_addr_max = u32::try_from(initrd_addr_max).unwrap_or(u32::MAX);
    let cmdline_size = u32::try_from(cmdline_size).unwrap_or(u32::MAX);
    let mut header = vec![0; END - SETUP_HEADER];
    let fields: [(usize, &[u8]); 11] = [
        (0x1FE, &[0x55, 0xAA]),
        // A jump to behind the header, which tells how long it is.
        (0x200, &[0xEB, 0x6A]),
        (0x202, b"HdrS"),
        (0x206, &VERSION.to_le_bytes()),
        (0x211, &[LOADED_HIGH]),
        (0x22C, &initrd_addr_max.to_le_bytes()),
        (0x230, &ALIGNMENT.to_le_bytes()),
        (0x236, &XLF_KERNEL_64.to_le_bytes()),
        (0x238, &cmdline_size.to_le_bytes()),
        (0x258, &dest.to_le_bytes()),
        (0x260, &init_size.to_le_bytes()),
    ];
    for (offset, bytes) in fields {
        let place = header
            .get_mut(offset - SETUP_HEADER..)
            .and_then(|rest| rest.get_mut(..bytes.len()));
        if let Some(place) = place {
            place.copy_from_slice(bytes);
        }
    }
    header
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::linux::bzimage::tests::bzimage;

    /// A bzImage whose code is `code`, and which needs 16 MiB more than that.
    pub(crate) fn sample(code: &[u8]) -> Vec<u8> {
        let mut code = code.to_vec();
        code.resize(code.len().next_multiple_of(16), 0);
        let mut file = bzimage(&code);
        let init_size = u32::try_from(code.len() + 0x100_0000).unwrap().next_multiple_of(0x1000);
        file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        file
    }

    /// An ELF64 file with these segments: paddr, contents, p_memsz.
    pub(crate) fn elf(entry: u64, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = b"\x7FELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend_from_slice(&2u16.to_le_bytes());
        file.extend_from_slice(&62u16.to_le_bytes());
        file.extend_from_slice(&1u32.to_le_bytes());
        for word in [entry, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&[0; 4]);
        for half in [64u16, 56, u16::try_from(segments.len()).unwrap(), 0, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut at = 64 + 56 * segments.len() as u64;
        for (paddr, data, memsz) in segments {
            file.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]);
            for word in [at, 0xFFFF_FFFF_8000_0000, *paddr, data.len() as u64, *memsz, 0x1000] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            at += data.len() as u64;
        }
        segments.iter().for_each(|(_, data, _)| file.extend_from_slice(data));
        file
    }

    #[test]
    fn a_bzimage_goes_where_it_wants() {
        let file = sample(&[0x90; 0x1000]);
        let kernel = Kernel::read(&file, Unpacking::ByGuest).unwrap();
        assert_eq!((kernel.form, kernel.payload.len()), (KernelForm::BzImage, 0x1000));
        assert_eq!((kernel.dest, kernel.entry), (0x100_0000, 0x100_0200));
        assert_eq!((kernel.memory_len, kernel.cmdline_size), (0x100_1000, 2047));
        let mut low = file.clone();
        low[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
        low[0x230..0x234].copy_from_slice(&0x10_0000u32.to_le_bytes());
        assert_eq!(Kernel::read(&low, Unpacking::ByGuest).unwrap().dest, 0x100_0000);
        low[0x234] = 0;
        let refused = Kernel::read(&low, Unpacking::ByGuest).unwrap_err().to_string();
        assert!(
            refused.contains("0x100000") && refused.contains("relocatable"),
            "{refused}"
        );
    }

    #[test]
    fn an_elf_kernel_is_flattened() {
        let file = elf(
            0x100_0010,
            &[
                (0x100_3000, &[3; 0x10], 0x5000),
                (0x100_0000, &[1; 0x20], 0x20),
                (0x100_1000, &[], 0x100),
            ],
        );
        let kernel = Kernel::read(&file, Unpacking::ByGuest).unwrap();
        assert_eq!(
            (kernel.form, kernel.dest, kernel.entry),
            (KernelForm::Elf, 0x100_0000, 0x100_0010)
        );
        assert_eq!((kernel.payload.len(), kernel.memory_len), (0x3010, 0x8000));
        assert_eq!(
            (
                kernel.payload[..0x20].to_vec(),
                kernel.payload[0x20],
                kernel.payload[0x3000]
            ),
            (vec![1; 0x20], 0, 3)
        );
        // What is made up is a header that the reader takes.
        let mut as_file = vec![0; 0xE00];
        as_file[SETUP_HEADER..0x26C].copy_from_slice(&kernel.setup_header);
        as_file[0x1F4] = 0x30;
        let header = BzImage::read(&as_file).unwrap();
        assert_eq!((header.pref_address, header.init_size), (0x100_0000, 0x8000));
    }

    #[test]
    fn a_bzimage_can_be_unpacked() {
        use std::io::Write;
        let inner = elf(0x100_0000, &[(0x100_0000, &[7; 0x3000], 0x9000)]);
        let mut packed = flate2::write::GzEncoder::new(vec![0xC3; 0x400], flate2::Compression::fast());
        packed.write_all(&inner).unwrap();
        let mut code = packed.finish().unwrap();
        let payload = u32::try_from(code.len() + 4 - 0x400).unwrap();
        code.extend_from_slice(&u32::try_from(inner.len()).unwrap().to_le_bytes());
        let mut file = sample(&code);
        file[0x248..0x24C].copy_from_slice(&0x400u32.to_le_bytes());
        file[0x24C..0x250].copy_from_slice(&payload.to_le_bytes());
        let kernel = Kernel::read(&file, Unpacking::Now).unwrap();
        assert_eq!(
            (kernel.form, kernel.payload.len(), kernel.memory_len),
            (KernelForm::Elf, 0x3000, 0x9000)
        );
        assert_eq!(
            Kernel::read(&file, Unpacking::ByGuest).unwrap().form,
            KernelForm::BzImage
        );
        file[0x600 + 0x400..][..6].copy_from_slice(&[0xFD, b'7', b'z', b'X', b'Z', 0]);
        let refused = Kernel::read(&file, Unpacking::Now).unwrap_err().to_string();
        assert!(refused.contains("xz"), "{refused}");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let cases: [(Vec<u8>, &str); 8] = [
            (b"IGVM".to_vec(), "already"),
            (b"#!/bin/sh".to_vec(), "neither"),
            (elf(0, &[]), "loadable segments"),
            (elf(0x10_0000, &[(0x10_0000, &[1; 16], 16)]), "stage0"),
            (elf(0x20_0001, &[(0x20_0001, &[1; 16], 16)]), "p_paddr"),
            (elf(0x30_0000, &[(0x20_0000, &[1; 16], 16)]), "e_entry"),
            (
                elf(0x20_0000, &[(0x20_0000, &[1; 16], 16), (0x1_0000_0000, &[1], 1)]),
                "512 MiB",
            ),
            (
                elf(0x20_0000, &[(0x20_0000, &[1; 16], 0x2000), (0x20_1000, &[1], 1)]),
                "overlap",
            ),
        ];
        for (file, reason) in cases {
            let refused = Kernel::read(&file, Unpacking::ByGuest).unwrap_err().to_string();
            assert!(refused.contains(reason), "{reason}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn any_elf_is_flattened_or_refused(segments in proptest::collection::vec((0u64..8, 0usize..0x40, 0u64..0x3000, any::<bool>()), 0..5), entry in 0u64..0x8000) {
            let data = [5; 0x40];
            let segments: Vec<_> = segments.iter().map(|(page, len, memsz, far)| {
                let paddr = if *far { u64::MAX - 0x100 } else { 0x20_0000 + page * 0x1000 };
                (paddr, &data[..*len], *memsz)
            }).collect();
            if let Ok(kernel) = Kernel::read(&elf(0x20_0000 + entry, &segments), Unpacking::ByGuest) {
                prop_assert!(kernel.memory_len >= kernel.payload.len() as u64);
                prop_assert!(kernel.entry - kernel.dest < kernel.payload.len() as u64);
                for (paddr, data, _) in segments.iter().filter(|(_, data, memsz)| *memsz > 0 && !data.is_empty()) {
                    let at = usize::try_from(paddr - kernel.dest).unwrap();
                    prop_assert_eq!(&kernel.payload[at..at + data.len()], *data);
                }
            }
        }
    }
}
