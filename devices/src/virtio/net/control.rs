//! The control virtqueue (virtio 1.2 5.1.6.5): the number of queue pairs in use and the offloads of received frames.
//! Commands of features that are not offered are answered with an error.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::PodMemory;

/// The longest command that is known: class, command and 8 bytes.
const MAX_COMMAND: usize = 10;
/// The most descriptors of a command that are looked at.
const MAX_DESCRIPTORS: usize = 16;

const MQ: u8 = narrow(VIRTIO_NET_CTRL_MQ);
const PAIRS_SET: u8 = narrow(VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
const GUEST_OFFLOADS: u8 = narrow(VIRTIO_NET_CTRL_GUEST_OFFLOADS);
const OFFLOADS_SET: u8 = narrow(VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET);

#[expect(clippy::cast_possible_truncation, reason = "class and command numbers have one byte")]
const fn narrow(number: u32) -> u8 {
    number as u8
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum Command {
    /// Use this many queue pairs.
    Pairs(u16),
    /// Use these offloads (bits of `VIRTIO_NET_F_GUEST_*`).
    Offloads(u64),
    /// Something that is not offered or not well-formed.
    Unknown,
}

/// A command and where its answer goes.
pub(in crate::virtio) struct Request {
    pub(in crate::virtio) command: Command,
    answer: Option<GuestAddress>,
}

impl Request {
    /// Reads a command.
    pub(in crate::virtio) fn parse(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> Self {
        let mut bytes = [0; MAX_COMMAND];
        let mut len = 0_usize;
        let mut answer = None;
        let mut good = true;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            let part = descriptor.len() as usize;
            if descriptor.is_write_only() {
                answer = answer.or((part > 0).then_some(descriptor.addr()));
                continue;
            }
            let end = len.saturating_add(part);
            good &= match bytes.get_mut(len..end) {
                Some(place) => memory.read_slice(place, descriptor.addr()).is_ok(),
                None => false,
            };
            len = end;
        }
        let command = bytes.get(..len).filter(|_| good);
        Self {
            command: command.map_or(Command::Unknown, decode),
            answer,
        }
    }

    /// Writes the answer; how many bytes.
    pub(in crate::virtio) fn answer(&self, memory: &PodMemory, success: bool) -> u32 {
        let ack = narrow(if success { VIRTIO_NET_OK } else { VIRTIO_NET_ERR });
        let written = self.answer.is_some_and(|at| memory.write_obj(ack, at).is_ok());
        u32::from(written)
    }
}

fn decode(bytes: &[u8]) -> Command {
    match bytes {
        [MQ, PAIRS_SET, low, high] => Command::Pairs(u16::from_le_bytes([*low, *high])),
        [GUEST_OFFLOADS, OFFLOADS_SET, rest @ ..] => match rest.try_into() {
            Ok(bits) => Command::Offloads(u64::from_le_bytes(bits)),
            Err(_) => Command::Unknown,
        },
        _ => Command::Unknown,
    }
}
