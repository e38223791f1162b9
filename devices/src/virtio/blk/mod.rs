//! virtio-blk (virtio 1.2 5.2): a raw image or a block device as the pod's disk. This file has the device: its
//! options, queues and counters. Requests are parsed in `request.rs`, carried through in `task.rs` on the engine of
//! `ring.rs`; the host's file is `file.rs`, configuration space `config.rs`.
//!
//! Images are raw, always: what a guest can write is never interpreted. A request's failure is that request's
//! alone. Page states are checked when a request starts; a guest that makes a page private while the host works on
//! it loses the data of that page, as with any DMA.

mod active;
mod config;
mod file;
pub(in crate::virtio) mod flusher;
mod request;
mod ring;
mod scratch;
mod storage;
mod task;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use self::active::Active;
use self::config::Config;
use self::file::DiskFile;
pub use self::file::{BlkError, LockRange};
use self::request::{Limits, Operation, Request};
pub use self::scratch::{BLOCK as SCRATCH_BLOCK, ScratchError, make_scratch};
use self::storage::Storage;
pub use self::storage::StorageNews;
use self::task::Status;
use super::device::{Activation, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::rate_limiter::{RateLimiter, Throttle};

/// Length of the serial in bytes (virtio 1.2 5.2.6.1).
const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// The largest queue size that can be asked for (virtio 1.2 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// The most queues that can be asked for: one a vCPU is of use.
const MAX_QUEUES: u16 = 256;

/// The timer's place in [`VirtioDevice::event_fds`].
const TIMER: usize = 1;

/// How a disk is to be opened.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Open it read-only; the lock is then shared, so that several pods can use it.
    pub readonly: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// What the driver is told as serial, at most 20 bytes; None: made of the file's device and inode.
    pub serial: Option<String>,
    /// Number of queues, 1 to 256.
    pub num_queues: u16,
    /// Size of each queue, a power of two.
    pub queue_size: u16,
    /// Use plain system calls in place of io_uring.
    pub disable_io_uring: bool,
    /// Discarded space is given back to the host.
    pub sparse: bool,
    /// What the lock on it covers.
    pub lock_range: LockRange,
    /// Limits requests, and the bytes that they read or write.
    pub limiter: Option<Arc<RateLimiter>>,
}

impl BlkOptions {
    /// The defaults of Cloud Hypervisor for the disk at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            direct: false,
            serial: None,
            num_queues: 1,
            queue_size: 128,
            disable_io_uring: false,
            sparse: true,
            lock_range: LockRange::Bytes,
            limiter: None,
        }
    }

    fn check(&self) -> Result<(), BlkError> {
        let refuse = |option, value: &dyn ToString, remedy| BlkError::Option {
            path: self.path.clone(),
            option,
            value: value.to_string(),
            remedy,
        };
        if self.num_queues == 0 || self.num_queues > MAX_QUEUES {
            return Err(refuse("num_queues", &self.num_queues, "give 1 to 256"));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 2 || self.queue_size > MAX_QUEUE_SIZE {
            return Err(refuse(
                "queue_size",
                &self.queue_size,
                "give a power of two from 2 to 32768",
            ));
        }
        if let Some(serial) = &self.serial
            && serial.len() > SERIAL_LEN
        {
            return Err(refuse("serial", serial, "give at most 20 bytes"));
        }
        Ok(())
    }
}

/// What the device did since it was made.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    read_bytes: u64,
    write_bytes: u64,
    read_ops: u64,
    write_ops: u64,
    flush_ops: u64,
    discard_ops: u64,
    write_zeroes_ops: u64,
    failed_ops: u64,
    malformed_chains: u64,
}

/// A virtio disk.
pub struct Blk {
    /// First, since dropping it waits for the host.
    active: Option<Active>,
    shared: Shared,
    queue_sizes: Vec<u16>,
}

/// What stays over a reset.
struct Shared {
    options: BlkOptions,
    disk: Arc<DiskFile>,
    serial: [u8; SERIAL_LEN],
    config: Config,
    limits: Limits,
    /// Readable when the host finished something, or when there is more to do.
    event: EventFd,
    throttle: Option<Throttle>,
    storage: Storage,
    counters: Counters,
}

impl Blk {
    /// Opens and locks the disk. The engine is made when the driver is ready.
    ///
    /// # Errors
    /// When an option cannot be, the disk cannot be opened, is no disk, or is locked by someone else.
    pub fn open(options: BlkOptions) -> Result<Self, BlkError> {
        options.check()?;
        let disk = DiskFile::open(&options.path, options.readonly, options.direct, options.lock_range)?;
        Self::of(options, disk)
    }

    /// A scratch disk of `size` bytes on `file` (of [`make_scratch`]), which it empties now and when it is dropped: what the
    /// pod writes there is in no other disk. `options.path` is the directory, for messages; of what says how a file is
    /// opened, nothing counts.
    ///
    /// # Errors
    /// When an option cannot be, or the file cannot have that size.
    pub fn scratch(options: BlkOptions, file: File, size: u64) -> Result<Self, BlkError> {
        options.check()?;
        let disk = DiskFile::transient(&options.path, file, size)?;
        Self::of(options, disk)
    }

