//! The scratch disk of a real podvisor: thin, nameless, gone with the pod; full, it is the pod's I/O that fails.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Process, kvm, wait_for};
use podvisor::demo::pattern::pattern;
use podvisor_api::events::{Event, Source, What};
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;

/// A pod whose only disk is a scratch disk in `dir`.
fn config(process: &Process, isolation: &str, dir: &Path) -> Value {
    let mut config = process.pod_config(isolation);
    config.as_object_mut().unwrap().remove("disks");
    config["scratch"] = json!({"size": SIZE, "dir": dir, "id": "scratch"});
    config
}

fn allocated(process: &Process) -> u64 {
    let (status, counters) = process.request("GET", "vm.counters", None);
    assert_eq!(status, 200, "{counters}");
    counters["scratch"]["allocated_bytes"].as_u64().unwrap()
}

/// The open file of the scratch disk, as the process has it.
fn scratch_file(process: &Process) -> PathBuf {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap();
    let deleted = |fd: &PathBuf| {
        let target = std::fs::read_link(fd).unwrap_or_default();
        target.to_string_lossy().ends_with("(deleted)")
            && std::fs::metadata(fd).is_ok_and(|m| m.len() == SIZE || m.len() == 0)
    };
    fds.map(|fd| fd.unwrap().path()).find(deleted).unwrap()
}

fn zeros(agent: &mut podvisor::demo::agent::Agent, sector: u64) -> bool {
    let zeros = agent.command("blk-read 100000 64").unwrap();
    agent.command(&format!("blk-read {sector} 64")).unwrap() == zeros
}

#[test]
fn it_takes_what_is_written_and_gives_back_what_is_discarded() {
    if !kvm() {
        return;
    }
    for isolation in ["none", "snp-emulated"] {
        let mut process = Process::start();
        let dir = process.path("disks");
        std::fs::create_dir(&dir).unwrap();
        process.boot_with(&config(&process, isolation, &dir));
        let mut agent = process.agent();
        let told = agent.command("blk-info").unwrap();
        assert_eq!(told.ok, "sectors=131072 readonly=0 id=podvisor-scratch");
        assert_eq!(allocated(&process), 0);
        agent.command("blk-write 4096 2048 9").unwrap();
        let written = allocated(&process);
        assert!((1 << 20..=(1 << 20) + 65536).contains(&written), "{written}");
        let file = scratch_file(&process);
        let metadata = std::fs::metadata(&file).unwrap();
        assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (0, 0o600));
        assert!(std::fs::read(&file).unwrap()[4096 * 512..][..1 << 20] == pattern(9, 1 << 20));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "it has no name");

        agent.command("blk-discard 4096 1024").unwrap();
        let left = allocated(&process);
        assert!(left <= written - (512 << 10), "{left} of {written}");
        agent.command("blk-zero 5120 1024").unwrap();
        assert!(zeros(&mut agent, 5120));
        agent.command("blk-discard 0 131072").unwrap();
        assert_eq!(allocated(&process), 0);

        // Each boot finds it empty, and between them it takes no room.
        agent.command("blk-write 0 64 3").unwrap();
        process.put("vm.reboot", None);
        let mut agent = process.agent();
        assert_eq!(allocated(&process), 0);
        assert!(zeros(&mut agent, 0));
        agent.command("blk-write 0 64 3").unwrap();
        process.put("vm.shutdown", None);
        assert_eq!(std::fs::metadata(&file).unwrap().blocks(), 0);
        process.put("vm.boot", None);
        process.agent().command("blk-write 0 64 3").unwrap();
        process.child.kill().unwrap();
        process.wait();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    }
}

