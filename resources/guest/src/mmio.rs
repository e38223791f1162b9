//! Device registers: by instruction, or, on SEV-SNP hardware, where such an instruction would fault, by a GHCB exit.
#![expect(unsafe_code, reason = "volatile access to device registers")]

use core::sync::atomic::{AtomicBool, Ordering};

use crate::ghcb;
use crate::layout;
use crate::paging::PageTables;
use crate::window::Integer;

static BY_GHCB: AtomicBool = AtomicBool::new(false);

/// From now on registers are reached through the GHCB.
pub fn use_ghcb() {
    BY_GHCB.store(true, Ordering::Relaxed);
}

/// A block of device registers.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    start: u64,
    len: u64,
}

impl Registers {
    /// Maps `[start, start + len)`. None when that is not where devices are.
    #[must_use]
    pub fn map(tables: &PageTables, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        let reach = layout::MMIO_REACH
            .iter()
            .any(|(low, high)| start >= *low && end <= *high);
        (reach && tables.map_device(start, len)).then_some(Self { start, len })
    }

    fn address<T>(&self, offset: u64) -> u64 {
        let end = offset.checked_add(size_of::<T>() as u64);
        assert!(end.is_some_and(|end| end <= self.len) && offset.is_multiple_of(size_of::<T>() as u64));
        self.start + offset
    }

    /// Reads a register of at most 32 bits.
    #[must_use]
    pub fn get<T: Integer + Copy + TryFrom<u64> + Default>(&self, offset: u64) -> T {
        let address = self.address::<T>(offset);
        if BY_GHCB.load(Ordering::Relaxed) {
            return T::try_from(ghcb::mmio_read(address, size_of::<T>() as u64)).unwrap_or_default();
        }
        // SAFETY: mapped device memory, in bounds and aligned.
        unsafe { (address as *const T).read_volatile() }
    }

    /// Writes a register.
    pub fn set<T: Integer + Copy + Into<u64>>(&self, offset: u64, value: T) {
        let address = self.address::<T>(offset);
        if BY_GHCB.load(Ordering::Relaxed) {
            ghcb::mmio_write(address, size_of::<T>() as u64, value.into());
            return;
        }
        // SAFETY: mapped device memory, in bounds and aligned; memory that devices use has no Rust objects.
        unsafe { (address as *mut T).write_volatile(value) };
    }
}
