//! Pitfall 16: what `vm.info` tells after a resize, which the Go shim waits for.

use serde_json::{Value, json};

use crate::bodies::{self, MEMORY};
use crate::common::kvm;
use crate::sandbox::{Sandbox, Shim};
use crate::{go, process, strict};

/// The guest's memory block, in which both shims grow.
const BLOCK: u64 = 128 << 20;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// The Go shim's `ResizeMemory`: what is missing, no more than there is room for, in whole blocks.
fn resize_memory(client: &mut go::Client, wanted: u64) -> Result<(), String> {
    let memory = client.get("vm.info")?["config"]["memory"].clone();
    let (size, room) = (number(&memory["size"]), number(&memory["hotplug_size"]));
    let more = wanted.saturating_sub(size).min(room).next_multiple_of(BLOCK);
    if more == 0 {
        return Ok(());
    }
    client.put("vm.resize", Some(&json!({"desired_ram": size + more})))
}

/// The Go shim's `updateResources`, which goes on until the memory is there: with at most 48 times as much as before.
fn update_memory(client: &mut go::Client, wanted: u64) -> usize {
    for steps in 0..10 {
        let have = number(&client.get("vm.info").unwrap()["memory_actual_size"]);
        if have >= wanted {
            return steps;
        }
        resize_memory(client, wanted.min(have * 48)).unwrap();
    }
    unreachable!("vm.info does not tell of the memory that came")
}

#[test]
fn pitfall_16_the_go_shim_resizes() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Go);
    sandbox.idle_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::go_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    let cpus = |client: &mut go::Client| client.get("vm.info").unwrap()["config"]["cpus"].clone();
    for wanted in [2, 4, 4] {
        let told = cpus(&mut client);
        assert!(number(&told["max_vcpus"]) >= wanted);
        if number(&told["boot_vcpus"]) != wanted {
            client
                .put("vm.resize", Some(&json!({"desired_vcpus": wanted})))
                .unwrap();
        }
        assert_eq!(cpus(&mut client)["boot_vcpus"], wanted);
        assert_eq!(process::vcpus(sandbox.pid()).len(), usize::try_from(wanted).unwrap());
    }
    // Not a whole number of blocks: the shim rounds.
    assert_eq!(update_memory(&mut client, MEMORY), 0);
    assert_eq!(update_memory(&mut client, MEMORY + BLOCK + (3 << 20)), 1);
    let info = client.get("vm.info").unwrap();
    assert_eq!(number(&info["config"]["memory"]["size"]), MEMORY + 2 * BLOCK);
    assert_eq!(number(&info["memory_actual_size"]), MEMORY + 2 * BLOCK);
    assert_eq!(update_memory(&mut client, MEMORY + 4 * BLOCK), 1);
    // One that is too large is an error, and nothing else.
    let refused = client.put("vm.resize", Some(&json!({"desired_vcpus": 9}))).unwrap_err();
    assert!(refused.contains("desired_vcpus"), "{refused}");
    assert_eq!(client.state(), "Running");
}

#[test]
fn pitfall_16_the_rust_shim_resizes() {
    if !kvm() {
        return;
    }
    let sandbox = Sandbox::start(Shim::Rust);
    sandbox.idle_guest();
    let mut client = sandbox.rust();
    let mut config = bodies::rust_create(&sandbox);
    config["cpus"]["max_vcpus"] = json!(4);
    config["cpus"]["topology"]["cores_per_die"] = json!(4);
    client.put("vm.create", Some(&config)).unwrap();
    client.put("vm.boot", None).unwrap();
    // It does not ask first, and says of everything else that it is null.
    let vcpus = json!({"desired_vcpus": 3, "desired_ram": null, "desired_balloon": null});
    assert_eq!(client.put("vm.resize", Some(&vcpus)), Ok(None));
    assert_eq!(process::vcpus(sandbox.pid()), [0, 1, 2]);
    let info: strict::VmInfo = serde_json::from_value(client.get("vm.info").unwrap()).unwrap();
    let size = info.config.memory.unwrap().size + BLOCK;
    let memory = json!({"desired_vcpus": null, "desired_ram": size, "desired_balloon": null});
    assert_eq!(client.put("vm.resize", Some(&memory)), Ok(None));
    let info: strict::VmInfo = serde_json::from_value(client.get("vm.info").unwrap()).unwrap();
    assert_eq!(
        (info.config.memory.unwrap().size, info.memory_actual_size),
        (size, Some(size))
    );
    let cpus = info.config.cpus.unwrap();
    assert_eq!((cpus.boot_vcpus, cpus.max_vcpus), (3, 4));
}
