//! How a virtio device interrupts: by the MSI-X vector that the driver chose, or, with none, by a bit in the ISR
//! register, which a driver without MSI-X polls (there is no INTx).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::msix::Msix;
use crate::virtio::device::QueueInterrupt;

/// `VIRTIO_MSI_NO_VECTOR`.
pub(super) const NO_VECTOR: u16 = 0xFFFF;
/// ISR bit: a queue.
pub(super) const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration.
pub(super) const ISR_CONFIG: u8 = 2;

/// The interrupt of a queue or of the configuration.
pub(super) struct Interrupt {
    msix: Arc<Msix>,
    vector: AtomicU16,
    isr: Arc<AtomicU8>,
    bit: u8,
    generation: Option<Arc<AtomicU8>>,
}

impl Interrupt {
    /// A queue's.
    pub(super) fn queue(msix: Arc<Msix>, isr: Arc<AtomicU8>) -> Self {
        Self {
            msix,
            vector: AtomicU16::new(NO_VECTOR),
            isr,
            bit: ISR_QUEUE,
            generation: None,
        }
    }

    /// The configuration's; each signal moves `generation` on.
    pub(super) fn config(msix: Arc<Msix>, isr: Arc<AtomicU8>, generation: Arc<AtomicU8>) -> Self {
        Self {
            bit: ISR_CONFIG,
            generation: Some(generation),
            ..Self::queue(msix, isr)
        }
    }

    /// The chosen vector.
    pub(super) fn vector(&self) -> u16 {
        self.vector.load(Ordering::Acquire)
    }

    /// Chooses a vector; one that is not there becomes [`NO_VECTOR`], as the driver checks by reading it back.
    pub(super) fn set_vector(&self, vector: u16) {
        let vector = if vector < self.msix.count() { vector } else { NO_VECTOR };
        self.vector.store(vector, Ordering::Release);
    }
}

impl QueueInterrupt for Interrupt {
    fn signal_used(&self) -> io::Result<()> {
        if let Some(generation) = &self.generation {
            generation.fetch_add(1, Ordering::AcqRel);
        }
        let vector = self.vector();
        if vector != NO_VECTOR && self.msix.is_enabled() {
            return self.msix.trigger(vector);
        }
        self.isr.fetch_or(self.bit, Ordering::AcqRel);
        Ok(())
    }

    fn eventfd(&self) -> Option<EventFd> {
        // The configuration's has a generation to move on.
        let vector = self.vector();
        let direct = self.generation.is_none() && vector != NO_VECTOR && self.msix.is_enabled();
        direct.then(|| self.msix.eventfd(vector)).flatten()
    }
}
