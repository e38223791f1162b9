//! The driver's side of a virtio device, for tests and fuzz targets: guest memory with a page gate, virtqueues
//! that are built and read as a driver does it, and a counted interrupt. It drives any
//! [`VirtioDevice`] without a transport. Not part of the monitor: compiled for tests and with `test-utils` only.
//!
//! ```ignore
//! let mut h = Harness::new(device);
//! h.activate().unwrap();
//! let chain = h.push(0, &[Buf::Read(&header), Buf::Write(512), Buf::Write(1)]);
//! h.kick(0).unwrap();
//! let done = h.completed(0);            // what the device gave back, with the bytes it may have written
//! assert_eq!(done[0].head, chain.head);
//! ```
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a broken test set-up should stop the test where it is"
)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::{io, mem};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt, VirtioDevice};
use super::state::{Place, QueuePosition};
use crate::memory::{PodMemory, PodRegion, SharedPages};

const PAGE: u64 = 4096;

/// Bytes of guest memory that a [`Harness`] has, from GPA 0.
pub const TEST_MEMORY_SIZE: u64 = 64 << 20;
/// Rings start here.
const RINGS_START: u64 = 0x1_0000;
/// Buffers start here; allocation wraps around to it.
const BUFFERS_START: u64 = 16 << 20;

/// A page gate that tests write to: every page is shared until it is made private.
#[derive(Debug, Default)]
pub struct PageGate {
    private: RwLock<BTreeSet<u64>>,
}

impl PageGate {
    /// Makes the pages of `[gpa, gpa + len)` private.
    pub fn make_private(&self, gpa: u64, len: u64) {
        self.private.write().unwrap().extend(Self::pages(gpa, len));
    }

    /// Makes the pages of `[gpa, gpa + len)` shared again.
    pub fn make_shared(&self, gpa: u64, len: u64) {
        let mut private = self.private.write().unwrap();
        for page in Self::pages(gpa, len) {
            private.remove(&page);
        }
    }

    fn pages(gpa: u64, len: u64) -> std::ops::RangeInclusive<u64> {
        gpa / PAGE..=gpa.saturating_add(len.saturating_sub(1)) / PAGE
    }
}

impl SharedPages for PageGate {
    fn is_shared(&self, gpa: u64, len: u64) -> bool {
        let private = self.private.read().unwrap();
        private.range(Self::pages(gpa, len)).next().is_none()
    }
}

/// Plain guest memory of `size` bytes from GPA 0, seen through `gate`.
#[must_use]
pub fn test_memory(size: u64, gate: Option<Arc<PageGate>>) -> Arc<PodMemory> {
    let region = GuestRegionMmap::from_range(GuestAddress(0), usize::try_from(size).unwrap(), None).unwrap();
    let region = PodRegion::new(Arc::new(region), gate.map(|g| g as Arc<dyn SharedPages>));
    Arc::new(PodMemory::from_regions(vec![region]).unwrap())
}

/// An interrupt that only counts.
#[derive(Debug, Default)]
pub struct CountedInterrupt {
    count: AtomicU64,
    direct: Mutex<Option<EventFd>>,
}

impl CountedInterrupt {
    /// How often it was raised through this process.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// From now on there is a descriptor that raises it, or there is none.
    pub fn set_eventfd(&self, fd: Option<EventFd>) {
        *self.direct.lock().unwrap() = fd;
    }
}

impl QueueInterrupt for CountedInterrupt {
    fn signal_used(&self) -> io::Result<()> {
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn eventfd(&self) -> Option<EventFd> {
        self.direct.lock().unwrap().as_ref().map(|fd| fd.try_clone().unwrap())
    }
}

/// One buffer of a chain that [`Harness::push`] builds.
#[derive(Clone, Copy, Debug)]
pub enum Buf<'a> {
    /// The device reads these bytes.
    Read(&'a [u8]),
    /// The device may write this many bytes.
    Write(u32),
}

/// A descriptor as written into the table: for chains that are wrong on purpose.
#[derive(Clone, Copy, Debug)]
pub struct RawBuf {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

/// A chain that was made available.
#[derive(Clone, Debug)]
pub struct Chain {
    /// The head's index.
    pub head: u16,
    /// The buffers, in order.
    pub bufs: Vec<RawBuf>,
}

/// A chain that the device gave back.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The head's index.
    pub head: u16,
    /// The length that the device reported as written.
    pub len: u32,
    /// All bytes of the chain's writable buffers, in order (not cut to `len`); empty for [`Harness::push_raw`] when
    /// the memory cannot be read.
    pub data: Vec<u8>,
}

/// The driver's half of one split virtqueue.
#[derive(Debug)]
pub struct TestQueue {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
    pending: Vec<(Chain, Vec<u16>)>,
    interrupt: Arc<CountedInterrupt>,
    doorbell: Option<EventFd>,
}

impl TestQueue {
    fn new(size: u16, base: u64) -> Self {
        let desc = base;
        let avail = (desc + 16 * u64::from(size)).next_multiple_of(PAGE);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(PAGE);
        Self {
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            pending: Vec::new(),
            interrupt: Arc::default(),
            doorbell: None,
        }
    }

