//! The API without sockets: routing and refusals. Boots are tested with the real process.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use super::*;
use crate::vcpu::ExitSignal;

struct Api {
    pod: PodSlot,
    events: Events,
    shutdown: bool,
}

impl Api {
    fn new() -> Self {
        let exit = Arc::new(ExitSignal::new().unwrap());
        Self {
            pod: PodSlot::new(exit, Instant::now(), None),
            events: Events::new().unwrap(),
            shutdown: false,
        }
    }

    fn call(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut state = State {
            pod: &mut self.pod,
            events: &mut self.events,
            shutdown: &mut self.shutdown,
            files: Vec::new(),
        };
        let call = Call {
            method,
            path,
            body: body.as_bytes(),
        };
        let reply = answer(&mut state, &call);
        (reply.status, reply.body.unwrap_or_default())
    }

    fn put(&mut self, name: &str, body: &str) -> (u16, String) {
        self.call("PUT", &format!("/api/v1/{name}"), body)
    }

    fn get(&mut self, name: &str) -> (u16, String) {
        self.call("GET", &format!("/api/v1/{name}"), "")
    }
}

const KERNEL: &str = r#"{"payload":{"kernel":"/nowhere/vmlinux"},"memory":{"size":268435456}}"#;

#[test]
fn unknown_paths_wrong_methods_and_bodies() {
    let mut api = Api::new();
    assert_eq!(api.call("GET", "/", "").0, 404);
    assert_eq!(api.call("GET", "/api/v2/vmm.ping", "").0, 404);
    assert_eq!(api.get("nothing.here").0, 404);
    assert_eq!(api.put("vmm.ping", "").0, 400);
    assert_eq!(api.get("vm.create").0, 400);
    assert_eq!(api.put("vm.boot", "{}").0, 400);
    assert_eq!(api.put("vm.create", "").0, 400);
    let (status, body) = api.put("vm.coredump", "{}");
    assert_eq!(status, 501);
    assert!(body.contains("vm.coredump is not supported yet by podvisor"), "{body}");
}

#[test]
fn the_life_of_a_pod_that_does_not_boot() {
    let mut api = Api::new();
    assert_eq!(api.get("vm.info").0, 404);
    assert_eq!(api.put("vm.boot", "").0, 404);
    assert_eq!(api.put("vm.create", KERNEL), (204, String::new()));
    assert_eq!(api.put("vm.create", KERNEL).0, 409);
    let (status, body) = api.put("vm.boot", "");
    assert!(
        status >= 400 && body.starts_with(r#"["Error from API","The VM could not boot""#),
        "{body}"
    );
    let info: Value = serde_json::from_str(&api.get("vm.info").1).unwrap();
    assert_eq!(info["state"], "Created");
    assert_eq!(info["memory_actual_size"], 268_435_456);
    assert_eq!(info["podvisor"]["isolation"], "none");
    assert_eq!(api.put("vm.pause", "").0, 409);
    assert_eq!(api.put("vm.delete", "").0, 204);
    assert_eq!(api.put("vm.delete", "").0, 204);
    assert_eq!(api.get("vm.info").0, 404);
    assert_eq!(api.put("vmm.shutdown", ""), (200, String::new()));
    assert!(api.shutdown);
}

#[test]
fn bad_configurations_are_400_and_name_the_field() {
    let mut api = Api::new();
    let payload = r#""payload":{"kernel":"/k"}"#;
    let bodies = [
        ("{".to_owned(), ""),
        (
            format!(r#"{{{payload},"memory":{{"size":1125899906842624}}}}"#),
            "memory.size",
        ),
        (format!(r#"{{{payload},"memory":{{"size":4097}}}}"#), "memory.size"),
        (format!(r#"{{{payload},"serial":{{"mode":"File"}}}}"#), "serial"),
        (format!(r#"{{{payload},"watchdog":true}}"#), "watchdog"),
        (format!(r#"{{{payload},"watchdog":true}}"#), "watchdog"),
        (
            format!(r#"{{{payload},"platform":{{"isolation":"secret"}}}}"#),
            "isolation",
        ),
        (
            r#"{"payload":{"kernel":"/k","host_data":"00"}}"#.to_owned(),
            "host_data",
        ),
        (
            r#"{"payload":{"kernel":"/k","igvm":"/i"}}"#.to_owned(),
            "payload.kernel",
        ),
        (
            format!(
                r#"{{{payload},"pod":{{"handler":"kata-cc","memory_limit":"512Mi"}},"memory":{{"size":1073741824}}}}"#
            ),
            "1073741824",
        ),
        (
            format!(
                r#"{{{payload},"pod":{{"handler":"kata-cc","cpu_limit":"1"}},"cpus":{{"boot_vcpus":1,"max_vcpus":1}}}}"#
            ),
            "boot_vcpus: 1 vCPUs are given, but the pod's limits come to 2",
        ),
        (
            format!(r#"{{{payload},"pod":{{"handler":"kata-cc","requests":{{}}}}}}"#),
            "requests",
        ),
    ];
    for (body, names) in bodies {
        let (status, answer) = api.put("vm.create", &body);
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer.contains(names), "{body}: {answer}");
        assert_eq!(api.get("vm.info").0, 404, "a refused request changes nothing");
    }
}

#[test]
fn a_pod_without_a_payload_is_created_and_refused_at_boot() {
    let mut api = Api::new();
    assert_eq!(api.put("vm.create", "{}").0, 204);
    let (status, body) = api.put("vm.boot", "");
    assert!(
        status >= 400 && body.contains("payload.igvm or payload.kernel"),
        "{body}"
    );
}

#[test]
fn a_pod_is_sized_by_its_limits() {
    let mut api = Api::new();
    let body = r#"{"payload":{"kernel":"/k"},"pod":{"handler":"kata-cc","memory_limit":"512Mi","cpu_limit":"1500m"}}"#;
    assert_eq!(api.put("vm.create", body).0, 204);
    let info: Value = serde_json::from_str(&api.get("vm.info").1).unwrap();
    assert_eq!(info["memory_actual_size"], 2560u64 << 20);
    assert_eq!(info["config"]["memory"]["size"], 2560u64 << 20);
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 3);
    assert_eq!(info["podvisor"]["sizing"]["vcpus"], 3);
}

#[test]
fn hardware_isolation_is_refused_where_there_is_none() {
    if crate::config::host_has_snp() {
        println!("skipped: this host has SEV-SNP");
        return;
    }
    let mut api = Api::new();
    for platform in [r#"{"sev_snp":true}"#, r#"{"snp":true}"#, r#"{"isolation":"snp"}"#] {
        let (status, answer) = api.put(
            "vm.create",
            &format!(r#"{{"payload":{{"igvm":"/i"}},"platform":{platform}}}"#),
        );
        assert_eq!(status, 400, "{answer}");
        assert!(answer.contains("isolation=snp-emulated"), "{answer}");
    }
}
