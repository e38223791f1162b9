//! What a configuration may say, beyond its types: the rules of Cloud Hypervisor's API and of the specifications behind
//! it, each with an error that names the field, the value and the remedy. Nothing is looked up on the machine here (no
//! file is opened, no KVM asked): that is the monitor's part.

use crate::types::{
    ConsoleMode, CpusConfig, DiskConfig, FsConfig, Isolation, MemoryConfig, NetConfig, PayloadConfig, PlatformConfig,
    RateLimiterConfig, VmConfig, VsockConfig,
};
use std::collections::BTreeSet;
use std::path::Path;

/// Most vCPUs of a VM: local APIC identifiers are 8 bits wide and 0xff means all (Intel SDM volume 3, 12.7.2.1).
pub const MAX_VCPUS: u32 = 254;
/// Most memory of a VM, in bytes: 64 TiB, half of what x86-64 Linux maps with four page-table levels and far above any
/// host.
pub const MAX_MEMORY_BYTES: u64 = 64 << 40;
/// Most descriptors of a virtqueue (virtio 1.2, 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// Most queues of one device.
const MAX_QUEUES: usize = 256;
/// Most PCI segments: as many as the address map has room for ECAM windows (256 MiB at 1 MiB each, less the last).
const MAX_PCI_SEGMENTS: u16 = 96;
/// Bytes of a UNIX socket path without the closing zero (`sockaddr_un`).
const MAX_SOCKET_PATH: usize = 107;

/// A rule that a configuration breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ConfigError {
    /// Path of the field (`disks[1].queue_size`).
    pub field: String,
    /// The value, why it cannot be, and what to give instead.
    pub reason: String,
    /// Whether this is an identifier given twice (the API answers 409, not 400).
    pub conflict: bool,
}

/// When rules are checked.
///
/// Cloud Hypervisor stores whatever `vm.create` brings and checks it on `vm.boot`, and clients can see that: a
/// configuration without a payload is created and only refused at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `vm.create`: all rules except that there must be something to boot.
    Create,
    /// `vm.boot`: all rules.
    Boot,
}

struct Findings(Vec<ConfigError>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(ConfigError {
            field: field.into(),
            reason: reason.into(),
            conflict: false,
        });
    }
}

impl VmConfig {
    /// Checks every rule that can be checked without looking at the machine.
    ///
    /// # Errors
    /// The first rule broken, in the order of the schema; [`VmConfig::problems`] has them all.
    pub fn validate(&self, stage: Stage) -> Result<(), ConfigError> {
        first(self.problems(stage))
    }

    /// All the rules that the configuration breaks, in the order of the schema.
    pub fn problems(&self, stage: Stage) -> Vec<ConfigError> {
        let mut found = Findings(Vec::new());
        cpus(&self.cpus, &mut found);
        memory(&self.memory, &mut found);
        payload(self, stage, &mut found);
        pod(self, &mut found);
        for (at, disk) in self.disks().iter().enumerate() {
            check_disk(disk, &format!("disks[{at}]"), &mut found);
        }
        for (at, net) in self.net().iter().enumerate() {
            check_net(net, &format!("net[{at}]"), &mut found);
        }
        for (at, fs) in self.fs().iter().enumerate() {
            check_fs(fs, &format!("fs[{at}]"), &mut found);
        }
        console(
            "serial",
            self.serial.mode,
            self.serial.file.as_deref(),
            self.serial.socket.as_deref(),
            &mut found,
        );
        console(
            "console",
            self.console.mode,
            self.console.file.as_deref(),
            self.console.socket.as_deref(),
            &mut found,
        );
        let debug = &self.debug_console;
        console("debug_console", debug.mode, debug.file.as_deref(), None, &mut found);
        if let Some(vsock) = &self.vsock {
            check_vsock(vsock, "vsock", &mut found);
        }
        if let Some(balloon) = &self.balloon
            && balloon.size > self.memory.size
        {
            let reason = format!(
                "{} bytes are more than the memory's {}; give at most that",
                balloon.size, self.memory.size
            );
            found.add("balloon.size", reason);
        }
        if let Some(p) = &self.platform {
            platform(p, self.payload.as_ref(), &mut found);
        }
        segments(self, &mut found);
        unsupported(self, &mut found);
        identifiers(self, &mut found);
        found.0
    }

