//! Work that several processors share out: numbered items, each taken once. Who comes late finds nothing to do.

use core::sync::atomic::{AtomicUsize, Ordering};

/// The items of one round.
#[derive(Debug, Default)]
pub struct Queue {
    next: AtomicUsize,
    total: AtomicUsize,
    done: AtomicUsize,
    /// 1 + the lowest item that failed.
    failed: AtomicUsize,
}

impl Queue {
    /// A queue without items.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            next: AtomicUsize::new(0),
            total: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
        }
    }

    /// Opens it with `total` items. Once.
    pub fn open(&self, total: usize) {
        self.total.store(total, Ordering::Release);
    }

    /// Takes items and works on them until there are none left. `work` says whether an item is well.
    pub fn help(&self, mut work: impl FnMut(usize) -> bool) {
        loop {
            let total = self.total.load(Ordering::Acquire);
            let item = self.next.load(Ordering::Relaxed);
            if item >= total {
                return;
            }
            if self
                .next
                .compare_exchange(item, item + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            if !work(item) {
                self.fail(item);
            }
            self.done.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn fail(&self, item: usize) {
        let _ = self.failed.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
            (now == 0 || now > item + 1).then_some(item + 1)
        });
    }

    /// Waits until every item has been worked on: the lowest that failed, if one did.
    #[must_use]
    pub fn wait(&self) -> Option<usize> {
        while self.done.load(Ordering::Acquire) < self.total.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        self.failed.load(Ordering::Acquire).checked_sub(1)
    }
}
