//! The rules of one device each, alone or in a configuration. What holds between devices is in `names`.

use std::path::Path;

use super::names::identifier;
use super::{ConfigError, Findings, MAX_QUEUE_SIZE, first, vhost_user};
use crate::types::{
    ConsoleMode, DiskConfig, FsConfig, NetConfig, RateLimiterConfig, ScratchConfig, VmConfig, VsockConfig,
};

/// Most queues of one device.
const MAX_QUEUES: usize = 256;
/// Bytes of a UNIX socket path without the closing zero (`sockaddr_un`).
const MAX_SOCKET_PATH: usize = 107;

impl DiskConfig {
    /// Checks one disk (`vm.add-disk`).
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        single(self.id.as_deref(), |found| check_disk(self, "disk", found))
    }
}

impl NetConfig {
    /// Checks one network device (`vm.add-net`).
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        single(self.id.as_deref(), |found| check_net(self, "net", found))
    }
}

impl FsConfig {
    /// Checks one shared file system (`vm.add-fs`).
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        single(self.id.as_deref(), |found| check_fs(self, "fs", found))
    }
}

impl VsockConfig {
    /// Checks one socket device (`vm.add-vsock`).
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        single(self.id.as_deref(), |found| check_vsock(self, "vsock", found))
    }
}

fn single(id: Option<&str>, check: impl FnOnce(&mut Findings)) -> Result<(), ConfigError> {
    let mut found = Findings(Vec::new());
    check(&mut found);
    if let Some(id) = id {
        identifier("id", id, &mut found);
    }
    first(found.0)
}

fn queues(field: &str, num: usize, size: u16, found: &mut Findings) {
    if num == 0 || num > MAX_QUEUES {
        found.add(
            format!("{field}.num_queues"),
            format!("{num} queues cannot be; give 1 to {MAX_QUEUES}"),
        );
    }
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        let reason = format!("{size} is no queue size; give a power of two from 1 to {MAX_QUEUE_SIZE}");
        found.add(format!("{field}.queue_size"), reason);
    }
}

fn rate_limits(field: &str, limiter: Option<&RateLimiterConfig>, found: &mut Findings) {
    let Some(limiter) = limiter else { return };
    for (name, bucket) in [("bandwidth", &limiter.bandwidth), ("ops", &limiter.ops)] {
        if let Some(bucket) = bucket
            && (bucket.size == 0) != (bucket.refill_time == 0)
        {
            let reason = format!(
                "size {} and refill_time {} ms make no limit; give both above 0, or leave the bucket out",
                bucket.size, bucket.refill_time
            );
            found.add(format!("{field}.rate_limiter_config.{name}"), reason);
        }
    }
}

/// Rate limit groups have names of their own, and those that disks name exist.
pub(super) fn rate_limit_groups(config: &VmConfig, found: &mut Findings) {
    let groups = config.rate_limit_groups();
    for (at, group) in groups.iter().enumerate() {
        let field = format!("rate_limit_groups[{at}]");
        if group.id.is_empty() || groups.iter().take(at).any(|other| other.id == group.id) {
            let reason = format!(
                "`{}` is empty or given twice; give each group a name of its own",
                group.id
            );
            found.add(format!("{field}.id"), reason);
        }
        rate_limits(&field, Some(&group.rate_limiter_config), found);
    }
    for (at, disk) in config.disks().iter().enumerate() {
        if let Some(id) = &disk.rate_limit_group
            && !groups.iter().any(|group| group.id == *id)
        {
            let reason = format!("there is no group `{id}`; add it to rate_limit_groups");
            found.add(format!("disks[{at}].rate_limit_group"), reason);
        }
    }
}

pub(super) fn check_disk(disk: &DiskConfig, field: &str, found: &mut Findings) {
    queues(field, disk.num_queues, disk.queue_size, found);
    if disk.vhost_user {
        if disk.path.is_some() {
            found.add(
                format!("{field}.path"),
                "is given beside vhost_user, whose server has the image; give one of the two",
            );
        }
    } else if disk.path.as_ref().is_none_or(|path| path.as_os_str().is_empty()) {
        found.add(format!("{field}.path"), "is missing; give the image or block device");
    }
    vhost_user::socket(field, disk.vhost_user, disk.vhost_socket.as_deref(), found);
    if let Some(serial) = &disk.serial
        && serial.len() > 20
    {
        let reason = format!("`{serial}` is longer than the 20 bytes that virtio has for it; shorten it");
        found.add(format!("{field}.serial"), reason);
    }
    for (at, entry) in disk.queue_affinity.iter().flatten().enumerate() {
        if usize::from(entry.queue_index) >= disk.num_queues {
            let reason = format!(
                "there is no queue {}; num_queues is {}",
                entry.queue_index, disk.num_queues
            );
            found.add(format!("{field}.queue_affinity[{at}].queue_index"), reason);
        }
    }
    rate_limits(field, disk.rate_limiter_config.as_ref(), found);
    if disk.rate_limiter_config.is_some() && disk.rate_limit_group.is_some() {
        found.add(
            format!("{field}.rate_limit_group"),
            "is given beside rate_limiter_config; give one of the two",
        );
    }
}

