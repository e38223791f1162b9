//! virtio-pmem (virtio 1.2 5.19): a file of the host that the guest sees as memory and makes durable by a request. The
//! monitor maps the file at a guest address; here is what the driver is told of it, and the requests. The driver's
//! requests that come while the host is at one are answered by the next one together.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::blk::flusher::Flusher;
use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use crate::memory::PodMemory;

/// What start and size must be multiples of: a huge page, Linux's section granularity.
pub const ALIGNMENT: u64 = 2 << 20;
/// Size of the one queue, Cloud Hypervisor's.
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (virtio 1.2 5.19.6).
const FLUSH: u32 = 0;
/// Length of a request and of an answer.
const MESSAGE_LEN: u32 = 4;
/// An answer: done.
const DONE: u32 = 0;
/// An answer: failed.
const FAILED: u32 = u32::MAX;
/// The most descriptors of a request that are looked at.
const MAX_DESCRIPTORS: usize = 8;

/// How a file becomes memory.
#[derive(Clone, Debug)]
pub struct PmemOptions {
    /// A regular file or block device.
    pub path: PathBuf,
    /// The file is opened read-only and must be mapped privately: what the guest writes is lost with it.
    pub discard_writes: bool,
}

/// Why a file cannot be memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// It cannot be opened or locked.
    #[error("pmem file={path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: super::blk::BlkError,
    },
    /// Its size cannot be mapped.
    #[error("pmem file={path}: its size is {size} bytes; give a file of a multiple of 2 MiB, at least 2 MiB")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// It cannot lie there.
    #[error("pmem file={path}: {start:#x} is no multiple of 2 MiB, or the file does not end below 2^64")]
    Start {
        /// The file.
        path: PathBuf,
        /// The guest address.
        start: u64,
    },
    /// A descriptor of our own cannot be made.
    #[error("pmem file={path}: making its eventfd: {source}")]
    Host {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// An open file that has no place yet.
pub struct PmemFile {
    options: PmemOptions,
    flusher: Flusher,
    event: EventFd,
}

impl PmemFile {
    /// Opens and locks the file; with `discard_writes` others may have it in the same way.
    ///
    /// # Errors
    /// When it cannot be opened, is locked by someone else, or has no size that can be mapped.
    pub fn open(options: PmemOptions) -> Result<Self, PmemError> {
        let path = options.path.clone();
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let event = event.map_err(|source| PmemError::Host {
            path: path.clone(),
            source,
        })?;
        let flusher = Flusher::open(&path, options.discard_writes, &event).map_err(|source| PmemError::File {
            path: path.clone(),
            source,
        })?;
        let size = flusher.size();
        if size == 0 || !size.is_multiple_of(ALIGNMENT) {
            return Err(PmemError::Size { path, size });
        }
        Ok(Self {
            options,
            flusher,
            event,
        })
    }

    /// The file, to be mapped: shared, or privately with `discard_writes`.
    #[must_use]
    pub fn file(&self) -> &File {
        self.flusher.file()
    }

    /// Bytes to be mapped, a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.flusher.size()
    }

    /// Whether what the guest writes is lost.
    #[must_use]
    pub fn discards_writes(&self) -> bool {
        self.options.discard_writes
    }
}

/// A request that waits for the host.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    head: u16,
    answer: GuestAddress,
}

struct Active {
    memory: Arc<PodMemory>,
    queue: ActiveQueue,
    /// Answered when the flush under way ends.
    current: Vec<Waiting>,
    /// Came while it was under way.
    next: Vec<Waiting>,
}

/// A virtio persistent memory device.
pub struct Pmem {
    file: PmemFile,
    start: u64,
    active: Option<Active>,
    flushes: u64,
    host_flushes: u64,
    failed: u64,
}

impl Pmem {
    /// A device for `file`, which the monitor has mapped at guest address `start`.
    ///
    /// # Errors
    /// When the address is misaligned or the file would wrap around.
    pub fn new(file: PmemFile, start: u64) -> Result<Self, PmemError> {
        if !start.is_multiple_of(ALIGNMENT) || start.checked_add(file.size()).is_none() {
            let path = file.options.path;
            return Err(PmemError::Start { path, start });
        }
        Ok(Self {
            file,
            start,
            active: None,
            flushes: 0,
            host_flushes: 0,
            failed: 0,
        })
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.options.path
    }

