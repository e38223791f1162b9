//! The parameter pages. The host wrote them, so they are checked before anything is believed: what makes no sense stops
//! the pod with a reason.

use alloc::string::String;
use alloc::vec;

use crate::layout;
use crate::window::Shared;

const PAGE: u64 = 4096;
const ENTRY_LEN: usize = 24;
/// `MEMORY_MAP` entry type of ordinary memory (`igvm_defs::MemoryMapEntryType`).
const MEMORY: u16 = 0;

/// What the host says about the machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// The command line.
    pub command_line: String,
}

/// Reads and checks the parameter pages.
///
/// # Errors
/// Says which parameter makes no sense.
pub fn read() -> Result<Parameters, &'static str> {
    let vcpus: u32 = Shared::parameter_page(layout::VP_COUNT_PAGE).get(0);
    if vcpus == 0 || vcpus > 4096 {
        return Err("VP_COUNT parameter is not in 1..=4096");
    }
    let mut page = vec![0; PAGE as usize];
    Shared::parameter_page(layout::MEMORY_MAP_PAGE).read(0, &mut page);
    let memory = memory_map(&page)?;
    Shared::parameter_page(layout::COMMAND_LINE_PAGE).read(0, &mut page);
    Ok(Parameters {
        vcpus,
        memory,
        command_line: command_line(&page)?,
    })
}

/// Checks a memory map and returns the bytes of RAM in it.
fn memory_map(page: &[u8]) -> Result<u64, &'static str> {
    let (mut previous_end, mut total, mut used) = (0, 0_u64, layout::CPUID_PAGE);
    for entry in page.chunks_exact(ENTRY_LEN) {
        let word = |at: usize| {
            entry
                .get(at..)
                .and_then(<[u8]>::first_chunk)
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        let (start, pages, kind) = (word(0), word(8), word(16) as u16);
        if pages == 0 {
            return if used >= layout::USED_END {
                Ok(total)
            } else {
                Err("memory map has no RAM at 1..60 MiB")
            };
        }
        let end = start.checked_add(pages).filter(|end| *end <= u64::MAX / PAGE);
        let Some(end) = end.filter(|_| start >= previous_end) else {
            return Err("memory map is not sorted or wraps");
        };
        previous_end = end;
        if kind == MEMORY {
            total += pages * PAGE;
            if start * PAGE <= used {
                used = used.max(end * PAGE);
            }
        }
    }
    Err("memory map has no end")
}

fn command_line(page: &[u8]) -> Result<String, &'static str> {
    let text = page
        .split(|byte| *byte == 0)
        .next()
        .filter(|text| text.len() < page.len());
    let text = text.and_then(|text| core::str::from_utf8(text).ok());
    match text {
        Some(text) if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) => Ok(String::from(text)),
        _ => Err("COMMAND_LINE parameter is not NUL-terminated printable ASCII"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(u64, u64, u16)]) -> alloc::vec::Vec<u8> {
        let mut page = vec![0; 4096];
        for (entry, chunk) in entries.iter().zip(page.chunks_exact_mut(ENTRY_LEN)) {
            chunk[..8].copy_from_slice(&entry.0.to_le_bytes());
            chunk[8..16].copy_from_slice(&entry.1.to_le_bytes());
            chunk[16..18].copy_from_slice(&entry.2.to_le_bytes());
        }
        page
    }

    #[test]
    fn a_split_map_is_summed() {
        let page = map(&[
            (0, 0xA0, 0),
            (0xA0, 0x60, 1),
            (0x100, 0x1_0000, 0),
            (0x10_0000, 0x100, 0),
        ]);
        assert_eq!(memory_map(&page), Ok((0xA0 + 0x1_0000 + 0x100) * 4096));
    }

    #[test]
    fn hostile_maps_are_refused() {
        assert!(memory_map(&map(&[(0, 0x100, 0)])).is_err(), "too small");
        assert!(memory_map(&map(&[(0x100, 0x1_0000, 1)])).is_err(), "not RAM");
        assert!(
            memory_map(&map(&[(0, 0x2_0000, 0), (0x1_0000, 1, 0)])).is_err(),
            "overlap"
        );
        assert!(memory_map(&map(&[(0, u64::MAX, 0)])).is_err(), "wraps");
        assert!(memory_map(&map(&[(u64::MAX, 2, 0)])).is_err(), "wraps");
        assert!(memory_map(&vec![0xFF; 4096]).is_err(), "garbage");
        let endless: alloc::vec::Vec<_> = (0..170).map(|i| (i * 0x1_0000, 0x1_0000, 0)).collect();
        assert!(memory_map(&map(&endless)).is_err(), "no end");
    }

    #[test]
    fn command_lines() {
        assert_eq!(command_line(b"a b\0\0").as_deref(), Ok("a b"));
        assert_eq!(command_line(b"\0").as_deref(), Ok(""));
        assert!(command_line(b"abc").is_err());
        assert!(command_line(b"a\nb\0").is_err());
        assert!(command_line(b"\xff\0").is_err());
    }
}
