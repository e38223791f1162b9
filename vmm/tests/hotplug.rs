//! Devices added to and removed from a pod, before its boot and while it runs.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod common;

use std::fs::File;

use common::{IDLE, Process, ejecting_guest, kvm, pvh_kernel, wait_for};
use serde_json::{Value, json};

fn boot(process: &Process, code: &[u8], more: &Value) {
    pvh_kernel(&process.path("kernel"), code);
    for disk in ["a", "b"] {
        File::create(process.path(disk)).unwrap().set_len(1 << 20).unwrap();
    }
    let mut config = json!({
        "memory": {"size": 128 << 20},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "Null"},
        "console": {"mode": "Off"},
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
}

fn devices(process: &Process) -> Vec<String> {
    let info = process.info();
    let names = info["podvisor"]["devices"].as_array().unwrap();
    names.iter().map(|d| d["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_disk_comes_and_goes() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    boot(&process, &ejecting_guest(), &json!({}));
    let (status, info) = process.request("PUT", "vm.add-disk", Some(&json!({"path": process.path("a")})));
    assert_eq!((status, &info["id"]), (200, &json!("_disk0")), "{info}");
    let bdf = info["bdf"].as_str().unwrap();
    assert!(bdf.starts_with("0000:00:") && bdf.ends_with(".0"), "{bdf}");
    assert_eq!(process.info()["config"]["disks"][0]["id"], "_disk0");
    assert!(devices(&process).contains(&"_disk0".to_owned()));
    // The image is in use: a second writer is refused, and nothing changes.
    let (status, said) = process.request("PUT", "vm.add-disk", Some(&json!({"path": process.path("a")})));
    assert!((400..500).contains(&status), "{status} {said}");
    assert_eq!(process.info()["config"]["disks"].as_array().unwrap().len(), 1);
    // It goes when the guest ejects it, and its slot and its image are free again.
    process.put("vm.remove-device", Some(&json!({"id": "_disk0"})));
    wait_for("the guest to eject the disk", || {
        (!devices(&process).contains(&"_disk0".to_owned())).then_some(())
    });
    let (status, again) = process.request(
        "PUT",
        "vm.add-disk",
        Some(&json!({"path": process.path("a"), "id": "mine"})),
    );
    assert_eq!((status, again["bdf"].as_str()), (200, Some(bdf)), "{again}");
    assert_eq!(
        process
            .request("PUT", "vm.remove-device", Some(&json!({"id": "_disk0"})))
            .0,
        404
    );
}

#[test]
fn an_ejection_that_nobody_asked_for_changes_nothing() {
    if !kvm() {
        return;
    }
    // The guest ejects all slots for ever: mov dword [B0EJ], -1 in the loop of the ejecting guest.
    let mut code = ejecting_guest();
    let start = code.len() - 16;
    code.truncate(start);
    code.extend_from_slice(&[0xC7, 0x05, 0x08, 0xF0, 0x1E, 0x40, 0xFF, 0xFF, 0xFF, 0xFF, 0xEB, 0xF4]);
    let process = Process::start();
    boot(&process, &code, &json!({"disks": []}));
    process.put("vm.add-disk", Some(&json!({"path": process.path("a"), "id": "stays"})));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(devices(&process).contains(&"stays".to_owned()));
    process.put("vm.remove-device", Some(&json!({"id": "stays"})));
    wait_for("the ejection that was asked for", || {
        (!devices(&process).contains(&"stays".to_owned())).then_some(())
    });
}

#[test]
fn names_and_numbers_are_checked() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    boot(&process, IDLE, &json!({"platform": {"num_pci_segments": 2}}));
    let add = |body: Value| process.request("PUT", "vm.add-disk", Some(&body));
    assert_eq!(
        add(json!({"path": process.path("a"), "id": "x", "pci_segment": 1})).1["bdf"],
        "0001:00:01.0"
    );
    assert!((400..500).contains(&add(json!({"path": process.path("b"), "id": "x"})).0));
    assert!(add(json!({"path": process.path("b"), "pci_segment": 2})).0 >= 400);
    assert!((400..500).contains(&add(json!({"path": process.path("none")})).0));
    let vsock = json!({"cid": 3, "socket": process.path("v")});
    assert_eq!(process.request("PUT", "vm.add-vsock", Some(&vsock)).0, 200);
    assert_eq!(process.request("PUT", "vm.add-vsock", Some(&vsock)).0, 409);
    let fs = json!({"tag": "t", "shared_dir": process.dir.path()});
    assert_eq!(process.request("PUT", "vm.add-fs", Some(&fs)).0, 200);
    assert_eq!(process.info()["config"]["disks"].as_array().unwrap().len(), 1);
    // All of it is there after a reboot.
    let before = devices(&process);
    process.put("vm.reboot", None);
    let mut after = devices(&process);
    after.sort();
    let mut before = before;
    before.sort();
    assert_eq!(before, after);
}

#[test]
fn before_the_boot_only_the_configuration_changes() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    process.put(
        "vm.create",
        Some(&json!({"payload": {"kernel": process.path("kernel")}, "console": {"mode": "Off"}})),
    );
    let (status, body) = process.request(
        "PUT",
        "vm.add-disk",
        Some(&json!({"path": process.path("later"), "id": "d"})),
    );
    assert_eq!((status, body), (204, Value::Null));
    process.put("vm.remove-device", Some(&json!({"id": "d"})));
    assert_eq!(
        process.request("PUT", "vm.remove-device", Some(&json!({"id": "d"}))).0,
        404
    );
    assert_eq!(process.request("PUT", "vm.add-disk", Some(&json!({}))).0, 400);
    process.put("vm.boot", None);
}

#[test]
fn a_name_is_free_when_the_guest_has_let_go() {
    if !kvm() {
        return;
    }
    // This guest never ejects.
    let process = Process::start();
    boot(&process, IDLE, &json!({}));
    process.put("vm.add-disk", Some(&json!({"path": process.path("a"), "id": "d"})));
    process.put("vm.remove-device", Some(&json!({"id": "d"})));
    assert_eq!(
        process
            .request(
                "PUT",
                "vm.add-disk",
                Some(&json!({"path": process.path("b"), "id": "d"}))
            )
            .0,
        409
    );
    assert_eq!(
        process
            .request(
                "PUT",
                "vm.add-disk",
                Some(&json!({"path": process.path("b"), "id": "e"}))
            )
            .0,
        200
    );
    // It has not let go: it can be asked again, as Cloud Hypervisor's clients do, and the device is still told of as going.
    process.put("vm.remove-device", Some(&json!({"id": "d"})));
    let info = process.info();
    let states: Vec<_> = info["podvisor"]["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| (d["id"].as_str().unwrap(), d["state"].as_str().unwrap()))
        .filter(|(id, _)| ["d", "e"].contains(id))
        .collect();
    assert_eq!(states, [("d", "removing"), ("e", "configuring")]);
}
