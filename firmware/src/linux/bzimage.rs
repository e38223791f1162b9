//! As much of a bzImage as booting one by the 64-bit entry takes (Linux Documentation/arch/x86/boot.rst): the setup
//! header and the kernel proper behind it. Every offset is checked; nothing is copied. What becomes of a kernel is in
//! `direct` and in the image builder.

/// Offset of the setup header in the file, and in `boot_params`.
pub const SETUP_HEADER_OFFSET: usize = 0x1F1;
/// `boot_params` has room for the setup header up to here; fields of other kinds follow.
pub const SETUP_HEADER_END: usize = 0x290;
/// The 64-bit entry point, from the address that the kernel is loaded at.
pub const ENTRY_64: u64 = 0x200;
/// Size of a sector: the unit of `setup_sects`.
const SECTOR: usize = 512;
/// Oldest protocol that has `xloadflags`.
const OLDEST: u16 = 0x020C;
/// `xloadflags`: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the kernel proper is loaded at or above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// A unit of `syssize`; the last one may be short in the file.
const PARAGRAPH: usize = 16;

/// A bzImage that cannot be booted by the 64-bit entry.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BzImageError {
    /// Not a bzImage.
    #[error("the file is no bzImage: at {offset:#x} it lacks the {what}")]
    Magic {
        /// Where in the file.
        offset: usize,
        /// What is missing there.
        what: &'static str,
    },
    /// A file for EFI alone.
    #[error(
        "the file is an EFI zboot image, which EFI firmware alone can unpack; take a bzImage or the vmlinux inside it"
    )]
    Zboot,
    /// The file ends too early.
    #[error("the bzImage is truncated: its {what} ends at {end:#x}, the file at {len:#x}")]
    Truncated {
        /// What the end of is missing.
        what: &'static str,
        /// Where that would end.
        end: usize,
        /// Length of the file.
        len: usize,
    },
    /// Too old a protocol.
    #[error("the kernel's boot protocol is {}.{}; 2.12 (Linux 3.8) or later is needed", .0 >> 8, .0 & 0xFF)]
    Version(u16),
    /// A kernel without the 64-bit entry.
    #[error(
        "the kernel has no 64-bit entry (xloadflags {0:#x} lacks XLF_KERNEL_64): it is a 32-bit kernel; take an x86-64 one"
    )]
    NoEntry64(u16),
    /// A field with a value that cannot be.
    #[error("setup header: {field} is {value:#x}: {rule}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
}

/// A bzImage with a 64-bit entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BzImage<'a> {
    /// The setup header as the file has it, from `setup_sects` on: it belongs at [`SETUP_HEADER_OFFSET`] of
    /// `boot_params`, where it ends at [`SETUP_HEADER_END`] at most.
    pub setup_header: &'a [u8],
    /// The kernel proper (the protected-mode code), which goes to the load address; the entry is [`ENTRY_64`] into it.
    pub code: &'a [u8],
    /// Boot protocol: major version in the high byte.
    pub version: u16,
    /// Where the kernel wants to be (GPA): at or above 1 MiB, a multiple of `alignment`.
    pub pref_address: u64,
    /// Bytes of memory it needs from the load address on before it has looked at the memory map; at least the code's
    /// length.
    pub init_size: u64,
    /// `kernel_alignment`: a load address must be a multiple of this power of two.
    pub alignment: u64,
    /// Whether it may be loaded elsewhere than at `pref_address`.
    pub relocatable: bool,
    /// The longest command line that the kernel takes, without its NUL.
    pub cmdline_size: usize,
    /// Highest address that an initrd's last byte may have.
    pub initrd_addr_max: u64,
    /// XLF_* flags; XLF_KERNEL_64 is among them.
    pub xloadflags: u16,
}

