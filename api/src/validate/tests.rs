//! Each rule is broken once, and what is right passes.

use super::*;
use crate::from_json;
use crate::types::PayloadConfig;
use crate::types::VmConfig;
use serde_json::{Value, json};

fn config(patch: Value) -> VmConfig {
    let mut body = json!({"memory": {"size": 268435456}, "payload": {"kernel": "/k"}});
    for (key, value) in patch.as_object().unwrap() {
        body[key] = value.clone();
    }
    from_json(body.to_string().as_bytes()).unwrap()
}

#[test]
fn every_rule_refuses_its_breach_by_field() {
    let long = "/".repeat(108);
    let rows = [
        (
            json!({"payload": {"kernel": "/k", "firmware": "/f"}}),
            "payload.firmware",
        ),
        (json!({"payload": {"igvm": "/k", "firmware": "/f"}}), "payload.firmware"),
        (
            json!({"payload": {"kernel": "/k", "host_data": ""}}),
            "payload.host_data",
        ),
        (
            json!({"payload": {"kernel": "/k", "host_data": "g".repeat(64)}}),
            "payload.host_data",
        ),
        (
            json!({"payload": {"kernel": "/k", "host_data": "0".repeat(63)}}),
            "payload.host_data",
        ),
        (
            json!({"payload": {"kernel": "/k", "host_data": "é".repeat(32)}}),
            "payload.host_data",
        ),
        (
            json!({"payload": {"kernel": "/k", "cmdline": "x".repeat(65536)}}),
            "payload.cmdline",
        ),
        (json!({"cpus": {"boot_vcpus": 0}}), "cpus.boot_vcpus"),
        (json!({"cpus": {"boot_vcpus": 255}}), "cpus.boot_vcpus"),
        (
            json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 4294967295u32}}),
            "cpus.max_vcpus",
        ),
        (json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 1}}), "cpus.max_vcpus"),
        (
            json!({"cpus": {"boot_vcpus": 2, "topology": {"threads_per_core": 1, "cores_per_die": 3, "dies_per_package": 1, "packages": 1}}}),
            "cpus.topology",
        ),
        (
            json!({"cpus": {"boot_vcpus": 1, "topology": {"threads_per_core": 65535, "cores_per_die": 65535, "dies_per_package": 65535, "packages": 65535}}}),
            "cpus.topology",
        ),
        (json!({"memory": {"size": 0}}), "memory.size"),
        (json!({"memory": {"size": 1u64 << 50}}), "memory.size"),
        (json!({"memory": {"size": u64::MAX}}), "memory.size"),
        (json!({"memory": {"size": 4097}}), "memory.size"),
        (
            json!({"memory": {"size": 4096, "hotplug_size": u64::MAX}}),
            "memory.hotplug_size",
        ),
        (
            json!({"memory": {"size": 0, "zones": [{"id": "a", "size": 4096}, {"id": "a", "size": 4096}]}}),
            "memory.zones[1].id",
        ),
        (
            json!({"disks": [{"path": "/a", "queue_size": 100}]}),
            "disks[0].queue_size",
        ),
        (
            json!({"disks": [{"path": "/a", "queue_size": 0}]}),
            "disks[0].queue_size",
        ),
        (
            json!({"disks": [{"path": "/a", "num_queues": 0}]}),
            "disks[0].num_queues",
        ),
        (json!({"disks": [{}]}), "disks[0].path"),
        (json!({"disks": [{"path": "/a", "id": "__rng"}]}), "disks[0].id"),
        (
            json!({"disks": [{"path": "/a", "id": "x"}], "fs": [{"tag": "t", "socket": "/s", "id": "x"}]}),
            "fs[0].id",
        ),
        (
            json!({"disks": [{"path": "/a", "serial": "123456789012345678901"}]}),
            "disks[0].serial",
        ),
        (
            json!({"disks": [{"path": "/a", "pci_segment": 1}]}),
            "disks[0].pci_segment",
        ),
        (
            json!({"disks": [{"path": "/a", "rate_limiter_config": {"ops": {"size": 1, "refill_time": 0}}}]}),
            "disks[0].rate_limiter_config.ops",
        ),
        (
            json!({"disks": [{"path": "/a", "image_type": "Qcow2"}]}),
            "disks[0].image_type",
        ),
        (
            json!({"disks": [{"path": "/a", "rate_limit_group": "g"}]}),
            "disks[0].rate_limit_group",
        ),
        (
            json!({"disks": [{"path": "/a", "rate_limit_group": "g", "rate_limiter_config": {}}],
                   "rate_limit_groups": [{"id": "g"}]}),
            "disks[0].rate_limit_group",
        ),
        (
            json!({"rate_limit_groups": [{"id": "g"}, {"id": "g"}]}),
            "rate_limit_groups[1].id",
        ),
        (
            json!({"rate_limit_groups": [{"id": "g", "rate_limiter_config": {"bandwidth": {"size": 0, "refill_time": 1}}}]}),
            "rate_limit_groups[0].rate_limiter_config.bandwidth",
        ),
        (json!({"net": [{"num_queues": 3}]}), "net[0].num_queues"),
        (json!({"net": [{"mac": "1:2:3:4:5:6"}]}), "net[0].mac"),
        (json!({"fs": [{"tag": "", "socket": "/s"}]}), "fs[0].tag"),
        (json!({"fs": [{"tag": "t".repeat(37), "socket": "/s"}]}), "fs[0].tag"),
        (json!({"fs": [{"tag": "t"}]}), "fs[0].socket"),
        (
            json!({"fs": [{"tag": "t", "socket": "/s", "shared_dir": "/d"}]}),
            "fs[0].shared_dir",
        ),
        (
            json!({"fs": [{"tag": "t", "socket": "/s"}, {"tag": "t", "socket": "/r"}]}),
            "fs[1].tag",
        ),
        (json!({"vsock": {"cid": 2, "socket": "/v"}}), "vsock.cid"),
        (json!({"vsock": {"cid": 3, "socket": long}}), "vsock.socket"),
        (json!({"vsock": {"cid": 3, "socket": ""}}), "vsock.socket"),
        (json!({"pmem": [{"file": ""}]}), "pmem[0].file"),
        (json!({"pmem": [{"file": "/p", "size": 4096}]}), "pmem[0].size"),
        (
            json!({"pmem": [{"file": "/p"}, {"file": "/q", "iommu": true}]}),
            "pmem[1].iommu",
        ),
        (json!({"balloon": {"size": 4097}}), "balloon.size"),
        (json!({"balloon": {"size": 536870912}}), "balloon.size"),
        (
            json!({"memory": {"size": 0, "zones": [{"id": "a", "size": 5000}]}}),
            "memory.zones[0].size",
        ),
        (
            json!({"memory": {"size": 4096, "zones": [{"id": "a", "size": 4096}]}}),
            "memory.size",
        ),
        (
            json!({"memory": {"size": 0, "zones": [{"id": "a", "size": 4096, "hotplugged_size": 4096}]}}),
            "memory.zones[0].hotplugged_size",
        ),
        (json!({"serial": {"mode": "File"}}), "serial.file"),
        (json!({"console": {"mode": "Socket"}}), "console.socket"),
        (json!({"debug_console": {"mode": "File"}}), "debug_console.file"),
        (json!({"platform": {"sev_snp": true}}), "platform.sev_snp"),
        (json!({"platform": {"isolation": "snp-emulated"}}), "platform.isolation"),
        (
            json!({"platform": {"sev_snp": true, "isolation": "none"}}),
            "platform.isolation",
        ),
        (json!({"platform": {"private_memory": true}}), "platform.private_memory"),
        (
            json!({"platform": {"sev_snp": true, "private_memory": true}, "payload": {"igvm": "/i"}}),
            "platform.private_memory",
        ),
        (
            json!({"platform": {"isolation": "snp-emulated", "private_memory": true}, "payload": {"igvm": "/i"},
                   "memory": {"size": 4096, "prefault": true}}),
            "memory.prefault",
        ),
        (
            json!({"platform": {"isolation": "snp-emulated", "private_memory": true}, "payload": {"igvm": "/i"},
                   "memory": {"size": 0, "zones": [{"id": "a", "size": 4096, "hugepages": true}]}}),
            "memory.zones[0].hugepages",
        ),
        (json!({"platform": {"tdx": true}}), "platform.tdx"),
        (
            json!({"platform": {"num_pci_segments": 0}}),
            "platform.num_pci_segments",
        ),
        (
            json!({"pci_segments": [{"pci_segment": 1}]}),
            "pci_segments[0].pci_segment",
        ),
        (
            json!({"pci_segments": [{}, {"pci_segment": 0}]}),
            "pci_segments[1].pci_segment",
        ),
        (
            json!({"pci_segments": [{"mmio32_aperture_weight": 0}]}),
            "pci_segments[0].mmio32_aperture_weight",
        ),
        (json!({"pod": {"handler": "runc"}}), "pod.handler"),
        (json!({"tpm": {"socket": "/t"}}), "tpm"),
        (json!({"numa": [{}]}), "numa[0]"),
    ];
    for (patch, field) in rows {
        let error = config(patch.clone()).validate(Stage::Create).unwrap_err();
        assert_eq!(error.field, field, "{patch}: {error}");
        assert_eq!(error.conflict, field == "fs[0].id", "{error}");
    }
}