    fn end(&self) -> u64 {
        (self.used + 6 + 8 * u64::from(self.size)).next_multiple_of(PAGE)
    }

    /// GPA of the descriptor table.
    #[must_use]
    pub fn desc_table(&self) -> u64 {
        self.desc
    }

    /// GPA of the available ring.
    #[must_use]
    pub fn avail_ring(&self) -> u64 {
        self.avail
    }

    /// GPA of the used ring.
    #[must_use]
    pub fn used_ring(&self) -> u64 {
        self.used
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    fn write_desc(&self, memory: &PodMemory, table: u64, index: u16, buf: RawBuf, flags: u32, next: u16) {
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&buf.gpa.to_le_bytes());
        raw[8..12].copy_from_slice(&buf.len.to_le_bytes());
        let flags = flags | if buf.writable { VRING_DESC_F_WRITE } else { 0 };
        raw[12..14].copy_from_slice(&u16::try_from(flags).unwrap().to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        memory
            .write_slice(&raw, GuestAddress(table + 16 * u64::from(index)))
            .unwrap();
    }

    fn make_available(&mut self, memory: &PodMemory, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory
            .store(self.avail_idx.to_le(), GuestAddress(self.avail + 2), Ordering::Release)
            .unwrap();
    }

    /// Makes a chain of `bufs` available; panics when there are not enough free descriptors.
    pub fn push_raw(&mut self, memory: &PodMemory, bufs: &[RawBuf]) -> Chain {
        assert!(bufs.len() <= self.free.len(), "the test queue has no free descriptors");
        let ids: Vec<u16> = bufs.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, buf) in bufs.iter().enumerate() {
            let next = ids.get(i + 1).copied();
            let flags = if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
            self.write_desc(memory, self.desc, ids[i], *buf, flags, next.unwrap_or(0));
        }
        self.publish(memory, ids, bufs)
    }

    /// Makes `bufs` available as one indirect descriptor whose table lies at `table`.
    pub fn push_indirect(&mut self, memory: &PodMemory, table: u64, bufs: &[RawBuf]) -> Chain {
        for (i, buf) in bufs.iter().enumerate() {
            let i = u16::try_from(i).unwrap();
            let last = usize::from(i) + 1 == bufs.len();
            let flags = if last { 0 } else { VRING_DESC_F_NEXT };
            self.write_desc(memory, table, i, *buf, flags, if last { 0 } else { i + 1 });
        }
        let id = self.free.pop().unwrap();
        let entry = RawBuf {
            gpa: table,
            len: u32::try_from(16 * bufs.len()).unwrap(),
            writable: false,
        };
        self.write_desc(memory, self.desc, id, entry, VRING_DESC_F_INDIRECT, 0);
        self.publish(memory, vec![id], bufs)
    }

    fn publish(&mut self, memory: &PodMemory, ids: Vec<u16>, bufs: &[RawBuf]) -> Chain {
        let chain = Chain {
            head: ids.first().copied().unwrap_or(0),
            bufs: bufs.to_vec(),
        };
        self.make_available(memory, chain.head);
        self.pending.push((chain.clone(), ids));
        chain
    }

    /// Takes what the device gave back since the last call.
    pub fn completed(&mut self, memory: &PodMemory) -> Vec<Completed> {
        let idx: u16 = memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .map(u16::from_le)
            .unwrap();
        let mut out = Vec::new();
        while self.used_idx != idx {
            let slot = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
            let id: u32 = memory.read_obj(GuestAddress(slot)).map(u32::from_le).unwrap();
            let len: u32 = memory.read_obj(GuestAddress(slot + 4)).map(u32::from_le).unwrap();
            self.used_idx = self.used_idx.wrapping_add(1);
            let head = u16::try_from(id).unwrap();
            let at = self
                .pending
                .iter()
                .position(|(c, _)| c.head == head)
                .expect("the device gave back a chain that was not pending");
            let (chain, ids) = self.pending.remove(at);
            self.free.extend(ids);
            let mut data = Vec::new();
            for buf in chain.bufs.iter().filter(|b| b.writable) {
                let mut bytes = vec![0; buf.len as usize];
                if memory.read_slice(&mut bytes, GuestAddress(buf.gpa)).is_ok() {
                    data.extend(bytes);
                }
            }
            out.push(Completed { head, len, data });
        }
        out
    }

