//! The pod's RAM on the host: where it lies in the guest's address space, how it is mapped, and the views of it that
//! KVM and the devices get. Nothing is touched before the guest or the launch touches it.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes addresses")]

pub mod hotplug;
mod reclaim;
mod zones;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use podvisor_devices::memory::{PodMemory, PodRegion, SharedPages};
use podvisor_firmware::layout;
use podvisor_snp::processor::{MemoryRegion, Processor};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress,
};

pub use self::zones::{SavedRange, Zone, saved_ranges};
use crate::sys::{self, MemoryAdvice};

/// How RAM is to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the API's own memory flags, one each")]
pub struct RamOptions {
    /// Backed by a memory file, so that another process can map it.
    pub shared: bool,
    /// Backed by huge pages.
    pub hugepages: bool,
    /// Advise transparent huge pages.
    pub thp: bool,
    /// Let the host merge equal pages.
    pub mergeable: bool,
    /// Allocate everything at boot.
    pub prefault: bool,
    /// Keep it out of core dumps: a confidential pod.
    pub secret: bool,
}

/// Why RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host refused the mapping.
    #[error(
        "mapping {len} bytes of guest memory at {gpa:#x} (memory.size, memory.hugepages: the host must have as many free)"
    )]
    Map {
        /// Guest address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// The host refused advice that was asked for.
    #[error("{option} is not possible here")]
    Advice {
        /// The configuration field.
        option: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A zone could not be had.
    #[error("memory.zones: zone {id:?}, file {file:?}")]
    Zone {
        /// Its name.
        id: String,
        /// The file behind it; empty for none.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// KVM refused a memory slot.
    #[error("giving KVM {len} bytes of memory at {gpa:#x}")]
    Slot {
        /// Guest address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
}

/// The RAM ranges `(gpa, len)` of a pod with `size` bytes: up to the 32-bit hole, the rest from 4 GiB.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::MEM_32BIT_RESERVED_START);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::RAM_64BIT_START, size - low));
    }
    ranges
}

/// The RAM of one pod.
pub struct GuestRam {
    regions: Vec<Arc<GuestRegionMmap>>,
}

/// RAM as the launch sees it: all of it, private or not.
pub type LaunchMemory = GuestRegionCollection<GuestRegionMmap>;

impl GuestRam {
    /// Maps `size` bytes, lazily.
    ///
    /// # Errors
    /// When the host cannot map or advise as asked.
    pub fn new(size: u64, options: &RamOptions) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        for (gpa, len) in ram_ranges(size) {
            let region = map(gpa, len, options, READ_WRITE).map_err(|source| RamError::Map { gpa, len, source })?;
            advise(host_address(&region), len, gpa, options)?;
            regions.push(Arc::new(region));
        }
        Ok(Self { regions })
    }

    /// Maps `size` bytes of `file` privately: pages are read when they are touched, and `file` is never written.
    ///
    /// # Errors
    /// When the host cannot, or `options` ask for memory that is no file's private mapping.
    pub fn from_file(size: u64, options: &RamOptions, file: &File) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut offset = 0;
        for (gpa, len) in ram_ranges(size) {
            let fail = |source| RamError::Map { gpa, len, source };
            if options.shared || options.hugepages {
                let reason = "memory.shared and memory.hugepages must be off: a restored pod has its memory file mapped privately";
                return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, reason)));
            }
            let file = file.try_clone().map_err(fail)?;
            let region = map_private(gpa, len, FileOffset::new(file, offset)).map_err(fail)?;
            advise(host_address(&region), len, gpa, options)?;
            regions.push(Arc::new(region));
            offset += len;
        }
        Ok(Self { regions })
    }

    /// Reads what is at `gpa`.
    ///
    /// # Errors
    /// When there is not that much RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        let all = self.launch_memory()?;
        all.read_slice(bytes, GuestAddress(gpa)).map_err(io::Error::other)
    }

    /// Where this process has the page at `gpa`, if it is anonymous memory: no file is behind it.
    #[must_use]
    pub fn host_of(&self, gpa: u64) -> Option<u64> {
        let region = self.regions.iter().find(|region| {
            let offset = gpa.checked_sub(region.start_addr().0);
            offset.is_some_and(|offset| offset < region.len())
        })?;
        let offset = gpa.checked_sub(region.start_addr().0)?;
        region.file_offset().is_none().then(|| host_address(region) + offset)
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.len()).sum()
    }

    /// The RAM as KVM memory slots, in address order.
    pub fn slots(&self) -> impl Iterator<Item = MemoryRegion> + '_ {
        (0u32..).zip(&self.regions).map(|(slot, region)| MemoryRegion {
            slot,
            gpa: region.start_addr().0,
            len: region.len(),
            host_addr: host_address(region),
        })
    }

    /// Gives all RAM to `vm`, through the processor for a confidential pod.
    ///
    /// # Errors
    /// When KVM refuses a slot.
    pub fn give_to(&self, vm: &VmFd, processor: Option<&dyn Processor>) -> Result<(), RamError> {
        for slot in self.slots() {
            let (gpa, len) = (slot.gpa, slot.len);
            let fail = |source| RamError::Slot { gpa, len, source };
            match processor {
                Some(processor) => processor.map_region(vm, &slot).map_err(|e| fail(io::Error::other(e)))?,
                None => set_slot(vm, &slot).map_err(fail)?,
            }
        }
        Ok(())
    }

    /// All RAM, for the launch.
    ///
    /// # Errors
    /// Never for the ranges of [`ram_ranges`], which do not overlap.
    pub fn launch_memory(&self) -> io::Result<LaunchMemory> {
        GuestRegionCollection::from_arc_regions(self.regions.clone()).map_err(io::Error::other)
    }

    /// RAM as the devices may use it: all of it, or what `gate` says is shared, and `more` behind it.
    ///
    /// # Errors
    /// Never for the ranges of [`ram_ranges`], which do not overlap.
    pub fn pod_memory(
        &self,
        gate: Option<Arc<dyn SharedPages>>,
        more: impl IntoIterator<Item = PodRegion>,
    ) -> io::Result<Arc<PodMemory>> {
        let ram = self.regions.iter().map(|r| PodRegion::new(Arc::clone(r), gate.clone()));
        let regions = ram.chain(more).collect();
        Ok(Arc::new(PodMemory::from_regions(regions).map_err(io::Error::other)?))
    }
}

