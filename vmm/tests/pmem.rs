//! Persistent memory in a real pod: the guest sees the file, and the place goes with the device.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{Process, ejecting_guest, kvm, pvh_kernel, wait_for, with_window};
use serde_json::{Value, json};

/// The first place for a file in a pod of one PCI segment: above 4 GiB of BARs from 1 TiB on.
const PLACE: u64 = 0x101_0000_0000;

fn create(process: &Process, code: &[u8], more: &Value) {
    pvh_kernel(&process.path("kernel"), code);
    let mut config = json!({
        "memory": {"size": 128 << 20},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    process.put("vm.create", Some(&config));
}

/// Places in the monitor's address space where `name` is mapped.
fn mappings(process: &Process, name: &str) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.child.id())).unwrap();
    maps.lines()
        .filter(|line| line.ends_with(process.path(name).to_str().unwrap()))
        .count()
}

#[test]
fn the_guest_reads_and_writes_the_file() {
    if !kvm() {
        return;
    }
    for discard in [false, true] {
        let mut process = Process::start();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(process.path("file"))
            .unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(b"R", 0).unwrap();
        let mut guest = with_window(PLACE);
        guest.extend_from_slice(&[
            0xA0, 0x00, 0x00, 0x00, 0x40, // mov al, [0x40000000]
            0x66, 0xBA, 0xF8, 0x03, 0xEE, // mov dx, 0x3f8; out dx, al
            0xC6, 0x05, 0x01, 0x00, 0x00, 0x40, b'W', // mov byte [0x40000001], 'W'
            0x8A, 0x05, 0x01, 0x00, 0x00, 0x40, 0xEE, // mov al, [0x40000001]; out dx, al
            0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, // mov dx, 0x600; mov al, 0x34; out: power off
            0xF4, 0xEB, 0xFD,
        ]);
        let pmem = json!({"pmem": [{"file": process.path("file"), "discard_writes": discard}]});
        create(&process, &guest, &pmem);
        process.put("vm.boot", None);
        assert!(process.wait().success(), "{}", process.log());
        assert_eq!(std::fs::read(process.path("serial")).unwrap(), b"RW");
        let mut two = [0; 2];
        file.read_exact_at(&mut two, 0).unwrap();
        assert_eq!(&two, if discard { b"R\0" } else { b"RW" });
    }
}

#[test]
fn it_comes_and_goes() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    File::create(process.path("file")).unwrap().set_len(4 << 20).unwrap();
    create(&process, &ejecting_guest(), &json!({}));
    let add = |body: Value| process.request("PUT", "vm.add-pmem", Some(&body));
    assert_eq!(add(json!({"file": process.path("file"), "id": "early"})).0, 204);
    process.put("vm.remove-device", Some(&json!({"id": "early"})));
    process.put("vm.boot", None);
    assert_eq!(mappings(&process, "file"), 0);
    let (status, first) = add(json!({"file": process.path("file")}));
    assert_eq!((status, &first["id"]), (200, &json!("_pmem0")), "{first}");
    assert_eq!(mappings(&process, "file"), 1);
    let config = &process.info()["config"]["pmem"];
    assert_eq!(config[0]["file"], json!(process.path("file")));
    let devices = || process.info()["podvisor"]["devices"].clone();
    assert_eq!(devices().as_array().unwrap().last().unwrap()["kind"], "pmem");
    // The file is in use; the directory needs a size, and has one of its own then.
    assert_eq!(add(json!({"file": process.path("file")})).0, 400);
    let (status, said) = add(json!({"file": process.dir.path()}));
    assert!(status == 400 && said.to_string().contains("size"), "{said}");
    let made = add(json!({"file": process.dir.path(), "size": 2 << 20, "id": "made"}));
    assert_eq!(made.0, 200, "{}", made.1);
    process.put("vm.remove-device", Some(&json!({"id": "_pmem0"})));
    wait_for("the place to be free", || {
        (mappings(&process, "file") == 0).then_some(())
    });
    let (status, again) = add(json!({"file": process.path("file"), "discard_writes": true, "size": 2 << 20}));
    assert_eq!((status, &again["bdf"]), (200, &first["bdf"]), "{again}");
    // All of it is there after a reboot.
    process.put("vm.reboot", None);
    assert_eq!(mappings(&process, "file"), 1);
    process.put("vm.shutdown", None);
    assert_eq!(mappings(&process, "file"), 0);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    File::create(process.path("odd")).unwrap().set_len(5000).unwrap();
    create(&process, &ejecting_guest(), &json!({}));
    process.put("vm.boot", None);
    let before = process.info();
    for (body, named) in [
        (json!({"file": process.path("odd")}), "5000"),
        (json!({"file": process.path("odd"), "size": 2 << 20}), "2097152"),
        (json!({"file": process.path("odd"), "size": 4096}), "pmem[0].size"),
        (json!({"file": process.path("none")}), "none"),
        (json!({"file": process.path("odd"), "iommu": true}), "iommu"),
        (json!({"file": process.path("odd"), "pci_segment": 1}), "pci_segment"),
        (json!({"file": process.dir.path(), "size": 1u64 << 43}), "placing it"),
        (json!({"size": 2 << 20}), "file"),
    ] {
        let (status, said) = process.request("PUT", "vm.add-pmem", Some(&body));
        assert!(
            status == 400 && said.to_string().contains(named),
            "{body}: {status} {said}"
        );
    }
    let mut after = process.info();
    after["podvisor"]["monitor_peak_rss_kib"] = before["podvisor"]["monitor_peak_rss_kib"].clone();
    assert_eq!(before, after);
}