    /// The queue as the transport hands it to the device.
    #[must_use]
    pub fn active(&self, index: usize, event_idx: bool) -> ActiveQueue {
        self.active_at(index, event_idx, None)
    }

    fn active_at(&self, index: usize, event_idx: bool, place: Option<Place>) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(u32::try_from(self.desc).ok(), Some(0));
        queue.set_avail_ring_address(u32::try_from(self.avail).ok(), Some(0));
        queue.set_used_ring_address(u32::try_from(self.used).ok(), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if let Some(place) = place {
            queue.set_next_avail(place.next_avail);
            queue.set_next_used(place.next_used);
        }
        let active = ActiveQueue::new(index, queue, Arc::clone(&self.interrupt) as Arc<dyn QueueInterrupt>);
        match &self.doorbell {
            Some(fd) => active.with_doorbell(fd.try_clone().unwrap()),
            None => active,
        }
    }
}

/// A device, its driver's queues and the memory between them.
pub struct Harness<D: VirtioDevice> {
    /// The device under test.
    pub device: D,
    /// Guest memory, as the device sees it (through the gate).
    pub memory: Arc<PodMemory>,
    /// Which pages the device may touch.
    pub gate: Arc<PageGate>,
    /// The driver's queues.
    pub queues: Vec<TestQueue>,
    /// Counts configuration-change interrupts.
    pub config_interrupt: Arc<CountedInterrupt>,
    next_buffer: u64,
    positions: Vec<Arc<QueuePosition>>,
}

impl<D: VirtioDevice> Harness<D> {
    /// Memory and queues for `device`, each queue of its largest size.
    pub fn new(device: D) -> Self {
        let gate = Arc::new(PageGate::default());
        let memory = test_memory(TEST_MEMORY_SIZE, Some(Arc::clone(&gate)));
        let mut base = RINGS_START;
        let mut queues = Vec::new();
        for &size in device.queue_max_sizes() {
            let mut queue = TestQueue::new(size, base);
            if device.handles_doorbell(queues.len()) {
                queue.doorbell = Some(EventFd::new(EFD_NONBLOCK).unwrap());
            }
            base = queue.end();
            queues.push(queue);
        }
        assert!(base <= BUFFERS_START, "the test memory is too small for the queues");
        Self {
            device,
            memory,
            gate,
            queues,
            config_interrupt: Arc::default(),
            next_buffer: BUFFERS_START,
            positions: Vec::new(),
        }
    }

    /// Activates the device with all it offers, except EVENT_IDX, so that every signal is an interrupt.
    ///
    /// # Errors
    /// The device's.
    pub fn activate(&mut self) -> Result<(), DeviceError> {
        let features = self.device.features() & !(1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX);
        self.activate_with(features)
    }

    /// Activates the device with exactly `features` (VERSION_1 is added).
    ///
    /// # Errors
    /// The device's.
    pub fn activate_with(&mut self, features: u64) -> Result<(), DeviceError> {
        self.activate_at(features, &[])
    }

    fn activate_at(&mut self, features: u64, places: &[Option<Place>]) -> Result<(), DeviceError> {
        let event_idx = features & (1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0;
        let places = places.iter().copied().chain(std::iter::repeat(None));
        let queues: Vec<_> = self
            .queues
            .iter()
            .enumerate()
            .zip(places)
            .map(|((i, q), place)| q.active_at(i, event_idx, place))
            .collect();
        self.positions = queues.iter().map(ActiveQueue::position).collect();
        let queues = queues.into_iter().map(Some).collect();
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: features | 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1,
            queues,
            config_changed: Arc::clone(&self.config_interrupt) as Arc<dyn QueueInterrupt>,
        })
    }

    /// Saves the device and puts its state into `device`, in memory, and under the driver's queues, that are the same:
    /// what a snapshot and its restore are for a driver. The driver had chosen `features`.
    ///
    /// # Errors
    /// The devices'.
    pub fn moved_to(&mut self, device: D, features: u64) -> Result<D, super::state::StateError> {
        let state = self.device.save()?;
        let places: Vec<_> = self.positions.iter().map(|p| p.get()).collect();
        let old = mem::replace(&mut self.device, device);
        self.activate_at(features, &places)?;
        self.device.restore(state)?;
        for queue in 0..self.queues.len() {
            self.kick(queue)?;
        }
        Ok(old)
    }

    /// The interrupt of `queue`.
    #[must_use]
    pub fn interrupt(&self, queue: usize) -> &CountedInterrupt {
        &self.queues[queue].interrupt
    }

