//! The IGVM container: fixed header (versions 1 and 2), checksum, and the walk over the variable headers. Knows how
//! headers are framed, not what they mean. Reads in place; nothing is copied or allocated.

use igvm_defs::{
    IGVM_FIXED_HEADER, IGVM_FIXED_HEADER_V2, IGVM_FORMAT_VERSION_1, IGVM_FORMAT_VERSION_2, IGVM_MAGIC_VALUE,
    IGVM_VHT_OPTIONAL_BIT, IGVM_VHT_RANGE_DIRECTIVE, IGVM_VHT_RANGE_INIT, IGVM_VHT_RANGE_PLATFORM, IgvmArchitecture,
    IgvmVariableHeaderType as Vht, PAGE_SIZE_4K,
};
use zerocopy::FromBytes;

use super::error::{IgvmError, Reason};

/// Name under which errors of the fixed header are told.
pub(super) const FIXED_HEADER: &str = "fixed header";

/// The container of one file, checked.
#[derive(Clone, Copy, Debug)]
pub struct Container<'a> {
    file: &'a [u8],
    /// Format version, 1 or 2.
    pub format_version: u32,
    /// CRC32 of the headers.
    pub checksum: u32,
    /// Offset in bytes of the first variable header.
    pub headers_start: u64,
    /// Offset in bytes where the variable headers end and file data may start.
    pub data_start: u64,
}

/// One variable header.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    /// Type without the optional bit.
    pub typ: Vht,
    /// Whether a loader that does not know the type may pass it over.
    pub optional: bool,
    /// Position among the variable headers.
    pub index: usize,
    /// Offset in bytes in the file.
    pub offset: u64,
    /// Content, without type and length.
    pub content: &'a [u8],
}

impl Header<'_> {
    /// An error of this header.
    pub(super) fn error(&self, reason: Reason) -> IgvmError {
        IgvmError {
            header: type_name(self.typ),
            index: Some(self.index),
            offset: self.offset,
            reason,
        }
    }

    /// An error of a field of this header.
    pub(super) fn field(&self, field: &'static str, value: impl Into<u64>, rule: &'static str) -> IgvmError {
        self.error(Reason::Field {
            field,
            value: value.into(),
            rule,
        })
    }

    /// The content as the structure of its type.
    pub(super) fn read<T: FromBytes>(&self) -> Result<T, IgvmError> {
        T::read_from_bytes(self.content).map_err(|_| {
            self.error(Reason::Length {
                found: u32::try_from(self.content.len()).unwrap_or(u32::MAX),
                expected: size_of::<T>() as u64,
            })
        })
    }
}

/// Which of the three ordered sections a type belongs to (igvm_defs "Variable Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// Supported platforms.
    Platform,
    /// What a platform needs before data is loaded.
    Initialization,
    /// What is loaded.
    Directive,
}

impl Section {
    /// The section of a type, if it is in any.
    #[must_use]
    pub fn of(typ: Vht) -> Option<Self> {
        if IGVM_VHT_RANGE_PLATFORM.contains(&typ.0) {
            Some(Self::Platform)
        } else if IGVM_VHT_RANGE_INIT.contains(&typ.0) {
            Some(Self::Initialization)
        } else if IGVM_VHT_RANGE_DIRECTIVE.contains(&typ.0) {
            Some(Self::Directive)
        } else {
            None
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Initialization => "initialization",
            Self::Directive => "directive",
        }
    }
}

