//! The scratch disk, of which a pod has one: the `scratch` section. Its file is made with the pod and lives as long,
//! so that its directory is reached only then; each machine of the pod finds it empty.

use std::fs::File;
use std::sync::Arc;

use podvisor_api::types::VmConfig;
use podvisor_devices::virtio::blk::{self, Blk, BlkOptions, make_scratch};

use super::{Kind, Means, RegistryError, Wanted, failed};
use crate::config::Descriptors;

/// The kind. It is behind all others, so that it moves none of them to another slot.
pub(super) const KIND: Kind = Kind {
    name: "scratch",
    make: make_disk,
    ids: |config| config.scratch.iter_mut().map(|d| &mut d.id).collect(),
    syscalls: &[blk::SYSCALLS, &[libc::SYS_fstatfs, libc::SYS_unlink]],
    files: |_| Vec::new(),
    take_out: |config, id| {
        config.scratch.take_if(|d| d.id.as_deref() == Some(id));
    },
};

/// By what the pod knows it (virtio 1.2 5.2.6.1).
const SERIAL: &str = "podvisor-scratch";

/// Makes the file of the scratch disk of `config`, if that asks for one, and puts it with the pod's descriptors.
///
/// # Errors
/// When it cannot be there.
pub(crate) fn open(config: &VmConfig, descriptors: &mut Descriptors) -> Result<(), RegistryError> {
    let Some(scratch) = &config.scratch else {
        return Ok(());
    };
    let file = make_scratch(&scratch.dir, scratch.size).map_err(|e| failed("scratch", e))?;
    let id = scratch.id.clone().unwrap_or_default();
    descriptors.insert(id, Arc::new(vec![file.into()]));
    Ok(())
}

fn make_disk(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let Some(scratch) = &config.scratch else {
        return Ok(Vec::new());
    };
    let id = scratch.id.clone().unwrap_or_default();
    let missing = "a pod has it from vm.create on, and one that is restored has none: take it out of config.json";
    let made = means.descriptors.get(&id).and_then(|made| made.first());
    let file = made.ok_or_else(|| failed("scratch", missing))?.try_clone();
    let options = BlkOptions {
        serial: Some(SERIAL.to_owned()),
        ..BlkOptions::new(&scratch.dir)
    };
    let file = File::from(file.map_err(|e| failed("scratch", e))?);
    let device = Blk::scratch(options, file, scratch.size).map_err(|e| failed("scratch", e))?;
    Ok(vec![Wanted {
        id,
        kind: "scratch",
        segment: scratch.pci_segment,
        slot: None,
        device: Box::new(device),
    }])
}
