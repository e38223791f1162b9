//! What a driver asks of a disk: a descriptor chain becomes a checked [`Request`]. No I/O happens here; the header
//! and the ranges are copied out of guest memory once, so nothing can change after it was checked.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::memory::PodMemory;

/// log2 of the unit of every address and length of the protocol (virtio 1.2 5.2.4).
pub(super) const SECTOR_SHIFT: u32 = 9;
/// The unit of every address and length of the protocol, in bytes.
pub(super) const SECTOR_SIZE: u64 = 1 << SECTOR_SHIFT;
/// The length of the request header (virtio 1.2 5.2.6).
const HEADER_LEN: usize = 16;
/// The length of one discard or write-zeroes range (virtio 1.2 5.2.6, `virtio_blk_discard_write_zeroes`).
const RANGE_LEN: u32 = 16;
/// The most data buffers that one request may have: what one vectored call of the host takes (`IOV_MAX`).
pub(super) const MAX_SEGMENTS: usize = 1024;
/// The most descriptors of one chain that are looked at: data, header and status.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS + 2;

/// One piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it begins.
    pub(super) address: GuestAddress,
    /// How many bytes it has.
    pub(super) len: u32,
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// First byte.
    pub(super) offset: u64,
    /// How many bytes; never 0.
    pub(super) len: u64,
    /// The space may be given back to the host.
    pub(super) unmap: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Read `len` bytes from byte `offset` into the segments.
    In { offset: u64, len: u64 },
    /// Write `len` bytes from the segments to byte `offset`.
    Out { offset: u64, len: u64 },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial.
    GetId,
    /// Give the ranges back to the host; what they read afterwards is undefined.
    Discard,
    /// Make the ranges read as zeros.
    WriteZeroes,
}

/// A request that passed every check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// What is to be done. Its buffers or ranges are in the [`Parser`] that made it.
    pub(super) operation: Operation,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// There is no status byte that the device may write: give the chain back with nothing written.
    NoStatus,
    /// Answer with `VIRTIO_BLK_S_IOERR`.
    IoError(GuestAddress),
    /// Answer with `VIRTIO_BLK_S_UNSUPP`.
    Unsupported(GuestAddress),
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the disk in sectors.
    pub(super) sectors: u64,
    /// Nothing may be written.
    pub(super) readonly: bool,
    /// Discard is offered.
    pub(super) discard: bool,
    /// Most sectors of one discard range.
    pub(super) max_discard_sectors: u32,
    /// Most sectors of one write-zeroes range.
    pub(super) max_write_zeroes_sectors: u32,
    /// Most ranges of one request.
    pub(super) max_ranges: u32,
}

/// The parser with its buffers, which are reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// Device-readable data behind the header, then device-writable data before the status byte.
    segments: Vec<Segment>,
    /// Ranges of a discard or write-zeroes request.
    ranges: Vec<Range>,
}

