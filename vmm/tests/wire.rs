//! Exchanges recorded from Cloud Hypervisor (`resources/wire`), played against podvisor and compared step by step.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{IDLE, Process, kvm, pvh_kernel};
use serde_json::Value;

/// What must agree of an answer: the status (all refusals are one), and for a 200 the keys of its JSON.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    status: String,
    keys: Option<BTreeSet<String>>,
}

fn shape(status_line: &str, body: &str) -> Shape {
    let code = status_line.split(' ').nth(1).unwrap_or(status_line);
    let refused = code.starts_with('4') || code.starts_with('5');
    let keys = match serde_json::from_str::<Value>(body) {
        Ok(Value::Object(object)) if code == "200" => Some(object.keys().cloned().collect()),
        _ => None,
    };
    Shape {
        status: if refused { "refused".to_owned() } else { code.to_owned() },
        keys,
    }
}

/// One answer: status line, headers, body.
fn answer(stream: &mut UnixStream) -> Option<(String, Vec<String>, String)> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => bytes.push(byte[0]),
            _ => return None,
        }
    }
    let head = String::from_utf8(bytes).unwrap();
    let mut lines: Vec<_> = head.trim_end().split("\r\n").map(str::to_owned).collect();
    let status = lines.remove(0);
    let length = lines
        .iter()
        .find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    lines.sort();
    Some((status, lines, String::from_utf8(body).unwrap()))
}

fn send(stream: &mut UnixStream, step: &Value, dir: &str) {
    let filled = |text: &str| text.replace("@DIR@", dir);
    if let Some(parts) = step.get("split").and_then(Value::as_array) {
        for part in parts {
            stream.write_all(filled(part.as_str().unwrap()).as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
    } else if let Some(raw) = step.get("raw").and_then(Value::as_str) {
        stream.write_all(filled(raw).as_bytes()).unwrap();
    } else {
        let (method, path) = (step[0].as_str().unwrap(), step[1].as_str().unwrap());
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/api/v1/{path}")
        };
        let body = match &step[2] {
            Value::Null => None,
            Value::String(text) => Some(filled(text)),
            json => Some(filled(&json.to_string())),
        };
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = &body {
            text += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        stream
            .write_all(format!("{text}\r\n{}", body.unwrap_or_default()).as_bytes())
            .unwrap();
    }
}

/// A file of `resources/wire`.
fn read(file: &str) -> Value {
    let path = format!("{}/../resources/wire/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A monitor with the files that scenarios name in its directory, and a connection to it.
fn monitor() -> (Process, UnixStream) {
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), IDLE);
    for (file, size) in [
        ("a.img", 16 << 20),
        ("b.img", 16 << 20),
        ("pmem.img", 16 << 20),
        ("empty", 0),
    ] {
        File::create(process.path(file)).unwrap().set_len(size).unwrap();
    }
    let stream = UnixStream::connect(&process.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (process, stream)
}

/// The frame, byte for byte: what Cloud Hypervisor itself (not its HTTP library) answers has these headers.
fn check_frame(what: &str, status: &str, headers: &[String], body: &str) {
    assert!(status.ends_with(' ') && status.starts_with("HTTP/1.1 "), "{what}");
    let mut frame = vec![
        "Connection: keep-alive".to_owned(),
        "Server: Cloud Hypervisor API".to_owned(),
    ];
    if !status.starts_with("HTTP/1.1 204") {
        frame.push(format!("Content-Length: {}", body.len()));
        frame.push("Content-Type: application/json".to_owned());
    }
    frame.sort();
    assert_eq!(headers, frame, "{what}");
}

fn play(name: &str) {
    if !kvm() {
        return;
    }
    let (scenarios, recorded) = (read("scenarios.json"), read("cloud-hypervisor.json"));
    let scenario = scenarios
        .as_array()
        .unwrap()
        .iter()
        .find(|s| s["name"] == name)
        .unwrap();
    let (process, mut stream) = monitor();
    let dir = process.dir.path().to_str().unwrap();
    let steps = scenario["steps"].as_array().unwrap();
    for (number, (step, then)) in steps.iter().zip(recorded[name].as_array().unwrap()).enumerate() {
        send(&mut stream, step, dir);
        let (status, headers, body) = answer(&mut stream).unwrap_or_else(|| unreachable!("{name} {number}: no answer"));
        let what = format!("{name} {number} {step}: {status} {body}");
        let then_status = then["status"].as_str().unwrap();
        let expected = shape(then_status, then["body"].as_str().unwrap_or_default());
        let got = shape(&status, &body);
        assert_eq!(got.status, expected.status, "{what}");
        if let Some(mut keys) = expected.keys {
            keys.remove("device_tree");
            assert!(
                keys.is_subset(&got.keys.unwrap_or_default()),
                "{what}: expected {keys:?}"
            );
        }
        check_frame(&what, &status, &headers, &body);
    }
}

/// Plays a scenario of `contract.json`: the status exactly, the keys of a body, what a refusal names in its first string.
fn play_contract(name: &str) {
    if !kvm() {
        return;
    }
    let scenarios = read("contract.json");
    let scenario = scenarios.as_array().unwrap().iter().find(|s| s["name"] == name);
    let (process, mut stream) = monitor();
    let dir = process.dir.path().to_str().unwrap();
    for (number, step) in scenario.unwrap()["steps"].as_array().unwrap().iter().enumerate() {
        send(&mut stream, &step["request"], dir);
        let (status, headers, body) = answer(&mut stream).unwrap_or_else(|| unreachable!("{name} {number}: no answer"));
        let what = format!("{name} {number} {step}: {status} {body}");
        assert_eq!(status, format!("HTTP/1.1 {} ", step["status"]), "{what}");
        check_frame(&what, &status, &headers, &body);
        if step["status"].as_u64() >= Some(400) {
            let causes: Vec<String> = serde_json::from_str(&body).unwrap();
            assert!(!causes.is_empty(), "{what}");
            let named = step["says"].as_str().unwrap_or_default();
            assert!(causes[0].contains(named), "{what}");
        }
        let told = shape(&status, &body).keys.unwrap_or_default();
        for key in step["keys"].as_array().into_iter().flatten() {
            assert!(told.contains(key.as_str().unwrap()), "{what}");
        }
    }
}

#[test]
fn contract_adding() {
    play_contract("adding");
}

#[test]
fn contract_refusing() {
    play_contract("refusing");
}

#[test]
fn life() {
    play("life");
}

#[test]
fn hotplug() {
    play("hotplug");
}

#[test]
fn nulls() {
    play("nulls");
}

#[test]
fn preboot() {
    play("preboot");
}
