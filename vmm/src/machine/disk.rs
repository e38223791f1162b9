//! What is asked of the disks of a running machine.

use std::error::Error;
use std::sync::PoisonError;

use super::Machine;

/// Why a disk keeps its size.
#[derive(Debug, thiserror::Error)]
#[error("disk {id} keeps its size")]
pub struct DiskError {
    /// The disk.
    pub id: String,
    /// Why.
    pub source: Box<dyn Error + Send + Sync>,
}

impl Machine {
    /// Gives disk `id` `bytes` bytes and tells the guest; false if there is no such device.
    ///
    /// # Errors
    /// When it is no disk or cannot have that size; it is as before then.
    pub fn resize_disk(&self, id: &str, bytes: u64) -> Result<bool, DiskError> {
        let Some(device) = self.devices.iter().find(|device| device.id == id) else {
            return Ok(false);
        };
        let mut function = device.function.lock().unwrap_or_else(PoisonError::into_inner);
        let resized = function.device_mut().set_capacity(bytes);
        resized.map(|()| true).map_err(|source| DiskError {
            id: id.to_owned(),
            source,
        })
    }
}