/// Asks the processor which pages are shared, for [`PodRegion`].
pub struct ProcessorGate(pub Arc<dyn Processor>);

impl SharedPages for ProcessorGate {
    fn is_shared(&self, gpa: u64, len: u64) -> bool {
        self.0.is_shared(gpa, len)
    }
}

fn host_address(region: &GuestRegionMmap) -> u64 {
    region
        .get_host_address(MemoryRegionAddress(0))
        .map_or(0, |address| address.expose_provenance() as u64)
}

fn map_private(gpa: u64, len: u64, file: FileOffset) -> io::Result<GuestRegionMmap> {
    let size = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(file)
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

fn map(gpa: u64, len: u64, options: &RamOptions, access: libc::c_int) -> io::Result<GuestRegionMmap> {
    let size = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let mut builder = MmapRegionBuilder::new(size).with_mmap_prot(access);
    if options.shared || options.hugepages {
        let file = sys::memfd(c"podvisor-ram", options.hugepages)?;
        file.set_len(len)?;
        // Huge pages are shared too, as Cloud Hypervisor has them: a private copy would double what is scarce.
        // RAM has them from the start, as a touch without one would be the monitor's end; what is only address space, not.
        let lazily = !options.hugepages || access != READ_WRITE;
        builder = builder
            .with_mmap_flags(libc::MAP_SHARED | if lazily { libc::MAP_NORESERVE } else { 0 })
            .with_file_offset(FileOffset::new(file, 0))
            .with_hugetlbfs(options.hugepages);
    } else {
        builder = builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    }
    let region = builder.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Below it lie boot tables and small guests, for which huge pages cost more than they give: 2 MiB of memory and of
/// zeroing for each touched. Linux loads itself at 16 MiB.
const HUGE_PAGES_FROM: u64 = 16 << 20;

/// Advises the host of the `len` bytes at `address`, which are the guest's at `gpa`.
fn advise(address: u64, len: u64, gpa: u64, options: &RamOptions) -> Result<(), RamError> {
    if options.secret {
        // Best effort: a kernel without it also has no cores of shared mappings by default.
        let _ = sys::advise(address, len, MemoryAdvice::DontDump);
    }
    if options.thp && !options.hugepages && !options.shared {
        let skip = HUGE_PAGES_FROM.saturating_sub(gpa).min(len);
        if skip < len {
            // A host without transparent huge pages is no error: it was a hint.
            let _ = sys::advise(address + skip, len - skip, MemoryAdvice::HugePages);
        }
    }
    if options.mergeable {
        sys::advise(address, len, MemoryAdvice::Mergeable).map_err(|source| RamError::Advice {
            option: "memory.mergeable",
            source,
        })?;
    }
    if options.prefault {
        sys::advise(address, len, MemoryAdvice::Populate).map_err(|source| RamError::Advice {
            option: "memory.prefault",
            source,
        })?;
    }
    Ok(())
}

fn set_slot(vm: &VmFd, slot: &MemoryRegion) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: 0,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: slot.host_addr,
    };
    // SAFETY: the range is a mapping of `GuestRam`, which the machine drops after the VM and its vCPUs.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemory;

    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_ranges(0xC000_0000), [(0, 0xC000_0000)]);
        assert_eq!(ram_ranges(0xC000_1000), [(0, 0xC000_0000), (1 << 32, 0x1000)]);
    }

    #[test]
    fn shared_and_private_ram_hold_what_is_written() {
        for shared in [false, true] {
            let ram = GuestRam::new(
                4 << 20,
                &RamOptions {
                    shared,
                    thp: true,
                    secret: true,
                    ..Default::default()
                },
            )
            .unwrap();
            let launch = ram.launch_memory().unwrap();
            launch.write_obj(0x1234_5678u32, GuestAddress(0x20_0000)).unwrap();
            let pod = ram.pod_memory(None, None).unwrap();
            assert_eq!(pod.read_obj::<u32>(GuestAddress(0x20_0000)).unwrap(), 0x1234_5678);
            assert!(pod.read_obj::<u32>(GuestAddress((4 << 20) - 2)).is_err());
            assert_eq!(pod.num_regions(), 1);
            assert_eq!(ram.size(), 4 << 20);
        }
    }

    #[test]
    fn memory_that_cannot_be_mapped_is_an_error_with_its_address() {
        let error = GuestRam::new(1 << 60, &RamOptions::default()).err().unwrap();
        assert!(error.to_string().contains("at 0x100000000"), "{error}");
    }

    struct Only(u64);

    impl SharedPages for Only {
        fn is_shared(&self, gpa: u64, len: u64) -> bool {
            gpa >= self.0 && gpa + len <= self.0 + 4096
        }
    }

    #[test]
    fn devices_reach_shared_pages_only() {
        let ram = GuestRam::new(1 << 20, &RamOptions::default()).unwrap();
        let pod = ram.pod_memory(Some(Arc::new(Only(0x4000))), None).unwrap();
        assert!(pod.write_obj(1u64, GuestAddress(0x4000)).is_ok());
        assert!(pod.write_obj(1u64, GuestAddress(0x5000)).is_err());
        assert!(pod.write_obj(1u64, GuestAddress(0x4FFC)).is_err());
    }
}