    /// Gives the VM the size that its pod's limits come to.
    ///
    /// # Errors
    /// `memory.size` or `cpus` were given as well and disagree; both numbers are named and nothing is changed.
    pub fn apply_sizing(&mut self, memory_bytes: u64, vcpus: u32) -> Result<(), ConfigError> {
        let refuse = |field: &str, reason| {
            Err(ConfigError {
                field: field.to_owned(),
                reason,
                conflict: false,
            })
        };
        if self.memory.size_given && self.memory.size != memory_bytes {
            let given = self.memory.size;
            return refuse(
                "memory.size",
                format!("{given} bytes are given, but the pod's limits come to {memory_bytes}; leave memory.size out"),
            );
        }
        if self.cpus.given && self.cpus.boot_vcpus != vcpus {
            let given = self.cpus.boot_vcpus;
            return refuse(
                "cpus.boot_vcpus",
                format!("{given} vCPUs are given, but the pod's limits come to {vcpus}; leave cpus out"),
            );
        }
        self.memory.size = memory_bytes;
        self.cpus.boot_vcpus = vcpus;
        self.cpus.max_vcpus = self.cpus.max_vcpus.max(vcpus);
        Ok(())
    }
}

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

fn first(found: Vec<ConfigError>) -> Result<(), ConfigError> {
    found.into_iter().next().map_or(Ok(()), Err)
}

fn single(id: Option<&str>, check: impl FnOnce(&mut Findings)) -> Result<(), ConfigError> {
    let mut found = Findings(Vec::new());
    check(&mut found);
    if let Some(id) = id {
        identifier("id", id, &mut found);
    }
    first(found.0)
}

fn cpus(cpus: &CpusConfig, found: &mut Findings) {
    let (boot, max) = (cpus.boot_vcpus, cpus.max_vcpus);
    if boot == 0 {
        found.add("cpus.boot_vcpus", "0 vCPUs cannot boot; give at least 1");
    }
    if max > MAX_VCPUS || boot > MAX_VCPUS {
        let field = if boot > MAX_VCPUS {
            "cpus.boot_vcpus"
        } else {
            "cpus.max_vcpus"
        };
        found.add(
            field,
            format!("{} vCPUs are too many; give at most {MAX_VCPUS}", boot.max(max)),
        );
    }
    if max < boot {
        found.add(
            "cpus.max_vcpus",
            format!("{max} is below boot_vcpus, {boot}; give at least that or leave it out"),
        );
    }
    if let Some(t) = &cpus.topology {
        let counts = [t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages];
        let product = counts
            .iter()
            .fold(1u64, |product, n| product.saturating_mul(u64::from(*n)));
        if product != u64::from(max) {
            let [threads, cores, dies, packages] = counts;
            let reason = format!(
                "{threads} threads x {cores} cores x {dies} dies x {packages} packages are {product} vCPUs, max_vcpus is {max}; make them equal"
            );
            found.add("cpus.topology", reason);
        }
    }
    if !(32..=52).contains(&cpus.max_phys_bits) {
        let reason = format!(
            "{} address bits cannot be; give 32 to 52 or leave it out",
            cpus.max_phys_bits
        );
        found.add("cpus.max_phys_bits", reason);
    }
    for (at, entry) in cpus.affinity.iter().flatten().enumerate() {
        if entry.vcpu >= max {
            found.add(
                format!("cpus.affinity[{at}].vcpu"),
                format!("there is no vCPU {}; max_vcpus is {max}", entry.vcpu),
            );
        }
        if entry.host_cpus.is_empty() {
            found.add(
                format!("cpus.affinity[{at}].host_cpus"),
                "no host CPU is named; name at least one",
            );
        }
    }
}

