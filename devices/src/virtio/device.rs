//! The trait of a virtio device and what it receives when the driver is ready. The transport owns status, feature
//! negotiation and queue configuration; after DRIVER_OK the queues move into the device, and nothing that the
//! guest writes to the transport can change them (typed: [`Activation`] holds validated queues).

use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::Value;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::blk::StorageNews;
use super::state::{QueuePosition, StateError};
use crate::memory::PodMemory;

/// Raises a queue's interrupt.
pub trait QueueInterrupt: Send + Sync {
    /// Tells the driver that used buffers are there.
    ///
    /// # Errors
    /// When the hypervisor's descriptor fails.
    fn signal_used(&self) -> io::Result<()>;
    /// A descriptor that raises it when written, without this process; None when there is none as things are. It is
    /// good until [`VirtioDevice::interrupt_moved`].
    fn eventfd(&self) -> Option<EventFd> {
        None
    }
}

/// Why a device cannot go on. The transport answers with DEVICE_NEEDS_RESET; other devices live on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The queue's rings are broken or lie in memory that the device may not touch.
    #[error("virtqueue {index}: {source}")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong.
        source: virtio_queue::Error,
    },
    /// A host resource failed.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

/// A queue in use: configured, validated, and no longer writable by the guest.
pub struct ActiveQueue {
    index: usize,
    queue: Queue,
    interrupt: Arc<dyn QueueInterrupt>,
    /// Chains given back since the last signal, if some of them were given back together.
    batched: Option<u16>,
    /// Chains given back one by one since the last signal.
    single: u16,
    doorbell: Option<EventFd>,
    /// Where it stands, for the transport.
    position: Arc<QueuePosition>,
}

/// A queue for someone else to run: see [`ActiveQueue::into_parts`].
pub struct QueueParts {
    /// Which queue.
    pub index: usize,
    /// Its rings.
    pub queue: Queue,
    /// Readable when the driver rang.
    pub doorbell: EventFd,
    /// Its interrupt.
    pub interrupt: Arc<dyn QueueInterrupt>,
}

impl ActiveQueue {
    /// Wraps a queue that the transport has validated.
    pub fn new(index: usize, queue: Queue, interrupt: Arc<dyn QueueInterrupt>) -> Self {
        let position = QueuePosition::new(queue.next_avail(), queue.next_used());
        Self {
            index,
            queue,
            interrupt,
            batched: None,
            single: 0,
            doorbell: None,
            position: Arc::new(position),
        }
    }

    /// Where the queue stands, for as long as a device runs it.
    pub(super) fn position(&self) -> Arc<QueuePosition> {
        Arc::clone(&self.position)
    }

    fn moved(&self) {
        self.position.set(self.queue.next_avail(), self.queue.next_used());
    }

    /// Hands the doorbell over with the queue, for a device that [`VirtioDevice::handles_doorbell`].
    #[must_use]
    pub fn with_doorbell(mut self, doorbell: EventFd) -> Self {
        self.doorbell = Some(doorbell);
        self
    }

    /// Takes the queue apart, for a device that has another process run it; None if its doorbell did not come with it.
    #[must_use]
    pub fn into_parts(self) -> Option<QueueParts> {
        self.position.lose();
        Some(QueueParts {
            index: self.index,
            queue: self.queue,
            doorbell: self.doorbell?,
            interrupt: self.interrupt,
        })
    }

    /// Takes the next available descriptor chain.
    ///
    /// # Errors
    /// When the ring cannot be read or its index makes no sense.
    pub fn pop(&mut self, memory: &Arc<PodMemory>) -> Result<Option<DescriptorChain<Arc<PodMemory>>>, DeviceError> {
        let index = self.index;
        let broken = |source| DeviceError::Queue { index, source };
        let available = self
            .queue
            .avail_idx(memory.as_ref(), Ordering::Acquire)
            .map_err(broken)?;
        if available.0 == self.queue.next_avail() {
            return Ok(None);
        }
        let mut iter = self.queue.iter(Arc::clone(memory)).map_err(broken)?;
        // There is an entry: not getting it means that its slot cannot be read. `None` would make a device that
        // polls until the ring is empty spin for ever.
        let chain = iter
            .next()
            .ok_or_else(|| broken(virtio_queue::Error::InvalidAvailRingIndex))?;
        self.moved();
        Ok(Some(chain))
    }