    /// Takes requests off the ring, follows the flush under way, and starts the next.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = self.run(&mut active);
        self.active = Some(active);
        result
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let (mut used, more) = self.take_requests(active)?;
        loop {
            if let Some(result) = self.file.flusher.finished() {
                if let Err(error) = &result {
                    tracing::warn!(path = %self.path().display(), %error, "pmem: the file could not be made durable");
                }
                for waiting in active.current.drain(..) {
                    let counter = if result.is_ok() {
                        &mut self.flushes
                    } else {
                        &mut self.failed
                    };
                    *counter = counter.saturating_add(1);
                    let answer = if result.is_ok() { DONE } else { FAILED };
                    reply(&active.memory, &mut active.queue, waiting, answer)?;
                    used = true;
                }
            }
            if active.next.is_empty() || self.file.flusher.is_busy() {
                break;
            }
            std::mem::swap(&mut active.current, &mut active.next);
            self.host_flushes = self.host_flushes.saturating_add(1);
            let at_once = self.file.flusher.start().map_err(|source| DeviceError::Host {
                what: "making a file durable",
                source,
            })?;
            if !at_once {
                break;
            }
        }
        // While a flush is under way, its end comes back to what is left on the ring.
        if more && !self.file.flusher.is_busy() {
            // Full: it is readable already.
            let _ = self.file.event.write(1);
        }
        if used {
            active.queue.signal(&active.memory)
        } else {
            Ok(())
        }
    }

    /// Whether requests were answered that need no flush, and whether there may be more on the ring.
    fn take_requests(&mut self, active: &mut Active) -> Result<(bool, bool), DeviceError> {
        let memory = Arc::clone(&active.memory);
        let mut used = false;
        let mut budget = u32::from(active.queue.size()).saturating_mul(2);
        loop {
            active.queue.disable_notification(&memory)?;
            loop {
                // A driver that adds a chain twice must not make the list grow.
                if budget == 0 || active.next.len() >= usize::from(active.queue.size()) {
                    return Ok((used, true));
                }
                budget = budget.saturating_sub(1);
                let Some(chain) = active.queue.pop(&memory)? else {
                    break;
                };
                let head = chain.head_index();
                match parse(&memory, chain) {
                    Some((FLUSH, answer)) => {
                        let waiting = Waiting { head, answer };
                        if self.file.options.discard_writes {
                            // Nothing that the guest writes reaches the file.
                            self.flushes = self.flushes.saturating_add(1);
                            reply(&memory, &mut active.queue, waiting, DONE)?;
                            used = true;
                        } else {
                            active.next.push(waiting);
                        }
                    }
                    Some((_, answer)) => {
                        self.failed = self.failed.saturating_add(1);
                        reply(&memory, &mut active.queue, Waiting { head, answer }, FAILED)?;
                        used = true;
                    }
                    None => {
                        self.failed = self.failed.saturating_add(1);
                        active.queue.add_used(&memory, head, 0)?;
                        used = true;
                    }
                }
            }
            if !active.queue.enable_notification(&memory)? {
                return Ok((used, false));
            }
        }
    }
}

