//! virtio-vsock (virtio 1.2 section 5.10), hybrid: streams of the guest are UNIX stream sockets of the host, as in
//! Firecracker and Cloud Hypervisor. A host process connects to the device's socket and says `CONNECT <port>\n`; a
//! guest that connects to the host's port P reaches the socket `<path>_P`. This file holds the device and its queues;
//! `muxer` the sockets, `connection` the rules of one stream, `packet` the wire format, `handshake` the text.

mod connection;
mod handshake;
mod muxer;
mod packet;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::muxer::Muxer;
use self::packet::{HEADER_SIZE, Segments};
use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::memory::PodMemory;
use vm_memory::Bytes;

/// Queues: rx, tx, event.
const QUEUE_SIZES: [u16; 3] = [256; 3];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` as `struct virtio_vsock_event` (virtio 1.2 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
/// Packets a round and direction, so that a busy guest leaves the loop to others now and then.
const BUDGET: usize = 1024;

/// How to make a [`Vsock`].
#[derive(Clone, Debug)]
pub struct VsockOptions {
    /// The guest's context identifier: 3 to 2^32 - 2.
    pub cid: u64,
    /// Where host processes connect, at most 107 bytes long.
    pub socket: PathBuf,
    /// How long the guest may take to answer a host's `CONNECT`, and to close what the host closed.
    pub handshake_timeout: Duration,
}

impl VsockOptions {
    /// Cloud Hypervisor's behaviour: 2 seconds for a handshake.
    #[must_use]
    pub fn new(cid: u64, socket: PathBuf) -> Self {
        Self {
            cid,
            socket,
            handshake_timeout: Duration::from_secs(2),
        }
    }
}

/// Why a [`Vsock`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context identifier is reserved (virtio 1.2 5.10.4) or has upper bits set.
    #[error("vsock cid {0}: use a number from 3 to 4294967294")]
    Cid(u64),
    /// The socket cannot be made.
    #[error("vsock socket {}: {source}; give another path, or remove what is there", path.display())]
    Socket {
        /// The path that was asked for.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The host is out of something.
    #[error("vsock: {what}: {source}")]
    Host {
        /// What was being made.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

/// What the driver gave.
struct Active {
    memory: Arc<PodMemory>,
    rx: ActiveQueue,
    tx: ActiveQueue,
    event: Option<ActiveQueue>,
    /// The driver is to hear that all its connections are gone.
    untold: bool,
    /// No packet is taken from the driver until it takes the resets that wait for it.
    tx_stalled: bool,
}

impl Active {
    /// Tells the driver that all connections are gone, if it was not told and has a buffer for that.
    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = self.event.as_mut().filter(|_| self.untold) else {
            return Ok(());
        };
        let Some(mut chain) = queue.pop(&self.memory)? else {
            // Its next doorbell comes back to this.
            queue.enable_notification(&self.memory)?;
            return Ok(());
        };
        let buffer = chain
            .next()
            .filter(|d| d.is_write_only() && d.len() as usize >= TRANSPORT_RESET.len());
        let told = buffer.is_some_and(|d| self.memory.write_slice(&TRANSPORT_RESET, d.addr()).is_ok());
        self.untold = false;
        let len = if told { TRANSPORT_RESET.len() } else { 0 };
        queue.add_used(&self.memory, chain.head_index(), u32::try_from(len).unwrap_or(0))?;
        queue.signal(&self.memory)
    }
}

/// The device.
pub struct Vsock {
    cid: u64,
    muxer: Muxer,
    active: Option<Active>,
    chain: Segments,
}

impl Vsock {
    /// Makes the device and its listening socket (mode 0600). A socket file on which nobody listens is replaced;
    /// connections wait in the backlog until the guest's driver is ready. The socket is removed on drop.
    ///
    /// # Errors
    /// When the cid is reserved, or the socket cannot be made: somebody listens on it, another file is there, ...
    pub fn new(options: VsockOptions) -> Result<Self, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&options.cid) {
            return Err(VsockError::Cid(options.cid));
        }
        Ok(Self {
            cid: options.cid,
            muxer: Muxer::new(options)?,
            active: None,
            chain: Segments::default(),
        })
    }

    /// Moves packets both ways until there are no more, or others must have their turn.
    fn pump(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        loop {
            let more_tx = drain_tx(active, &mut self.muxer, &mut self.chain)?;
            let more_rx = fill_rx(active, &mut self.muxer, &mut self.chain)?;
            if more_tx || more_rx {
                self.muxer.wake();
                return Ok(());
            }
            // Room was made for a stalled driver.
            if !(active.tx_stalled && self.muxer.takes_packets()) {
                return Ok(());
            }
        }
    }
}

/// Handles the driver's packets; true when the budget is used up.
fn drain_tx(active: &mut Active, muxer: &mut Muxer, chain: &mut Segments) -> Result<bool, DeviceError> {
    let Active {
        memory, tx, tx_stalled, ..
    } = active;
    let (mut handled, mut more) = (0usize, false);
    *tx_stalled = false;
    tx.disable_notification(memory)?;
    loop {
        if !muxer.takes_packets() {
            *tx_stalled = true;
            break;
        }
        if handled >= BUDGET {
            more = true;
            break;
        }
        let Some(descriptors) = tx.pop(memory)? else {
            if tx.enable_notification(memory)? {
                tx.disable_notification(memory)?;
                continue;
            }
            break;
        };
        let head = descriptors.head_index();
        if chain.load(memory, descriptors, false) {
            muxer.on_packet(memory, chain);
        } else {
            muxer.counters.tx_invalid += 1;
        }
        tx.add_used(memory, head, 0)?;
        handled += 1;
    }
    if handled > 0 {
        tx.signal(memory)?;
    }
    Ok(more)
}

/// Fills the driver's buffers; true when the budget is used up.
fn fill_rx(active: &mut Active, muxer: &mut Muxer, chain: &mut Segments) -> Result<bool, DeviceError> {
    let Active { memory, rx, .. } = active;
    let (mut filled, mut more) = (0usize, false);
    rx.disable_notification(memory)?;
    while muxer.has_output() {
        if filled >= BUDGET {
            more = true;
            break;
        }
        let Some(descriptors) = rx.pop(memory)? else {
            // Only a driver that owes buffers has to notify of them.
            if rx.enable_notification(memory)? {
                rx.disable_notification(memory)?;
                continue;
            }
            break;
        };
        let head = descriptors.head_index();
        if !chain.load(memory, descriptors, true) || chain.len() <= HEADER_SIZE {
            rx.add_used(memory, head, 0)?;
            filled += 1;
            continue;
        }
        let Some(len) = muxer.fill(memory, chain) else {
            rx.undo_pop();
            break;
        };
        rx.add_used(memory, head, u32::try_from(len).unwrap_or(u32::MAX))?;
        filled += 1;
    }
    if filled > 0 {
        rx.signal(memory)?;
    }
    Ok(more)
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_socket,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_read,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_ioctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
    libc::SYS_statx,
    libc::SYS_unlink,
];

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            let source = io::Error::new(
                io::ErrorKind::InvalidInput,
                "the driver left the rx or tx queue disabled",
            );
            return Err(DeviceError::Host {
                what: "starting vsock",
                source,
            });
        };
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            event: queues.next().flatten(),
            untold: false,
            tx_stalled: false,
        });
        self.muxer.start().map_err(|source| DeviceError::Host {
            what: "starting vsock",
            source,
        })
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RX | TX => self.pump(),
            EVENT => self.active.as_mut().map_or(Ok(()), Active::tell_reset),
            _ => Ok(()),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.muxer.fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.muxer.on_events().map_err(|source| DeviceError::Host {
            what: "waiting for vsock connections",
            source,
        })?;
        self.pump()
    }

    /// Connections are kept for the pod that goes on, not for one that is restored: what they are connected to is not in
    /// a snapshot. Where the guest listens stays.
    fn save(&mut self) -> Result<Value, StateError> {
        Ok(Value::Null)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        state::nothing(&state)?;
        match &mut self.active {
            Some(active) => {
                active.untold = true;
                Ok(active.tell_reset()?)
            }
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.stop();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.muxer.counters;
        vec![
            ("rx_bytes", counters.rx_bytes),
            ("rx_packets", counters.rx_packets),
            ("tx_bytes", counters.tx_bytes),
            ("tx_packets", counters.tx_packets),
            ("tx_invalid", counters.tx_invalid),
            ("connections", counters.connections),
            ("connections_active", self.muxer.active_connections()),
            ("connections_refused", counters.refused),
            ("handshake_timeouts", counters.timeouts),
        ]
    }
}
