//! Snapshots of a pod that uses its devices: it goes on where it was, with its disk, its memory and its streams, in this
//! monitor and in others.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{Process, kvm};
use podvisor::demo::agent::Agent;
use serde_json::{Value, json};

fn url(directory: &Path) -> Value {
    json!(format!("file://{}", directory.display()))
}

/// Saves the running pod, which stays paused.
fn save(process: &Process, name: &str) -> PathBuf {
    let directory = process.path(name);
    std::fs::create_dir(&directory).unwrap();
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&json!({"destination_url": url(&directory)})));
    assert_eq!(process.info()["state"], "Paused");
    directory
}

/// A snapshot that shares everything with `from` but its configuration, which `change` edits, as a shim does.
fn edited(from: &Path, to: PathBuf, change: impl FnOnce(&mut Value)) -> PathBuf {
    std::fs::create_dir(&to).unwrap();
    for file in ["memory-ranges", "state.json"] {
        std::os::unix::fs::symlink(from.join(file), to.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    to
}

/// A monitor with the pod of snapshot `from`, on its own socket and a copy of the disk, paused.
fn restore(from: &Path, disk: &Path) -> Process {
    let process = Process::start();
    std::fs::copy(disk, process.path("disk")).unwrap();
    let directory = edited(from, process.path("from"), |config| {
        config["vsock"]["socket"] = json!(process.path("vsock"));
        config["disks"][0]["path"] = json!(process.path("disk"));
    });
    process.put("vm.restore", Some(&json!({"source_url": url(&directory)})));
    assert_eq!(process.info()["state"], "Paused");
    process
}

fn ok(agent: &mut Agent, command: &str) -> String {
    agent.command(command).unwrap().ok
}

/// Where the devices are, and whether the guest runs them.
fn devices(process: &Process) -> Value {
    process.info()["podvisor"]["devices"].clone()
}

#[test]
fn a_pod_goes_on_with_its_devices_in_use() {
    if !kvm() {
        return;
    }
    let first = Process::start();
    first.boot_pod("none");
    let mut agent = first.agent();
    ok(&mut agent, "blk-write 8 16 1");
    let written = ok(&mut agent, "blk-read 8 16");
    ok(&mut agent, "rng 16");
    let walked = agent.command("fs-walk").unwrap();
    let snapshot = save(&first, "snapshot");
    let before = devices(&first);

    // The pod itself: the stream, too, goes on.
    first.put("vm.resume", None);
    assert_eq!(ok(&mut agent, "blk-read 8 16"), written);
    assert_eq!(agent.echo(b"still here").unwrap(), b"still here");
    ok(&mut agent, "blk-write 8 16 2");

    // Another monitor, in which nothing of that has happened. The stream is not there: the guest hears of it, and
    // listens on.
    std::fs::copy(first.path("disk"), first.path("disk-after")).unwrap();
    let second = restore(&snapshot, &first.path("disk-after"));
    assert_eq!(devices(&second), before);
    second.put("vm.resume", None);
    let mut other = second.agent();
    assert_ne!(ok(&mut other, "blk-read 8 16"), written, "the disk is as it is now");
    ok(&mut other, "blk-write 64 4 3");
    let more = ok(&mut other, "blk-read 64 4");
    ok(&mut other, "rng 16");
    assert_eq!(other.command("fs-walk").unwrap(), walked);
    ok(&mut other, "fs-write new 5000 6");
    assert_eq!(std::fs::metadata(first.path("share/new")).unwrap().len(), 5000);
    assert_eq!(other.echo(&[7; 100_000]).unwrap(), [7; 100_000]);

    // The restored pod can be saved as well, with a stream that it took anew.
    let again = save(&second, "snapshot");
    let third = restore(&again, &second.path("disk"));
    third.put("vm.resume", None);
    let mut agent = third.agent();
    assert_eq!(ok(&mut agent, "blk-read 64 4"), more);
    assert_eq!(devices(&third), before);
    let host = std::os::unix::net::UnixListener::bind(third.path("vsock_5000")).unwrap();
    let sent = std::thread::spawn(move || {
        let mut stream = host.accept().unwrap().0;
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
    });
    ok(&mut agent, "dial 5000 70000 4");
    assert_eq!(sent.join().unwrap(), 70_000);
}

#[test]
fn clones_of_one_snapshot_do_not_see_each_other() {
    if !kvm() {
        return;
    }
    let template = Process::start();
    template.boot_pod("none");
    drop(template.agent());
    let snapshot = save(&template, "snapshot");
    let memory = std::fs::metadata(snapshot.join("memory-ranges")).unwrap();
    let clones: Vec<Process> = (0..3).map(|_| restore(&snapshot, &template.path("disk"))).collect();
    let mut sums = Vec::new();
    for (seed, clone) in clones.iter().enumerate() {
        clone.put("vm.resume", None);
        let mut agent = clone.agent();
        ok(&mut agent, &format!("blk-write 0 8 {seed}"));
        sums.push(ok(&mut agent, "blk-read 0 8"));
    }
    for (clone, sum) in clones.iter().zip(&sums) {
        assert_eq!(&ok(&mut clone.agent(), "blk-read 0 8"), sum);
    }
    sums.dedup();
    assert_eq!(sums.len(), 3);
    let now = std::fs::metadata(snapshot.join("memory-ranges")).unwrap();
    assert_eq!(
        (now.mtime(), now.mtime_nsec(), now.blocks()),
        (memory.mtime(), memory.mtime_nsec(), memory.blocks())
    );
}

/// Kata's template factory: one pod boots with its memory in a file and is saved beside it; others begin with a private
/// copy, from a directory into which the shim puts the state and an edited configuration, and nothing else.
#[test]
fn pods_are_made_from_a_template() {
    if !kvm() {
        return;
    }
    let template = Process::start();
    let home = template.path("template");
    std::fs::create_dir(&home).unwrap();
    std::fs::File::create(home.join("memory")).unwrap();
    let mut config = template.pod_config("none");
    config["memory"] = json!({"size": 0, "shared": true, "zones": [
        {"id": "mem0", "size": 512u64 << 20, "file": home.join("memory"), "shared": true, "hugepages": false,
         "prefault": false},
    ]});
    config["disks"][0]["readonly"] = json!(true);
    template.boot_with(&config);
    drop(template.agent());
    template.put("vm.pause", None);
    template.put("vm.snapshot", Some(&json!({"destination_url": url(&home)})));
    template.put("vmm.shutdown", None);
    let mut files: Vec<_> = std::fs::read_dir(&home)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["config.json", "memory", "state.json"]);
    let memory = std::fs::metadata(home.join("memory")).unwrap();

    let edit = |process: &Process, config: &mut Value| {
        config["vsock"]["socket"] = json!(process.path("vsock"));
        config["memory"]["shared"] = json!(false);
        config["memory"]["zones"][0]["shared"] = json!(false);
    };
    let clones: Vec<Process> = (0..2).map(|_| Process::start()).collect();
    for clone in &clones {
        let directory = edited(&home, clone.path("vm"), |config| edit(clone, config));
        // Only in its own directory is there a file of ranges.
        std::fs::remove_file(directory.join("memory-ranges")).unwrap();
        clone.put("vm.restore", Some(&json!({"source_url": url(&directory)})));
        assert_eq!(clone.info()["state"], "Paused");
        clone.put("vm.resume", None);
    }
    for (clone, size) in clones.iter().zip([1000, 2000]) {
        let mut agent = clone.agent();
        ok(&mut agent, &format!("fs-write of-{size} {size} 1"));
        assert_eq!(agent.echo(&vec![3; size]).unwrap(), vec![3; size]);
    }
    // What was made from a template can be saved too: its memory is nobody's file then.
    let again = save(&clones[0], "snapshot");
    let third = Process::start();
    let directory = edited(&again, third.path("vm"), |config| edit(&third, config));
    third.put(
        "vm.restore",
        Some(&json!({"source_url": url(&directory), "resume": true})),
    );
    ok(&mut third.agent(), "fs-read of-1000");
    let now = std::fs::metadata(home.join("memory")).unwrap();
    assert_eq!((now.mtime(), now.mtime_nsec()), (memory.mtime(), memory.mtime_nsec()));

    // As it was saved it would be everybody's memory; and without its file it is nothing.
    let other = Process::start();
    type Change = fn(&mut Value);
    let changes: [(&str, Change, &str); 4] = [
        ("shared", |c| c["memory"]["zones"][0]["shared"] = json!(true), "mem0"),
        (
            "nowhere",
            |c| c["memory"]["zones"][0]["file"] = json!("/nonexistent"),
            "/nonexistent",
        ),
        (
            "renamed",
            |c| c["memory"]["zones"][0]["id"] = json!("mem1"),
            "memory.zones",
        ),
        (
            "larger",
            |c| c["memory"]["zones"][0]["size"] = json!(1u64 << 30),
            "memory",
        ),
    ];
    for (name, change, word) in changes {
        let directory = edited(&home, other.path(name), |config| {
            edit(&other, config);
            change(config);
        });
        let (status, said) = other.request("PUT", "vm.restore", Some(&json!({"source_url": url(&directory)})));
        assert_eq!(status, 400, "{name}: {said}");
        assert!(said.to_string().contains(word), "{name}: {said}");
    }
}

#[test]
fn what_the_configuration_may_not_say_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let first = Process::start();
    first.boot_pod("none");
    drop(first.agent());
    let snapshot = save(&first, "snapshot");
    let second = Process::start();
    type Change = fn(&mut Value);
    let changes: [(&str, Change, &[&str]); 5] = [
        ("fewer", |c| c["disks"] = Value::Null, &["devices"]),
        ("renamed", |c| c["disks"][0]["id"] = json!("other"), &["other"]),
        (
            "queues",
            |c| c["vsock"]["socket"] = json!("/nonexistent/vsock"),
            &["vsock.socket"],
        ),
        ("memory", |c| c["memory"]["size"] = json!(256 << 20), &["memory"]),
        ("shared", |c| c["fs"][0]["num_queues"] = json!(3), &["_fs", "queues"]),
    ];
    for (name, change, words) in changes {
        let directory = edited(&snapshot, second.path(name), |config| {
            config["vsock"]["socket"] = json!(second.path("vsock"));
            std::fs::copy(first.path("disk"), second.path("disk")).unwrap();
            config["disks"][0]["path"] = json!(second.path("disk"));
            change(config);
        });
        let (status, said) = second.request("PUT", "vm.restore", Some(&json!({"source_url": url(&directory)})));
        assert_eq!(status, 400, "{name}: {said}");
        for word in words {
            assert!(said.to_string().contains(word), "{name}: {said}");
        }
        assert_eq!(second.request("GET", "vm.info", None).0, 404, "{name}");
    }
}