/// What a scratch disk's size is a multiple of, its block.
const SCRATCH_BLOCK: u64 = 4096;

pub(super) fn check_scratch(scratch: &ScratchConfig, found: &mut Findings) {
    let size = scratch.size;
    if size == 0 || !size.is_multiple_of(SCRATCH_BLOCK) || i64::try_from(size).is_err() {
        let reason =
            format!("{size} bytes are no scratch disk; give a multiple of {SCRATCH_BLOCK}, above 0 and below 8E");
        found.add("scratch.size", reason);
    }
    if !scratch.dir.is_absolute() {
        let reason = format!(
            "`{}` is not an absolute path; give a directory of the host, or leave it out for /var/tmp",
            scratch.dir.display()
        );
        found.add("scratch.dir", reason);
    }
}

pub(super) fn check_net(net: &NetConfig, field: &str, found: &mut Findings) {
    queues(field, net.num_queues, net.queue_size, found);
    if !net.num_queues.is_multiple_of(2) {
        let reason = format!(
            "{} is odd; give one receive and one transmit queue for each pair",
            net.num_queues
        );
        found.add(format!("{field}.num_queues"), reason);
    }
    for (name, mac) in [("mac", &net.mac), ("host_mac", &net.host_mac)] {
        if let Some(mac) = mac
            && !is_mac(mac)
        {
            found.add(
                format!("{field}.{name}"),
                format!("`{mac}` is no MAC address; give six bytes as 02:00:00:00:00:01"),
            );
        }
    }
    if let Some(mtu) = net.mtu
        && mtu < 1280
    {
        found.add(
            format!("{field}.mtu"),
            format!("{mtu} is below 1280, the least of IPv6 and of virtio-net; give more"),
        );
    }
    vhost_user::socket(field, net.vhost_user, net.vhost_socket.as_deref(), found);
    rate_limits(field, net.rate_limiter_config.as_ref(), found);
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    bytes.len() == 6
        && bytes
            .iter()
            .all(|b| b.len() == 2 && b.bytes().all(|c| c.is_ascii_hexdigit()))
}

pub(super) fn check_fs(fs: &FsConfig, field: &str, found: &mut Findings) {
    queues(field, fs.num_queues, fs.queue_size, found);
    if !(1..=36).contains(&fs.tag.len()) {
        let shown: String = fs.tag.chars().take(80).collect();
        found.add(
            format!("{field}.tag"),
            format!("`{shown}` has {} bytes; give 1 to 36", fs.tag.len()),
        );
    }
    match (&fs.socket, &fs.shared_dir) {
        (Some(_), Some(_)) => {
            found.add(
                format!("{field}.shared_dir"),
                "is given beside socket; give one: socket for a virtiofsd, shared_dir to have podvisor serve it",
            );
        }
        (None, None) => {
            found.add(format!("{field}.socket"), "is missing, and so is shared_dir; give one: socket for a virtiofsd, shared_dir to have podvisor serve it");
        }
        (Some(socket), None) => {
            socket_path(&format!("{field}.socket"), socket, found);
            if fs.readonly {
                found.add(
                    format!("{field}.readonly"),
                    "has no meaning with socket: tell the virtiofsd behind it; leave it out",
                );
            }
        }
        (None, Some(dir)) if dir.as_os_str().is_empty() => {
            found.add(format!("{field}.shared_dir"), "is empty; give a directory");
        }
        (None, Some(_)) => {}
    }
}

pub(super) fn check_vsock(vsock: &VsockConfig, field: &str, found: &mut Findings) {
    if vsock.cid < 3 || vsock.cid == u32::MAX {
        let reason = format!("{} is reserved (virtio 1.2, 5.10.4); give 3 to 4294967294", vsock.cid);
        found.add(format!("{field}.cid"), reason);
    }
    socket_path(&format!("{field}.socket"), &vsock.socket, found);
}

pub(super) fn socket_path(field: &str, path: &Path, found: &mut Findings) {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() {
        found.add(field, "is empty; give a path");
    } else if bytes.contains(&0) {
        found.add(field, "holds a zero byte; give a path without one");
    } else if bytes.len() > MAX_SOCKET_PATH {
        let reason = format!(
            "{} bytes are more than the {MAX_SOCKET_PATH} of a UNIX socket's path; shorten it",
            bytes.len()
        );
        found.add(field, reason);
    }
}

pub(super) fn console(
    field: &str,
    mode: ConsoleMode,
    file: Option<&Path>,
    socket: Option<&Path>,
    found: &mut Findings,
) {
    let given = |path: Option<&Path>| path.is_some_and(|path| !path.as_os_str().is_empty());
    if mode == ConsoleMode::File && !given(file) {
        found.add(
            format!("{field}.file"),
            "is missing with mode File; give the file, or mode Off, Null, Pty or Tty",
        );
    }
    if mode == ConsoleMode::Socket {
        match socket.filter(|path| given(Some(path))) {
            Some(path) => socket_path(&format!("{field}.socket"), path, found),
            None => found.add(
                format!("{field}.socket"),
                "is missing with mode Socket; give the path, or mode Off, Null, Pty or Tty",
            ),
        }
    }
}
