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

/// The regions of `memory`.
///
/// # Errors
/// When one of them is not a file that another process can map and see the same.
pub(super) fn regions(memory: &PodMemory) -> Result<Vec<Region>, VhostUserError> {
    let region = |region: &crate::memory::PodRegion| {
        let gpa = region.start_addr().0;
        let file = region.shared_file().ok_or(VhostUserError::PrivateMemory { gpa })?;
        Ok(Region {
            gpa,
            len: region.len(),
            offset: file.start(),
            file: Arc::clone(file.arc()),
        })
    };
    memory.iter().map(region).collect()
}
