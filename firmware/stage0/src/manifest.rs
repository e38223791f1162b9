//! The measured manifest: read and checked. It is measured, and still nothing in it is believed that can be checked.

use zerocopy::FromBytes;

use crate::abi::{self, Fixup, Manifest, Payload, Span};
use crate::refusal::Refusal;
use crate::{PAGE, layout, number};

/// Offset of the setup header in `boot_params` and in a bzImage (Linux x86 boot protocol).
pub const SETUP_HEADER: usize = 0x1F1;
/// Where the room for it in `boot_params` ends.
const SETUP_HEADER_END: usize = 0x290;
/// Least boot protocol: 2.12, the first with `xloadflags`.
const LEAST_PROTOCOL: u64 = 0x020C;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u64 = 1;

/// Bytes of memory, from `start` to below `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Range {
    /// Whether it shares a byte with `other`.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

/// What is to be booted, checked.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Pages that the manifest itself lies in.
    pub pages: Range,
    /// What goes to [`SETUP_HEADER`] of `boot_params`.
    pub setup_header: &'a [u8],
    /// GPA of the kernel command line.
    pub command_line: u64,
    /// DSDT, FADT, MCFG, each 16-aligned.
    pub acpi: &'a [u8],
    /// Numbers in the DSDT that depend on the width of addresses.
    pub fixups: &'a [Fixup],
    /// The kernel.
    pub kernel: Payload,
    /// The initrd; its length is 0 when there is none.
    pub initrd: Payload,
    /// GPA of the chunk digests.
    pub chunks: u64,
    /// How many.
    pub chunk_count: usize,
    /// What pins them.
    pub chunks_digest: [u8; abi::DIGEST_LEN],
}

fn wrong(what: &'static str, value: u64) -> Refusal {
    Refusal::Manifest { what, value }
}

fn span<'a>(bytes: &'a [u8], span: Span, what: &'static str) -> Result<&'a [u8], Refusal> {
    let start = span.offset as usize;
    start
        .checked_add(span.len as usize)
        .filter(|_| start >= size_of::<Manifest>())
        .and_then(|end| bytes.get(start..end))
        .ok_or(wrong(what, u64::from(span.offset)))
}

/// Whether a payload lies where it is used.
#[must_use]
pub fn in_place(payload: &Payload) -> bool {
    payload.staged == payload.dest
}

/// How many chunks `len` bytes have.
#[must_use]
pub fn chunks_of(len: u64) -> u64 {
    len.div_ceil(abi::CHUNK_SIZE)
}

/// The pages of `[start, start + len)`, up to the end of what can be counted.
#[must_use]
pub fn pages(start: u64, len: u64) -> Range {
    Range {
        start,
        end: start
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(PAGE))
            .unwrap_or(u64::MAX),
    }
}

/// Reads the length of the manifest that begins with `head`.
///
/// # Errors
/// [`Refusal::Manifest`] when it is none, or longer than its room.
pub fn length(head: &[u8]) -> Result<usize, Refusal> {
    let (manifest, _) = Manifest::read_from_prefix(head).map_err(|_| wrong("too short", head.len() as u64))?;
    if manifest.magic != abi::MAGIC {
        return Err(wrong("no manifest", u64::from_le_bytes(manifest.magic)));
    }
    if manifest.version != abi::VERSION {
        return Err(wrong("version", u64::from(manifest.version)));
    }
    let room = abi::MANIFEST_END - abi::MANIFEST_START;
    if (manifest.len as usize) < size_of::<Manifest>() || u64::from(manifest.len) > room {
        return Err(wrong("length", u64::from(manifest.len)));
    }
    Ok(manifest.len as usize)
}

/// Checks the manifest in `bytes`, which lies at `abi::MANIFEST_START` and is as long as [`length`] says.
///
/// # Errors
/// [`Refusal::Manifest`] naming the field.
pub fn read(bytes: &[u8], snp: bool) -> Result<Image<'_>, Refusal> {
    let len = length(bytes)?;
    let bytes = bytes.get(..len).ok_or(wrong("length", len as u64))?;
    let (manifest, _) = Manifest::read_from_prefix(bytes).map_err(|_| wrong("too short", len as u64))?;
    if manifest.flags != 0 {
        return Err(wrong("flags", u64::from(manifest.flags)));
    }
    let setup_header = span(bytes, manifest.setup_header, "setup_header")?;
    check_setup_header(setup_header, &manifest.kernel)?;
    let text = span(bytes, manifest.command_line, "command_line")?;
    check_command_line(text, setup_header)?;
    let fixups = span(bytes, manifest.fixups, "fixups")?;
    let fixups = <[Fixup]>::ref_from_bytes(fixups).map_err(|_| wrong("fixups", u64::from(manifest.fixups.offset)))?;
    let image = Image {
        pages: pages(abi::MANIFEST_START, len as u64),
        setup_header,
        command_line: abi::MANIFEST_START + u64::from(manifest.command_line.offset),
        acpi: span(bytes, manifest.acpi, "acpi")?,
        fixups,
        kernel: manifest.kernel,
        initrd: manifest.initrd,
        chunks: manifest.chunks,
        chunk_count: manifest.chunk_count as usize,
        chunks_digest: manifest.chunks_digest,
    };
    image.check_places(snp)?;
    Ok(image)
}

