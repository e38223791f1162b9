//! Which virtio devices a configuration asks for: one line a kind in [`KINDS`], one function from its section of the
//! configuration to devices. The machine puts them on PCI without knowing what they are.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use podvisor_api::types::{ConsoleMode, DiskConfig, FsConfig, NetConfig, VmConfig, VsockConfig};
use podvisor_devices::virtio::blk::{Blk, BlkOptions};
use podvisor_devices::virtio::console::{Console, ConsoleOutput};
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::fs::{Fs, FsOptions};
use podvisor_devices::virtio::net::{HostInterface, Net, NetOptions};
use podvisor_devices::virtio::rng::Rng;
use podvisor_devices::virtio::vsock::{Vsock, VsockOptions};

use crate::config::Descriptors;

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

type Make = fn(&VmConfig, &Descriptors) -> Result<Vec<Wanted>, RegistryError>;

/// All kinds, in the order of their PCI slots. A new device is a line here.
const KINDS: &[Make] = &[console, disks, nets, rng, fs, vsock];

/// Makes every device that `config` asks for. Identifiers must have been assigned ([`assign_ids`]).
///
/// # Errors
/// The first device that cannot be made; those made before are dropped.
pub fn devices(config: &VmConfig, descriptors: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let mut all = Vec::new();
    for make in KINDS {
        all.extend(make(config, descriptors)?);
    }
    Ok(all)
}

/// A device that is added to a pod: before its boot to the configuration, afterwards to the machine too.
#[derive(Clone, Debug)]
pub enum Addition {
    /// `vm.add-disk`.
    Disk(Box<DiskConfig>),
    /// `vm.add-fs`.
    Fs(Box<FsConfig>),
    /// `vm.add-vsock`.
    Vsock(Box<VsockConfig>),
    /// `vm.add-net`, with the descriptors of its TAP queues, if they came with the request.
    Net(Box<NetConfig>, Arc<Vec<OwnedFd>>),
}

impl Addition {
    /// Puts the section into `config`.
    ///
    /// # Errors
    /// When the pod can have only one such device and has it.
    pub fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        match self {
            Self::Disk(disk) => config.disks.get_or_insert_default().push(DiskConfig::clone(disk)),
            Self::Fs(fs) => config.fs.get_or_insert_default().push(FsConfig::clone(fs)),
            Self::Net(net, _) => config.net.get_or_insert_default().push(NetConfig::clone(net)),
            Self::Vsock(_) if config.vsock.is_some() => return Err("the pod has a vsock already; it can have one"),
            Self::Vsock(vsock) => config.vsock = Some(VsockConfig::clone(vsock)),
        }
        Ok(())
    }

    /// Makes the device as `config`, which it was put into last, has it: with its name.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(&self, config: &VmConfig) -> Result<Wanted, RegistryError> {
        let gone = || failed("the new device", "it is not in the configuration");
        match self {
            Self::Disk(_) => make_disk("disk", config.disks().last().ok_or_else(gone)?),
            Self::Fs(_) => make_fs("fs", config.fs().last().ok_or_else(gone)?),
            Self::Vsock(_) => make_vsock(config.vsock.as_ref().ok_or_else(gone)?),
            Self::Net(_, fds) => make_net("net", config.net().last().ok_or_else(gone)?, Some(fds)),
        }
    }

    /// The descriptors that came with it, and whose they are in `config`, which it was put into last.
    #[must_use]
    pub fn descriptors(&self, config: &VmConfig) -> Option<(String, Arc<Vec<OwnedFd>>)> {
        match self {
            Self::Net(_, fds) if !fds.is_empty() => Some((config.net().last()?.id.clone()?, Arc::clone(fds))),
            _ => None,
        }
    }

    /// The device of `config` that this is once more: a shim sends the network devices it has added before again, and
    /// knows them by their MAC address.
    #[must_use]
    pub fn known<'c>(&self, config: &'c VmConfig) -> Option<&'c str> {
        let Self::Net(net, _) = self else { return None };
        let mac = net.mac.as_deref()?;
        let same = |other: &&NetConfig| other.mac.as_deref().is_some_and(|m| m.eq_ignore_ascii_case(mac));
        config.net().iter().find(same)?.id.as_deref()
    }
}

/// Takes the device named `id` out of `config`; whether it was there.
pub fn take_out(config: &mut VmConfig, id: &str) -> bool {
    let named = |name: &Option<String>| name.as_deref() == Some(id);
    let before = config.disks().len() + config.fs().len() + config.net().len() + usize::from(config.vsock.is_some());
    config
        .disks
        .iter_mut()
        .for_each(|disks| disks.retain(|d| !named(&d.id)));
    config.fs.iter_mut().for_each(|fs| fs.retain(|f| !named(&f.id)));
    config.net.iter_mut().for_each(|nets| nets.retain(|n| !named(&n.id)));
    config.vsock.take_if(|vsock| named(&vsock.id));
    before != config.disks().len() + config.fs().len() + config.net().len() + usize::from(config.vsock.is_some())
}

