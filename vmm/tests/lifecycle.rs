//! The monitor as a process: its socket, its signals, its exit codes, what it refuses.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::process::{Command, Stdio};

use common::{HELLO, IDLE, Process, kvm, podvisor, pvh_kernel, wait_for};
use podvisor_api::http::Client;
use serde_json::{Value, json};

fn signal(process: &Process, name: &str) {
    let status = Command::new("kill")
        .args([name, &process.child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn config(process: &Process, code: &[u8]) -> Value {
    pvh_kernel(&process.path("kernel"), code);
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 128 << 20},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    })
}

#[test]
fn a_pod_prints_and_powers_off() {
    if !kvm() {
        return;
    }
    let mut process = Process::start();
    process.put("vm.create", Some(&config(&process, HELLO)));
    assert_eq!(process.info()["state"], "Created");
    process.put("vm.boot", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(std::fs::read_to_string(process.path("serial")).unwrap(), "OK");
    assert!(!process.socket.exists(), "the socket is left");
}

#[test]
fn the_command_line_boots_a_pod() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    pvh_kernel(&dir.path().join("kernel"), HELLO);
    let out = Command::new(env!("CARGO_BIN_EXE_podvisor"))
        .arg("--kernel")
        .arg(dir.path().join("kernel"))
        .args([
            "--cpus",
            "boot=1",
            "--memory",
            "size=128M",
            "--serial",
            "tty",
            "--console",
            "off",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        (out.status.code(), String::from_utf8_lossy(&out.stdout).as_ref()),
        (Some(0), "OK")
    );
}

#[test]
fn vcpu_threads_carry_their_names() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = config(&process, IDLE);
    config["cpus"] = json!({"boot_vcpus": 2, "max_vcpus": 2});
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
    let tasks = format!("/proc/{}/task", process.child.id());
    let mut names: Vec<_> = std::fs::read_dir(tasks)
        .unwrap()
        .map(|task| {
            std::fs::read_to_string(task.unwrap().path().join("comm"))
                .unwrap()
                .trim()
                .to_owned()
        })
        .filter(|name| name.starts_with("vcpu"))
        .collect();
    names.sort();
    assert_eq!(names, ["vcpu0", "vcpu1"]);
}

#[test]
fn a_second_monitor_on_the_same_socket_refuses_and_the_first_goes_on() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let log = process.path("second.log");
    let status = podvisor(&process.socket, &log).status().unwrap();
    let said = std::fs::read_to_string(log).unwrap();
    assert!(!status.success());
    assert!(said.contains(process.socket.to_str().unwrap()), "{said}");
    assert_eq!(process.request("GET", "vmm.ping", None).0, 200);
}

#[test]
fn a_killed_monitor_does_not_block_the_next() {
    if !kvm() {
        return;
    }
    // Killed before, during and after a pod's life, without a wait for anything between.
    for boots in [false, true] {
        let mut process = Process::start();
        if boots {
            process.put("vm.create", Some(&config(&process, IDLE)));
            process.put("vm.boot", None);
        }
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        assert!(process.socket.exists(), "SIGKILL leaves the socket file");
        process.child = podvisor(&process.socket, &process.path("log")).spawn().unwrap();
        let answered = wait_for("the next monitor", || {
            let mut client = Client::connect(&process.socket).ok()?;
            client.request("GET", "vmm.ping", None).ok()
        });
        assert_eq!(answered.status, 200);
    }
}

#[test]
fn sigterm_ends_it_in_order_with_and_without_a_pod() {
    if !kvm() {
        return;
    }
    for boots in [false, true] {
        let mut process = Process::start();
        if boots {
            let mut config = config(&process, IDLE);
            config["vsock"] = json!({"cid": 3, "socket": process.path("vsock")});
            process.put("vm.create", Some(&config));
            process.put("vm.boot", None);
            assert!(process.path("vsock").exists());
        }
        signal(&process, "-TERM");
        assert_eq!(process.wait().code(), Some(0), "{}", process.log());
        assert!(!process.socket.exists() && !process.path("vsock").exists());
        let lock = process.dir.path().join("api.lock");
        assert!(!lock.exists() || std::fs::File::open(lock).unwrap().try_lock().is_ok());
    }
}

