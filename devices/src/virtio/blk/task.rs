//! A request on its way through the host: which step of I/O comes first, what follows a finished step, and what the
//! driver is told in the end. The steps are carried out by `ring.rs`.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::file::DiskFile;
use super::request::{Operation, Parser, Range, Request, Segment};
use super::ring::{Buffer, IoVec, Job, Op};
use crate::memory::PodMemory;

/// The largest request that is bounced, in bytes; a larger one that does not suit direct I/O uses the page cache.
const MAX_BOUNCE: u64 = 1 << 20;
/// The most bytes of zeros that one step writes.
const ZERO_STEP: u64 = 1 << 20;
/// How often a step that the kernel puts off is tried again.
const MAX_RETRIES: u8 = 16;

/// Status byte of an answer (virtio 1.2 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// How the disk is used at present.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// Every write is durable before it completes: the driver cannot or does not want to flush.
    pub(super) durable: bool,
    /// Holes may be made.
    pub(super) sparse: bool,
    /// Bytes that may be bounced now.
    pub(super) bounce: u64,
}

/// The state of one request.
#[derive(Debug)]
pub(super) struct Task {
    /// Which queue it came from.
    pub(super) queue: usize,
    /// The head of its chain.
    pub(super) head: u16,
    /// What it is.
    pub(super) request: Request,
    durable: bool,
    retries: u8,
    /// What the host refused it with, in the end.
    pub(super) error: Option<i32>,
    /// Where bounced bytes go (IN).
    bounce: Vec<Segment>,
    /// Bytes of host memory it holds for bouncing.
    pub(super) bounced: u64,
    /// Ranges not finished, the current one last.
    ranges: Vec<Range>,
}

/// What follows a finished step.
pub(super) enum Next {
    /// Another step.
    Step(Job<Task>),
    /// The request is done; the vector can be reused.
    Done(Task, Status, Vec<IoVec>),
}

impl Task {
    /// The first step of `request`, whose buffers and ranges `parser` holds. `iovecs` is a vector to reuse. None
    /// when a buffer cannot be accessed.
    pub(super) fn start(
        (queue, head): (usize, u16),
        request: Request,
        parser: &Parser,
        (disk, memory, mode): (&DiskFile, &Arc<PodMemory>, Mode),
        iovecs: Vec<IoVec>,
    ) -> Option<Next> {
        let mut task = Self {
            queue,
            head,
            request,
            durable: mode.durable,
            retries: 0,
            error: None,
            bounce: Vec::new(),
            bounced: 0,
            ranges: Vec::new(),
        };
        match request.operation {
            Operation::In { offset, len } | Operation::Out { offset, len } => {
                let buffer = Buffer::guest(memory, parser.segments(), iovecs)?;
                task.transfer(buffer, offset, len, parser.segments(), (disk, memory, mode))
            }
            Operation::Flush => Some(Next::Step(task.step(Op::Sync, Buffer::default()))),
            Operation::Discard | Operation::WriteZeroes => {
                task.ranges.extend(parser.ranges().iter().rev().map(|range| Range {
                    unmap: range.unmap && mode.sparse,
                    ..*range
                }));
                Some(task.next_range())
            }
            Operation::GetId => Some(Next::Done(task, Status::Ok, iovecs)),
        }
    }

    /// The first step of a read or write: zero-copy if the buffers suit, bounced if direct I/O demands it.
    fn transfer(
        mut self,
        buffer: Buffer,
        offset: u64,
        len: u64,
        segments: &[Segment],
        (disk, memory, mode): (&DiskFile, &Arc<PodMemory>, Mode),
    ) -> Option<Next> {
        let write = matches!(self.request.operation, Operation::Out { .. });
        let op = if write {
            Op::Write {
                offset,
                durable: self.durable,
            }
        } else {
            Op::Read { offset }
        };
        let (mut buffer, mut direct) = (buffer, false);
        if let Some((_, alignment)) = disk.direct() {
            let whole = (offset | len) & alignment.offset.wrapping_sub(1) == 0;
            if whole && buffer.is_aligned(alignment) {
                direct = true;
            } else if whole && len <= MAX_BOUNCE.min(mode.bounce) {
                let align = usize::try_from(alignment.memory.max(alignment.offset)).ok()?;
                let mut own = Buffer::own(usize::try_from(len).ok()?, align)?;
                if write {
                    copy_in(memory, segments, own.bytes_mut())?;
                } else {
                    self.bounce.extend_from_slice(segments);
                }
                self.bounced = len;
                buffer = own;
                direct = true;
            }
        }
        let tag = self;
        Some(Next::Step(Job {
            op,
            direct,
            buffer,
            tag,
        }))
    }

    fn step(self, op: Op, buffer: Buffer) -> Job<Self> {
        Job {
            op,
            direct: false,
            buffer,
            tag: self,
        }
    }

    /// The step for the current range, or the end.
    fn next_range(self) -> Next {
        let Some(range) = self.ranges.last().copied() else {
            if self.durable {
                return Next::Step(self.step(Op::Sync, Buffer::default()));
            }
            return Next::Done(self, Status::Ok, Vec::new());
        };
        let Range { offset, len, unmap } = range;
        let op = if unmap {
            Op::Punch { offset, len }
        } else {
            Op::Zero { offset, len }
        };
        Next::Step(self.step(op, Buffer::default()))
    }