fn page_multiple(field: String, size: u64, found: &mut Findings) {
    if !size.is_multiple_of(4096) {
        found.add(
            field,
            format!("{size} bytes are not whole pages; give a multiple of 4096"),
        );
    }
}

fn memory(memory: &MemoryConfig, found: &mut Findings) {
    let zones = memory.zones.as_deref().unwrap_or_default();
    if memory.size == 0 && zones.is_empty() {
        found.add(
            "memory.size",
            "0 bytes cannot boot; give the size in bytes, for example 536870912",
        );
    }
    if memory.size != 0 && !zones.is_empty() {
        let reason = format!(
            "{} bytes are given beside zones; give 0 here, the zones' sizes count",
            memory.size
        );
        found.add("memory.size", reason);
    }
    let zones_sum = zones.iter().fold(0u64, |sum, zone| sum.saturating_add(zone.size));
    let total = memory.size.saturating_add(zones_sum);
    if total > MAX_MEMORY_BYTES {
        found.add(
            "memory.size",
            format!("{total} bytes are too much; give at most {MAX_MEMORY_BYTES}"),
        );
    }
    page_multiple("memory.size".to_owned(), memory.size, found);
    if let Some(size) = memory.hotplug_size
        && total.saturating_add(size) > MAX_MEMORY_BYTES
    {
        let reason = format!("{size} bytes beside {total} are too much; give at most {MAX_MEMORY_BYTES} together");
        found.add("memory.hotplug_size", reason);
    }
    if let Some(hotplugged) = memory.hotplugged_size
        && hotplugged > memory.hotplug_size.unwrap_or(0)
    {
        found.add(
            "memory.hotplugged_size",
            format!("{hotplugged} bytes are more than hotplug_size; give at most that"),
        );
    }
    if memory.hugepage_size.is_some() && !memory.hugepages {
        found.add(
            "memory.hugepage_size",
            "is given without hugepages; set hugepages or leave it out",
        );
    }
    if let Some(size) = memory.hugepage_size
        && (!size.is_power_of_two() || size < 4096)
    {
        found.add(
            "memory.hugepage_size",
            format!("{size} is no page size; give a power of two, for example 2097152"),
        );
    }
    let mut names = BTreeSet::new();
    for (at, zone) in zones.iter().enumerate() {
        if zone.size == 0 {
            found.add(
                format!("memory.zones[{at}].size"),
                "0 bytes make no zone; give a size or leave the zone out",
            );
        }
        page_multiple(format!("memory.zones[{at}].size"), zone.size, found);
        if zone.id.is_empty() || !names.insert(zone.id.as_str()) {
            let reason = format!(
                "`{}` is empty or given twice; give each zone a name of its own",
                zone.id
            );
            found.add(format!("memory.zones[{at}].id"), reason);
        }
    }
}

fn payload(config: &VmConfig, stage: Stage, found: &mut Findings) {
    let empty = PayloadConfig::default();
    let payload = config.payload.as_ref().unwrap_or(&empty);
    let (kernel, firmware, igvm) = (
        payload.kernel.is_some(),
        payload.firmware.is_some(),
        payload.igvm.is_some(),
    );
    if stage == Stage::Boot && !(kernel || firmware || igvm) {
        found.add(
            "payload",
            "there is nothing to boot; give payload.kernel, payload.firmware or payload.igvm",
        );
    }
    if kernel && firmware {
        found.add(
            "payload.firmware",
            "is given beside payload.kernel; give one of the two",
        );
    }
    if igvm && firmware {
        found.add(
            "payload.firmware",
            "is given beside payload.igvm, which holds the firmware; give one of the two",
        );
    }
    if let Some(host_data) = &payload.host_data
        && payload.host_data_bytes().is_none()
    {
        let shown: String = host_data.chars().take(80).collect();
        let reason = format!(
            "`{shown}` ({} bytes) is not 64 hexadecimal digits; give 32 bytes in hexadecimal or leave it out",
            host_data.len()
        );
        found.add("payload.host_data", reason);
    }
    // The largest command line that Cloud Hypervisor hands to a guest.
    if let Some(cmdline) = &payload.cmdline {
        if cmdline.len() >= 65536 {
            found.add(
                "payload.cmdline",
                format!("{} bytes are too many; give at most 65535", cmdline.len()),
            );
        }
        if cmdline.contains('\0') {
            found.add(
                "payload.cmdline",
                "holds a zero byte, where the kernel would stop reading; leave it out",
            );
        }
    }
}

