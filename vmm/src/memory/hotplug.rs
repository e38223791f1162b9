//! Address space for memory that a running pod may be given: reserved at boot, which costs no memory, and filled piece by
//! piece. Devices have all of it in their view from the start and are kept out of what holds no memory by its
//! [`Blocks`]; vCPUs are kept out by KVM's memory slots. Which piece comes when is decided elsewhere.
#![expect(unsafe_code, reason = "mprotect and madvise of guest memory take addresses")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use podvisor_devices::memory::blocks::Blocks;
use podvisor_devices::memory::{PodRegion, Reclaim, SharedPages};
use podvisor_devices::virtio::mem::BLOCK_SIZE;
use podvisor_firmware::layout;
use podvisor_snp::processor::MemoryRegion;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::{RamError, RamOptions, advise, host_address, map, set_slot};
use crate::sys::{self, MemoryAdvice};

/// The end of KVM's memory slots for this memory, which are behind those of RAM: the slots from it on are of files.
pub const END_SLOT: u32 = 1024;

/// How the area is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filling {
    /// By the monitor, in pieces of [`layout::MEMORY_BLOCK_SIZE`], for good.
    ByPiece,
    /// By the guest, in blocks that it plugs and unplugs through a virtio-mem device.
    ByGuest,
}

/// The area.
pub struct HotplugArea {
    vm: Arc<VmFd>,
    region: Arc<GuestRegionMmap>,
    blocks: Arc<Blocks>,
    options: RamOptions,
    filling: Filling,
    /// The first of its memory slots.
    first_slot: u32,
    /// What is mapped for the guest at a time, if it fills the area.
    chunk: u64,
    /// Chunks that are mapped.
    mapped: Mutex<BTreeSet<u64>>,
    /// Bytes that the guest was allowed last.
    allowed: AtomicU64,
}

/// Devices may touch what has come; other processes are told of that only.
struct Pieces(Arc<Blocks>);

impl SharedPages for Pieces {
    fn is_shared(&self, gpa: u64, len: u64) -> bool {
        self.0.is_shared(gpa, len)
    }

    fn lendable(&self) -> Option<Vec<(u64, u64)>> {
        Some(self.0.runs())
    }
}

/// Where the area of a pod is whose RAM ends at `ram_end`: behind it and above 4 GiB, up to `size` bytes and below
/// `limit`. Empty when there is no room.
#[must_use]
pub fn place(ram_end: u64, size: u64, limit: u64, filling: Filling) -> Range<u64> {
    let step = match filling {
        Filling::ByPiece => layout::MEMORY_BLOCK_SIZE,
        Filling::ByGuest => BLOCK_SIZE,
    };
    let start = ram_end.max(layout::RAM_64BIT_START);
    let start = start
        .checked_next_multiple_of(layout::MEMORY_BLOCK_SIZE)
        .unwrap_or(limit);
    let room = limit.saturating_sub(start).min(size);
    start..start.saturating_add(room - room % step)
}

