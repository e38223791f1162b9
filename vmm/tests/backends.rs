//! Devices that another process serves over vhost-user: Debian's virtiofsd and QEMU's storage daemon behind the pod
//! guest's drivers, and what is left of the pod when they die.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a failure here is the test's"
)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{IDLE, Process, kvm, pvh_kernel, wait_for};
use podvisor_api::http::Client;
use serde_json::{Value, json};

/// A back end's process; killed on drop.
struct BackEnd(Child);

impl BackEnd {
    /// Runs `command` until it listens on `socket`; None, with a word, if it cannot run here.
    fn start(command: &mut Command, socket: &Path) -> Option<Self> {
        let log = socket.with_extension("log");
        let spawned = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: {command:?}: {error}");
                return None;
            }
        };
        let listens = wait_for("the back end's socket", || match child.try_wait().unwrap() {
            Some(_) => Some(false),
            None => socket.exists().then_some(true),
        });
        if !listens {
            println!("skipped: {command:?}: {}", fs::read_to_string(log).unwrap());
            return None;
        }
        Some(Self(child))
    }

    fn die(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's virtiofsd for `shared`: of its own package (Debian 13), or QEMU's (12), which have other options.
fn virtiofsd(shared: &Path, socket: &Path) -> Option<BackEnd> {
    let (new, old) = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd");
    let shared = shared.display();
    let mut command = Command::new(if Path::new(new).exists() { new } else { old });
    if Path::new(new).exists() {
        command.args(["--sandbox=chroot", &format!("--shared-dir={shared}")]);
    } else {
        command.args(["-f", "-o", "sandbox=chroot", "-o", &format!("source={shared}")]);
    }
    command.arg(format!("--socket-path={}", socket.display()));
    BackEnd::start(&mut command, socket)
}

/// QEMU's storage daemon with `image` as a vhost-user disk of two queues.
fn storage_daemon(image: &Path, socket: &Path) -> Option<BackEnd> {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("driver=file,filename={},node-name=image", image.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=image,addr.type=unix,addr.path={},writable=on,num-queues=2",
            socket.display()
        ));
    BackEnd::start(&mut command, socket)
}

/// A configuration for the pod guest with memory that a back end can map.
fn shared_config(process: &Process) -> Value {
    fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    fs::File::create(process.path("disk"))
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    fs::create_dir(process.path("share")).unwrap();
    fs::write(process.path("share/file"), "contents of the shared file").unwrap();
    let mut config = process.pod_config("none");
    config["memory"]["shared"] = json!(true);
    config
}

fn state(process: &Process, id: &str) -> Option<String> {
    let info = process.info();
    let devices = info["podvisor"]["devices"].as_array().unwrap().clone();
    let device = devices.into_iter().find(|device| device["id"] == id)?;
    Some(device["state"].as_str().unwrap().to_owned())
}

fn ping(process: &Process) {
    assert_eq!(process.request("GET", "vmm.ping", None).0, 200);
}

