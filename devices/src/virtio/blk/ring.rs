//! Where a disk's bytes move: io_uring, or plain system calls where there is no io_uring. A [`Job`] is owned by the
//! [`Engine`] from submission to completion, its buffer with it, so that no code can touch, move or free what the
//! kernel is using. What a job means is `task.rs`'s business.
#![expect(
    unsafe_code,
    reason = "submission queue entries and vectored I/O carry raw addresses of buffers"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use io_uring::{IoUring, opcode, types};
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::file::{DirectAlignment, DiskFile};
use super::request::{MAX_SEGMENTS, Segment};
use crate::memory::PodMemory;

/// The piece of zeros that zero-writes repeat, in bytes.
const ZEROES_LEN: usize = 64 << 10;
/// `user_data` of entries that belong to no job.
const NO_JOB: u64 = u64::MAX;

/// A `struct iovec` whose address is a number, so that it can be sent between threads.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct IoVec {
    base: usize,
    len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());

/// The memory of one job: what its addresses point to lives as long as it does.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    /// Keeps guest memory mapped.
    _memory: Option<Arc<PodMemory>>,
    /// Memory of our own, if the addresses point there.
    own: Vec<u8>,
    /// Where the usable part of `own` starts.
    own_start: usize,
    iovecs: Vec<IoVec>,
    /// The first vector that is not finished.
    first: usize,
    /// Bytes not finished.
    remaining: u64,
}

impl Buffer {
    /// The guest memory of `segments`; `iovecs` is a vector to reuse. None when a byte of it is private or absent,
    /// or when there are too many pieces.
    pub(super) fn guest(memory: &Arc<PodMemory>, segments: &[Segment], mut iovecs: Vec<IoVec>) -> Option<Self> {
        iovecs.clear();
        let mut remaining = 0_u64;
        for segment in segments {
            let len = usize::try_from(segment.len).ok()?;
            for slice in memory.get_slices(segment.address, len) {
                let slice = slice.ok()?;
                if iovecs.len() >= MAX_SEGMENTS {
                    return None;
                }
                iovecs.push(IoVec {
                    base: slice.ptr_guard_mut().as_ptr().expose_provenance(),
                    len: slice.len(),
                });
            }
            remaining = remaining.checked_add(u64::from(segment.len))?;
        }
        Some(Self {
            _memory: Some(Arc::clone(memory)),
            iovecs,
            remaining,
            ..Self::default()
        })
    }

    /// `len` bytes of our own, zeroed, at an address that is a multiple of `align` (a power of two).
    pub(super) fn own(len: usize, align: usize) -> Option<Self> {
        let mut own = vec![0; len.checked_add(align)?];
        let own_start = own.as_ptr().align_offset(align.max(1));
        let usable = own.get_mut(own_start..own_start.checked_add(len)?)?;
        let base = usable.as_mut_ptr().expose_provenance();
        Some(Self {
            own,
            own_start,
            iovecs: vec![IoVec { base, len }],
            remaining: len as u64,
            ..Self::default()
        })
    }

    /// At most `len` zeros, to be written; see [`Buffer::remaining`] for how many.
    pub(super) fn zeroes(len: u64) -> Option<Self> {
        let piece = usize::try_from(len).unwrap_or(ZEROES_LEN).min(ZEROES_LEN);
        let mut buffer = Self::own(piece, 1)?;
        let one = *buffer.iovecs.first()?;
        let whole = usize::try_from(len / piece.max(1) as u64).unwrap_or(1).clamp(1, 16);
        buffer.iovecs.resize(whole, one);
        buffer.remaining = (piece as u64).checked_mul(whole as u64)?;
        Some(buffer)
    }

    /// Our own bytes (of [`Buffer::own`]).
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.own.get_mut(self.own_start..).unwrap_or_default()
    }

    /// Bytes that are still to be moved.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Whether every piece suits direct I/O.
    pub(super) fn is_aligned(&self, alignment: DirectAlignment) -> bool {
        self.iovecs.iter().all(|v| {
            v.base as u64 & alignment.memory.wrapping_sub(1) == 0
                && v.len as u64 & alignment.offset.wrapping_sub(1) == 0
        })
    }

    /// Notes that `done` bytes were moved.
    pub(super) fn advance(&mut self, done: u64) {
        self.remaining = self.remaining.saturating_sub(done);
        let mut left = usize::try_from(done).unwrap_or(usize::MAX);
        while let Some(v) = self.iovecs.get_mut(self.first) {
            let step = left.min(v.len);
            v.base = v.base.wrapping_add(step);
            v.len = v.len.saturating_sub(step);
            left = left.saturating_sub(step);
            if v.len != 0 {
                break;
            }
            self.first = self.first.saturating_add(1);
        }
    }

    /// The vector, for reuse.
    pub(super) fn into_iovecs(self) -> Vec<IoVec> {
        self.iovecs
    }

    /// The unfinished vectors, as the kernel takes them.
    fn vectors(&self) -> (*const libc::iovec, u32) {
        let rest = self.iovecs.get(self.first..).unwrap_or_default();
        (rest.as_ptr().cast(), u32::try_from(rest.len()).unwrap_or(0))
    }
}