#[test]
fn the_answer_to_vmm_shutdown_arrives_before_the_end() {
    if !kvm() {
        return;
    }
    let mut process = Process::start();
    process.put("vm.create", Some(&config(&process, IDLE)));
    process.put("vm.boot", None);
    assert_eq!(process.request("PUT", "vmm.shutdown", None).0, 200);
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn what_is_refused_names_its_field_and_changes_nothing() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let good = config(&process, IDLE);
    let cases = [
        (
            json!({"pod": {"handler": "kata-cc"}, "memory": {"size": 1u64 << 30}}),
            "memory.size",
        ),
        (json!({"pod": {"handler": "runc"}}), "handler"),
        (
            json!({"pod": {"handler": "kata", "requests": {"memory": "1Gi"}}}),
            "requests",
        ),
        (json!({"memory": {"size": 1u64 << 50}}), "memory.size"),
        (json!({"platform": {"sev_snp": true}}), "sev_snp"),
        (json!({"payload": {"host_data": "abcd"}}), "host_data"),
        (json!({"serial": {"mode": "File", "file": null}}), "serial"),
        (json!({"cpus": {"boot_vcpus": 0, "max_vcpus": 1}}), "boot_vcpus"),
    ];
    for (change, field) in cases {
        let mut config = good.clone();
        for (key, value) in change.as_object().unwrap() {
            if key == "pod" && change.get("memory").is_none() {
                config.as_object_mut().unwrap().remove("memory");
                config.as_object_mut().unwrap().remove("cpus");
            }
            match (config.get_mut(key).and_then(Value::as_object_mut), value.as_object()) {
                (Some(into), Some(from)) => into.extend(from.clone()),
                _ => config[key] = value.clone(),
            }
        }
        let (status, said) = process.request("PUT", "vm.create", Some(&config));
        assert!((400..500).contains(&status), "{change}: {status} {said}");
        assert!(said.to_string().contains(field), "{change}: {said}");
        assert_eq!(process.request("GET", "vm.info", None).0, 404, "{change}");
    }
    process.put("vm.create", Some(&good));
}

#[test]
fn a_failed_boot_leaves_the_pod_created() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let config = config(&process, IDLE);
    process.put("vm.create", Some(&config));
    std::fs::write(process.path("kernel"), "no kernel").unwrap();
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert!(status >= 400, "{said}");
    assert!(said.to_string().contains("kernel"), "{said}");
    assert_eq!(process.info()["state"], "Created");
    pvh_kernel(&process.path("kernel"), IDLE);
    process.put("vm.boot", None);
    assert_eq!(process.info()["state"], "Running");
}

#[test]
fn the_pods_limits_size_it() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = config(&process, IDLE);
    config.as_object_mut().unwrap().remove("memory");
    config.as_object_mut().unwrap().remove("cpus");
    config["pod"] = json!({"handler": "kata-cc", "memory_limit": "512Mi", "cpu_limit": "1500m"});
    process.put("vm.create", Some(&config));
    let info = process.info();
    assert_eq!(info["config"]["memory"]["size"], 2560u64 << 20);
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 3);
}

#[test]
fn an_inherited_socket_is_served_and_a_wrong_descriptor_refused() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_podvisor"))
        .args(["--api-socket", "fd=0"])
        .stdin(std::os::fd::OwnedFd::from(listener))
        .spawn()
        .unwrap();
    let mut client = Client::connect(&path).unwrap();
    assert_eq!(client.request("GET", "vmm.ping", None).unwrap().status, 200);
    client.request("PUT", "vmm.shutdown", None).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let out = Command::new(env!("CARGO_BIN_EXE_podvisor"))
        .args(["--api-socket", "fd=0"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("fd=0"));
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    if !kvm() {
        return;
    }
    for wait_ms in [1, 30, 120, 250] {
        let dir = tempfile::tempdir().unwrap();
        let mut demo = Command::new(env!("CARGO_BIN_EXE_podvisor"))
            .args(["demo", "--json"])
            .env("TMPDIR", dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        let status = Command::new("kill").arg(demo.id().to_string()).status().unwrap();
        assert!(status.success());
        let ended = demo.wait().unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        // The signal may come before the demo takes signals, when there is nothing to clean up, or after its end.
        assert!(left.is_empty(), "after {wait_ms} ms ({ended}): {left:?}");
    }
}

#[test]
fn a_monitor_can_outlive_its_pods() {
    if !kvm() {
        return;
    }
    let mut process = Process::start_with(&["--no-shutdown"]);
    process.put("vm.create", Some(&config(&process, HELLO)));
    for said in ["OK", "OKOK"] {
        process.put("vm.boot", None);
        wait_for("the pod to power off", || {
            (process.info()["state"] == "Created").then_some(())
        });
        assert_eq!(std::fs::read_to_string(process.path("serial")).unwrap(), said);
    }
    process.put("vmm.shutdown", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
}

#[test]
fn options_of_cloud_hypervisors_that_are_not_taken_are_refused_with_their_reason() {
    let out = Command::new(env!("CARGO_BIN_EXE_podvisor"))
        .args(["--api-socket", "/nowhere/s", "--tpm", "socket=/x"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.starts_with("podvisor: --tpm: there is no TPM"), "{said}");
}

#[test]
fn the_monitor_ignores_what_cloud_hypervisor_ignores() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim();
    let ignored = u64::from_str_radix(field("SigIgn:"), 16).unwrap();
    for signal in [13, 17] {
        assert!(ignored & 1 << (signal - 1) != 0, "signal {signal}: {ignored:#x}");
    }
    assert_eq!(field("Umask:"), "0077");
}