/// Reads a field of the setup header by its offset in `boot_params`.
fn header_field<const N: usize>(header: &[u8], offset: usize) -> Option<u64> {
    number::<N>(header, offset.checked_sub(SETUP_HEADER)?)
}

fn check_setup_header(header: &[u8], kernel: &Payload) -> Result<(), Refusal> {
    const MAGIC: u64 = 0x5372_6448; // "HdrS"
    let field = || wrong("setup_header.len", header.len() as u64);
    if header.len() > SETUP_HEADER_END - SETUP_HEADER {
        return Err(field());
    }
    let magic = header_field::<4>(header, 0x202).ok_or_else(field)?;
    if magic != MAGIC {
        return Err(wrong("setup_header.header", magic));
    }
    let version = header_field::<2>(header, 0x206).ok_or_else(field)?;
    if version < LEAST_PROTOCOL {
        return Err(wrong("setup_header.version", version));
    }
    let flags = header_field::<2>(header, 0x236).ok_or_else(field)?;
    if flags & XLF_KERNEL_64 == 0 {
        return Err(wrong("setup_header.xloadflags", flags));
    }
    let init_size = header_field::<4>(header, 0x260).ok_or_else(field)?;
    if init_size > kernel.memory_len {
        return Err(wrong("setup_header.init_size", init_size));
    }
    Ok(())
}

fn check_command_line(text: &[u8], header: &[u8]) -> Result<(), Refusal> {
    let most = header_field::<4>(header, 0x238).unwrap_or(0);
    let Some((0, text)) = text.split_last() else {
        return Err(wrong("command_line has no end", text.len() as u64));
    };
    if text.contains(&0) || text.len() as u64 > most {
        return Err(wrong("command_line.len", text.len() as u64));
    }
    Ok(())
}

impl Image<'_> {
    /// The payloads with their names; an initrd that is not there is left out.
    pub fn payloads(&self) -> impl Iterator<Item = &Payload> {
        [&self.kernel, &self.initrd]
            .into_iter()
            .filter(|payload| payload.len > 0)
    }

    /// Whether nothing is to be copied. Under SEV-SNP all of it, chunk digests included, is measured and private then.
    #[must_use]
    pub fn all_in_place(&self) -> bool {
        self.payloads().all(in_place)
    }

    /// The pages of the chunk digests.
    #[must_use]
    pub fn chunk_pages(&self) -> Range {
        pages(self.chunks, (self.chunk_count * abi::DIGEST_LEN) as u64)
    }

    fn check_places(&self, snp: bool) -> Result<(), Refusal> {
        let count = chunks_of(self.kernel.len) + chunks_of(self.initrd.len);
        if self.chunk_count > abi::MAX_CHUNKS || count != self.chunk_count as u64 {
            return Err(wrong("chunk_count", self.chunk_count as u64));
        }
        if self.kernel.len == 0 {
            return Err(wrong("kernel.len", 0));
        }
        let entry = self.kernel.entry;
        if entry < self.kernel.dest || entry - self.kernel.dest >= self.kernel.len {
            return Err(wrong("kernel.entry", entry));
        }
        // Where they are used, where they come from, and the digests: apart from each other.
        let mut places = [Range::default(); 5];
        let mut used = 0;
        let mut add = |range: Range, what: &'static str| {
            let fits = range.start.is_multiple_of(PAGE)
                && range.start >= abi::STAGE0_END
                && range.start < range.end
                && range.end <= layout::MEM_32BIT_RESERVED_START;
            let met = places.iter().take(used).any(|place| place.meets(&range));
            match places.get_mut(used) {
                Some(place) if fits && !met => *place = range,
                _ => return Err(wrong(what, range.start)),
            }
            used += 1;
            Ok(())
        };
        for payload in self.payloads() {
            if payload.memory_len < payload.len {
                return Err(wrong("memory_len", payload.memory_len));
            }
            add(pages(payload.dest, payload.memory_len), "dest")?;
            if !in_place(payload) {
                add(pages(payload.staged, payload.len), "staged")?;
            } else if snp && !self.all_in_place() {
                return Err(wrong("staged in place", payload.staged));
            }
        }
        add(self.chunk_pages(), "chunks")
    }
}
