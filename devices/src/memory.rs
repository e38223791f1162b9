//! Guest memory as devices see it. Every access, whatever crate makes it, goes through [`PodRegion::get_slice`],
//! which hands out shared pages only; a private, absent or wrapping address is an error of that one access.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection,
    GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// Tells which guest pages devices may touch.
pub trait SharedPages: Send + Sync {
    /// Whether every byte of `[gpa, gpa + len)` is shared. On the data path: lock-free.
    fn is_shared(&self, gpa: u64, len: u64) -> bool;

    /// The parts of the region, as (GPA, length), that another process may be lent; None: all of it. It is asked again
    /// when the pod's memory changes.
    fn lendable(&self) -> Option<Vec<(u64, u64)>> {
        None
    }
}

/// Takes back and provides the host's memory behind guest pages. Devices by which a guest returns memory call it; the
/// monitor does it.
pub trait Reclaim: Send + Sync {
    /// The host may take the memory behind `[gpa, gpa + len)` back; the guest no longer counts on what is in it, and
    /// what it reads there later is undefined or zero. Parts that hold nothing are allowed.
    ///
    /// # Errors
    /// When the range is not the pod's RAM or the host refuses; then nothing was lost.
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()>;

    /// The guest is about to use `[gpa, gpa + len)` (again). By default that needs nothing: pages come as they are
    /// touched.
    ///
    /// # Errors
    /// When the host cannot provide it.
    fn provide(&self, _gpa: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// One RAM region of a pod.
pub struct PodRegion {
    inner: Arc<GuestRegionMmap>,
    gate: Option<Arc<dyn SharedPages>>,
}

/// All RAM of a pod, as devices may use it. Access goes by guest address (`Bytes<GuestAddress>`, `get_slices`), page by
/// page; access by offset into a region is all or nothing, for vm-memory takes one slice of the whole region for it.
pub type PodMemory = GuestRegionCollection<PodRegion>;

impl PodRegion {
    /// Wraps `inner`. `gate` is None for a pod that is not confidential: all pages are shared.
    #[must_use]
    pub fn new(inner: Arc<GuestRegionMmap>, gate: Option<Arc<dyn SharedPages>>) -> Self {
        Self { inner, gate }
    }

    /// What another process may be lent of the region, as (GPA, length).
    #[must_use]
    pub fn lendable(&self) -> Vec<(u64, u64)> {
        let whole = || vec![(self.inner.start_addr().0, self.inner.len())];
        self.gate
            .as_ref()
            .and_then(|gate| gate.lendable())
            .unwrap_or_else(whole)
    }

    /// The file and offset behind the region, if what is written to the one is seen in the other: another process that
    /// maps the file sees the pod's memory. None for anonymous and private mappings.
    #[must_use]
    pub fn shared_file(&self) -> Option<&FileOffset> {
        self.inner
            .file_offset()
            .filter(|_| self.inner.flags() & libc::MAP_SHARED != 0)
    }
}

impl std::fmt::Debug for PodRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PodRegion({:#x}+{:#x})", self.inner.start_addr().0, self.inner.len())
    }
}

impl GuestMemoryRegion for PodRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn file_offset(&self) -> Option<&FileOffset> {
        self.inner.file_offset()
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        if let Some(gate) = &self.gate {
            let gpa = GuestAddress(self.inner.start_addr().0.wrapping_add(offset.0));
            if !gate.is_shared(gpa.0, count as u64) {
                return Err(GuestMemoryError::InvalidGuestAddress(gpa));
            }
        }
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for PodRegion {}

pub mod blocks;

#[cfg(test)]
mod tests;
