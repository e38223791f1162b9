//! Disks: the `disks` section and `vm.add-disk`.

use podvisor_api::types::{DiskConfig, ImageType, LockGranularity, VmConfig};
use podvisor_devices::virtio::blk::{self, Blk, BlkOptions, LockRange};
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::vhost_user::{self, VhostUser, VhostUserBlkOptions};

use super::limits::limiter;
use super::{Addition, Kind, Means, RegistryError, Wanted, failed, image, last, retain};
use crate::sandbox::landlock::Grant;

/// The kind.
pub(super) const KIND: Kind = Kind {
    name: "disk",
    make: disks,
    ids: |config| config.disks.iter_mut().flatten().map(|d| &mut d.id).collect(),
    syscalls: &[blk::SYSCALLS, vhost_user::SYSCALLS],
    files: |config| {
        let disks = config.disks().iter();
        let image = |disk: &DiskConfig| Some(Grant::unless(disk.readonly, disk.path.clone()?));
        disks.filter_map(image).collect()
    },
    take_out: |config, id| retain(&mut config.disks, |d| d.id.as_deref() != Some(id)),
};

impl Addition for DiskConfig {
    fn put(&self, config: &mut VmConfig) -> Result<(), &'static str> {
        config.disks.get_or_insert_default().push(self.clone());
        Ok(())
    }

    fn make(&self, config: &VmConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
        make_disk("disk", last(config.disks())?, means)
    }
}

fn disks(config: &VmConfig, means: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let make = |(index, disk)| make_disk(&format!("disks[{index}]"), disk, means);
    config.disks().iter().enumerate().map(make).collect()
}

fn make_disk(section: &str, disk: &DiskConfig, means: &Means<'_>) -> Result<Wanted, RegistryError> {
    let device = match means.kept(disk.id.as_deref()) {
        Some(kept) => kept,
        None if disk.vhost_user => lent(section, disk)?,
        None => own(section, disk, means)?,
    };
    Ok(Wanted {
        id: disk.id.clone().unwrap_or_default(),
        kind: "disk",
        segment: disk.pci_segment,
        slot: disk.pci_device_id,
        device,
    })
}

fn num_queues(section: &str, disk: &DiskConfig) -> Result<u16, RegistryError> {
    u16::try_from(disk.num_queues).map_err(|e| failed(format!("{section}.num_queues"), e))
}

/// A disk whose image this process opens.
fn own(section: &str, disk: &DiskConfig, means: &Means<'_>) -> Result<Box<dyn VirtioDevice>, RegistryError> {
    let field = |name: &str| format!("{section}.{name}");
    let path = disk
        .path
        .clone()
        .ok_or_else(|| failed(field("path"), "a disk needs the path of a raw image or block device"))?;
    if disk.image_type == ImageType::Unknown
        && let Some(format) = image::format(&path)
    {
        let reason = format!(
            "it is a {format} image, and disks are raw; convert it (qemu-img convert -O raw), or give image_type Raw if \
             these bytes are the disk"
        );
        return Err(failed(format!("{} {}", field("path"), path.display()), reason));
    }
    let group = disk.rate_limit_group.as_ref();
    let limiter = match &disk.rate_limiter_config {
        Some(own) => limiter(own),
        None => group.and_then(|group| means.groups.get(group).cloned()),
    };
    let options = BlkOptions {
        readonly: disk.readonly,
        direct: disk.direct,
        serial: disk.serial.clone(),
        num_queues: num_queues(section, disk)?,
        queue_size: disk.queue_size,
        disable_io_uring: disk.disable_io_uring,
        sparse: disk.sparse,
        lock_range: match disk.lock_granularity {
            LockGranularity::ByteRange => LockRange::Bytes,
            LockGranularity::Full => LockRange::File,
        },
        limiter,
        ..BlkOptions::new(path.clone())
    };
    let device = Blk::open(options).map_err(|e| failed(format!("{} {}", field("path"), path.display()), e))?;
    Ok(Box::new(device))
}

/// A disk that another process serves: whether it is read-only, its serial number and its limits are that process's.
fn lent(section: &str, disk: &DiskConfig) -> Result<Box<dyn VirtioDevice>, RegistryError> {
    let options = VhostUserBlkOptions {
        num_queues: num_queues(section, disk)?,
        queue_size: disk.queue_size,
        ..VhostUserBlkOptions::new(disk.vhost_socket.clone().unwrap_or_default().into())
    };
    let device = VhostUser::blk(&options).map_err(|e| failed(format!("{section}.vhost_socket"), e))?;
    Ok(Box::new(device))
}
