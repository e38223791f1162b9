//! Pitfalls 10 to 14 and 18 to 20: the process, its threads, its streams and its end.

use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::bodies;
use crate::common::{HELLO, IDLE, kvm, wait_for};
use crate::sandbox::{self, Output, Sandbox, Shim, agent, say};
use crate::{go, host, process};

#[test]
fn pitfall_10_and_11_the_vcpus_are_threads_of_the_child() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let sandbox = Sandbox::start(shim);
        sandbox.pod_guest();
        let mut client = sandbox.go();
        assert_eq!(client.get("vmm.ping").unwrap()["pid"], sandbox.pid());
        let mut config = bodies::create(&sandbox);
        config["cpus"]["boot_vcpus"] = json!(1);
        client.put("vm.create", Some(&config)).unwrap();
        assert!(process::vcpus(sandbox.pid()).is_empty());
        client.put("vm.boot", None).unwrap();
        // They are there when vm.boot is answered.
        assert_eq!(process::vcpus(sandbox.pid()), [0]);
        assert!(say(&mut agent(shim, &sandbox.vsock()), "hello").starts_with("ok "));
        assert_eq!(process::vcpus(sandbox.pid()), [0]);
        assert_eq!(process::children(sandbox.pid()), "");
    }
}

#[test]
fn pitfall_10_as_many_threads_as_vcpus() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    config["cpus"]["boot_vcpus"] = json!(3);
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    assert_eq!(process::vcpus(sandbox.pid()), [0, 1, 2]);
}

#[test]
fn pitfall_12_both_streams_stay_open_and_are_text() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = sandbox::command(Shim::Rust, dir.path(), false);
    command.arg("-vvv");
    let mut sandbox = Sandbox::spawn(Shim::Rust, dir, command);
    sandbox.pod_guest();
    let mut client = sandbox.rust();
    let mut config = bodies::rust_create(&sandbox);
    config["serial"] = json!({"file": null, "mode": "Tty", "iommu": false});
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    // What is no UTF-8 in a request comes to the log, if at all, as text.
    let mut raw = sandbox.raw();
    std::io::Write::write_all(&mut raw, b"PUT /api/v1/vm.\xFF\xFE HTTP/1.1\r\nHost: \xC3\r\n\r\n").unwrap();
    let _ = raw.read(&mut [0; 16]);
    let _ = client.call(
        "PUT",
        "vm.add-disk",
        Some("{\"path\": \"/no/\u{fffd}\\u0007ERRO: x\\n\"}"),
        &[],
    );
    agent(Shim::Rust, &sandbox.vsock());
    wait_for("the pod's last line", || {
        sandbox.output[0]
            .lines()
            .iter()
            .any(|line| line.contains("pod: ready"))
            .then_some(())
    });
    assert!(sandbox.output.iter().all(|output| !output.ended()));
    client.put("vmm.shutdown", None).unwrap();
    sandbox.wait();
    let mut output: Vec<_> = std::mem::take(&mut sandbox.output)
        .into_iter()
        .map(Output::finish)
        .collect();
    // The log is on stderr, each line with a tag that the shim's parser knows.
    let tags = ["TRCE:", "DEBG:", "INFO:", "WARN:", "ERRO:"];
    let log = output.remove(1);
    assert!(!log.is_empty());
    for line in log {
        assert!(tags.iter().any(|tag| line.contains(tag)), "{line}");
    }
}

#[test]
fn pitfall_12_nobody_reads_and_the_monitor_goes_on() {
    if !kvm() {
        return;
    }
    // A pod that prints for ever to a stdout that is never read, and a log that is never read.
    let print = &HELLO[..6];
    let endless = [print, &[0xEE, 0xEB, 0xFD]].concat(); // again: out dx, al; jmp again
    let dir = tempfile::tempdir().unwrap();
    let mut command = sandbox::command(Shim::Rust, dir.path(), false);
    command.arg("-vvv");
    let mut sandbox = Sandbox::spawn(Shim::Rust, dir, command);
    // Readers that stop: the pipes are full soon.
    sandbox.kill();
    let mut command = sandbox::command(Shim::Rust, sandbox.dir.path(), false);
    sandbox.child = command.arg("-vvv").spawn().unwrap();
    let unread = (sandbox.child.stdout.take(), sandbox.child.stderr.take());
    sandbox.guest(&endless);
    let mut client = sandbox.rust();
    let mut config = bodies::rust_create(&sandbox);
    config["serial"] = json!({"file": null, "mode": "Tty", "iommu": false});
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    for _ in 0..2000 {
        client.get("vmm.ping").unwrap();
    }
    client.put("vm.pause", None).unwrap();
    client.put("vm.resume", None).unwrap();
    client.put("vmm.shutdown", None).unwrap();
    assert_eq!(sandbox.wait().code(), Some(0));
    drop(unread);
}