/// Names the devices that have no name, as Cloud Hypervisor does (`_disk0`, `_fs1`, …).
pub fn assign_ids(config: &mut VmConfig) {
    let mut taken: Vec<String> = Vec::new();
    taken.extend(config.disks().iter().filter_map(|d| d.id.clone()));
    taken.extend(config.net().iter().filter_map(|d| d.id.clone()));
    taken.extend(config.fs().iter().filter_map(|d| d.id.clone()));
    taken.extend(config.vsock.iter().filter_map(|d| d.id.clone()));
    let mut next = 0u32;
    let mut name = |kind: &str| loop {
        let id = format!("_{kind}{next}");
        next = next.saturating_add(1);
        if !taken.contains(&id) {
            return id;
        }
    };
    for disk in config.disks.iter_mut().flatten() {
        disk.id.get_or_insert_with(|| name("disk"));
    }
    for net in config.net.iter_mut().flatten() {
        net.id.get_or_insert_with(|| name("net"));
    }
    for fs in config.fs.iter_mut().flatten() {
        fs.id.get_or_insert_with(|| name("fs"));
    }
    if let Some(vsock) = &mut config.vsock {
        vsock.id.get_or_insert_with(|| name("vsock"));
    }
}

fn disks(config: &VmConfig, _: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, disk)| make_disk(&format!("disks[{index}]"), disk);
    config.disks().iter().enumerate().map(make).collect()
}

fn make_disk(section: &str, disk: &DiskConfig) -> Result<Wanted, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    let path = disk
        .path
        .clone()
        .ok_or_else(|| failed(field("path"), "a disk needs the path of a raw image or block device"))?;
    let num_queues = u16::try_from(disk.num_queues).map_err(|e| failed(field("num_queues"), e))?;
    let options = BlkOptions {
        readonly: disk.readonly,
        direct: disk.direct,
        serial: disk.serial.clone(),
        num_queues,
        queue_size: disk.queue_size,
        disable_io_uring: disk.disable_io_uring,
        sparse: disk.sparse,
        ..BlkOptions::new(path.clone())
    };
    let device = Blk::open(options).map_err(|e| failed(format!("{} {}", field("path"), path.display()), e))?;
    Ok(Wanted {
        id: disk.id.clone().unwrap_or_default(),
        kind: "disk",
        segment: disk.pci_segment,
        slot: disk.pci_device_id,
        device: Box::new(device),
    })
}

fn nets(config: &VmConfig, descriptors: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, net): (usize, &NetConfig)| {
        let fds = net.id.as_ref().and_then(|id| descriptors.get(id));
        make_net(&format!("net[{index}]"), net, fds)
    };
    config.net().iter().enumerate().map(make).collect()
}

/// The six bytes of a MAC address.
fn mac(section: &str, field: &str, text: Option<&str>) -> Result<Option<[u8; 6]>, RegistryError> {
    let Some(text) = text else { return Ok(None) };
    let refuse = || {
        failed(
            format!("{section}.{field} {text:?}"),
            "not a MAC address such as 52:54:00:12:34:56",
        )
    };
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2))
        .collect::<Option<_>>()
        .ok_or_else(refuse)?;
    bytes.try_into().map(Some).map_err(|_| refuse())
}

/// A device on the TAP queues of `fds`, if there are any: those are left as they were set up; else on the interface that the
/// section names.
fn make_net(section: &str, net: &NetConfig, fds: Option<&Arc<Vec<OwnedFd>>>) -> Result<Wanted, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    if net.vhost_user {
        return Err(failed(
            field("vhost_user"),
            "vhost-user networks are not supported yet; give a TAP interface",
        ));
    }
    if net.rate_limiter_config.is_some() {
        return Err(failed(
            field("rate_limiter_config"),
            "limits are not supported yet; leave it out",
        ));
    }
    let fds = fds.filter(|fds| !fds.is_empty());
    let options = NetOptions {
        mac: mac(section, "mac", net.mac.as_deref())?,
        mtu: net.mtu.filter(|_| fds.is_none()),
        num_queues: u16::try_from(net.num_queues).map_err(|e| failed(field("num_queues"), e))?,
        queue_size: net.queue_size,
        offload_tso: net.offload_tso,
        offload_ufo: net.offload_ufo,
        offload_csum: net.offload_csum,
        ..NetOptions::default()
    };
    let device = if let Some(fds) = fds {
        let copies: io::Result<Vec<OwnedFd>> = fds.iter().map(OwnedFd::try_clone).collect();
        Net::from_fds(&options, copies.map_err(|e| failed(field("fds"), e))?)
    } else {
        let host = HostInterface {
            name: net.tap.clone(),
            mac: mac(section, "host_mac", net.host_mac.as_deref())?,
            address: Some((net.ip, net.mask)),
        };
        Net::open(&options, &host)
    };
    Ok(Wanted {
        id: net.id.clone().unwrap_or_default(),
        kind: "net",
        segment: net.pci_segment,
        slot: net.pci_device_id,
        device: Box::new(device.map_err(|e| failed(section, e))?),
    })
}