/// One step of host I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Read from byte `offset` into the buffer.
    Read { offset: u64 },
    /// Write the buffer to byte `offset`; durable: the data is on the medium when it completes.
    Write { offset: u64, durable: bool },
    /// Make what was written durable.
    Sync,
    /// Make a hole.
    Punch { offset: u64, len: u64 },
    /// Make zeros that stay allocated.
    Zero { offset: u64, len: u64 },
}

/// A step with its buffer and its owner's state `T`.
#[derive(Debug)]
pub(super) struct Job<T> {
    /// What to do.
    pub(super) op: Op,
    /// Past the page cache (the buffer must suit).
    pub(super) direct: bool,
    /// The memory.
    pub(super) buffer: Buffer,
    /// Whose job it is.
    pub(super) tag: T,
}

enum Backend {
    Ring(Box<IoUring>),
    Calls,
}

/// Carries out jobs.
pub(super) struct Engine<T> {
    disk: Arc<DiskFile>,
    backend: Backend,
    slots: Vec<Option<Job<T>>>,
    free: Vec<usize>,
    /// Finished without the ring.
    done: VecDeque<(Job<T>, io::Result<u64>)>,
    in_flight: usize,
}

impl<T> Engine<T> {
    /// An engine for at most `depth` jobs at once (at most 4096), whose completions signal `event`. Without io_uring
    /// (`ring` false, or the kernel refuses) jobs are carried out while they are submitted.
    pub(super) fn new(disk: Arc<DiskFile>, depth: usize, event: &EventFd, ring: bool) -> io::Result<Self> {
        let backend = if ring {
            match new_ring(depth, event) {
                Ok(ring) => Backend::Ring(Box::new(ring)),
                Err(e) if is_unavailable(&e) => {
                    tracing::warn!("no io_uring ({e}): disk I/O is synchronous");
                    Backend::Calls
                }
                Err(e) => return Err(e),
            }
        } else {
            Backend::Calls
        };
        Ok(Self {
            disk,
            backend,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            done: VecDeque::with_capacity(depth),
            in_flight: 0,
        })
    }

    /// Whether io_uring does the work.
    pub(super) fn uses_ring(&self) -> bool {
        matches!(self.backend, Backend::Ring(_))
    }

    /// Jobs that were submitted and not taken by [`Engine::next_done`].
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes `job`; it starts at the next [`Engine::flush`]. Keep [`Engine::in_flight`] below the depth: a job that
    /// finds no room fails with EBUSY.
    pub(super) fn submit(&mut self, job: Job<T>) {
        self.in_flight = self.in_flight.saturating_add(1);
        let fd = match self.disk.direct() {
            Some((file, _)) if job.direct => file.as_raw_fd(),
            _ => self.disk.cached().as_raw_fd(),
        };
        let Backend::Ring(ring) = &mut self.backend else {
            let result = call(fd, &job);
            self.done.push_back((job, result));
            return;
        };
        let busy = || io::Error::from_raw_os_error(libc::EBUSY);
        let Some(slot) = self.free.pop() else {
            self.done.push_back((job, Err(busy())));
            return;
        };
        let entry = entry(fd, &job).user_data(slot as u64);
        let Some(place) = self.slots.get_mut(slot) else {
            self.done.push_back((job, Err(busy())));
            return;
        };
        let job = place.insert(job);
        debug_assert!(job.buffer.first <= job.buffer.iovecs.len(), "advance() stays inside");
        // SAFETY: the addresses in `entry` are the vector array and the pieces of `job.buffer`, which the slot owns
        // until the kernel reports completion (`next_done`) or the ring is drained (`drop`): nobody else can reach
        // the slot, and moving a `Buffer` moves neither its array nor its pieces.
        let mut pushed = unsafe { ring.submission().push(&entry) }.is_ok();
        if !pushed && ring.submit().is_ok() {
            // SAFETY: as above; the entry was not taken the first time.
            pushed = unsafe { ring.submission().push(&entry) }.is_ok();
        }
        if !pushed && let Some(job) = place.take() {
            self.free.push(slot);
            self.done.push_back((job, Err(busy())));
        }
    }