fn pod(config: &VmConfig, found: &mut Findings) {
    if let Some(pod) = &config.pod
        && !matches!(pod.handler.as_str(), "kata-cc" | "kata")
    {
        let shown: String = pod.handler.chars().take(80).collect();
        found.add(
            "pod.handler",
            format!("`{shown}` is no known handler; give kata-cc or kata"),
        );
    }
    let zones = config.memory.zones.as_ref().is_some_and(|zones| !zones.is_empty());
    if config.pod.is_some() && zones {
        found.add(
            "memory.zones",
            "are given beside pod, whose limits size the memory; give one of the two",
        );
    }
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

fn vhost(field: &str, vhost_user: bool, socket: Option<&str>, found: &mut Findings) {
    if vhost_user && socket.is_none_or(str::is_empty) {
        found.add(
            format!("{field}.vhost_socket"),
            "is missing beside vhost_user; give the server's socket",
        );
    }
    if let Some(socket) = socket {
        socket_path(&format!("{field}.vhost_socket"), Path::new(socket), found);
    }
}

fn check_disk(disk: &DiskConfig, field: &str, found: &mut Findings) {
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
    vhost(field, disk.vhost_user, disk.vhost_socket.as_deref(), found);
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
}

fn check_net(net: &NetConfig, field: &str, found: &mut Findings) {
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
    vhost(field, net.vhost_user, net.vhost_socket.as_deref(), found);
    rate_limits(field, net.rate_limiter_config.as_ref(), found);
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    bytes.len() == 6
        && bytes
            .iter()
            .all(|b| b.len() == 2 && b.bytes().all(|c| c.is_ascii_hexdigit()))
}

fn check_fs(fs: &FsConfig, field: &str, found: &mut Findings) {
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

fn check_vsock(vsock: &VsockConfig, field: &str, found: &mut Findings) {
    if vsock.cid < 3 || vsock.cid == u32::MAX {
        let reason = format!("{} is reserved (virtio 1.2, 5.10.4); give 3 to 4294967294", vsock.cid);
        found.add(format!("{field}.cid"), reason);
    }
    socket_path(&format!("{field}.socket"), &vsock.socket, found);
}

fn socket_path(field: &str, path: &Path, found: &mut Findings) {
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

fn console(field: &str, mode: ConsoleMode, file: Option<&Path>, socket: Option<&Path>, found: &mut Findings) {
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

fn platform(platform: &PlatformConfig, payload: Option<&PayloadConfig>, found: &mut Findings) {
    if !(1..=MAX_PCI_SEGMENTS).contains(&platform.num_pci_segments) {
        let reason = format!(
            "{} segments cannot be; give 1 to {MAX_PCI_SEGMENTS}",
            platform.num_pci_segments
        );
        found.add("platform.num_pci_segments", reason);
    }
    for (at, segment) in platform.iommu_segments.iter().flatten().enumerate() {
        if *segment >= platform.num_pci_segments {
            let reason = format!(
                "there is no segment {segment}; num_pci_segments is {}",
                platform.num_pci_segments
            );
            found.add(format!("platform.iommu_segments[{at}]"), reason);
        }
    }
    if platform.tdx {
        found.add(
            "platform.tdx",
            "Intel TDX is not supported; leave it out, or give isolation \"snp\"",
        );
    }
    if platform.sev_snp
        && let Some(isolation @ (Isolation::None | Isolation::SnpEmulated)) = platform.isolation
    {
        let named = if isolation == Isolation::None {
            "none"
        } else {
            "snp-emulated"
        };
        found.add(
            "platform.isolation",
            format!("\"{named}\" contradicts sev_snp, which means the processor's SNP; leave one of the two out"),
        );
    }
    if platform.isolation() != Isolation::None && payload.is_none_or(|payload| payload.igvm.is_none()) {
        let field = if platform.isolation.is_some() {
            "platform.isolation"
        } else {
            "platform.sev_snp"
        };
        found.add(field, "SEV-SNP boots IGVM images only; give payload.igvm");
    }
}

/// Every PCI segment that a device names must exist.
fn segments(config: &VmConfig, found: &mut Findings) {
    let count = config.platform.as_ref().map_or(1, |platform| platform.num_pci_segments);
    let mut used = vec![
        ("rng".to_owned(), config.rng.pci_segment),
        ("console".to_owned(), config.console.pci_segment),
    ];
    used.extend(
        config
            .disks()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("disks[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .net()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("net[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .fs()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("fs[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .pmem()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("pmem[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .devices()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("devices[{at}]"), d.pci_segment)),
    );
    used.extend(config.vsock.iter().map(|d| ("vsock".to_owned(), d.pci_segment)));
    used.extend(config.balloon.iter().map(|d| ("balloon".to_owned(), d.pci_segment)));
    for (field, segment) in used {
        if segment >= count {
            let reason = format!("there is no segment {segment}; raise platform.num_pci_segments, now {count}");
            found.add(format!("{field}.pci_segment"), reason);
        }
    }
}

fn unsupported(config: &VmConfig, found: &mut Findings) {
    let lists = [
        ("numa", &config.numa),
        ("vdpa", &config.vdpa),
        ("user_devices", &config.user_devices),
        ("generic_vhost_user", &config.generic_vhost_user),
    ];
    for (field, list) in lists {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            found.add(field, "is not supported by podvisor; leave it out");
        }
    }
    if config.tpm.is_some() {
        found.add("tpm", "is not supported by podvisor; leave it out");
    }
}

fn identifier(field: &str, id: &str, found: &mut Findings) {
    let shown: String = id.chars().take(80).collect();
    if id.is_empty() {
        found.add(field, "is empty; give a name or leave it out");
    } else if id.starts_with("__") {
        found.add(
            field,
            format!("`{shown}` is reserved: names that begin with __ are podvisor's own; give another"),
        );
    } else if id.len() > 255 {
        found.add(field, format!("`{shown}`… has {} bytes; give at most 255", id.len()));
    }
}

fn push_name<'c>(named: &mut Vec<(String, &'c str)>, field: String, id: &'c Option<String>) {
    named.extend(id.as_deref().map(|id| (field, id)));
}

/// Names must be well-formed and each device's own.
fn identifiers(config: &VmConfig, found: &mut Findings) {
    let mut named: Vec<(String, &str)> = Vec::new();
    let mut add = |field, id| push_name(&mut named, field, id);
    config
        .disks()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("disks[{at}].id"), &d.id));
    config
        .net()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("net[{at}].id"), &d.id));
    config
        .fs()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("fs[{at}].id"), &d.id));
    config
        .pmem()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("pmem[{at}].id"), &d.id));
    config
        .devices()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("devices[{at}].id"), &d.id));
    config.vsock.iter().for_each(|d| add("vsock.id".to_owned(), &d.id));
    config.balloon.iter().for_each(|d| add("balloon.id".to_owned(), &d.id));
    add("rng.id".to_owned(), &config.rng.id);
    add("console.id".to_owned(), &config.console.id);
    let mut seen = BTreeSet::new();
    for (field, id) in named {
        identifier(&field, id, found);
        if !seen.insert(id) {
            let reason = format!("`{id}` is given to two devices; give each a name of its own, or none");
            found.0.push(ConfigError {
                field,
                reason,
                conflict: true,
            });
        }
    }
    let mut tags = BTreeSet::new();
    for (at, fs) in config.fs().iter().enumerate() {
        if !tags.insert(fs.tag.as_str()) {
            found.add(
                format!("fs[{at}].tag"),
                format!("`{}` is given to two file systems; give each a tag of its own", fs.tag),
            );
        }
    }
}

#[cfg(test)]
mod tests;
