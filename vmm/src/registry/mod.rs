//! Which virtio devices a configuration asks for: one file a kind, with its section of the configuration, and one line in
//! [`KINDS`]. The machine puts them on PCI without knowing what they are.

mod balloon;
mod disk;
pub(crate) mod fixed;
mod fs;
mod image;
mod limits;
mod net;
mod pmem;
mod rng;
pub(crate) mod scratch;
mod vsock;

use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use podvisor_api::types::VmConfig;
use podvisor_devices::platform::FileMapper;
use podvisor_devices::virtio::balloon::BalloonHandle;
use podvisor_devices::virtio::device::VirtioDevice;

pub use self::limits::Groups;
pub(crate) use self::limits::groups;
pub use self::net::AddedNet;
use crate::config::Descriptors;
use crate::memory::GuestRam;
use crate::memory::hotplug::HotplugArea;
use crate::sandbox::landlock::Grant;

/// A device that the configuration asks for.
pub struct Wanted {
    /// Its name in the API.
    pub id: String,
    /// Its kind: the name in [`KINDS`].
    pub kind: &'static str,
    /// PCI segment.
    pub segment: u16,
    /// PCI slot, if one was asked for.
    pub slot: Option<u8>,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
}

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("{field}")]
pub struct RegistryError {
    /// The configuration field, with its value where that helps.
    pub field: String,
    /// Why.
    pub source: Box<dyn Error + Send + Sync>,
}

fn failed(field: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> RegistryError {
    RegistryError {
        field: field.into(),
        source: source.into(),
    }
}

/// Devices of a machine that is gone, for the next one, by their names.
pub type Kept = Mutex<BTreeMap<String, Box<dyn VirtioDevice>>>;

/// What devices are made of, beside their configuration.
#[derive(Clone, Copy)]
pub struct Means<'m> {
    /// Descriptors that came with requests.
    pub descriptors: &'m Descriptors,
    /// The buckets of the rate limit groups.
    pub groups: &'m Groups,
    /// Places files in the pod's address space.
    pub mapper: &'m dyn FileMapper,
    /// The pod's RAM.
    pub ram: &'m GuestRam,
    /// Room for what it is given later.
    pub grown: &'m [Arc<HotplugArea>],
    /// Where a balloon leaves the monitor's side of it.
    pub balloon: &'m OnceLock<BalloonHandle>,
    /// What a reboot kept.
    pub kept: &'m Kept,
}

impl Means<'_> {
    /// The device named `id` of the machine before a reboot, if it outlived that.
    fn kept(&self, id: Option<&str>) -> Option<Box<dyn VirtioDevice>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(id?)
    }
}

/// A kind of device, as its section of the configuration has it.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its name; devices without one are named after it (`_disk0`).
    pub name: &'static str,
    /// Makes all devices of the section.
    pub make: fn(&VmConfig, &Means<'_>) -> Result<Vec<Wanted>, RegistryError>,
    /// The names of the section's devices, where they can be given or assigned.
    pub ids: fn(&mut VmConfig) -> Vec<&mut Option<String>>,
    /// The system calls that its devices make beyond the monitor's own, one list a way of making them.
    pub syscalls: &'static [&'static [i64]],
    /// The files that its devices open, while they are made or later, for Landlock.
    pub files: fn(&VmConfig) -> Vec<Grant>,
    /// Takes the device of that name out of the section, if it is there.
    pub take_out: fn(&mut VmConfig, &str),
}

/// All kinds, in the order of their PCI slots, behind the console. A new device is a line here.
const KINDS: &[Kind] = &[
    disk::KIND,
    net::KIND,
    rng::KIND,
    fs::KIND,
    pmem::KIND,
    vsock::KIND,
    balloon::KIND,
    scratch::KIND,
];

/// Makes every device that `config` asks for. Identifiers must have been assigned ([`assign_ids`]).
///
/// # Errors
/// The first device that cannot be made; those made before are dropped.
pub fn devices(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let mut all = Vec::new();
    for kind in KINDS {
        all.extend((kind.make)(config, means)?);
    }
    Ok(all)
}

/// The system calls that the devices of all kinds make: any of them may be plugged in later.
pub fn syscalls() -> impl Iterator<Item = i64> {
    let lists = KINDS.iter().flat_map(|kind| kind.syscalls).chain(fixed::SYSCALLS);
    lists.copied().flatten().copied()
}

/// The files that the devices of `config` open.
#[must_use]
pub fn files(config: &VmConfig) -> Vec<Grant> {
    KINDS.iter().flat_map(|kind| (kind.files)(config)).collect()
}

/// A device that is added to a pod: before its boot to the configuration, afterwards to the machine too.
pub trait Addition {
    /// Puts its section into `config`.
    ///
    /// # Errors
    /// When the pod can have only one such device and has it.
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str>;

    /// Makes the device as `config`, which it was put into last, has it: with its name.
    ///
    /// # Errors
    /// When it cannot be made.
    fn make(&self, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError>;

    /// The descriptors that came with it, and whose they are in `config`, which it was put into last.
    fn descriptors(&self, _config: &VmConfig) -> Option<(String, Arc<Vec<OwnedFd>>)> {
        None
    }

    /// The device of `config` that this is once more.
    fn known<'c>(&self, _config: &'c VmConfig) -> Option<&'c str> {
        None
    }
}

/// The section that was put in last.
fn last<T>(list: &[T]) -> Result<&T, RegistryError> {
    list.last()
        .ok_or_else(|| failed("the new device", "it is not in the configuration"))
}

/// Leaves of a section what is to be kept.
fn retain<T>(section: &mut Option<Vec<T>>, keep: impl Fn(&T) -> bool) {
    section.iter_mut().for_each(|list| list.retain(&keep));
}

/// Takes the device named `id` out of `config`; whether it was there.
pub fn take_out(config: &mut VmConfig, id: &str) -> bool {
    let count = |config: &mut VmConfig| KINDS.iter().map(|kind| (kind.ids)(config).len()).sum::<usize>();
    let before = count(config);
    for kind in KINDS {
        (kind.take_out)(config, id);
    }
    before != count(config)
}

/// Whether the device named `id` is there for the pod's life, as Cloud Hypervisor has it: entropy source, console, balloon.
#[must_use]
pub fn stays(config: &VmConfig, id: &str) -> bool {
    let balloon = config.balloon.as_ref().and_then(|balloon| balloon.id.as_deref());
    let own = [config.rng.id.as_deref(), config.console.id.as_deref(), balloon];
    id.starts_with("__") || own.contains(&Some(id))
}

/// Names the devices that have no name, as Cloud Hypervisor does (`_disk0`, `_fs1`, …).
pub fn assign_ids(config: &mut VmConfig) {
    let mut taken: Vec<String> = Vec::new();
    for kind in KINDS {
        taken.extend((kind.ids)(config).into_iter().filter_map(|id| id.clone()));
    }
    let mut next = 0u32;
    let mut name = |kind: &str| loop {
        let id = format!("_{kind}{next}");
        next = next.saturating_add(1);
        if !taken.contains(&id) {
            return id;
        }
    };
    for kind in KINDS {
        for id in (kind.ids)(config) {
            id.get_or_insert_with(|| name(kind.name));
        }
    }
}
