//! The event monitor of a real podvisor: what it tells over a pod's life, in order.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use common::{Process, kvm, podvisor, wait_for};
use podvisor_api::events::{Event, Source, What};
use podvisor_api::http::Client;

fn told(process: &Process) -> Vec<Event> {
    let text = std::fs::read_to_string(process.path("events")).unwrap();
    text.split_terminator("\n\n")
        .map(|record| serde_json::from_str(record).unwrap())
        .collect()
}

#[test]
fn a_pods_life_is_told_in_order() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let child = podvisor(&socket, &dir.path().join("log"))
        .arg("--event-monitor")
        .arg(format!("path={}", dir.path().join("events").display()))
        .spawn()
        .unwrap();
    let mut process = Process { dir, child, socket };
    wait_for("the API socket", || Client::connect(&process.socket).ok());
    process.boot_pod("none");
    drop(process.agent());
    process.put("vm.pause", None);
    process.put("vm.resume", None);
    process.put("vm.shutdown", None);
    process.put("vm.delete", None);
    process.put("vmm.shutdown", None);
    process.wait();

    let events = told(&process);
    let names: Vec<What> = events
        .iter()
        .filter(|e| matches!(e.source, Source::Vm | Source::Vmm | Source::CpuManager))
        .map(|e| e.event)
        .collect();
    let expected = [
        What::Starting,
        What::Booting,
        What::CreateVcpu,
        What::Booted,
        What::Pausing,
        What::Paused,
        What::Resuming,
        What::Resumed,
        What::Shutdown,
        What::Deleted,
        What::Shutdown,
    ];
    assert_eq!(names, expected);
    let devices: Vec<&str> = events
        .iter()
        .filter(|e| (e.source, e.event) == (Source::VirtioDevice, What::Activated))
        .filter_map(|e| Some(e.properties.as_ref()?["id"].as_str()))
        .collect();
    assert!(devices.iter().any(|id| id.contains("vsock")), "{devices:?}");
    assert!(events.is_sorted_by_key(|e| e.timestamp));
}
