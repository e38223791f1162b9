//! virtio-fs (virtio 1.2 section 5.11): a directory of the host as the guest's file system, served in the monitor by
//! fuse-backend-rs. This file holds the device and its queues; `share` what the guest may do with the directory,
//! `validate` what is checked before a request is served. No DAX window, no notification queue, no threads.

mod saved;
mod share;
mod sys;
#[cfg(test)]
mod tests;
mod validate;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::saved::Saved;
pub use self::share::FsLimits;
use self::share::Share;
use self::validate::{Refusal, Request};
use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::memory::PodMemory;

/// Bytes of the tag in configuration space (5.11.4).
const TAG_SIZE: usize = 36;
/// Most request queues: more than vCPUs that a pod has.
const MAX_QUEUES: u16 = 64;
/// Requests a round, so that a busy guest leaves the loop to others now and then.
const BUDGET: usize = 64;

/// How to make an [`Fs`].
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// The name by which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// The host's directory.
    pub shared_dir: PathBuf,
    /// Whether every change is refused with EROFS.
    pub readonly: bool,
    /// Request queues beside the high-priority queue: 1 to 64.
    pub num_queues: u16,
    /// The size of each queue, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// What the guest can make the monitor keep open.
    pub limits: FsLimits,
}

impl FsOptions {
    /// One request queue of 1024 entries, writable, limits from the process's own.
    #[must_use]
    pub fn new(tag: String, shared_dir: PathBuf) -> Self {
        Self {
            tag,
            shared_dir,
            readonly: false,
            num_queues: 1,
            queue_size: 1024,
            limits: FsLimits::of_process(),
        }
    }
}

