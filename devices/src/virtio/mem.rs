//! virtio-mem (virtio 1.2 5.15): memory that a guest plugs and unplugs in blocks, up to the size that the monitor asks
//! for. Which blocks hold memory is in [`Blocks`], shared with the gate that keeps other devices out of the rest; the
//! host's side of a block is the monitor's, behind [`Reclaim`]. A guest that touches unplugged blocks with its own vCPUs
//! is stopped only by a monitor that maps them in [`Reclaim::provide`] and unmaps them in [`Reclaim::discard`].

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt, VirtioDevice};
use super::state::{self, StateError};
use crate::memory::blocks::Blocks;
use crate::memory::{PodMemory, Reclaim};

/// The block size that pods use: 2 MiB, a huge page.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// `VIRTIO_MEM_F_ACPI_PXM` (virtio 1.2 5.15.3): `node_id` is valid.
pub const VIRTIO_MEM_F_ACPI_PXM: u32 = 0;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver does not even read unplugged memory.
pub const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Size of the one queue, Cloud Hypervisor's.
const QUEUE_SIZE: u16 = 128;
/// Bytes of the configuration space (`virtio_mem_config`, 5.15.4).
const CONFIG_LEN: usize = 56;
/// Bytes of a request (`virtio_mem_req`, 5.15.6).
const REQUEST_LEN: usize = 24;
/// Bytes of a response.
const RESPONSE_LEN: usize = 10;
/// The most descriptors of a request that are looked at.
const MAX_DESCRIPTORS: usize = 16;
/// The most requests that are served before the event loop gets its turn: each may walk much host memory.
const TURN: u16 = 16;

/// Request types (5.15.6).
mod request {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// What a request comes to (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Ack = 0,
    /// More than was asked for.
    Nack = 1,
    /// Not now: the host cannot.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

/// The state of a range of blocks (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// A size that cannot be asked for.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{size} bytes of virtio-mem memory: at most {max}, in steps of {block}")]
pub struct SizeError {
    size: u64,
    max: u64,
    block: u64,
}

struct Shared {
    blocks: Arc<Blocks>,
    requested: AtomicU64,
    event: EventFd,
}

/// The monitor's side of a device.
#[derive(Clone)]
pub struct MemHandle(Arc<Shared>);

impl MemHandle {
    /// Asks the guest to have `size` bytes plugged, more or fewer than now. It comes to it in its own time, or not.
    ///
    /// # Errors
    /// When that is beyond the area or not a number of blocks; nothing is changed then.
    pub fn request(&self, size: u64) -> Result<(), SizeError> {
        let (max, block) = (self.0.blocks.size(), self.0.blocks.block_size());
        if size > max || !size.is_multiple_of(block) {
            return Err(SizeError { size, max, block });
        }
        self.0.requested.store(size, Ordering::Release);
        // Full: it is readable already.
        let _ = self.0.event.write(1);
        Ok(())
    }

    /// The bytes that the guest was asked to have.
    #[must_use]
    pub fn requested_size(&self) -> u64 {
        self.0.requested.load(Ordering::Acquire)
    }

    /// The bytes that it has.
    #[must_use]
    pub fn plugged_size(&self) -> u64 {
        self.0.blocks.plugged_size()
    }

    /// The area.
    #[must_use]
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.0.blocks
    }
}

struct Active {
    memory: Arc<PodMemory>,
    queue: ActiveQueue,
    config_changed: Arc<dyn QueueInterrupt>,
}

#[derive(Debug, Default)]
struct Counters {
    plugs: u64,
    unplugs: u64,
    refused: u64,
    failed: u64,
}

/// A virtio memory device.
pub struct Mem {
    shared: Arc<Shared>,
    node: Option<u16>,
    reclaim: Arc<dyn Reclaim>,
    /// The requested size that the configuration space shows.
    shown: u64,
    /// It changed while no driver could be told.
    untold: bool,
    active: Option<Active>,
    counters: Counters,
}

