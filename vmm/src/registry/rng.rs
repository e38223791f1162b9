//! The entropy device, which every pod has: the `rng` section.

use podvisor_api::types::VmConfig;
use podvisor_devices::virtio::rng::Rng;

use super::{Kind, Means, RegistryError, Wanted, failed};
use crate::sandbox::landlock::Grant;

/// The kind. Its name is fixed: nobody adds or removes it.
pub(super) const KIND: Kind = Kind {
    name: "rng",
    make: rng,
    ids: |_| Vec::new(),
    syscalls: &[],
    files: |config| vec![Grant::read(&config.rng.src)],
    take_out: |_, _| {},
};

fn rng(config: &VmConfig, _: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
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
