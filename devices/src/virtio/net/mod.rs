//! virtio-net (virtio 1.2 5.1) over a TAP interface of the host. This file has the device: its options, features,
//! configuration space and counters. Frames move in `rx.rs` and `tx.rs`, the queues in use and what they wait for
//! are `active.rs`, the control queue's commands `control.rs`, the host's descriptors `tap.rs`.
//!
//! Frames are moved between guest memory and the TAP queue by the kernel, checksums and segmentation are left to
//! whom the features say; nothing in a frame is interpreted here.

mod active;
pub(in crate::virtio) mod control;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use self::active::Active;
use self::tap::{Interface, Tap};
use super::device::{Activation, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::rate_limiter::{RateLimiter, Throttle};

/// Bytes before each frame: `struct virtio_net_hdr_v1` (virtio 1.2 5.1.6).
const HEADER_LEN: usize = 12;
/// The longest frame with its header: 64 KiB of IP, Ethernet header, VLAN tag, and some to spare.
const MAX_FRAME: usize = 65_600;
/// The most descriptors of one chain; Linux needs 19 at most.
const MAX_DESCRIPTORS: usize = 256;
/// The largest queue size that can be asked for (virtio 1.2 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// The most queue pairs: what one TAP interface has (`MAX_TAP_QUEUES` of Linux).
const MAX_PAIRS: u16 = 256;
/// Length of the configuration space up to and including `mtu` (virtio 1.2 5.1.4).
const CONFIG_LEN: usize = 12;
/// The smallest MTU that can be told (virtio 1.2 5.1.4.1).
const MIN_MTU: u16 = 68;

/// What `epoll` reports, beside TAP queues.
const AGAIN: u64 = u64::MAX;
const RX_TIMER: u64 = u64::MAX - 1;
const TX_TIMER: u64 = u64::MAX - 2;

/// How a network device is to be.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// The driver's MAC address; None: the driver makes one.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is told; None: the interface's.
    pub mtu: Option<u16>,
    /// Number of queues without the control queue, an even number: a receiving and a sending one a pair.
    pub num_queues: u16,
    /// Size of each queue, a power of two.
    pub queue_size: u16,
    /// TCP segmentation may be left to the other side (needs `offload_csum`).
    pub offload_tso: bool,
    /// UDP fragmentation may be left to the other side (needs `offload_csum`).
    pub offload_ufo: bool,
    /// Checksums may be left to the other side.
    pub offload_csum: bool,
    /// Limits frames to the driver.
    pub rx_limiter: Option<Arc<RateLimiter>>,
    /// Limits frames from the driver.
    pub tx_limiter: Option<Arc<RateLimiter>>,
}

impl Default for NetOptions {
    /// The defaults of Cloud Hypervisor.
    fn default() -> Self {
        Self {
            mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            rx_limiter: None,
            tx_limiter: None,
        }
    }
}

/// The host's interface, when this monitor sets it up.
#[derive(Clone, Debug, Default)]
pub struct HostInterface {
    /// Its name, at most 15 bytes; None: `vmtap0` or the next that is free.
    pub name: Option<String>,
    /// Its MAC address; None: as it is.
    pub mac: Option<[u8; 6]>,
    /// Its address and netmask, if it is made; None: it has none. An interface that is there keeps its own, as in Cloud
    /// Hypervisor.
    pub address: Option<(IpAddr, IpAddr)>,
}

/// Why a network device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// An option has a value that cannot be.
    #[error("net {option}={value}: {remedy}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        remedy: &'static str,
    },
    /// The TAP interface cannot be opened.
    #[error("net tap={name}: cannot open queue {queue}: {source}{hint}")]
    Open {
        /// The interface.
        name: String,
        /// Which queue.
        queue: u16,
        /// The error.
        source: io::Error,
        /// What helps.
        hint: &'static str,
    },
    /// A given descriptor cannot be used.
    #[error("net fds[{index}]: not a usable TAP queue: {source}")]
    Fd {
        /// Which descriptor.
        index: usize,
        /// The error.
        source: io::Error,
    },
    /// The interface cannot be set up.
    #[error("net tap={name}: {what}: {source}")]
    Interface {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// A descriptor of our own cannot be made.
    #[error("net: {what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

/// What the device did since it was made.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    rx_bytes: u64,
    rx_frames: u64,
    /// Frames that no buffers of the driver could take.
    rx_dropped: u64,
    rx_malformed: u64,
    rx_errors: u64,
    tx_bytes: u64,
    tx_frames: u64,
    /// Frames that the host refused.
    tx_dropped: u64,
    tx_malformed: u64,
}