impl Parser {
    /// The data buffers of the last request.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The ranges of the last request.
    pub(super) fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Checks `chain` whole. The layout of the buffers is free (virtio 1.2 2.7.4): the header is the first 16
    /// readable bytes, the status the last writable byte, whatever descriptors they lie in.
    pub(super) fn parse(
        &mut self,
        chain: DescriptorChain<Arc<PodMemory>>,
        memory: &PodMemory,
        limits: &Limits,
    ) -> Result<Request, Rejection> {
        self.ranges.clear();
        let mut frame = self.frame(chain).ok_or(Rejection::NoStatus)?;
        if memory.get_slice(frame.status, 1).is_err() {
            return Err(Rejection::NoStatus);
        }
        let status = frame.status;
        let failed = Rejection::IoError(status);
        let header = self.take_header(memory, &mut frame).ok_or(failed)?;
        let (kind, sector) = split_header(header);
        let offset = sector.checked_mul(SECTOR_SIZE);
        let checked = |len: u64| -> Result<u64, Rejection> {
            let count = len >> SECTOR_SHIFT;
            let aligned = len != 0 && len.is_multiple_of(SECTOR_SIZE);
            let inside = sector.checked_add(count).is_some_and(|end| end <= limits.sectors);
            if aligned && inside {
                offset.ok_or(failed)
            } else {
                Err(failed)
            }
        };
        let operation = match kind {
            VIRTIO_BLK_T_IN if frame.readable == 0 => Operation::In {
                offset: checked(frame.writable)?,
                len: frame.writable,
            },
            VIRTIO_BLK_T_OUT if frame.writable == 0 && !limits.readonly => Operation::Out {
                offset: checked(frame.readable)?,
                len: frame.readable,
            },
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => return Err(failed),
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID if frame.readable == 0 && frame.writable != 0 => Operation::GetId,
            VIRTIO_BLK_T_GET_ID => return Err(failed),
            VIRTIO_BLK_T_DISCARD if limits.readonly => return Err(failed),
            VIRTIO_BLK_T_DISCARD if limits.discard => {
                self.read_ranges(memory, &frame, limits, true)?;
                Operation::Discard
            }
            VIRTIO_BLK_T_WRITE_ZEROES if limits.readonly => return Err(failed),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.read_ranges(memory, &frame, limits, false)?;
                Operation::WriteZeroes
            }
            _ => return Err(Rejection::Unsupported(status)),
        };
        Ok(Request { operation, status })
    }

    /// Collects the descriptors: None when the chain breaks off, is longer than any queue, has a readable buffer
    /// behind a writable one, or no writable byte for the status.
    fn frame(&mut self, chain: DescriptorChain<Arc<PodMemory>>) -> Option<Frame> {
        self.segments.clear();
        let mut frame = Frame {
            status: GuestAddress(0),
            readable: 0,
            writable: 0,
            readable_segments: 0,
        };
        let mut writing = false;
        let mut complete = false;
        for descriptor in chain {
            if self.segments.len() >= MAX_DESCRIPTORS {
                return None;
            }
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                writing = true;
                frame.writable = frame.writable.checked_add(u64::from(segment.len))?;
            } else if writing {
                return None;
            } else {
                frame.readable = frame.readable.checked_add(u64::from(segment.len))?;
                frame.readable_segments = frame.readable_segments.checked_add(1)?;
            }
            self.segments.push(segment);
            complete = !descriptor.has_next();
        }
        if !complete || !writing {
            return None;
        }
        let last = self.segments.last_mut()?;
        last.len = last.len.checked_sub(1)?;
        frame.status = GuestAddress(last.address.0.checked_add(u64::from(last.len))?);
        frame.writable = frame.writable.checked_sub(1)?;
        Some(frame)
    }

    /// Copies the header and cuts it off the segments; empty segments go too.
    fn take_header(&mut self, memory: &PodMemory, frame: &mut Frame) -> Option<[u8; HEADER_LEN]> {
        let mut header = [0; HEADER_LEN];
        let mut filled = 0;
        for segment in self.segments.iter_mut().take(frame.readable_segments) {
            let rest = header.get_mut(filled..)?;
            let take = rest.len().min(usize::try_from(segment.len).ok()?);
            if take == 0 {
                continue;
            }
            memory.read_slice(rest.get_mut(..take)?, segment.address).ok()?;
            filled = filled.checked_add(take)?;
            let cut = u32::try_from(take).ok()?;
            segment.address = GuestAddress(segment.address.0.checked_add(u64::from(cut))?);
            segment.len = segment.len.checked_sub(cut)?;
        }
        if filled != HEADER_LEN {
            return None;
        }
        frame.readable = frame.readable.checked_sub(HEADER_LEN as u64)?;
        self.segments.retain(|segment| segment.len != 0);
        (self.segments.len() <= MAX_SEGMENTS).then_some(header)
    }

    /// Copies and checks the ranges of a discard or write-zeroes request.
    fn read_ranges(
        &mut self,
        memory: &PodMemory,
        frame: &Frame,
        limits: &Limits,
        discard: bool,
    ) -> Result<(), Rejection> {
        let failed = Rejection::IoError(frame.status);
        let longest = u64::from(limits.max_ranges.saturating_mul(RANGE_LEN));
        let fits =
            frame.readable != 0 && frame.readable.is_multiple_of(u64::from(RANGE_LEN)) && frame.readable <= longest;
        if frame.writable != 0 || !fits {
            return Err(failed);
        }
        let mut raw = [0; RANGE_LEN as usize];
        let mut filled = 0;
        for segment in &self.segments {
            let mut done = 0;
            while done < segment.len {
                let rest = raw.get_mut(filled..).ok_or(failed)?;
                let take = rest.len().min((segment.len.saturating_sub(done)) as usize);
                let address = segment.address.0.checked_add(u64::from(done)).ok_or(failed)?;
                let part = rest.get_mut(..take).ok_or(failed)?;
                memory.read_slice(part, GuestAddress(address)).map_err(|_| failed)?;
                filled = filled.saturating_add(take);
                done = done.saturating_add(u32::try_from(take).map_err(|_| failed)?);
                if filled == raw.len() {
                    filled = 0;
                    let range = checked_range(raw, limits, discard, frame.status)?;
                    self.ranges.extend(range);
                }
            }
        }
        Ok(())
    }
}

/// What [`Parser::frame`] found: where the status byte is, and how many bytes and buffers there are beside it.
struct Frame {
    status: GuestAddress,
    readable: u64,
    writable: u64,
    readable_segments: usize,
}

/// `type` and `sector` of a header (virtio 1.2 5.2.6, `virtio_blk_req`).
fn split_header(header: [u8; HEADER_LEN]) -> (u32, u64) {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    (
        u32::from_le_bytes([t0, t1, t2, t3]),
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
    )
}

/// Checks one range; None when it is empty.
fn checked_range(
    raw: [u8; RANGE_LEN as usize],
    limits: &Limits,
    discard: bool,
    status: GuestAddress,
) -> Result<Option<Range>, Rejection> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
    if flags & !known != 0 {
        return Err(Rejection::Unsupported(status));
    }
    let longest = if discard {
        limits.max_discard_sectors
    } else {
        limits.max_write_zeroes_sectors
    };
    let end = sector.checked_add(u64::from(count));
    if count > longest || end.is_none_or(|end| end > limits.sectors) {
        return Err(Rejection::IoError(status));
    }
    let range = Range {
        offset: sector << SECTOR_SHIFT,
        len: u64::from(count) << SECTOR_SHIFT,
        unmap: discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
    };
    Ok((count != 0).then_some(range))
}
