//! vm.resize: vCPUs and memory of a pod, before its boot and while it runs.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use common::{IDLE, Process, kvm, pvh_kernel, wait_for, with_window};
use serde_json::{Value, json};

/// A guest that finds the ACPI registers, which are at `0x7FF_FFEx_xxxx`, at `0x401E_xxxx`.
fn with_registers(rest: &[u8]) -> Vec<u8> {
    let mut code = with_window(0x7FF_FFE0_0000);
    code.extend_from_slice(rest);
    code
}

/// A guest that lets go of vCPU 1 whenever it is asked to, and of no other.
fn ejecting_guest() -> Vec<u8> {
    with_registers(&[
        0xC7, 0x05, 0x00, 0xE0, 0x1E, 0x40, 0x01, 0x00, 0x00, 0x00, // loop: mov dword [CSEL], 1
        0xA1, 0x04, 0xE0, 0x1E, 0x40, // mov eax, [flags]
        0x83, 0xE0, 0x04, // and eax, CRMV
        0x74, 0xEC, // jz loop
        0xC7, 0x05, 0x04, 0xE0, 0x1E, 0x40, 0x0C, 0x00, 0x00, 0x00, // mov dword [flags], CRMV | CEJ0
        0xEB, 0xE0, // jmp loop
    ])
}

fn create(process: &Process, code: &[u8], more: &Value) {
    pvh_kernel(&process.path("kernel"), code);
    let mut config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 3},
        "memory": {"size": 128 << 20},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "Null"},
        "console": {"mode": "Off"},
    });
    let object = config.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    process.put("vm.create", Some(&config));
}

fn resize(process: &Process, body: &Value) -> (u16, String) {
    let (status, said) = process.request("PUT", "vm.resize", Some(body));
    (status, said.to_string())
}

/// The names of the vCPU threads.
fn vcpu_threads(process: &Process) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(format!("/proc/{}/task", process.child.id()))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vcpu"))
        .collect();
    names.sort();
    names
}

#[test]
fn vcpus_come_and_go_and_come_back() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(&process, &ejecting_guest(), &json!({}));
    process.put("vm.boot", None);
    assert_eq!(vcpu_threads(&process), ["vcpu0"], "no vCPU before it is asked for");
    for round in 1..=3 {
        assert_eq!(resize(&process, &json!({"desired_vcpus": 2})).0, 204);
        assert_eq!(
            vcpu_threads(&process),
            ["vcpu0", "vcpu1"],
            "there when the answer comes"
        );
        assert_eq!(process.info()["config"]["cpus"]["boot_vcpus"], 2);
        assert_eq!(
            resize(&process, &json!({"desired_vcpus": 1, "desired_ram": null})).0,
            204
        );
        assert_eq!(process.info()["config"]["cpus"]["boot_vcpus"], 1);
        wait_for("the guest to let go of vCPU 1", || {
            (vcpu_threads(&process).len() == 1).then_some(())
        });
        wait_for("the monitor to take note of it", || {
            (process.log().matches("vCPU removed").count() == round).then_some(())
        });
    }
    assert_eq!(resize(&process, &json!({"desired_vcpus": 3})).0, 204);
    assert_eq!(vcpu_threads(&process), ["vcpu0", "vcpu1", "vcpu2"]);
    assert!(!process.log().contains("triple-faulted"), "{}", process.log());
}

#[test]
fn while_a_vcpu_is_to_go_another_size_has_to_wait() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(&process, IDLE, &json!({}));
    process.put("vm.boot", None);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 3})).0, 204);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 2})).0, 204);
    let (status, said) = resize(&process, &json!({"desired_vcpus": 3}));
    assert!(status == 429 && said.contains("let go of vCPU 2"), "{status} {said}");
    assert_eq!(
        resize(&process, &json!({"desired_vcpus": 2})).0,
        204,
        "that is what was asked for"
    );
    assert_eq!(process.info()["config"]["cpus"]["boot_vcpus"], 2);
    assert_eq!(vcpu_threads(&process).len(), 3, "this guest never lets go");
    // Paused, it is resized like another; a reboot begins with what was asked for.
    process.put("vm.pause", None);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 3})).0, 429);
    process.put("vm.resume", None);
    process.put("vm.reboot", None);
    assert_eq!(vcpu_threads(&process), ["vcpu0", "vcpu1"]);
    process.put("vm.pause", None);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 3})).0, 204);
    process.put("vm.resume", None);
    process.put("vm.pause", None);
    assert_eq!(vcpu_threads(&process).len(), 3);
}