/// A virtio network device.
pub struct Net {
    shared: Shared,
    active: Option<Active>,
    features: u64,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
}

/// What stays over a reset.
struct Shared {
    taps: Vec<Tap>,
    /// Watches what can make progress, nothing else; the event loop watches it.
    epoll: Epoll,
    /// Asks for another turn.
    again: EventFd,
    rx_throttle: Option<Throttle>,
    tx_throttle: Option<Throttle>,
    counters: Counters,
}

impl Net {
    /// A device on the TAP interface `host`, which is opened, or made if it is not there, and set up as asked. A new
    /// interface is gone with the device.
    ///
    /// # Errors
    /// When an option cannot be, or the interface cannot be opened or set up.
    pub fn open(options: &NetOptions, host: &HostInterface) -> Result<Self, NetError> {
        options.check()?;
        let pairs = options.num_queues / 2;
        let mut taps: Vec<Tap> = Vec::new();
        let there = |name: &String| Interface::new(name).and_then(|i| i.mtu()).is_ok();
        let made = !host.name.as_ref().is_some_and(there);
        for queue in 0..pairs {
            // The kernel chooses a name once.
            let name = taps.first().map(Tap::name).or(host.name.as_deref());
            let tap = Tap::open(name, pairs > 1).map_err(|source| NetError::Open {
                name: name.unwrap_or("(new)").to_owned(),
                queue,
                hint: hint(&source, pairs),
                source,
            })?;
            taps.push(tap);
        }
        let told = match taps.first() {
            Some(tap) => Some(set_up(tap.name(), options, host, made)?),
            None => None,
        };
        Self::new(options, taps, told)
    }

    /// A device on TAP queues that someone else opened and set up, one a queue pair; the interface is left as it is.
    ///
    /// # Errors
    /// When an option cannot be, or a descriptor is no TAP queue with the header that virtio needs.
    pub fn from_fds(options: &NetOptions, fds: Vec<OwnedFd>) -> Result<Self, NetError> {
        options.check()?;
        if fds.len() != usize::from(options.num_queues / 2) {
            return Err(NetError::Option {
                option: "num_queues",
                value: options.num_queues.to_string(),
                remedy: "give twice the number of descriptors",
            });
        }
        let multi_queue = fds.len() > 1;
        let mut taps = Vec::new();
        for (index, fd) in fds.into_iter().enumerate() {
            taps.push(Tap::from_fd(fd, multi_queue).map_err(|source| NetError::Fd { index, source })?);
        }
        // The interface may be in another network namespace by now: then its MTU is not known.
        let interface = taps.first().and_then(|tap| Interface::new(tap.name()).ok()?.mtu().ok());
        let told = options.mtu.or(interface);
        Self::new(options, taps, told)
    }

    /// A device whose TAP queues are datagram sockets, for tests and fuzz targets: each datagram is a frame with its
    /// 12-byte header.
    ///
    /// # Errors
    /// As [`Net::from_fds`].
    #[cfg(any(test, feature = "test-utils"))]
    pub fn with_sockets(
        options: &NetOptions,
        sockets: Vec<std::os::unix::net::UnixDatagram>,
    ) -> Result<Self, NetError> {
        options.check()?;
        let taps = sockets.into_iter().map(Tap::stand_in).collect::<io::Result<_>>();
        let taps = taps.map_err(|source| NetError::Host {
            what: "making a socket non-blocking",
            source,
        })?;
        Self::new(options, taps, options.mtu)
    }

