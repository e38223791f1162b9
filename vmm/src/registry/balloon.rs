//! The balloon, of which a pod has one: the `balloon` section. It is there from the boot on; its size changes by
//! `vm.resize`.

use podvisor_api::types::{Isolation, VmConfig};
use podvisor_devices::virtio::balloon::{self, Balloon, BalloonOptions};

use super::{Kind, Means, RegistryError, Wanted, failed};

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "balloon",
    make: make_balloon,
    ids: |config| config.balloon.iter_mut().map(|d| &mut d.id).collect(),
    syscalls: &[balloon::SYSCALLS],
    files: |_| Vec::new(),
    take_out: |_, _| {},
};

fn make_balloon(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let Some(balloon) = &config.balloon else {
        return Ok(Vec::new());
    };
    if config.isolation() != Isolation::None {
        return Err(failed(
            "balloon",
            "a confidential pod's pages cannot be taken from it: leave the balloon out",
        ));
    }
    let options = BalloonOptions {
        size: balloon.size,
        deflate_on_oom: balloon.deflate_on_oom,
        free_page_reporting: balloon.free_page_reporting,
    };
    let device = Balloon::new(options, means.ram.reclaim(means.grown.to_vec())).map_err(|e| failed("balloon", e))?;
    // A machine has one for its life, so that this is the first.
    let _ = means.balloon.set(device.handle());
    Ok(vec![Wanted {
        id: balloon.id.clone().unwrap_or_default(),
        kind: "balloon",
        segment: balloon.pci_segment,
        slot: None,
        device: Box::new(device),
    }])
}
