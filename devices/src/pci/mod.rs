//! PCI: one root bus a segment, type-0 functions with 64-bit memory BARs and MSI-X. No bridges, no I/O BARs, no INTx.

pub mod config;
pub mod msix;
pub mod root;

pub use config::ConfigSpace;
pub use root::{Bdf, PciError, PciRoot, Window};

/// A PCI function as the root sees it. All calls come with the function's lock held.
pub trait PciFunction: Send {
    /// The name the monitor gave it (`_disk0`).
    fn id(&self) -> &str;
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;
    /// Its configuration space, for the root to place BARs in.
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// The guest reads configuration space at `offset`. Overridden by functions with registers that act.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    /// The guest writes configuration space at `offset`.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }
    /// The guest reads memory of `bar`.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// The guest writes memory of `bar`.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);
    /// `bar` now answers at `address`, or nowhere.
    fn bar_mapped(&mut self, bar: usize, address: Option<u64>);
    /// The function was taken off its slot: stop all activity.
    fn detach(&mut self) {}
    /// Counters, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