#[test]
fn what_the_shims_send_passes() {
    let rows = [
        json!({"memory": {"size": 2147483648u64, "hotplug_size": 1u64 << 42, "shared": true}, "platform": {"num_pci_segments": 2},
            "fs": [{"tag": "kataShared", "socket": "/run/virtiofsd.sock", "pci_segment": 1}], "vsock": {"cid": 3, "socket": "/run/clh.sock"}}),
        json!({"memory": {"size": 0, "zones": [{"id": "mem0", "size": 2147483648u64, "file": "/f", "shared": true}]}}),
        json!({"platform": {"num_pci_segments": 2}, "pci_segments": [{"pci_segment": 1, "mmio32_aperture_weight": 4}, {"pci_segment": 0}]}),
        json!({"payload": {"igvm": "/i", "host_data": "0".repeat(64)}, "platform": {"num_pci_segments": 10, "sev_snp": true}}),
        json!({"platform": {"sev_snp": true, "isolation": "snp"}, "payload": {"igvm": "/i"}}),
        json!({"disks": [{"path": "/a", "queue_size": 32768, "num_queues": 8}], "numa": [], "vsock": {"cid": 3, "socket": "/".repeat(107)}}),
    ];
    for patch in rows {
        assert_eq!(config(patch.clone()).validate(Stage::Boot), Ok(()), "{patch}");
    }
}