    /// Takes `len` bytes of guest memory, page-aligned when `len` is at least a page.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let align = if len >= PAGE { PAGE } else { 16 };
        let mut gpa = self.next_buffer.next_multiple_of(align);
        if gpa + len > TEST_MEMORY_SIZE {
            gpa = BUFFERS_START;
        }
        self.next_buffer = gpa + len;
        gpa
    }

    /// Puts `bufs` into fresh guest memory (writable ones filled with 0xAA).
    pub fn place(&mut self, bufs: &[Buf<'_>]) -> Vec<RawBuf> {
        let mut raw = Vec::new();
        for buf in bufs {
            let (filler, data, writable);
            match buf {
                Buf::Read(bytes) => (data, writable) = (*bytes, false),
                Buf::Write(len) => {
                    filler = vec![0xAA; *len as usize];
                    (data, writable) = (filler.as_slice(), true);
                }
            }
            let gpa = self.alloc(data.len() as u64);
            self.write(gpa, data);
            raw.push(RawBuf {
                gpa,
                len: u32::try_from(data.len()).unwrap(),
                writable,
            });
        }
        raw
    }

    /// Makes a chain of `bufs`, placed in fresh guest memory, available on `queue`. Does not kick.
    pub fn push(&mut self, queue: usize, bufs: &[Buf<'_>]) -> Chain {
        let raw = self.place(bufs);
        self.push_raw(queue, &raw)
    }

    /// Makes a chain of `bufs` as they are available on `queue`.
    pub fn push_raw(&mut self, queue: usize, bufs: &[RawBuf]) -> Chain {
        self.queues[queue].push_raw(&self.memory, bufs)
    }

    /// As [`Harness::push`], in an indirect table.
    pub fn push_indirect(&mut self, queue: usize, bufs: &[Buf<'_>]) -> Chain {
        let raw = self.place(bufs);
        let table = self.alloc(16 * raw.len() as u64);
        self.queues[queue].push_indirect(&self.memory, table, &raw)
    }

    /// Rings the doorbell of `queue`.
    ///
    /// # Errors
    /// The device's.
    pub fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        if let Some(doorbell) = self.queues.get(queue).and_then(|q| q.doorbell.as_ref()) {
            doorbell.write(1).unwrap();
            return Ok(());
        }
        self.device.on_queue(queue)
    }

    /// Takes what the device gave back on `queue` since the last call.
    pub fn completed(&mut self, queue: usize) -> Vec<Completed> {
        self.queues[queue].completed(&self.memory)
    }

    /// Takes what the device gave back on `queue`: (head, length) pairs.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        self.completed(queue).into_iter().map(|c| (c.head, c.len)).collect()
    }

    /// How often the interrupt of `queue` was raised.
    #[must_use]
    pub fn interrupts(&self, queue: usize) -> u64 {
        self.queues[queue].interrupt.count()
    }

    /// Calls `on_event` for every descriptor of the device that is readable now, after waiting at most `timeout_ms`
    /// for one; false when none was.
    ///
    /// # Errors
    /// The device's.
    pub fn poll_events(&mut self, timeout_ms: u16) -> Result<bool, DeviceError> {
        let fds = self.device.event_fds();
        let ready = poll::readable(&fds, timeout_ms);
        for index in &ready {
            self.device.on_event(*index)?;
        }
        Ok(!ready.is_empty())
    }

    /// Writes guest memory.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    /// Reads guest memory.
    #[must_use]
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }

    /// Resets the device and the driver's rings.
    pub fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            let fresh = TestQueue::new(queue.size, queue.desc);
            let bytes = usize::try_from(fresh.end() - fresh.desc).unwrap();
            self.memory
                .write_slice(&vec![0; bytes], GuestAddress(fresh.desc))
                .unwrap();
            let old = mem::replace(queue, fresh);
            queue.interrupt = old.interrupt;
            queue.doorbell = old.doorbell;
        }
    }
}

mod poll {
    //! Readiness of descriptors by epoll, through vmm-sys-util's safe wrapper.
    use std::os::fd::RawFd;

    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    pub(super) fn readable(fds: &[RawFd], timeout_ms: u16) -> Vec<usize> {
        let epoll = Epoll::new().unwrap();
        for (i, fd) in fds.iter().enumerate() {
            epoll
                .ctl(ControlOperation::Add, *fd, EpollEvent::new(EventSet::IN, i as u64))
                .unwrap();
        }
        let mut events = vec![EpollEvent::default(); fds.len().max(1)];
        // io_uring's completions interrupt a wait on this thread.
        let n = loop {
            match epoll.wait(i32::from(timeout_ms), &mut events) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.unwrap(),
            }
        };
        events[..n].iter().map(|e| usize::try_from(e.data()).unwrap()).collect()
    }
}

#[cfg(test)]
mod tests;
