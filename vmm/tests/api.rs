//! The API as a whole, with a real process: what the table of endpoints promises beyond single handlers.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use common::{HELLO, IDLE, Process, kvm, pvh_kernel, wait_for};
use podvisor_api::http::Client;
use serde_json::{Value, json};

/// Says R on COM1 and halts; an NMI has it say N and power off.
fn waits_for_nmi() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    let mut code = vec![0xBC, 0x00, 0x00, 0x09, 0x00]; // mov esp, 0x90000
    let lgdt = code.len();
    code.extend([0x0F, 0x01, 0x15, 0, 0, 0, 0]); // lgdt [gdtr]
    let lidt = code.len();
    code.extend([0x0F, 0x01, 0x1D, 0, 0, 0, 0]); // lidt [idtr]
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xB0, b'R', 0xEE]); // mov dx, 0x3f8; mov al, 'R'; out dx, al
    code.extend([0xF4, 0xEB, 0xFD]); // hlt; jmp
    let handler = ENTRY + u32::try_from(code.len()).unwrap();
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xB0, b'N', 0xEE]);
    code.extend([0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, 0xF4, 0xEB, 0xFD]); // mov dx, 0x600; mov al, 0x34; out; hlt; jmp
    let mut table = |at: usize, bytes: &[u8]| {
        let limit = u16::try_from(bytes.len() - 1).unwrap();
        let base = ENTRY + u32::try_from(code.len()).unwrap();
        code.extend_from_slice(bytes);
        let register = ENTRY + u32::try_from(code.len()).unwrap();
        code.extend(limit.to_le_bytes());
        code.extend(base.to_le_bytes());
        code.splice(at + 3..at + 7, register.to_le_bytes());
    };
    // A null descriptor and flat 32-bit code.
    table(lgdt, &[0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0, 0, 0x9A, 0xCF, 0]);
    let mut gates = [0; 24];
    let [a, b, c, d] = handler.to_le_bytes();
    // Vector 2: an interrupt gate to the handler, selector 8.
    for (place, byte) in gates.iter_mut().skip(16).zip([a, b, 8, 0, 0, 0x8E, c, d]) {
        *place = byte;
    }
    table(lidt, &gates);
    code
}

fn nmi_pod() -> Process {
    let process = Process::start();
    process.put("vm.create", Some(&pod_config(&process, &waits_for_nmi())));
    process.put("vm.boot", None);
    wait_for("the guest", || (serial(&process) == "R").then_some(()));
    process
}

fn serial(process: &Process) -> String {
    std::fs::read_to_string(process.path("serial")).unwrap()
}

#[test]
fn an_nmi_reaches_a_halted_guest() {
    if !kvm() {
        return;
    }
    let mut process = nmi_pod();
    process.put("vm.nmi", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(serial(&process), "RN");
}

#[test]
fn an_nmi_waits_for_a_paused_guest() {
    if !kvm() {
        return;
    }
    let mut process = nmi_pod();
    process.put("vm.pause", None);
    process.put("vm.nmi", None);
    assert_eq!(process.info()["state"], "Paused");
    assert_eq!(serial(&process), "R");
    process.put("vm.resume", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(serial(&process), "RN");
}

fn pod_config(process: &Process, code: &[u8]) -> Value {
    pvh_kernel(&process.path("kernel"), code);
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 128 << 20, "shared": true},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    })
}

/// A connection on which `request` was sent.
fn send(process: &Process, request: &str, body: &str) -> UnixStream {
    let mut stream = UnixStream::connect(&process.socket).unwrap();
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    let head = format!("PUT /api/v1/{request} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    stream
}

/// The status line's number, once it comes.
fn status(stream: &mut UnixStream) -> String {
    let mut line = [0; 12];
    stream.set_nonblocking(false).unwrap();
    stream.read_exact(&mut line).unwrap();
    String::from_utf8_lossy(&line[9..]).into_owned()
}

fn assert_unanswered(stream: &UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let kind = (&*stream).read(&mut [0]).unwrap_err().kind();
    assert_eq!(kind, ErrorKind::WouldBlock);
}

/// Four clients ping, each more than once, while nothing else is answered.
fn four_clients_ping(process: &Process) {
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(&process.socket).unwrap()).collect();
    for _ in 0..3 {
        for client in &mut clients {
            assert_eq!(client.request("GET", "vmm.ping", None).unwrap().status, 200);
        }
    }
}

