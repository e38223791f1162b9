//! What devices need of the hypervisor, as traits: doorbells (ioeventfd), message-signalled and pin interrupts
//! (irqfd). The monitor implements them on KVM; tests implement them with plain memory.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Where an MSI is sent (PCI 3.0 6.8.2): the address and data that the guest programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The interrupt vectors of one device.
pub trait MsiVectors: Send + Sync {
    /// Routes vector `index` to `message`, or nowhere (masked). Cheap when nothing changes.
    ///
    /// # Errors
    /// When the hypervisor refuses the route.
    fn set(&self, index: u16, message: Option<MsiMessage>) -> io::Result<()>;
    /// Raises vector `index`; a vector that is routed nowhere is dropped.
    ///
    /// # Errors
    /// When the hypervisor's descriptor fails.
    fn trigger(&self, index: u16) -> io::Result<()>;
    /// The descriptor that raises vector `index` when written, for vhost back ends.
    fn eventfd(&self, index: u16) -> Option<EventFd>;
}

/// A pin interrupt.
pub trait IrqLine: Send + Sync {
    /// Raises an edge.
    ///
    /// # Errors
    /// When the hypervisor's descriptor fails.
    fn trigger(&self) -> io::Result<()>;
}

/// A part of a host file that the guest sees in its address space; it no longer does when this is dropped.
pub trait MappedFile: Send {
    /// Guest address of the first byte.
    fn start(&self) -> u64;
}

/// Places files of the host in a pod's address space, beside its RAM. Devices cannot reach what is there.
pub trait FileMapper: Send + Sync {
    /// Places the first `len` bytes of `file` at a multiple of 2 MiB. What the guest writes goes to the file, or is its
    /// own and lost with the mapping if `private`.
    ///
    /// # Errors
    /// When the address space has no room or the host refuses.
    fn map(&self, file: &File, len: u64, private: bool) -> io::Result<Box<dyn MappedFile>>;
}

/// A step in a virtio device's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceStep {
    /// Its driver is ready.
    Activated,
    /// Its driver let go of it.
    Reset,
    /// It cannot go on; a reset may help or not.
    Failed,
    /// The host refuses its writes, with this error number; they fail, and it goes on.
    StorageFailing(i32),
    /// The host takes them again.
    StorageWorking,
}

/// The hypervisor as devices use it.
pub trait Hypervisor: Send + Sync {
    /// Makes guest writes to MMIO `address` (of any length, with any value) signal `fd` without leaving the kernel.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()>;
    /// Undoes [`Hypervisor::add_doorbell`].
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn remove_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()>;
    /// Reserves `count` interrupt vectors for one device. Nothing is registered before the guest routes one.
    ///
    /// # Errors
    /// When no vectors are left.
    fn msi_vectors(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>>;
    /// Hears that device `id` took a step; from the event loop or a vCPU, and not to be held up.
    fn stepped(&self, _id: &str, _step: DeviceStep) {}
}