#[test]
fn numbers_that_cannot_be_change_nothing() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(&process, IDLE, &json!({}));
    let (status, said) = resize(&process, &json!({"desired_vcpus": 4}));
    assert!(status == 400 && said.contains("cpus.max_vcpus"), "{status} {said}");
    assert_eq!(resize(&process, &json!({"desired_vcpus": 2})).0, 204, "before the boot");
    process.put("vm.boot", None);
    assert_eq!(vcpu_threads(&process), ["vcpu0", "vcpu1"]);
    for desired in [0, 4] {
        let (status, said) = resize(&process, &json!({"desired_vcpus": desired}));
        let named = said.contains(&format!("desired_vcpus {desired}")) && said.contains("1 to 3");
        assert!(status == 400 && named, "{status} {said}");
    }
    let (status, said) = resize(&process, &json!({"desired_vcpus": 3, "desired_balloon": 4096}));
    assert!(
        status >= 400 && said.contains("desired_balloon 4096"),
        "{status} {said}"
    );
    assert_eq!(vcpu_threads(&process).len(), 2, "all of a request or nothing");
    let nothing = json!({"desired_vcpus": null, "desired_ram": null, "desired_balloon": null});
    assert_eq!(resize(&process, &nothing).0, 204);
    assert_eq!(process.info()["config"]["cpus"]["boot_vcpus"], 2);
}

const MIB: u64 = 1 << 20;

/// A guest that writes to the memory that came at 4 GiB as soon as the controller shows it, reads it back and powers off:
/// by way of the register when it is right, by a triple fault when it is not.
fn memory_using_guest() -> Vec<u8> {
    with_registers(&[
        0xC7, 0x05, 0x00, 0xC0, 0x1E, 0x40, 0x00, 0x00, 0x00, 0x00, // loop: mov dword [slot], 0
        0xA1, 0x14, 0xC0, 0x1E, 0x40, // mov eax, [state]
        0x83, 0xE0, 0x01, // and eax, MEN
        0x74, 0xEC, // jz loop
        // The page at 0x4020_0000 becomes the first of what came.
        0xC7, 0x05, 0x08, 0x20, 0x20, 0x00, 0x83, 0x00, 0x00, 0x00, // mov dword [0x202008], 0x83
        0xC7, 0x05, 0x0C, 0x20, 0x20, 0x00, 0x01, 0x00, 0x00, 0x00, // mov dword [0x20200C], 1
        0xC7, 0x05, 0x10, 0x00, 0x20, 0x40, 0x78, 0x56, 0x34, 0x12, // mov dword [0x40200010], 0x12345678
        0xA1, 0x10, 0x00, 0x20, 0x40, // mov eax, [0x40200010]
        0x3D, 0x78, 0x56, 0x34, 0x12, // cmp eax, 0x12345678
        0x75, 0xFE, // jne itself
        0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, // mov dx, 0x600; mov al, 0x34; out dx, al
        0xF4,
    ])
}

#[test]
fn memory_that_comes_is_there() {
    if !kvm() {
        return;
    }
    let mut process = Process::start();
    // As a shim sends it: more than any host has, shared.
    let memory = json!({"size": 128 * MIB, "hotplug_size": 4096 * 1024 * MIB, "shared": true, "thp": true});
    create(&process, &memory_using_guest(), &json!({"memory": memory}));
    process.put("vm.boot", None);
    let (status, said) = resize(&process, &json!({"desired_ram": 384 * MIB}));
    assert_eq!(status, 204, "{said}");
    assert!(process.wait().success(), "{}", process.log());
}

