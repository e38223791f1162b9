//! Pitfalls 1 to 7, 15, 16, 25 and 26: what is on the wire.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bodies;
use crate::bytes::{Answer, answer, check_frame};
use crate::common::{kvm, wait_for};
use crate::sandbox::{Sandbox, Shim};
use crate::{go, host, process, rust};

/// Writes a request as `shim` does and takes the answer's bytes.
fn exchange(shim: Shim, stream: &mut UnixStream, method: &str, endpoint: &str, body: Option<&Value>) -> Answer {
    match shim {
        Shim::Go => {
            let body = body.map(Value::to_string);
            let text = go::request(method, endpoint, body.as_deref());
            stream.write_all(text.as_bytes()).unwrap();
        }
        Shim::Rust => {
            let body = body.map(|body| serde_json::to_string_pretty(body).unwrap());
            for segment in rust::Client::segments(method, endpoint, body.as_deref()) {
                stream.write_all(segment.as_bytes()).unwrap();
            }
        }
    }
    answer(stream)
}

/// Each request of a pod's life, its body if it has one, and the status that the shims know it by.
fn life(sandbox: &Sandbox) -> Vec<(&'static str, &'static str, Option<Value>, u16)> {
    let disk = match sandbox.shim {
        Shim::Go => bodies::go_disk(&sandbox.path("volume"), false),
        Shim::Rust => bodies::rust_disk(&sandbox.path("volume"), false),
    };
    vec![
        ("GET", "vmm.ping", None, 200),
        ("GET", "vm.info", None, 404),
        ("PUT", "vm.boot", None, 404),
        ("PUT", "vm.create", Some(json!({"payload": 7})), 400),
        ("PUT", "vm.create", Some(bodies::create(sandbox)), 204),
        ("GET", "vm.info", None, 200),
        ("PUT", "vm.boot", None, 204),
        ("GET", "vm.info", None, 200),
        ("PUT", "vm.add-disk", Some(disk), 200),
        ("PUT", "vm.remove-device", Some(json!({"id": "_disk1"})), 204),
        ("PUT", "vm.remove-device", Some(json!({"id": "_disk7"})), 404),
        ("PUT", "vm.pause", None, 204),
        ("PUT", "vm.resume", None, 204),
        ("GET", "vm.nonsense", None, 404),
        ("PUT", "vmm.ping", None, 400),
        ("PUT", "vmm.shutdown", None, 200),
    ]
}

#[test]
fn pitfall_01_and_02_every_frame_and_every_code() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let sandbox = Sandbox::start(shim);
        sandbox.idle_guest();
        let mut stream = sandbox.raw();
        for (method, endpoint, body, status) in life(&sandbox) {
            let answer = exchange(shim, &mut stream, method, endpoint, body.as_ref());
            check_frame(&answer);
            let said = String::from_utf8_lossy(&answer.body);
            assert_eq!(answer.status(), status, "{shim:?} {method} {endpoint}: {said}");
            if status >= 300 {
                // A chain of reasons, each a string.
                let reasons: Vec<String> = serde_json::from_slice(&answer.body).unwrap();
                assert!(!reasons.is_empty(), "{endpoint}");
            }
            if endpoint == "vmm.shutdown" {
                assert!(answer.head.contains("Content-Length: 0\r\n"), "{}", answer.head);
            }
        }
    }
}

/// The Rust shim takes every 256 bytes for text of their own.
#[test]
fn pitfall_01_no_character_is_torn_apart() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    sandbox.idle_guest();
    for before in ["", "x"] {
        let mut client = sandbox.rust();
        let mut config = bodies::rust_create(&sandbox);
        let cmdline = format!("{before}{}", "ü".repeat(400));
        config["payload"]["cmdline"] = json!(cmdline);
        client.put("vm.create", Some(&config)).unwrap();
        assert_eq!(client.get("vm.info").unwrap()["config"]["payload"]["cmdline"], cmdline);
        let disk = bodies::rust_disk(&sandbox.path(&"ü".repeat(100)), true);
        client.put("vm.add-disk", Some(&disk)).unwrap();
        let refused = client.put("vm.boot", None).unwrap_err();
        assert!(refused.starts_with("ServerResponse("), "{refused}");
        client.put("vm.delete", None).unwrap();
    }
}

#[test]
fn pitfall_03_a_connection_lives_as_long_as_its_client_wants() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    let (mut first, mut second) = (sandbox.rust(), sandbox.rust());
    sandbox.idle_guest();
    // One idles while others come and go, in number far above what may be open at once.
    for _ in 0..300 {
        sandbox.rust();
    }
    first.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    first.put("vm.boot", None).unwrap();
    for _ in 0..500 {
        first.get("vmm.ping").unwrap();
    }
    assert_eq!(second.get("vm.info").unwrap()["state"], "Running");
    // Pooled connections, all open and in turn in use.
    let mut pool: Vec<_> = (0..12).map(|_| sandbox.raw()).collect();
    for _ in 0..3 {
        for stream in &mut pool {
            assert_eq!(exchange(Shim::Go, stream, "GET", "vmm.ping", None).status(), 200);
        }
    }
}