impl HotplugArea {
    /// Reserves `range` ([`place`]) of the address space of the pod in `vm`, whose memory slots `slots` it uses.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn reserve(
        vm: Arc<VmFd>,
        slots: Range<u32>,
        range: Range<u64>,
        filling: Filling,
        options: &RamOptions,
    ) -> Result<Self, RamError> {
        let (gpa, len) = (range.start, range.end.saturating_sub(range.start));
        let fail = |source| RamError::Map { gpa, len, source };
        let block = match filling {
            Filling::ByPiece => layout::MEMORY_BLOCK_SIZE,
            Filling::ByGuest => BLOCK_SIZE,
        };
        let blocks = Blocks::new(gpa, len, block).map_err(|e| fail(io::Error::other(e)))?;
        let region = map(gpa, len, options, libc::PROT_NONE).map_err(fail)?;
        let count = u64::try_from(slots.len()).unwrap_or(0).max(1);
        let chunk = layout::MEMORY_BLOCK_SIZE.max(len.div_ceil(count).next_power_of_two());
        Ok(Self {
            vm,
            region: Arc::new(region),
            blocks: Arc::new(blocks),
            options: *options,
            filling,
            first_slot: slots.start,
            chunk,
            mapped: Mutex::default(),
            allowed: AtomicU64::new(0),
        })
    }

    /// The area as devices see it.
    #[must_use]
    pub fn pod_region(&self) -> PodRegion {
        let gate: Arc<dyn SharedPages> = match self.filling {
            Filling::ByPiece => Arc::new(Pieces(Arc::clone(&self.blocks))),
            Filling::ByGuest => Arc::clone(&self.blocks) as _,
        };
        PodRegion::new(Arc::clone(&self.region), Some(gate))
    }

    /// How it is filled.
    #[must_use]
    pub fn filling(&self) -> Filling {
        self.filling
    }

    /// Which of it holds memory.
    #[must_use]
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    /// Lets the guest have `bytes` of an area that it fills: no more than that is mapped for it.
    pub fn allow(&self, bytes: u64) {
        self.allowed.store(bytes, Ordering::Release);
    }

    /// Puts memory at `[gpa, gpa + len)`, piece number `piece`, for vCPUs and devices.
    ///
    /// # Errors
    /// When the range is not free whole blocks, or the host refuses; nothing is there then.
    pub fn fill(&self, piece: u32, gpa: u64, len: u64) -> Result<(), RamError> {
        let fail = |source| RamError::Slot { gpa, len, source };
        let range = self.free_blocks(gpa, len).map_err(fail)?;
        self.open(gpa, len)?;
        set_slot(&self.vm, &self.slot(piece, gpa, len)).map_err(fail)?;
        self.blocks.set(range, true);
        Ok(())
    }

    /// Gives the host's memory behind `[gpa, gpa + len)` back, that the guest keeps and reads zeros from; None if it is not
    /// in the area.
    pub fn give_back(&self, gpa: u64, len: u64) -> Option<io::Result<()>> {
        let offset = gpa.checked_sub(self.blocks.start())?;
        (offset.checked_add(len)? <= self.blocks.size()).then(|| self.release(gpa, len))
    }

    /// Takes back what [`HotplugArea::fill`] put, before the guest was told of it.
    pub fn empty(&self, piece: u32, gpa: u64, len: u64) {
        let range = self.blocks.range(gpa, len / self.blocks.block_size());
        self.blocks.set(range.unwrap_or_default(), false);
        let gone = set_slot(&self.vm, &self.slot(piece, gpa, 0)).map_err(|e| ("taking a memory slot", e));
        if let Err((what, error)) = gone.and_then(|()| self.release(gpa, len).map_err(|e| ("freeing memory", e))) {
            tracing::warn!(gpa, len, %error, "{what} of memory that was not wanted");
        }
    }

    fn free_blocks(&self, gpa: u64, len: u64) -> io::Result<Range<u64>> {
        let block = self.blocks.block_size();
        let range = self
            .blocks
            .range(gpa, len / block)
            .filter(|_| len.is_multiple_of(block));
        range
            .filter(|range| self.blocks.count(range.clone()) == 0)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    fn slot(&self, number: u32, gpa: u64, len: u64) -> MemoryRegion {
        MemoryRegion {
            slot: self.first_slot.saturating_add(number),
            gpa,
            len,
            host_addr: self.host(gpa),
        }
    }

    fn host(&self, gpa: u64) -> u64 {
        host_address(&self.region).saturating_add(gpa.saturating_sub(self.blocks.start()))
    }

    /// Makes `[gpa, gpa + len)`, which is in the area, memory of this process. It stays that: a device thread that
    /// passed the gate before it closed must not fault.
    fn open(&self, gpa: u64, len: u64) -> Result<(), RamError> {
        let fail = |source| RamError::Map { gpa, len, source };
        let size = usize::try_from(len).map_err(|e| fail(io::Error::other(e)))?;
        let address = usize::try_from(self.host(gpa)).map_err(|e| fail(io::Error::other(e)))?;
        let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(address);
        if let (true, Some(file)) = (self.options.hugepages, self.region.file_offset()) {
            // A touch without a huge page would be the monitor's end: they are taken before.
            let offset = file.start().saturating_add(gpa.saturating_sub(self.blocks.start()));
            fallocate(file.file(), 0, offset, len).map_err(fail)?;
        }
        // SAFETY: the range is in the mapping of `region`, which nothing but guest memory lives in; access is only added.
        if unsafe { libc::mprotect(address, size, libc::PROT_READ | libc::PROT_WRITE) } < 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        let mut options = self.options;
        // Of what a guest fills, only its blocks come at once.
        options.prefault &= self.filling == Filling::ByPiece;
        advise(self.host(gpa), len, gpa, &options)
    }

    /// Gives the host's memory behind `[gpa, gpa + len)`, which is in the area, back; zeros are read there then.
    fn release(&self, gpa: u64, len: u64) -> io::Result<()> {
        if let Some(file) = self.region.file_offset() {
            let offset = gpa.saturating_sub(self.blocks.start());
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            return fallocate(file.file(), mode, file.start().saturating_add(offset), len);
        }
        let (address, size) = (usize::try_from(self.host(gpa)), usize::try_from(len));
        let (Ok(address), Ok(size)) = (address, size) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let address = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the range is in the mapping of `region`; its bytes are guest memory, which is only ever read and
        // written as volatile data.
        if unsafe { libc::madvise(address, size, libc::MADV_DONTNEED) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The chunks that `[gpa, gpa + len)`, which is in the area, lies in.
    fn chunks(&self, gpa: u64, len: u64) -> Range<u64> {
        let offset = gpa.saturating_sub(self.blocks.start());
        offset / self.chunk..offset.saturating_add(len).div_ceil(self.chunk)
    }

    /// First address and length of chunk `number`.
    fn chunk(&self, number: u64) -> (u64, u64) {
        let offset = number.saturating_mul(self.chunk);
        let len = self.blocks.size().saturating_sub(offset).min(self.chunk);
        (self.blocks.start().saturating_add(offset), len)
    }

    /// Gives chunk `number` to the guest's vCPUs, or takes it away.
    fn map_chunk(&self, number: u64, present: bool) -> io::Result<()> {
        let (gpa, len) = self.chunk(number);
        let index = u32::try_from(number).map_err(io::Error::other)?;
        set_slot(&self.vm, &self.slot(index, gpa, if present { len } else { 0 }))
    }

    /// Blocks of chunk `number` that hold memory and are not in `[gpa, gpa + len)`.
    fn others(&self, number: u64, gpa: u64, len: u64) -> u64 {
        let (start, size) = self.chunk(number);
        let end = start.saturating_add(size);
        let cut = |address: u64| address.clamp(start, end);
        let (from, to) = (cut(gpa), cut(gpa.saturating_add(len)));
        let count = |from: u64, to: u64| {
            let block = self.blocks.block_size();
            let first = from.saturating_sub(self.blocks.start()) / block;
            let last = to.saturating_sub(self.blocks.start()) / block;
            self.blocks.count(first..last)
        };
        count(start, from).saturating_add(count(to, end))
    }

    fn in_area(&self, gpa: u64, len: u64) -> io::Result<()> {
        let block = self.blocks.block_size();
        let fits = len.is_multiple_of(block) && self.blocks.range(gpa, len / block).is_some();
        if fits {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        }
    }
}

impl Reclaim for HotplugArea {
    /// Blocks that the guest unplugs. A chunk goes from the vCPUs with the last of its blocks.
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.in_area(gpa, len)?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        for number in self.chunks(gpa, len) {
            if mapped.contains(&number) && self.others(number, gpa, len) == 0 {
                self.map_chunk(number, false)?;
                mapped.remove(&number);
            }
        }
        self.release(gpa, len)
    }

    /// Blocks that the guest plugs. What is mapped for its vCPUs, in whole chunks, is not more than it was allowed.
    fn provide(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.in_area(gpa, len)?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<u64> = self.chunks(gpa, len).filter(|n| !mapped.contains(n)).collect();
        let allowed = self.allowed.load(Ordering::Acquire).div_ceil(self.chunk);
        if !new.is_empty() && (mapped.len() + new.len()) as u64 > allowed {
            return Err(io::Error::other(
                "the guest scatters its blocks: there are pieces of memory of which it uses a part",
            ));
        }
        for number in new {
            let (start, size) = self.chunk(number);
            self.open(start, size).map_err(io::Error::other)?;
            self.map_chunk(number, true)?;
            mapped.insert(number);
        }
        drop(mapped);
        if self.options.prefault
            && let Err(error) = sys::advise(self.host(gpa), len, MemoryAdvice::Populate)
        {
            self.discard(gpa, len)?;
            return Err(error);
        }
        Ok(())
    }
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (
        libc::off_t::try_from(offset).map_err(io::Error::other)?,
        libc::off_t::try_from(len).map_err(io::Error::other)?,
    );
    // SAFETY: fallocate takes numbers and an open descriptor.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
