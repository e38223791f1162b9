//! A sandbox's whole life as each shim lives it: every request of the pod path in its order.

use std::os::fd::AsFd;

use serde_json::{Value, json};

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
    config["balloon"] = json!({"size": 0, "deflate_on_oom": false, "free_page_reporting": true});
    client.put("vm.create", Some(&config)).unwrap();
    let read = |client: &mut rust::Client| -> strict::VmInfo {
        serde_json::from_value(client.get("vm.info").unwrap()).unwrap()
    };
    let info = read(&mut client);
    assert_eq!(info.state, strict::State::Created);
    assert_eq!(info.config.platform.unwrap().num_pci_segments, 2);
    assert_eq!(info.config.balloon.unwrap().size, 0);
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

/// The Go shim of the runtime class kata-cc (a fork's): an IGVM image that carries kernel and command line, the policy's
/// hash, ten PCI segments, no shared memory. It asks for the processor's SNP by one of two names.
#[test]
fn the_confidential_go_shims_sandbox() {
    if !kvm() {
        return;
    }
    let mut sandbox = Sandbox::start(Shim::Go);
    sandbox.pod_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    config["payload"] = json!({"igvm": sandbox.path("kernel"), "host_data": "5a".repeat(32)});
    config["memory"] = json!({"size": MEMORY, "mergeable": false, "hotplug_method": "Acpi", "shared": false,
                              "hugepages": false, "prefault": false, "thp": true});
    config["cpus"]["max_vcpus"] = json!(1);
    config["cpus"]["topology"]["cores_per_die"] = json!(1);
    config["console"]["mode"] = json!("Tty");
    for name in ["sev_snp", "snp"] {
        let mut asked = config.clone();
        asked["platform"] = json!({"num_pci_segments": 10, "tdx": false, name: true});
        // Where there is such a processor, it is another test's.
        match client.put("vm.create", Some(&asked)) {
            Err(refused) => assert!(refused.contains("sev_snp"), "{refused}"),
            Ok(()) => client.put("vm.delete", None).unwrap(),
        }
    }
    config["platform"] = json!({"num_pci_segments": 10, "tdx": false, "isolation": "snp-emulated"});
    client.put("vm.create", Some(&config)).unwrap();
    assert_eq!(client.state(), "Created");
    if let Some(tap) = host::tap(0) {
        client.add_nets(&[(bodies::go_net(1), tap.as_fd())]).unwrap();
    }
    client.put("vm.boot", None).unwrap();
    assert_eq!(client.state(), "Running");
    assert_eq!(process::vcpus(sandbox.pid()), [0]);
    let mut stream = agent(Shim::Go, &sandbox.vsock());
    assert!(say(&mut stream, "hello").starts_with("ok version=1 platform=snp emulated=1"));
    // A volume comes to a confidential pod as to another.
    let (id, bdf) = client
        .add("vm.add-disk", &bodies::go_disk(&sandbox.path("volume"), false))
        .unwrap();
    go::slot_of(&bdf).unwrap();
    client.put("vm.remove-device", Some(&json!({"id": id}))).unwrap();
    client.put("vmm.shutdown", None).unwrap();
    assert_eq!(sandbox.wait().code(), Some(0));
}

/// What a sandbox's annotations and configuration files add to the requests.
#[test]
fn what_else_the_go_shim_sends() {
    if !kvm() {
        return;
    }
    let mut sandbox = Sandbox::start(Shim::Go);
    sandbox.pod_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    // The second disk is the initdata's; only the buckets that are set are told of.
    std::fs::write(sandbox.path("initdata"), vec![0; 4096]).unwrap();
    config["disks"][0]["rate_limiter_config"] =
        json!({"bandwidth": {"size": 64 << 20, "refill_time": 1000, "one_time_burst": 0}});
    config["disks"].as_array_mut().unwrap().push(json!({
        "path": sandbox.path("initdata"), "readonly": true, "vhost_user": false, "num_queues": 1, "queue_size": 1024,
        "image_type": "Raw"}));
    config["balloon"] = json!({"size": 0, "deflate_on_oom": false, "free_page_reporting": true});
    // Debugging a confidential guest: the console, not the serial port.
    config["console"]["mode"] = json!("Tty");
    client.put("vm.create", Some(&config)).unwrap();
    if let Some(tap) = host::tap(0) {
        let mut net = bodies::go_net(1);
        net["rate_limiter_config"] = json!({"ops": {"size": 1000, "refill_time": 1000, "one_time_burst": 0}});
        client.add_nets(&[(net, tap.as_fd())]).unwrap();
    }
    client.put("vm.boot", None).unwrap();
    let devices = client.get("vm.info").unwrap()["podvisor"]["devices"].clone();
    let places: Vec<_> = devices
        .as_array()
        .unwrap()
        .iter()
        .filter(|device| device["kind"] == "disk")
        .collect();
    assert!(
        places[0]["bdf"].as_str().unwrap() < places[1]["bdf"].as_str().unwrap(),
        "{devices}"
    );
    // The root image is the first that the guest finds.
    let mut stream = agent(Shim::Go, &sandbox.vsock());
    assert!(say(&mut stream, "blk-info").starts_with("ok sectors=2048 readonly=1"));
    client.put("vmm.shutdown", None).unwrap();
    assert_eq!(sandbox.wait().code(), Some(0));
}

