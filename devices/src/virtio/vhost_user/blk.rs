//! virtio-blk (virtio 1.2 section 5.2) served by another process. The configuration is the back end's, but for the
//! number of queues.

use std::path::PathBuf;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::lent::LentQueues;
use super::{VhostUser, VhostUserError, check_queues};

/// Length of the configuration space up to and including `unused1` (5.2.4); what lies behind it belongs to features
/// that are not passed on.
const CONFIG_LEN: usize = 60;
/// Offset of `writeback`, the only writable field.
const WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const NUM_QUEUES: usize = 34;
/// Queues of a back end that does not say how many it has.
const IMPLIED_QUEUES: u64 = 1;

/// Features that are passed on where the back end has them, beside those of the rings.
const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// How to make a [`VhostUser::blk`].
#[derive(Clone, Debug)]
pub struct VhostUserBlkOptions {
    /// The back end's socket.
    pub socket: PathBuf,
    /// Queues: 1 to 255.
    pub num_queues: u16,
    /// The size of each queue, a power of two from 2 to 32768.
    pub queue_size: u16,
}

impl VhostUserBlkOptions {
    /// One queue of 128 entries, as Cloud Hypervisor's default is.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            num_queues: 1,
            queue_size: 128,
        }
    }
}

impl VhostUser {
    /// A disk: connects to the back end and asks for its configuration; it gets the queues when a driver is ready.
    ///
    /// # Errors
    /// When an option is out of range, the back end cannot be connected to, or it lacks what is asked for.
    pub fn blk(options: &VhostUserBlkOptions) -> Result<Self, VhostUserError> {
        let queues = usize::from(options.num_queues);
        check_queues("blk", options.num_queues, queues, options.queue_size)?;
        let mut lent = LentQueues::connect(&options.socket, queues, IMPLIED_QUEUES)?;
        let multiqueue = if queues > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        let features = lent.features(FEATURES | multiqueue);
        if features & multiqueue != multiqueue {
            return Err(lent.frontend.lacks("VIRTIO_BLK_F_MQ; set num_queues to 1"));
        }
        let mut config = vec![0; CONFIG_LEN];
        lent.frontend.config(&mut config)?;
        for (to, from) in config.iter_mut().skip(NUM_QUEUES).zip(options.num_queues.to_le_bytes()) {
            *to = from;
        }
        let writable = features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        Ok(Self {
            lent,
            device_type: VIRTIO_ID_BLOCK,
            queue_sizes: vec![options.queue_size; queues],
            features,
            writeback: config.get(WRITEBACK).copied().filter(|_| writable),
            config,
            enabled: queues,
            control: None,
        })
    }

    /// The driver writes configuration space; only the cache mode takes a value.
    pub(super) fn write_writeback(&mut self, offset: u64, data: &[u8]) {
        if self.writeback.is_some()
            && let Ok(start) = usize::try_from(offset)
            && let Some(at) = WRITEBACK.checked_sub(start)
            && let Some(value @ (0 | 1)) = data.get(at)
            && let Err(error) = self.set_writeback(*value)
        {
            tracing::warn!(%error, "the back end does not take the driver's cache mode");
        }
    }

    /// Back to the cache mode that a fresh driver finds.
    pub(super) fn reset_writeback(&mut self) {
        if let Some(value) = self.writeback
            && let Err(error) = self.set_writeback(value)
        {
            tracing::warn!(%error, "the back end keeps the last driver's cache mode");
        }
    }

    fn set_writeback(&mut self, value: u8) -> Result<(), VhostUserError> {
        if let Some(place) = self.config.get_mut(WRITEBACK)
            && *place != value
        {
            *place = value;
            if !self.lent.frontend.is_gone() {
                let offset = u32::try_from(WRITEBACK).unwrap_or(u32::MAX);
                self.lent.frontend.set_config(offset, &[value])?;
            }
        }
        Ok(())
    }
}