    fn new(options: &NetOptions, taps: Vec<Tap>, mtu: Option<u16>) -> Result<Self, NetError> {
        let host = |what| move |source| NetError::Host { what, source };
        let throttle = |limiter: &Option<Arc<RateLimiter>>| {
            let throttle = limiter.as_ref().map(|limiter| Throttle::new(Arc::clone(limiter)));
            throttle.transpose().map_err(host("making a timer"))
        };
        let shared = Shared {
            taps,
            epoll: Epoll::new().map_err(host("making an epoll descriptor"))?,
            again: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("making an eventfd"))?,
            rx_throttle: throttle(&options.rx_limiter)?,
            tx_throttle: throttle(&options.tx_limiter)?,
            counters: Counters::default(),
        };
        let timers = [(&shared.rx_throttle, RX_TIMER), (&shared.tx_throttle, TX_TIMER)];
        let timers = timers
            .into_iter()
            .filter_map(|(t, data)| Some((t.as_ref()?.fd(), data)));
        for (fd, data) in timers.chain([(shared.again.as_raw_fd(), AGAIN)]) {
            let event = EpollEvent::new(EventSet::IN, data);
            let added = shared.epoll.ctl(ControlOperation::Add, fd, event);
            added.map_err(host("watching a descriptor"))?;
        }
        let pairs = options.num_queues / 2;
        let mtu = mtu.filter(|mtu| *mtu >= MIN_MTU);
        // Two for each pair, and the control queue.
        let count = usize::from(options.num_queues).saturating_add(1);
        Ok(Self {
            shared,
            active: None,
            features: options.features(mtu.is_some()),
            config: config(options.mac, pairs, mtu),
            queue_sizes: vec![options.queue_size; count],
        })
    }

    /// The host's interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        self.shared.taps.first().map_or("", Tap::name)
    }
}

impl NetOptions {
    fn check(&self) -> Result<(), NetError> {
        let refuse = |option, value: &dyn ToString, remedy| NetError::Option {
            option,
            value: value.to_string(),
            remedy,
        };
        let pairs = self.num_queues / 2;
        if pairs == 0 || pairs > MAX_PAIRS || !self.num_queues.is_multiple_of(2) {
            return Err(refuse(
                "num_queues",
                &self.num_queues,
                "give an even number from 2 to 512",
            ));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 2 || self.queue_size > MAX_QUEUE_SIZE {
            let remedy = "give a power of two from 2 to 32768";
            return Err(refuse("queue_size", &self.queue_size, remedy));
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => Err(refuse("mtu", &mtu, "give at least 68")),
            _ => Ok(()),
        }
    }

    fn features(&self, mtu: bool) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        if self.offload_csum {
            bits.extend([
                VIRTIO_NET_F_CSUM,
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            ]);
            if self.offload_tso {
                bits.extend([
                    VIRTIO_NET_F_HOST_TSO4,
                    VIRTIO_NET_F_HOST_TSO6,
                    VIRTIO_NET_F_HOST_ECN,
                    VIRTIO_NET_F_GUEST_TSO4,
                    VIRTIO_NET_F_GUEST_TSO6,
                    VIRTIO_NET_F_GUEST_ECN,
                ]);
            }
            if self.offload_ufo {
                bits.extend([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
            }
        }
        if self.num_queues > 2 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        if self.mac.is_some() {
            bits.push(VIRTIO_NET_F_MAC);
        }
        if mtu {
            bits.push(VIRTIO_NET_F_MTU);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }
}

/// `struct virtio_net_config` (virtio 1.2 5.1.4).
fn config(mac: Option<[u8; 6]>, pairs: u16, mtu: Option<u16>) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    // VIRTIO_NET_S_LINK_UP.
    let status = 1_u16.to_le_bytes();
    let bytes = mac.unwrap_or_default().into_iter().chain(status);
    let bytes = bytes.chain(pairs.to_le_bytes()).chain(mtu.unwrap_or(0).to_le_bytes());
    for (place, byte) in config.iter_mut().zip(bytes) {
        *place = byte;
    }
    config
}

/// Sets up the interface `name`, which was `made` here or was there; its MTU, or the one that was asked for.
fn set_up(name: &str, options: &NetOptions, host: &HostInterface, made: bool) -> Result<u16, NetError> {
    let failed = |what| {
        move |source| NetError::Interface {
            name: name.to_owned(),
            what,
            source,
        }
    };
    let interface = Interface::new(name).map_err(failed("making a socket for it"))?;
    if let Some((address, mask)) = host.address.filter(|_| made) {
        let set = interface.set_address(address, mask);
        set.map_err(failed("setting its address (ip, mask)"))?;
    }
    if let Some(mac) = host.mac {
        interface.set_mac(mac).map_err(failed("setting its MAC (host_mac)"))?;
    }
    if let Some(mtu) = options.mtu {
        interface.set_mtu(mtu).map_err(failed("setting its MTU (mtu)"))?;
    }
    interface.up().map_err(failed("bringing it up"))?;
    interface.mtu().map_err(failed("reading its MTU"))
}

/// What helps against an error of opening a TAP queue.
fn hint(error: &io::Error, pairs: u16) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; make the interface for this user first (ip tuntap add mode tap user …), or pass descriptors"
        }
        Some(libc::EBUSY) => "; someone else uses it",
        Some(libc::EINVAL) if pairs > 1 => "; it was made without multi_queue, or it is no TAP interface",
        Some(libc::EINVAL) => "; it was made with multi_queue, or it is no TAP interface",
        _ => "",
    }
}

