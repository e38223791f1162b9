//! Virtio (OASIS virtio 1.2): what a device is, the queues it gets, and the transport it sits on.
//! A device is one file here and one registration line in the monitor.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod rng;
pub mod state;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod vhost_user;
pub mod vsock;
pub mod watchdog;