#[test]
fn the_pod_reads_and_writes_files_through_debians_virtiofsd_and_outlives_it() {
    if !kvm() {
        return;
    }
    let process = Process::start_with(&["--event-monitor", "path=EVENTS"]);
    let mut config = shared_config(&process);
    let socket = process.path("fs.sock");
    let Some(mut back_end) = virtiofsd(&process.path("share"), &socket) else {
        return;
    };
    // As the Rust shim sends it.
    config["fs"] = json!([
        {"tag": "kataShared", "socket": socket, "num_queues": 1, "queue_size": 1024, "id": null, "pci_segment": 0}
    ]);
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
    let mut agent = process.agent();
    assert_eq!(agent.command("fs-read file").unwrap().value("bytes"), Some("27"));
    agent.command("fs-write made 300000 5").unwrap();
    let made = fs::read(process.path("share/made")).unwrap();
    assert_eq!(made, podvisor::demo::pattern::pattern(5, 300_000));
    assert_eq!(agent.command("fs-walk").unwrap().value("files"), Some("2"));
    assert_eq!(state(&process, "_fs1").as_deref(), Some("active"));

    // It ends when its client leaves: a reboot does not.
    for seed in [6, 7] {
        process.put("vm.reboot", None);
        agent = process.agent();
        assert_eq!(agent.command("fs-read made").unwrap().value("bytes"), Some("300000"));
        // Another name each time: QEMU 7.2's aborts where a file is created that is there.
        agent.command(&format!("fs-write made{seed} 300000 {seed}")).unwrap();
        let made = fs::read(process.path(&format!("share/made{seed}"))).unwrap();
        assert_eq!(made, podvisor::demo::pattern::pattern(seed, 300_000));
    }

    back_end.die();
    wait_for("the monitor to notice", || {
        (state(&process, "_fs1")? == "failed").then_some(())
    });
    assert!(process.log().contains("the back end is gone"), "{}", process.log());
    let events = fs::read_to_string(process.path("EVENTS")).unwrap();
    assert!(events.contains("\"failed\""), "{events}");
    // The pod and its other devices go on.
    agent.command("blk-write 8 16 77").unwrap();
    assert_eq!(agent.command("rng 16").unwrap().ok.len(), 32);
    ping(&process);
    // A request that nobody answers holds nobody up.
    let mut other = process.agent();
    let stalled = std::thread::spawn(move || other.command("fs-read file").is_err());
    ping(&process);
    process.put("vm.shutdown", None);
    assert!(stalled.join().unwrap());
    // It is not there to be connected to again.
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert_eq!(status, 500, "{said}");
    assert!(said.to_string().contains("fs.sock"), "{said}");
    ping(&process);
}

#[test]
fn the_pod_reads_and_writes_a_disk_through_qemus_storage_daemon_and_outlives_it() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = shared_config(&process);
    let socket = process.path("blk.sock");
    let Some(mut back_end) = storage_daemon(&process.path("disk"), &socket) else {
        return;
    };
    config["disks"] = json!([{"vhost_user": true, "vhost_socket": socket, "num_queues": 2, "id": "lent"}]);
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
    let mut agent = process.agent();
    assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("8192"));
    agent.command("blk-write 100 600 9").unwrap();
    let read = agent.command("blk-read 100 600").unwrap();
    let image = fs::read(process.path("disk")).unwrap();
    let written = podvisor::demo::pattern::pattern(9, 600 * 512);
    assert!(image.get(100 * 512..700 * 512).unwrap() == written);
    assert_eq!(read.value("bytes"), Some("307200"));
    process.put("vm.reboot", None);
    agent = process.agent();
    assert_eq!(agent.command("blk-read 100 600").unwrap(), read);
    agent.command("blk-write 100 600 10").unwrap();

    back_end.die();
    wait_for("the monitor to notice", || {
        (state(&process, "lent")? == "failed").then_some(())
    });
    assert_eq!(agent.command("fs-read file").unwrap().value("bytes"), Some("27"));
    ping(&process);
}

#[test]
fn a_file_system_is_added_to_a_running_pod_and_one_that_cannot_be_changes_nothing() {
    if !kvm() {
        return;
    }
    for shared in [true, false] {
        let process = Process::start();
        pvh_kernel(&process.path("kernel"), IDLE);
        fs::create_dir(process.path("share")).unwrap();
        process.put(
            "vm.create",
            Some(&json!({
                "memory": {"size": 128 << 20, "shared": shared}, "payload": {"kernel": process.path("kernel")},
                "console": {"mode": "Off"}, "serial": {"mode": "Null"},
            })),
        );
        process.put("vm.boot", None);
        let socket = process.path("fs.sock");
        let before = process.info()["config"].clone();
        let body = json!({"tag": "kataShared", "socket": socket, "num_queues": 1, "queue_size": 1024, "id": "late"});
        let (status, said) = process.request("PUT", "vm.add-fs", Some(&body));
        assert!((400..500).contains(&status), "{status} {said}");
        let word = if shared { "fs.sock" } else { "memory.shared" };
        assert!(said.to_string().contains(word), "{said}");
        assert_eq!(process.info()["config"], before);
        if !shared {
            continue;
        }
        let Some(mut back_end) = virtiofsd(&process.path("share"), &socket) else {
            return;
        };
        let (status, said) = process.request("PUT", "vm.add-fs", Some(&body));
        assert_eq!((status, &said["id"]), (200, &json!("late")), "{said}");
        assert_eq!(state(&process, "late").as_deref(), Some("configuring"));
        // It dies before a driver uses the device.
        back_end.die();
        wait_for("the monitor to notice", || {
            (state(&process, "late")? == "failed").then_some(())
        });
        assert_eq!(
            process.request("GET", "vm.counters", None).1["late"]["back_end_gone"],
            1
        );
    }
}