/// The name of a header type, as igvm_defs has it.
#[must_use]
pub fn type_name(typ: Vht) -> &'static str {
    match typ {
        Vht::IGVM_VHT_SUPPORTED_PLATFORM => "IGVM_VHT_SUPPORTED_PLATFORM",
        Vht::IGVM_VHT_GUEST_POLICY => "IGVM_VHT_GUEST_POLICY",
        Vht::IGVM_VHT_RELOCATABLE_REGION => "IGVM_VHT_RELOCATABLE_REGION",
        Vht::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION => "IGVM_VHT_PAGE_TABLE_RELOCATION_REGION",
        Vht(0x104) => "IGVM_VHT_CORIM_DOCUMENT",
        Vht(0x105) => "IGVM_VHT_CORIM_SIGNATURE",
        Vht::IGVM_VHT_CCA_POLICY => "IGVM_VHT_CCA_POLICY",
        Vht::IGVM_VHT_VERSION_STRING => "IGVM_VHT_VERSION_STRING",
        Vht::IGVM_VHT_PARAMETER_AREA => "IGVM_VHT_PARAMETER_AREA",
        Vht::IGVM_VHT_PAGE_DATA => "IGVM_VHT_PAGE_DATA",
        Vht::IGVM_VHT_PARAMETER_INSERT => "IGVM_VHT_PARAMETER_INSERT",
        Vht::IGVM_VHT_VP_CONTEXT => "IGVM_VHT_VP_CONTEXT",
        Vht::IGVM_VHT_REQUIRED_MEMORY => "IGVM_VHT_REQUIRED_MEMORY",
        Vht::RESERVED_DO_NOT_USE => "RESERVED_DO_NOT_USE",
        Vht::IGVM_VHT_VP_COUNT_PARAMETER => "IGVM_VHT_VP_COUNT_PARAMETER",
        Vht::IGVM_VHT_SRAT => "IGVM_VHT_SRAT",
        Vht::IGVM_VHT_MADT => "IGVM_VHT_MADT",
        Vht::IGVM_VHT_MMIO_RANGES => "IGVM_VHT_MMIO_RANGES",
        Vht::IGVM_VHT_SNP_ID_BLOCK => "IGVM_VHT_SNP_ID_BLOCK",
        Vht::IGVM_VHT_MEMORY_MAP => "IGVM_VHT_MEMORY_MAP",
        Vht::IGVM_VHT_ERROR_RANGE => "IGVM_VHT_ERROR_RANGE",
        Vht::IGVM_VHT_COMMAND_LINE => "IGVM_VHT_COMMAND_LINE",
        Vht::IGVM_VHT_SLIT => "IGVM_VHT_SLIT",
        Vht::IGVM_VHT_PPTT => "IGVM_VHT_PPTT",
        Vht::IGVM_VHT_VBS_MEASUREMENT => "IGVM_VHT_VBS_MEASUREMENT",
        Vht::IGVM_VHT_DEVICE_TREE => "IGVM_VHT_DEVICE_TREE",
        Vht::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER => "IGVM_VHT_ENVIRONMENT_INFO_PARAMETER",
        _ => "header of unknown type",
    }
}

impl<'a> Container<'a> {
    /// Reads and checks the fixed header and the checksum over it and the variable headers.
    ///
    /// # Errors
    /// Of the fixed header, with file offset 0.
    pub fn read(file: &'a [u8]) -> Result<Self, IgvmError> {
        let fail = |reason| IgvmError::file(FIXED_HEADER, 0, reason);
        let field = |field, value: u32, rule| {
            fail(Reason::Field {
                field,
                value: u64::from(value),
                rule,
            })
        };
        let have = file.len() as u64;
        let short = |needed: usize| {
            fail(Reason::Truncated {
                what: FIXED_HEADER,
                needed: needed as u64,
                have,
            })
        };
        let (fixed, _) =
            IGVM_FIXED_HEADER::read_from_prefix(file).map_err(|_| short(size_of::<IGVM_FIXED_HEADER>()))?;
        if fixed.magic != IGVM_MAGIC_VALUE {
            return Err(fail(Reason::Magic(fixed.magic)));
        }
        let fixed_len = match fixed.format_version {
            IGVM_FORMAT_VERSION_1 => size_of::<IGVM_FIXED_HEADER>(),
            IGVM_FORMAT_VERSION_2 => {
                let len = size_of::<IGVM_FIXED_HEADER_V2>();
                let (v2, _) = IGVM_FIXED_HEADER_V2::read_from_prefix(file).map_err(|_| short(len))?;
                match v2.architecture {
                    IgvmArchitecture::X64 => {}
                    IgvmArchitecture::AARCH64 => return Err(fail(Reason::Unsupported("architecture AARCH64"))),
                    other => return Err(field("architecture", other.0, "must be 0 (X64)")),
                }
                if u64::from(v2.page_size) != PAGE_SIZE_4K {
                    return Err(field("page_size", v2.page_size, "must be 4096"));
                }
                len
            }
            other => return Err(field("format_version", other, "must be 1 or 2")),
        };
        if u64::from(fixed.total_file_size) != have {
            return Err(field(
                "total_file_size",
                fixed.total_file_size,
                "must be the length of the file",
            ));
        }
        let start = fixed.variable_header_offset;
        if !start.is_multiple_of(8) || (start as usize) < fixed_len {
            return Err(field(
                "variable_header_offset",
                start,
                "must be a multiple of 8 behind the fixed header",
            ));
        }
        let headers_start = u64::from(start);
        let data_start = headers_start + u64::from(fixed.variable_header_size);
        if data_start > have {
            return Err(field(
                "variable_header_size",
                fixed.variable_header_size,
                "must end inside the file",
            ));
        }
        let container = Self {
            file,
            format_version: fixed.format_version,
            checksum: fixed.checksum,
            headers_start,
            data_start,
        };
        let computed = container.crc(fixed_len);
        if computed != fixed.checksum {
            return Err(fail(Reason::Checksum {
                found: fixed.checksum,
                computed,
            }));
        }
        Ok(container)
    }

