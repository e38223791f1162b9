//! Guest memory as stage0 sees it: identity mapped below 4 GiB; a second view of the same without the C-bit, for pages that
//! are shared with the host; and a window that moves over what lies above. Which page is in which state is the caller's to know.
#![expect(unsafe_code, reason = "memory at fixed addresses, and the page tables")]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use stage0::PAGE;
use stage0::manifest::Range;

use super::cpu;

/// Where the view without the C-bit begins.
const SHARED: u64 = 1 << 39;
/// Where the window begins.
const WINDOW: u64 = 2 << 39;
/// Bytes that the window shows.
const WINDOW_LEN: u64 = 1 << 30;
/// End of the identity map.
const MAPPED: u64 = 4 << 30;
const PRESENT: u64 = 3;
const LARGE: u64 = 0x83;

/// A page of 512 entries, or of anything else.
#[repr(C, align(4096))]
struct Page([u64; 512]);

unsafe extern "C" {
    static pml4: Page;
    static mut c_bit: u64;
    /// PDPT and four page directories of the shared view, then PDPT and page directory of the window.
    static mut more_tables: [Page; 7];
    static ghcb_page: Page;
    static mut chunk_digests: [u8; stage0::abi::MAX_CHUNKS * stage0::abi::DIGEST_LEN];
    static trampoline: u8;
    static trampoline_end: u8;
    static memory_end: u8;
    fn enter_kernel(entry: u64, boot_params: u64) -> !;
}

/// The mask of the C-bit; 0 when there is none.
fn mask() -> u64 {
    // SAFETY: it is written once, before any Rust code runs.
    unsafe { (&raw const c_bit).read() }
}

fn entry(table: u64, index: u64, value: u64) {
    let place = core::ptr::with_exposed_provenance_mut::<u64>((table + index * 8) as usize);
    // SAFETY: only the tables of this file are named, which nothing else refers to.
    unsafe { place.write_volatile(value) };
}

fn more_table(index: u64) -> u64 {
    (&raw const more_tables).expose_provenance() as u64 + index * PAGE
}

/// Makes the shared view and the window. Once, before either is used.
pub(crate) fn map_shared() {
    let root = (&raw const pml4).expose_provenance() as u64;
    for table in [0, 5, 6] {
        for index in 0..512 {
            entry(more_table(table), index, 0);
        }
    }
    for directory in 0..4 {
        entry(more_table(0), directory, more_table(1 + directory) | PRESENT | mask());
        for index in 0..512 {
            entry(
                more_table(1 + directory),
                index,
                (directory << 30 | index << 21) | LARGE,
            );
        }
    }
    entry(more_table(5), 0, more_table(6) | PRESENT | mask());
    entry(root, 1, more_table(0) | PRESENT | mask());
    entry(root, 2, more_table(5) | PRESENT | mask());
    cpu::flush_tlb();
}

/// Where a private range, at most a gibibyte that does not cross a multiple of that, can be reached: as it is, or in the
/// window, which shows no other range from then on.
pub(crate) fn reach(range: &Range) -> u64 {
    if range.end <= MAPPED {
        return range.start;
    }
    let base = range.start / WINDOW_LEN * WINDOW_LEN;
    for index in 0..512 {
        entry(more_table(6), index, (base + (index << 21)) | LARGE | mask());
    }
    cpu::flush_tlb();
    WINDOW + (range.start - base)
}

/// Private memory that nothing changes while it is read. For the measured and the parameter pages, and for what stage0 has
/// put somewhere and does not change any more.
pub(crate) fn read(gpa: u64, len: usize) -> &'static [u8] {
    let start = core::ptr::with_exposed_provenance(gpa as usize);
    // SAFETY: below 4 GiB all of memory is mapped, and the checks of the library keep what is read apart from what is written.
    unsafe { core::slice::from_raw_parts(start, len) }
}

