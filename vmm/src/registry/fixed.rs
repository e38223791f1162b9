//! The devices that every pod has once or not at all, and nobody adds or removes: the virtio console and the watchdog. They
//! are connected to the monitor, so the machine asks for them by name.

use std::sync::Arc;

use podvisor_api::types::VmConfig;
use podvisor_devices::host_console::SharedHostConsole;
use podvisor_devices::legacy::ExitSink;
use podvisor_devices::virtio::console::{self, Console};
use podvisor_devices::virtio::watchdog::{self, TIMEOUT, Watchdog, WatchdogHandle};

use super::{RegistryError, Wanted, failed};

/// The system calls that they make beyond the monitor's own.
pub(super) const SYSCALLS: &[&[i64]] = &[console::SYSCALLS, watchdog::SYSCALLS];

/// The virtio console of `config` on `host`; its slot is the first.
///
/// # Errors
/// When there are no descriptors left.
pub(crate) fn console(config: &VmConfig, host: &SharedHostConsole) -> Result<Wanted, RegistryError> {
    let console = &config.console;
    let device = Console::new(Arc::clone(host)).map_err(|e| failed("console", e))?;
    Ok(Wanted {
        id: console.id.clone().unwrap_or_else(|| "__console".to_owned()),
        kind: "console",
        segment: console.pci_segment,
        slot: None,
        device: Box::new(device),
    })
}

/// The watchdog, which asks `sink` for a reset, and the monitor's side of it. Its slot is behind all others.
///
/// # Errors
/// When there are no descriptors left.
pub(crate) fn watchdog(sink: Arc<dyn ExitSink>) -> Result<(Wanted, WatchdogHandle), RegistryError> {
    let device = Watchdog::new(TIMEOUT, sink).map_err(|e| failed("watchdog", e))?;
    let handle = device.handle();
    let wanted = Wanted {
        id: "__watchdog".to_owned(),
        kind: "watchdog",
        segment: 0,
        slot: None,
        device: Box::new(device),
    };
    Ok((wanted, handle))
}