#[test]
fn pitfall_12_a_pseudo_terminal_is_as_good() {
    if !kvm() {
        return;
    }
    let (master, slave) = host::pty();
    let dir = tempfile::tempdir().unwrap();
    let mut command = sandbox::command(Shim::Go, dir.path(), true);
    command
        .stdout(Stdio::from(master.try_clone().unwrap()))
        .stderr(Stdio::from(master));
    let sandbox = Sandbox::spawn(Shim::Go, dir, command);
    let output = Output::read(std::fs::File::from(slave));
    // HELLO's letters and a line end, a hundred times (loop, ECX from 100): the log's lines come in between.
    let (port, letters) = HELLO[..10].split_at(4);
    let line = [letters, &[0xB0, b'\n', 0xEE]].concat();
    sandbox.guest(&[port, &[0xB9, 100, 0, 0, 0], &line, &[0xE2, 0xF5], IDLE].concat());
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    config["serial"]["mode"] = json!("Tty");
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    wait_for("the pod's output", || {
        output.lines().iter().any(|line| line.contains("OK")).then_some(())
    });
}

#[test]
fn pitfall_13_the_answer_to_shutdown_comes_before_the_end() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let mut sandbox = Sandbox::start(shim);
        sandbox.pod_guest();
        let mut client = sandbox.go();
        client.put("vm.create", Some(&bodies::create(&sandbox))).unwrap();
        client.put("vm.boot", None).unwrap();
        agent(shim, &sandbox.vsock());
        match shim {
            Shim::Go => client.put("vmm.shutdown", None).unwrap(),
            Shim::Rust => assert_eq!(sandbox.rust().put("vmm.shutdown", None), Ok(Some(String::new()))),
        }
        assert_eq!(sandbox.wait().code(), Some(0));
        assert!(!sandbox.api().exists() && !sandbox.vsock().exists());
    }
}

#[test]
fn pitfall_13_sigkill_leaves_nothing_in_the_way() {
    if !kvm() {
        return;
    }
    let tap = host::tap(0);
    let mut sandbox = Sandbox::start(Shim::Rust);
    sandbox.pod_guest();
    for _ in 0..3 {
        let mut client = sandbox.rust();
        let mut config = bodies::rust_create(&sandbox);
        let volume = bodies::rust_disk(&sandbox.path("volume"), false);
        config["disks"].as_array_mut().unwrap().push(volume);
        client.put("vm.create", Some(&config)).unwrap();
        if let Some(tap) = &tap {
            let taps = [std::os::fd::AsFd::as_fd(tap)];
            client.add_net(&bodies::rust_net(1, false), &taps).unwrap();
        }
        client.put("vm.boot", None).unwrap();
        assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
        // The Rust shim does not wait between the answer and the signal.
        client.put("vmm.shutdown", None).unwrap();
        sandbox.kill();
        sandbox.start_again();
    }
    // Killed while it boots, wherever that is then.
    for _ in 0..5 {
        let mut client = sandbox.rust();
        client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
        client.write("PUT", "vm.boot", None, &[]);
        sandbox.kill();
        sandbox.start_again();
    }
    // Killed in the middle of a pod's life, its sockets still there. The shim removes the API's, not the vsock's.
    let mut client = sandbox.rust();
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    sandbox.kill();
    assert!(sandbox.api().exists() && sandbox.vsock().exists());
    sandbox.start_again();
    let mut client = sandbox.rust();
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
}

#[test]
fn pitfall_14_the_health_check_is_answered_beside_a_boot_and_a_hotplug() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.pod_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let checks = scope.spawn(|| {
            let mut monitor = go::Client::new(&sandbox.api());
            let mut answered = 0;
            while !over.load(std::sync::atomic::Ordering::Acquire) || answered == 0 {
                monitor.get("vmm.ping").unwrap();
                answered += 1;
            }
            monitor.dialled
        });
        client.put("vm.boot", None).unwrap();
        let (id, _) = client
            .add("vm.add-disk", &bodies::go_disk(&sandbox.path("volume"), true))
            .unwrap();
        client.put("vm.remove-device", Some(&json!({"id": id}))).unwrap();
        over.store(true, std::sync::atomic::Ordering::Release);
        assert_eq!(checks.join().unwrap(), 1);
    });
}

#[test]
fn pitfall_18_a_reset_starts_the_pod_again_in_the_same_monitor() {
    if !kvm() {
        return;
    }
    let mut sandbox = Sandbox::start(Shim::Rust);
    sandbox.pod_guest();
    let mut client = sandbox.rust();
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    let mut stream = agent(Shim::Rust, &sandbox.vsock());
    assert_eq!(say(&mut stream, "reset"), "ok");
    // The stream to the agent that was ends, which is how the shim's next health check fails.
    wait_for("the end of the old stream", || {
        let mut byte = [0];
        matches!(stream.read(&mut byte), Ok(0) | Err(_)).then_some(())
    });
    assert_eq!(client.get("vm.info").unwrap()["state"], "Running");
    assert!(sandbox.output.iter().all(|output| !output.ended()));
    wait_for("the new agent", || {
        let mut stream = sandbox::dial(Shim::Rust, &sandbox.vsock(), 1024)?;
        std::io::Write::write_all(stream.get_mut(), b"poweroff\n").ok()?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stream, &mut line).ok()?;
        (line == "ok\n").then_some(())
    });
    // A power-off is the monitor's end.
    assert_eq!(sandbox.wait().code(), Some(0));
    for output in std::mem::take(&mut sandbox.output) {
        output.finish();
    }
}