impl Mem {
    /// A device for the area of `blocks`, of which the guest is asked to have nothing so far; `node` is its proximity
    /// domain, if the guest has more than one.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(blocks: Arc<Blocks>, node: Option<u16>, reclaim: Arc<dyn Reclaim>) -> io::Result<Self> {
        let shared = Shared {
            blocks,
            requested: AtomicU64::new(0),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            node,
            reclaim,
            shown: 0,
            untold: false,
            active: None,
            counters: Counters::default(),
        })
    }

    /// The monitor's side.
    #[must_use]
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }

    /// Brings the configuration space to what the monitor asked for, and tells the driver of a change.
    fn show(&mut self) -> Result<(), DeviceError> {
        let requested = self.shared.requested.load(Ordering::Acquire);
        self.untold |= requested != self.shown;
        self.shown = requested;
        match &self.active {
            Some(active) if self.untold => {
                self.untold = false;
                active.config_changed.signal_used().map_err(|source| DeviceError::Host {
                    what: "raising the configuration interrupt",
                    source,
                })
            }
            _ => Ok(()),
        }
    }

    /// Serves waiting requests; the event asks for another turn if there are more than fit into this one.
    fn service(&mut self) -> Result<(), DeviceError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = self.serve(&active.memory, &mut active.queue);
        self.active = Some(active);
        result
    }

    fn serve(&mut self, memory: &Arc<PodMemory>, queue: &mut ActiveQueue) -> Result<(), DeviceError> {
        let mut served = 0;
        'all: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                let len = self.answer(memory, &chain);
                queue.add_used(memory, head, len)?;
                served += 1;
                if served == TURN {
                    // Full: it is readable already.
                    let _ = self.shared.event.write(1);
                    break 'all;
                }
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        if served > 0 { queue.signal(memory) } else { Ok(()) }
    }

    /// Does what `chain` asks for; how many bytes of answer it holds now. A chain without room for one does nothing.
    fn answer(&mut self, memory: &PodMemory, chain: &DescriptorChain<Arc<PodMemory>>) -> u32 {
        let room: u64 = writable(chain).map(|(_, len)| u64::from(len)).sum();
        if room < RESPONSE_LEN as u64 {
            self.counters.failed += 1;
            return 0;
        }
        let (answer, state) = read_request(memory, chain).map_or((Answer::Error, None), |bytes| self.carry_out(&bytes));
        if answer != Answer::Ack {
            self.counters.refused += 1;
        }
        let mut response = [0; RESPONSE_LEN];
        let fields = [(0, answer as u16), (8, state.unwrap_or(BlockState::Plugged) as u16)];
        for (at, field) in fields {
            if let Some(bytes) = response.get_mut(at..at + 2) {
                bytes.copy_from_slice(&field.to_le_bytes());
            }
        }
        if write_response(memory, chain, &response) {
            u32::try_from(RESPONSE_LEN).unwrap_or(0)
        } else {
            self.counters.failed += 1;
            0
        }
    }

    fn carry_out(&mut self, bytes: &[u8; REQUEST_LEN]) -> (Answer, Option<BlockState>) {
        let [k0, k1, _, _, _, _, _, _, gpa @ .., n0, n1, _, _, _, _, _, _] = bytes;
        let (gpa, count) = (u64::from_le_bytes(*gpa), u64::from(u16::from_le_bytes([*n0, *n1])));
        match u16::from_le_bytes([*k0, *k1]) {
            request::PLUG => (self.plug(gpa, count), None),
            request::UNPLUG => (self.unplug(gpa, count), None),
            request::UNPLUG_ALL => (self.unplug_all(), None),
            request::STATE => self
                .state(gpa, count)
                .map_or((Answer::Error, None), |state| (Answer::Ack, Some(state))),
            _ => (Answer::Error, None),
        }
    }

    fn plug(&mut self, gpa: u64, count: u64) -> Answer {
        let blocks = &self.shared.blocks;
        let Some(range) = blocks
            .range(gpa, count)
            .filter(|range| blocks.count(range.clone()) == 0)
        else {
            return Answer::Error;
        };
        // In the area, so it does not overflow.
        let len = count * blocks.block_size();
        let limit = self.shown.min(self.shared.requested.load(Ordering::Acquire));
        if blocks.plugged_size() + len > limit {
            return Answer::Nack;
        }
        if let Err(error) = self.reclaim.provide(gpa, len) {
            tracing::debug!(%error, gpa, len, "no memory for blocks that the guest plugs");
            return Answer::Busy;
        }
        blocks.set(range, true);
        self.counters.plugs += count;
        Answer::Ack
    }

    fn unplug(&mut self, gpa: u64, count: u64) -> Answer {
        let blocks = &self.shared.blocks;
        let all_plugged = |range: &std::ops::Range<u64>| blocks.count(range.clone()) == count;
        let Some(range) = blocks.range(gpa, count).filter(all_plugged) else {
            return Answer::Error;
        };
        let len = count * blocks.block_size();
        if let Err(error) = self.reclaim.discard(gpa, len) {
            tracing::debug!(%error, gpa, len, "blocks that the guest unplugs stay");
            return Answer::Busy;
        }
        blocks.set(range, false);
        self.counters.unplugs += count;
        Answer::Ack
    }

    /// One call for the whole area, however the plugged blocks are scattered over it.
    fn unplug_all(&mut self) -> Answer {
        let blocks = &self.shared.blocks;
        let plugged = blocks.plugged_size() / blocks.block_size();
        if plugged == 0 {
            return Answer::Ack;
        }
        if let Err(error) = self.reclaim.discard(blocks.start(), blocks.size()) {
            tracing::debug!(%error, "blocks that the guest unplugs stay");
            return Answer::Busy;
        }
        blocks.set(0..blocks.size() / blocks.block_size(), false);
        self.counters.unplugs += plugged;
        Answer::Ack
    }

    fn state(&self, gpa: u64, count: u64) -> Option<BlockState> {
        let blocks = &self.shared.blocks;
        let plugged = blocks.count(blocks.range(gpa, count)?);
        Some(match plugged {
            0 => BlockState::Unplugged,
            all if all == count => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let blocks = &self.shared.blocks;
        let words = [
            blocks.block_size(),
            u64::from(self.node.unwrap_or(0)),
            blocks.start(),
            blocks.size(),
            // All of the area may be used at any time.
            blocks.size(),
            blocks.plugged_size(),
            self.shown,
        ];
        let mut bytes = [0; CONFIG_LEN];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

type Place = (vm_memory::GuestAddress, u32);

fn writable(chain: &DescriptorChain<Arc<PodMemory>>) -> impl Iterator<Item = Place> {
    let chain = chain.clone().take(MAX_DESCRIPTORS);
    chain.filter(|d| d.is_write_only()).map(|d| (d.addr(), d.len()))
}

/// The request in the readable buffers of `chain`; None when they are too short or cannot be read.
fn read_request(memory: &PodMemory, chain: &DescriptorChain<Arc<PodMemory>>) -> Option<[u8; REQUEST_LEN]> {
    let mut bytes = [0; REQUEST_LEN];
    let mut rest = bytes.as_mut_slice();
    for descriptor in chain.clone().take(MAX_DESCRIPTORS).filter(|d| !d.is_write_only()) {
        let len = rest.len().min(descriptor.len() as usize);
        let (part, later) = rest.split_at_mut_checked(len)?;
        memory.read_slice(part, descriptor.addr()).ok()?;
        rest = later;
    }
    rest.is_empty().then_some(bytes)
}

/// Puts `response` into the writable buffers of `chain`; whether all of it is there.
fn write_response(memory: &PodMemory, chain: &DescriptorChain<Arc<PodMemory>>, response: &[u8]) -> bool {
    let mut rest = response;
    for (address, len) in writable(chain) {
        let Some((part, later)) = rest.split_at_checked(rest.len().min(len as usize)) else {
            return false;
        };
        if memory.write_slice(part, address).is_err() {
            return false;
        }
        rest = later;
    }
    rest.is_empty()
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let node = self.node.map_or(0, |_| 1 << VIRTIO_MEM_F_ACPI_PXM);
        node | 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.config();
        let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
        for (to, byte) in data.iter_mut().zip(from.unwrap_or_default()) {
            *to = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (memory, config_changed) = (activation.memory, activation.config_changed);
        let queue = activation.queues.into_iter().next().flatten();
        self.active = queue.map(|queue| Active {
            memory,
            queue,
            config_changed,
        });
        self.show()
    }

    fn on_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.service()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.shared.event.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // An error: it is not readable, another turn took it.
        let _ = self.shared.event.read();
        self.show()?;
        self.service()
    }

    /// Memory that came while the pod ran is in no snapshot, so that there is nothing to keep.
    fn save(&mut self) -> Result<Value, StateError> {
        let (plugged, requested) = (
            self.shared.blocks.plugged_size(),
            self.shared.requested.load(Ordering::Acquire),
        );
        if plugged == 0 && requested == 0 && self.shown == 0 {
            return Ok(Value::Null);
        }
        Err(StateError::Refused(format!(
            "the guest has {plugged} bytes of virtio-mem memory and was asked to have {requested}: take them back with vm.resize \
             first, to the size that the pod was booted with"
        )))
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        state::nothing(&state)
    }

    /// Plugged blocks stay: a reset of the device is not one of the machine (5.15.5.2).
    fn reset(&mut self) {
        self.active = None;
        let _ = self.shared.event.read();
        self.shown = self.shared.requested.load(Ordering::Acquire);
        self.untold = false;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("plugged_bytes", self.shared.blocks.plugged_size()),
            ("requested_bytes", self.shared.requested.load(Ordering::Acquire)),
            ("plugged_blocks", self.counters.plugs),
            ("unplugged_blocks", self.counters.unplugs),
            ("refused_requests", self.counters.refused),
            ("failed_requests", self.counters.failed),
        ]
    }
}
