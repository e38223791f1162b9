//! A pod's memory as the API has it: zones and the files behind them, the balloon.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{IDLE, Process, kvm, pvh_kernel};
use serde_json::{Value, json};

fn create(process: &Process, code: &[u8], memory: &Value, more: &Value) -> (u16, Value) {
    pvh_kernel(&process.path("kernel"), code);
    let mut config = json!({
        "memory": memory,
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    process.request("PUT", "vm.create", Some(&config))
}

/// Prints the byte at 3 MiB, adds one to it, and powers off.
const COUNTS: &[u8] = &[
    0xA0, 0x00, 0x00, 0x30, 0x00, // mov al, [0x300000]
    0x66, 0xBA, 0xF8, 0x03, 0xEE, // mov dx, 0x3f8; out dx, al
    0xFE, 0x05, 0x00, 0x00, 0x30, 0x00, // inc byte [0x300000]
    0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, // mov dx, 0x600; mov al, 0x34; out: power off
    0xF4, 0xEB, 0xFD,
];

/// What Kata's template factory does: one pod has its memory in a file, others begin with a copy of it.
#[test]
fn a_zone_is_in_its_file_or_a_copy_of_it() {
    if !kvm() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("memory");
    File::create(&path).unwrap();
    let mut said = Vec::new();
    for shared in [true, true, false, false] {
        let mut process = Process::start();
        let zones = json!({"size": 0, "zones": [
            {"id": "low", "size": 2 << 20, "shared": true},
            {"id": "mem0", "size": 126 << 20, "file": path, "shared": shared, "hugepages": false, "prefault": false},
        ]});
        let (status, answer) = create(&process, COUNTS, &zones, &json!({}));
        assert_eq!(status, 204, "{answer}");
        let info = process.info();
        assert_eq!(info["config"]["memory"]["size"], 0);
        assert_eq!(info["config"]["memory"]["zones"][1]["file"], json!(path));
        assert_eq!(info["memory_actual_size"], 128 << 20);
        process.put("vm.boot", None);
        assert!(process.wait().success(), "{}", process.log());
        said.extend(std::fs::read(process.path("serial")).unwrap());
    }
    assert_eq!(said, [0, 1, 2, 2]);
    let file = File::open(&path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 126 << 20);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1 << 20).unwrap();
    assert_eq!(byte, [2]);
}

#[test]
fn zones_that_cannot_be_are_refused_by_name() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let zone = json!({"id": "a", "size": 64 << 20});
    let with = |key: &str, value: Value| {
        let mut zone = zone.clone();
        zone[key] = value;
        json!({"size": 0, "zones": [zone]})
    };
    for (memory, named) in [
        (json!({"size": 4096, "zones": [zone]}), "memory.size"),
        (json!({"size": 0, "zones": [zone, zone]}), "memory.zones[1].id"),
        (with("size", json!(5000)), "memory.zones[0].size"),
        (with("host_numa_node", json!(0)), "memory.zones[0].host_numa_node"),
        (with("hotplugged_size", json!(4096)), "memory.zones[0].hotplugged_size"),
    ] {
        let (status, said) = create(&process, IDLE, &memory, &json!({}));
        assert!(
            status == 400 && said.to_string().contains(named),
            "{memory}: {status} {said}"
        );
    }
    // A file is looked at when the pod boots; it stays created.
    let (status, said) = create(&process, IDLE, &with("file", json!(process.path("none"))), &json!({}));
    assert_eq!(status, 204, "{said}");
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert!(status >= 400 && said.to_string().contains("none"), "{status} {said}");
    let resize = |id: &str, size: u64| {
        let body = json!({"id": id, "desired_ram": size});
        process.request("PUT", "vm.resize-zone", Some(&body))
    };
    assert_eq!(resize("a", 64 << 20).0, 204);
    assert_eq!(resize("a", 32 << 20).0, 204, "before the boot");
    assert_eq!(process.info()["config"]["memory"]["zones"][0]["size"], 32 << 20);
    assert!(resize("a", 1).1.to_string().contains("memory.zones[0].size"));
    assert_eq!(resize("b", 64 << 20).0, 400);
}

