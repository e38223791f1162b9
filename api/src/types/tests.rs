//! The types against what Cloud Hypervisor shows and what the shims send.

use super::*;
use crate::{from_json, from_options};
use serde_json::{Value, json};

fn keys(prefix: &str, value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                out.push(format!("{prefix}.{key}"));
                keys(&format!("{prefix}.{key}"), value, out);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| keys(&format!("{prefix}[]"), item, out)),
        _ => {}
    }
}

/// `config` of Cloud Hypervisor v54's vm.info after vm.create with a kernel, a disk, a vsock, a virtio-fs and a pmem
/// device (recorded from the program).
const RECORDED: &str = r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"max_phys_bits":46,"features":{"amx":false},"nested":true,"core_scheduling":"Vm","profile":"Host"},"memory":{"size":268435456,"mergeable":false,"hotplug_method":"Acpi","hotplug_size":274877906944,"shared":true,"hugepages":false,"prefault":false,"reserve":false,"thp":true},"payload":{"kernel":"/k","cmdline":"console=ttyS0"},"disks":[{"id":"_disk0","pci_segment":0,"path":"/a.img","readonly":false,"direct":false,"num_queues":1,"queue_size":128,"vhost_user":false,"disable_io_uring":false,"disable_aio":false,"backing_files":false,"sparse":true,"image_type":"Raw","lock_granularity":"ByteRange"}],"net":[],"rng":{"pci_segment":0,"src":"/dev/urandom"},"fs":[{"pci_segment":0,"tag":"t","socket":"/nofs","num_queues":1,"queue_size":1024}],"pmem":[{"id":"_pmem2","pci_segment":0,"file":"/pmem.img","discard_writes":false}],"serial":{"mode":"Null"},"console":{"mode":"Off","pci_segment":0},"debug_console":{"mode":"Off","iobase":233},"devices":[],"vsock":{"pci_segment":0,"cid":3,"socket":"/v"},"pvpanic":false,"iommu":false,"watchdog":false,"landlock_enable":false}"#;

#[test]
fn what_cloud_hypervisor_shows_is_shown() {
    let config: VmConfig = from_json(RECORDED.as_bytes()).unwrap();
    let shown = serde_json::to_value(&config).unwrap();
    let recorded: Value = serde_json::from_str(RECORDED).unwrap();
    assert_eq!(shown, recorded);
}

#[test]
fn a_minimal_configuration_shows_every_default() {
    let request = json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1}, "memory": {"size": 268435456, "shared": true, "hotplug_size": 1},
        "payload": {"kernel": "/k", "cmdline": "c"}, "serial": {"mode": "Null"}, "console": {"mode": "Off"},
        "disks": [{"path": "/a", "image_type": "Raw", "id": "_disk0"}], "net": [], "devices": [],
        "fs": [{"tag": "t", "socket": "/nofs"}], "pmem": [{"file": "/p", "id": "x"}], "vsock": {"cid": 3, "socket": "/v"}});
    let config: VmConfig = from_json(request.to_string().as_bytes()).unwrap();
    let (mut shown, mut recorded) = (Vec::new(), Vec::new());
    keys("", &serde_json::to_value(&config).unwrap(), &mut shown);
    keys("", &serde_json::from_str(RECORDED).unwrap(), &mut recorded);
    assert_eq!(shown, recorded);
}

/// The Rust shim's body: nulls, empty arrays, fields that are no more.
#[test]
fn nulls_empty_arrays_and_unknown_fields_are_accepted_everywhere() {
    let body = json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": null, "features": null, "nested": null},
        "memory": {"size": 2147483648u64, "hotplug_size": null, "hotplug_method": "Acpi", "shared": true, "zones": null, "mergeable": null},
        "payload": {"firmware": null, "kernel": "/k", "cmdline": "c", "initramfs": null, "mrconfigid": null, "host_data": null},
        "disks": [{"path": "/i", "readonly": true, "direct": false, "iommu": null, "num_queues": 1, "queue_size": 128, "vhost_user": false,
            "vhost_socket": null, "rate_limiter_config": null, "id": null, "disable_io_uring": false, "pci_segment": null,
            "sparse": true, "image_type": "Unknown"}],
        "net": null, "rng": null, "balloon": null, "fs": [{"tag": "kataShared", "socket": "/s", "num_queues": null, "queue_size": 1024, "id": null}],
        "serial": {"file": null, "mode": "Off", "iommu": false}, "console": {"file": null, "mode": "Off", "iommu": null},
        "devices": [], "vsock": {"cid": 3, "socket": "/v", "iommu": null, "id": null, "pci_segment": null},
        "platform": null, "iommu": null, "watchdog": null, "sgx_epc": [], "unknown": {"deep": [null]}});
    let config: VmConfig = from_json(body.to_string().as_bytes()).unwrap();
    assert_eq!(
        config.payload.as_ref().unwrap().kernel.as_ref().unwrap().to_str(),
        Some("/k")
    );
    assert_eq!((config.fs()[0].num_queues, config.fs()[0].queue_size), (1, 1024));
    assert!(config.cpus.nested && config.cpus.given && config.memory.size_given);
    assert_eq!(config.disks()[0].image_type, ImageType::Unknown);
}