#[test]
fn pitfall_04_descriptors_belong_to_the_request_they_came_in() {
    if !kvm() {
        return;
    }
    let (Some(first), Some(second)) = (host::tap(0), host::tap(1)) else {
        return;
    };
    let sandbox = Sandbox::start(Shim::Rust);
    sandbox.idle_guest();
    let mut client = sandbox.rust();
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    // The request stops after its first segment, the descriptor there already. Another client is served meanwhile,
    // whose request has a descriptor of its own.
    let body = bodies::rust_net(1, false).to_string();
    let segments = rust::Client::segments("PUT", "vm.add-net", Some(&body));
    client
        .socket
        .send_with_fds(&[segments[0].as_bytes()], &[first.as_raw_fd()])
        .unwrap();
    let mut other = sandbox.rust();
    other.get("vmm.ping").unwrap();
    assert_eq!(other.add_net(&bodies::rust_net(2, false), &[second.as_fd()]), Ok(None));
    for segment in &segments[1..] {
        client.socket.write_all(segment.as_bytes()).unwrap();
    }
    let mut socket = client.socket.try_clone().unwrap();
    assert_eq!(answer(&mut socket).status(), 204);
    drop((first, second));
    client.put("vm.boot", None).unwrap();
    let nets = client.get("vm.info").unwrap()["config"]["net"].clone();
    assert_eq!(
        (&nets[0]["mac"], &nets[1]["mac"]),
        (&json!(bodies::mac(2)), &json!(bodies::mac(1)))
    );
}

#[test]
fn pitfall_04_descriptors_of_a_request_that_never_ends_are_closed() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    let mut client = sandbox.rust();
    let pipes = || {
        let fds = process::descriptors(sandbox.pid()).into_iter();
        fds.filter(|(_, target)| target.ends_with("image")).count()
    };
    sandbox.idle_guest();
    let file = std::fs::File::open(sandbox.path("image")).unwrap();
    let before = pipes();
    let given_up = sandbox.rust();
    let first = &rust::Client::segments("PUT", "vm.add-net", Some("{}"))[0];
    given_up
        .socket
        .send_with_fds(&[first.as_bytes()], &[file.as_raw_fd(); 3])
        .unwrap();
    wait_for("the descriptors to arrive", || (pipes() == before + 3).then_some(()));
    drop(given_up);
    wait_for("the descriptors to be closed", || (pipes() == before).then_some(()));
    // With a request that takes none, they are closed when it is answered.
    client.call("GET", "vmm.ping", None, &[file.as_fd()]).unwrap();
    client.get("vmm.ping").unwrap();
    assert_eq!(pipes(), before);
}

#[test]
fn pitfall_05_unknown_fields_nulls_and_empty_lists() {
    if !kvm() {
        return;
    }
    // The bodies have image_type Unknown, mrconfigid, disable_io_uring, all of the host's memory to grow by, and two
    // PCI segments. What neither sends today, older and newer shims may.
    for shim in [Shim::Go, Shim::Rust] {
        let sandbox = Sandbox::start(shim);
        sandbox.idle_guest();
        let mut config = bodies::create(&sandbox);
        config["sgx_epc"] = Value::Null;
        config["something_new"] = json!({"of": ["which", 9]});
        config["memory"]["zones"] = Value::Null;
        config["cpus"]["affinity"] = Value::Null;
        config["disks"][0]["something_new"] = json!(true);
        config["numa"] = Value::Null;
        config["net"] = json!([]);
        config["pmem"] = json!([]);
        config["tpm"] = Value::Null;
        let mut client = sandbox.rust();
        assert_eq!(client.put("vm.create", Some(&config)), Ok(None), "{shim:?}");
        assert_eq!(client.put("vm.boot", None), Ok(None), "{shim:?}");
    }
}

#[test]
fn pitfall_06_two_queues_are_one_descriptor_whatever_the_vcpus() {
    if !kvm() {
        return;
    }
    let (Some(cold), Some(hot)) = (host::tap(0), host::tap(1)) else {
        return;
    };
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    config["cpus"]["boot_vcpus"] = json!(4);
    client.put("vm.create", Some(&config)).unwrap();
    client.add_nets(&[(bodies::go_net(1), cold.as_fd())]).unwrap();
    client.put("vm.boot", None).unwrap();
    let added = client.add_nets(&[(bodies::go_net(2), hot.as_fd())]).unwrap();
    assert!(added[0].is_some());
}

