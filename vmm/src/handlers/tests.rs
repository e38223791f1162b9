//! The API without sockets: routing and refusals. Boots are tested with the real process.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use podvisor_api::endpoints::{Answer, ENDPOINTS};
use podvisor_api::not_done::NOT_DONE;
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
    assert_eq!(api.call("POST", "/api/v1/vm.boot", "").0, 400);
    // Cloud Hypervisor does not look at what comes with these.
    assert_eq!(api.call("GET", "/api/v1/vmm.ping", "{}").0, 200);
    assert_eq!(api.put("vmm.shutdown", "{}").0, 200);
}

#[test]
fn what_podvisor_will_not_do_is_refused_by_name() {
    let mut api = Api::new();
    let mut refused = 0;
    for endpoint in ENDPOINTS {
        let Some(why) = endpoint.refused else { continue };
        for body in ["", "{}", "{"] {
            let (status, answer) = api.put(endpoint.name, body);
            assert_eq!(status, 403, "{answer}");
            let causes: Vec<String> = serde_json::from_str(&answer).unwrap();
            assert_eq!(
                causes,
                [format!("Error from API: {}: {}: {why}", endpoint.fails, endpoint.name)]
            );
        }
        refused += 1;
    }
    assert_eq!(refused, 7);
}

#[test]
fn every_endpoint_of_a_pod_says_that_there_is_none_or_that_it_does_not_run() {
    let bodies = [
        ("vm.resize", r#"{"desired_vcpus":1}"#),
        ("vm.add-disk", r#"{"path":"/nowhere"}"#),
        ("vm.add-net", r#"{"tap":"t"}"#),
        ("vm.add-fs", r#"{"tag":"t","socket":"/nowhere"}"#),
        ("vm.add-vsock", r#"{"cid":3,"socket":"/nowhere"}"#),
        ("vm.remove-device", r#"{"id":"x"}"#),
        ("vm.snapshot", r#"{"destination_url":"file:///nowhere"}"#),
    ];
    let mut api = Api::new();
    for (name, body) in bodies {
        assert_eq!(api.put(name, body).0, 404, "{name}");
    }
    let actions = [
        "vm.boot",
        "vm.pause",
        "vm.resume",
        "vm.shutdown",
        "vm.reboot",
        "vm.power-button",
        "vm.nmi",
    ];
    for name in actions {
        let (status, body) = api.put(name, "");
        assert_eq!(status, 404, "{name}: {body}");
        let fails = ENDPOINTS.iter().find(|e| e.name == name).unwrap().fails;
        let first = format!(r#"["Error from API: {fails}: VM is not created"#);
        assert!(body.starts_with(&first), "{body}");
    }
    assert_eq!(api.get("vm.info").0, 404);
    assert_eq!(api.get("vm.counters").0, 404);
    assert_eq!(api.put("vm.create", KERNEL).0, 204);
    for name in &actions[1..] {
        let (status, body) = api.put(name, "");
        assert_eq!(status, 405, "{name}: {body}");
    }
    assert_eq!(api.get("vm.counters").0, 405);
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
        status >= 400
            && body.starts_with(r#"["Error from API: The VM could not boot: payload.kernel /nowhere/vmlinux""#),
        "{body}"
    );
    let info: Value = serde_json::from_str(&api.get("vm.info").1).unwrap();
    assert_eq!(info["state"], "Created");
    assert_eq!(info["memory_actual_size"], 268_435_456);
    assert_eq!(info["podvisor"]["isolation"], "none");
    assert_eq!(api.put("vm.pause", "").0, 405);
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
        (format!(r#"{{{payload},"iommu":true}}"#), "iommu"),
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
        let causes: Vec<String> = serde_json::from_str(&answer).unwrap();
        assert!(
            causes[0].starts_with("Error from API: The VM could not be created: "),
            "{answer}"
        );
        assert!(causes[0].contains(names), "{body}: {answer}");
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

/// The tables of `docs/api.md`, as the code has them.
fn documented() -> String {
    let mut text = String::from("| endpoint | method | takes | answers | |\n|---|---|---|---|---|\n");
    for endpoint in ENDPOINTS {
        let takes = match endpoint.takes {
            Takes::Json(body) => format!("{body:?}"),
            Takes::NoBody | Takes::Anything => String::new(),
        };
        let answers = match endpoint.answer {
            _ if endpoint.refused.is_some() => "403".to_owned(),
            Answer::Nothing => "204".to_owned(),
            Answer::Empty => "200".to_owned(),
            Answer::Json(body) => format!("200 {body:?}"),
            Answer::Device => "200 PciDeviceInfo, 204".to_owned(),
        };
        let (name, method) = (endpoint.name, endpoint.method.as_str());
        let says = endpoint.refused.unwrap_or(endpoint.summary);
        writeln!(text, "| `{name}` | {method} | {takes} | {answers} | {says} |").unwrap();
    }
    text
}

/// The other one.
fn documented_fields() -> String {
    let mut text = String::from("| field | option | |\n|---|---|---|\n");
    for row in NOT_DONE {
        let option = row.option.map(|o| format!("`{o}`")).unwrap_or_default();
        writeln!(text, "| `{}` | {option} | {} |", row.field, row.why).unwrap();
    }
    text
}

#[test]
fn the_documented_tables_are_the_codes() {
    let page = include_str!("../../../docs/api.md");
    for expected in [documented(), documented_fields()] {
        // Up to its end: a table of the page has no row that the code has not.
        assert!(
            page.contains(&format!("{expected}\n")),
            "docs/api.md has other tables than the code, which has:\n{expected}"
        );
    }
}

#[test]
fn only_steps_that_may_take_long_have_a_helper_beside_them() {
    let mut api = Api::new();
    let long = |api: &Api, name: &str, body: &str| {
        may_take_long(
            &api.pod,
            &Call {
                method: "PUT",
                path: &format!("/api/v1/{name}"),
                body: body.as_bytes(),
            },
        )
    };
    assert_eq!(api.put("vm.create", KERNEL).0, 204);
    for name in [
        "vm.boot",
        "vm.reboot",
        "vm.delete",
        "vm.shutdown",
        "vm.pause",
        "vm.info",
    ] {
        assert!(!long(&api, name, ""), "{name}");
    }
    for (name, body, expected) in [
        (
            "vm.add-disk",
            r#"{"path":"/x","vhost_user":false,"vhost_socket":null}"#,
            false,
        ),
        ("vm.add-disk", r#"{"vhost_user":true,"vhost_socket":"/x"}"#, true),
        ("vm.add-net", r#"{"vhost_user": true,"vhost_socket":"/x"}"#, true),
        ("vm.add-fs", r#"{"tag":"x","shared_dir":"/x","socket":null}"#, false),
        ("vm.add-fs", r#"{"tag":"x","socket":"/x"}"#, true),
        ("vm.add-fs", "{", false),
    ] {
        assert_eq!(long(&api, name, body), expected, "{name} {body}");
    }
    api.put("vm.delete", "");
    let large = r#"{"payload":{"kernel":"/k"},"memory":{"size":8589934592,"prefault":true}}"#;
    assert_eq!(api.put("vm.create", large).0, 204);
    for name in ["vm.boot", "vm.reboot", "vm.delete", "vm.shutdown", "vm.resize"] {
        assert!(long(&api, name, ""), "{name}");
    }
}