#[test]
fn a_pod_has_it_behind_its_other_devices_and_is_not_saved_with_it() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let plain = process.pod_config("none");
    process.boot_with(&plain);
    let before = process.info()["podvisor"]["devices"].clone();
    process.put("vm.delete", None);
    let mut with = plain;
    with["scratch"] = json!({"size": SIZE, "id": "work"});
    process.put("vm.create", Some(&with));
    process.put("vm.boot", None);
    let info = process.info();
    let told = json!({"id": "work", "pci_segment": 0, "size": SIZE, "dir": "/var/tmp"});
    assert_eq!(info["config"]["scratch"], told);
    let places = |devices: &Value| {
        let devices = devices.as_array().unwrap().iter();
        devices.map(|d| (d["id"].clone(), d["bdf"].clone())).collect::<Vec<_>>()
    };
    let (mut after, before) = (places(&info["podvisor"]["devices"]), places(&before));
    assert_eq!(after.pop().unwrap().0, "work");
    assert_eq!(after, before, "no other device has moved");
    let mut agent = process.agent();
    assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("8192"));

    process.put("vm.pause", None);
    let url = format!("file://{}", process.dir.path().display());
    let (status, said) = process.request("PUT", "vm.snapshot", Some(&json!({"destination_url": url})));
    assert_eq!(status, 400, "{said}");
    assert_eq!(
        said,
        json!([
            "Error from API: The VM could not be snapshotted: device work (scratch)",
            "its contents are in no file that a restored pod could have: take it out of the pod first (vm.remove-device)",
        ])
    );
    assert!(!process.path("config.json").exists());
    process.put("vm.resume", None);
    agent.command("blk-info").unwrap();
    process.put("vm.remove-device", Some(&json!({"id": "work"})));
    assert_eq!(process.info()["config"].get("scratch"), None);
}

#[test]
fn it_grows_and_a_boot_finds_it_so() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let dir = process.path("disks");
    std::fs::create_dir(&dir).unwrap();
    process.boot_with(&config(&process, "none", &dir));
    let resize = |size: u64| {
        let body = json!({"id": "scratch", "desired_size": size});
        process.request("PUT", "vm.resize-disk", Some(&body))
    };
    let mut agent = process.agent();
    assert_eq!(resize(2 * SIZE), (204, Value::Null));
    assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("262144"));
    agent.command("blk-write 262080 64 3").unwrap();
    let (status, said) = resize(SIZE + 512);
    assert_eq!(status, 400);
    assert!(said.to_string().contains("give a multiple of 4096"), "{said}");
    process.put("vm.reboot", None);
    assert_eq!(process.info()["config"]["scratch"]["size"], 2 * SIZE);
    assert_eq!(
        process.agent().command("blk-info").unwrap().value("sectors"),
        Some("262144")
    );
}

#[test]
fn two_pods_have_theirs_in_one_directory() {
    if !kvm() {
        return;
    }
    let pods: Vec<_> = (0..2).map(|_| Process::start()).collect();
    let dir = pods[0].path("disks");
    std::fs::create_dir(&dir).unwrap();
    for (pod, seed) in pods.iter().zip([5, 6]) {
        pod.boot_with(&config(pod, "none", &dir));
        pod.agent().command(&format!("blk-write 0 64 {seed}")).unwrap();
    }
    for (pod, seed) in pods.iter().zip([5, 6]) {
        let bytes = std::fs::read(scratch_file(pod)).unwrap();
        assert!(bytes[..64 * 512] == pattern(seed, 64 * 512));
    }
}

#[test]
fn under_landlock_its_directory_is_reached_once() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let dir = process.path("disks");
    std::fs::create_dir(&dir).unwrap();
    let mut config = config(&process, "none", &dir);
    config["landlock_enable"] = json!(true);
    std::fs::write(process.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
    std::fs::create_dir(process.path("share")).unwrap();
    process.put("vm.create", Some(&config));
    std::fs::remove_dir(&dir).unwrap();
    let (status, said) = process.request("PUT", "vm.boot", None);
    if said.to_string().contains("landlock_enable: this kernel") {
        println!("skipped: no Landlock");
        return;
    }
    assert_eq!(status, 204, "{said}");
    process.agent().command("blk-write 0 64 3").unwrap();
    process.put("vm.reboot", None);
    process.agent().command("blk-write 0 64 3").unwrap();
}