#[test]
fn a_back_end_that_says_nothing_fails_the_boot_and_not_the_monitor() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = shared_config(&process);
    let socket = process.path("mute.sock");
    let _mute = UnixListener::bind(&socket).unwrap();
    config["fs"] = json!([{"tag": "t", "socket": socket}]);
    process.put("vm.create", Some(&config));
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert_eq!(status, 500);
    assert!(said.to_string().contains("GET_FEATURES"), "{said}");
    assert_eq!(process.info()["state"], "Created");
    assert!(Client::connect(&process.socket).is_ok());
}

/// A network's back end as far as a monitor without a driver hears of it: answers the handshake on `socket` until the
/// monitor is gone, and returns which requests came (QEMU's docs/interop/vhost-user.rst has the numbers).
fn greet(mut socket: UnixStream) -> Vec<u32> {
    let mut requests = Vec::new();
    let mut header = [0; 12];
    while socket.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, size) = (word(0), word(8));
        let mut body = vec![0; size.try_into().unwrap()];
        socket.read_exact(&mut body).unwrap();
        requests.push(request);
        // VIRTIO_F_VERSION_1 and the protocol's features, of which it has MQ; two queues.
        let answer: u64 = match request {
            1 => 1 << 32 | 1 << 30,
            15 => 1,
            17 => 2,
            _ => continue,
        };
        let mut bytes = Vec::new();
        for word in [request, 5, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(answer.to_ne_bytes());
        socket.write_all(&bytes).unwrap();
    }
    requests
}

#[test]
fn a_network_connects_and_is_connected_to() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    let (ours, theirs) = (process.path("ours.sock"), process.path("theirs.sock"));
    let net = |socket: &Path, mode: &str, mac: &str| {
        json!({"vhost_user": true, "vhost_socket": socket, "vhost_mode": mode, "num_queues": 2, "queue_size": 256,
               "mac": mac})
    };
    process.put(
        "vm.create",
        Some(&json!({
            "memory": {"size": 128 << 20, "shared": true}, "payload": {"kernel": process.path("kernel")},
            "console": {"mode": "Off"}, "net": [net(&theirs, "Client", "52:54:00:00:00:01")],
        })),
    );
    let listener = UnixListener::bind(&theirs).unwrap();
    let first = std::thread::spawn(move || greet(listener.accept().unwrap().0));
    process.put("vm.boot", None);
    let path = ours.clone();
    let second =
        std::thread::spawn(move || greet(wait_for("the monitor to listen", || UnixStream::connect(&path).ok())));
    let (status, said) = process.request("PUT", "vm.add-net", Some(&net(&ours, "Server", "52:54:00:00:00:02")));
    assert_eq!((status, &said["id"]), (200, &json!("_net1")), "{said}");
    assert!(!ours.exists());
    for id in ["_net0", "_net1"] {
        assert_eq!(state(&process, id).as_deref(), Some("configuring"));
    }
    // Nobody comes to this one, and the pod goes on.
    let (status, said) = process.request("PUT", "vm.add-net", Some(&net(&ours, "Server", "52:54:00:00:00:03")));
    assert_eq!(status, 400);
    assert!(said.to_string().contains("no back end connects"), "{said}");
    assert_eq!(process.info()["config"]["net"].as_array().unwrap().len(), 2);
    process.put("vm.delete", None);
    for back_end in [first, second] {
        let requests = back_end.join().unwrap();
        // Features, the protocol's, owner, number of queues; the memory is told when there is a driver.
        assert_eq!(requests, [1, 15, 16, 3, 17]);
    }
}
