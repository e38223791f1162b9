//! The PCI transport of virtio 1.2 (section 4.1): capabilities, status and feature negotiation, queue registers,
//! doorbells. It owns the device; the queues move into the device at DRIVER_OK and back to nothing at reset. What
//! the guest writes in between cannot reach them: see [`queues`].

mod interrupt;
mod queues;
mod registers;
mod saved;
mod standing;
mod subscriber;
mod taken;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::interrupt::{Interrupt, NO_VECTOR};
use self::queues::{FrozenQueues, QueueConfig, QueueSetup};
pub use self::standing::{Standing, Watch};
pub use self::subscriber::VirtioPciSubscriber;
use super::blk::StorageNews;
use super::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt, VirtioDevice};
use super::state::{Place, QueuePosition};
use crate::memory::PodMemory;
use crate::pci::config::{ConfigError, ConfigSpace, Identity};
use crate::pci::msix::{MAX_VECTORS, MSIX_CAPABILITY, Msix};
use crate::pci::{PciFunction, PciRoot};
use crate::platform::{DeviceStep, Hypervisor};

/// Size of the one BAR, as Cloud Hypervisor lays it out.
pub const BAR_SIZE: u64 = 0x8_0000;
/// Common configuration.
const COMMON: u64 = 0;
const COMMON_LEN: u64 = 0x40;
/// ISR status.
const ISR: u64 = 0x2000;
/// Device configuration.
const DEVICE: u64 = 0x4000;
const DEVICE_LEN: u64 = 0x1000;
/// Doorbells.
const NOTIFY: u64 = 0x6000;
const NOTIFY_LEN: u64 = 0x1000;
/// Bytes between two doorbells.
const NOTIFY_MULTIPLIER: u64 = 4;
/// MSI-X table, 16 bytes a vector.
const MSIX_TABLE: u64 = 0x8000;
/// MSI-X pending bits.
const MSIX_PBA: u64 = 0x4_8000;
/// Most queues: one doorbell each has to fit.
const MAX_QUEUES: u64 = NOTIFY_LEN / NOTIFY_MULTIPLIER;

/// Vendor-specific capability id.
const CAP_VENDOR: u8 = 0x09;
/// Offset of the data register in the PCI configuration access capability.
const PCI_CFG_DATA: u16 = 16;
/// `cfg_type` values (virtio 1.2 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const VIRTIO_VENDOR: u16 = 0x1AF4;
const VIRTIO_DEVICE_BASE: u16 = 0x1040;

/// Why a device cannot be put on the PCI transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Its queues cannot be.
    #[error("virtio device {id}: {count} queues, at most {MAX_QUEUES}; sizes must be powers of two up to 32768")]
    Queues {
        /// The device.
        id: String,
        /// Its number of queues.
        count: usize,
    },
    /// Its type has no PCI device id.
    #[error("virtio device {id}: type {kind} has no PCI device id")]
    Type {
        /// The device.
        id: String,
        /// Its virtio type.
        kind: u32,
    },
    /// A descriptor or interrupt vectors could not be had.
    #[error("virtio device {id}: {what}: {source}")]
    Host {
        /// The device.
        id: String,
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The device lends the pod's memory to another process, and the pod is confidential.
    #[error(
        "virtio device {id}: vhost-user is refused for a confidential pod: its back end cannot be held to shared \
         pages; use a device that this monitor serves itself (fs: shared_dir, disks: path, net: tap)"
    )]
    Confidential {
        /// The device.
        id: String,
    },
    /// The device cannot work with the pod's memory.
    #[error("virtio device {id}: {source}")]
    Memory {
        /// The device.
        id: String,
        /// Why.
        source: DeviceError,
    },
    /// The configuration space could not be built.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Where the driver and the device stand.
enum Phase {
    /// The driver configures; the device has no queues.
    Configuring(QueueSetup),
    /// The queues are in the device; their registers can only be read. With where each queue stands.
    Active(FrozenQueues, Vec<Option<Arc<QueuePosition>>>),
    /// The device failed, or could not be activated; only a reset helps.
    Failed(FrozenQueues),
}

impl Phase {
    fn queue(&self, index: u16) -> Option<&QueueConfig> {
        match self {
            Self::Configuring(setup) => setup.get(index),
            Self::Active(frozen, _) | Self::Failed(frozen) => frozen.get(index),
        }
    }
}