    /// Starts everything that was submitted, with one system call. False: the kernel did not take all of it now;
    /// flush again later.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        let Backend::Ring(ring) = &mut self.backend else {
            return Ok(true);
        };
        // Each turn takes at least one entry, or ends.
        while !ring.submission().is_empty() {
            match ring.submit() {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// The next finished job and how many bytes it moved.
    pub(super) fn next_done(&mut self) -> Option<(Job<T>, io::Result<u64>)> {
        if let Some(done) = self.done.pop_front() {
            self.in_flight = self.in_flight.saturating_sub(1);
            return Some(done);
        }
        let Backend::Ring(ring) = &mut self.backend else {
            return None;
        };
        loop {
            let entry = ring.completion().next()?;
            let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(job) = self.slots.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            self.in_flight = self.in_flight.saturating_sub(1);
            let result = u64::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
            return Some((job, result));
        }
    }

    /// Completions need not signal the event until it is unmuted: [`Engine::next_done`] is being called anyway.
    pub(super) fn mute(&mut self) {
        if let Backend::Ring(ring) = &mut self.backend {
            ring.completion().disable_eventfd();
        }
    }

    /// Completions signal the event again; true if some came meanwhile.
    pub(super) fn unmute(&mut self) -> bool {
        let Backend::Ring(ring) = &mut self.backend else {
            return !self.done.is_empty();
        };
        ring.completion().enable_eventfd();
        // The kernel must see the flag before we look at the tail for the last time.
        fence(Ordering::SeqCst);
        !self.done.is_empty() || !ring.completion().is_empty()
    }

    /// Waits until the host has finished something, if it works on anything.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        let Backend::Ring(ring) = &mut self.backend else {
            return Ok(());
        };
        while self.done.is_empty() && ring.completion().is_empty() && self.in_flight > 0 {
            match ring.submit_and_wait(1) {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Cancels what can be cancelled and waits for the rest; results are dropped.
    fn drain(&mut self) -> io::Result<()> {
        if let Backend::Ring(ring) = &mut self.backend {
            ring.completion().disable_eventfd();
            let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any())
                .build()
                .user_data(NO_JOB);
            // SAFETY: a cancel entry carries no address. If there is no room for it, the jobs are simply waited for.
            let _ = unsafe { ring.submission().push(&cancel) };
        }
        self.done.clear();
        while self.slots.iter().any(Option::is_some) {
            let Backend::Ring(ring) = &mut self.backend else {
                break;
            };
            match ring.submit_and_wait(1) {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => return Err(e),
                _ => while self.next_done().is_some() {},
            }
        }
        self.in_flight = 0;
        Ok(())
    }
}

impl<T> Drop for Engine<T> {
    fn drop(&mut self) {
        if let Err(e) = self.drain() {
            // The kernel may still use the buffers: they can never be freed.
            tracing::error!("in-flight disk I/O cannot be waited for ({e}): its memory stays allocated");
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// A ring for `depth` jobs whose completions signal `event`.
fn new_ring(depth: usize, event: &EventFd) -> io::Result<IoUring> {
    let entries = u32::try_from(depth.clamp(1, 4096).next_power_of_two()).map_err(io::Error::other)?;
    let ring: IoUring = IoUring::builder().dontfork().build(entries)?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    Ok(ring)
}

/// Whether an error of [`new_ring`] means that this kernel, or its policy, has no io_uring for us.
fn is_unavailable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOMEM)
    )
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The submission queue entry of `job`.
fn entry<T>(fd: RawFd, job: &Job<T>) -> io_uring::squeue::Entry {
    let fd = types::Fd(fd);
    let (vectors, count) = job.buffer.vectors();
    match job.op {
        Op::Read { offset } => opcode::Readv::new(fd, vectors, count).offset(offset).build(),
        Op::Write { offset, durable } => opcode::Writev::new(fd, vectors, count)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Op::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Punch { offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(PUNCH).build(),
        Op::Zero { offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(ZERO).build(),
    }
}

/// Carries `job` out now.
fn call<T>(fd: RawFd, job: &Job<T>) -> io::Result<u64> {
    let (vectors, count) = job.buffer.vectors();
    let count = libc::c_int::try_from(count).map_err(io::Error::other)?;
    let offset = |value: u64| libc::off_t::try_from(value).map_err(io::Error::other);
    let result = match job.op {
        Op::Read { offset: at } => {
            let at = offset(at)?;
            // SAFETY: `vectors` is an array of `count` vectors in `job.buffer`, which owns or keeps alive every
            // piece for the length of the call; the pieces are guest memory or our own bytes, never Rust references.
            unsafe { libc::preadv2(fd, vectors, count, at, 0) }
        }
        Op::Write { offset: at, durable } => {
            let at = offset(at)?;
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as for reading.
            unsafe { libc::pwritev2(fd, vectors, count, at, flags) }
        }
        // SAFETY: takes no address.
        Op::Sync => unsafe { libc::fdatasync(fd) as isize },
        Op::Punch { offset: at, len } => {
            let (at, len) = (offset(at)?, offset(len)?);
            // SAFETY: takes no address.
            unsafe { libc::fallocate(fd, PUNCH, at, len) as isize }
        }
        Op::Zero { offset: at, len } => {
            let (at, len) = (offset(at)?, offset(len)?);
            // SAFETY: takes no address.
            unsafe { libc::fallocate(fd, ZERO, at, len) as isize }
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
