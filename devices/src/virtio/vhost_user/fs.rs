//! virtio-fs (virtio 1.2 section 5.11) served by another process, such as Debian's virtiofsd: a high-priority queue and
//! request queues. Tag and number of queues are this process's, the file system is the back end's.

use std::path::PathBuf;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::lent::LentQueues;
use super::{VhostUser, VhostUserError, check_queues};

/// Bytes of the tag in configuration space (5.11.4).
const TAG_SIZE: usize = 36;
/// The high-priority queue and one request queue, of a back end that does not say how many it has.
const IMPLIED_QUEUES: u64 = 2;

/// How to make a [`VhostUser::fs`].
#[derive(Clone, Debug)]
pub struct VhostUserFsOptions {
    /// The name by which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// The back end's socket.
    pub socket: PathBuf,
    /// Request queues beside the high-priority queue: 1 to 255.
    pub num_queues: u16,
    /// The size of each queue, a power of two from 2 to 32768.
    pub queue_size: u16,
}

impl VhostUserFsOptions {
    /// One request queue of 1024 entries.
    #[must_use]
    pub fn new(tag: String, socket: PathBuf) -> Self {
        Self {
            tag,
            socket,
            num_queues: 1,
            queue_size: 1024,
        }
    }
}

impl VhostUser {
    /// A file system: connects to the back end, which gets the queues when a driver is ready.
    ///
    /// # Errors
    /// When an option is out of range, the back end cannot be connected to, or it lacks what is asked for.
    pub fn fs(options: &VhostUserFsOptions) -> Result<Self, VhostUserError> {
        let tag = options.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG_SIZE || tag.contains(&0) {
            return Err(VhostUserError::Option {
                device: "fs",
                option: "tag",
                value: format!("{:?}", options.tag),
                remedy: "use 1 to 36 bytes without NUL",
            });
        }
        let queues = usize::from(options.num_queues).saturating_add(1);
        check_queues("fs", options.num_queues, queues, options.queue_size)?;
        let lent = LentQueues::connect(&options.socket, queues, IMPLIED_QUEUES)?;
        let mut config = tag.to_vec();
        config.resize(TAG_SIZE, 0);
        config.extend(u32::from(options.num_queues).to_le_bytes());
        Ok(Self {
            device_type: VIRTIO_ID_FS,
            queue_sizes: vec![options.queue_size; queues],
            features: lent.features(0),
            lent,
            config,
            enabled: queues,
            writeback: None,
            control: None,
        })
    }
}