#[test]
fn what_else_the_rust_shim_sends() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    sandbox.pod_guest();
    let mut client = sandbox.rust();
    let mut config = bodies::rust_create(&sandbox);
    config["cpus"]["nested"] = json!(true);
    // A bucket that is not set is null.
    let bucket = json!({"size": 64 << 20, "refill_time": 1000, "one_time_burst": null});
    config["disks"][0]["rate_limiter_config"] = json!({"bandwidth": bucket, "ops": null});
    config["serial"]["mode"] = json!("Tty");
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    let mut stream = agent(Shim::Rust, &sandbox.vsock());
    assert!(say(&mut stream, "blk-read 0 8").starts_with("ok bytes=4096"));
    let mut disk = bodies::rust_disk(&sandbox.path("volume"), true);
    disk["rate_limiter_config"] =
        json!({"bandwidth": null, "ops": {"size": 100, "refill_time": 1000, "one_time_burst": 5}});
    rust::pci_device_info(client.put("vm.add-disk", Some(&disk)).unwrap()).unwrap();
}

/// The template factory: a pod is saved once, and each sandbox goes on from an edited copy of what was saved.
#[test]
fn a_sandbox_from_a_template() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let template = Sandbox::start(shim);
        template.pod_guest();
        let mut client = template.go();
        let saved = template.path("template");
        std::fs::create_dir(&saved).unwrap();
        // The memory is one zone, in a file beside what will be saved.
        let mut config = bodies::create(&template);
        config["memory"]["size"] = json!(0);
        config["memory"].as_object_mut().unwrap().remove("hotplug_size");
        config["memory"]["zones"] = json!([{"id": "mem0", "size": MEMORY, "file": saved.join("memory"), "shared": true,
                                            "hugepages": false, "prefault": false, "mergeable": false}]);
        client.put("vm.create", Some(&config)).unwrap();
        client.put("vm.boot", None).unwrap();
        assert!(say(&mut agent(shim, &template.vsock()), "hello").starts_with("ok "));
        client.put("vm.pause", None).unwrap();
        let destination = json!({"destination_url": format!("file://{}", saved.display())});
        client.put("vm.snapshot", Some(&destination)).unwrap();
        client.put("vmm.shutdown", None).unwrap();

        let sandbox = Sandbox::start(shim);
        // The sandbox's directory has links to the template's files, and the configuration with its own socket.
        std::os::unix::fs::symlink(saved.join("state.json"), sandbox.path("state.json")).unwrap();
        let text = std::fs::read(saved.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config["vsock"]["socket"] = json!(sandbox.vsock());
        config["memory"]["shared"] = json!(false);
        config["memory"]["zones"][0]["shared"] = json!(false);
        std::fs::write(sandbox.path("config.json"), config.to_string()).unwrap();
        let source = json!({"source_url": format!("file://{}", sandbox.dir.path().display())});
        let mut client = sandbox.rust();
        assert_eq!(client.put("vm.restore", Some(&source)), Ok(None), "{shim:?}");
        let info: strict::VmInfo = serde_json::from_value(client.get("vm.info").unwrap()).unwrap();
        assert_eq!(info.state, strict::State::Paused);
        assert_eq!(client.put("vm.resume", None), Ok(None));
        let vcpus = process::vcpus(sandbox.pid());
        assert_eq!(vcpus, [0]);
        assert!(
            say(&mut agent(shim, &sandbox.vsock()), "hello").starts_with("ok "),
            "{shim:?}"
        );
    }
}

/// A cold-plugged VFIO device and Intel's TDX: refused by name, at once.
#[test]
fn what_podvisor_does_not_do_for_a_shim() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    let device = json!({"path": "/sys/bus/pci/devices/0000:00:1f.0", "iommu": false, "id": "vfio-1f"});
    let mut config = bodies::go_create(&sandbox);
    config["devices"] = json!([device]);
    let refused = client.put("vm.create", Some(&config)).unwrap_err();
    assert!(refused.contains("devices"), "{refused}");
    let mut config = bodies::go_create(&sandbox);
    config["platform"]["tdx"] = json!(true);
    let refused = client.put("vm.create", Some(&config)).unwrap_err();
    assert!(refused.contains("tdx"), "{refused}");
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    let refused = client.add("vm.add-device", &device).unwrap_err();
    assert!(refused.contains("vm.add-device"), "{refused}");
    client.put("vm.boot", None).unwrap();
}