    fn of(options: BlkOptions, disk: DiskFile) -> Result<Self, BlkError> {
        if !disk.size.is_multiple_of(request::SECTOR_SIZE) {
            tracing::warn!(
                "disk {}: its last {} bytes are not a whole sector and are not seen by the pod",
                options.path.display(),
                disk.size % request::SECTOR_SIZE
            );
        }
        let path = options.path.clone();
        let host = |what| {
            let path = path.clone();
            move |source| BlkError::Host { path, what, source }
        };
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("making its eventfd"))?;
        let throttle = options
            .limiter
            .as_ref()
            .map(|limiter| Throttle::new(Arc::clone(limiter)));
        let throttle = throttle.transpose().map_err(host("making its timer"))?;
        let mut serial = [0; SERIAL_LEN];
        let told = options.serial.as_deref().unwrap_or(&disk.identity);
        for (place, byte) in serial.iter_mut().zip(told.bytes()) {
            *place = byte;
        }
        let (config, limits) = Config::new(&disk, &options);
        Ok(Self {
            active: None,
            queue_sizes: vec![options.queue_size; usize::from(options.num_queues)],
            shared: Shared {
                options,
                disk: Arc::new(disk),
                serial,
                config,
                limits,
                event,
                throttle,
                storage: Storage::default(),
                counters: Counters::default(),
            },
        })
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.options.path
    }

    /// Its size in bytes, whole sectors only.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.limits.sectors << request::SECTOR_SHIFT
    }

    /// Requests that the host works on now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.active.as_ref().map_or(0, Active::in_flight)
    }

    /// Whether io_uring does the work; false while not active.
    #[must_use]
    pub fn uses_io_uring(&self) -> bool {
        self.active.as_ref().is_some_and(Active::uses_ring)
    }
}

impl Counters {
    fn failed(&mut self) {
        self.failed_ops = self.failed_ops.saturating_add(1);
    }

    fn malformed(&mut self) {
        self.malformed_chains = self.malformed_chains.saturating_add(1);
    }

    fn count(&mut self, request: &Request, status: Status) {
        let add = |counter: &mut u64, n: u64| *counter = counter.saturating_add(n);
        if status != Status::Ok {
            self.failed();
            return;
        }
        match request.operation {
            Operation::In { len, .. } => {
                add(&mut self.read_ops, 1);
                add(&mut self.read_bytes, len);
            }
            Operation::Out { len, .. } => {
                add(&mut self.write_ops, 1);
                add(&mut self.write_bytes, len);
            }
            Operation::Flush => add(&mut self.flush_ops, 1),
            Operation::Discard => add(&mut self.discard_ops, 1),
            Operation::WriteZeroes => add(&mut self.write_zeroes_ops, 1),
            Operation::GetId => {}
        }
    }
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_read,
    libc::SYS_mmap,
    libc::SYS_munmap,
];

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.shared.config.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if !self.shared.options.readonly {
            self.shared.config.write(offset, data);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = None;
        self.active = Some(Active::new(&self.shared, activation)?);
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.on_queue(&mut self.shared, index),
            None => Ok(()),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        let timer = self.shared.throttle.as_ref().map(Throttle::fd);
        std::iter::once(self.shared.event.as_raw_fd()).chain(timer).collect()
    }

    fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match &mut self.shared.throttle {
            Some(throttle) if index == TIMER => throttle.on_timer(),
            // An error: it is not readable, another turn took it.
            _ => drop(self.shared.event.read()),
        }
        match &mut self.active {
            Some(active) => active.on_event(&mut self.shared),
            None => Ok(()),
        }
    }

    fn set_capacity(&mut self, bytes: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
        let shared = &mut self.shared;
        shared.disk.resize(&shared.options.path, bytes)?;
        shared.limits.sectors = bytes >> request::SECTOR_SHIFT;
        shared.config.set_sectors(shared.limits.sectors);
        match &self.active {
            Some(active) => Ok(active.config_changed.signal_used()?),
            None => Ok(()),
        }
    }

    fn save(&mut self) -> Result<Value, StateError> {
        if self.shared.disk.transient {
            return Err(StateError::Refused(
                "its contents are in no file that a restored pod could have: take it out of the pod first (vm.remove-device)"
                    .to_owned(),
            ));
        }
        if let Some(active) = &mut self.active {
            active.rest(&mut self.shared)?;
        }
        Ok(Value::Bool(self.shared.config.is_writeback()))
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        self.shared.config.set_writeback(state::parse(state)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.shared.config.reset();
        self.shared.throttle.iter_mut().for_each(Throttle::reset);
        let _ = self.shared.event.read();
    }

    fn outlives_reboot(&self) -> bool {
        !self.shared.disk.transient
    }

    fn storage_news(&mut self) -> Option<StorageNews> {
        self.shared.storage.take_news()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.shared.counters;
        let allocated = self.shared.disk.allocated().map(|bytes| ("allocated_bytes", bytes));
        let mut all = vec![
            ("read_bytes", c.read_bytes),
            ("write_bytes", c.write_bytes),
            ("read_ops", c.read_ops),
            ("write_ops", c.write_ops),
            ("flush_ops", c.flush_ops),
            ("discard_ops", c.discard_ops),
            ("write_zeroes_ops", c.write_zeroes_ops),
            ("failed_ops", c.failed_ops),
            ("malformed_chains", c.malformed_chains),
        ];
        all.extend(allocated);
        all
    }
}