    /// Puts the last popped chain back, to be popped again later.
    pub fn undo_pop(&mut self) {
        self.undo_pops(1);
    }

    /// Puts the last `count` popped chains back, none of which was given back since.
    pub fn undo_pops(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
        self.moved();
    }

    /// Gives the chain starting at `head` back to the driver with `len` bytes written.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn add_used(&mut self, memory: &Arc<PodMemory>, head: u16, len: u32) -> Result<(), DeviceError> {
        let index = self.index;
        self.single = self.single.wrapping_add(1);
        self.queue
            .add_used(memory.as_ref(), head, len)
            .map_err(|source| DeviceError::Queue { index, source })?;
        self.moved();
        Ok(())
    }

    /// Gives several chains back at once, as (head, length): the driver sees all of them or none (virtio 1.2
    /// 5.1.6.4.1 asks this of the buffers of one packet).
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn add_used_together(&mut self, memory: &Arc<PodMemory>, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        if let [(head, len)] = used {
            return self.add_used(memory, *head, *len);
        }
        let index = self.index;
        let broken = |source| DeviceError::Queue { index, source };
        let ring = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for (head, len) in used {
            // Header of 4 bytes, elements of 8 (virtio 1.2 2.7.8).
            let slot = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
            let at = ring.checked_add(4 + 8 * slot);
            let at = at.ok_or_else(|| broken(virtio_queue::Error::AddressOverflow))?;
            let element = u64::from(*head) | u64::from(*len) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(at))
                .map_err(|e| broken(virtio_queue::Error::GuestMemory(e)))?;
            next = next.wrapping_add(1);
        }
        let at = ring.checked_add(2);
        let at = at.ok_or_else(|| broken(virtio_queue::Error::AddressOverflow))?;
        memory
            .store(next.to_le(), GuestAddress(at), Ordering::Release)
            .map_err(|e| broken(virtio_queue::Error::GuestMemory(e)))?;
        self.queue.set_next_used(next);
        self.moved();
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        self.batched = Some(self.batched.unwrap_or(0).wrapping_add(count));
        Ok(())
    }

    /// Whether the driver's `used_event` lies among the chains given back since the last signal, some of them
    /// together: virtio-queue counts single ones only.
    fn passes_used_event(&self, memory: &PodMemory, since: u16) -> Result<bool, DeviceError> {
        let index = self.index;
        let broken = |source| DeviceError::Queue { index, source };
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        let at = self
            .queue
            .avail_ring()
            .checked_add(4 + 2 * u64::from(self.queue.size()));
        let at = at.ok_or_else(|| broken(virtio_queue::Error::AddressOverflow))?;
        let event = memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|e| broken(virtio_queue::Error::GuestMemory(e)))?;
        let passed = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
        Ok(passed < since)
    }

    /// Raises the interrupt if the driver wants one. Call once a batch.
    ///
    /// # Errors
    /// When the rings cannot be read or the interrupt not raised.
    pub fn signal(&mut self, memory: &Arc<PodMemory>) -> Result<(), DeviceError> {
        let index = self.index;
        let mut needed = self
            .queue
            .needs_notification(memory.as_ref())
            .map_err(|source| DeviceError::Queue { index, source })?;
        let single = std::mem::take(&mut self.single);
        if let Some(batched) = self.batched.take()
            && !needed
        {
            needed = self.passes_used_event(memory, batched.wrapping_add(single))?;
        }
        if needed {
            self.interrupt.signal_used().map_err(|source| DeviceError::Host {
                what: "raising a queue interrupt",
                source,
            })?;
        }
        Ok(())
    }

    /// Asks the driver for notifications again; true if buffers arrived meanwhile.
    ///
    /// # Errors
    /// When the rings cannot be accessed.
    pub fn enable_notification(&mut self, memory: &Arc<PodMemory>) -> Result<bool, DeviceError> {
        let index = self.index;
        self.queue
            .enable_notification(memory.as_ref())
            .map_err(|source| DeviceError::Queue { index, source })
    }

    /// Tells the driver that no notification is needed.
    ///
    /// # Errors
    /// When the rings cannot be accessed.
    pub fn disable_notification(&mut self, memory: &Arc<PodMemory>) -> Result<(), DeviceError> {
        let index = self.index;
        self.queue
            .disable_notification(memory.as_ref())
            .map_err(|source| DeviceError::Queue { index, source })
    }

    /// The queue's size.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}

