//! Network devices: the `net` section and `vm.add-net`, whose descriptors come beside the request.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use podvisor_api::ConfigError;
use podvisor_api::types::{NetConfig, VhostMode, VmConfig};
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::net::{self, HostInterface, Net, NetOptions};
use podvisor_devices::virtio::vhost_user::{self, VhostUser, VhostUserNetOptions};

use super::limits::limiter;
use super::{Addition, Kind, Means, RegistryError, Wanted, failed, last, retain};

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "net",
    make: nets,
    ids: |config| config.net.iter_mut().flatten().map(|d| &mut d.id).collect(),
    syscalls: &[net::SYSCALLS, vhost_user::SYSCALLS],
    files: |_| Vec::new(),
    take_out: |config, id| retain(&mut config.net, |d| d.id.as_deref() != Some(id)),
};

/// A network device that is added, with the descriptors of its TAP queues, if they came with the request.
#[derive(Debug)]
pub struct AddedNet {
    /// Its section.
    pub config: NetConfig,
    /// The descriptors.
    pub fds: Arc<Vec<OwnedFd>>,
}

impl AddedNet {
    /// Checks that there is a descriptor for each pair of queues, if there are any.
    ///
    /// # Errors
    /// With both numbers.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (queues, fds) = (self.config.num_queues, self.fds.len());
        if fds == 0 || fds.checked_mul(2) == Some(queues) {
            return Ok(());
        }
        Err(ConfigError {
            field: "net.num_queues".to_owned(),
            reason: format!("{queues} queues and {fds} descriptors came; send one descriptor for each two queues"),
            conflict: false,
        })
    }
}

impl Addition for AddedNet {
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        config.net.get_or_insert_default().push(self.config.clone());
        Ok(())
    }

    fn make(&self, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
        make_net("net", last(config.net())?, Some(&self.fds), means)
    }

    fn descriptors(&self, config: &VmConfig) -> Option<(String, Arc<Vec<OwnedFd>>)> {
        let id = config.net().last()?.id.clone()?;
        (!self.fds.is_empty()).then(|| (id, Arc::clone(&self.fds)))
    }

    /// A shim sends the network devices that it has added before again, and knows them by their MAC address.
    fn known<'c>(&self, config: &'c VmConfig) -> Option<&'c str> {
        let mac = self.config.mac.as_deref()?;
        let same = |other: &&NetConfig| other.mac.as_deref().is_some_and(|m| m.eq_ignore_ascii_case(mac));
        config.net().iter().find(same)?.id.as_deref()
    }
}

fn nets(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, net): (usize, &NetConfig)| {
        let fds = net.id.as_ref().and_then(|id| means.descriptors.get(id));
        make_net(&format!("net[{index}]"), net, fds, means)
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

/// The device of a section, with the descriptors of its TAP queues if there are any.
fn make_net(
    section: &str,
    net: &NetConfig,
    fds: Option<&Arc<Vec<OwnedFd>>>,
    means: &Means<'_>,
) -> Result<Wanted, RegistryError> {
    let fds = fds.filter(|fds| !fds.is_empty());
    let device = match means.kept(net.id.as_deref()) {
        Some(kept) => kept,
        None if net.vhost_user => lent(section, net)?,
        None => own(section, net, fds)?,
    };
    Ok(Wanted {
        id: net.id.clone().unwrap_or_default(),
        kind: "net",
        segment: net.pci_segment,
        slot: net.pci_device_id,
        device,
    })
}

fn num_queues(section: &str, net: &NetConfig) -> Result<u16, RegistryError> {
    u16::try_from(net.num_queues).map_err(|e| failed(format!("{section}.num_queues"), e))
}

/// A network that another process serves; its limits are that process's.
fn lent(section: &str, net: &NetConfig) -> Result<Box<dyn VirtioDevice>, RegistryError> {
    let options = VhostUserNetOptions {
        server: net.vhost_mode == VhostMode::Server,
        mac: mac(section, "mac", net.mac.as_deref())?,
        mtu: net.mtu,
        num_queues: num_queues(section, net)?,
        queue_size: net.queue_size,
        offload_tso: net.offload_tso,
        offload_ufo: net.offload_ufo,
        offload_csum: net.offload_csum,
        ..VhostUserNetOptions::new(net.vhost_socket.clone().unwrap_or_default().into())
    };
    let device = VhostUser::net(&options).map_err(|e| failed(format!("{section}.vhost_socket"), e))?;
    Ok(Box::new(device))
}

/// A device on the TAP queues of `fds`, which are left as they were set up, or on the interface that the section names.
fn own(
    section: &str,
    net: &NetConfig,
    fds: Option<&Arc<Vec<OwnedFd>>>,
) -> Result<Box<dyn VirtioDevice>, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    let options = NetOptions {
        mac: mac(section, "mac", net.mac.as_deref())?,
        mtu: net.mtu.filter(|_| fds.is_none()),
        num_queues: num_queues(section, net)?,
        queue_size: net.queue_size,
        offload_tso: net.offload_tso,
        offload_ufo: net.offload_ufo,
        offload_csum: net.offload_csum,
        // Each direction has the whole limit, as in Cloud Hypervisor.
        rx_limiter: net.rate_limiter_config.as_ref().and_then(limiter),
        tx_limiter: net.rate_limiter_config.as_ref().and_then(limiter),
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
    Ok(Box::new(device.map_err(|e| failed(section, e))?))
}
