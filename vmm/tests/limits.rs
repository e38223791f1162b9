//! Rate limits of disks and network devices: what is limited works, and what is not has no timer.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use common::{Process, kvm};
use serde_json::{Value, json};

/// The timers that the monitor has.
fn timers(process: &Process) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap();
    fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|link| link.to_string_lossy().contains("[timerfd]"))
        .count()
}

fn bucket(size: u64) -> Value {
    json!({"size": size, "refill_time": 1000})
}

#[test]
fn a_limit_has_a_timer_and_no_limit_has_none() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("none");
    let unlimited = timers(&process);
    let add = |name: &str, limits: Value| {
        std::fs::File::create(process.path(name))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let disk = json!({"path": process.path(name), "rate_limiter_config": limits});
        process.request("PUT", "vm.add-disk", Some(&disk))
    };
    // As the Rust shim writes "no limit", in all its ways.
    assert_eq!(add("a", Value::Null).0, 200);
    assert_eq!(add("b", json!({"bandwidth": null, "ops": null})).0, 200);
    assert_eq!(add("c", json!({})).0, 200);
    assert_eq!(timers(&process), unlimited);
    assert_eq!(add("d", json!({"bandwidth": bucket(1 << 20), "ops": null})).0, 200);
    assert_eq!(
        add(
            "e",
            json!({"ops": {"size": 10, "refill_time": 100, "one_time_burst": 5}})
        )
        .0,
        200
    );
    assert_eq!(timers(&process), unlimited + 2);
    let sent = &process.info()["config"]["disks"][4]["rate_limiter_config"];
    assert_eq!(sent["bandwidth"], bucket(1 << 20));
    assert!(sent.get("ops").is_none_or(Value::is_null));
}

#[test]
fn a_limited_disk_reads_and_writes() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = process.pod_config("none");
    // A request is larger than the bucket: it waits for a full one and leaves a debt.
    config["disks"][0]["rate_limiter_config"] = json!({
        "bandwidth": {"size": 65536, "refill_time": 20, "one_time_burst": 4096}, "ops": {"size": 2, "refill_time": 20},
    });
    process.boot_with(&config);
    let mut agent = process.agent();
    agent.command("blk-write 0 512 7").unwrap();
    agent.command("blk-read 0 512").unwrap();
    let written = std::fs::read(process.path("disk")).unwrap();
    assert!(written[..512 * 512] == podvisor::demo::pattern::pattern(7, 512 * 512));
}