#[test]
fn memory_grows_in_steps_and_never_shrinks() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(
        &process,
        IDLE,
        &json!({"memory": {"size": 128 * MIB, "hotplug_size": 2048 * MIB}}),
    );
    process.put("vm.boot", None);
    let sizes = |process: &Process| {
        let info = process.info();
        (
            info["config"]["memory"]["size"].as_u64(),
            info["memory_actual_size"].as_u64(),
        )
    };
    let mut have = 128 * MIB;
    let refused = |desired: u64, word: &str| {
        let (status, said) = resize(&process, &json!({"desired_vcpus": 2, "desired_ram": desired}));
        let named = said.contains(&format!("desired_ram {desired}")) && said.contains(word);
        assert!(status == 400 && named, "{status} {said}");
        assert_eq!(vcpu_threads(&process).len(), 1, "all of a request or nothing");
    };
    for step in 1..=8 {
        refused(have + MIB, &format!("ask for {have} or {}", have + 128 * MIB));
        refused(have - 128 * MIB, "VirtioMem");
        refused(2177 * MIB, "memory.hotplug_size");
        have += 128 * MIB * (1 + step % 2);
        assert_eq!(
            resize(&process, &json!({"desired_vcpus": null, "desired_ram": have})).0,
            204
        );
        assert_eq!(sizes(&process), (Some(have), Some(have)));
        assert_eq!(
            resize(&process, &json!({"desired_ram": have})).0,
            204,
            "that is what it has"
        );
    }
    refused(have + 128 * MIB, "slots are taken");
    process.put("vm.pause", None);
    let (dir, url) = (
        process.path("saved"),
        format!("file://{}", process.path("saved").display()),
    );
    std::fs::create_dir(&dir).unwrap();
    let (status, said) = process.request("PUT", "vm.snapshot", Some(&json!({"destination_url": url})));
    assert!(status == 400 && said.to_string().contains("given"), "{status} {said}");
    process.put("vm.resume", None);
    // The next boot has all of it as one, and room again.
    process.put("vm.reboot", None);
    assert_eq!(sizes(&process), (Some(have), Some(have)));
    assert_eq!(resize(&process, &json!({"desired_ram": have + 128 * MIB})).0, 204);
    process.put(
        "vm.add-vsock",
        Some(&json!({"cid": 3, "socket": process.path("vsock")})),
    );
    assert_eq!(sizes(&process).0, Some(have + 128 * MIB), "another change keeps it");
}

#[test]
fn memory_that_the_guest_takes_is_asked_for() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let memory = json!({"size": 128 * MIB, "hotplug_size": 512 * MIB, "hotplug_method": "VirtioMem", "hotplugged_size": 2 * MIB});
    create(&process, IDLE, &json!({"memory": memory}));
    process.put("vm.boot", None);
    let requested = || process.request("GET", "vm.counters", None).1["__mem"]["requested_bytes"].as_u64();
    assert_eq!(requested(), Some(2 * MIB));
    for desired in [640, 128, 130] {
        assert_eq!(resize(&process, &json!({"desired_ram": desired * MIB})).0, 204);
        assert_eq!(requested(), Some((desired - 128) * MIB));
        let info = process.info();
        assert_eq!(
            info["memory_actual_size"],
            128 * MIB,
            "what the guest has, not what it was asked for"
        );
        assert_eq!(info["config"]["memory"]["size"], 128 * MIB);
        let plugged = info["config"]["memory"]["hotplugged_size"].as_u64();
        assert_eq!(plugged.unwrap_or(0), (desired - 128) * MIB);
    }
    for (desired, word) in [
        (126 * MIB, "booted with"),
        (642 * MIB, "hotplug_size"),
        (131 * MIB, "ask for"),
    ] {
        let (status, said) = resize(&process, &json!({"desired_ram": desired}));
        assert!(status == 400 && said.contains(word), "{status} {said}");
    }
    let (status, said) = process.request("PUT", "vm.remove-device", Some(&json!({"id": "__mem"})));
    assert!(
        status == 409 && said.to_string().contains("stays in it"),
        "{status} {said}"
    );
    process.put("vm.reboot", None);
    assert_eq!(requested(), Some(2 * MIB), "asked for again");
}

