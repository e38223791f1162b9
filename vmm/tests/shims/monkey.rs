//! A shim that has lost its mind: requests in any order on both shims' connections, with bodies that are wrong in one
//! place. Every answer has a frame that both shims read and a status that podvisor has, and in the end a sane shim is
//! served as on the first day.

use std::io::Write;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::bodies;
use crate::bytes::{answer, check_frame};
use crate::common::kvm;
use crate::sandbox::{self, Sandbox, Shim, agent, say};
use crate::{go, rust};

/// Numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % u64::try_from(bound).unwrap()).unwrap()
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// The places of `value`, as JSON pointers (RFC 6901; no key here needs its escapes).
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| {
            found.push(format!("{at}/{key}"));
            places(v, &format!("{at}/{key}"), found);
        }),
        Value::Array(list) => list.iter().enumerate().for_each(|(key, v)| {
            found.push(format!("{at}/{key}"));
            places(v, &format!("{at}/{key}"), found);
        }),
        _ => {}
    }
}

/// Puts something else in one place of `value`.
fn spoil(value: &mut Value, dice: &mut Dice) {
    let mut found = Vec::new();
    places(value, "", &mut found);
    let place = dice.one(&found).clone();
    let other = [
        Value::Null,
        json!(-1),
        json!(0),
        json!(3),
        json!(255),
        json!(65536),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("x"),
        json!("\u{0}\u{1F600}"),
        json!(true),
        json!([]),
        json!({}),
        json!([{}]),
        json!({"size": {"size": []}}),
    ];
    *value.pointer_mut(&place).unwrap() = dice.one(&other).clone();
}

/// A request: right, or wrong in one place, or wrong altogether.
fn request(sandbox: &Sandbox, dice: &mut Dice) -> (&'static str, &'static str, Option<String>) {
    let disk = sandbox.path(["volume", "image", "kernel", "none"][dice.below(4)]);
    let id = ["_disk0", "_disk1", "_vsock1", "__rng", "x"][dice.below(5)];
    let with_body = [
        ("vm.create", bodies::go_create(sandbox)),
        ("vm.create", bodies::rust_create(sandbox)),
        ("vm.add-disk", bodies::go_disk(&disk, true)),
        ("vm.add-disk", bodies::rust_disk(&disk, false)),
        ("vm.add-net", bodies::go_net(1)),
        (
            "vm.add-vsock",
            json!({"cid": 3, "socket": sandbox.vsock(), "id": null, "pci_segment": 0}),
        ),
        ("vm.remove-device", json!({"id": id})),
        (
            "vm.resize",
            json!({"desired_vcpus": dice.below(10), "desired_ram": null, "desired_balloon": null}),
        ),
        (
            "vm.resize",
            json!({"desired_ram": u64::try_from(dice.below(6)).unwrap() * bodies::MEMORY}),
        ),
        (
            "vm.snapshot",
            json!({"destination_url": format!("file://{}", sandbox.dir.path().display())}),
        ),
        (
            "vm.restore",
            json!({"source_url": format!("file://{}", sandbox.dir.path().display())}),
        ),
        ("vm.resize-disk", json!({"id": "_disk0", "desired_size": 1 << 20})),
        ("vm.resize-zone", json!({"id": "mem0", "desired_ram": 1 << 20})),
        (
            "vm.add-device",
            json!({"path": "/sys/bus/pci/devices/0000:00:00.0", "iommu": false}),
        ),
    ];
    let without = [
        ("GET", "vmm.ping"),
        ("GET", "vm.info"),
        ("GET", "vm.counters"),
        ("PUT", "vm.boot"),
        ("PUT", "vm.boot"),
        ("PUT", "vm.pause"),
        ("PUT", "vm.resume"),
        ("PUT", "vm.shutdown"),
        ("PUT", "vm.delete"),
        ("PUT", "vm.reboot"),
        ("PUT", "vm.power-button"),
        ("PUT", "vm.nmi"),
        ("PUT", "vm.nothing"),
    ];
    if dice.below(2) == 0 {
        let (method, endpoint) = *dice.one(&without);
        let stray = (dice.below(20) == 0).then(|| "{}".to_owned());
        return (method, endpoint, stray);
    }
    let (endpoint, mut body) = dice.one(&with_body).clone();
    if dice.below(3) == 0 {
        spoil(&mut body, dice);
    }
    let mut text = body.to_string();
    if dice.below(20) == 0 {
        text.truncate(text.len() / 2);
    }
    ("PUT", endpoint, Some(text))
}

fn write(stream: &mut UnixStream, shim: Shim, (method, endpoint, body): (&str, &str, Option<&str>)) {
    match shim {
        Shim::Go => stream
            .write_all(go::request(method, endpoint, body).as_bytes())
            .unwrap(),
        Shim::Rust => {
            for segment in rust::Client::segments(method, endpoint, body) {
                stream.write_all(segment.as_bytes()).unwrap();
            }
        }
    }
}

fn run(seed: u64) {
    if !kvm() {
        return;
    }
    // In a directory of its own, as it may be told to write to a file of any name.
    let dir = tempfile::tempdir().unwrap();
    let mut command = sandbox::command(Shim::Rust, dir.path(), true);
    command.current_dir(dir.path());
    let sandbox = Sandbox::spawn(Shim::Rust, dir, command);
    // A pod that powers off ends the monitor; this one never does.
    sandbox.idle_guest();
    let mut dice = Dice(seed);
    let mut streams = [(Shim::Go, sandbox.raw()), (Shim::Rust, sandbox.raw())];
    for number in 0..250 {
        // Now and then both ask at once.
        let first = dice.below(2);
        let both = dice.below(4) == 0;
        let asked: Vec<_> = (0..if both { 2 } else { 1 })
            .map(|n| ((first + n) % 2, request(&sandbox, &mut dice)))
            .collect();
        for (who, (method, endpoint, body)) in &asked {
            println!("{seed} {number}: {method} {endpoint} {body:?}");
            let (shim, stream) = &mut streams[*who];
            write(stream, *shim, (method, endpoint, body.as_deref()));
        }
        for (who, what) in &asked {
            let answer = answer(&mut streams[*who].1);
            check_frame(&answer);
            let said = String::from_utf8_lossy(&answer.body);
            // 500: what the host does not have, such as a disk's file.
            let known = [200, 204, 400, 403, 404, 405, 409, 429, 500];
            assert!(
                known.contains(&answer.status()),
                "{seed} {number} {what:?}: {} {said}",
                answer.status()
            );
        }
    }
    let mut client = go::Client::new(&sandbox.api());
    client.put("vm.delete", None).unwrap();
    // What the requests have left: a shim's directory is empty when it begins.
    let _ = std::fs::remove_file(sandbox.vsock());
    sandbox.pod_guest();
    client.put("vm.create", Some(&bodies::rust_create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
}

#[test]
fn any_requests_in_any_order_1() {
    run(1);
}

#[test]
fn any_requests_in_any_order_2() {
    run(2);
}
