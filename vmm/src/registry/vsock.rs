//! The vsock, of which a pod has one: the `vsock` section and `vm.add-vsock`.

use podvisor_api::types::{VmConfig, VsockConfig};
use podvisor_devices::virtio::vsock::{self, Vsock, VsockOptions};

use super::{Addition, Kind, Means, RegistryError, Wanted, failed, last};
use crate::sandbox::landlock::Grant;

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "vsock",
    make: vsock,
    ids: |config| config.vsock.iter_mut().map(|d| &mut d.id).collect(),
    syscalls: &[vsock::SYSCALLS],
    files: |config| {
        // Its socket is made and removed there, and those that the guest calls are beside it.
        config
            .vsock
            .iter()
            .map(|vsock| Grant::directory_of(&vsock.socket))
            .collect()
    },
    take_out: |config, id| drop(config.vsock.take_if(|d| d.id.as_deref() == Some(id))),
};

impl Addition for VsockConfig {
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        if config.vsock.is_some() {
            return Err("the pod has a vsock already; it can have one");
        }
        config.vsock = Some(self.clone());
        Ok(())
    }

    fn make(&self, config: &VmConfig, _: &Means<'_>) -> Result<Wanted, RegistryError> {
        make_vsock(last(config.vsock.as_slice())?)
    }
}

fn vsock(config: &VmConfig, _: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
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
