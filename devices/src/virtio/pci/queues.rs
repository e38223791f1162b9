//! Queue configuration as a type state: [`QueueSetup`] is what the driver writes to until DRIVER_OK; checking it
//! gives [`FrozenQueues`], which has no way to be written, and the queues that move into the device.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::memory::PodMemory;
use crate::virtio::state::Place;

/// One queue's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueueConfig {
    max_size: u16,
    /// Queue size; 0 only when the device offers no such queue.
    pub(super) size: u16,
    /// Whether the driver enabled it.
    pub(super) enabled: bool,
    /// GPA of the descriptor table.
    pub(super) desc: u64,
    /// GPA of the driver area (available ring).
    pub(super) driver: u64,
    /// GPA of the device area (used ring).
    pub(super) device: u64,
}

/// A ring address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    Desc,
    Driver,
    Device,
}

impl QueueConfig {
    pub(super) fn ring(&self, ring: Ring) -> u64 {
        match ring {
            Ring::Desc => self.desc,
            Ring::Driver => self.driver,
            Ring::Device => self.device,
        }
    }
}

/// Why queues cannot be activated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum QueueError {
    #[error("virtqueue {index}: {ring:?} area at {address:#x}+{len:#x} is misaligned, at 0, or not in shared RAM")]
    Area {
        index: usize,
        ring: Ring,
        address: u64,
        len: u64,
    },
    #[error("virtqueue {index}: {reason}")]
    Refused { index: usize, reason: String },
}

/// The queues while the driver configures them.
#[derive(Clone, Debug)]
pub(super) struct QueueSetup(Vec<QueueConfig>);

/// The queues after DRIVER_OK: for reading back only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FrozenQueues(Vec<QueueConfig>);

impl FrozenQueues {
    pub(super) fn get(&self, index: u16) -> Option<&QueueConfig> {
        self.0.get(usize::from(index))
    }
}

impl QueueSetup {
    /// Queues of these largest sizes, as after a reset.
    pub(super) fn new(max_sizes: &[u16]) -> Self {
        let queue = |&max_size: &u16| QueueConfig {
            max_size,
            size: max_size,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        };
        Self(max_sizes.iter().map(queue).collect())
    }

    pub(super) fn get(&self, index: u16) -> Option<&QueueConfig> {
        self.0.get(usize::from(index))
    }

    /// A queue that the driver may still write to: it exists and is not enabled.
    fn open(&mut self, index: u16) -> Option<&mut QueueConfig> {
        self.0.get_mut(usize::from(index)).filter(|q| !q.enabled)
    }

    /// Sets the size; one that is not a power of two or is too large is refused.
    pub(super) fn set_size(&mut self, index: u16, size: u16) {
        if let Some(queue) = self.open(index)
            && size.is_power_of_two()
            && size <= queue.max_size
        {
            queue.size = size;
        }
    }

    /// Sets part of a ring address: the bits in `mask` become those of `value`.
    pub(super) fn set_ring(&mut self, index: u16, ring: Ring, mask: u64, value: u64) {
        if let Some(queue) = self.open(index) {
            let register = match ring {
                Ring::Desc => &mut queue.desc,
                Ring::Driver => &mut queue.driver,
                Ring::Device => &mut queue.device,
            };
            *register = (*register & !mask) | (value & mask);
        }
    }

    /// Enables the queue.
    pub(super) fn enable(&mut self, index: u16) {
        if let Some(queue) = self.open(index) {
            queue.enabled = queue.size != 0;
        }
    }

    /// Checks every enabled queue against `memory`. The registers freeze whatever the outcome. `places` are where the
    /// queues stand, of those that are not at their beginning.
    pub(super) fn freeze(
        self,
        memory: &Arc<PodMemory>,
        event_idx: bool,
        places: &[Option<Place>],
    ) -> (FrozenQueues, Result<Vec<Option<Queue>>, QueueError>) {
        let queues = self
            .0
            .iter()
            .enumerate()
            .map(|(index, config)| {
                let place = places.get(index).copied().flatten();
                config
                    .enabled
                    .then(|| activate(index, config, memory, event_idx, place))
                    .transpose()
            })
            .collect();
        (FrozenQueues(self.0), queues)
    }
}

/// Makes the queue of a configuration whose three areas lie in RAM that the device may touch.
///
/// [`QueueT::is_valid`] looks only at whether one byte past each area is RAM, so that it takes areas with holes and
/// refuses areas that end where RAM ends; here every byte is checked.
fn activate(
    index: usize,
    config: &QueueConfig,
    memory: &PodMemory,
    event_idx: bool,
    place: Option<Place>,
) -> Result<Queue, QueueError> {
    let size = u64::from(config.size);
    let areas = [
        (Ring::Desc, 16, 16 * size),
        (Ring::Driver, 2, 6 + 2 * size),
        (Ring::Device, 4, 6 + 8 * size),
    ];
    for (ring, align, len) in areas {
        let address = config.ring(ring);
        let bytes = usize::try_from(len).ok();
        let usable = address != 0
            && address.is_multiple_of(align)
            && bytes.is_some_and(|bytes| memory.check_range(GuestAddress(address), bytes));
        if !usable {
            return Err(QueueError::Area {
                index,
                ring,
                address,
                len,
            });
        }
    }
    let refused = |e: virtio_queue::Error| QueueError::Refused {
        index,
        reason: e.to_string(),
    };
    let mut queue = Queue::new(config.max_size).map_err(refused)?;
    queue.try_set_size(config.size).map_err(refused)?;
    queue
        .try_set_desc_table_address(GuestAddress(config.desc))
        .map_err(refused)?;
    queue
        .try_set_avail_ring_address(GuestAddress(config.driver))
        .map_err(refused)?;
    queue
        .try_set_used_ring_address(GuestAddress(config.device))
        .map_err(refused)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if let Some(place) = place {
        queue.set_next_avail(place.next_avail);
        queue.set_next_used(place.next_used);
    }
    // A ring whose index is already off by more than its size is broken from the start.
    queue.iter(memory).map_err(refused)?;
    Ok(queue)
}
