//! The heap, in private memory. One processor runs the body, without interrupts, so nothing is locked.
#![expect(unsafe_code, reason = "a global allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::RefCell;
use core::ptr::{NonNull, null_mut};

use crate::layout;

/// The heap; empty until [`start`].
pub struct Heap(RefCell<linked_list_allocator::Heap>);

// SAFETY: one processor runs the body and interrupt handlers are assembly that does not allocate.
unsafe impl Sync for Heap {}

impl Heap {
    /// An empty heap.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a const constructor of the one static")]
    pub const fn new() -> Self {
        Self(RefCell::new(linked_list_allocator::Heap::empty()))
    }
}

/// Gives the heap its memory, which must be usable by now. Calls after the first do nothing.
pub fn start(heap: &Heap) {
    let mut heap = heap.0.borrow_mut();
    if heap.size() == 0 {
        // SAFETY: the range is RAM that nothing else uses (`layout`), and the heap is still empty.
        unsafe { heap.init(layout::HEAP_START as *mut u8, layout::HEAP_LEN as usize) };
    }
}

// SAFETY: linked_list_allocator hands out disjoint, aligned blocks of the memory given to it.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.0.try_borrow_mut().map(|mut heap| heap.allocate_first_fit(layout)) {
            Ok(Ok(block)) => block.as_ptr(),
            _ => null_mut(),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let (Ok(mut heap), Some(block)) = (self.0.try_borrow_mut(), NonNull::new(block)) {
            // SAFETY: the block came from alloc with this layout.
            unsafe { heap.deallocate(block, layout) };
        }
    }
}
