//! virtio-balloon (virtio 1.2 5.5): a guest gives pages back when it is asked to have less memory (inflate), takes them
//! again (deflate), and tells of pages that it does not use (free page reporting). The host's side of a page is the
//! monitor's, behind [`Reclaim`]; only pages that devices may touch are given to it. Statistics and free page hints,
//! which migration would need, are not offered.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt, VirtioDevice};
use super::state::{self, StateError};
use crate::memory::{PodMemory, Reclaim};

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` (virtio 1.2 5.5.3): the driver may take pages back rather than kill for them.
pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the reporting queue is there.
pub const VIRTIO_BALLOON_F_PAGE_REPORTING: u32 = 5;
/// The balloon's page, whatever the guest's (virtio 1.2 5.5.6).
const PAGE: u64 = 4096;
/// Size of the inflate and deflate queues, Cloud Hypervisor's.
const QUEUE_SIZE: u16 = 128;
/// Size of the reporting queue, Linux's `PAGE_REPORTING_CAPACITY`.
const REPORTING_QUEUE_SIZE: u16 = 32;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Without the queues of features that are not offered, drivers (Linux, and all that follow it) count on.
const REPORTING: usize = 2;
/// The most page numbers of one chain; Linux sends 256, Windows 1024.
const MAX_PAGES: usize = 1024;
/// The most descriptors of one chain that are looked at.
const MAX_DESCRIPTORS: usize = 64;
/// The most ranges given back to the host before the event loop gets its turn.
const TURN: usize = 2048;
/// Length of the configuration space: `num_pages` and `actual` (virtio 1.2 5.5.4).
const CONFIG_LEN: usize = 8;
/// Offset of `actual`.
const ACTUAL: u64 = 4;

/// A size that cannot be asked for.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a balloon of {0} bytes: give a multiple of 4096, less than 16 TiB")]
pub struct BalloonSizeError(u64);

#[derive(Debug)]
struct Shared {
    wanted: AtomicU32,
    actual: AtomicU32,
    event: EventFd,
}

/// The monitor's side of a balloon.
#[derive(Clone, Debug)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to give up `size` bytes, more or fewer than now. It comes to it in its own time, or not.
    ///
    /// # Errors
    /// When the size is not a number of pages, or more than the field for it holds; nothing is changed then.
    pub fn resize(&self, size: u64) -> Result<(), BalloonSizeError> {
        let pages = pages(size)?;
        self.0.wanted.store(pages, Ordering::Release);
        // Full: it is readable already.
        let _ = self.0.event.write(1);
        Ok(())
    }

    /// The bytes that the guest was asked to give up.
    #[must_use]
    pub fn wanted_size(&self) -> u64 {
        u64::from(self.0.wanted.load(Ordering::Acquire)) * PAGE
    }

    /// The bytes that the guest says it has given up.
    #[must_use]
    pub fn actual_size(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) * PAGE
    }
}

fn pages(size: u64) -> Result<u32, BalloonSizeError> {
    let pages = u32::try_from(size / PAGE).ok().filter(|_| size.is_multiple_of(PAGE));
    pages.ok_or(BalloonSizeError(size))
}

/// How a balloon is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct BalloonOptions {
    /// Bytes that the guest is asked to give up from the start.
    pub size: u64,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest tells of pages that it does not use.
    pub free_page_reporting: bool,
}

#[derive(Debug, Default)]
struct Counters {
    inflated: u64,
    deflated: u64,
    reported: u64,
    refused: u64,
    failed: u64,
}

/// What a snapshot holds: numbers of pages.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    wanted: u32,
    actual: u32,
    /// What the driver was told last, if there is one.
    told: Option<u32>,
}

struct Active {
    memory: Arc<PodMemory>,
    queues: Vec<Option<ActiveQueue>>,
    config_changed: Arc<dyn QueueInterrupt>,
    /// Pages that the driver was told to give up.
    told: u32,
}

/// A virtio balloon.
pub struct Balloon {
    options: BalloonOptions,
    queue_sizes: Vec<u16>,
    shared: Arc<Shared>,
    reclaim: Arc<dyn Reclaim>,
    active: Option<Active>,
    /// Page numbers of the chain at work.
    pages: Vec<u32>,
    counters: Counters,
}

impl Balloon {
    /// A balloon whose pages go to `reclaim`.
    ///
    /// # Errors
    /// When the size cannot be, or there are no descriptors left.
    pub fn new(options: BalloonOptions, reclaim: Arc<dyn Reclaim>) -> io::Result<Self> {
        let wanted = pages(options.size).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let mut queue_sizes = vec![QUEUE_SIZE; 2];
        if options.free_page_reporting {
            queue_sizes.push(REPORTING_QUEUE_SIZE);
        }
        Ok(Self {
            options,
            queue_sizes,
            shared: Arc::new(Shared {
                wanted: AtomicU32::new(wanted),
                actual: AtomicU32::new(0),
                event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            reclaim,
            active: None,
            pages: Vec::new(),
            counters: Counters::default(),
        })
    }

    /// The monitor's side.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }

    /// Serves queue `index`; asks for another turn if there is more than one turn's work.
    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(mut queue) = active.queues.get_mut(index).and_then(Option::take) else {
            return Ok(());
        };
        let memory = Arc::clone(&active.memory);
        let result = self.run(index, &mut queue, &memory);
        if let Some(place) = self.active.as_mut().and_then(|active| active.queues.get_mut(index)) {
            *place = Some(queue);
        }
        result
    }

    fn run(&mut self, index: usize, queue: &mut ActiveQueue, memory: &Arc<PodMemory>) -> Result<(), DeviceError> {
        let mut used = false;
        let mut ranges = 0_usize;
        let mut budget = u32::from(queue.size()).saturating_mul(2);
        'all: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                let worked = match index {
                    REPORTING => self.report(memory, chain),
                    _ => self.collect(memory, chain).map_or(0, |()| self.exchange(index, memory)),
                };
                queue.add_used(memory, head, 0)?;
                used = true;
                ranges = ranges.saturating_add(worked);
                budget = budget.saturating_sub(1);
                if budget == 0 || ranges >= TURN {
                    // Full: it is readable already.
                    let _ = self.shared.event.write(1);
                    break 'all;
                }
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        if used { queue.signal(memory) } else { Ok(()) }
    }

    /// Takes the page numbers of a chain, sorted. None when some cannot be read: then none counts.
    fn collect(&mut self, memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> Option<()> {
        self.pages.clear();
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            let room = MAX_PAGES.saturating_sub(self.pages.len());
            let count = (descriptor.len() as usize / 4).min(room);
            let mut bytes = [0; 4 * MAX_PAGES];
            let read = bytes
                .get_mut(..count.saturating_mul(4))
                .filter(|_| !descriptor.is_write_only());
            let good = read.is_some_and(|bytes| memory.read_slice(bytes, descriptor.addr()).is_ok());
            if !good {
                self.counters.refused = self.counters.refused.saturating_add(1);
                return None;
            }
            let numbers = bytes.as_chunks::<4>().0.iter().take(count);
            self.pages.extend(numbers.map(|bytes| u32::from_le_bytes(*bytes)));
        }
        self.pages.sort_unstable();
        self.pages.dedup();
        Some(())
    }

    /// Inflates or deflates by the collected pages, neighbours together; how many ranges there were.
    fn exchange(&mut self, index: usize, memory: &PodMemory) -> usize {
        let pages = std::mem::take(&mut self.pages);
        let mut ranges = 0_usize;
        for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let start = run.first().map_or(0, |page| u64::from(*page) * PAGE);
            self.give(index, memory, start, run.len() as u64 * PAGE);
            ranges = ranges.saturating_add(1);
        }
        self.pages = pages;
        ranges
    }

    /// Takes the reported ranges of a chain; how many.
    fn report(&mut self, memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> usize {
        let mut ranges = 0_usize;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            // Whole pages inside.
            let first = descriptor.addr().0.checked_next_multiple_of(PAGE);
            let end = descriptor.addr().0.checked_add(u64::from(descriptor.len()));
            let len = first.zip(end).and_then(|(first, end)| end.checked_sub(first));
            ranges = ranges.saturating_add(1);
            match (first, len.map(|len| len - len % PAGE)) {
                // The driver lends its pages to be overwritten.
                (Some(first), Some(len)) if len > 0 && descriptor.is_write_only() => {
                    self.give(REPORTING, memory, first, len);
                }
                _ => self.counters.refused = self.counters.refused.saturating_add(1),
            }
        }
        ranges
    }

    /// Gives a range to the host, or lets the guest have it again. All of it must be RAM that devices may touch.
    fn give(&mut self, index: usize, memory: &PodMemory, start: u64, len: u64) {
        let usable = usize::try_from(len).is_ok_and(|len| {
            let mut slices = memory.get_slices(GuestAddress(start), len);
            slices.all(|slice| slice.is_ok())
        });
        if !usable {
            self.counters.refused = self.counters.refused.saturating_add(1);
            return;
        }
        let (result, counter) = match index {
            INFLATE => (self.reclaim.discard(start, len), &mut self.counters.inflated),
            DEFLATE => (self.reclaim.provide(start, len), &mut self.counters.deflated),
            _ => (self.reclaim.discard(start, len), &mut self.counters.reported),
        };
        match result {
            Ok(()) => *counter = counter.saturating_add(len),
            Err(error) => {
                if self.counters.failed == 0 {
                    tracing::warn!(%error, start, len, "balloon: the host does not take pages; told once");
                }
                self.counters.failed = self.counters.failed.saturating_add(1);
            }
        }
    }
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[libc::SYS_madvise, libc::SYS_fallocate, libc::SYS_read, libc::SYS_write];

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let deflate = u64::from(self.options.deflate_on_oom) << VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
        let reporting = u64::from(self.options.free_page_reporting) << VIRTIO_BALLOON_F_PAGE_REPORTING;
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | deflate | reporting
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let wanted = self.shared.wanted.load(Ordering::Acquire).to_le_bytes();
        let actual = self.shared.actual.load(Ordering::Acquire).to_le_bytes();
        let config = wanted.into_iter().chain(actual).chain(std::iter::repeat(0));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_LEN);
        for (place, byte) in data.iter_mut().zip(config.skip(skip)) {
            *place = byte;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Drivers write the field as a whole.
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(bytes), Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Active {
            memory: activation.memory,
            queues: activation.queues,
            config_changed: activation.config_changed,
            // The driver reads the size now; it is told of changes.
            told: self.shared.wanted.load(Ordering::Acquire),
        });
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.serve(index)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.shared.event.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // An error: it is not readable, another turn took it.
        let _ = self.shared.event.read();
        let wanted = self.shared.wanted.load(Ordering::Acquire);
        if let Some(active) = self.active.as_mut().filter(|active| active.told != wanted) {
            active.told = wanted;
            active
                .config_changed
                .signal_used()
                .map_err(|source| DeviceError::Host {
                    what: "raising the configuration interrupt",
                    source,
                })?;
        }
        for index in 0..self.queue_sizes.len() {
            self.serve(index)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, StateError> {
        let told = self.active.as_ref().map(|active| active.told);
        state::value(&Saved {
            wanted: self.shared.wanted.load(Ordering::Acquire),
            actual: self.shared.actual.load(Ordering::Acquire),
            told,
        })
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let saved: Saved = state::parse(state)?;
        self.shared.wanted.store(saved.wanted, Ordering::Release);
        self.shared.actual.store(saved.actual, Ordering::Release);
        if let (Some(active), Some(told)) = (&mut self.active, saved.told) {
            active.told = told;
        }
        // Full: it is readable already.
        let _ = self.shared.event.write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        // A new driver starts with an empty balloon (virtio 1.2 5.5.5).
        self.shared.actual.store(0, Ordering::Release);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_bytes", self.counters.inflated),
            ("deflated_bytes", self.counters.deflated),
            ("reported_bytes", self.counters.reported),
            ("refused_ranges", self.counters.refused),
            ("failed_ranges", self.counters.failed),
        ]
    }
}
