//! Zeroing guest RAM pages that change between private and shared. Large runs are given back to the kernel instead of
//! being written, so that a conversion of gigabytes neither takes long nor makes the process grow.
#![expect(
    unsafe_code,
    reason = "madvise and fallocate on the guest's RAM mapping have no safe wrapper"
)]

use std::os::fd::AsRawFd;

use crate::digest::PAGE_LEN;
use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// From this many pages on a run is given back rather than written.
const GIVE_BACK: u64 = 64;

/// Makes `pages` pages from frame `gfn` read as zeros.
///
/// # Errors
/// When part of the range is not in `memory`.
pub(crate) fn scrub(memory: &GuestMemoryMmap<()>, gfn: u64, pages: u64) -> Result<(), GuestMemoryError> {
    scrub_from(memory, gfn, pages, GIVE_BACK)
}

/// As [`scrub`], and gives the memory of every page back to the kernel where the mapping is of a kind that can.
///
/// # Errors
/// When part of the range is not in `memory`.
pub(crate) fn give_up(memory: &GuestMemoryMmap<()>, gfn: u64, pages: u64) -> Result<(), GuestMemoryError> {
    scrub_from(memory, gfn, pages, 1)
}

fn scrub_from(memory: &GuestMemoryMmap<()>, gfn: u64, pages: u64, give_back_from: u64) -> Result<(), GuestMemoryError> {
    let mut at = GuestAddress(gfn.saturating_mul(PAGE_SIZE));
    let mut left = pages.saturating_mul(PAGE_SIZE);
    while left > 0 {
        let (region, offset) = memory
            .to_region_addr(at)
            .ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
        let here = left.min(region.len() - offset.0);
        if here < give_back_from * PAGE_SIZE || !give_back(region, offset, here) {
            write_zeros(region, offset, here)?;
        }
        left -= here;
        at = at.unchecked_add(here);
    }
    Ok(())
}

fn write_zeros(region: &GuestRegionMmap<()>, offset: MemoryRegionAddress, len: u64) -> Result<(), GuestMemoryError> {
    let zeros = [0; PAGE_LEN];
    for page in 0..len / PAGE_SIZE {
        region.write_slice(&zeros, MemoryRegionAddress(offset.0 + page * PAGE_SIZE))?;
    }
    Ok(())
}

/// Drops the pages behind the range; false when the mapping is of a kind where that would not leave zeros.
fn give_back(region: &GuestRegionMmap<()>, offset: MemoryRegionAddress, len: u64) -> bool {
    let (Ok(start), Ok(length)) = (region.get_host_address(offset), usize::try_from(len)) else {
        return false;
    };
    let shared = region.flags() & libc::MAP_SHARED != 0;
    match (region.file_offset(), shared) {
        (Some(file), true) => {
            let from = file
                .start()
                .checked_add(offset.0)
                .and_then(|from| libc::off64_t::try_from(from).ok());
            let (Some(from), Ok(length)) = (from, libc::off64_t::try_from(len)) else {
                return false;
            };
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: plain integers on a descriptor that `region` keeps open; no memory is passed.
            unsafe { libc::fallocate64(file.file().as_raw_fd(), mode, from, length) == 0 }
        }
        (None, private) => {
            let advice = if private {
                libc::MADV_REMOVE
            } else {
                libc::MADV_DONTNEED
            };
            // SAFETY: `[start, start + length)` lies inside the mapping that `region` owns (checked by the caller
            // against the region's length); Rust code holds no reference into guest RAM, only volatile accessors,
            // and an anonymous page that is dropped reads as zeros afterwards.
            unsafe { libc::madvise(start.cast(), length, advice) == 0 }
        }
        (Some(_), false) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_runs_read_as_zeros_and_neighbours_stay() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 200 * 4096),
            (GuestAddress(200 * 4096), 100 * 4096),
        ])
        .unwrap();
        for (gfn, pages) in [(3, 2), (10, 100), (150, 120)] {
            memory.write_slice(&vec![0xAA; 300 * 4096], GuestAddress(0)).unwrap();
            scrub(&memory, gfn, pages).unwrap();
            let mut all = vec![0; 300 * 4096];
            memory.read_slice(&mut all, GuestAddress(0)).unwrap();
            for (page, bytes) in all.chunks(4096).enumerate() {
                let want = if (gfn..gfn + pages).contains(&(page as u64)) {
                    0
                } else {
                    0xAA
                };
                assert!(bytes.iter().all(|byte| *byte == want), "page {page}");
            }
        }
        assert!(scrub(&memory, 299, 2).is_err());
    }

    #[test]
    fn a_shared_file_mapping_is_punched() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(128 * 4096).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([(
            GuestAddress(0),
            128 * 4096,
            Some(vm_memory::FileOffset::new(file, 0)),
        )])
        .unwrap();
        memory.write_slice(&vec![0x55; 128 * 4096], GuestAddress(0)).unwrap();
        scrub(&memory, 8, 100).unwrap();
        let mut all = vec![0; 128 * 4096];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all[8 * 4096..108 * 4096].iter().all(|byte| *byte == 0));
        assert!(
            all[..8 * 4096]
                .iter()
                .chain(&all[108 * 4096..])
                .all(|byte| *byte == 0x55)
        );
    }
}
