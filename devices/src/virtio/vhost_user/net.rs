//! virtio-net (virtio 1.2 section 5.1) served by another process. MAC address and MTU are this process's; so is the
//! control queue of a device with several queue pairs, whose one command says which pairs the back end may use.

use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use super::frontend::Frontend;
use super::lent::LentQueues;
use super::{VhostUser, VhostUserError, check_queues};
use crate::memory::PodMemory;
use crate::virtio::device::{Activation, ActiveQueue, DeviceError};
use crate::virtio::net::control::{Command, Request};

/// Queues of a back end that does not say how many it has: one pair.
const IMPLIED_QUEUES: u64 = 2;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;
/// The smallest MTU that can be told (5.1.4.1).
const MIN_MTU: u16 = 68;
/// `status`: the link is up (5.1.4).
const LINK_UP: u16 = 1;

/// How to make a [`VhostUser::net`].
#[derive(Clone, Debug)]
pub struct VhostUserNetOptions {
    /// The back end's socket.
    pub socket: PathBuf,
    /// The back end connects to the socket, which this process listens on.
    pub server: bool,
    /// The driver's MAC address; None: the driver makes one.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is told; None: the driver takes its own default.
    pub mtu: Option<u16>,
    /// Number of queues without the control queue, an even number: a receiving and a sending one a pair.
    pub num_queues: u16,
    /// The size of each queue, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// TCP segmentation may be left to the other side (needs `offload_csum`).
    pub offload_tso: bool,
    /// UDP fragmentation may be left to the other side (needs `offload_csum`).
    pub offload_ufo: bool,
    /// Checksums may be left to the other side.
    pub offload_csum: bool,
}

impl VhostUserNetOptions {
    /// Cloud Hypervisor's defaults: one pair of queues of 256 entries, all offloads that the back end has.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            server: false,
            mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }

    fn check(&self) -> Result<(), VhostUserError> {
        let refuse = |option, value: u16, remedy| VhostUserError::Option {
            device: "net",
            option,
            value: value.to_string(),
            remedy,
        };
        if !self.num_queues.is_multiple_of(2) {
            return Err(refuse("num_queues", self.num_queues, "use an even number, two a pair"));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(refuse("mtu", mtu, "use 68 to 65535"));
        }
        check_queues("net", self.num_queues, usize::from(self.num_queues), self.queue_size)
    }

    /// Features that are asked of the back end.
    fn wanted(&self) -> u64 {
        let mut bits = vec![VIRTIO_NET_F_MRG_RXBUF];
        if self.offload_csum {
            bits.extend([VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
            if self.offload_tso {
                bits.extend([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN]);
                bits.extend([VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN]);
            }
            if self.offload_ufo {
                bits.extend([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
            }
        }
        set(&bits)
    }

    /// Features that this process provides: the back end does not hear of them, unless it has them too.
    fn own(&self) -> u64 {
        let mut bits = vec![VIRTIO_NET_F_STATUS];
        if self.mac.is_some() {
            bits.push(VIRTIO_NET_F_MAC);
        }
        if self.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        if self.num_queues > 2 {
            bits.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        }
        set(&bits)
    }

    /// Configuration space (5.1.4): MAC address, status, pairs, MTU.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.unwrap_or_default().to_vec();
        config.extend(LINK_UP.to_le_bytes());
        config.extend((self.num_queues / 2).to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

fn set(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |all, bit| all | 1 << bit)
}

impl VhostUser {
    /// A network: connects to the back end, which gets the queues when a driver is ready.
    ///
    /// # Errors
    /// When an option is out of range, the back end cannot be connected to, or it lacks what is asked for.
    pub fn net(options: &VhostUserNetOptions) -> Result<Self, VhostUserError> {
        options.check()?;
        let queues = usize::from(options.num_queues);
        let socket = &options.socket;
        let frontend = match options.server {
            true => Frontend::listen(socket)?,
            false => Frontend::open(socket)?,
        };
        let mut lent = LentQueues::over(frontend, socket, queues, IMPLIED_QUEUES)?;
        if let Some(mtu) = options.mtu {
            lent.frontend.set_mtu(mtu)?;
        }
        let mut queue_sizes = vec![options.queue_size; queues];
        let control = (queues > 2).then(|| Control::new(queues));
        if control.is_some() {
            queue_sizes.push(CONTROL_SIZE);
        }
        Ok(Self {
            device_type: VIRTIO_ID_NET,
            queue_sizes,
            features: lent.features(options.wanted()) | options.own(),
            lent,
            config: options.config(),
            enabled: 2,
            writeback: None,
            control,
        })
    }
}

/// The control queue.
pub(super) struct Control {
    /// Its number: there are as many data queues.
    index: usize,
    active: Option<(ActiveQueue, Arc<PodMemory>)>,
    /// Data queues that the back end may use.
    enabled: usize,
}

impl Control {
    fn new(index: usize) -> Self {
        Self {
            index,
            active: None,
            enabled: 0,
        }
    }

    /// Takes its queue out of `activation`. The first pair is enabled.
    pub(super) fn start(&mut self, mut activation: Activation) {
        let queue = activation.queues.get_mut(self.index).and_then(Option::take);
        self.active = queue.map(|queue| (queue, activation.memory));
        self.enabled = 2;
    }

    pub(super) fn stop(&mut self) {
        self.active = None;
    }

    /// Serves what the driver asks for.
    pub(super) fn serve(&mut self, lent: &mut LentQueues) -> Result<(), DeviceError> {
        let Some((mut queue, memory)) = self.active.take() else {
            return Ok(());
        };
        let mut served = false;
        // The queue's size bounds a round: a driver that adds while it is served rings again.
        for _ in 0..CONTROL_SIZE {
            let Some(chain) = queue.pop(&memory)? else { break };
            let head = chain.head_index();
            let request = Request::parse(&memory, chain);
            let success = match request.command {
                Command::Pairs(pairs) => self.use_pairs(pairs, lent)?,
                Command::Offloads(_) | Command::Unknown => false,
            };
            let len = request.answer(&memory, success);
            queue.add_used(&memory, head, len)?;
            served = true;
        }
        if served {
            queue.signal(&memory)?;
        }
        self.active = Some((queue, memory));
        Ok(())
    }

    /// Lets the back end use `pairs` pairs; whether there are that many.
    fn use_pairs(&mut self, pairs: u16, lent: &mut LentQueues) -> Result<bool, DeviceError> {
        let wanted = usize::from(pairs).saturating_mul(2);
        if pairs == 0 || wanted > self.index {
            return Ok(false);
        }
        lent.frontend.begin();
        for index in wanted..self.enabled {
            lent.enable(index, false)?;
        }
        for index in self.enabled..wanted {
            lent.enable(index, true)?;
        }
        self.enabled = wanted;
        Ok(true)
    }
}