    /// The step that writes zeros over the beginning of the current range.
    fn write_zeroes(self) -> Next {
        let Some((range, buffer)) = self
            .ranges
            .last()
            .and_then(|range| Some((*range, Buffer::zeroes(range.len.min(ZERO_STEP))?)))
        else {
            return Next::Done(self, Status::IoError, Vec::new());
        };
        let op = Op::Write {
            offset: range.offset,
            durable: false,
        };
        Next::Step(self.step(op, buffer))
    }

    /// What follows the finished step `job`, which moved `result` bytes.
    pub(super) fn next(job: Job<Self>, result: io::Result<u64>, memory: &PodMemory) -> Next {
        match result {
            Ok(done) => Self::succeeded(job, done, memory),
            Err(error) => Self::failed(job, &error),
        }
    }

    fn succeeded(mut job: Job<Self>, done: u64, memory: &PodMemory) -> Next {
        let ranged = matches!(job.tag.request.operation, Operation::Discard | Operation::WriteZeroes);
        match &mut job.op {
            Op::Sync => Next::Done(job.tag, Status::Ok, job.buffer.into_iovecs()),
            Op::Punch { .. } | Op::Zero { .. } => {
                job.tag.ranges.pop();
                job.tag.next_range()
            }
            // The file is shorter than it was, or the medium takes nothing.
            Op::Read { .. } | Op::Write { .. } if done == 0 => {
                Next::Done(job.tag, Status::IoError, job.buffer.into_iovecs())
            }
            Op::Write { .. } if ranged => {
                if let Some(range) = job.tag.ranges.last_mut() {
                    range.offset = range.offset.saturating_add(done);
                    range.len = range.len.saturating_sub(done);
                    if range.len != 0 {
                        return job.tag.write_zeroes();
                    }
                }
                job.tag.ranges.pop();
                job.tag.next_range()
            }
            Op::Read { offset } | Op::Write { offset, .. } => {
                job.buffer.advance(done);
                if job.buffer.remaining() == 0 {
                    return job.tag.transferred(job.buffer, memory);
                }
                *offset = offset.saturating_add(done);
                // What is left need not be aligned any more.
                job.direct = false;
                Next::Step(job)
            }
        }
    }

    fn failed(mut job: Job<Self>, error: &io::Error) -> Next {
        let code = error.raw_os_error().unwrap_or(libc::EIO);
        let put_off = matches!(code, libc::EINTR | libc::EAGAIN);
        if put_off && job.tag.retries < MAX_RETRIES {
            job.tag.retries = job.tag.retries.saturating_add(1);
            return Next::Step(job);
        }
        let unable = matches!(code, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL);
        match (job.op, job.tag.request.operation) {
            // Alignment that the file system did not tell of.
            (Op::Read { .. } | Op::Write { .. }, _) if job.direct && code == libc::EINVAL => {
                job.direct = false;
                Next::Step(job)
            }
            // A discard is advice (virtio 1.2 5.2.6.2).
            (Op::Punch { .. }, Operation::Discard) if unable => {
                job.tag.ranges.pop();
                job.tag.next_range()
            }
            (Op::Punch { offset, len }, _) if unable => {
                job.op = Op::Zero { offset, len };
                Next::Step(job)
            }
            (Op::Zero { .. }, _) if unable => job.tag.write_zeroes(),
            _ => {
                job.tag.error = Some(code);
                Next::Done(job.tag, Status::IoError, job.buffer.into_iovecs())
            }
        }
    }

    /// All bytes were moved: those that were bounced go to the guest.
    fn transferred(self, mut buffer: Buffer, memory: &PodMemory) -> Next {
        if !self.bounce.is_empty() && copy_out(memory, &self.bounce, buffer.bytes_mut()).is_none() {
            return Next::Done(self, Status::IoError, buffer.into_iovecs());
        }
        Next::Done(self, Status::Ok, buffer.into_iovecs())
    }
}

/// Copies the guest's bytes into `bytes`; None when they cannot be read.
fn copy_in(memory: &PodMemory, segments: &[Segment], bytes: &mut [u8]) -> Option<()> {
    let mut rest = bytes;
    for segment in segments {
        let (part, tail) = rest.split_at_mut_checked(segment.len as usize)?;
        memory.read_slice(part, segment.address).ok()?;
        rest = tail;
    }
    Some(())
}

/// Copies `bytes` to the guest; None when they cannot be written.
fn copy_out(memory: &PodMemory, segments: &[Segment], bytes: &[u8]) -> Option<()> {
    let mut rest = bytes;
    for segment in segments {
        let (part, tail) = rest.split_at_checked(segment.len as usize)?;
        memory.write_slice(part, segment.address).ok()?;
        rest = tail;
    }
    Some(())
}

/// Writes the status byte; false when the driver's memory does not allow it.
pub(super) fn write_status(memory: &PodMemory, address: GuestAddress, status: Status) -> bool {
    memory.write_obj(status as u8, address).is_ok()
}
