//! The page tables, which ring 3 may edit: mapping device memory, and taking the C-bit off pages shared with the host.
//! The first GiB is mapped by the image (`boot.s`).
#![expect(unsafe_code, reason = "edits the page tables in use")]

use alloc::alloc::{Layout, alloc_zeroed};

use crate::ring0;

const ENTRIES: u64 = 512;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, uncached, 2 MiB page.
const DEVICE: u64 = 0xF7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const LARGE_SHIFT: u32 = 21;

unsafe extern "C" {
    static mut pml4: [u64; ENTRIES as usize];
    static mut pages: [u64; ENTRIES as usize];
}

/// The page tables of the pod guest.
pub struct PageTables {
    c_mask: u64,
}

impl PageTables {
    /// The tables that the image brought; `c_bit` is the C-bit's position, 0 for none.
    #[must_use]
    pub fn new(c_bit: u32) -> Self {
        Self {
            c_mask: if c_bit == 0 { 0 } else { 1 << c_bit },
        }
    }

    /// Maps the device memory `[start, start + len)`; what is mapped stays as it is. False when there is no memory for
    /// tables or the range wraps.
    #[must_use]
    pub fn map_device(&self, start: u64, len: u64) -> bool {
        let Some(last) = start.checked_add(len.saturating_sub(1)) else {
            return false;
        };
        (start >> LARGE_SHIFT..=last >> LARGE_SHIFT).all(|frame| self.map_frame(frame))
    }

    fn map_frame(&self, frame: u64) -> bool {
        let mut table = &raw mut pml4 as *mut u64;
        for level in [18_u32, 9] {
            // SAFETY: `table` is a page table of 512 entries, and the index is below that.
            let entry = unsafe { table.add((frame >> level & (ENTRIES - 1)) as usize) };
            // SAFETY: in bounds, as above; the processor only sets accessed bits meanwhile.
            let mut value = unsafe { entry.read_volatile() } & !self.c_mask;
            if value & 1 == 0 {
                let Ok(layout) = Layout::from_size_align(4096, 4096) else {
                    return false;
                };
                // SAFETY: the layout has a size.
                let fresh = unsafe { alloc_zeroed(layout) };
                if fresh.is_null() {
                    return false;
                }
                value = fresh.addr() as u64 | TABLE;
                // SAFETY: as above; the new table is zeroed and identity mapped.
                unsafe { entry.write_volatile(value | self.c_mask) };
            }
            table = (value & ADDRESS) as *mut u64;
        }
        // SAFETY: as above.
        let entry = unsafe { table.add((frame & (ENTRIES - 1)) as usize) };
        // SAFETY: a new entry maps device memory, where Rust has no objects; a present one is left alone.
        unsafe {
            if entry.read_volatile() & 1 == 0 {
                entry.write_volatile(frame << LARGE_SHIFT | DEVICE);
            }
        }
        true
    }

    /// Makes the 2 MiB pages of `[start, start + len)`, in the first GiB, accesses to shared memory.
    pub fn share(&self, start: u64, len: u64) {
        if self.c_mask == 0 {
            return;
        }
        for frame in (start >> LARGE_SHIFT)..((start + len) >> LARGE_SHIFT).min(ENTRIES) {
            // SAFETY: below 512; the caller keeps no Rust objects in the window.
            unsafe {
                let entry = (&raw mut pages as *mut u64).add(frame as usize);
                entry.write_volatile(entry.read_volatile() & !self.c_mask);
            }
        }
        ring0::flush_tlb();
    }
}
