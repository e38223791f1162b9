//! What the monitor took from itself, as seen from outside: the filters of its threads, and what a refused call does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use common::{Process, kvm, podvisor, wait_for};
use podvisor::sandbox::seccomp::{self, Violation};
use podvisor_api::http::Client;
use serde_json::json;

/// Name, mode of seccomp and number of filters of each thread of `pid`, sorted.
fn threads(pid: u32) -> Vec<(String, String, String)> {
    let field = |status: &str, name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).unwrap_or_default().to_owned()
    };
    let mut all: Vec<_> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .map(|s| (field(&s, "Name:"), field(&s, "Seccomp:"), field(&s, "Seccomp_filters:")))
        .collect();
    all.sort();
    all
}

#[test]
fn every_thread_is_filtered_and_those_that_run_the_guest_twice() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("none");
    drop(process.agent());
    let thread = |name: &str, filters: &str| (name.to_owned(), "2".to_owned(), filters.to_owned());
    let (ours, kernels): (Vec<_>, Vec<_>) = threads(process.child.id())
        .into_iter()
        .partition(|(name, ..)| name == "podvisor" || name.starts_with("vcpu"));
    assert_eq!(ours, [thread("podvisor", "1"), thread("vcpu0", "2")]);
    // KVM and io_uring put threads of the kernel's into the process.
    assert!(kernels.iter().all(|(_, mode, _)| mode == "2"), "{kernels:?}");
}

#[test]
fn nothing_is_filtered_when_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let mut child = podvisor(&socket, &dir.path().join("log"))
        .args(["--seccomp", "false"])
        .spawn()
        .unwrap();
    wait_for("the API socket", || Client::connect(&socket).ok());
    assert!(threads(child.id()).iter().all(|(_, mode, _)| mode == "0"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_pod_with_landlock_reaches_its_own_files_and_those_of_the_rules_only() {
    if !kvm() {
        return;
    }
    let mut process = Process::start();
    let other = tempfile::tempdir().unwrap();
    let disk = |directory: &std::path::Path, name: &str| {
        let path = directory.join(name);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        json!({"path": path, "image_type": "Raw"})
    };
    fs::create_dir(process.path("pool")).unwrap();
    let mut config = process.pod_config("none");
    config["landlock_enable"] = json!(true);
    config["landlock_rules"] = json!([{"path": process.path("pool"), "access": "rw"}]);
    process.boot_with(&config);
    let mut agent = process.agent();
    assert_eq!(agent.command("fs-read file").unwrap().value("bytes"), Some("27"));

    process.put("vm.add-disk", Some(&disk(&process.path("pool"), "in")));
    let outside = disk(other.path(), "out");
    let (status, said) = process.request("PUT", "vm.add-disk", Some(&outside));
    assert!(status >= 400, "{said}");
    assert!(
        said.to_string().contains("Permission denied") && said.to_string().contains("out"),
        "{said}"
    );
    // The guest's view of the share is as before, and an end leaves no socket behind.
    assert_eq!(agent.command("fs-read file").unwrap().value("bytes"), Some("27"));
    process.put("vmm.shutdown", None);
    assert!(process.wait().success());
    assert!(!process.socket.exists());
}

#[test]
fn a_rule_whose_path_does_not_exist_is_named() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = process.pod_config("none");
    config["disks"] = json!([]);
    config["fs"] = json!([]);
    config["landlock_enable"] = json!(true);
    config["landlock_rules"] = json!([{"path": "/no/such/place", "access": "r"}]);
    fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    process.put("vm.create", Some(&config));
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert_eq!(status, 400, "{said}");
    assert!(said.to_string().contains("/no/such/place"), "{said}");
}

/// Set in the process that [`a_refused_call_ends_the_process_with_its_number`] starts: this program once more.
const CHILD: &str = "PODVISOR_TEST_REFUSED_CALL";

#[test]
fn a_refused_call_ends_the_process_with_its_number() {
    if std::env::var_os(CHILD).is_some() {
        seccomp::enter(Violation::End).unwrap();
        let outcome = Command::new("/bin/true").status();
        panic!("a program was started under the filter: {outcome:?}");
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_refused_call_ends_the_process_with_its_number",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert_eq!(
        child.status.code(),
        Some(128 + 31),
        "{:?} {said}",
        child.status.signal()
    );
    assert!(said.contains("podvisor: seccomp: system call 0"), "{said}");
}
