//! Network devices whose TAP queues come as descriptors beside the request, as both Kata shims send them.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]
#![expect(unsafe_code, reason = "a TAP interface is made by an ioctl")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use common::{IDLE, Process, kvm, pvh_kernel};
use podvisor_api::http::Client;
use serde_json::{Value, json};

/// A TAP queue as a shim hands it over: set up, with the virtio header (Linux `if_tun.h`).
fn tap(name: &str) -> Option<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
    const IFF_TAP_NO_PI_VNET_HDR: i16 = 0x0002 | 0x1000 | 0x4000;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    let mut request = [0u8; 40];
    for (to, from) in request.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    for (to, from) in request.iter_mut().skip(16).zip(IFF_TAP_NO_PI_VNET_HDR.to_ne_bytes()) {
        *to = from;
    }
    // SAFETY: `request` has the size of struct ifreq and lives over the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } == 0;
    done.then_some(file)
}

fn add(process: &Process, body: &Value, taps: &[&File]) -> (u16, Value) {
    send(process, "vm.add-net", body, taps)
}

fn send(process: &Process, endpoint: &str, body: &Value, taps: &[&File]) -> (u16, Value) {
    let mut client = Client::connect(&process.socket).unwrap();
    let fds: Vec<_> = taps.iter().map(|tap| tap.as_raw_fd()).collect();
    let reply = client
        .request_with_files("PUT", endpoint, Some(body.to_string().as_bytes()), &fds)
        .unwrap();
    (reply.status, serde_json::from_slice(&reply.body).unwrap_or(Value::Null))
}

/// What the Go shim sends; it never tells of the descriptors in the body.
fn go_body(mac: &str) -> Value {
    json!({"ip": "192.168.249.1", "mask": "255.255.255.0", "mac": mac, "iommu": false, "num_queues": 2,
           "queue_size": 256, "vhost_user": false, "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true,
           "offload_csum": true})
}

#[test]
fn taps_come_as_descriptors_before_the_boot_and_after_it() {
    if !kvm() {
        return;
    }
    let name = |n: u32| format!("pvt{}x{n}", std::process::id() % 100_000);
    let (Some(first), Some(second)) = (tap(&name(0)), tap(&name(1))) else {
        println!("skipped: no TAP interface can be made here");
        return;
    };
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    process.put(
        "vm.create",
        Some(&json!({"payload": {"kernel": process.path("kernel")}, "console": {"mode": "Off"}})),
    );
    let mac = "52:54:00:00:00:01";
    // The numbers that a client writes into `fds` mean nothing.
    let mut body = go_body(mac);
    body["fds"] = json!([77]);
    // A number of descriptors that cannot be is refused here, not at the boot.
    let (status, said) = add(&process, &body, &[&first, &second]);
    assert_eq!(status, 400, "{said}");
    assert!(
        said.to_string().contains("net.num_queues: 2 queues and 2 descriptors"),
        "{said}"
    );
    assert!(process.info()["config"]["net"].is_null());
    assert_eq!(add(&process, &body, &[&first]), (204, Value::Null));
    process.put("vm.boot", None);
    assert_eq!(process.info()["config"]["net"][0]["ip"], "192.168.249.1");
    // A pair of queues needs one descriptor.
    let (status, said) = add(&process, &go_body("52:54:00:00:00:03"), &[&first, &second]);
    assert!((400..500).contains(&status), "{status} {said}");
    let (status, hot) = add(&process, &go_body("52:54:00:00:00:02"), &[&second]);
    assert_eq!((status, &hot["id"]), (200, &json!("_net1")), "{hot}");
    // The Go shim sends what it has added before once more, and takes the answers by their order.
    assert_eq!(
        add(&process, &go_body("52:54:00:00:00:02"), &[&second]),
        (200, hot.clone())
    );
    assert_eq!(process.info()["config"]["net"].as_array().unwrap().len(), 2);
    // A reboot has the same descriptors again.
    process.put("vm.reboot", None);
    let devices = process.info()["podvisor"]["devices"].to_string();
    assert!(devices.contains("_net0") && devices.contains("_net1"), "{devices}");
    process.put("vm.remove-device", Some(&json!({"id": "_net1"})));
}

