//! Port 0x80: firmware and kernels write progress codes to it, and delay by writing to it.

use crate::bus::BusDevice;

/// Swallows writes; reads are all ones, as without a device.
#[derive(Debug, Default)]
pub struct DebugPort;

impl BusDevice for DebugPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        tracing::trace!(code = ?data, "debug port");
    }
}