fn rng(config: &VmConfig, _: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let rng = &config.rng;
    let device = Rng::open(&rng.src).map_err(|e| failed(format!("rng.src {}", rng.src.display()), e))?;
    Ok(vec![Wanted {
        id: rng.id.clone().unwrap_or_else(|| "__rng".to_owned()),
        kind: "rng",
        segment: rng.pci_segment,
        slot: None,
        device: Box::new(device),
    }])
}

fn fs(config: &VmConfig, _: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, fs)| make_fs(&format!("fs[{index}]"), fs);
    config.fs().iter().enumerate().map(make).collect()
}

fn make_fs(section: &str, fs: &FsConfig) -> Result<Wanted, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    let dir = fs.shared_dir.clone().ok_or_else(|| {
        failed(
            field("socket"),
            "a vhost-user file system is not supported yet; give shared_dir, which this monitor serves itself",
        )
    })?;
    let options = FsOptions {
        readonly: fs.readonly,
        num_queues: u16::try_from(fs.num_queues).map_err(|e| failed(field("num_queues"), e))?,
        queue_size: fs.queue_size,
        ..FsOptions::new(fs.tag.clone(), dir.clone())
    };
    let device = Fs::new(options).map_err(|e| failed(format!("{} {}", field("shared_dir"), dir.display()), e))?;
    Ok(Wanted {
        id: fs.id.clone().unwrap_or_default(),
        kind: "fs",
        segment: fs.pci_segment,
        slot: None,
        device: Box::new(device),
    })
}

fn vsock(config: &VmConfig, _: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    config.vsock.iter().map(make_vsock).collect()
}

fn make_vsock(vsock: &VsockConfig) -> Result<Wanted, RegistryError> {
    let options = VsockOptions::new(u64::from(vsock.cid), vsock.socket.clone());
    let device = Vsock::new(options).map_err(|e| failed(format!("vsock.socket {}", vsock.socket.display()), e))?;
    Ok(Wanted {
        id: vsock.id.clone().unwrap_or_default(),
        kind: "vsock",
        segment: vsock.pci_segment,
        slot: None,
        device: Box::new(device),
    })
}

fn console(config: &VmConfig, _: &Descriptors) -> Result<Vec<Wanted>, RegistryError> {
    let console = &config.console;
    let fail = |e: io::Error| failed(format!("console.mode {:?}", console.mode), e);
    let (output, input) = match console.mode {
        ConsoleMode::Off => return Ok(Vec::new()),
        ConsoleMode::Null => (ConsoleOutput::Discard, None),
        ConsoleMode::Tty => {
            let input = (config.serial.mode != ConsoleMode::Tty)
                .then(stdin)
                .transpose()
                .map_err(fail)?;
            (ConsoleOutput::Fd(stdout().map_err(fail)?), input)
        }
        ConsoleMode::File => {
            let file = open_output(console.file.as_deref()).map_err(|e| failed("console.file", e))?;
            (ConsoleOutput::Fd(file.into()), None)
        }
        ConsoleMode::Pty | ConsoleMode::Socket => return Err(failed("console.mode", unsupported_mode())),
    };
    let device = Console::new(output, input, None).map_err(fail)?;
    Ok(vec![Wanted {
        id: console.id.clone().unwrap_or_else(|| "__console".to_owned()),
        kind: "console",
        segment: console.pci_segment,
        slot: None,
        device: Box::new(device),
    }])
}

/// Words for console modes that do not exist here.
pub(crate) fn unsupported_mode() -> &'static str {
    "Pty and Socket are not supported yet; use Off, Null, Tty or File"
}

/// A descriptor of the monitor's standard output.
pub(crate) fn stdout() -> io::Result<OwnedFd> {
    io::stdout().as_fd().try_clone_to_owned()
}

/// A descriptor of the monitor's standard input.
pub(crate) fn stdin() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}

/// Opens a console's output file, emptied.
pub(crate) fn open_output(path: Option<&std::path::Path>) -> io::Result<File> {
    let path = path.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "mode File needs a file"))?;
    File::create(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}
