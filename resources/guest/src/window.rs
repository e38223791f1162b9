//! Memory by physical address, as handles: the window shared with the host, from which rings and buffers are cut, and
//! private pages at fixed places. All access is by copy or volatile, and bounds are checked: the host may change shared
//! memory at any time, so no Rust reference ever points into it.
#![expect(unsafe_code, reason = "raw access to memory that has no Rust object in it")]

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::layout;

const PAGE: u64 = 4096;

/// A range of memory that holds no Rust object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    address: u64,
    len: u64,
}

impl Shared {
    /// The memory `[address, address + len)`.
    ///
    /// # Safety
    /// It must be mapped RAM in which Rust keeps no object.
    #[must_use]
    pub const unsafe fn at(address: u64, len: u64) -> Self {
        Self { address, len }
    }

    /// One of the pages that the image and its launch put below [`layout::IMAGE_START`].
    #[must_use]
    pub fn parameter_page(address: u64) -> Self {
        assert!((layout::CPUID_PAGE..layout::IMAGE_START).contains(&address));
        // SAFETY: the linker script keeps Rust objects at IMAGE_START and above.
        unsafe { Self::at(address, PAGE) }
    }

    /// The GHCB: the window's first page.
    #[must_use]
    pub fn ghcb() -> Self {
        // SAFETY: in the window, which holds no Rust objects.
        unsafe { Self::at(layout::WINDOW_START, PAGE) }
    }

    /// The pages that the `convert` and `probe-private` commands use.
    #[must_use]
    pub fn scratch() -> Self {
        // SAFETY: nothing else uses this range (`layout`).
        unsafe { Self::at(layout::CONVERT_START, layout::CONVERT_LEN) }
    }

    /// Physical address, which is what devices are told.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` on.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()));
        Self {
            address: self.address + offset as u64,
            len: len as u64,
        }
    }

    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        self.part(offset, len).address as *mut u8
    }

    /// Copies out.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.pointer(offset, into.len());
        fence(Ordering::Acquire);
        // SAFETY: in bounds; a Rust slice cannot overlap memory without Rust objects.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let into = self.pointer(offset, from.len());
        // SAFETY: as for `read`.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        fence(Ordering::Release);
    }

    /// Fills with zeros.
    pub fn clear(&self) {
        // SAFETY: in bounds.
        unsafe { ptr::write_bytes(self.address as *mut u8, 0, self.len()) };
        fence(Ordering::Release);
    }

    /// Reads a little-endian integer, once.
    #[must_use]
    pub fn get<T: Copy + Integer>(&self, offset: usize) -> T {
        let from = self.pointer(offset, size_of::<T>());
        assert!(from.addr().is_multiple_of(align_of::<T>()));
        // SAFETY: in bounds and aligned; any bytes are an integer.
        let value = unsafe { from.cast::<T>().read_volatile() };
        fence(Ordering::Acquire);
        value
    }

    /// Writes a little-endian integer, after everything written before.
    pub fn set<T: Copy + Integer>(&self, offset: usize, value: T) {
        let into = self.pointer(offset, size_of::<T>());
        assert!(into.addr().is_multiple_of(align_of::<T>()));
        fence(Ordering::Release);
        // SAFETY: in bounds and aligned.
        unsafe { into.cast::<T>().write_volatile(value) };
    }
}

/// Integers that memory and registers hold.
pub trait Integer: sealed::Sealed {}
mod sealed {
    /// Keeps the trait to integers, for which all bytes are values.
    pub trait Sealed {}
}
macro_rules! integers {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Integer for $t {})* };
}
integers!(u8, u16, u32, u64);

/// The shared window: memory is cut off it and never given back, because devices live as long as the pod.
pub struct Window {
    next: Cell<u64>,
}

impl Window {
    /// The whole window after its first page, which is the GHCB.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            next: Cell::new(layout::WINDOW_START + PAGE),
        }
    }

    /// Cuts off `len` bytes, page-aligned. None when the window is used up.
    #[must_use]
    pub fn take(&self, len: usize) -> Option<Shared> {
        let len = (len as u64).checked_next_multiple_of(PAGE)?;
        let start = self.next.get();
        let end = start
            .checked_add(len)
            .filter(|end| *end <= layout::WINDOW_START + layout::WINDOW_LEN)?;
        self.next.set(end);
        // SAFETY: inside the window, which holds no Rust objects; not handed out before.
        Some(unsafe { Shared::at(start, len) })
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}
