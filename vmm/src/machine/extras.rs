//! The small devices that a configuration turns on by one word: the watchdog and pvpanic.

use std::sync::{Arc, Mutex, PoisonError};

use podvisor_api::events::{Source, What};
use podvisor_api::types::VmConfig;
use podvisor_devices::legacy::{GuestPanic, PanicSink, PvPanic};
use podvisor_devices::pci::{Bdf, PciFunction};
use podvisor_devices::virtio::watchdog::WatchdogHandle;

use super::{BootError, During, Outside};
use crate::chipset::{self, Chipset};
use crate::registry::{Wanted, fixed};
use crate::telling::Telling;

/// pvpanic's name, Cloud Hypervisor's.
pub(super) const PVPANIC: &str = "__pvpanic";

/// Command, status and BARs: what a guest may have set of pvpanic.
const SETTINGS: std::ops::Range<u16> = 0x04..0x28;

/// Those of one machine.
#[derive(Default)]
pub(super) struct Extras {
    watchdog: Option<WatchdogHandle>,
    pvpanic: Option<(Bdf, Arc<Mutex<PvPanic>>)>,
}

/// Tells of panics as Cloud Hypervisor does.
struct Tells(Telling);

impl PanicSink for Tells {
    fn panicked(&self, event: GuestPanic) {
        let name = match event {
            GuestPanic::Panicked => "panic",
            GuestPanic::CrashLoaded => "crash_loaded",
        };
        tracing::warn!(event = name, "the guest's kernel panicked");
        self.0.tell(Source::Guest, What::Panic, &[("event", name)]);
    }
}

impl Extras {
    /// Those that `config` turns on; the watchdog is put behind the devices in `wanted`.
    pub(super) fn new(config: &VmConfig, outside: Outside<'_>, wanted: &mut Vec<Wanted>) -> Result<Self, BootError> {
        let mut this = Self::default();
        if config.watchdog {
            let (device, handle) = fixed::watchdog(chipset::ends(outside.exit)).during("devices")?;
            wanted.push(device);
            this.watchdog = Some(handle);
        }
        Ok(this)
    }

    /// Puts pvpanic into the next free slot.
    pub(super) fn add_pvpanic(&mut self, chipset: &Chipset, telling: &Telling) -> Result<(), BootError> {
        let root = chipset
            .segments
            .first()
            .ok_or_else(|| BootError::new("no PCI segment"))?;
        let sink = Arc::new(Tells(telling.clone()));
        let device = PvPanic::new(PVPANIC.to_owned(), sink).during("pvpanic")?;
        let device = Arc::new(Mutex::new(device));
        let bdf = root.add(Arc::clone(&device) as _, None).during("pvpanic")?;
        self.pvpanic = Some((bdf, device));
        Ok(())
    }

    /// The pod is paused, or goes on.
    pub(super) fn set_paused(&self, paused: bool) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.set_paused(paused);
        }
    }

    /// Where pvpanic is, if there is one.
    pub(super) fn pvpanic(&self) -> Option<Bdf> {
        self.pvpanic.as_ref().map(|(bdf, _)| *bdf)
    }

    /// What the guest may have set in pvpanic's configuration space, for a snapshot.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        let (_, device) = self.pvpanic.as_ref()?;
        let mut data = vec![0; SETTINGS.len()];
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.config().read(SETTINGS.start, &mut data);
        Some(data)
    }

    /// Takes over what [`Extras::save`] gave.
    pub(super) fn restore(&self, chipset: &Chipset, pvpanic: Option<&[u8]>) -> Result<(), BootError> {
        match (&self.pvpanic, pvpanic, chipset.segments.first()) {
            (Some((bdf, _)), Some(settings), Some(root)) => {
                root.write_config(bdf.slot, 0, SETTINGS.start, settings);
                Ok(())
            }
            (None, None, _) => Ok(()),
            _ => Err(BootError::new(
                "config.json and state.json differ on pvpanic: it cannot be edited",
            )),
        }
    }
}
