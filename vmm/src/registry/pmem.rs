//! Persistent memory: the `pmem` section and `vm.add-pmem`.

use podvisor_api::types::{Isolation, PmemConfig, VmConfig};
use podvisor_devices::virtio::pmem::{self, Pmem, PmemOptions};

use super::{Addition, Kind, Means, RegistryError, Wanted, failed, last, retain};
use crate::sandbox::landlock::Grant;

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "pmem",
    make: pmems,
    ids: |config| config.pmem.iter_mut().flatten().map(|d| &mut d.id).collect(),
    syscalls: &[pmem::SYSCALLS],
    files: |config| {
        let file = |pmem: &PmemConfig| Grant::unless(pmem.discard_writes, &pmem.file);
        config.pmem().iter().map(file).collect()
    },
    take_out: |config, id| retain(&mut config.pmem, |d| d.id.as_deref() != Some(id)),
};

impl Addition for PmemConfig {
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        config.pmem.get_or_insert_default().push(self.clone());
        Ok(())
    }

    fn make(&self, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
        make_pmem("pmem", last(config.pmem())?, config, means)
    }
}

fn pmems(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, pmem)| make_pmem(&format!("pmem[{index}]"), pmem, config, means);
    config.pmem().iter().enumerate().map(make).collect()
}

fn make_pmem(section: &str, pmem: &PmemConfig, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
    let field = || format!("{section}.file {}", pmem.file.display());
    if config.isolation() != Isolation::None {
        return Err(failed(
            field(),
            "a confidential pod's pages are its own, and a file's cannot be: give it a disk",
        ));
    }
    let options = PmemOptions {
        path: pmem.file.clone(),
        size: pmem.size,
        discard_writes: pmem.discard_writes,
    };
    let device = Pmem::open(options, means.mapper).map_err(|e| failed(field(), e))?;
    Ok(Wanted {
        id: pmem.id.clone().unwrap_or_default(),
        kind: "pmem",
        segment: pmem.pci_segment,
        slot: None,
        device: Box::new(device),
    })
}