/// A virtio device on PCI.
pub struct VirtioPci {
    id: String,
    device: Box<dyn VirtioDevice>,
    memory: Arc<PodMemory>,
    hypervisor: Arc<dyn Hypervisor>,
    confidential: bool,

    config: ConfigSpace,
    msix: Arc<Msix>,
    msix_cap: u16,
    pci_cfg_cap: u16,

    phase: Phase,
    standing: Watch,
    status: u8,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u16,
    isr: Arc<AtomicU8>,
    generation: Arc<AtomicU8>,
    config_interrupt: Arc<Interrupt>,
    queue_interrupts: Vec<Arc<Interrupt>>,

    doorbells: Vec<Doorbell>,
    /// Where the BAR answers now.
    bar: Option<u64>,
}

/// A queue's notification.
struct Doorbell {
    fd: EventFd,
    /// Address registered with the hypervisor.
    at: Option<u64>,
    /// Rung before DRIVER_OK: looked at again when the device is active.
    early: bool,
}

impl VirtioPci {
    /// Puts `device` on the transport under the name `id`. `confidential` pods must negotiate ACCESS_PLATFORM.
    ///
    /// # Errors
    /// When the device's queues or type cannot be, it cannot work with the pod's memory, or descriptors or interrupt
    /// vectors cannot be had.
    pub fn new(
        mut device: Box<dyn VirtioDevice>,
        id: String,
        memory: Arc<PodMemory>,
        hypervisor: Arc<dyn Hypervisor>,
        confidential: bool,
    ) -> Result<Self, TransportError> {
        let sizes = device.queue_max_sizes();
        let count = sizes.len();
        if count as u64 > MAX_QUEUES || sizes.iter().any(|s| !s.is_power_of_two()) {
            return Err(TransportError::Queues { id, count });
        }
        let setup = QueueSetup::new(sizes);
        if confidential && device.lends_memory() {
            return Err(TransportError::Confidential { id });
        }
        if let Err(source) = device.update_memory(&memory) {
            return Err(TransportError::Memory { id, source });
        }
        let host = |what, source| TransportError::Host {
            id: id.clone(),
            what,
            source,
        };
        let doorbells = (0..count)
            .map(|_| {
                EventFd::new(EFD_NONBLOCK).map(|fd| Doorbell {
                    fd,
                    at: None,
                    early: false,
                })
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(|e| host("creating a doorbell", e))?;
        let vector_count = u16::try_from(count + 1).unwrap_or(MAX_VECTORS);
        let vectors = hypervisor
            .msi_vectors(vector_count)
            .map_err(|e| host("reserving interrupt vectors", e))?;
        let msix = Arc::new(Msix::new(vector_count, vectors));
        let (isr, generation) = (Arc::new(AtomicU8::new(0)), Arc::new(AtomicU8::new(0)));
        let mut config = ConfigSpace::new(&identity(&id, device.device_type())?);
        let (msix_cap, pci_cfg_cap) = add_capabilities(&mut config, &msix)?;
        let queue_interrupts = (0..count)
            .map(|_| Arc::new(Interrupt::queue(Arc::clone(&msix), Arc::clone(&isr))))
            .collect();
        let config_interrupt = Interrupt::config(Arc::clone(&msix), Arc::clone(&isr), Arc::clone(&generation));
        Ok(Self {
            id,
            device,
            memory,
            hypervisor,
            confidential,
            config,
            msix,
            msix_cap,
            pci_cfg_cap,
            phase: Phase::Configuring(setup),
            standing: Watch::default(),
            status: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            isr,
            generation,
            config_interrupt: Arc::new(config_interrupt),
            queue_interrupts,
            doorbells,
            bar: None,
        })
    }

    /// Whether the driver is running the device.
    #[must_use]
    pub fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Active(..))
    }

