//! The consoles of a real pod in every mode: what it prints arrives, what is typed arrives in it, and whoever reads, stops
//! reading or goes away never holds it up. Also the watchdog and pvpanic, which nobody notices until they are needed.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{PATIENCE, Process, kvm, podvisor, pvh_kernel, wait_for};
use podvisor_api::events::{Event, Source, What};
use podvisor_api::http::Client;
use podvisor_devices::host_console::Pty;
use serde_json::{Value, json};

/// A monitor with these arguments more, and this standard output.
fn start(arguments: &[&str], stdin: Stdio, stdout: Stdio) -> Process {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let child = podvisor(&socket, &dir.path().join("log"))
        .current_dir(dir.path())
        .args(arguments)
        .stdin(stdin)
        .stdout(stdout)
        .spawn()
        .unwrap();
    let process = Process { dir, child, socket };
    wait_for("the API socket", || Client::connect(&process.socket).ok());
    process
}

/// Creates the pod guest with these sections changed.
fn create(process: &Process, sections: &Value) {
    std::fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    process.put("vm.create", Some(&configured(process, sections)));
}

fn configured(process: &Process, sections: &Value) -> Value {
    let mut config = process.pod_config("none");
    let config_map = config.as_object_mut().unwrap();
    config_map.remove("disks");
    config_map.remove("fs");
    config_map.extend(sections.as_object().unwrap().clone());
    config
}

/// Tells the pod guest to do something, and hears that it did.
fn tell(process: &Process, command: &str) -> String {
    process.agent().command(command).unwrap().ok
}