#[test]
fn the_command_line_takes_inherited_queues() {
    if !kvm() {
        return;
    }
    let name = format!("pvt{}c", std::process::id() % 100_000);
    let Some(queue) = tap(&name) else {
        println!("skipped: no TAP interface can be made here");
        return;
    };
    // SAFETY: the descriptor is open; no pointers.
    assert_eq!(unsafe { libc::fcntl(queue.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    pvh_kernel(&kernel, IDLE);
    let fd = queue.as_raw_fd();
    let kernel = kernel.to_str().unwrap();
    let (net, wrong) = (
        format!("fd={fd},mac=52:54:00:00:00:07"),
        format!("fd={fd},num_queues=4"),
    );
    let pod = ["--kernel", kernel, "--console", "off", "--net"];
    let process = Process::start_with(&[&pod[..], &[&net]].concat());
    let info = common::wait_for("the pod to run", || {
        let (status, info) = process.request("GET", "vm.info", None);
        (status == 200 && info["state"] == "Running").then_some(info)
    });
    assert_eq!(info["config"]["net"][0]["mac"], "52:54:00:00:00:07");
    // It is that very queue: a reboot has it again.
    process.put("vm.reboot", None);
    assert!(process.info()["podvisor"]["devices"].to_string().contains("_net0"));

    // What is no TAP queue, or too few of them, is said before anything is made.
    for (net, word) in [
        (&wrong, "4 queues and 1 descriptors"),
        (&"fd=999".to_owned(), "--net fd=999"),
    ] {
        let output = common::podvisor(&dir.path().join("api"), &dir.path().join("log"))
            .args(pod)
            .arg(net)
            .status()
            .unwrap();
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(!output.success() && log.contains(word), "{log}");
    }
}

#[test]
fn a_descriptor_that_is_no_tap_and_a_bad_mac_are_refused() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    process.put(
        "vm.create",
        Some(&json!({"payload": {"kernel": process.path("kernel")}, "console": {"mode": "Off"}})),
    );
    process.put("vm.boot", None);
    let null = File::open("/dev/null").unwrap();
    let (status, said) = add(&process, &go_body("52:54:00:00:00:02"), &[&null]);
    assert!((400..500).contains(&status), "{status} {said}");
    let (status, said) = add(&process, &go_body("52:54"), &[&null]);
    assert!(
        (400..500).contains(&status) && said.to_string().contains("mac"),
        "{status} {said}"
    );
    assert!(process.info()["config"]["net"].as_array().is_none_or(Vec::is_empty));
}

#[test]
fn a_restored_pod_is_given_its_descriptors_anew() {
    if !kvm() {
        return;
    }
    let name = |n: u32| format!("pvr{}x{n}", std::process::id() % 100_000);
    let (Some(first), Some(second)) = (tap(&name(0)), tap(&name(1))) else {
        println!("skipped: no TAP interface can be made here");
        return;
    };
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    process.put(
        "vm.create",
        Some(&json!({"payload": {"kernel": process.path("kernel")}, "console": {"mode": "Off"}})),
    );
    process.put("vm.boot", None);
    let (status, added) = add(&process, &go_body("52:54:00:00:00:02"), &[&first]);
    assert_eq!(status, 200, "{added}");
    let directory = process.path("snapshot");
    std::fs::create_dir(&directory).unwrap();
    let url = format!("file://{}", directory.display());
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&json!({"destination_url": url})));
    let devices = process.info()["podvisor"]["devices"].clone();

    let other = Process::start();
    let net = |count: usize| json!([{"id": "_net0", "num_fds": count, "fds": [-1]}]);
    let cases = [
        (json!({"source_url": url}), vec![], "_net0"),
        (json!({"source_url": url, "net_fds": net(2)}), vec![&second], "num_fds"),
        (json!({"source_url": url, "net_fds": net(0)}), vec![], "num_fds"),
        (json!({"source_url": url}), vec![&second], "net_fds"),
        (
            json!({"source_url": url, "net_fds": [{"id": "eth0", "num_fds": 1}]}),
            vec![&second],
            "eth0",
        ),
    ];
    for (body, taps, word) in cases {
        let (status, said) = send(&other, "vm.restore", &body, &taps);
        assert_eq!(status, 400, "{body}: {said}");
        assert!(said.to_string().contains(word), "{body}: {said}");
        assert_eq!(other.request("GET", "vm.info", None).0, 404);
    }
    // All memory at once, as an older client may ask.
    let body = json!({"source_url": url, "net_fds": net(1), "memory_restore_mode": "Copy", "prefault": true});
    assert_eq!(send(&other, "vm.restore", &body, &[&second]), (204, Value::Null));
    assert_eq!(other.info()["podvisor"]["devices"], devices);
    assert_eq!(other.info()["state"], "Paused");
    other.put("vm.resume", None);
}