    /// Tells how it stands without its lock.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.standing.clone()
    }

    fn standing(&self) -> Standing {
        match self.phase {
            Phase::Failed(..) => Standing::Failed,
            _ if self.device.is_lost() => Standing::Failed,
            Phase::Active(..) => Standing::Active,
            Phase::Configuring(..) => Standing::Configuring,
        }
    }

    /// A step ended.
    fn stand(&self) {
        self.standing.set(self.standing());
    }

    /// The device, for what the monitor asks of it at run time.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// The pod has other memory regions from now on: an active device that cannot go on with them needs a reset by its
    /// driver.
    ///
    /// # Errors
    /// When the device cannot work with it.
    pub fn update_memory(&mut self, memory: Arc<PodMemory>) -> Result<(), DeviceError> {
        self.memory = Arc::clone(&memory);
        self.drive(|device| device.update_memory(&memory))
    }

    /// What the device offers, with what the transport adds.
    fn offered(&self) -> u64 {
        let platform = if self.confidential {
            1 << VIRTIO_F_ACCESS_PLATFORM
        } else {
            0
        };
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | platform
    }

    /// Whether the driver's choice of features can be lived with (virtio 1.2 2.2, 6.1).
    fn features_acceptable(&self) -> bool {
        let mut required = 1 << VIRTIO_F_VERSION_1;
        if self.confidential {
            required |= 1 << VIRTIO_F_ACCESS_PLATFORM;
        }
        self.driver_features & !self.offered() == 0 && self.driver_features & required == required
    }

    /// The driver writes the status register. Bits only come; 0 resets.
    fn write_status(&mut self, value: u8) {
        let (features_ok, driver_ok) = (status(VIRTIO_CONFIG_S_FEATURES_OK), status(VIRTIO_CONFIG_S_DRIVER_OK));
        if value == 0 {
            return self.reset();
        }
        let mut new = value & !self.status & !status(VIRTIO_CONFIG_S_NEEDS_RESET);
        if new & features_ok != 0 && !self.features_acceptable() {
            tracing::warn!(
                id = self.id,
                features = format_args!("{:#x}", self.driver_features),
                "the driver's features are refused: VERSION_1 is required, ACCESS_PLATFORM too in a confidential pod"
            );
            new &= !features_ok;
        }
        if (self.status | new) & features_ok == 0 {
            new &= !driver_ok;
        }
        self.status |= new;
        if new & driver_ok != 0 {
            match self.activate(&[]) {
                Ok(()) => self.hypervisor.stepped(&self.id, DeviceStep::Activated),
                Err(reason) => self.fail(&reason),
            }
        }
    }

    /// Checks the queues, which stand at `places`, and moves them into the device.
    fn activate(&mut self, places: &[Option<Place>]) -> Result<(), String> {
        let empty = Phase::Configuring(QueueSetup::new(&[]));
        let Phase::Configuring(setup) = std::mem::replace(&mut self.phase, empty) else {
            // DRIVER_OK comes only once between two resets: the status bit never goes.
            return Ok(());
        };
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let (frozen, queues) = setup.freeze(&self.memory, event_idx, places);
        let outcome = queues.map_err(|e| e.to_string()).and_then(|queues| {
            let queues = queues.into_iter().enumerate();
            let queues: Vec<_> = queues
                .map(|(index, queue)| queue.map(|q| self.active_queue(index, q)).transpose())
                .collect::<io::Result<_>>()
                .map_err(|e| format!("handing over a doorbell: {e}"))?;
            let positions = queues.iter().map(|q| q.as_ref().map(ActiveQueue::position)).collect();
            let activation = Activation {
                memory: Arc::clone(&self.memory),
                features: self.driver_features,
                queues,
                config_changed: Arc::clone(&self.config_interrupt) as Arc<dyn QueueInterrupt>,
            };
            let outcome = self.device.activate(activation).map_err(|e| e.to_string());
            outcome.map(|()| positions)
        });
        let positions = match outcome {
            Ok(positions) => positions,
            Err(reason) => {
                self.phase = Phase::Failed(frozen);
                self.stand();
                return Err(reason);
            }
        };
        self.phase = Phase::Active(frozen, positions);
        self.stand();
        self.place_doorbells();
        for doorbell in &mut self.doorbells {
            if std::mem::take(&mut doorbell.early) {
                ring(&doorbell.fd);
            }
        }
        Ok(())
    }

    /// A validated queue as the device gets it.
    fn active_queue(&self, index: usize, queue: Queue) -> io::Result<ActiveQueue> {
        let interrupt = self.queue_interrupts.get(index).ok_or(io::ErrorKind::NotFound)?;
        let active = ActiveQueue::new(index, queue, Arc::clone(interrupt) as Arc<dyn QueueInterrupt>);
        match self.doorbells.get(index) {
            Some(doorbell) if self.device.handles_doorbell(index) => Ok(active.with_doorbell(doorbell.fd.try_clone()?)),
            _ => Ok(active),
        }
    }

    /// The driver chose other vectors for these queues.
    fn interrupts_moved(&mut self, queues: Range<usize>) {
        for index in queues {
            if self.is_active() {
                // A failure is told to the driver.
                let _ = self.drive(|device| device.interrupt_moved(index));
            }
        }
    }

    /// The device cannot go on: it lets go of the driver's state, and the driver is told to reset it.
    fn fail(&mut self, reason: &str) {
        tracing::error!(id = self.id, reason, "the virtio device needs a reset");
        self.hypervisor.stepped(&self.id, DeviceStep::Failed);
        self.device.reset();
        let empty = Phase::Configuring(QueueSetup::new(&[]));
        self.phase = match std::mem::replace(&mut self.phase, empty) {
            Phase::Active(frozen, _) | Phase::Failed(frozen) => Phase::Failed(frozen),
            configuring @ Phase::Configuring(_) => configuring,
        };
        self.stand();
        self.status |= status(VIRTIO_CONFIG_S_NEEDS_RESET);
        if self.status & status(VIRTIO_CONFIG_S_DRIVER_OK) != 0
            && let Err(error) = self.config_interrupt.signal_used()
        {
            tracing::warn!(id = self.id, %error, "the configuration interrupt cannot be raised");
        }
    }

    /// Brings device and transport to their first state; returns when the device holds nothing of the driver.
    fn reset(&mut self) {
        if !matches!(self.phase, Phase::Configuring(_)) || self.status != 0 {
            self.device.reset();
        }
        if !matches!(self.phase, Phase::Configuring(_)) {
            self.hypervisor.stepped(&self.id, DeviceStep::Reset);
        }
        self.phase = Phase::Configuring(QueueSetup::new(self.device.queue_max_sizes()));
        self.stand();
        self.status = 0;
        self.features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.isr.store(0, Ordering::Release);
        self.config_interrupt.set_vector(NO_VECTOR);
        for interrupt in &self.queue_interrupts {
            interrupt.set_vector(NO_VECTOR);
        }
        for doorbell in &mut self.doorbells {
            doorbell.early = false;
        }
    }

    /// A doorbell write that reached user space.
    fn notify(&mut self, index: u64) {
        let Some(doorbell) = usize::try_from(index).ok().and_then(|i| self.doorbells.get_mut(i)) else {
            return;
        };
        match self.phase {
            Phase::Active(..) => ring(&doorbell.fd),
            Phase::Configuring(_) => doorbell.early = true,
            Phase::Failed(_) => {}
        }
    }

    /// Registers the doorbells where the BAR is, if the device is active; removes those that are elsewhere. A reset
    /// leaves them: each change costs the hypervisor a grace period.
    fn place_doorbells(&mut self) {
        let active = self.is_active();
        for (index, doorbell) in (0u64..).zip(&mut self.doorbells) {
            let wanted = self.bar.map(|bar| bar + NOTIFY + NOTIFY_MULTIPLIER * index);
            if let Some(at) = doorbell.at.take_if(|at| Some(*at) != wanted)
                && let Err(error) = self.hypervisor.remove_doorbell(at, &doorbell.fd)
            {
                tracing::warn!(id = self.id, at, %error, "a doorbell cannot be removed");
            }
            if let (None, Some(at), true) = (doorbell.at, wanted, active) {
                match self.hypervisor.add_doorbell(at, &doorbell.fd) {
                    Ok(()) => doorbell.at = Some(at),
                    Err(error) => tracing::warn!(id = self.id, at, %error, "a doorbell works through exits only"),
                }
            }
        }
    }
}