#[test]
fn a_balloon_is_asked_for_and_stays() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let balloon = json!({"balloon": {"size": 0, "free_page_reporting": true}});
    let (status, said) = create(&process, IDLE, &json!({"size": 128 << 20}), &balloon);
    assert_eq!(status, 204, "{said}");
    let resize = |size: u64| process.request("PUT", "vm.resize", Some(&json!({"desired_balloon": size})));
    let size = || process.info()["config"]["balloon"]["size"].clone();
    assert_eq!(resize(1 << 20).0, 204);
    process.put("vm.boot", None);
    assert_eq!(resize(64 << 20).0, 204);
    assert_eq!(size(), 64 << 20);
    // This guest has no driver: it keeps what it has.
    assert_eq!(process.info()["memory_actual_size"], 128 << 20);
    for wrong in [129 << 20, 4097] {
        let (status, said) = resize(wrong);
        assert!(status == 400 && said.to_string().contains("balloon"), "{said}");
        assert_eq!(size(), 64 << 20);
    }
    let devices = process.info()["podvisor"]["devices"].clone();
    assert_eq!(devices.as_array().unwrap().last().unwrap()["kind"], "balloon");
    for id in ["_balloon0", "__rng"] {
        assert_eq!(
            process.request("PUT", "vm.remove-device", Some(&json!({"id": id}))).0,
            409
        );
    }
    assert_eq!(process.info()["podvisor"]["devices"], devices);
}

#[test]
fn a_pod_without_a_balloon_says_so_and_a_confidential_one_has_none() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(&process, IDLE, &json!({"size": 128 << 20}), &json!({}));
    let (status, said) = process.request("PUT", "vm.resize", Some(&json!({"desired_balloon": 4096})));
    assert!(status == 400 && said.to_string().contains("no balloon"), "{said}");
    process.put("vm.delete", None);
    std::fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    let mut config = process.pod_config("snp-emulated");
    for (section, value) in [
        ("balloon", json!({"size": 0})),
        ("pmem", json!([{"file": process.dir.path(), "size": 2 << 20}])),
    ] {
        config[section] = value;
        for missing in ["disks", "fs"] {
            config.as_object_mut().unwrap().remove(missing);
        }
        process.put("vm.create", Some(&config));
        let (status, said) = process.request("PUT", "vm.boot", None);
        assert!(
            status >= 400 && said.to_string().contains("confidential"),
            "{section}: {said}"
        );
        process.put("vm.delete", None);
        config.as_object_mut().unwrap().remove(section);
    }
    config["memory"] = json!({"size": 0, "zones": [{"id": "a", "size": 512 << 20, "file": "/f"}]});
    let (status, said) = process.request("PUT", "vm.create", Some(&config));
    assert!(status == 400 && said.to_string().contains("confidential"), "{said}");
}

/// The host's free huge pages, in bytes; None if it makes more on demand.
fn free_huge_pages() -> Option<u64> {
    let more = std::fs::read_to_string("/proc/sys/vm/nr_overcommit_hugepages").ok()?;
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    (more.trim() == "0").then_some((field("HugePages_Free:")? * field("Hugepagesize:")?) << 10)
}

#[test]
fn huge_pages_that_the_host_has_not_are_missed_at_the_boot() {
    if !kvm() {
        return;
    }
    let Some(free) = free_huge_pages() else { return };
    let process = Process::start();
    let size = (free + (256 << 20)).next_multiple_of(1 << 30);
    let zone = json!({"id": "a", "size": size, "hugepages": true});
    for memory in [
        json!({"size": size, "hugepages": true}),
        json!({"size": size, "hugepages": true, "shared": true}),
        json!({"size": 0, "zones": [zone]}),
    ] {
        create(&process, IDLE, &memory, &json!({}));
        let (status, said) = process.request("PUT", "vm.boot", None);
        assert!(status >= 400 && said.to_string().contains("memory."), "{status} {said}");
        process.put("vm.delete", None);
    }
}
