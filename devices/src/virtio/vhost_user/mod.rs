//! Virtio devices that another process serves over vhost-user (the protocol's description in QEMU's
//! docs/interop/vhost-user.rst): a file system, a disk, a network. Here are the errors and what all of them share, the
//! device itself; `frontend` speaks the protocol, `lent` lends the queues, `table` makes the memory table, and the rest
//! says what is special of each kind.
//!
//! The data path is between the guest and the back end: the driver's doorbell and the interrupt are descriptors that
//! the kernel connects. This process connects once, when the device is made. A back end that is gone, does not answer
//! within [`ANSWER_LIMIT`] or breaks the protocol makes the device fail for good; the pod lives on without it.

mod blk;
mod frontend;
mod fs;
mod lent;
mod net;
mod table;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use self::blk::VhostUserBlkOptions;
pub use self::fs::VhostUserFsOptions;
use self::lent::LentQueues;
use self::net::Control;
pub use self::net::VhostUserNetOptions;
use super::device::{Activation, DeviceError, VirtioDevice};
use crate::memory::PodMemory;

/// How long a back end may take for all answers of one operation: being connected to, taking the queues, giving them
/// back (which waits for the requests that it has begun).
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a socket may take to appear, to be listened to and to accept.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// The most queues: a ring's number has eight bits in some messages.
const MAX_QUEUES: u16 = 256;

/// Why a vhost-user device cannot be made, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// An option has a value that cannot be.
    #[error("vhost-user {device} {option}={value}: {remedy}")]
    Option {
        /// The kind of device.
        device: &'static str,
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        remedy: &'static str,
    },
    /// The socket cannot be connected to.
    #[error(
        "vhost-user socket {}: cannot connect: {source}; start the back end first, with this socket and for one client",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The last error.
        source: io::Error,
    },
    /// Nobody connects to the socket.
    #[error(
        "vhost-user socket {}: no back end connects: {source}; start one that connects, or use vhost_mode Client",
        path.display()
    )]
    Accept {
        /// The socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The connection failed.
    #[error("vhost-user socket {}: {during}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The message that was being exchanged.
        during: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The back end is gone, or was given up.
    #[error("vhost-user socket {}: the back end is gone, and is not connected to again", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// The back end does not keep to the protocol.
    #[error("vhost-user socket {}: {during}: the back end {what}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// The message that was being exchanged.
        during: &'static str,
        /// What it did.
        what: &'static str,
    },
    /// The back end answered that it cannot do something.
    #[error("vhost-user socket {}: the back end refuses {during} (code {code:#x})", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The message.
        during: &'static str,
        /// Its answer.
        code: u64,
    },
    /// The back end lacks something that is needed.
    #[error("vhost-user socket {}: the back end lacks {what}", path.display())]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What.
        what: &'static str,
    },
    /// The back end has fewer queues than asked for.
    #[error("vhost-user socket {}: {wanted} queues are asked for, the back end has {has}; lower num_queues", path.display())]
    Queues {
        /// The socket.
        path: PathBuf,
        /// Queues asked for, with those that are not in `num_queues`.
        wanted: usize,
        /// Queues that it has.
        has: u64,
    },
    /// The pod's memory is not a file that another process can map.
    #[error(
        "vhost-user: guest memory at {gpa:#x} is private to this process; give the pod memory that a back end can map: \
         memory.shared true (--memory shared=on)"
    )]
    PrivateMemory {
        /// Where the region begins.
        gpa: u64,
    },
    /// The back end cannot take that many memory regions.
    #[error("vhost-user socket {}: the pod has {count} memory regions, the back end takes {max}", path.display())]
    Regions {
        /// The socket.
        path: PathBuf,
        /// Regions of the pod.
        count: usize,
        /// Regions that it takes.
        max: usize,
    },
    /// The transport kept something that the device needs.
    #[error("vhost-user: queue {0} came without its doorbell")]
    NoDoorbell(usize),
    /// The host is out of something.
    #[error("vhost-user: {what}: {source}")]
    Host {
        /// What was being made.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

impl From<VhostUserError> for DeviceError {
    fn from(error: VhostUserError) -> Self {
        Self::Host {
            what: "serving the device by another process",
            source: io::Error::other(error),
        }
    }
}

/// Checks the options that all have; `queues` is how many queues the device has then.
fn check_queues(device: &'static str, num_queues: u16, queues: usize, queue_size: u16) -> Result<(), VhostUserError> {
    let refuse = |option, value: u16, remedy| VhostUserError::Option {
        device,
        option,
        value: value.to_string(),
        remedy,
    };
    if num_queues == 0 || queues > usize::from(MAX_QUEUES) {
        return Err(refuse("num_queues", num_queues, "use 1 to 255"));
    }
    if !queue_size.is_power_of_two() || !(2..=32768).contains(&queue_size) {
        return Err(refuse("queue_size", queue_size, "use a power of two from 2 to 32768"));
    }
    Ok(())
}

/// A virtio device that another process serves.
pub struct VhostUser {
    lent: LentQueues,
    device_type: u32,
    queue_sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
    /// Queues that are enabled when the driver is ready, from the first on.
    enabled: usize,
    /// A disk's cache mode as a fresh driver finds it, if drivers can change it.
    writeback: Option<u8>,
    /// A network's control queue, which is served here.
    control: Option<Control>,
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`): those of the connection once the pod runs.
pub const SYSCALLS: &[i64] = &[
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
];

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = self.config.get(start..).unwrap_or_default().iter();
        for place in data {
            *place = bytes.next().copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.write_writeback(offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.lent.start(&mut activation, self.enabled)?;
        if let Some(control) = &mut self.control {
            control.start(activation);
        }
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match &mut self.control {
            Some(control) if !self.lent.has(index) => control.serve(&mut self.lent),
            _ => Ok(()),
        }
    }

    fn handles_doorbell(&self, index: usize) -> bool {
        self.lent.has(index)
    }

    fn interrupt_moved(&mut self, index: usize) -> Result<(), DeviceError> {
        Ok(self.lent.interrupt_moved(index)?)
    }

    fn lends_memory(&self) -> bool {
        true
    }

    fn update_memory(&mut self, memory: &Arc<PodMemory>) -> Result<(), DeviceError> {
        Ok(self.lent.update_memory(memory)?)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        self.lent.event_fds()
    }

    fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        self.lent.on_event(index)
    }

    fn reset(&mut self) {
        if let Some(control) = &mut self.control {
            control.stop();
        }
        self.lent.stop();
        self.reset_writeback();
    }

    fn set_capacity(&mut self, _bytes: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
        Err("another process serves the device (vhost_user): have that one change the size".into())
    }

    fn outlives_reboot(&self) -> bool {
        !self.is_lost()
    }

    fn is_lost(&self) -> bool {
        self.lent.frontend.is_gone()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.lent.counters()
    }
}
