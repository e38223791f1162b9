//! Files of the host in the pod's address space: where they are, and KVM's memory slots for them. They lie above the PCI
//! windows of the device area, so that neither RAM nor a BAR ever gets there.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes addresses")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use podvisor_devices::platform::{FileMapper, MappedFile};
use podvisor_firmware::plan::GpaRange;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemory};

/// The first memory slot that is not RAM's. KVM on x86-64 has 32764 (Linux `KVM_USER_MEM_SLOTS`).
const FIRST_SLOT: u32 = 1024;
/// The last one that is used.
const LAST_SLOT: u32 = 32_763;
/// What every start is a multiple of: a huge page.
const ALIGNMENT: u64 = 2 << 20;

/// The part of a pod's address space that holds files.
pub struct DeviceMemory {
    vm: Arc<VmFd>,
    range: GpaRange,
    /// Length and slot by start.
    places: Mutex<BTreeMap<u64, (u64, u32)>>,
}

/// A mapped file and its place.
struct Place {
    start: u64,
    slot: u32,
    /// None once it must outlive us, see the drop.
    mapping: Option<MmapRegion>,
    owner: Arc<DeviceMemory>,
}

impl DeviceMemory {
    /// Room in `range` for files of the pod in `vm`.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, range: GpaRange) -> Arc<Self> {
        Arc::new(Self {
            vm,
            range,
            places: Mutex::default(),
        })
    }

    /// Reserves `len` bytes of address space in the first gap, and a slot.
    fn reserve(&self, len: u64) -> Option<(u64, u32)> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = (FIRST_SLOT..=LAST_SLOT).find(|slot| places.values().all(|(_, taken)| taken != slot))?;
        let mut start = self.range.start.checked_next_multiple_of(ALIGNMENT)?;
        for (taken, (taken_len, _)) in &*places {
            if taken.checked_sub(start).is_some_and(|gap| gap >= len) {
                break;
            }
            start = taken.checked_add(*taken_len)?.checked_next_multiple_of(ALIGNMENT)?;
        }
        let end = start.checked_add(len)?;
        let limit = self.range.start.checked_add(self.range.len)?;
        (end <= limit).then(|| places.insert(start, (len, slot)))?;
        Some((start, slot))
    }

    fn release(&self, start: u64) {
        self.places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&start);
    }

    /// Gives KVM slot `slot`, or takes it away with a length of 0.
    fn set_slot(&self, slot: u32, start: u64, len: u64, host: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the range is the mapping of a `Place`, which takes the slot away before it unmaps, and does not unmap
        // if that fails.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

fn mmap(file: &File, len: u64, private: bool) -> io::Result<MmapRegion> {
    let sharing = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
    let size = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() < len {
        // The guest would reach what is not there, and take its vCPU with it.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is shorter"));
    }
    MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file.try_clone()?, 0))
        .build()
        .map_err(io::Error::other)
}

/// [`DeviceMemory`] as devices use it.
pub struct Mapper(pub Arc<DeviceMemory>);

impl FileMapper for Mapper {
    fn map(&self, file: &File, len: u64, private: bool) -> io::Result<Box<dyn MappedFile>> {
        let owner = &self.0;
        let mapping = mmap(file, len, private)?;
        let host = mapping.as_volatile_slice().ptr_guard_mut().as_ptr();
        let (start, slot) = owner.reserve(len).ok_or_else(|| {
            let room = owner.range.len;
            io::Error::other(format!(
                "no gap of {len} bytes is left in the {room:#x} that the pod's address space has for files: raise \
                 cpus.max_phys_bits, or map less"
            ))
        })?;
        if let Err(error) = owner.set_slot(slot, start, len, host.expose_provenance() as u64) {
            owner.release(start);
            return Err(error);
        }
        Ok(Box::new(Place {
            start,
            slot,
            mapping: Some(mapping),
            owner: Arc::clone(owner),
        }))
    }
}

impl MappedFile for Place {
    fn start(&self) -> u64 {
        self.start
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        match self.owner.set_slot(self.slot, self.start, 0, 0) {
            Ok(()) => {
                drop(self.mapping.take());
                self.owner.release(self.start);
            }
            Err(error) => {
                // The guest may still reach these addresses: nothing else may ever be mapped there.
                tracing::error!(%error, start = self.start, "a file stays in the pod's address space");
                std::mem::forget(self.mapping.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(range: GpaRange) -> Option<Mapper> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            println!("skipped: no /dev/kvm");
            return None;
        };
        Some(Mapper(DeviceMemory::new(Arc::new(kvm.create_vm().unwrap()), range)))
    }

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn places_are_found_and_free_again() {
        let start = 1 << 32;
        let range = GpaRange {
            start: start + 4096,
            len: 5 * ALIGNMENT,
        };
        let Some(mapper) = memory(range) else { return };
        let (small, large) = (file(ALIGNMENT), file(2 * ALIGNMENT));
        let a = mapper.map(&small, ALIGNMENT, false).unwrap();
        let b = mapper.map(&small, ALIGNMENT, true).unwrap();
        let c = mapper.map(&large, 2 * ALIGNMENT, false).unwrap();
        let starts = [a.start(), b.start(), c.start()].map(|s| (s - start) / ALIGNMENT);
        assert_eq!(starts, [1, 2, 3]);
        let error = mapper.map(&small, ALIGNMENT, false).err().unwrap();
        assert!(error.to_string().contains("max_phys_bits"), "{error}");
        drop(b);
        assert!(
            mapper.map(&large, 2 * ALIGNMENT, false).is_err(),
            "the gap is too small"
        );
        let b = mapper.map(&small, ALIGNMENT, false).unwrap();
        assert_eq!(b.start(), start + 2 * ALIGNMENT);
        drop((a, b, c));
        assert!(mapper.0.places.lock().unwrap().is_empty());
        for _ in 0..100 {
            assert_eq!(
                mapper.map(&large, 2 * ALIGNMENT, false).unwrap().start(),
                start + ALIGNMENT
            );
        }
    }

    #[test]
    fn what_cannot_be_mapped_takes_no_place() {
        let range = GpaRange {
            start: 1 << 32,
            len: 1 << 32,
        };
        let Some(mapper) = memory(range) else { return };
        assert!(mapper.map(&file(4096), ALIGNMENT, false).is_err(), "past its end");
        assert!(mapper.map(&file(4096), 4097, false).is_err());
        let readonly = File::open("/proc/self/exe").unwrap();
        assert!(mapper.map(&readonly, 4096, false).is_err(), "not writable");
        assert!(mapper.0.places.lock().unwrap().is_empty());
        assert!(mapper.map(&readonly, 4096, true).is_ok());
    }
}