#[test]
fn pitfall_07_add_net_has_a_body_only_where_there_is_a_device() {
    if !kvm() {
        return;
    }
    let (Some(cold), Some(hot)) = (host::tap(0), host::tap(1)) else {
        return;
    };
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    let add = |number, tap: &std::fs::File| {
        let mut stream = sandbox.raw();
        let text = go::dumped_request(&bodies::go_net(number).to_string());
        stream.send_with_fds(&[text.as_bytes()], &[tap.as_raw_fd()]).unwrap();
        let answer = answer(&mut stream);
        check_frame(&answer);
        answer
    };
    assert_eq!(add(1, &cold).status(), 204);
    client.put("vm.boot", None).unwrap();
    let added = add(2, &hot);
    assert_eq!(added.status(), 200);
    let info: Value = serde_json::from_slice(&added.body).unwrap();
    go::slot_of(info["bdf"].as_str().unwrap()).unwrap();
    // The shim sends all it has added once more, in order, and takes the answers by their position.
    let nets = [(bodies::go_net(1), cold.as_fd()), (bodies::go_net(2), hot.as_fd())];
    let again = client.add_nets(&nets).unwrap();
    assert_eq!(again[1].as_ref().unwrap().1, info["bdf"].as_str().unwrap());
    go::slot_of(&again[0].as_ref().unwrap().1).unwrap();
}

#[test]
fn pitfall_15_the_names_of_the_states() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    // A pod that was shut down can be booted again, which Cloud Hypervisor calls Created (resources/wire).
    let mut states = Vec::new();
    let body = bodies::go_create(&sandbox);
    for (endpoint, body) in [
        ("vm.create", Some(&body)),
        ("vm.boot", None),
        ("vm.pause", None),
        ("vm.resume", None),
        ("vm.shutdown", None),
    ] {
        client.put(endpoint, body).unwrap();
        states.push(client.state());
    }
    assert_eq!(states, ["Created", "Running", "Paused", "Running", "Created"]);
}

#[test]
fn pitfall_25_a_client_that_gives_up_leaves_the_monitor_whole() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    // In the middle of a request: nothing has happened.
    let create = go::request("PUT", "vm.create", Some(&bodies::go_create(&sandbox).to_string()));
    for cut in [1, 30, create.len() / 2, create.len() - 1] {
        sandbox.raw().write_all(&create.as_bytes()[..cut]).unwrap();
    }
    client.get("vmm.ping").unwrap();
    assert!(client.get("vm.info").unwrap_err().starts_with("404"));
    // After it, without waiting for the answer: it is done all the same.
    sandbox.raw().write_all(create.as_bytes()).unwrap();
    wait_for("the creation", || client.get("vm.info").ok());
    sandbox
        .raw()
        .write_all(go::request("PUT", "vm.boot", None).as_bytes())
        .unwrap();
    wait_for("the boot", || (client.state() == "Running").then_some(()));
    let disk = bodies::go_disk(&sandbox.path("volume"), false).to_string();
    sandbox
        .raw()
        .write_all(go::request("PUT", "vm.add-disk", Some(&disk)).as_bytes())
        .unwrap();
    wait_for("the disk", || {
        let disks = client.get("vm.info").unwrap()["config"]["disks"].clone();
        (disks.as_array().unwrap().len() == 2).then_some(())
    });
    client.put("vm.remove-device", Some(&json!({"id": "_disk1"}))).unwrap();
}

/// Every number in `value` is an integer that Go's int64 holds.
fn check_numbers(path: &str, value: &Value) {
    match value {
        Value::Number(number) => assert!(number.is_i64(), "{path}: {number}"),
        Value::Array(list) => list.iter().for_each(|v| check_numbers(path, v)),
        Value::Object(map) => map.iter().for_each(|(k, v)| check_numbers(&format!("{path}.{k}"), v)),
        _ => {}
    }
}

#[test]
fn pitfall_26_numbers_are_integers_that_go_holds() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let sandbox = Sandbox::start(shim);
        sandbox.idle_guest();
        let mut client = sandbox.go();
        client.put("vm.create", Some(&bodies::create(&sandbox))).unwrap();
        for _ in 0..2 {
            for endpoint in ["vmm.ping", "vm.info"] {
                let mut answer = client.get(endpoint).unwrap();
                // What no shim has a type for.
                answer.as_object_mut().unwrap().remove("podvisor");
                check_numbers(endpoint, &answer);
            }
            client.put("vm.boot", None).unwrap_or_default();
        }
        assert_eq!(client.state(), "Running");
        check_numbers("vm.counters", &client.get("vm.counters").unwrap());
        assert_eq!(client.get("vmm.ping").unwrap()["pid"], sandbox.pid());
    }
}

/// A configuration with a number that no shim could read back is refused, rather than told.
#[test]
fn pitfall_26_what_is_told_back_was_a_go_integer() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    for (section, field) in [("memory", "size"), ("memory", "hotplug_size"), ("vsock", "cid")] {
        let mut config = bodies::go_create(&sandbox);
        config[section][field] = json!(u64::MAX - 0xFFF_FFFF);
        let refused = client.put("vm.create", Some(&config)).unwrap_err();
        assert!(refused.starts_with("400") && refused.contains(field), "{refused}");
    }
}