impl<'a> BzImage<'a> {
    /// Reads the setup header of `file` and finds the kernel.
    ///
    /// # Errors
    /// [`BzImageError`].
    pub fn read(file: &'a [u8]) -> Result<Self, BzImageError> {
        let has = |offset: usize, what: &[u8]| file.get(offset..).is_some_and(|rest| rest.starts_with(what));
        if has(0, b"MZ") && has(4, b"zimg") {
            return Err(BzImageError::Zboot);
        }
        for (offset, bytes, what) in [
            (0x1FE, &[0x55, 0xAA][..], "boot flag 55 AA"),
            (0x202, b"HdrS", "magic HdrS"),
        ] {
            if !has(offset, bytes) {
                return Err(BzImageError::Magic { offset, what });
            }
        }
        let version = u16::from_le_bytes(field(file, 0x206)?);
        if version < OLDEST {
            return Err(BzImageError::Version(version));
        }
        let xloadflags = u16::from_le_bytes(field(file, 0x236)?);
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BzImageError::NoEntry64(xloadflags));
        }
        let [loadflags] = field(file, 0x211)?;
        if loadflags & LOADED_HIGH == 0 {
            return refuse(
                "loadflags",
                loadflags,
                "must have LOADED_HIGH (a zImage cannot be booted)",
            );
        }
        let code = code(file)?;
        let image = Self {
            setup_header: setup_header(file)?,
            code,
            version,
            pref_address: u64::from_le_bytes(field(file, 0x258)?),
            init_size: u32::from_le_bytes(field(file, 0x260)?).into(),
            alignment: u32::from_le_bytes(field(file, 0x230)?).into(),
            relocatable: field::<1>(file, 0x234)? != [0],
            cmdline_size: usize::try_from(u32::from_le_bytes(field(file, 0x238)?)).unwrap_or(usize::MAX),
            initrd_addr_max: u32::from_le_bytes(field(file, 0x22C)?).into(),
            xloadflags,
        };
        image.check()?;
        Ok(image)
    }

    fn check(&self) -> Result<(), BzImageError> {
        if !self.alignment.is_power_of_two() {
            return refuse("kernel_alignment", self.alignment, "must be a power of two");
        }
        if self.pref_address < 1 << 20 || !self.pref_address.is_multiple_of(self.alignment.max(4096)) {
            return refuse(
                "pref_address",
                self.pref_address,
                "must be at or above 1 MiB, and a multiple of kernel_alignment and of 4096",
            );
        }
        if self.init_size < self.code.len() as u64 {
            return refuse(
                "init_size",
                self.init_size,
                "must be no less than the kernel's length (syssize)",
            );
        }
        if self.code.len() as u64 <= ENTRY_64 {
            return refuse(
                "syssize",
                self.code.len() as u64 / 16,
                "must reach behind the 64-bit entry at 0x200",
            );
        }
        Ok(())
    }

    /// The end of what it needs when it is loaded at its preferred address; saturates.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.pref_address.saturating_add(self.init_size)
    }
}

fn refuse<T>(field: &'static str, value: impl Into<u64>, rule: &'static str) -> Result<T, BzImageError> {
    Err(BzImageError::Field {
        field,
        value: value.into(),
        rule,
    })
}

fn field<const N: usize>(file: &[u8], offset: usize) -> Result<[u8; N], BzImageError> {
    let rest = file.get(offset..).and_then(|rest| rest.first_chunk::<N>());
    rest.copied().ok_or(BzImageError::Truncated {
        what: "setup header",
        end: offset.saturating_add(N),
        len: file.len(),
    })
}

/// The header's end is told by the jump over it.
fn setup_header(file: &[u8]) -> Result<&[u8], BzImageError> {
    let [jump] = field(file, 0x201)?;
    let end = 0x202 + usize::from(jump);
    if !(0x264..=SETUP_HEADER_END).contains(&end) {
        return refuse("jump", jump, "must end the setup header between 0x264 and 0x290");
    }
    file.get(SETUP_HEADER_OFFSET..end).ok_or(BzImageError::Truncated {
        what: "setup header",
        end,
        len: file.len(),
    })
}

/// The kernel proper: `syssize` paragraphs behind the setup sectors.
fn code(file: &[u8]) -> Result<&[u8], BzImageError> {
    let [sectors] = field(file, SETUP_HEADER_OFFSET)?;
    // 0 stands for 4, for the sake of the oldest kernels.
    let sectors = if sectors == 0 { 4 } else { usize::from(sectors) };
    let start = (sectors + 1) * SECTOR;
    let paragraphs = usize::try_from(u32::from_le_bytes(field(file, 0x1F4)?)).unwrap_or(usize::MAX);
    let end = start.saturating_add(paragraphs.saturating_mul(PARAGRAPH));
    if end.saturating_sub(file.len()) >= PARAGRAPH {
        let what = "kernel (syssize)";
        let len = file.len();
        return Err(BzImageError::Truncated { what, end, len });
    }
    Ok(file.get(start..end.min(file.len())).unwrap_or_default())
}

#[cfg(test)]
pub(crate) mod tests;
