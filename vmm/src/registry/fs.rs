//! File systems: the `fs` section and `vm.add-fs`.

use podvisor_api::types::{FsConfig, VmConfig};
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::fs::{self, Fs, FsOptions};
use podvisor_devices::virtio::vhost_user::{self, VhostUser, VhostUserFsOptions};

use super::{Addition, Kind, Means, RegistryError, Wanted, failed, last, retain};
use crate::sandbox::landlock::Grant;

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "fs",
    make: fs,
    ids: |config| config.fs.iter_mut().flatten().map(|d| &mut d.id).collect(),
    syscalls: &[fs::SYSCALLS, vhost_user::SYSCALLS],
    files: |config| {
        let directory = |fs: &FsConfig| Some(Grant::unless(fs.readonly, fs.shared_dir.clone()?));
        config.fs().iter().filter_map(directory).collect()
    },
    take_out: |config, id| retain(&mut config.fs, |d| d.id.as_deref() != Some(id)),
};

impl Addition for FsConfig {
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        config.fs.get_or_insert_default().push(self.clone());
        Ok(())
    }

    fn make(&self, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
        make_fs("fs", last(config.fs())?, means)
    }
}

fn fs(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, fs)| make_fs(&format!("fs[{index}]"), fs, means);
    config.fs().iter().enumerate().map(make).collect()
}

fn make_fs(section: &str, fs: &FsConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    let num_queues = u16::try_from(fs.num_queues).map_err(|e| failed(field("num_queues"), e))?;
    let device: Box<dyn VirtioDevice> = if let Some(kept) = means.kept(fs.id.as_deref()) {
        kept
    } else if let Some(socket) = &fs.socket {
        let options = VhostUserFsOptions {
            num_queues,
            queue_size: fs.queue_size,
            ..VhostUserFsOptions::new(fs.tag.clone(), socket.clone())
        };
        Box::new(VhostUser::fs(&options).map_err(|e| failed(field("socket"), e))?)
    } else {
        let dir = fs.shared_dir.clone().unwrap_or_default();
        let options = FsOptions {
            readonly: fs.readonly,
            num_queues,
            queue_size: fs.queue_size,
            ..FsOptions::new(fs.tag.clone(), dir.clone())
        };
        Box::new(Fs::new(options).map_err(|e| failed(format!("{} {}", field("shared_dir"), dir.display()), e))?)
    };
    Ok(Wanted {
        id: fs.id.clone().unwrap_or_default(),
        kind: "fs",
        segment: fs.pci_segment,
        slot: None,
        device,
    })
}
