//! The bodies that the shims send, with every field that they send.

use std::path::Path;

use serde_json::{Value, json};

use crate::sandbox::{Sandbox, Shim};

/// The memory of the pods here: small, as many run at once.
pub(crate) const MEMORY: u64 = 256 << 20;

/// What the Go shim appends to every kernel's command line.
const CMDLINE: &str = "root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 panic=1 \
    no_timer_check noreplace-smp quiet systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service \
    dm-mod.create=\"dm-verity,,,ro,0 736328 verity 1 /dev/vda1 /dev/vda2\" cgroup_no_v1=all \
    systemd.unified_cgroup_hierarchy=1";

/// The host's memory in bytes, which both shims give as room to grow.
fn host_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// `vm.create` as the sandbox's shim sends it.
pub(crate) fn create(sandbox: &Sandbox) -> Value {
    match sandbox.shim {
        Shim::Go => go_create(sandbox),
        Shim::Rust => rust_create(sandbox),
    }
}

/// `vm.create` of the Go shim: whole memory blocks to grow by, as it rounds what the host has.
pub(crate) fn go_create(sandbox: &Sandbox) -> Value {
    let mut config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 8, "kvm_hyperv": false, "nested": true,
                 "topology": {"threads_per_core": 1, "cores_per_die": 8, "dies_per_package": 1, "packages": 1}},
        "memory": {"size": MEMORY, "hotplug_size": host_memory() >> 20 << 20, "mergeable": false,
                   "hotplug_method": "Acpi", "shared": true, "hugepages": false, "prefault": false, "thp": true},
        "payload": {"kernel": sandbox.path("kernel"), "cmdline": CMDLINE},
        "platform": {"num_pci_segments": 2, "tdx": false, "sev_snp": false},
        "disks": [{"path": sandbox.path("image"), "readonly": true, "direct": false, "iommu": false, "num_queues": 1,
                   "queue_size": 128, "vhost_user": false, "backing_files": false, "sparse": true,
                   "image_type": "Raw"}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "serial": {"mode": "Off", "iommu": false},
        "console": {"mode": "Off", "iommu": false},
        "vsock": {"cid": 3, "socket": sandbox.vsock(), "iommu": false},
        "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
    });
    if sandbox.virtiofsd.is_some() {
        config["fs"] = json!([{"tag": "kataShared", "socket": sandbox.virtiofs_socket(), "num_queues": 1,
                               "queue_size": 1024, "pci_segment": 1}]);
    }
    config
}

/// `vm.create` of the Rust shim.
pub(crate) fn rust_create(sandbox: &Sandbox) -> Value {
    // The host's memory but the pod's, rounded up to 2 MiB, with 2 MiB more where it is round already.
    let hotplug = (((host_memory() - MEMORY) >> 21) + 1) << 21;
    let mut config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": false, "max_phys_bits": 46, "features": {"amx": false},
                 "topology": {"threads_per_core": 1, "cores_per_die": 1, "dies_per_package": 1, "packages": 1}},
        "memory": {"size": MEMORY, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": hotplug,
                   "shared": true, "hugepages": false, "prefault": false},
        "payload": {"firmware": null, "kernel": sandbox.path("kernel"), "initramfs": null, "mrconfigid": null,
                    "cmdline": format!("reboot=k panic=1 systemd.unit=kata-containers.target {CMDLINE}"),
                    "host_data": null},
        "disks": [{"path": sandbox.path("image"), "readonly": true, "direct": false, "iommu": false, "num_queues": 1,
                   "queue_size": 128, "vhost_user": false, "vhost_socket": null, "rate_limiter_config": null,
                   "id": null, "disable_io_uring": false, "pci_segment": 0, "sparse": true, "image_type": "Unknown"}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "fs": [],
        "serial": {"file": null, "mode": "Off", "iommu": false},
        "console": {"file": null, "mode": "Off", "iommu": false},
        "devices": [],
        "vsock": {"cid": 3, "socket": sandbox.vsock(), "iommu": false, "id": null, "pci_segment": 0},
        "iommu": false, "watchdog": false,
    });
    if sandbox.virtiofsd.is_some() {
        config["fs"] = json!([{"tag": "kataShared", "socket": sandbox.virtiofs_socket(), "num_queues": 1,
                               "queue_size": 1024, "id": null, "pci_segment": 0}]);
    }
    config
}

/// `vm.add-net` of the Go shim, which never tells of the descriptors in the body.
pub(crate) fn go_net(number: u8) -> Value {
    json!({"ip": "192.168.249.1", "mask": "255.255.255.0", "mac": mac(number), "iommu": false, "num_queues": 2,
           "queue_size": 256, "vhost_user": false, "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true,
           "offload_csum": true})
}

/// `vm.add-net` of the Rust shim: before the boot with the numbers that the descriptors have on its side.
pub(crate) fn rust_net(number: u8, booted: bool) -> Value {
    let mut body = json!({"ip": "192.168.249.1", "mask": "255.255.255.0", "mac": mac(number), "iommu": false,
                          "num_queues": 2, "queue_size": 256, "vhost_user": false, "vhost_mode": "Client"});
    if !booted {
        body["fds"] = json!([2024]);
    }
    body
}

/// The MAC address of a network.
pub(crate) fn mac(number: u8) -> String {
    format!("52:54:00:00:17:{number:02x}")
}

/// `vm.add-disk` of the Go shim.
pub(crate) fn go_disk(path: &Path, readonly: bool) -> Value {
    json!({"path": path, "readonly": readonly, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 1024,
           "vhost_user": false, "backing_files": false, "sparse": true, "image_type": "Raw"})
}

/// `vm.add-disk` of the Rust shim.
pub(crate) fn rust_disk(path: &Path, readonly: bool) -> Value {
    json!({"path": path, "readonly": readonly, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 128,
           "vhost_user": false, "vhost_socket": null, "rate_limiter_config": null, "id": null,
           "disable_io_uring": false, "pci_segment": 0, "sparse": true, "image_type": "Raw"})
}