/// The type of a request and where its answer goes.
fn parse(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> Option<(u32, GuestAddress)> {
    let mut kind = None;
    for descriptor in chain.take(MAX_DESCRIPTORS) {
        if descriptor.len() < MESSAGE_LEN {
            return None;
        }
        if descriptor.is_write_only() {
            return Some((kind?, descriptor.addr()));
        }
        if kind.is_none() {
            kind = Some(u32::from_le(memory.read_obj(descriptor.addr()).ok()?));
        }
    }
    None
}

/// Answers a request and gives its chain back.
fn reply(memory: &Arc<PodMemory>, queue: &mut ActiveQueue, waiting: Waiting, answer: u32) -> Result<(), DeviceError> {
    let written = memory.write_obj(answer.to_le(), waiting.answer).is_ok();
    queue.add_used(memory, waiting.head, if written { MESSAGE_LEN } else { 0 })
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // virtio 1.2 5.19.4: start, size.
        let config = self
            .start
            .to_le_bytes()
            .into_iter()
            .chain(self.file.size().to_le_bytes());
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(16);
        for (place, byte) in data.iter_mut().zip(config.chain(std::iter::repeat(0)).skip(skip)) {
            *place = byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.into_iter().next().flatten();
        self.active = queue.map(|queue| Active {
            memory: activation.memory,
            queue,
            current: Vec::new(),
            next: Vec::new(),
        });
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.file.event.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // An error: it is not readable, another turn took it.
        let _ = self.file.event.read();
        self.serve()
    }

    fn reset(&mut self) {
        // A flush under way touches no guest memory; its end finds nobody who waits.
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("flushes", self.flushes),
            ("host_flushes", self.host_flushes),
            ("failed_requests", self.failed),
        ]
    }

    fn syscalls(&self) -> &'static [i64] {
        &[
            libc::SYS_io_uring_enter,
            libc::SYS_fdatasync,
            libc::SYS_read,
            libc::SYS_write,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buf, Harness, RawBuf};

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    fn options(file: &tempfile::NamedTempFile) -> PmemOptions {
        PmemOptions {
            path: file.path().to_owned(),
            discard_writes: false,
        }
    }

    fn device(options: PmemOptions) -> Harness<Pmem> {
        let file = PmemFile::open(options).unwrap();
        let mut h = Harness::new(Pmem::new(file, 1 << 32).unwrap());
        h.activate().unwrap();
        h
    }

    fn count(h: &Harness<Pmem>, name: &str) -> u64 {
        h.device.counters().iter().find(|c| c.0 == name).unwrap().1
    }

    fn finish(h: &mut Harness<Pmem>, chains: usize) -> Vec<Vec<u8>> {
        let mut done = Vec::new();
        while done.len() < chains {
            done.extend(h.completed(0).into_iter().map(|d| d.data[..d.len as usize].to_vec()));
            if done.len() < chains {
                assert!(h.poll_events(60_000).unwrap(), "the end of a flush wakes the loop");
            }
        }
        done
    }

    #[test]
    fn flushes_are_answered_together() {
        let file = file(ALIGNMENT);
        let mut h = device(options(&file));
        for _ in 0..5 {
            h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
            h.kick(0).unwrap();
        }
        assert_eq!(finish(&mut h, 5), vec![vec![0; 4]; 5]);
        assert_eq!(count(&h, "flushes"), 5);
        assert!((1..=5).contains(&count(&h, "host_flushes")));
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
        h.kick(0).unwrap();
        h.reset();
        h.activate().unwrap();
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
        h.kick(0).unwrap();
        assert_eq!(finish(&mut h, 1), [[0; 4]]);
    }

    #[test]
    fn requests_that_are_none_fail_alone() {
        let file = file(ALIGNMENT);
        let mut h = device(options(&file));
        h.push(0, &[Buf::Read(&[1, 0, 0, 0]), Buf::Write(4)]);
        h.push(0, &[Buf::Read(&[0; 4])]);
        h.push(0, &[Buf::Write(4)]);
        h.push(0, &[Buf::Read(&[0; 3]), Buf::Write(4)]);
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(3)]);
        let gpa = u64::MAX - 4;
        h.push_raw(
            0,
            &[RawBuf {
                gpa,
                len: 4,
                writable: false,
            }],
        );
        h.kick(0).unwrap();
        let mut expected = vec![vec![]; 6];
        expected[0] = vec![0xFF; 4];
        assert_eq!(finish(&mut h, 6), expected);
        assert_eq!((count(&h, "failed_requests"), count(&h, "host_flushes")), (6, 0));
    }

    #[test]
    fn a_driver_that_repeats_a_chain_makes_nothing_grow() {
        let file = file(ALIGNMENT);
        let mut h = device(options(&file));
        let chain = h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
        let (avail, used) = (h.queues[0].avail_ring(), h.queues[0].used_ring());
        // Every slot of the ring holds the same chain, and all of them are made available again and again.
        for slot in 0..u64::from(QUEUE_SIZE) {
            h.write(avail + 4 + 2 * slot, &chain.head.to_le_bytes());
        }
        let mut idx = 1_u16;
        for _ in 0..20 {
            idx = idx.wrapping_add(QUEUE_SIZE - 1);
            h.write(avail + 2, &idx.to_le_bytes());
            h.kick(0).unwrap();
            let active = h.device.active.as_ref().unwrap();
            assert!(active.next.len().max(active.current.len()) <= usize::from(QUEUE_SIZE));
            while u16::from_le_bytes(h.read(used + 2, 2).try_into().unwrap()) != idx {
                assert!(h.poll_events(60_000).unwrap());
            }
        }
        while h.poll_events(0).unwrap() {}
    }

    #[test]
    fn a_private_mapping_needs_no_host() {
        let file = file(2 * ALIGNMENT);
        let shared = PmemOptions {
            discard_writes: true,
            ..options(&file)
        };
        let mut h = device(shared.clone());
        let _second = PmemFile::open(shared).unwrap();
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
        h.kick(0).unwrap();
        assert_eq!(finish(&mut h, 1), [[0; 4]]);
        assert_eq!(count(&h, "host_flushes"), 0);
        let error = PmemFile::open(options(&file)).err().unwrap();
        assert!(matches!(error, PmemError::File { .. }), "{error}");
        let mut config = [0xEE; 18];
        h.device.read_config(0, &mut config);
        assert_eq!(config[..8], (1_u64 << 32).to_le_bytes());
        assert_eq!(config[8..], [0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn sizes_and_places_that_cannot_be_mapped_are_refused() {
        for len in [0, 1, ALIGNMENT - 1, ALIGNMENT + 4096] {
            let error = PmemFile::open(options(&file(len))).err().unwrap().to_string();
            assert!(error.contains(&format!("{len} bytes")), "{error}");
        }
        for start in [4096, 0_u64.wrapping_sub(ALIGNMENT)] {
            let file = file(ALIGNMENT);
            let file = PmemFile::open(options(&file)).unwrap();
            assert!(matches!(Pmem::new(file, start), Err(PmemError::Start { .. })));
        }
    }
}