#[test]
fn a_full_disk_leaves_no_snapshot_and_the_pod_goes_on() {
    if !kvm() {
        return;
    }
    let Some(process) = Process::start_small(256 << 10, &[]) else {
        return;
    };
    process.boot_pod("none");
    let mut agent = process.agent();
    let sum = ok(&mut agent, "blk-read 0 64");
    process.put("vm.pause", None);
    // In a directory of its own and in one with files of others.
    let other = process.small("other");
    std::fs::write(&other, "another's").unwrap();
    for name in ["snapshot", ""] {
        let directory = process.small(name);
        std::fs::create_dir_all(&directory).unwrap();
        let asked = json!({"destination_url": url(&process.path("small").join(name))});
        let (status, said) = process.request("PUT", "vm.snapshot", Some(&asked));
        assert_eq!(status, 500, "{said}");
        let said = said.to_string();
        assert!(said.contains("memory-ranges") && said.contains("os error 28"), "{said}");
        let left: Vec<_> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|f| f.unwrap().file_name())
            .collect();
        let kept: &[&str] = if name.is_empty() { &["other", "snapshot"] } else { &[] };
        assert!(
            left.len() == kept.len() && left.iter().all(|f| kept.iter().any(|k| f == k)),
            "{left:?}"
        );
        assert_eq!(process.info()["state"], "Paused");
    }
    assert_eq!(std::fs::read(&other).unwrap(), b"another's");
    process.put("vm.resume", None);
    assert_eq!(ok(&mut agent, "blk-read 0 64"), sum);
    // Where there is room, it is saved after all.
    let snapshot = save(&process, "roomy");
    let again = restore(&snapshot, &process.path("disk"));
    again.put("vm.resume", None);
    assert_eq!(ok(&mut again.agent(), "blk-read 0 64"), sum);
}