/// A status bit as the register holds it.
const fn status(bit: u32) -> u8 {
    bit.to_le_bytes()[0]
}

fn ring(fd: &EventFd) {
    // A full counter is a doorbell that is already rung.
    let _ = fd.write(1);
}

/// PCI ids and class codes, as Cloud Hypervisor gives them.
fn identity(id: &str, kind: u32) -> Result<Identity, TransportError> {
    let device = u16::try_from(kind)
        .ok()
        .filter(|k| *k < 0x40)
        .map(|k| VIRTIO_DEVICE_BASE + k)
        .ok_or_else(|| TransportError::Type {
            id: id.to_owned(),
            kind,
        })?;
    let class = match kind {
        VIRTIO_ID_NET => [0x02, 0x00, 0x00],
        VIRTIO_ID_BLOCK => [0x01, 0x80, 0x00],
        _ => [0xFF, 0xFF, 0x00],
    };
    Ok(Identity {
        vendor: VIRTIO_VENDOR,
        device,
        revision: 1,
        class,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    })
}

/// The capability list (virtio 1.2 4.1.4) and the BAR. Returns the offsets of the MSI-X and the PCI configuration
/// access capabilities.
fn add_capabilities(config: &mut ConfigSpace, msix: &Msix) -> Result<(u16, u16), ConfigError> {
    config.add_bar(0, BAR_SIZE, false)?;
    let vendor = |kind: u8, len: u8, offset: u64, size: u64| -> Vec<u8> {
        let mut body = vec![len, kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes().iter().take(4));
        body.extend(size.to_le_bytes().iter().take(4));
        body
    };
    for (kind, offset, size) in [
        (CFG_COMMON, COMMON, COMMON_LEN),
        (CFG_ISR, ISR, 1),
        (CFG_DEVICE, DEVICE, DEVICE_LEN),
    ] {
        config.add_capability(CAP_VENDOR, &vendor(kind, 16, offset, size), &[])?;
    }
    let mut notify = vendor(CFG_NOTIFY, 20, NOTIFY, NOTIFY_LEN);
    notify.extend(NOTIFY_MULTIPLIER.to_le_bytes().iter().take(4));
    config.add_capability(CAP_VENDOR, &notify, &[])?;
    // The driver writes which BAR, offset and length the data register stands for.
    let mut access = vendor(CFG_PCI, 20, 0, 0);
    access.extend([0; 4]);
    let writable = [0, 0, 0xFF, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255];
    let pci_cfg = config.add_capability(CAP_VENDOR, &access, &writable)?;
    let table = u32::try_from(MSIX_TABLE).unwrap_or(0);
    let pba = u32::try_from(MSIX_PBA).unwrap_or(0);
    let (body, writable) = msix.capability(0, table, pba);
    let msix_cap = config.add_capability(MSIX_CAPABILITY, &body, &writable)?;
    Ok((u16::from(msix_cap), u16::from(pci_cfg)))
}

