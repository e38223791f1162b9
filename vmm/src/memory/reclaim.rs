//! RAM that the guest gives back to the host: private memory is dropped from this process, shared memory from the file
//! that everybody has mapped.
#![expect(unsafe_code, reason = "madvise of guest memory takes addresses")]

use std::io;
use std::sync::Arc;

use podvisor_devices::memory::Reclaim;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::hotplug::HotplugArea;
use super::{GuestRam, host_address};

/// The memory of a pod, as [`Reclaim`].
struct RamReclaim {
    ram: Vec<Arc<GuestRegionMmap>>,
    /// What came later.
    grown: Vec<Arc<HotplugArea>>,
}

/// A part of a region: where it begins in it, and how long it is.
struct Part<'r> {
    region: &'r GuestRegionMmap,
    offset: u64,
    len: u64,
}

impl GuestRam {
    /// The RAM and what the pod is given later, for the devices by which the guest gives it back.
    #[must_use]
    pub fn reclaim(&self, grown: Vec<Arc<HotplugArea>>) -> Arc<dyn Reclaim> {
        Arc::new(RamReclaim {
            ram: self.regions.clone(),
            grown,
        })
    }
}

impl RamReclaim {
    /// The regions' parts that make up `[gpa, gpa + len)`; an error if that is not all RAM.
    fn parts(&self, gpa: u64, len: u64) -> io::Result<Vec<Part<'_>>> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = gpa.checked_add(len).ok_or_else(outside)?;
        let mut parts = Vec::new();
        let mut at = gpa;
        while at < end {
            let region = self.ram.iter().find(|region| {
                let offset = at.checked_sub(region.start_addr().0);
                offset.is_some_and(|offset| offset < region.len())
            });
            let region = region.ok_or_else(outside)?;
            let offset = at.saturating_sub(region.start_addr().0);
            let len = end.saturating_sub(at).min(region.len().saturating_sub(offset));
            parts.push(Part { region, offset, len });
            at = at.saturating_add(len);
        }
        Ok(parts)
    }
}

impl Part<'_> {
    fn discard(&self) -> io::Result<()> {
        let shared = self.region.flags() & libc::MAP_SHARED != 0;
        match self.region.file_offset() {
            Some(file) if shared => {
                let offset = file.start().saturating_add(self.offset);
                fallocate(file.file(), FallocateMode::PunchHole, true, offset, self.len)
                    .map_err(|e| io::Error::from_raw_os_error(e.errno()))
            }
            _ => self.drop_private(),
        }
    }

    fn drop_private(&self) -> io::Result<()> {
        let address = usize::try_from(host_address(self.region).saturating_add(self.offset));
        let (Ok(address), Ok(len)) = (address, usize::try_from(self.len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: the range is a part of the region's mapping, which is guest memory: the guest changes it at any time and
        // nothing in this process counts on what it holds.
        let result = unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(address), len, libc::MADV_DONTNEED) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Reclaim for RamReclaim {
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        let grown = self.grown.iter().find_map(|grown| grown.give_back(gpa, len));
        grown.unwrap_or_else(|| self.parts(gpa, len)?.iter().try_for_each(Part::discard))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{RamOptions, Zone};

    /// Bytes of the process's memory that are `[0, 16 MiB)` of the guest's.
    fn resident(ram: &GuestRam) -> usize {
        let start = ram.slots().next().unwrap().host_addr;
        let mut pages = vec![0u8; (16 << 20) / 4096];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let result = unsafe {
            libc::mincore(
                std::ptr::with_exposed_provenance_mut(usize::try_from(start).unwrap()),
                16 << 20,
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() * 4096
    }

    #[test]
    fn what_is_given_back_is_the_hosts_again() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                ..Default::default()
            };
            let ram = GuestRam::new(16 << 20, &options).unwrap();
            let all = ram.launch_memory().unwrap();
            all.write_slice(&vec![1; 16 << 20], GuestAddress(0)).unwrap();
            assert_eq!(resident(&ram), 16 << 20);
            let reclaim = ram.reclaim(Vec::new());
            reclaim.discard(4 << 20, 8 << 20).unwrap();
            assert_eq!(resident(&ram), 8 << 20, "shared {shared}");
            assert_eq!(all.read_obj::<u8>(GuestAddress(4 << 20)).unwrap(), 0);
            assert_eq!(all.read_obj::<u8>(GuestAddress((4 << 20) - 1)).unwrap(), 1);
            assert_eq!(all.read_obj::<u8>(GuestAddress(12 << 20)).unwrap(), 1);
        }
    }

    #[test]
    fn what_is_not_all_ram_is_refused_before_anything_is_lost() {
        let options = RamOptions::default();
        let zone = |id: &str| Zone {
            id: id.to_owned(),
            size: 1 << 20,
            file: None,
            options,
            hotplug_size: 0,
            hotplugged_size: 0,
        };
        let ram = GuestRam::in_zones(&[zone("a"), zone("b")]).unwrap();
        let all = ram.launch_memory().unwrap();
        all.write_slice(&vec![1; 2 << 20], GuestAddress(0)).unwrap();
        let reclaim = ram.reclaim(Vec::new());
        for (gpa, len) in [(0, (2 << 20) + 1), (u64::MAX, 2), (2 << 20, 4096), (4096, u64::MAX)] {
            assert!(reclaim.discard(gpa, len).is_err());
        }
        assert_eq!(all.read_obj::<u8>(GuestAddress(4096)).unwrap(), 1);
        // Over the edge of two regions.
        reclaim.discard((1 << 20) - 4096, 8192).unwrap();
        for (gpa, byte) in [
            ((1 << 20) - 4097, 1),
            ((1 << 20) - 1, 0),
            (1 << 20, 0),
            ((1 << 20) + 4096, 1),
        ] {
            assert_eq!(all.read_obj::<u8>(GuestAddress(gpa)).unwrap(), byte);
        }
    }
}