#[test]
fn ping_is_answered_while_a_boot_waits_for_another_process() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let daemon = UnixListener::bind(process.path("fs")).unwrap();
    let mut config = pod_config(&process, IDLE);
    config["fs"] = json!([{"tag": "t", "socket": process.path("fs")}]);
    process.put("vm.create", Some(&config));
    let mut boot = send(&process, "vm.boot", "");
    // The monitor has connected and waits for an answer: the boot is under way until this end is dropped.
    let (peer, _) = daemon.accept().unwrap();
    four_clients_ping(&process);
    let mut delete = send(&process, "vm.delete", "");
    four_clients_ping(&process);
    assert_unanswered(&boot);
    assert_unanswered(&delete);
    drop(peer);
    assert_eq!(status(&mut boot), "500");
    assert_eq!(status(&mut delete), "204");
    assert_eq!(process.request("GET", "vm.info", None).0, 404);
}

#[test]
fn ping_is_answered_while_a_device_is_added() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let daemon = UnixListener::bind(process.path("fs")).unwrap();
    process.put("vm.create", Some(&pod_config(&process, IDLE)));
    process.put("vm.boot", None);
    let before = process.info();
    let fs = json!({"tag": "t", "socket": process.path("fs")}).to_string();
    let mut add = send(&process, "vm.add-fs", &fs);
    let (peer, _) = daemon.accept().unwrap();
    four_clients_ping(&process);
    assert_unanswered(&add);
    drop(peer);
    let refused = status(&mut add);
    assert!(refused.starts_with('4') || refused.starts_with('5'), "{refused}");
    let after = process.info();
    assert_eq!(
        (&after["config"], &after["state"]),
        (&before["config"], &before["state"])
    );
}

#[test]
fn a_step_whose_client_has_gone_is_finished_or_undone() {
    if !kvm() {
        return;
    }
    let mut process = Process::start();
    let daemon = UnixListener::bind(process.path("fs")).unwrap();
    let mut config = pod_config(&process, HELLO);
    config["fs"] = json!([{"tag": "t", "socket": process.path("fs")}]);
    process.put("vm.create", Some(&config));
    // Undone: it cannot be finished, and the client that asked has gone.
    let boot = send(&process, "vm.boot", "");
    let (peer, _) = daemon.accept().unwrap();
    drop(boot);
    four_clients_ping(&process);
    drop(peer);
    assert_eq!(process.info()["state"], "Created");
    process.put("vm.delete", None);
    // Finished: the pod runs, says so and ends, and with it the monitor.
    config["fs"] = json!([]);
    process.put("vm.create", Some(&config));
    drop(send(&process, "vm.boot", ""));
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(serial(&process), "OK");
}

#[test]
fn a_pod_with_prefaulted_memory_boots_while_clients_ping() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = pod_config(&process, IDLE);
    config["memory"]["prefault"] = json!(true);
    process.put("vm.create", Some(&config));
    let mut boot = send(&process, "vm.boot", "");
    four_clients_ping(&process);
    assert_eq!(status(&mut boot), "204");
    assert_eq!(process.info()["state"], "Running");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    let names: Vec<_> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .collect();
    assert!(!names.contains(&"api\n".to_owned()), "the helper is left: {names:?}");
}

#[test]
fn top_shows_a_pod_into_a_pipe() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.put("vm.create", Some(&pod_config(&process, IDLE)));
    process.put("vm.boot", None);
    let top = |more: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_podvisor"))
            .args(["top", "--interval", "0.05", "--api-socket"])
            .arg(&process.socket)
            .args(more)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let lines = top(&["--json", "-n", "3"]);
    let samples: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(samples.len(), 3);
    for sample in &samples {
        assert_eq!(sample["state"], "Running");
        assert_eq!(sample["pid"], process.child.id());
        assert_eq!(sample["memory_bytes"], 128 << 20);
        assert_eq!(sample["vcpus"].as_array().unwrap().len(), 1);
        assert!(sample["resident_kib"].as_u64().unwrap() > 0);
        assert!(sample["devices"].as_array().unwrap().iter().any(|d| d["kind"] == "rng"));
    }
    assert!(samples[0]["vcpus"][0]["cpu_percent"].is_null());
    assert!(samples[2]["vcpus"][0]["cpu_percent"].is_number());
    let page = top(&["-n", "1"]);
    assert!(
        page.starts_with(&format!("podvisor {} (", process.child.id())),
        "{page}"
    );
    assert!(
        page.contains("Running") && page.contains("vcpu0") && !page.contains('\x1b'),
        "{page}"
    );
    assert!(page.lines().all(|line| line.chars().count() <= 80), "{page}");
}
