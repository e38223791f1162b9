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
