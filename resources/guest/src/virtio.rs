//! The virtio transport over PCI (virtio 1.2, 4.1) and the split virtqueue (2.7). Everything the device wrote is
//! checked: a used entry that names no buffer in flight breaks the queue, nothing else.
//!
//! The `virtio-drivers` crate does not serve here: its block driver has no discard or write-zeroes, its sockets no
//! half-close, its requests wait one at a time, and each of its register accesses costs an exit.

use alloc::vec;
use alloc::vec::Vec;

use crate::idle;
use crate::paging::PageTables;
use crate::pci::{Blocks, Function};
use crate::window::{Shared, Window};

const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;

mod status {
    //! Device status bits.
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
}

mod common {
    //! Offsets of the common configuration.
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0C;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1A;
    pub(super) const QUEUE_ENABLE: u64 = 0x1C;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1E;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// A device being set up or in use.
pub struct Device {
    blocks: Blocks,
    features: u64,
}

impl Device {
    /// Resets the device and negotiates `wanted` and the transport's own features.
    ///
    /// # Errors
    /// Says what the device refused.
    pub fn start(function: &Function, tables: &PageTables, wanted: u64) -> Result<Self, &'static str> {
        let blocks = function.open(tables)?;
        let registers = blocks.common;
        registers.set(common::STATUS, 0_u8);
        if registers.get::<u8>(common::STATUS) != 0 {
            return Err("the device does not reset");
        }
        registers.set(common::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let mut features = 0_u64;
        for half in [1_u32, 0] {
            registers.set(common::DEVICE_FEATURE_SELECT, half);
            features = features << 32 | u64::from(registers.get::<u32>(common::DEVICE_FEATURE));
        }
        features &= wanted | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM;
        if features & VERSION_1 == 0 {
            return Err("the device is a legacy one");
        }
        for half in [0_u32, 1] {
            registers.set(common::DRIVER_FEATURE_SELECT, half);
            registers.set(common::DRIVER_FEATURE, (features >> (32 * half)) as u32);
        }
        registers.set(
            common::STATUS,
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
        );
        if registers.get::<u8>(common::STATUS) & status::FEATURES_OK == 0 {
            return Err("the device refuses the features");
        }
        function.route_interrupts(&blocks);
        Ok(Self { blocks, features })
    }

    /// Whether a feature was negotiated.
    #[must_use]
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Reads 32 bits of device configuration.
    #[must_use]
    pub fn config(&self, offset: u64) -> u32 {
        self.blocks.device.get(offset)
    }

    /// Sets up queue `index` with at most `size` entries.
    ///
    /// # Errors
    /// When the device has no such queue or the window is used up.
    pub fn queue(&self, window: &Window, index: u16, size: u16) -> Result<Queue, &'static str> {
        let registers = self.blocks.common;
        registers.set(common::QUEUE_SELECT, index);
        let max: u16 = registers.get(common::QUEUE_SIZE);
        if max == 0 {
            return Err("the device lacks a queue");
        }
        let size = if max < size { 1 << max.ilog2() } else { size };
        if size != max {
            registers.set(common::QUEUE_SIZE, size);
        }
        let doorbell_at = u64::from(registers.get::<u16>(common::QUEUE_NOTIFY_OFF));
        let doorbell_at = doorbell_at * u64::from(self.blocks.notify_multiplier);
        let memory = window.take(Rings::bytes(size)).ok_or("the shared window is used up")?;
        memory.clear();
        let rings = Rings::new(memory, size);
        for (register, ring) in [
            (common::QUEUE_DESC, &rings.descriptors),
            (common::QUEUE_DRIVER, &rings.available),
            (common::QUEUE_DEVICE, &rings.used),
        ] {
            registers.set(register, ring.address() as u32);
            registers.set(register + 4, (ring.address() >> 32) as u32);
        }
        registers.set(common::QUEUE_VECTOR, 0_u16);
        registers.set(common::QUEUE_ENABLE, 1_u16);
        let queue = Queue {
            rings,
            index,
            size,
            event_idx: self.has(EVENT_IDX),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            next_available: 0,
            next_used: 0,
            kicked: 0,
            doorbell: self.blocks.notify,
            doorbell_at,
            broken: false,
        };
        queue.want_interrupt(false);
        Ok(queue)
    }

    /// Lets the device run.
    pub fn go(&self) {
        let on = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.blocks.common.set(common::STATUS, on);
    }
}

/// The three rings of a queue.
struct Rings {
    descriptors: Shared,
    available: Shared,
    used: Shared,
}