#[test]
fn legacy_names_and_our_additions() {
    let platform: PlatformConfig = from_json(br#"{"num_pci_segments": 10, "tdx": false, "snp": true}"#).unwrap();
    assert_eq!(platform.isolation(), Isolation::Snp);
    let body = br#"{"platform": {"isolation": "snp-emulated"}, "pod": {"handler": "kata-cc", "memory_limit": 536870912, "cpu_limit": 1.5},
        "fs": [{"tag": "t", "shared_dir": "/d", "readonly": true}]}"#;
    let config: VmConfig = from_json(body).unwrap();
    assert_eq!(config.isolation(), Isolation::SnpEmulated);
    let pod = config.pod.as_ref().unwrap();
    assert_eq!(
        (
            pod.memory_limit.as_ref().unwrap().0.as_str(),
            pod.cpu_limit.as_ref().unwrap().0.as_str()
        ),
        ("536870912", "1.5")
    );
    assert!(!config.cpus.given && !config.memory.size_given);
    let again: VmConfig = from_json(&serde_json::to_vec(&config).unwrap()).unwrap();
    assert_eq!(
        (again.pod, again.fs, again.platform),
        (config.pod, config.fs, config.platform)
    );
}

#[test]
fn a_request_is_refused_and_says_why() {
    for field in ["requests", "memory_request", "cpu_request"] {
        let body = format!(r#"{{"pod": {{"handler": "kata", "{field}": {{"cpu": 1}}}}}}"#);
        let error = from_json::<VmConfig>(body.as_bytes()).unwrap_err().to_string();
        assert!(
            error.starts_with("pod: ") && error.contains(field) && error.contains("containerd"),
            "{error}"
        );
    }
    let error = from_options::<PodConfig>("handler=kata,cpu_request=1")
        .unwrap_err()
        .to_string();
    assert!(error.contains("containerd"), "{error}");
}

#[test]
fn errors_name_the_field() {
    let rows: [(&str, &str); 6] = [
        (
            r#"{"disks": [{"path": "/a"}, {"queue_size": "x"}]}"#,
            "disks[1].queue_size: ",
        ),
        (r#"{"disks": [{"queue_size": 65536}]}"#, "disks[0].queue_size: "),
        (r#"{"vsock": {"cid": 3}}"#, "vsock: missing field `socket`"),
        (r#"{"serial": {"mode": "Loud"}}"#, "serial.mode: unknown variant `Loud`"),
        (r#"{"cpus": {"boot_vcpus": -1}}"#, "cpus.boot_vcpus: "),
        (r#"{"platform": {"isolation": true}}"#, "platform.isolation: "),
    ];
    for (body, want) in rows {
        let error = from_json::<VmConfig>(body.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(want), "{body}: {error}");
    }
}

#[test]
fn bad_json_is_refused() {
    let twice = from_json::<VmConfig>(br#"{"iommu": null, "iommu": true}"#)
        .unwrap_err()
        .to_string();
    assert!(twice.contains("`iommu` is given twice"), "{twice}");
    assert!(from_json::<VmConfig>(b"{").unwrap_err().to_string().contains("line 1"));
    assert!(from_json::<VmConfig>(b"{} {}").is_err());
    assert!(from_json::<VmConfig>("[".repeat(100_000).as_bytes()).is_err());
    let many = format!(r#"{{"unknown": [{}0]}}"#, "0,".repeat(70_000));
    assert!(
        from_json::<VmConfig>(many.as_bytes())
            .unwrap_err()
            .to_string()
            .contains("more than 65536 values")
    );
}