/// The error of a rate limiter's timer.
fn timer_failed(source: io::Error) -> DeviceError {
    DeviceError::Host {
        what: "setting a rate limiter's timer",
        source,
    }
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ioctl,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
];

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_LEN);
        let rest = self.config.iter().skip(skip).copied();
        for (place, byte) in data.iter_mut().zip(rest.chain(std::iter::repeat(0))) {
            *place = byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = None;
        self.active = Some(Active::new(&mut self.shared, activation)?);
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.on_queue(&mut self.shared, index),
            None => Ok(()),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.shared.epoll.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default(); 32];
        // On error (a signal) the set stays ready, and the event loop comes again.
        let count = self.shared.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            match event.data() {
                AGAIN => {
                    let _ = self.shared.again.read();
                }
                RX_TIMER => self.shared.rx_throttle.iter_mut().for_each(Throttle::on_timer),
                TX_TIMER => self.shared.tx_throttle.iter_mut().for_each(Throttle::on_timer),
                _ => {}
            }
            if let Some(active) = &mut self.active {
                active.on_event(&mut self.shared, event.data())?;
            }
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, StateError> {
        let active = self.active.as_mut();
        let saved = active.map(|active| active.save(&mut self.shared)).transpose()?;
        state::value(&saved)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let saved: Option<active::Saved> = state::parse(state)?;
        let taken = match (&mut self.active, saved) {
            (None, None) => true,
            (Some(active), Some(saved)) => active.restore(&mut self.shared, saved),
            _ => false,
        };
        if taken {
            Ok(())
        } else {
            Err(StateError::Broken(format!("queue pairs or offloads {saved:?}")))
        }
    }

    fn reset(&mut self) {
        if let Some(mut active) = self.active.take() {
            active.unwatch(&self.shared);
        }
        for throttle in [&mut self.shared.rx_throttle, &mut self.shared.tx_throttle] {
            throttle.iter_mut().for_each(Throttle::reset);
        }
        let _ = self.shared.again.read();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.shared.counters;
        vec![
            ("rx_bytes", c.rx_bytes),
            ("rx_frames", c.rx_frames),
            ("rx_dropped", c.rx_dropped),
            ("rx_malformed_chains", c.rx_malformed),
            ("rx_errors", c.rx_errors),
            ("tx_bytes", c.tx_bytes),
            ("tx_frames", c.tx_frames),
            ("tx_dropped", c.tx_dropped),
            ("tx_malformed_chains", c.tx_malformed),
        ]
    }
}
