//! What is known of a FUSE request before the file server sees it: its header, its size and where its answer begins.
//! Requests that the server would answer with unbounded memory, or not at all, are answered here.

use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::PodMemory;

/// `struct fuse_in_header` (Linux uapi fuse.h, 7.x).
const IN_HEADER_SIZE: usize = 40;
/// `struct fuse_out_header`.
pub(super) const OUT_HEADER_SIZE: u32 = 16;
/// Most bytes either way: 1 MiB of data (max_pages 256), headers and some slack for page rounding.
const MAX_MESSAGE: u64 = (1 << 20) + (64 << 10);

/// Opcodes (Linux uapi fuse.h) that are treated apart.
mod opcode {
    pub(super) const FORGET: u32 = 2;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const POLL: u32 = 40;
    pub(super) const NOTIFY_REPLY: u32 = 41;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const SETUPMAPPING: u32 = 48;
    pub(super) const REMOVEMAPPING: u32 = 49;
}

/// A chain whose header could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    opcode: u32,
    unique: u64,
    reply: Option<GuestAddress>,
}

/// A chain that is not handed to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// There is no header to read.
    Unreadable,
    /// Answered with an errno.
    Errno(Request, i32),
}

impl Request {
    /// Reads the header of the request in `chain` and checks the rest from outside.
    pub(super) fn parse(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> Result<Self, Refusal> {
        let mut header = [0u8; IN_HEADER_SIZE];
        let (mut have, mut readable, mut writable) = (0usize, 0u64, 0u64);
        let mut reply = None;
        let mut ordered = true;
        for descriptor in chain {
            let len = u64::from(descriptor.len());
            if descriptor.is_write_only() {
                if reply.is_none() && writable == 0 && descriptor.len() >= OUT_HEADER_SIZE {
                    reply = Some(descriptor.addr());
                }
                writable = writable.saturating_add(len);
                continue;
            }
            ordered &= writable == 0;
            readable = readable.saturating_add(len);
            let Some(rest) = header.get_mut(have..).filter(|rest| !rest.is_empty()) else {
                continue;
            };
            let piece = rest.len().min(descriptor.len() as usize);
            let Some(target) = rest.get_mut(..piece) else { continue };
            if memory.read_slice(target, descriptor.addr()).is_err() {
                return Err(Refusal::Unreadable);
            }
            have = have.saturating_add(piece);
        }
        if have < IN_HEADER_SIZE {
            return Err(Refusal::Unreadable);
        }
        let [l0, l1, l2, l3, o0, o1, o2, o3, u0, u1, u2, u3, u4, u5, u6, u7, ..] = header;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let request = Self {
            opcode: u32::from_le_bytes([o0, o1, o2, o3]),
            unique: u64::from_le_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
            reply,
        };
        let fits = len as usize >= IN_HEADER_SIZE && u64::from(len) <= readable;
        if !fits || !ordered || readable > MAX_MESSAGE || writable > MAX_MESSAGE {
            return Err(Refusal::Errno(request, libc::EINVAL));
        }
        match request.opcode {
            // No DAX window, no device ioctls, nothing to poll.
            opcode::IOCTL | opcode::POLL | opcode::NOTIFY_REPLY | opcode::SETUPMAPPING | opcode::REMOVEMAPPING => {
                Err(Refusal::Errno(request, libc::ENOSYS))
            }
            _ => Ok(request),
        }
    }

    /// Whether the protocol has an answer to this request.
    fn is_answered(&self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
    }

    /// Answers with `errno`, as far as the protocol and the chain allow it: the bytes written.
    pub(super) fn fail(&self, memory: &PodMemory, errno: i32) -> u32 {
        let Some(address) = self.reply.filter(|_| self.is_answered()) else {
            return 0;
        };
        let mut bytes = [0u8; OUT_HEADER_SIZE as usize];
        let fields = OUT_HEADER_SIZE
            .to_le_bytes()
            .into_iter()
            .chain(errno.wrapping_neg().to_le_bytes())
            .chain(self.unique.to_le_bytes());
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        // Whole or not at all: the header must not end in a page that is not ours.
        match memory.write_slice(&bytes, address) {
            Ok(()) => OUT_HEADER_SIZE,
            Err(_) => 0,
        }
    }
}