impl PciFunction for VirtioPci {
    fn id(&self) -> &str {
        &self.id
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if offset == self.pci_cfg_cap + PCI_CFG_DATA {
            return self.window_read(data);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        if offset == self.pci_cfg_cap + PCI_CFG_DATA {
            return self.window_write(data);
        }
        self.config.write(offset, data);
        let mut control = [0; 2];
        self.config.read(self.msix_cap + 2, &mut control);
        let enabled = self.msix.is_enabled();
        self.msix.set_control(u16::from_le_bytes(control));
        if self.msix.is_enabled() != enabled {
            self.interrupts_moved(0..self.doorbells.len());
        }
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        self.read_register(offset, data);
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        self.write_register(offset, data);
    }

    fn bar_mapped(&mut self, _bar: usize, address: Option<u64>) {
        self.bar = address;
        self.place_doorbells();
    }

    fn detach(&mut self) {
        self.bar = None;
        self.place_doorbells();
        self.reset();
        self.msix.set_control(0);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.counters()
    }
}

impl VirtioPci {
    /// Runs `f` on the device; a failure needs a reset by the driver.
    fn drive(&mut self, f: impl FnOnce(&mut dyn VirtioDevice) -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        let outcome = f(self.device.as_mut());
        match self.device.storage_news() {
            None => {}
            Some(StorageNews::Failing(code)) => self.hypervisor.stepped(&self.id, DeviceStep::StorageFailing(code)),
            Some(StorageNews::Working) => self.hypervisor.stepped(&self.id, DeviceStep::StorageWorking),
        }
        if let (Err(error), Phase::Active(..)) = (&outcome, &self.phase) {
            let reason = error.to_string();
            self.fail(&reason);
        }
        outcome
    }
}

/// Puts a virtio device into a segment; what the monitor does for each device of a pod.
///
/// # Errors
/// When the segment has no slot or no room for the BAR.
pub fn add_to(
    root: &PciRoot,
    function: VirtioPci,
    slot: Option<u8>,
) -> Result<(crate::pci::Bdf, VirtioPciSubscriber), crate::pci::PciError> {
    let function = Arc::new(std::sync::Mutex::new(function));
    let bdf = root.add(Arc::clone(&function) as Arc<std::sync::Mutex<dyn PciFunction>>, slot)?;
    Ok((bdf, VirtioPciSubscriber(function)))
}
