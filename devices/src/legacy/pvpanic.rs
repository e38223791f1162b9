//! pvpanic on PCI (QEMU `docs/specs/pvpanic.rst`): a guest kernel tells by one byte that it panicked. It tells; what
//! follows is the monitor's choice.

use std::sync::Arc;

use crate::pci::PciFunction;
use crate::pci::config::{ConfigError, ConfigSpace, Identity};

/// Bytes of the BAR: the register is its first byte.
const BAR_SIZE: u64 = 4096;
/// As QEMU and Cloud Hypervisor identify it.
const IDENTITY: Identity = Identity {
    vendor: 0x1B36,
    device: 0x0011,
    revision: 1,
    class: [0x08, 0x80, 0x00],
    subsystem_vendor: 0x1AF4,
    subsystem: 0x1100,
};
/// Event bits.
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// What a guest tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPanic {
    /// It panicked and is lost.
    Panicked,
    /// It panicked and handles it itself, with a crash kernel.
    CrashLoaded,
}

/// Hears of panics; called on a vCPU thread, so it only passes them on.
pub trait PanicSink: Send + Sync {
    /// The guest panicked. May be called any number of times.
    fn panicked(&self, event: GuestPanic);
}

/// The device.
pub struct PvPanic {
    id: String,
    config: ConfigSpace,
    sink: Arc<dyn PanicSink>,
    panics: u64,
    crashes: u64,
}

impl PvPanic {
    /// A device of the name `id` that tells `sink`.
    ///
    /// # Errors
    /// When the configuration space cannot be built.
    pub fn new(id: String, sink: Arc<dyn PanicSink>) -> Result<Self, ConfigError> {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_bar(0, BAR_SIZE, false)?;
        Ok(Self {
            id,
            config,
            sink,
            panics: 0,
            crashes: 0,
        })
    }
}

impl PciFunction for PvPanic {
    fn id(&self) -> &str {
        &self.id
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            // Which events are known.
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        let (0, Some(events)) = (offset, data.first()) else {
            return;
        };
        if events & PANICKED != 0 {
            self.panics = self.panics.saturating_add(1);
            self.sink.panicked(GuestPanic::Panicked);
        }
        if events & CRASH_LOADED != 0 {
            self.crashes = self.crashes.saturating_add(1);
            self.sink.panicked(GuestPanic::CrashLoaded);
        }
    }

    fn bar_mapped(&mut self, _bar: usize, _address: Option<u64>) {}

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("panics", self.panics), ("crashes", self.crashes)]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<GuestPanic>>);
    impl PanicSink for Heard {
        fn panicked(&self, event: GuestPanic) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn it_is_found_and_tells_what_it_hears() {
        let heard = Arc::new(Heard::default());
        let mut device = PvPanic::new("_pvpanic0".to_owned(), Arc::clone(&heard) as Arc<dyn PanicSink>).unwrap();
        let mut ids = [0; 4];
        device.read_config(0, &mut ids);
        assert_eq!(ids, [0x36, 0x1B, 0x11, 0x00]);
        assert_eq!(device.config().bar_size(0), Some(4096));
        let mut events = [0xEE; 2];
        device.read_bar(0, 0, &mut events);
        assert_eq!(events, [3, 0]);
        device.read_bar(0, 1, &mut events);
        assert_eq!(events, [0, 0]);
        device.write_bar(0, 0, &[0x40]);
        device.write_bar(0, 1, &[1]);
        device.write_bar(0, 0, &[]);
        assert!(heard.0.lock().unwrap().is_empty());
        device.write_bar(0, 0, &[2, 1]);
        device.write_bar(0, 0, &[1]);
        assert_eq!(
            *heard.0.lock().unwrap(),
            [GuestPanic::CrashLoaded, GuestPanic::Panicked]
        );
        assert_eq!(device.counters(), [("panics", 1), ("crashes", 1)]);
    }
}