#[test]
fn a_missing_payload_is_refused_at_boot_only() {
    let empty: VmConfig = from_json(b"{}").unwrap();
    assert_eq!(empty.validate(Stage::Create), Ok(()));
    assert_eq!(empty.validate(Stage::Boot).unwrap_err().field, "payload");
}

#[test]
fn sizing_and_explicit_sizes_must_agree() {
    let mut free: VmConfig = from_json(br#"{"memory": {"shared": true}}"#).unwrap();
    free.apply_sizing(2560 << 20, 3).unwrap();
    assert_eq!(
        (free.memory.size, free.cpus.boot_vcpus, free.cpus.max_vcpus),
        (2560 << 20, 3, 3)
    );
    let mut given = config(json!({"cpus": {"boot_vcpus": 3, "max_vcpus": 8}}));
    let before = given.clone();
    let error = given.apply_sizing(2560 << 20, 3).unwrap_err().to_string();
    assert!(error.contains("268435456") && error.contains("2684354560"), "{error}");
    assert_eq!(given, before);
    given.apply_sizing(268435456, 3).unwrap();
    assert_eq!(given.cpus.max_vcpus, 8);
    assert_eq!(given.apply_sizing(268435456, 4).unwrap_err().field, "cpus.boot_vcpus");
}

#[test]
fn host_data_is_read_as_bytes() {
    let payload = PayloadConfig {
        host_data: Some(format!("0aFf{}", "00".repeat(30))),
        ..Default::default()
    };
    assert_eq!(
        payload.host_data_bytes().map(|b| (b[0], b[1], b[2])),
        Some((0x0a, 0xff, 0))
    );
}