    /// CRC32 (IEEE) over the fixed header with its checksum zero, and the variable headers.
    fn crc(&self, fixed_len: usize) -> u32 {
        const CHECKSUM_AT: usize = 20;
        let mut crc = crc32fast::Hasher::new();
        crc.update(self.file.get(..CHECKSUM_AT).unwrap_or_default());
        crc.update(&[0; 4]);
        crc.update(self.file.get(CHECKSUM_AT + 4..fixed_len).unwrap_or_default());
        crc.update(self.variable_headers());
        crc.finalize()
    }

    fn variable_headers(&self) -> &'a [u8] {
        let start = usize::try_from(self.headers_start).unwrap_or(usize::MAX);
        let end = usize::try_from(self.data_start).unwrap_or(usize::MAX);
        self.file.get(start..end).unwrap_or_default()
    }

    /// The variable headers in file order. After an error the walk ends.
    #[must_use]
    pub fn headers(&self) -> Headers<'a> {
        Headers {
            rest: self.variable_headers(),
            offset: self.headers_start,
            index: 0,
        }
    }

    /// `len` bytes of file data at `offset`.
    pub(super) fn data(&self, offset: u32, len: u64) -> Result<&'a [u8], Reason> {
        let start = u64::from(offset);
        let file_end = self.file.len() as u64;
        let outside = Reason::FileData {
            start,
            len,
            data_start: self.data_start,
            file_end,
        };
        if start < self.data_start {
            return Err(outside);
        }
        let slice = usize::try_from(start)
            .ok()
            .zip(start.checked_add(len).and_then(|end| usize::try_from(end).ok()))
            .and_then(|(start, end)| self.file.get(start..end));
        slice.ok_or(outside)
    }

    /// The whole file.
    #[must_use]
    pub fn file(&self) -> &'a [u8] {
        self.file
    }
}

/// Iterator over variable headers.
#[derive(Clone, Debug)]
pub struct Headers<'a> {
    rest: &'a [u8],
    offset: u64,
    index: usize,
}

impl<'a> Headers<'a> {
    fn step(&mut self) -> Result<Header<'a>, IgvmError> {
        let fail = |header, index, offset, reason| IgvmError {
            header,
            index: Some(index),
            offset,
            reason,
        };
        let (index, offset) = (self.index, self.offset);
        let have = self.rest.len() as u64;
        let truncated = |what, needed| Reason::Truncated { what, needed, have };
        let (tl, content) = <[u32; 2]>::read_from_prefix(self.rest)
            .map_err(|_| fail("variable header", index, offset, truncated("type and length", 8)))?;
        let [raw_type, length] = tl;
        let typ = Vht(raw_type & !IGVM_VHT_OPTIONAL_BIT);
        let name = type_name(typ);
        let len = length as usize;
        let content = content
            .get(..len)
            .ok_or_else(|| fail(name, index, offset, truncated("content", u64::from(length) + 8)))?;
        let used = len.saturating_add(8);
        // The next header starts 8-aligned. The last one may end where the section ends.
        let padded = used.next_multiple_of(8).min(self.rest.len());
        let padding = self.rest.get(used..padded).unwrap_or_default();
        if let Some(byte) = padding.iter().find(|byte| **byte != 0) {
            let reason = Reason::Field {
                field: "padding",
                value: u64::from(*byte),
                rule: "must be zero up to the next header",
            };
            return Err(fail(name, index, offset, reason));
        }
        self.rest = self.rest.get(padded..).unwrap_or_default();
        self.offset = offset.saturating_add(padded as u64);
        self.index = index.saturating_add(1);
        Ok(Header {
            typ,
            optional: raw_type & IGVM_VHT_OPTIONAL_BIT != 0,
            index,
            offset,
            content,
        })
    }
}

impl<'a> Iterator for Headers<'a> {
    type Item = Result<Header<'a>, IgvmError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let header = self.step();
        if header.is_err() {
            self.rest = &[];
        }
        Some(header)
    }
}
