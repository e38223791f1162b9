//! Snapshots: a pod goes on where it was, in another monitor; what cannot be saved or restored changes nothing.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{Process, kvm, pvh_kernel, wait_for};
use serde_json::{Value, json};

/// Adds one to the byte at 2 MiB and prints it on COM1, for ever.
const COUNTER: &[u8] = &[
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
    0xFE, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc byte [0x200000]
    0xA0, 0x00, 0x00, 0x20, 0x00, // mov al, [0x200000]
    0xEE, // out dx, al
    0xB9, 0x00, 0x00, 0x04, 0x00, // mov ecx, 0x40000
    0xE2, 0xFE, // loop $
    0xEB, 0xEB, // jmp again
];

const MEMORY: u64 = 128 << 20;

fn boot(process: &Process) {
    pvh_kernel(&process.path("kernel"), COUNTER);
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": MEMORY},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    });
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
}

/// What was counted, when there are more than `than` numbers.
fn counted(process: &Process, than: usize) -> Vec<u8> {
    wait_for("the guest's counting", || {
        let bytes = std::fs::read(process.path("serial")).ok()?;
        (bytes.len() > than).then_some(bytes)
    })
}

fn url(directory: &Path) -> String {
    format!("file://{}", directory.display())
}

fn save(process: &Process, directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&json!({"destination_url": url(directory)})));
}

fn assert_counts_from(bytes: &[u8], first: u8) {
    let expected: Vec<u8> = (0..bytes.len())
        .map(|i| first.wrapping_add(u8::try_from(i % 256).unwrap()))
        .collect();
    assert_eq!(bytes, expected);
}

#[test]
fn a_counting_guest_goes_on_where_it_was() {
    if !kvm() {
        return;
    }
    let mut first = Process::start();
    boot(&first);
    counted(&first, 5);
    let directory = first.path("snapshot");
    save(&first, &directory);
    assert_eq!(first.info()["state"], "Paused");
    let before = std::fs::read(first.path("serial")).unwrap();
    assert_counts_from(&before, 1);
    let memory = directory.join("memory-ranges").metadata().unwrap();
    assert_eq!(memory.len(), MEMORY);
    assert!(
        memory.blocks() * 512 < MEMORY / 8,
        "the memory file has no holes: {} blocks",
        memory.blocks()
    );
    first.child.kill().unwrap();
    first.child.wait().unwrap();

    // Twice from one snapshot: restoring does not change it.
    for _ in 0..2 {
        let second = Process::start();
        second.put("vm.restore", Some(&json!({"source_url": url(&directory)})));
        assert_eq!(second.info()["state"], "Paused");
        assert_eq!(std::fs::read(first.path("serial")).unwrap(), b"");
        second.put("vm.resume", None);
        assert_eq!(second.info()["state"], "Running");
        let after = counted(&first, 5);
        assert_counts_from(&after, before.last().unwrap().wrapping_add(1));
        second.put("vm.delete", None);
    }
}

#[test]
fn a_guest_whose_snapshot_was_taken_goes_on_too() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    boot(&process);
    counted(&process, 5);
    save(&process, &process.path("snapshot"));
    let before = std::fs::read(process.path("serial")).unwrap().len();
    process.put("vm.resume", None);
    assert_counts_from(&counted(&process, before + 5), 1);
}

fn refused(process: &Process, endpoint: &str, body: &Value) -> String {
    let (status, said) = process.request("PUT", endpoint, Some(body));
    assert!((400..500).contains(&status), "{status} {said}");
    said.to_string()
}

#[test]
fn a_damaged_foreign_or_newer_snapshot_is_refused_and_leaves_no_pod() {
    if !kvm() {
        return;
    }
    let first = Process::start();
    boot(&first);
    counted(&first, 1);
    let directory = first.path("snapshot");
    save(&first, &directory);
    let second = Process::start();
    let body = json!({"source_url": url(&directory)});
    let path = directory.join("state.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let state: Value = serde_json::from_str(&good).unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut state = state.clone();
        change(&mut state);
        state.to_string()
    };
    for (text, word) in [
        (changed(&|s| s["state"]["clock"] = json!(1)), "checksum"),
        (changed(&|s| s["podvisor_snapshot"] = json!(3)), "its format is 3"),
        (
            changed(&|s| drop(s.as_object_mut().unwrap().remove("podvisor_snapshot"))),
            "another monitor",
        ),
        (good[..good.len() / 2].to_owned(), "state.json"),
        (String::new(), "state.json"),
    ] {
        std::fs::write(&path, text).unwrap();
        let said = refused(&second, "vm.restore", &body);
        assert!(said.contains(word), "{said}");
        assert_eq!(second.request("GET", "vm.info", None).0, 404);
    }
    std::fs::remove_file(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let said = refused(&second, "vm.restore", &body);
    assert!(said.contains("not a regular file"), "{said}");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &good).unwrap();
    let memory = std::fs::OpenOptions::new()
        .write(true)
        .open(directory.join("memory-ranges"))
        .unwrap();
    memory.set_len(MEMORY - 4096).unwrap();
    assert!(refused(&second, "vm.restore", &body).contains("memory-ranges"));
    memory.set_len(MEMORY).unwrap();
    second.put("vm.restore", Some(&body));
}

#[test]
fn what_cannot_be_saved_is_refused_by_name_and_nothing_is_written() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    boot(&process);
    let directory = process.path("snapshot");
    std::fs::create_dir(&directory).unwrap();
    let body = json!({"destination_url": url(&directory)});
    assert!(refused(&process, "vm.snapshot", &body).contains("vm.pause"));
    let said = refused(&process, "vm.snapshot", &json!({"destination_url": "snapshot"}));
    assert!(said.contains("destination_url"), "{said}");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
    // One snapshot is not written over another.
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&body));
    let said = refused(&process, "vm.snapshot", &body);
    assert!(said.contains("state.json") && said.contains("exists"), "{said}");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 3);

    let process = Process::start();
    process.boot_pod("snp-emulated");
    drop(process.agent());
    process.put("vm.pause", None);
    let directory = process.path("snapshot");
    std::fs::create_dir(&directory).unwrap();
    let before = process.info();
    let said = refused(&process, "vm.snapshot", &json!({"destination_url": url(&directory)}));
    assert!(said.contains("confidential"), "{said}");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
    assert_eq!(process.info()["config"], before["config"]);
    process.put("vm.resume", None);
    drop(process.agent());
}