#[test]
fn what_cannot_be_is_refused_by_field_value_and_remedy() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let file = process.path("file");
    std::fs::write(&file, "").unwrap();
    let missing = process.path("missing");
    let cases = [
        (
            json!({"size": SIZE, "dir": file}),
            format!(
                "scratch: dir {}: it is not a directory; give one on a file system with room for what the pod writes",
                file.display()
            ),
        ),
        (
            json!({"size": SIZE, "dir": missing}),
            format!(
                "scratch: dir {}: it does not exist; make it, or give another directory",
                missing.display()
            ),
        ),
        (
            json!({"size": SIZE, "dir": "tmp"}),
            "scratch.dir: `tmp` is not an absolute path; give a directory of the host, or leave it out for /var/tmp"
                .to_owned(),
        ),
        (
            json!({"size": 5000}),
            "scratch.size: 5000 bytes are no scratch disk; give a multiple of 4096, above 0 and below 8E".to_owned(),
        ),
        (
            json!({"size": 0}),
            "scratch.size: 0 bytes are no scratch disk; give a multiple of 4096, above 0 and below 8E".to_owned(),
        ),
    ];
    for (scratch, reason) in cases {
        let mut config = process.pod_config("none");
        config["scratch"] = scratch;
        let (status, said) = process.request("PUT", "vm.create", Some(&config));
        assert_eq!(status, 400, "{said}");
        let said: Vec<_> = said.as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
        assert_eq!(
            said.join(": "),
            format!("Error from API: The VM could not be created: {reason}")
        );
    }
    assert_eq!(process.request("GET", "vm.info", None).0, 404, "there is no pod");
}

/// What the event monitor told of the scratch disk's storage.
fn told(process: &Process) -> Vec<Event> {
    let text = std::fs::read_to_string(process.path("events")).unwrap();
    let all = text.split_terminator("\n\n").map(|e| serde_json::from_str(e).unwrap());
    all.filter(|e: &Event| matches!(e.event, What::StorageFailing | What::StorageWorking))
        .collect()
}

#[test]
fn a_full_host_fails_the_pods_write_is_told_once_and_is_over_when_there_is_room() {
    const SMALL: u64 = 8 << 20;
    if !kvm() {
        return;
    }
    let Some(process) = Process::start_small(SMALL, &["--event-monitor", "path=events"]) else {
        return;
    };
    process.boot_with(&config(&process, "none", &process.path("small")));
    assert!(
        process.log().contains("its file system is in memory"),
        "{}",
        process.log()
    );
    let mut agent = process.agent();
    agent.command("blk-write 0 2048 1").unwrap();
    // Another's, on the same file system.
    let filler = process.small("filler");
    std::fs::write(&filler, vec![1; 5 << 20]).unwrap();
    for _ in 0..3 {
        let refused = agent.command("blk-write 2048 8192 2").unwrap_err();
        assert!(refused.to_string().contains("blk-write"), "{refused}");
    }
    // What is there is not lost, and can be written again.
    agent.command("blk-write 0 2048 3").unwrap();
    let events = told(&process);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(
        (events[0].source, events[0].event),
        (Source::VirtioDevice, What::StorageFailing)
    );
    let properties = events[0].properties.as_ref().unwrap();
    assert_eq!(properties["id"], "scratch");
    assert!(properties["error"].contains("os error 28"), "{properties:?}");
    assert_eq!(process.info()["state"], "Running");

    std::fs::remove_file(&filler).unwrap();
    let mut next = 2048;
    wait_for("the news that there is room", || {
        // A write that needs room: no more than there is, a page at a time.
        agent.command(&format!("blk-write {next} 8 4")).unwrap();
        next += 8;
        (told(&process).len() == 2).then_some(())
    });
    assert_eq!(told(&process)[1].event, What::StorageWorking);

    // What the pod discards is room for another.
    agent.command("blk-discard 0 131072").unwrap();
    std::fs::write(&filler, vec![1; 7 << 20]).unwrap();
}

#[test]
fn a_file_may_be_too_large_for_the_process() {
    if !kvm() {
        return;
    }
    let process = Process::start_with(&["--event-monitor", "path=events"]);
    let dir = process.path("disks");
    std::fs::create_dir(&dir).unwrap();
    process.boot_with(&config(&process, "none", &dir));
    let mut agent = process.agent();
    let limit = |bytes: &str| {
        let pid = process.child.id().to_string();
        let set = Command::new("prlimit")
            .args(["--pid", &pid, &format!("--fsize={bytes}")])
            .status();
        set.is_ok_and(|status| status.success())
    };
    if !limit("16777216:unlimited") {
        println!("skipped: no prlimit");
        return;
    }
    agent.command("blk-write 0 64 3").unwrap();
    agent.command("blk-write 65536 64 3").unwrap_err();
    assert_eq!(process.info()["state"], "Running");
    let events = told(&process);
    assert!(
        events[0].properties.as_ref().unwrap()["error"].contains("os error 27"),
        "{events:?}"
    );
    assert!(limit("unlimited"));
    agent.command("blk-write 65536 64 3").unwrap();
}
