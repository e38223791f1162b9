//! Pitfalls 17 and 23: the connections that a shim and its helpers hold to the pod.

use std::os::unix::fs::MetadataExt;

use crate::bodies;
use crate::common::{kvm, wait_for};
use crate::sandbox::{Sandbox, Shim, agent, dial, say};

fn boot(shim: Shim) -> Sandbox {
    let sandbox = Sandbox::start(shim);
    sandbox.pod_guest();
    let mut client = sandbox.go();
    client.put("vm.create", Some(&bodies::create(&sandbox))).unwrap();
    client.put("vm.boot", None).unwrap();
    sandbox
}

#[test]
fn pitfall_17_both_spellings_of_the_handshake() {
    if !kvm() {
        return;
    }
    let sandbox = boot(Shim::Rust);
    for shim in [Shim::Rust, Shim::Go] {
        // The first attempt may come before the pod listens: then it is closed, or answered later, but not left.
        let mut stream = agent(shim, &sandbox.vsock());
        assert!(say(&mut stream, "hello").starts_with("ok "), "{shim:?}");
    }
}

#[test]
fn pitfall_17_a_port_without_a_listener_is_closed_without_a_word() {
    if !kvm() {
        return;
    }
    let sandbox = boot(Shim::Rust);
    let mut stream = agent(Shim::Rust, &sandbox.vsock());
    // The log port, which the Rust shim tries a thousand times.
    for _ in 0..1000 {
        assert!(dial(Shim::Rust, &sandbox.vsock(), 1025).is_none());
    }
    assert!(say(&mut stream, "hello").starts_with("ok "));
}

#[test]
fn pitfall_17_a_pod_that_does_not_answer_is_not_waited_for_for_ever() {
    if !kvm() {
        return;
    }
    let sandbox = boot(Shim::Rust);
    let mut stream = agent(Shim::Rust, &sandbox.vsock());
    let mut client = sandbox.rust();
    client.put("vm.pause", None).unwrap();
    // Closed without a word after 2 s: the shim itself waits without a limit.
    for shim in [Shim::Rust, Shim::Go] {
        assert!(dial(shim, &sandbox.vsock(), 1024).is_none());
    }
    client.put("vm.resume", None).unwrap();
    assert!(say(&mut stream, "hello").starts_with("ok "));
    assert!(say(&mut agent(Shim::Rust, &sandbox.vsock()), "hello").starts_with("ok "));
}

#[test]
fn pitfall_17_a_storm_of_dials_while_the_pod_boots() {
    if !kvm() {
        return;
    }
    let sandbox = boot(Shim::Go);
    let vsock = sandbox.vsock();
    let inode = || std::fs::metadata(&vsock).unwrap().ino();
    let before = inode();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for n in 0..500 {
                    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&vsock) else {
                        continue;
                    };
                    // Some are given up before they have said all of it, some before the answer.
                    let word = if n % 3 == 0 { "CONN" } else { "CONNECT 1024\n" };
                    let _ = std::io::Write::write_all(&mut stream, word.as_bytes());
                }
            });
        }
    });
    let mut stream = agent(Shim::Go, &vsock);
    assert!(say(&mut stream, "hello").starts_with("ok "));
    sandbox.go().get("vm.info").unwrap();
    assert_eq!(inode(), before, "the socket was made anew");
}

#[test]
fn pitfall_23_virtiofsd_is_connected_to_once_and_kept() {
    if !kvm() {
        return;
    }
    for shim in [Shim::Go, Shim::Rust] {
        let mut sandbox = Sandbox::start(shim);
        sandbox.pod_guest();
        if !sandbox.start_virtiofsd() {
            return;
        }
        let mut client = sandbox.go();
        // It serves one connection and ends with it: a monitor that only looks whether somebody listens has spent it.
        let create = bodies::create(&sandbox);
        let mut refused = create.clone();
        refused["cpus"]["boot_vcpus"] = serde_json::json!(0);
        client.put("vm.create", Some(&refused)).unwrap_err();
        client.put("vm.create", Some(&create)).unwrap();
        client.put("vm.boot", None).unwrap();
        let mut stream = agent(shim, &sandbox.vsock());
        // The Go shim's is on a segment where the pod guest does not look.
        let read = |stream: &mut _| {
            assert!(shim == Shim::Go || say(stream, "fs-read file").starts_with("ok bytes=27"));
        };
        read(&mut stream);
        client.put("vm.pause", None).unwrap();
        client.put("vm.resume", None).unwrap();
        read(&mut stream);
        let mut virtiofsd = sandbox.virtiofsd.take().unwrap();
        assert!(virtiofsd.try_wait().unwrap().is_none());
        client.put("vmm.shutdown", None).unwrap();
        wait_for("virtiofsd's end", || virtiofsd.try_wait().unwrap());
    }
}