/// Memory that the caller alone uses: nobody else has `[gpa, gpa + len)` at the same time.
pub(crate) fn write(gpa: u64, len: usize) -> &'static mut [u8] {
    let start = core::ptr::with_exposed_provenance_mut(gpa as usize);
    // SAFETY: below 4 GiB all of memory is mapped; the ranges that the library checks do not overlap, and each is handed
    // out to one user.
    unsafe { core::slice::from_raw_parts_mut(start, len) }
}

/// Copies from pages that the host can change meanwhile. What was copied is what counts.
pub(crate) fn copy_shared(gpa: u64, to: &mut [u8]) {
    // SAFETY: the shared view is mapped, and `to` is memory of the caller's; the compiler knows nothing of the source.
    unsafe {
        asm!("rep movsb", inout("rcx") to.len() => _, inout("rdi") to.as_mut_ptr() => _,
            inout("rsi") SHARED + gpa => _, options(nostack, preserves_flags));
    }
}

/// Reads a number from the GHCB page.
pub(crate) fn ghcb_read(offset: u64) -> u64 {
    let place = core::ptr::with_exposed_provenance::<u64>((SHARED + ghcb() + offset) as usize);
    // SAFETY: callers' offsets are multiples of 8 inside the page, which is mapped.
    unsafe { place.read_volatile() }
}

/// Writes a number into the GHCB page.
pub(crate) fn ghcb_write(offset: u64, value: u64) {
    let place = core::ptr::with_exposed_provenance_mut::<u64>((SHARED + ghcb() + offset) as usize);
    // SAFETY: as in `ghcb_read`.
    unsafe { place.write_volatile(value) };
}

/// GPA of the GHCB page.
pub(crate) fn ghcb() -> u64 {
    (&raw const ghcb_page).addr() as u64
}

/// One past stage0's last byte.
pub(crate) fn end() -> u64 {
    (&raw const memory_end).addr() as u64
}

/// The private copy of the chunk digests: to write it, before other processors run.
pub(crate) fn digests(len: usize) -> &'static mut [u8] {
    let room = stage0::abi::MAX_CHUNKS * stage0::abi::DIGEST_LEN;
    write((&raw const chunk_digests).expose_provenance() as u64, len.min(room))
}

/// Puts the code that other processors start with to `gpa`, a page below 1 MiB.
pub(crate) fn put_trampoline(gpa: u64) {
    let (from, end) = (&raw const trampoline, &raw const trampoline_end);
    let code = read(from.expose_provenance() as u64, end.addr() - from.addr());
    write(gpa, code.len()).copy_from_slice(code);
}

/// Writes a register in memory.
pub(crate) fn write_register(gpa: u64, value: u32) {
    let place = core::ptr::with_exposed_provenance_mut::<u32>(gpa as usize);
    // SAFETY: a device's register, identity mapped.
    unsafe { place.write_volatile(value) };
}

/// Leaves for the kernel.
pub(crate) fn jump(entry: u64, boot_params: u64) -> ! {
    // SAFETY: the kernel was verified, and takes everything over.
    unsafe { enter_kernel(entry, boot_params) }
}

/// A value that the first processor lends to the others, for as long as they may run.
pub(crate) struct Lent<T> {
    value: core::cell::UnsafeCell<Option<T>>,
    there: AtomicBool,
}

// SAFETY: it is written once, before `there` is set, and only read from then on.
unsafe impl<T: Send + Sync> Sync for Lent<T> {}

impl<T> Lent<T> {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self {
            value: core::cell::UnsafeCell::new(None),
            there: AtomicBool::new(false),
        }
    }

    /// Lends `value`. Once: a second one is not taken. Only the first processor calls it.
    pub(crate) fn lend(&self, value: T) -> Option<&T> {
        if !self.there.load(Ordering::Acquire) {
            // SAFETY: nobody reads before `there` is set, and one processor writes.
            unsafe { *self.value.get() = Some(value) };
            self.there.store(true, Ordering::Release);
        }
        self.get()
    }

    /// What is lent.
    pub(crate) fn get(&self) -> Option<&T> {
        if !self.there.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: it is not written any more.
        unsafe { (*self.value.get()).as_ref() }
    }
}
