//! A sandbox's whole life as each shim lives it: every request of the pod path in its order.

use std::os::fd::AsFd;

use serde_json::json;

use crate::bodies::{self, MEMORY};
use crate::common::kvm;
use crate::sandbox::{Sandbox, Shim, agent, say};
use crate::{go, host, process, rust, strict};

#[test]
fn the_go_shims_sandbox() {
    if !kvm() {
        return;
    }
    let mut sandbox = Sandbox::start(Shim::Go);
    sandbox.pod_guest();
    let shared = sandbox.start_virtiofsd();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    assert_eq!(client.state(), "Created");
    let taps: Vec<_> = (0..2).map_while(host::tap).collect();
    let nets: Vec<_> = taps
        .iter()
        .zip(1..)
        .map(|(tap, n)| (bodies::go_net(n), tap.as_fd()))
        .collect();
    for added in client.add_nets(&nets).unwrap() {
        assert_eq!(added, None);
    }
    client.put("vm.boot", None).unwrap();
    assert_eq!(client.state(), "Running");
    assert_eq!(process::vcpus(sandbox.pid()), [0]);
    let mut stream = agent(Shim::Go, &sandbox.vsock());
    assert!(say(&mut stream, "hello").starts_with("ok version=1 platform=native"));
    if shared {
        // On a segment of its own, where Linux looks and the pod guest does not.
        let devices = client.get("vm.info").unwrap()["podvisor"]["devices"].clone();
        let fs = devices
            .as_array()
            .unwrap()
            .iter()
            .find(|device| device["kind"] == "fs")
            .unwrap();
        assert!(fs["bdf"].as_str().unwrap().starts_with("0001:00:"), "{fs}");
    }
    // The root image is the first block device and cannot be written.
    assert!(say(&mut stream, "blk-info").starts_with("ok sectors=2048 readonly=1"));
    let (id, bdf) = client
        .add("vm.add-disk", &bodies::go_disk(&sandbox.path("volume"), false))
        .unwrap();
    assert!(go::slot_of(&bdf).unwrap() < 32);
    client.put("vm.remove-device", Some(&json!({"id": id}))).unwrap();
    // The health check, and the end.
    client.get("vmm.ping").unwrap();
    client.put("vmm.shutdown", None).unwrap();
    assert_eq!(sandbox.wait().code(), Some(0));
    assert_eq!(client.dialled, 1, "a pooled connection was lost");
}

#[test]
fn the_rust_shims_sandbox() {
    if !kvm() {
        return;
    }
    let mut sandbox = Sandbox::start(Shim::Rust);
    sandbox.pod_guest();
    let shared = sandbox.start_virtiofsd();
    let mut client = sandbox.rust();
    let features = &client.get("vmm.ping").unwrap()["features"];
    assert!(features.as_array().unwrap().iter().all(|f| f.is_string() && f != "tdx"));
    assert_eq!(client.put("vm.create", Some(&bodies::rust_create(&sandbox))), Ok(None));
    if let Some(tap) = host::tap(0) {
        assert_eq!(client.add_net(&bodies::rust_net(1, false), &[tap.as_fd()]), Ok(None));
        // The shim closes its copy when the answer is there.
        drop(tap);
    }
    assert_eq!(client.put("vm.boot", None), Ok(None));
    assert_eq!(process::vcpus(sandbox.pid()), [0]);
    let mut stream = agent(Shim::Rust, &sandbox.vsock());
    assert!(say(&mut stream, "hello").starts_with("ok version=1 platform=native"));
    if shared {
        assert!(say(&mut stream, "fs-read file").starts_with("ok bytes=27"));
    }
    let disk = bodies::rust_disk(&sandbox.path("volume"), false);
    let (id, bdf) = rust::pci_device_info(client.put("vm.add-disk", Some(&disk)).unwrap()).unwrap();
    assert!(go::slot_of(&bdf).unwrap() < 32);
    if let Some(tap) = host::tap(1) {
        let hot = client.add_net(&bodies::rust_net(2, true), &[tap.as_fd()]).unwrap();
        rust::pci_device_info(hot).unwrap();
    }
    assert_eq!(client.put("vm.remove-device", Some(&json!({"id": id}))), Ok(None));
    let info: strict::VmInfo = serde_json::from_value(client.get("vm.info").unwrap()).unwrap();
    assert_eq!(info.state, strict::State::Running);
    assert_eq!(info.config.memory.unwrap().size, MEMORY);
    assert_eq!(info.config.cpus.unwrap().max_phys_bits, 46);
    // No body, and a length that says so.
    assert_eq!(client.put("vmm.shutdown", None), Ok(Some(String::new())));
    sandbox.kill();
    for output in std::mem::take(&mut sandbox.output) {
        output.finish();
    }
}

/// What `vm.info` must tell the Rust shim in every state, and of a configuration with every section that it knows.
#[test]
fn the_rust_shim_reads_vm_info() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    sandbox.idle_guest();
    let mut client = sandbox.rust();
    let mut config = bodies::rust_create(&sandbox);
    config["platform"] = json!({"num_pci_segments": 2});
    client.put("vm.create", Some(&config)).unwrap();
    let read = |client: &mut rust::Client| -> strict::VmInfo {
        serde_json::from_value(client.get("vm.info").unwrap()).unwrap()
    };
    let info = read(&mut client);
    assert_eq!(info.state, strict::State::Created);
    assert_eq!(info.config.platform.unwrap().num_pci_segments, 2);
    if let Some(tap) = host::tap(0) {
        client.add_net(&bodies::rust_net(1, false), &[tap.as_fd()]).unwrap();
        let net = read(&mut client).config.net.unwrap().remove(0);
        // Told back as it came, although nothing is done with it.
        assert_eq!(
            (net.ip.to_string(), net.mask.to_string()),
            ("192.168.249.1".into(), "255.255.255.0".into())
        );
        assert_eq!((net.mac, net.num_queues, net.queue_size), (bodies::mac(1), 2, 256));
    }
    let disk = read(&mut client).config.disks.unwrap().remove(0);
    assert_eq!((disk.num_queues, disk.queue_size), (1, 128));
    assert_eq!(read(&mut client).config.vsock.unwrap().cid, 3);
}
