//! The vsock packet (virtio 1.2 section 5.10.6): its header, and the data segments of a descriptor chain. A chain may
//! be cut into descriptors anywhere (2.7.4.3), so no framing is assumed. What a packet means is in `connection`.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};

use super::sys;
use crate::memory::PodMemory;

/// Bytes of a packet header.
pub(super) const HEADER_SIZE: usize = 44;
/// The host's context identifier (5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The stream socket type (5.10.6).
pub(super) const TYPE_STREAM: u16 = 1;

/// Packet operations (5.10.6).
pub(super) mod op {
    /// Connect.
    pub(crate) const REQUEST: u16 = 1;
    /// Accept.
    pub(crate) const RESPONSE: u16 = 2;
    /// Abort.
    pub(crate) const RST: u16 = 3;
    /// Half or full close.
    pub(crate) const SHUTDOWN: u16 = 4;
    /// Data.
    pub(crate) const RW: u16 = 5;
    /// The sender's receive window.
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    /// Asks for a CREDIT_UPDATE.
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN: the sender receives no more.
pub(super) const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

/// Takes the next `N` bytes off a fixed-size header.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((head, tail)) => {
            *rest = tail;
            *head
        }
        None => [0; N],
    }
}

impl Header {
    /// Reads the little-endian form.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes the little-endian form.
    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut out = [0; HEADER_SIZE];
        let fields = self
            .src_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        for (byte, value) in out.iter_mut().zip(fields) {
            *byte = value;
        }
        out
    }

    /// The reset that answers this packet (5.10.6.5).
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The buffers of one chain, in order, all in one direction and all in memory that the device may touch. The list is
/// reused from packet to packet.
#[derive(Debug, Default)]
pub(super) struct Segments {
    list: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Segments {
    /// Takes the descriptors of `chain` that are `writable` (or not). False when the chain mixes directions or lies
    /// in memory that the device may not touch.
    pub(super) fn load(&mut self, memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>, writable: bool) -> bool {
        self.list.clear();
        self.len = 0;
        for descriptor in chain {
            let len = descriptor.len() as usize;
            if descriptor.is_write_only() != writable {
                return false;
            }
            if len == 0 {
                continue;
            }
            if memory.get_slices(descriptor.addr(), len).any(|slice| slice.is_err()) {
                return false;
            }
            self.list.push((descriptor.addr(), len));
            self.len = self.len.saturating_add(len);
        }
        true
    }

    /// All bytes of the chain.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Calls `each` with the memory of bytes `[start, start + count)`, piece by piece, until it answers false.
    /// Answers false when a piece is not there or may not be touched.
    fn visit(
        &self,
        memory: &PodMemory,
        start: usize,
        count: usize,
        mut each: impl FnMut(VolatileSlice<'_>) -> bool,
    ) -> bool {
        let (mut skip, mut left) = (start, count);
        for &(address, len) in &self.list {
            if left == 0 {
                return true;
            }
            if skip >= len {
                skip -= len;
                continue;
            }
            let piece = (len - skip).min(left);
            let Some(from) = address.0.checked_add(skip as u64) else {
                return false;
            };
            for slice in memory.get_slices(GuestAddress(from), piece) {
                let Ok(slice) = slice else { return false };
                if !each(slice) {
                    return true;
                }
            }
            skip = 0;
            left -= piece;
        }
        left == 0
    }

    /// Reads the header; None when the chain is too short for one.
    pub(super) fn header(&self, memory: &PodMemory) -> Option<Header> {
        let mut bytes = [0u8; HEADER_SIZE];
        let mut rest = bytes.as_mut_slice();
        let done = self.visit(memory, 0, HEADER_SIZE, |slice| {
            let n = slice.len().min(rest.len());
            if let Some((now, later)) = std::mem::take(&mut rest).split_at_mut_checked(n) {
                slice.copy_to(now);
                rest = later;
            }
            true
        });
        done.then(|| Header::from_bytes(&bytes))
    }

    /// Writes the header; false when the chain is too short for one.
    pub(super) fn set_header(&self, memory: &PodMemory, header: Header) -> bool {
        let bytes = header.to_bytes();
        let mut rest = bytes.as_slice();
        self.visit(memory, 0, HEADER_SIZE, |slice| {
            let n = slice.len().min(rest.len());
            if let Some((now, later)) = rest.split_at_checked(n) {
                slice.copy_from(now);
                rest = later;
            }
            true
        })
    }

    /// Sends `count` data bytes from data offset `from` to `stream` until it would block; answers the bytes sent.
    ///
    /// # Errors
    /// What the socket said, when nothing was sent before.
    pub(super) fn send(&self, memory: &PodMemory, from: usize, count: usize, stream: &UnixStream) -> io::Result<usize> {
        let mut sent = 0;
        let mut outcome = Ok(());
        self.visit(
            memory,
            HEADER_SIZE.saturating_add(from),
            count,
            |slice| match sys::send(stream, &slice) {
                Ok(n) => {
                    sent += n;
                    n == slice.len()
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                Err(error) => {
                    outcome = Err(error);
                    false
                }
            },
        );
        outcome.map(|()| sent)
    }

    /// Appends `count` data bytes from data offset `from` to `out`; false when they may not be read.
    pub(super) fn append_to(&self, memory: &PodMemory, from: usize, count: usize, out: &mut VecDeque<u8>) -> bool {
        let mut chunk = [0u8; 4096];
        self.visit(memory, HEADER_SIZE.saturating_add(from), count, |slice| {
            let mut at = 0;
            while let Ok(rest) = slice.offset(at)
                && !rest.is_empty()
            {
                let n = rest.copy_to(&mut chunk);
                out.extend(chunk.iter().take(n));
                at = at.saturating_add(n);
            }
            true
        })
    }

    /// Fills at most `limit` data bytes from `stream`: the bytes read, 0 at its end.
    ///
    /// # Errors
    /// What the socket said (`WouldBlock` included) when nothing was read before.
    pub(super) fn receive(&self, memory: &PodMemory, limit: usize, stream: &UnixStream) -> io::Result<usize> {
        let room = self.len.saturating_sub(HEADER_SIZE).min(limit);
        let mut got = 0;
        let mut outcome = Ok(());
        self.visit(memory, HEADER_SIZE, room, |slice| match sys::receive(stream, &slice) {
            Ok(n) => {
                got += n;
                n == slice.len()
            }
            Err(error) => {
                outcome = Err(error);
                false
            }
        });
        match outcome {
            Err(error) if got == 0 => Err(error),
            _ => Ok(got),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_vsock::packet::VsockPacket;

    use super::*;

    proptest! {
        #[test]
        fn header_survives_the_round_trip(bytes in any::<[u8; HEADER_SIZE]>()) {
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }

    #[test]
    fn header_agrees_with_the_rust_vmm_packet() {
        let header = Header {
            src_cid: 0x1122_3344_5566_7788,
            dst_cid: 2,
            src_port: 0xa1a2_a3a4,
            dst_port: 1024,
            len: 77,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0x0102_0304,
            fwd_cnt: 0xfffe_fdfc,
        };
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let ring = virtio_queue::mock::MockSplitQueue::new(&memory, 16);
        let mut queue: virtio_queue::Queue = ring.create_queue().unwrap();
        let write = u16::try_from(virtio_bindings::virtio_ring::VRING_DESC_F_WRITE).unwrap();
        let buffer = virtio_queue::desc::split::Descriptor::new(0x8000, 0x200, write, 0);
        ring.build_desc_chain(&[buffer.into()]).unwrap();
        let mut chain = virtio_queue::QueueOwnedT::iter(&mut queue, &memory)
            .unwrap()
            .next()
            .unwrap();
        let mut packet = VsockPacket::from_rx_virtq_chain(&memory, &mut chain, 4096).unwrap();
        packet
            .set_src_cid(header.src_cid)
            .set_dst_cid(header.dst_cid)
            .set_src_port(header.src_port)
            .set_dst_port(header.dst_port)
            .set_len(header.len)
            .set_type(header.kind)
            .set_op(header.op)
            .set_flags(header.flags)
            .set_buf_alloc(header.buf_alloc)
            .set_fwd_cnt(header.fwd_cnt);
        let mut bytes = [0; HEADER_SIZE];
        packet.header_slice().copy_to(&mut bytes);
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(header.to_bytes(), bytes);
    }
}
