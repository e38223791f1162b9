//! The trait of anything that answers reads and writes at an address: port I/O, MMIO, configuration space.

/// A device on a bus. Offsets are relative to the range it was registered for.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`. What is not backed reads as all ones or zeros, never an error.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}
