//! What a snapshot holds of a virtio device: the transport's registers, where its queues stand, and what the device
//! itself adds. How a device comes to rest is its own business ([`VirtioDevice::save`]).
//!
//! [`VirtioDevice::save`]: super::device::VirtioDevice::save

use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::device::DeviceError;

/// Why a device's state cannot be saved, or taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The device has something that no snapshot holds.
    #[error("{0}")]
    Refused(String),
    /// The state is not one of such a device.
    #[error("its state cannot be: {0}")]
    Broken(String),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The state of a device that keeps nothing.
pub(super) fn nothing(state: &Value) -> Result<(), StateError> {
    if state.is_null() {
        Ok(())
    } else {
        Err(StateError::Broken("it has no state of its own".to_owned()))
    }
}

/// The state of a device as its own type.
pub(super) fn parse<T: DeserializeOwned>(state: Value) -> Result<T, StateError> {
    serde_json::from_value(state).map_err(|e| StateError::Broken(e.to_string()))
}

/// A device's state as JSON.
pub(super) fn value(state: &impl Serialize) -> Result<Value, StateError> {
    serde_json::to_value(state).map_err(|e| StateError::Broken(e.to_string()))
}

/// Where a queue in use stands. The queue itself is in the device; the transport looks here.
#[derive(Debug)]
pub(super) struct QueuePosition(AtomicU64);

/// Beyond what two indices of 16 bits make.
const LOST: u64 = u64::MAX;

impl QueuePosition {
    pub(super) fn new(next_avail: u16, next_used: u16) -> Self {
        let position = Self(AtomicU64::new(0));
        position.set(next_avail, next_used);
        position
    }

    pub(super) fn set(&self, next_avail: u16, next_used: u16) {
        let packed = u64::from(next_avail) << 16 | u64::from(next_used);
        self.0.store(packed, Ordering::Relaxed);
    }

    /// Someone else runs the queue from now on.
    pub(super) fn lose(&self) {
        self.0.store(LOST, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Option<Place> {
        let packed = self.0.load(Ordering::Relaxed);
        let low = |shift: u32| u16::try_from(packed >> shift & 0xFFFF).unwrap_or_default();
        (packed != LOST).then(|| Place {
            next_avail: low(16),
            next_used: low(0),
        })
    }
}

/// Where a queue stands: the next entries of its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
}

/// A queue's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueState {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) vector: u16,
    /// Rung before the device was active.
    pub(super) rung: bool,
    /// Of an enabled queue of an active device.
    pub(super) place: Option<Place>,
}

/// Where the driver and the device stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum PhaseState {
    Configuring,
    Active,
    Failed,
}

/// A virtio device on PCI, as a snapshot holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Configuration space.
    pub(super) config: Vec<u8>,
    pub(super) msix: crate::pci::msix::MsixState,
    pub(super) phase: PhaseState,
    pub(super) status: u8,
    pub(super) features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) isr: u8,
    pub(super) generation: u8,
    pub(super) config_vector: u16,
    pub(super) queues: Vec<QueueState>,
    /// The device's own.
    pub(super) device: Value,
}

impl TransportState {
    /// What the guest has written into configuration space, from the command register on; where it is, and the bytes.
    #[must_use]
    pub fn settings(&self) -> (u16, &[u8]) {
        (4, self.config.get(4..).unwrap_or_default())
    }
}
