//! The transport for a snapshot: its registers and its device taken down, and put into a fresh one. What is read may come
//! from anywhere: it is held to what a driver could have written.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};

use super::interrupt::NO_VECTOR;
use super::queues::{QueueConfig, QueueSetup, Ring};
use super::{Phase, VirtioPci, ring, status};
use crate::pci::config::CONFIG_SIZE;
use crate::virtio::device::QueueInterrupt;
use crate::virtio::state::{PhaseState, Place, QueuePosition, QueueState, StateError, TransportState};

fn broken(reason: impl Into<String>) -> StateError {
    StateError::Broken(reason.into())
}

fn place(position: &QueuePosition) -> Result<Place, StateError> {
    position.get().ok_or_else(|| {
        StateError::Refused(
            "another process runs its queues, and where they stand is not known here: take the device out of the pod \
             first (vm.remove-device)"
                .to_owned(),
        )
    })
}

impl VirtioPci {
    /// Brings the device to rest and takes down what a snapshot needs. It goes on when the guest does.
    ///
    /// # Errors
    /// When the device has something that cannot be kept, in words that say what to do.
    pub fn save(&mut self) -> Result<TransportState, StateError> {
        let device = self.device.save()?;
        let (phase, places) = match &self.phase {
            Phase::Configuring(_) => (PhaseState::Configuring, Vec::new()),
            Phase::Failed(_) => (PhaseState::Failed, Vec::new()),
            Phase::Active(_, positions) => {
                let places: Result<Vec<_>, _> = positions.iter().map(|p| p.as_deref().map(place).transpose()).collect();
                (PhaseState::Active, places?)
            }
        };
        let mut config = vec![0; CONFIG_SIZE];
        self.config.read(0, &mut config);
        Ok(TransportState {
            config,
            msix: self.msix.save(),
            phase,
            status: self.status,
            features_select: self.features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            isr: self.isr.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
            config_vector: self.config_interrupt.vector(),
            queues: self.saved_queues(&places),
            device,
        })
    }

    fn saved_queues(&self, places: &[Option<Place>]) -> Vec<QueueState> {
        let queues = (0u16..).zip(self.queue_interrupts.iter().zip(&self.doorbells));
        queues
            .map(|(index, (interrupt, doorbell))| {
                let registers = self.phase.queue(index);
                let address = |ring| registers.map_or(0, |q: &QueueConfig| q.ring(ring));
                QueueState {
                    size: registers.map_or(0, |q| q.size),
                    enabled: registers.is_some_and(|q| q.enabled),
                    desc: address(Ring::Desc),
                    driver: address(Ring::Driver),
                    device: address(Ring::Device),
                    vector: interrupt.vector(),
                    rung: doorbell.early,
                    place: places.get(usize::from(index)).copied().flatten(),
                }
            })
            .collect()
    }

    /// Takes over the state of such a device of another monitor. This one is fresh, and its configuration space has been
    /// given [`TransportState::settings`]. No vCPU runs; their state, and the local APICs', is there already.
    ///
    /// # Errors
    /// When the state cannot be that of this device.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), StateError> {
        let Phase::Configuring(setup) = &mut self.phase else {
            return Err(broken("the device is in use"));
        };
        if state.queues.len() != self.doorbells.len() || !self.msix.restore(&state.msix) {
            return Err(broken(format!(
                "it has {} queues, and this device {}: restore with the same options",
                state.queues.len(),
                self.doorbells.len()
            )));
        }
        restore_queues(setup, &state.queues)?;
        self.features_select = state.features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.status = state.status;
        self.generation.store(state.generation, Ordering::Release);
        self.config_interrupt.set_vector(state.config_vector);
        for ((interrupt, doorbell), queue) in (self.queue_interrupts.iter().zip(&mut self.doorbells)).zip(&state.queues)
        {
            interrupt.set_vector(queue.vector);
            doorbell.early = queue.rung;
        }
        self.isr.store(state.isr, Ordering::Release);
        self.restore_phase(state)?;
        self.device.restore(state.device.clone())?;
        self.look_again()
    }

    fn restore_phase(&mut self, state: &TransportState) -> Result<(), StateError> {
        let has = |bit| state.status & status(bit) != 0;
        let (features_ok, driver_ok) = (has(VIRTIO_CONFIG_S_FEATURES_OK), has(VIRTIO_CONFIG_S_DRIVER_OK));
        if (driver_ok && !features_ok) || driver_ok == (state.phase == PhaseState::Configuring) {
            return Err(broken(format!(
                "status {:#x} and phase {:?}",
                state.status, state.phase
            )));
        }
        if features_ok && !self.features_acceptable() {
            return Err(broken(format!(
                "its driver uses features {:#x}, and this device offers {:#x}: restore with the same options",
                state.driver_features,
                self.offered()
            )));
        }
        match state.phase {
            PhaseState::Configuring => Ok(()),
            PhaseState::Active => {
                let places: Vec<_> = state.queues.iter().map(|q| q.place).collect();
                self.activate(&places).map_err(broken)
            }
            PhaseState::Failed => {
                let empty = Phase::Configuring(QueueSetup::new(&[]));
                if let Phase::Configuring(setup) = std::mem::replace(&mut self.phase, empty) {
                    self.phase = Phase::Failed(setup.freeze(&self.memory, false, &[]).0);
                    self.stand();
                }
                Ok(())
            }
        }
    }

    /// A doorbell that was rung, or an interrupt that was raised, may have been on its way when the pod was saved: the
    /// device and the driver look once more.
    fn look_again(&mut self) -> Result<(), StateError> {
        let Phase::Active(_, positions) = &self.phase else {
            return Ok(());
        };
        let queues = positions.iter().zip(&self.doorbells).zip(&self.queue_interrupts);
        for ((_, doorbell), interrupt) in queues.filter(|((position, _), _)| position.is_some()) {
            ring(&doorbell.fd);
            if interrupt.vector() != NO_VECTOR {
                interrupt
                    .signal_used()
                    .map_err(|e| broken(format!("raising a queue interrupt: {e}")))?;
            }
        }
        Ok(())
    }
}

/// Writes the queues' registers as a driver would.
fn restore_queues(setup: &mut QueueSetup, queues: &[QueueState]) -> Result<(), StateError> {
    for (index, queue) in (0u16..).zip(queues) {
        setup.set_size(index, queue.size);
        for (ring, address) in [
            (Ring::Desc, queue.desc),
            (Ring::Driver, queue.driver),
            (Ring::Device, queue.device),
        ] {
            setup.set_ring(index, ring, u64::MAX, address);
        }
        if queue.enabled {
            setup.enable(index);
        }
        if setup.get(index).is_none_or(|q| q.size != queue.size) {
            return Err(broken(format!(
                "queue {index} has {} entries: restore with the same options",
                queue.size
            )));
        }
    }
    Ok(())
}
