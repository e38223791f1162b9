//! Pitfalls 8, 9, 21, 22 and 24: devices.

use std::os::fd::AsFd;

use serde_json::json;

use crate::bodies;
use crate::common::{IDLE, kvm, wait_for, with_window};
use crate::sandbox::{self, Sandbox, Shim, agent, say};
use crate::{go, host, process, rust};

#[test]
fn pitfall_08_where_a_device_is() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    // Until no slot is left: two digits, all different, each parsed by the shims' rule.
    let mut slots = Vec::new();
    let refused = loop {
        let path = sandbox.path(&format!("volume{}", slots.len()));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        match client.add("vm.add-disk", &bodies::go_disk(&path, false)) {
            Ok((id, bdf)) => {
                assert_eq!(id, format!("_disk{}", slots.len() + 1));
                slots.push(go::slot_of(&bdf).unwrap());
            }
            Err(refused) => break refused,
        }
    };
    assert!(refused.contains("slot"), "{refused}");
    slots.sort_unstable();
    slots.dedup();
    assert!(
        slots.len() >= 24 && slots.iter().all(|slot| (1..32).contains(slot)),
        "{slots:?}"
    );
    client.get("vmm.ping").unwrap();
}

/// A guest that prints the devices that have come, as the hotplug controller shows them (bit n: slot n), once there is
/// one: four bytes, the lowest first. The controller's first register is at 0x401E_F000 of its memory.
fn watching_guest() -> Vec<u8> {
    let mut code = with_window(0x7FF_FFE0_0000);
    code.extend_from_slice(&[
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
        0xA1, 0x00, 0xF0, 0x1E, 0x40, // again: mov eax, [PCIU]
        0x85, 0xC0, 0x74, 0xF7, // test eax, eax; jz again
    ]);
    for _ in 0..4 {
        code.extend_from_slice(&[0xEE, 0xC1, 0xE8, 0x08]); // out dx, al; shr eax, 8
    }
    code.extend_from_slice(IDLE);
    code
}

/// That Linux acts on what the register shows is the nested rig's to say.
#[test]
fn pitfall_09_the_guest_is_shown_a_device_at_once() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.guest(&watching_guest());
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    config["serial"] = json!({"mode": "File", "file": sandbox.path("serial")});
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    let disk = bodies::go_disk(&sandbox.path("volume"), false);
    let (_, bdf) = client.add("vm.add-disk", &disk).unwrap();
    let shown = wait_for("the guest to see the disk", || {
        let shown = std::fs::read(sandbox.path("serial")).ok()?;
        <[u8; 4]>::try_from(shown).ok()
    });
    assert_eq!(u32::from_le_bytes(shown), 1 << go::slot_of(&bdf).unwrap());
}

#[test]
fn pitfall_21_many_monitors_have_one_image_open_for_reading() {
    if !kvm() {
        return;
    }
    let first = Sandbox::start(Shim::Go);
    first.pod_guest();
    let image = first.path("image");
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let pods: Vec<_> = (0..8)
        .map(|n| Sandbox::start(if n % 2 == 0 { Shim::Go } else { Shim::Rust }))
        .collect();
    for pod in &pods {
        let mut client = pod.go();
        let mut config = bodies::create(pod);
        config["payload"]["kernel"] = json!(first.path("kernel"));
        config["disks"][0]["path"] = json!(image);
        client.put("vm.create", Some(&config)).unwrap();
        client.put("vm.boot", None).unwrap();
        let flags = process::open_flags(pod.pid(), &image);
        assert!(
            !flags.is_empty() && flags.iter().all(|f| f & libc::O_ACCMODE == libc::O_RDONLY),
            "{flags:?}"
        );
    }
    let read = |pod: &Sandbox| say(&mut agent(pod.shim, &pod.vsock()), "blk-read 0 2048");
    let expected = read(&pods[0]);
    assert!(expected.starts_with("ok bytes=1048576 sha256="), "{expected}");
    assert!(pods.iter().all(|pod| read(pod) == expected));
}

#[test]
fn pitfall_22_the_monitor_lives_in_the_pods_network_namespace() {
    if !kvm() || !host::privileged() {
        return;
    }
    let Some(tap) = host::tap(0) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut command = sandbox::command(Shim::Rust, dir.path(), true);
    host::in_new_netns(&mut command);
    let sandbox = Sandbox::spawn(Shim::Rust, dir, command);
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    sandbox.pod_guest();
    let mut client = sandbox.rust();
    assert_ne!(namespace(&sandbox.pid().to_string()), namespace("self"));
    // The sockets are files, so that the shim reaches them from its own namespace; the TAP comes from another one.
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    client.add_net(&bodies::rust_net(1, false), &[tap.as_fd()]).unwrap();
    client.put("vm.boot", None).unwrap();
    assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", sandbox.pid())).unwrap();
    assert!(!sockets.contains(" @"), "an abstract socket: {sockets}");
}

#[test]
fn pitfall_24_a_name_that_the_shim_gave_is_taken_as_it_is() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    let name = "drive-3fb9c04e1d7a.2_Root";
    let mut disk = bodies::go_disk(&sandbox.path("volume"), false);
    disk["id"] = json!(name);
    config["disks"].as_array_mut().unwrap().push(disk);
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    assert_eq!(client.get("vm.info").unwrap()["config"]["disks"][1]["id"], name);
    client.put("vm.remove-device", Some(&json!({"id": name}))).unwrap();
    // The device of the Rust shim has no name until the monitor gives it one.
    let mut client = sandbox.rust();
    std::fs::write(sandbox.path("other"), vec![0; 4096]).unwrap();
    let disk = bodies::rust_disk(&sandbox.path("other"), true);
    let (id, _) = rust::pci_device_info(client.put("vm.add-disk", Some(&disk)).unwrap()).unwrap();
    client.put("vm.remove-device", Some(&json!({"id": id}))).unwrap();
}