#[test]
fn sizes_of_a_pod_without_room_are_refused_by_name() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    create(&process, IDLE, &json!({}));
    process.put("vm.boot", None);
    let (status, said) = resize(&process, &json!({"desired_ram": 256 * MIB}));
    assert!(status == 400 && said.contains("memory.hotplug_size"), "{status} {said}");
    let process = Process::start();
    process.boot_pod("snp-emulated");
    for (field, desired) in [("desired_ram", 1024 * MIB), ("desired_vcpus", 2)] {
        let (status, said) = resize(&process, &json!({ field: desired }));
        let named = said.contains("confidential") && said.contains(&format!("{field} {desired}"));
        assert!(status == 403 && named, "{status} {said}");
    }
    assert_eq!(
        resize(&process, &json!({"desired_vcpus": 1, "desired_ram": 512 * MIB})).0,
        204
    );
    let wrong = json!({"memory": {"size": 128 * MIB, "hotplug_size": 128 * MIB, "hotplugged_size": 128 * MIB}});
    let (status, said) = Process::start().request("PUT", "vm.create", Some(&wrong));
    assert!(
        status == 400 && said.to_string().contains("memory.hotplugged_size"),
        "{status} {said}"
    );
}

#[test]
fn a_restored_pod_is_resized_like_another() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let memory = json!({"size": 128 * MIB, "hotplug_size": 1024 * MIB});
    create(&process, &memory_using_guest(), &json!({"memory": memory}));
    process.put("vm.boot", None);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 2})).0, 204);
    let (dir, url) = (
        process.path("saved"),
        format!("file://{}", process.path("saved").display()),
    );
    std::fs::create_dir(&dir).unwrap();
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&json!({"destination_url": url})));
    let mut other = Process::start();
    other.put("vm.restore", Some(&json!({"source_url": url, "resume": true})));
    assert_eq!(vcpu_threads(&other), ["vcpu0", "vcpu1"], "as many as it was given");
    assert_eq!(resize(&other, &json!({"desired_vcpus": 3})).0, 204);
    assert_eq!(vcpu_threads(&other).len(), 3);
    let (status, said) = resize(&other, &json!({"desired_ram": 256 * MIB}));
    assert_eq!(status, 204, "{said}");
    assert!(other.wait().success(), "{}", other.log());
}

#[test]
fn a_pod_with_room_for_virtio_mem_is_saved_while_it_has_none() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let memory = json!({"size": 128 * MIB, "hotplug_size": 512 * MIB, "hotplug_method": "VirtioMem"});
    create(&process, IDLE, &json!({"memory": memory}));
    process.put("vm.boot", None);
    assert_eq!(resize(&process, &json!({"desired_ram": 130 * MIB})).0, 204);
    let (dir, url) = (
        process.path("saved"),
        format!("file://{}", process.path("saved").display()),
    );
    std::fs::create_dir(&dir).unwrap();
    let body = json!({"destination_url": url});
    process.put("vm.pause", None);
    let (status, said) = process.request("PUT", "vm.snapshot", Some(&body));
    assert!(
        status == 400 && said.to_string().contains("vm.resize"),
        "{status} {said}"
    );
    process.put("vm.resume", None);
    assert_eq!(resize(&process, &json!({"desired_ram": 128 * MIB})).0, 204);
    process.put("vm.pause", None);
    process.put("vm.snapshot", Some(&body));
    let other = Process::start();
    other.put("vm.restore", Some(&json!({"source_url": url, "resume": true})));
    assert_eq!(resize(&other, &json!({"desired_ram": 256 * MIB})).0, 204);
    let counters = other.request("GET", "vm.counters", None).1;
    assert_eq!(counters["__mem"]["requested_bytes"].as_u64(), Some(128 * MIB));
}