#[test]
fn pitfall_19_the_shims_command_lines() {
    if !kvm() {
        return;
    }
    let variants: [&[&str]; 6] = [
        &[],
        &["-v"],
        &["-vv"],
        &["-vvv"],
        &["--seccomp", "false"],
        &["-v", "--seccomp", "false"],
    ];
    for arguments in variants {
        let dir = tempfile::tempdir().unwrap();
        let mut command = sandbox::command(Shim::Go, dir.path(), false);
        command.args(arguments);
        let mut sandbox = Sandbox::spawn(Shim::Go, dir, command);
        // It waits for the API, and needs nothing else.
        let mut client = sandbox.go();
        assert!(client.get("vm.info").unwrap_err().starts_with("404"), "{arguments:?}");
        sandbox.pod_guest();
        client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
        client.put("vm.boot", None).unwrap();
        assert!(say(&mut agent(Shim::Go, &sandbox.vsock()), "hello").starts_with("ok "));
        client.put("vmm.shutdown", None).unwrap();
        assert_eq!(sandbox.wait().code(), Some(0), "{arguments:?}");
    }
}

/// The Go shim refuses longer paths itself (a socket's address has 108 bytes, one of which ends it).
#[test]
fn pitfall_19_sockets_of_the_longest_path() {
    if !kvm() {
        return;
    }
    let outer = tempfile::tempdir().unwrap();
    let pad = 106 - outer.path().as_os_str().len() - "/clh-api.sock".len();
    let dir = tempfile::Builder::new()
        .prefix(&"d".repeat(pad - 6))
        .rand_bytes(6)
        .tempdir_in(outer.path())
        .unwrap();
    let command = sandbox::command(Shim::Go, dir.path(), false);
    let sandbox = Sandbox::spawn(Shim::Go, dir, command);
    assert_eq!(sandbox.api().as_os_str().len(), 107);
    sandbox.pod_guest();
    let mut client = sandbox.go();
    let mut config = bodies::go_create(&sandbox);
    let vsock = sandbox.path("vsock-12.soc");
    assert_eq!(vsock.as_os_str().len(), 107);
    config["vsock"]["socket"] = json!(vsock);
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    let mut stream = agent(Shim::Go, &vsock);
    // The pod's own connections would go to a path that no socket can have: they fail, and nothing else.
    assert!(say(&mut stream, "dial 5000 10 1").starts_with("err "));
    assert!(say(&mut stream, "hello").starts_with("ok "));
}

#[test]
fn pitfall_20_sockets_are_their_owners_alone() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // A shim's own umask may be anything.
    let program = sandbox::command(Shim::Go, dir.path(), false);
    let mut command = Command::new("sh");
    command
        .args(["-c", "umask 0; exec \"$@\"", "sh"])
        .arg(program.get_program())
        .args(program.get_args());
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let sandbox = Sandbox::spawn(Shim::Go, dir, command);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    for socket in [sandbox.api(), sandbox.vsock()] {
        let metadata = std::fs::metadata(&socket).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o077, 0, "{}", socket.display());
    }
}

#[test]
fn pitfall_20_a_rootless_sandbox_with_one_directory_to_write_to() {
    const USER: u32 = 64321;
    if !kvm() || !host::privileged() {
        return;
    }
    // The images are root's and readable, the sandbox's directory is the user's, everything else is closed to it.
    let images = tempfile::tempdir().unwrap();
    std::fs::set_permissions(images.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let node = images.path().join("kvm");
    if host::kvm_node(&node).is_err() || std::fs::File::open(&node).is_err() {
        println!("skipped: no device nodes can be made here");
        return;
    }
    let program = images.path().join("podvisor");
    // By another process: a descriptor that writes to it must not be inherited by what this one starts meanwhile.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_podvisor"))
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(USER), Some(USER)).unwrap();
    let template = sandbox::command(Shim::Rust, dir.path(), true);
    let mut command = Command::new(program);
    command.args(template.get_args()).current_dir("/");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    host::as_user(&mut command, USER, &node);
    let mut sandbox = Sandbox::spawn(Shim::Rust, dir, command);
    sandbox.pod_guest();
    let mut config = bodies::rust_create(&sandbox);
    for (section, name) in [("/payload/kernel", "kernel"), ("/disks/0/path", "image")] {
        let path = images.path().join(name);
        std::fs::copy(sandbox.path(name), &path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
        *config.pointer_mut(section).unwrap() = json!(path);
    }
    let mut client = sandbox.rust();
    let status = std::fs::read_to_string(format!("/proc/{}/status", sandbox.pid())).unwrap();
    assert!(status.contains(&format!("Uid:\t{USER}\t{USER}")), "{status}");
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
    client.put("vmm.shutdown", None).unwrap();
    assert_eq!(sandbox.wait().code(), Some(0));
}