impl Rings {
    fn spans(size: u16) -> [usize; 3] {
        let size = usize::from(size);
        [16 * size, (6 + 2 * size).next_multiple_of(64), 6 + 8 * size]
    }

    fn bytes(size: u16) -> usize {
        Self::spans(size).iter().sum()
    }

    fn new(memory: Shared, size: u16) -> Self {
        let [descriptors, available, used] = Self::spans(size);
        Self {
            descriptors: memory.part(0, descriptors),
            available: memory.part(descriptors, available),
            used: memory.part(descriptors + available, used),
        }
    }
}

/// A piece of a descriptor chain.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    /// The device reads it.
    In(Shared),
    /// The device writes it.
    Out(Shared),
}

/// A used chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Queue::push`] returned.
    pub token: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A split virtqueue.
pub struct Queue {
    rings: Rings,
    index: u16,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
    kicked: u16,
    doorbell: crate::mmio::Registers,
    doorbell_at: u64,
    broken: bool,
}

impl Queue {
    /// Entries that are free.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Offers a chain to the device; None when there is no room. The device hears of it at the next [`Queue::kick`].
    #[must_use]
    pub fn push(&mut self, pieces: &[Piece]) -> Option<u16> {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        if pieces.is_empty() || pieces.len() > self.free.len() || self.broken {
            return None;
        }
        let chain = self.free.split_off(self.free.len() - pieces.len());
        for (position, (piece, index)) in pieces.iter().zip(&chain).enumerate() {
            let (memory, mut flags) = match piece {
                Piece::In(memory) => (memory, 0),
                Piece::Out(memory) => (memory, WRITE),
            };
            let following = chain.get(position + 1).copied();
            if following.is_some() {
                flags |= NEXT;
            }
            let at = usize::from(*index) * 16;
            self.rings.descriptors.set(at, memory.address());
            self.rings.descriptors.set(at + 8, memory.len() as u32);
            self.rings.descriptors.set(at + 12, flags);
            self.rings.descriptors.set(at + 14, following.unwrap_or_default());
        }
        let head = chain.first().copied()?;
        *self.chains.get_mut(usize::from(head))? = chain;
        let slot = usize::from(self.next_available % self.size);
        self.rings.available.set(4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.rings.available.set(2, self.next_available);
        Some(head)
    }

    /// Tells the device about new chains, if it wants to be told.
    pub fn kick(&mut self) {
        if self.kicked == self.next_available {
            return;
        }
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.rings.used.get(4 + usize::from(self.size) * 8);
            let new = self.next_available.wrapping_sub(event).wrapping_sub(1);
            new < self.next_available.wrapping_sub(self.kicked)
        } else {
            self.rings.used.get::<u16>(0) & 1 == 0
        };
        self.kicked = self.next_available;
        if wanted {
            self.doorbell.set(self.doorbell_at, self.index);
        }
    }

    /// Takes back a used chain.
    pub fn pop(&mut self) -> Option<Used> {
        if !self.ready() || self.broken {
            return None;
        }
        let at = 4 + usize::from(self.next_used % self.size) * 8;
        let (id, len) = (self.rings.used.get::<u32>(at), self.rings.used.get::<u32>(at + 4));
        let chain = self
            .chains
            .get_mut(id as usize)
            .map(core::mem::take)
            .unwrap_or_default();
        if chain.is_empty() {
            self.broken = true;
            return None;
        }
        self.free.extend(chain);
        self.next_used = self.next_used.wrapping_add(1);
        Some(Used { token: id as u16, len })
    }

    /// Whether a used chain waits.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.rings.used.get::<u16>(2) != self.next_used
    }

    /// Whether the device has written nonsense; then nothing comes any more.
    #[must_use]
    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Asks for an interrupt at the next used chain, or for none.
    pub fn want_interrupt(&self, wanted: bool) {
        if self.event_idx {
            let event = if wanted {
                self.next_used
            } else {
                self.next_used.wrapping_sub(1)
            };
            self.rings.available.set(4 + usize::from(self.size) * 2, event);
        } else {
            self.rings.available.set(0, u16::from(!wanted));
        }
    }

    /// Waits for a used chain and takes it.
    ///
    /// # Errors
    /// When the device has written nonsense.
    pub fn wait(&mut self) -> Result<Used, &'static str> {
        self.kick();
        idle::wait_for(&[self]);
        self.pop().ok_or("the device broke its queue")
    }
}