#[test]
fn a_zone_with_room_grows_by_its_name() {
    if !kvm() {
        return;
    }
    let process = Process::start();
    let memory = json!({"size": 0, "hotplug_method": "VirtioMem", "zones": [
        {"id": "a", "size": 64 * MIB},
        {"id": "b", "size": 64 * MIB, "hotplug_size": 256 * MIB, "hotplugged_size": 4 * MIB, "shared": true},
        {"id": "c", "size": 64 * MIB, "hotplug_size": 256 * MIB},
    ]});
    create(&process, IDLE, &json!({"memory": memory}));
    process.put("vm.boot", None);
    let zone = |id: &str, size: u64| {
        let body = json!({"id": id, "desired_ram": size});
        let (status, said) = process.request("PUT", "vm.resize-zone", Some(&body));
        (status, said.to_string())
    };
    let requested = || {
        let counters = process.request("GET", "vm.counters", None).1;
        ["__mem-b", "__mem-c"].map(|id| counters[id]["requested_bytes"].as_u64().unwrap())
    };
    assert_eq!(requested(), [4 * MIB, 0]);
    assert_eq!(zone("c", 192 * MIB).0, 204);
    assert_eq!(zone("b", 64 * MIB).0, 204);
    assert_eq!(requested(), [0, 128 * MIB]);
    for (id, size, word) in [
        ("a", 65 * MIB, "hotplug_size"),
        ("b", 322 * MIB, "hotplug_size"),
        ("b", 62 * MIB, "booted with"),
        ("c", 65 * MIB, "ask for"),
        ("d", 64 * MIB, "vm.info"),
    ] {
        let (status, said) = zone(id, size);
        assert!(status == 400 && said.contains(word), "{id} {size}: {status} {said}");
    }
    assert_eq!(zone("a", 64 * MIB).0, 204, "that is what it has");
    let (status, said) = resize(&process, &json!({"desired_ram": 320 * MIB}));
    assert!(status == 400 && said.contains("vm.resize-zone"), "{status} {said}");
    assert_eq!(requested(), [0, 128 * MIB]);
    process.put("vm.reboot", None);
    assert_eq!(requested(), [0, 128 * MIB], "asked for again");
    for (key, value) in [("file", json!("/tmp")), ("id", json!("a"))] {
        let method = if key == "file" { "VirtioMem" } else { "Acpi" };
        let mut zone = json!({"id": "a", "size": 64 * MIB, "hotplug_size": 64 * MIB});
        zone[key] = value;
        let config = json!({"memory": {"size": 0, "hotplug_method": method, "zones": [zone]}});
        let (status, said) = Process::start().request("PUT", "vm.create", Some(&config));
        assert!(
            status == 400 && said.to_string().contains("memory.zones[0].hotplug_size"),
            "{status} {said}"
        );
    }
}

/// The host CPUs that the monitor's thread `name` may run on.
fn host_cpus(process: &Process, name: &str) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .find(|status| status.lines().next() == Some(&format!("Name:\t{name}")))
        .map(|status| allowed(&status))
        .unwrap()
}

fn allowed(status: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn vcpus_stay_on_their_host_cpus() {
    if !kvm() {
        return;
    }
    let all = allowed(&std::fs::read_to_string("/proc/self/status").unwrap());
    let last: usize = all.rsplit([',', '-']).next().unwrap().parse().unwrap();
    let process = Process::start();
    let affinity = json!([{"vcpu": 1, "host_cpus": [last]}, {"vcpu": 2, "host_cpus": [8191]}]);
    create(
        &process,
        IDLE,
        &json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 3, "affinity": affinity}}),
    );
    process.put("vm.boot", None);
    assert_eq!(host_cpus(&process, "vcpu0"), all);
    assert_eq!(resize(&process, &json!({"desired_vcpus": 2})).0, 204);
    assert_eq!(host_cpus(&process, "vcpu1"), last.to_string());
    let (status, said) = resize(&process, &json!({"desired_vcpus": 3}));
    let named = said.contains("cpus.affinity: vCPU 2") && said.contains("[8191]");
    assert!(status == 500 && named, "{status} {said}");
    assert_eq!(vcpu_threads(&process), ["vcpu0", "vcpu1"]);
    assert_eq!(process.info()["config"]["cpus"]["boot_vcpus"], 2);
}
