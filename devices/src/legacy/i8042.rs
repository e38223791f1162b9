//! What is left of the keyboard controller: ports 0x61 to 0x64, of which a kernel needs the reset command
//! (`reboot=k`) and the port-61 refresh bit.

use std::sync::Arc;

use super::{ExitReason, ExitSink};
use crate::bus::BusDevice;

/// Ports from 0x61.
pub const I8042_SIZE: u64 = 4;
/// Port 0x61, from the base.
const PORT_B: u64 = 0;
/// Port 0x64, from the base.
const COMMAND: u64 = 3;
/// Refresh-cycle and timer-2 output bits that old calibration loops wait for.
const PORT_B_VALUE: u8 = 0x20;
/// Command: pulse the reset line.
const RESET: u8 = 0xFE;

/// The controller.
pub struct I8042 {
    sink: Arc<dyn ExitSink>,
}

impl I8042 {
    /// A controller that tells `sink` of a reset.
    #[must_use]
    pub fn new(sink: Arc<dyn ExitSink>) -> Self {
        Self { sink }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (PORT_B, [first, ..]) = (offset, data) {
            *first = PORT_B_VALUE;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (COMMAND, [RESET]) = (offset, data) {
            self.sink.exit(ExitReason::Reset);
        }
    }
}
