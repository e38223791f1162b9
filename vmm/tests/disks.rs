//! Disks of a running pod: another size, shared limits, locks.

mod common;

use common::{Process, kvm};
use serde_json::{Value, json};

fn resize(process: &Process, id: &str, size: u64) -> (u16, Value) {
    let body = json!({"id": id, "desired_size": size});
    process.request("PUT", "vm.resize-disk", Some(&body))
}

#[test]
fn a_disk_grows_under_the_pod() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    assert_eq!(resize(&process, "_disk0", 8 << 20).0, 404);
    process.boot_pod("snp-emulated");
    let before = process.info()["config"].clone();
    let mut agent = process.agent();
    assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("8192"));
    assert_eq!(resize(&process, "_disk0", 8 << 20), (204, Value::Null));
    assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("16384"));
    agent.command("blk-write 16300 84 6").unwrap();
    let image = std::fs::read(process.path("disk")).unwrap();
    assert_eq!(image.len(), 8 << 20);
    assert!(image[16300 * 512..] == podvisor::demo::pattern::pattern(6, 84 * 512));
    for (id, size, status, word) in [
        ("_disk0", 1000, 400, "desired_size 1000"),
        ("nothing", 8 << 20, 404, "nothing"),
        ("_fs1", 8 << 20, 400, "_fs1"),
    ] {
        let (got, said) = resize(&process, id, size);
        assert_eq!(got, status, "{said}");
        assert!(said.to_string().contains(word), "{said}");
    }
    assert_eq!(process.info()["config"], before);
    process.put("vm.shutdown", None);
    assert_eq!(resize(&process, "_disk0", 8 << 20).0, 405);
}

#[test]
fn disks_of_a_group_share_its_limit() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let mut config = process.pod_config("none");
    config["rate_limit_groups"] = json!([
        {"id": "slow", "rate_limiter_config": {"ops": {"size": 2, "refill_time": 10}, "bandwidth": null}},
        {"id": "free", "rate_limiter_config": {}},
    ]);
    config["disks"][0]["rate_limit_group"] = json!("slow");
    process.boot_with(&config);
    let mut agent = process.agent();
    agent.command("blk-write 0 512 7").unwrap();
    agent.command("blk-read 0 512").unwrap();
    let add = |name: &str, group: &str| {
        std::fs::File::create(process.path(name))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let disk = json!({"path": process.path(name), "rate_limit_group": group, "id": name});
        process.request("PUT", "vm.add-disk", Some(&disk))
    };
    for (name, group) in [("a", "slow"), ("b", "free")] {
        let (status, said) = add(name, group);
        assert_eq!(status, 200, "{said}");
    }
    let (status, said) = add("c", "none");
    assert_eq!(status, 400);
    assert!(
        said.to_string()
            .contains("disks[3].rate_limit_group: there is no group `none`"),
        "{said}"
    );
    assert_eq!(process.info()["config"]["rate_limit_groups"][0]["id"], "slow");
    process.put("vm.remove-device", Some(&json!({"id": "a"})));
    agent.command("blk-read 0 64").unwrap();
}

#[test]
fn a_conflict_names_the_image_and_read_only_ones_are_shared() {
    if !kvm() {
        return;
    }
    let pods: Vec<_> = (0..2).map(|_| Process::start()).collect();
    let [first, second] = &pods[..] else { unreachable!() };
    first.boot_pod("none");
    let image = first.path("disk");
    for (readonly, granularity) in [(false, "ByteRange"), (true, "ByteRange"), (true, "Full")] {
        let mut config = second.pod_config("none");
        config["disks"][0] = json!({"path": image, "readonly": readonly, "lock_granularity": granularity});
        config["disks"][0]["queue_affinity"] = json!([{"queue_index": 0, "host_cpus": [0]}]);
        std::fs::write(second.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
        let _ = std::fs::create_dir(second.path("share"));
        second.put("vm.create", Some(&config));
        let (status, said) = second.request("PUT", "vm.boot", None);
        assert_eq!(status, 500);
        let said = said.to_string();
        assert!(
            said.contains(&image.display().to_string()) && said.contains("writable"),
            "{said}"
        );
        second.put("vm.delete", None);
    }
}

#[test]
fn a_reboot_keeps_the_disk_that_is_open_and_a_boot_opens_it_anew() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("snp-emulated");
    let mut agent = process.agent();
    assert_eq!(resize(&process, "_disk0", 8 << 20), (204, Value::Null));
    agent.command("blk-write 9000 64 7").unwrap();
    let sum = agent.command("blk-read 9000 64").unwrap();
    std::fs::rename(process.path("disk"), process.path("moved")).unwrap();
    for _ in 0..2 {
        process.put("vm.reboot", None);
        let mut agent = process.agent();
        assert_eq!(agent.command("blk-info").unwrap().value("sectors"), Some("16384"));
        assert_eq!(agent.command("blk-read 9000 64").unwrap(), sum);
        agent.command("blk-write 0 64 8").unwrap();
    }
    assert!(std::fs::read(process.path("moved")).unwrap()[..32768] == podvisor::demo::pattern::pattern(8, 32768));
    process.put("vm.shutdown", None);
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert_eq!(status, 500, "{said}");
    assert!(said.to_string().contains("disks[0].path"), "{said}");
    // It is nobody's any more.
    std::fs::rename(process.path("moved"), process.path("disk")).unwrap();
    let other = Process::start();
    let mut config = other.pod_config("none");
    config["disks"][0]["path"] = json!(process.path("disk"));
    other.boot_with(&config);
    assert_eq!(other.agent().command("blk-read 9000 64").unwrap(), sum);
}

#[test]
fn a_disk_on_its_way_out_does_not_come_back_with_a_reboot() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    process.boot_pod("none");
    process.put("vm.remove-device", Some(&json!({"id": "_disk0"})));
    process.put("vm.reboot", None);
    process.agent().command("blk-info").unwrap_err();
    let disk = json!({"path": process.path("disk"), "id": "_disk0", "readonly": true});
    let (status, said) = process.request("PUT", "vm.add-disk", Some(&disk));
    assert_eq!(status, 200, "its lock is gone with it: {said}");
}