/// What a device receives at DRIVER_OK.
pub struct Activation {
    /// The pod's memory.
    pub memory: Arc<PodMemory>,
    /// The negotiated features.
    pub features: u64,
    /// One entry a queue; None for a queue that the driver left disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Tells the driver that the configuration space changed.
    pub config_changed: Arc<dyn QueueInterrupt>,
}

/// A virtio device. All calls come with the transport's lock held: from the event loop that owns it, or from a vCPU
/// for configuration.
pub trait VirtioDevice: Send {
    /// Virtio device type (virtio 1.2 section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue.
    fn queue_max_sizes(&self) -> &[u16];
    /// Device-specific feature bits and EVENT_IDX, INDIRECT_DESC; the transport adds VERSION_1 and, for confidential
    /// pods, ACCESS_PLATFORM.
    fn features(&self) -> u64;
    /// Reads device configuration space; bytes beyond it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration space; bytes that are not writable are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready.
    ///
    /// # Errors
    /// When a host resource cannot be had; the device then needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// The driver rang the doorbell of queue `index`. Only called while active.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError>;
    /// Whether the doorbell of queue `index` belongs to the device: it comes with the queue, the event loop does not
    /// watch it, and [`VirtioDevice::on_queue`] is not called for it. Fixed for the device's life.
    fn handles_doorbell(&self, _index: usize) -> bool {
        false
    }
    /// The driver gave queue `index` another interrupt vector, or none: [`QueueInterrupt::eventfd`] is another one now.
    /// Only called while active.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn interrupt_moved(&mut self, _index: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Whether the device has another process reach all of the pod's memory; it is refused for confidential pods.
    fn lends_memory(&self) -> bool {
        false
    }
    /// The pod's memory, before a driver uses the device and each time that it gets other regions.
    ///
    /// # Errors
    /// When the device cannot work with this memory; an active one then needs a reset.
    fn update_memory(&mut self, _memory: &Arc<PodMemory>) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Descriptors, beside the doorbells, whose readability the event loop reports; fixed for the device's life.
    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// Descriptor `index` of [`VirtioDevice::event_fds`] is readable. May be called while not active.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Drops the queues and all state of the driver; in-flight host I/O is finished or cancelled before it returns.
    fn reset(&mut self);
    /// Comes to rest for a snapshot, and tells what is to be kept beside the features and the queues' places: no chain is
    /// popped and not given back when it returns. Afterwards the device goes on as if nothing had been. May be called
    /// while not active.
    ///
    /// # Errors
    /// When it has something that cannot be kept, in words that say what to do.
    fn save(&mut self) -> Result<Value, StateError> {
        Err(StateError::Refused(
            "a device of this kind cannot be saved: take it out of the pod first (vm.remove-device)".to_owned(),
        ))
    }
    /// Takes over what [`VirtioDevice::save`] gave, in a device with the same options: after [`VirtioDevice::activate`] if
    /// the driver was using it, with queues that stand where they were. All queues are looked at once after this.
    ///
    /// # Errors
    /// When the state cannot be that of such a device: it comes from a file.
    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        super::state::nothing(&state)
    }
    /// Gives a disk another size, and tells its driver.
    ///
    /// # Errors
    /// When it is no disk of ours or cannot have that size; nothing has changed then.
    fn set_capacity(&mut self, _bytes: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
        Err("the device has no size of its own to change".into())
    }
    /// What changed, since it was asked last, about whether the host takes what the pod writes to it: asked after each turn
    /// on the event loop.
    fn storage_news(&mut self) -> Option<StorageNews> {
        None
    }
    /// Whether a reboot takes the device over into the next machine, with what it has open or is connected to: reset, it is as
    /// one that was just made, and works with other memory ([`VirtioDevice::update_memory`]).
    fn outlives_reboot(&self) -> bool {
        false
    }
    /// Whether the device cannot be used again in its life: a reset does not help.
    fn is_lost(&self) -> bool {
        false
    }
    /// Counters of this device, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