/// Why an [`Fs`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit configuration space.
    #[error("fs tag {0:?}: use 1 to 36 bytes without NUL")]
    Tag(String),
    /// The number of queues is out of range.
    #[error("fs num_queues {0}: use 1 to 64")]
    NumQueues(u16),
    /// The queue size is not one that virtio has.
    #[error("fs queue_size {0}: use a power of two from 2 to 32768")]
    QueueSize(u16),
    /// The directory cannot be served.
    #[error("fs shared_dir {}: {source}; give a directory that podvisor may read", path.display())]
    SharedDir {
        /// The path that was asked for.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The host is out of something.
    #[error("fs: {what}: {source}")]
    Host {
        /// What was being made.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    failed: u64,
    refused: u64,
    bytes_written: u64,
}

/// What the driver gave.
struct Active {
    memory: Arc<PodMemory>,
    queues: Vec<Option<ActiveQueue>>,
}

/// The device.
pub struct Fs {
    tag: [u8; TAG_SIZE],
    queue_sizes: Vec<u16>,
    server: Server<Arc<Share>>,
    share: Arc<Share>,
    active: Option<Active>,
    /// Readable when a queue was left with requests.
    wake: EventFd,
    /// The first queue to look at when woken.
    left: Vec<bool>,
    counters: Counters,
}

impl Fs {
    /// Makes the device. The directory is resolved now and opened when the guest mounts it.
    ///
    /// # Errors
    /// When an option is out of range, or the directory is not one.
    pub fn new(options: FsOptions) -> Result<Self, FsError> {
        let mut tag = [0; TAG_SIZE];
        match tag.get_mut(..options.tag.len()) {
            Some(target) if !options.tag.is_empty() && !options.tag.contains('\0') => {
                target.copy_from_slice(options.tag.as_bytes());
            }
            _ => return Err(FsError::Tag(options.tag)),
        }
        if !(1..=MAX_QUEUES).contains(&options.num_queues) {
            return Err(FsError::NumQueues(options.num_queues));
        }
        if !options.queue_size.is_power_of_two() || options.queue_size < 2 {
            return Err(FsError::QueueSize(options.queue_size));
        }
        let shared_dir = |source| FsError::SharedDir {
            path: options.shared_dir.clone(),
            source,
        };
        let directory = options.shared_dir.canonicalize().map_err(shared_dir)?;
        if !directory.is_dir() {
            return Err(shared_dir(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let share = Share::new(&directory, options.readonly, options.limits).map_err(shared_dir)?;
        let share = Arc::new(share);
        let wake = EventFd::new(EFD_NONBLOCK).map_err(|source| FsError::Host {
            what: "eventfd",
            source,
        })?;
        let queues = usize::from(options.num_queues).saturating_add(1);
        Ok(Self {
            tag,
            queue_sizes: vec![options.queue_size; queues],
            server: Server::new(Arc::clone(&share)),
            share,
            active: None,
            wake,
            left: vec![false; queues],
            counters: Counters::default(),
        })
    }

    /// Serves the requests of queue `index`, within the budget.
    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let Self {
            server,
            active: Some(active),
            counters,
            ..
        } = self
        else {
            return Ok(());
        };
        let Active { memory, queues } = active;
        let Some(Some(queue)) = queues.get_mut(index) else {
            return Ok(());
        };
        let (mut served, mut more) = (0usize, false);
        queue.disable_notification(memory)?;
        loop {
            if served >= BUDGET {
                more = true;
                break;
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    queue.disable_notification(memory)?;
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let len = answer(server, memory, chain, counters);
            queue.add_used(memory, head, len)?;
            served += 1;
        }
        if served > 0 {
            queue.signal(memory)?;
        }
        if more {
            if let Some(left) = self.left.get_mut(index) {
                *left = true;
            }
            if let Err(error) = self.wake.write(1) {
                tracing::debug!(%error, "fs: wake-up");
            }
        }
        Ok(())
    }
}

/// Serves one request: the bytes written.
fn answer(
    server: &Server<Arc<Share>>,
    memory: &Arc<PodMemory>,
    chain: DescriptorChain<Arc<PodMemory>>,
    counters: &mut Counters,
) -> u32 {
    counters.requests += 1;
    let request = match Request::parse(memory, chain.clone()) {
        Ok(request) => request,
        Err(Refusal::Unreadable) => {
            counters.refused += 1;
            return 0;
        }
        Err(Refusal::Errno(request, errno)) => {
            counters.refused += 1;
            return request.fail(memory, errno);
        }
    };
    // Both fail for a buffer that the device may not touch.
    let (Ok(reader), Ok(writer)) = (
        Reader::from_descriptor_chain(memory.as_ref(), chain.clone()),
        VirtioFsWriter::new(memory.as_ref(), chain),
    ) else {
        counters.refused += 1;
        return request.fail(memory, libc::EFAULT);
    };
    match server.handle_message(reader, writer.into(), None, None) {
        Ok(written) => {
            counters.bytes_written += written as u64;
            u32::try_from(written).unwrap_or(0)
        }
        Err(error) => {
            tracing::debug!(%error, ?request, "fs: request failed");
            counters.failed += 1;
            request.fail(memory, libc::EINVAL)
        }
    }
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_ftruncate,
    libc::SYS_utimensat,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_umask,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
];

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let queues = u32::try_from(self.queue_sizes.len().saturating_sub(1)).unwrap_or(0);
        let config = self.tag.into_iter().chain(queues.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.skip(start)) {
            *to = from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Active {
            memory: activation.memory,
            queues: activation.queues,
        });
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.serve(index)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // Non-blocking; a spurious wake-up is harmless.
        let _ = self.wake.read();
        for index in 0..self.left.len() {
            if self.left.get_mut(index).is_some_and(std::mem::take) {
                self.serve(index)?;
            }
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, StateError> {
        state::value(&self.share.save()?)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        match state::parse::<Option<Saved>>(state)? {
            Some(saved) => self.share.restore(saved),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.left.fill(false);
        self.share.destroy();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (inodes, handles) = self.share.in_use();
        vec![
            ("requests", self.counters.requests),
            ("requests_failed", self.counters.failed),
            ("requests_refused", self.counters.refused),
            ("bytes_written", self.counters.bytes_written),
            ("inodes", inodes),
            ("handles", handles),
        ]
    }
}
