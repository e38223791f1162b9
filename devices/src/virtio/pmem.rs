//! virtio-pmem (virtio 1.2 5.19): a file of the host that the guest sees as memory and makes durable by a request. The
//! monitor maps the file at a guest address ([`FileMapper`]); here is the file, what the driver is told of it, and the
//! requests. The driver's requests that come while the host is at one are answered by the next one together.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::blk::flusher::Flusher;
use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::memory::PodMemory;
use crate::platform::{FileMapper, MappedFile};

/// What the size must be a multiple of, and the start is: a huge page, Linux's section granularity.
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
    /// A regular file or block device, or a directory: a file is made in it, which is gone when the device is.
    pub path: PathBuf,
    /// Bytes of it that the guest sees; the file's size where absent. A directory needs it.
    pub size: Option<u64>,
    /// The file is opened read-only and mapped privately: what the guest writes is lost with the device.
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
    /// It is a directory.
    #[error("pmem file={path}: a file is to be made in this directory; give its size")]
    NoSize {
        /// The directory.
        path: PathBuf,
    },
    /// Its size cannot be mapped.
    #[error("pmem file={path}: its size is {size} bytes; give a multiple of 2 MiB, at least 2 MiB")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// More of it was asked for than there is.
    #[error("pmem file={path}: size {size} is more than the file has, {len} bytes; give at most that, or leave it out")]
    Short {
        /// The file.
        path: PathBuf,
        /// Bytes that were asked for.
        size: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// Something of the host's cannot be had.
    #[error("pmem file={path}: {what}")]
    Host {
        /// The file.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
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

/// What a snapshot keeps: where the guest has it.
#[derive(Serialize, Deserialize)]
struct Saved {
    start: u64,
    size: u64,
}

/// A virtio persistent memory device.
pub struct Pmem {
    options: PmemOptions,
    size: u64,
    flusher: Flusher,
    event: EventFd,
    place: Box<dyn MappedFile>,
    active: Option<Active>,
    flushes: u64,
    host_flushes: u64,
    failed: u64,
}

impl Pmem {
    /// Opens and locks the file, and has `mapper` place it; with `discard_writes` others may have it in the same way.
    ///
    /// # Errors
    /// When it cannot be opened, is locked by someone else, has no size that can be mapped, or has no room.
    pub fn open(options: PmemOptions, mapper: &dyn FileMapper) -> Result<Self, PmemError> {
        let path = || options.path.clone();
        let host = |what| {
            let path = path();
            move |source| PmemError::Host { path, what, source }
        };
        let aligned = |size: u64| match size {
            size if size > 0 && size.is_multiple_of(ALIGNMENT) => Ok(size),
            size => Err(PmemError::Size { path: path(), size }),
        };
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("making an eventfd"))?;
        let asked = options.size.map(aligned).transpose()?;
        let flusher = if options.path.is_dir() {
            let size = asked.ok_or_else(|| PmemError::NoSize { path: path() })?;
            Flusher::temporary(&options.path, size, &event)
        } else {
            Flusher::open(&options.path, options.discard_writes, &event)
        };
        let flusher = flusher.map_err(|source| PmemError::File { path: path(), source })?;
        let len = flusher.size();
        let size = match asked {
            Some(size) if size > len => {
                return Err(PmemError::Short {
                    path: path(),
                    size,
                    len,
                });
            }
            Some(size) => size,
            None => aligned(len)?,
        };
        let place = mapper.map(flusher.file(), size, options.discard_writes);
        Ok(Self {
            place: place.map_err(host("placing it in the pod's address space"))?,
            options,
            size,
            flusher,
            event,
            active: None,
            flushes: 0,
            host_flushes: 0,
            failed: 0,
        })
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.options.path
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
            if let Some(result) = self.flusher.finished() {
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
            if active.next.is_empty() || self.flusher.is_busy() {
                break;
            }
            std::mem::swap(&mut active.current, &mut active.next);
            self.host_flushes = self.host_flushes.saturating_add(1);
            let at_once = self.flusher.start().map_err(|source| DeviceError::Host {
                what: "making a file durable",
                source,
            })?;
            if !at_once {
                break;
            }
        }
        // While a flush is under way, its end comes back to what is left on the ring.
        if more && !self.flusher.is_busy() {
            // Full: it is readable already.
            let _ = self.event.write(1);
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
                        if self.options.discard_writes {
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

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_fdatasync,
    libc::SYS_read,
    libc::SYS_write,
];

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
        let start = self.place.start().to_le_bytes();
        let config = start.into_iter().chain(self.size.to_le_bytes());
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
        vec![self.event.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // An error: it is not readable, another turn took it.
        let _ = self.event.read();
        self.serve()
    }

    fn save(&mut self) -> Result<Value, StateError> {
        while self.flusher.is_busy() {
            self.flusher.wait().map_err(|source| DeviceError::Host {
                what: "waiting for a file to be durable",
                source,
            })?;
            self.serve()?;
        }
        state::value(&Saved {
            start: self.place.start(),
            size: self.size,
        })
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let saved: Saved = state::parse(state)?;
        let (start, size) = (self.place.start(), self.size);
        if (saved.start, saved.size) == (start, size) {
            return Ok(());
        }
        // The guest has mapped it where it was.
        Err(StateError::Broken(format!(
            "the guest has {} bytes of {} at {:#x}, and here it is {size} bytes at {start:#x}: give a file of that size, and \
             the pmem section as it was",
            saved.size,
            self.path().display(),
            saved.start
        )))
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
}