/// Reads until `wanted` has come; returns all that came.
fn read_until(reader: &mut impl Read, wanted: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(wanted.as_bytes()) {
        reader.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn open_terminal(path: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open(path).unwrap()
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// "typed" as the pod guest answers it.
const TYPED: &str = "7479706564";

#[test]
fn pseudo_terminals_are_named_in_vm_info_and_outlive_a_reboot() {
    if !kvm() {
        return;
    }
    let process = start(&[], Stdio::null(), Stdio::null());
    create(
        &process,
        &json!({"serial": {"mode": "Pty"}, "console": {"mode": "Pty"}, "debug_console": {"mode": "Pty"}}),
    );
    let info = process.info();
    let path = |section: &str| info["config"][section]["file"].as_str().unwrap().to_owned();
    let (serial_path, console_path, debug_path) = (path("serial"), path("console"), path("debug_console"));
    assert!(serial_path.starts_with("/dev/pts/") && console_path != serial_path);
    let mut serial = open_terminal(&serial_path);
    process.put("vm.boot", None);
    read_until(&mut serial, "pod: ready\n");

    let mut console = open_terminal(&console_path);
    tell(&process, "console hello_there");
    read_until(&mut console, "hello_there");
    console.write_all(b"typed").unwrap();
    assert_eq!(tell(&process, "console-read 5"), TYPED);
    let mut debug = open_terminal(&debug_path);
    tell(&process, "port 233 debugged");
    read_until(&mut debug, "debugged");
    serial.write_all(b"typed").unwrap();
    assert_eq!(tell(&process, "serial-read 5"), TYPED);

    // Without a reader the pod goes on and its output is lost; the next reader hears what comes then, over a reboot.
    drop((serial, console, debug));
    tell(&process, "port 1016 lost");
    let mut serial = open_terminal(&serial_path);
    tell(&process, "reset");
    assert_eq!(read_until(&mut serial, "pod: ready\n"), "pod: ready\n");
    assert_eq!(process.info()["config"]["serial"]["file"], *serial_path);
    process.put("vm.delete", None);
    // The end of a terminal whose other side is gone is an error or an end; both are one.
    assert!(!matches!(serial.read(&mut [0]), Ok(1..)));
}

#[test]
fn socket_clients_come_and_go_and_the_socket_goes_with_the_pod() {
    if !kvm() {
        return;
    }
    let process = start(&[], Stdio::null(), Stdio::null());
    let (serial_path, console_path) = (process.path("serial"), process.path("console"));
    create(
        &process,
        &json!({
            "serial": {"mode": "Socket", "socket": serial_path},
            "console": {"mode": "Socket", "socket": console_path},
        }),
    );
    let mut serial = connect(&serial_path);
    process.put("vm.boot", None);
    read_until(&mut serial, "pod: ready\n");
    serial.write_all(b"typed").unwrap();
    assert_eq!(tell(&process, "serial-read 5"), TYPED);
    drop(serial);
    tell(&process, "port 1016 lost");
    for word in ["first", "second"] {
        let mut console = connect(&console_path);
        console.write_all(b"typed").unwrap();
        // It has been heard, so it is the client.
        assert_eq!(tell(&process, "console-read 5"), TYPED);
        tell(&process, &format!("console {word}"));
        assert_eq!(read_until(&mut console, word), word);
    }
    let mut serial = connect(&serial_path);
    serial.write_all(b"typed").unwrap();
    assert_eq!(tell(&process, "serial-read 5"), TYPED);
    tell(&process, "reset");
    assert_eq!(read_until(&mut serial, "pod: ready\n"), "pod: ready\n");
    process.put("vm.shutdown", None);
    assert!(serial_path.exists() && console_path.exists());
    process.put("vm.delete", None);
    assert!(!serial_path.exists() && !console_path.exists());
    assert_eq!(serial.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_file_keeps_what_was_printed_before_a_reboot() {
    if !kvm() {
        return;
    }
    let process = start(&[], Stdio::null(), Stdio::null());
    std::fs::write(process.path("serial"), "what another pod left").unwrap();
    create(
        &process,
        &json!({
            "serial": {"mode": "File", "file": process.path("serial")},
            "console": {"mode": "File", "file": process.path("console")},
            "debug_console": {"mode": "File", "file": process.path("debug"), "iobase": 0x402},
        }),
    );
    process.put("vm.boot", None);
    tell(&process, "console virtio");
    tell(&process, "port 1026 debug");
    tell(&process, "port 233 nowhere");
    tell(&process, "reset");
    let read = |name: &str| std::fs::read_to_string(process.path(name)).unwrap();
    let twice = "pod: ready\npod: ready\n";
    wait_for("the second boot", || (read("serial") == twice).then_some(()));
    assert_eq!(
        (read("console"), read("debug")),
        ("virtio".to_owned(), "debug".to_owned())
    );
}

/// A pipe that is full.
fn full_pipe() -> (PipeReader, Stdio) {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut filler = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer)))
        .unwrap();
    while filler.write(&[b'.'; 4096]).is_ok() {}
    (reader, writer.into())
}

#[test]
fn a_full_standard_output_holds_nobody_up() {
    if !kvm() {
        return;
    }
    let (mut reader, stdout) = full_pipe();
    let process = start(&[], Stdio::null(), stdout);
    create(
        &process,
        &json!({"serial": {"mode": "Tty"}, "console": {"mode": "Tty"}}),
    );
    process.put("vm.boot", None);
    tell(&process, "console virtio");
    assert_eq!(process.request("GET", "vmm.ping", None).0, 200);
    // What waited comes, each console's by itself.
    let mut text = Vec::new();
    let mut byte = [0];
    while text.len() < "pod: ready\nvirtio".len() {
        reader.read_exact(&mut byte).unwrap();
        text.extend(byte.iter().filter(|byte| **byte != b'.'));
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("pod: ready\n") && text.contains("virtio"), "{text}");
}

#[test]
fn a_closed_standard_output_and_ended_input_end_nothing() {
    if !kvm() {
        return;
    }
    let (reader, stdout) = std::io::pipe().unwrap();
    let (stdin, mut writer) = std::io::pipe().unwrap();
    drop(reader);
    let process = start(&[], stdin.into(), stdout.into());
    // Both ask for standard input: the serial port has it.
    create(
        &process,
        &json!({"serial": {"mode": "Tty"}, "console": {"mode": "Tty"}}),
    );
    process.put("vm.boot", None);
    writer.write_all(b"typed").unwrap();
    assert_eq!(tell(&process, "serial-read 5"), TYPED);
    drop(writer);
    tell(&process, "console virtio");
    tell(&process, "port 1016 lost");
    assert_eq!(process.info()["state"], "Running");
}

#[test]
fn a_terminal_is_raw_while_the_pod_has_it() {
    if !kvm() {
        return;
    }
    let pty = Pty::open().unwrap();
    let path = pty.path().to_str().unwrap();
    let stty = |word: &str| {
        let output = Command::new("stty").args(["-F", path, word]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let raw = || stty("-a").contains("-icanon");
    let terminal = || Stdio::from(open_terminal(path));
    // Open for all of the test: a terminal nobody has open may forget its settings.
    let _kept = open_terminal(path);
    stty("sane");
    assert!(!raw());
    let mut process = start(&[], terminal(), terminal());
    assert!(!raw(), "not before there is a pod");
    create(&process, &json!({"serial": {"mode": "Tty"}}));
    assert!(raw());
    process.put("vm.boot", None);
    process.put("vm.delete", None);
    assert!(!raw());
    create(&process, &json!({"console": {"mode": "Tty"}}));
    assert!(raw());
    process.put("vmm.shutdown", None);
    process.wait();
    assert!(!raw());
}

#[test]
fn the_guest_is_told_the_terminals_size() {
    if !kvm() {
        return;
    }
    let pty = Pty::open().unwrap();
    let path = pty.path().to_str().unwrap();
    let resize = |columns: &str| {
        let done = Command::new("stty")
            .args(["-F", path, "cols", columns, "rows", "50"])
            .status();
        assert!(done.unwrap().success());
    };
    let terminal = open_terminal(path);
    resize("132");
    let process = start(&[], Stdio::null(), terminal.into());
    create(&process, &json!({"console": {"mode": "Tty"}}));
    process.put("vm.boot", None);
    assert_eq!(tell(&process, "console-size"), "columns=132 rows=50");
    resize("77");
    let pid = process.child.id().to_string();
    assert!(Command::new("kill").args(["-WINCH", &pid]).status().unwrap().success());
    let told = || (tell(&process, "console-size") == "columns=77 rows=50").then_some(());
    wait_for("the new size", told);
}

#[test]
fn what_cannot_be_is_refused_by_name_and_leaves_nothing() {
    if !kvm() {
        return;
    }
    let process = start(&[], Stdio::null(), Stdio::null());
    std::fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    std::fs::write(process.path("plain"), "mine").unwrap();
    let free = process.path("free");
    let refused = |sections: Value, words: [&str; 2]| {
        let (status, said) = process.request("PUT", "vm.create", Some(&configured(&process, &sections)));
        let said = said.to_string();
        assert_eq!(status, 400, "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert_eq!(process.request("GET", "vm.info", None).0, 404);
        assert!(!free.exists(), "{said}");
    };
    let socket = json!({"mode": "Socket", "socket": free});
    refused(
        json!({"serial": socket, "console": {"mode": "File", "file": "/nowhere/at/all"}}),
        ["console.file", "/nowhere/at/all"],
    );
    refused(
        json!({"serial": {"mode": "Socket", "socket": process.path("plain")}}),
        ["serial.socket", "not a socket"],
    );
    refused(
        json!({"serial": socket, "console": {"mode": "Socket", "socket": process.socket}}),
        ["console.socket", "another process listens there"],
    );
    refused(
        json!({"serial": socket, "debug_console": {"mode": "Socket"}}),
        ["debug_console.socket", "mode Socket"],
    );
    assert_eq!(std::fs::read(process.path("plain")).unwrap(), b"mine");
}

fn told(path: &Path) -> Vec<Event> {
    let text = std::fs::read_to_string(path).unwrap();
    text.split_terminator("\n\n")
        .map(|record| serde_json::from_str(record).unwrap())
        .collect()
}

#[test]
fn a_guests_panic_is_told() {
    if !kvm() {
        return;
    }
    let process = start(&["--event-monitor", "path=events"], Stdio::null(), Stdio::null());
    create(&process, &json!({"pvpanic": true}));
    process.put("vm.boot", None);
    assert_eq!(tell(&process, "panic 1"), "known=3");
    assert_eq!(tell(&process, "panic 2"), "known=3");
    let panics: Vec<_> = told(&process.path("events"))
        .into_iter()
        .filter(|event| event.source == Source::Guest)
        .map(|event| (event.event, event.properties.unwrap()["event"].clone()))
        .collect();
    assert_eq!(
        panics,
        [
            (What::Panic, "panic".to_owned()),
            (What::Panic, "crash_loaded".to_owned())
        ]
    );
    let info = process.info();
    assert_eq!(info["state"], "Running");
    let devices = info["podvisor"]["devices"].as_array().unwrap();
    assert!(devices.iter().any(|device| device["kind"] == "pvpanic"), "{devices:?}");
    let (_, counters) = process.request("GET", "vm.counters", None);
    assert_eq!(counters["__pvpanic"], json!({"panics": 1, "crashes": 1}));
}

#[test]
fn a_starved_watchdog_resets_the_pod() {
    if !kvm() {
        return;
    }
    let process = start(&["--event-monitor", "path=events"], Stdio::null(), Stdio::null());
    create(
        &process,
        &json!({"watchdog": true, "serial": {"mode": "File", "file": process.path("serial")}}),
    );
    process.put("vm.boot", None);
    tell(&process, "watchdog");
    let (_, counters) = process.request("GET", "vm.counters", None);
    assert_eq!(counters["__watchdog"]["pings"], 1);
    // The pod guest feeds it no more. The watchdog waits for its 20 seconds, nothing here does so for long.
    let deadline = Instant::now() + PATIENCE + Duration::from_secs(40);
    let rebooted = || {
        let events = told(&process.path("events"));
        events.iter().any(|event| event.event == What::Rebooted)
    };
    while !rebooted() {
        assert!(Instant::now() < deadline, "the watchdog sleeps");
        std::thread::sleep(Duration::from_millis(100));
    }
    let serial = || std::fs::read_to_string(process.path("serial")).unwrap();
    wait_for("the second boot", || {
        (serial() == "pod: ready\npod: ready\n").then_some(())
    });
}

#[test]
fn a_port_that_goes_nowhere_costs_no_descriptor() {
    if !kvm() {
        return;
    }
    let boot = |serial: &str| {
        let process = start(&[], Stdio::null(), Stdio::null());
        pvh_kernel(&process.path("kernel"), common::IDLE);
        let config = json!({
            "memory": {"size": 128 << 20},
            "payload": {"kernel": process.path("kernel")},
            "serial": {"mode": serial},
            "console": {"mode": "Off"},
        });
        process.put("vm.create", Some(&config));
        process.put("vm.boot", None);
        process
    };
    let count = |process: &Process| {
        let path: PathBuf = format!("/proc/{}/fd", process.child.id()).into();
        std::fs::read_dir(path).unwrap().count()
    };
    let (null, off) = (boot("Null"), boot("Off"));
    // The connections of the requests go a little later.
    wait_for("as few descriptors", || (count(&null) == count(&off)).then_some(()));
}
