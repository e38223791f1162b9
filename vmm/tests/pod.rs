//! The pod guest in a real podvisor process: isolation of private pages, devices that go on after a refusal, several
//! pods at once, reset.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod common;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use common::{PATIENCE, Process, kvm, wait_for};
use podvisor::demo::pattern::pattern;
use serde_json::json;

/// Bytes of the pattern that are looked for: enough that they are nowhere by chance.
const NEEDLE: usize = 32;

struct Found {
    guest_ram: bool,
    elsewhere: Vec<String>,
}

/// Looks for `needles` in all readable memory of process `pid`.
fn search_memory(pid: u32, needles: &[Vec<u8>]) -> Found {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = Found {
        guest_ram: false,
        elsewhere: Vec::new(),
    };
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (range, rights) = (fields.next().unwrap(), fields.next().unwrap());
        if !rights.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vvar_vclock]") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let (start, end) = (
            u64::from_str_radix(start, 16).unwrap(),
            u64::from_str_radix(end, 16).unwrap(),
        );
        let ram = end - start >= 256 << 20;
        // The pod guest lives in its first 64 MiB.
        let mut bytes = vec![0; usize::try_from((end - start).min(64 << 20)).unwrap()];
        if memory.seek(SeekFrom::Start(start)).is_err() || memory.read_exact(&mut bytes).is_err() {
            continue;
        }
        if needles.iter().any(|needle| contains(&bytes, needle)) {
            if ram {
                found.guest_ram = true;
            } else {
                found.elsewhere.push(line.to_owned());
            }
        }
    }
    found
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|b| *b == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[test]
fn a_device_cannot_touch_a_private_page_and_goes_on() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("snp-emulated");
    let mut agent = process.agent();
    let mut needles = Vec::new();
    for (number, device) in ["blk", "fs", "vsock", "rng"].into_iter().enumerate() {
        let seed = 0xC0FFEE + number as u64;
        assert_eq!(
            agent.command(&format!("probe-private {seed} {device}")).unwrap().ok,
            "refused",
            "{device}"
        );
        needles.push(pattern(seed, NEEDLE));
    }
    // Every device still works.
    agent.command("blk-write 8 16 77").unwrap();
    agent.command("blk-read 8 16").unwrap();
    assert_eq!(agent.command("fs-read file").unwrap().value("bytes"), Some("27"));
    assert_eq!(agent.command("rng 16").unwrap().ok.len(), 32);
    let data = pattern(5, 100_000);
    assert_eq!(agent.echo(&data).unwrap(), data);
    // The private page's bytes are in the guest's RAM, and nowhere else in the process, its log, its disk, its share.
    let found = search_memory(process.child.id(), &needles);
    assert!(found.guest_ram, "the search does not even find the page in guest RAM");
    assert!(found.elsewhere.is_empty(), "{:?}", found.elsewhere);
    let mut files = vec![process.path("log"), process.path("disk")];
    files.extend(
        std::fs::read_dir(process.path("share"))
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    );
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        assert!(
            !needles.iter().any(|needle| contains(&bytes, needle)),
            "{}",
            file.display()
        );
    }
}

#[test]
fn pages_convert_both_ways() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("snp-emulated");
    process.agent().command("convert 64 20").unwrap();
}

#[test]
fn two_pods_share_an_image_and_a_read_only_disk() {
    if !kvm() {
        return;
    }
    let pods: Vec<_> = (0..2).map(|_| Process::start()).collect();
    let (image, disk) = (pods[0].path("pod.igvm"), pods[0].path("disk"));
    std::fs::write(&image, podvisor::pod_image::POD_IMAGE).unwrap();
    std::fs::write(&disk, pattern(11, 1 << 20)).unwrap();
    for pod in &pods {
        std::fs::create_dir(pod.path("share")).unwrap();
        let mut config = pod.pod_config("snp-emulated");
        config["payload"]["igvm"] = json!(image);
        config["disks"][0] = json!({"path": disk, "readonly": true, "image_type": "Raw"});
        pod.put("vm.create", Some(&config));
        pod.put("vm.boot", None);
    }
    let mut hashes: Vec<_> = pods
        .iter()
        .map(|pod| {
            let mut agent = pod.agent();
            assert!(
                agent.command("blk-write 0 1 1").is_err(),
                "a read-only disk was written"
            );
            agent.command("blk-read 0 2048").unwrap().ok
        })
        .collect();
    hashes.dedup();
    assert_eq!(hashes.len(), 1);
    assert_eq!(
        pods[0].info()["podvisor"]["digest"],
        pods[1].info()["podvisor"]["digest"]
    );
}

#[test]
fn a_reset_boots_the_pod_again_and_power_off_ends_the_monitor() {
    if !kvm() {
        return;
    }
    for isolation in ["none", "snp-emulated"] {
        let mut process = Process::start();
        process.boot_pod(isolation);
        process.agent().command("blk-write 0 8 3").unwrap();
        process.agent().command("reset").unwrap();
        let read = wait_for("the pod to be back", || {
            let mut agent =
                podvisor::demo::agent::Agent::connect(&process.path("vsock"), std::time::Instant::now() + PATIENCE)
                    .ok()?;
            agent.command("blk-read 0 8").ok()
        });
        assert_eq!(read.value("bytes"), Some("4096"));
        assert_eq!(process.info()["state"], "Running");
        process.agent().command("poweroff").unwrap();
        assert_eq!(process.wait().code(), Some(0), "{}", process.log());
        assert!(!process.socket.exists() && !process.path("vsock").exists());
    }
}

#[test]
fn the_emulation_names_itself_where_it_shows() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("snp-emulated");
    let info = process.info();
    assert_eq!(info["podvisor"]["isolation"], "snp-emulated");
    assert_eq!(info["podvisor"]["emulated"], true);
    assert!(process.log().contains("emulated"), "{}", process.log());
    assert_eq!(process.agent().command("hello").unwrap().value("emulated"), Some("1"));
}
