//! A device taken off its transport, to be put on another one: what a reboot does with those that outlive it.

use super::{Phase, QueueSetup, VirtioPci};
use crate::virtio::device::{Activation, DeviceError, VirtioDevice};

/// What stands where a device was taken off: nothing.
struct Nothing;

impl VirtioDevice for Nothing {
    fn device_type(&self) -> u32 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

impl VirtioPci {
    /// Takes the device off, reset and without anything of the guest, if it outlives a reboot. No vCPU runs any more, and
    /// the event loop does not watch it. This transport is of no use afterwards.
    pub fn take_off(&mut self) -> Option<Box<dyn VirtioDevice>> {
        if !self.device.outlives_reboot() {
            return None;
        }
        self.device.reset();
        self.phase = Phase::Configuring(QueueSetup::new(&[]));
        // What a reset shows to be lost, a back end that does not answer, is made anew.
        let outlives = self.device.outlives_reboot();
        outlives.then(|| std::mem::replace(&mut self.device, Box::new(Nothing)))
    }
}
