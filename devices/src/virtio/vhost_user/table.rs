//! The pod's memory as a back end maps it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::VhostUserError;
use crate::memory::PodMemory;

/// What is added to a guest physical address to make the "user address" of the protocol. It only has to be the same in
/// the memory table and for the rings: this process's own addresses are nobody else's business. Not zero, for a back
/// end may take address 0 for none.
const USER_BASE: u64 = 1 << 46;

/// The protocol's name for guest physical address `gpa`, in messages about rings.
pub(super) fn user_address(gpa: u64) -> u64 {
    gpa.wrapping_add(USER_BASE)
}

/// One region of the pod's memory.
#[derive(Clone, Debug)]
pub(super) struct Region {
    gpa: u64,
    len: u64,
    offset: u64,
    file: Arc<File>,
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        (self.gpa, self.len, self.offset) == (other.gpa, other.len, other.offset)
            && Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Region {
    /// As an entry of the table.
    pub(super) fn entry(&self) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(self.gpa, self.len, user_address(self.gpa), self.offset)
    }

    /// As the body of a message about one region.
    pub(super) fn single(&self) -> VhostUserSingleMemoryRegion {
        VhostUserSingleMemoryRegion::new(self.gpa, self.len, user_address(self.gpa), self.offset)
    }

    /// What has to be mapped.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The regions of `memory`: those parts of it that may be lent.
///
/// # Errors
/// When one of them is not a file that another process can map and see the same.
pub(super) fn regions(memory: &PodMemory) -> Result<Vec<Region>, VhostUserError> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().0;
        let file = region
            .shared_file()
            .ok_or(VhostUserError::PrivateMemory { gpa: start })?;
        all.extend(region.lendable().into_iter().map(|(gpa, len)| Region {
            gpa,
            len,
            offset: file.start().saturating_add(gpa.saturating_sub(start)),
            file: Arc::clone(file.arc()),
        }));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    use super::*;
    use crate::memory::{PodRegion, SharedPages};

    struct Parts(Vec<(u64, u64)>);

    impl SharedPages for Parts {
        fn is_shared(&self, _: u64, _: u64) -> bool {
            false
        }

        fn lendable(&self) -> Option<Vec<(u64, u64)>> {
            Some(self.0.clone())
        }
    }

    #[test]
    fn parts_of_a_region_are_told_with_their_place_in_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x9000).unwrap();
        let map = GuestRegionMmap::from_range(GuestAddress(0x10_0000), 0x8000, Some(FileOffset::new(file, 0x1000)));
        let map = Arc::new(map.unwrap());
        let told = |parts: Vec<(u64, u64)>| {
            let region = PodRegion::new(Arc::clone(&map), Some(Arc::new(Parts(parts))));
            let all = regions(&PodMemory::from_regions(vec![region]).unwrap()).unwrap();
            all.iter().map(|r| (r.gpa, r.len, r.offset)).collect::<Vec<_>>()
        };
        assert!(told(Vec::new()).is_empty());
        let parts = vec![(0x10_0000, 0x1000), (0x10_4000, 0x2000)];
        assert_eq!(told(parts), [(0x10_0000, 0x1000, 0x1000), (0x10_4000, 0x2000, 0x5000)]);
        let whole = PodMemory::from_regions(vec![PodRegion::new(Arc::clone(&map), None)]).unwrap();
        assert_eq!(regions(&whole).unwrap().len(), 1);
    }
}
