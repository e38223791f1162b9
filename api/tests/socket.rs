//! The server on a real socket, driven by the very byte sequences of the Kata shims: what they write, in the pieces they
//! write it, with descriptors where they put them; and by clients that misbehave.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use podvisor_api::http::{BindError, Client, Incoming, MAX_CONNECTIONS, Response, Server};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
const PONG: &str = "{\"version\":\"54.0.0\"}";

struct Rig {
    server: Server,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    Rig {
        server: Server::bind(&path).unwrap(),
        path,
        _dir: dir,
    }
}

impl Rig {
    fn connect(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        assert!(self.server.poll().is_empty());
        stream
    }

    /// Everything is in the same thread and on a UNIX socket, so what has been written is there to be polled.
    fn one(&mut self) -> Incoming {
        let mut incoming = self.server.poll();
        assert_eq!(incoming.len(), 1);
        incoming.remove(0)
    }

    fn answer(&mut self, status: u16, body: &str) -> Incoming {
        let incoming = self.one();
        self.server.respond(incoming.connection, &Response::new(status, body));
        incoming
    }
}

fn read_exactly(stream: &mut UnixStream, want: &str) {
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(String::from_utf8_lossy(&got), want);
}

fn silent(stream: &mut UnixStream) {
    stream.set_nonblocking(true).unwrap();
    assert_eq!(
        stream.read(&mut [0]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
    stream.set_nonblocking(false).unwrap();
}

fn ends(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn same_file(a: &impl AsRawFd, b: &impl AsRawFd) -> bool {
    let link = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    link(a.as_raw_fd()) == link(b.as_raw_fd())
}

/// The responses byte for byte as Cloud Hypervisor gives them.
#[test]
fn responses_on_the_wire() {
    let mut rig = rig();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    rig.answer(200, PONG);
    let ok = format!(
        "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{PONG}",
        PONG.len()
    );
    read_exactly(&mut client, &ok);
    client
        .write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    let boot = rig.answer(204, "not sent");
    assert_eq!(
        (boot.request.method.as_str(), boot.request.path.as_str()),
        ("PUT", "/api/v1/vm.boot")
    );
    assert!(boot.request.body.is_empty());
    read_exactly(
        &mut client,
        "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n",
    );
    client.write_all(b"PUT /api/v1/vmm.shutdown HTTP/1.1\r\n\r\n").unwrap();
    rig.answer(200, "");
    read_exactly(
        &mut client,
        "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n",
    );
    client.write_all(PING).unwrap();
    let incoming = rig.one();
    rig.server.respond(
        incoming.connection,
        &Response::error(404, &["Error from API", "VM is \"not\" created"]),
    );
    read_exactly(&mut client, "HTTP/1.1 404 \r\n");
    silent_after(&mut client, "[\"Error from API\",\"VM is \\\"not\\\" created\"]");
}

fn silent_after(stream: &mut UnixStream, tail: &str) {
    let mut got = vec![0; 4096];
    let count = stream.read(&mut got).unwrap();
    let text = String::from_utf8_lossy(got.get(..count).unwrap()).into_owned();
    assert!(text.ends_with(tail), "{text}");
    silent(stream);
}

/// The Rust shim: descriptors beside the first segment, then `Content-Length`, the empty line, the body, each a write.
#[test]
fn the_rust_shims_segments() {
    let mut rig = rig();
    let mut client = rig.connect();
    let (tap0, tap1) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
    let body = "{\n  \"fds\": [7, 8],\n  \"num_queues\": 4\n}";
    for round in 0..2 {
        let first: &[u8] = b"PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n";
        client
            .send_with_fds(&[first], &[tap0.as_raw_fd(), tap1.as_raw_fd()])
            .unwrap();
        assert!(rig.server.poll().is_empty(), "round {round}");
        for part in [format!("Content-Length: {}\r\n", body.len()), "\r\n".to_owned()] {
            client.write_all(part.as_bytes()).unwrap();
            assert!(rig.server.poll().is_empty());
        }
        client.write_all(body.as_bytes()).unwrap();
        let incoming = rig.answer(204, "");
        assert_eq!(incoming.request.body, body.as_bytes());
        let files = &incoming.request.files;
        assert_eq!(files.len(), 2);
        assert!(same_file(&files[0], &tap0) && same_file(&files[1], &tap1));
        for file in files {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .unwrap()
                .trim();
            assert_eq!(
                u32::from_str_radix(flags, 8).unwrap() & 0o2_000_000,
                0o2_000_000,
                "close-on-exec"
            );
        }
        read_exactly(
            &mut client,
            "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n",
        );
    }
    // The next request has none of them.
    client.write_all(PING).unwrap();
    assert!(rig.answer(200, PONG).request.files.is_empty());
}

/// The Go shim: one sendmsg holds head, body and descriptor; the client of this crate does the same.
#[test]
fn the_go_shims_single_message() {
    let mut rig = rig();
    let path = rig.path.clone();
    let asker = std::thread::spawn(move || {
        let mut client = Client::connect(&path).unwrap();
        let tap = File::open("/dev/zero").unwrap();
        let reply = client
            .request_with_files("PUT", "vm.add-net", Some(b"{}"), &[tap.as_raw_fd()])
            .unwrap();
        (
            reply.status,
            reply.body,
            client.request("GET", "/api/v1/vmm.ping", None).unwrap().body,
        )
    });
    let mut seen = Vec::new();
    while seen.len() < 2 {
        for incoming in rig.server.poll() {
            rig.server.respond(incoming.connection, &Response::new(200, PONG));
            seen.push((incoming.request.path.clone(), incoming.request.files.len()));
        }
        std::thread::yield_now();
    }
    assert_eq!(
        seen,
        [("/api/v1/vm.add-net".to_owned(), 1), ("/api/v1/vmm.ping".to_owned(), 0)]
    );
    assert_eq!(asker.join().unwrap(), (200, PONG.into(), PONG.into()));
}

#[test]
fn pipelined_requests_are_answered_one_by_one_in_order() {
    let mut rig = rig();
    let mut client = rig.connect();
    client
        .write_all(&[PING, b"PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n", PING].concat())
        .unwrap();
    for path in ["/api/v1/vmm.ping", "/api/v1/vm.boot", "/api/v1/vmm.ping"] {
        let incoming = rig.one();
        assert_eq!(incoming.request.path, path);
        assert!(rig.server.poll().is_empty(), "the next waits for this one's answer");
        rig.server.respond(incoming.connection, &Response::no_content());
        read_exactly(
            &mut client,
            "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n",
        );
    }
    assert!(rig.server.poll().is_empty());
}

#[test]
fn leave_to_send_a_body_is_given() {
    let mut rig = rig();
    let mut client = rig.connect();
    client
        .write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        .unwrap();
    assert!(rig.server.poll().is_empty());
    read_exactly(&mut client, "HTTP/1.1 100 \r\n\r\n");
    client.write_all(b"{}").unwrap();
    assert_eq!(rig.answer(204, "").request.body, b"{}");
}

#[test]
fn what_is_no_request_is_refused_and_ends_the_connection() {
    for (bytes, status) in [
        (b"\x16\x03\x01 hello\r\n\r\n".to_vec(), 400),
        (b"PUT / HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n".to_vec(), 413),
        ([b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 20000]].concat(), 431),
    ] {
        let mut rig = rig();
        let mut client = rig.connect();
        client.write_all(&bytes).unwrap();
        assert!(rig.server.poll().is_empty());
        let text = ends(&mut client);
        assert!(
            text.starts_with(&format!("HTTP/1.1 {status} \r\n")) && text.ends_with("\"]"),
            "{text}"
        );
    }
}

#[test]
fn too_many_clients_are_told_and_the_others_go_on() {
    let mut rig = rig();
    let mut clients: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| rig.connect()).collect();
    const { assert!(MAX_CONNECTIONS >= 16) };
    let mut late = rig.connect();
    assert!(ends(&mut late).starts_with("HTTP/1.1 503 \r\n"));
    for client in &mut clients {
        client.write_all(PING).unwrap();
        rig.answer(200, PONG);
    }
    drop(clients.pop());
    assert!(rig.server.poll().is_empty());
    let mut next = rig.connect();
    next.write_all(PING).unwrap();
    rig.answer(200, PONG);
    read_exactly(&mut next, "HTTP/1.1 200 \r\n");
}

#[test]
fn unfinished_bodies_of_all_clients_together_are_bounded() {
    let mut rig = rig();
    let (mut told, mut clients) = (0, Vec::new());
    let piece = vec![b'x'; 32 << 10];
    for _ in 0..4 {
        let mut client = rig.connect();
        client.set_nonblocking(true).unwrap();
        client
            .write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n")
            .unwrap();
        for _ in 0..127 {
            if client.write_all(&piece).is_err() {
                break;
            }
            assert!(rig.server.poll().is_empty());
        }
        let mut answer = [0; 15];
        if client.read(&mut answer).is_ok() {
            assert_eq!(&answer, b"HTTP/1.1 503 \r\n");
            told += 1;
        }
        clients.push(client);
    }
    assert!(told >= 1, "{} clients", clients.len());
}

#[test]
fn a_client_that_vanishes_costs_nothing() {
    let mut rig = rig();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    let incoming = rig.one();
    drop(client);
    assert!(rig.server.poll().is_empty());
    assert!(
        !readable(&rig.server),
        "a dead client in work must not keep the loop turning"
    );
    rig.server.respond(incoming.connection, &Response::new(200, PONG));
    rig.server.respond(incoming.connection, &Response::new(200, PONG));
    // In the middle of a request, and with descriptors: they are closed.
    let client = rig.connect();
    let (mut reader, writer) = std::io::pipe().unwrap();
    client
        .send_with_fds(&[&PING[..10]], &[writer.as_raw_fd(); 200])
        .unwrap();
    assert!(rig.server.poll().is_empty());
    drop((client, writer));
    assert!(rig.server.poll().is_empty());
    assert_eq!(
        reader.read(&mut [0]).unwrap(),
        0,
        "the end of the pipe: nobody holds its other side"
    );
}

#[test]
fn descriptors_beyond_the_bound_are_closed() {
    let mut rig = rig();
    let mut client = rig.connect();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let (head, tail) = PING.split_at(PING.len() - 2);
    for byte in head.chunks(30) {
        client.send_with_fds(&[byte], &[writer.as_raw_fd(); 200]).unwrap();
        assert!(rig.server.poll().is_empty());
    }
    client.write_all(tail).unwrap();
    drop(writer);
    assert_eq!(rig.one().request.files.len(), 253);
    assert_eq!(
        reader.read(&mut [0]).unwrap(),
        0,
        "the end of the pipe: nobody holds its other side"
    );
}

#[test]
fn a_client_that_only_closed_its_sending_half_is_answered() {
    let mut rig = rig();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    rig.answer(200, PONG);
    assert!(rig.server.poll().is_empty());
    assert!(ends(&mut client).ends_with(PONG));
}

#[test]
fn a_client_that_does_not_read_blocks_nobody() {
    let mut rig = rig();
    let mut slow = rig.connect();
    slow.write_all(PING).unwrap();
    let large = format!("\"{}\"", "x".repeat(8 << 20));
    rig.answer(200, &large);
    let mut other = rig.connect();
    other.write_all(PING).unwrap();
    rig.answer(200, PONG);
    read_exactly(&mut other, "HTTP/1.1 200 \r\n");
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        let mut chunk = vec![0; 1 << 20];
        while !got.ends_with(b"x\"") {
            let count = slow.read(&mut chunk).unwrap();
            got.extend_from_slice(&chunk[..count]);
        }
        got.len()
    });
    while !reader.is_finished() {
        assert!(rig.server.poll().is_empty());
        std::thread::yield_now();
    }
    assert!(reader.join().unwrap() > large.len());
}

#[test]
fn the_last_response_is_flushed_before_the_end() {
    let mut rig = rig();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    let large = "x".repeat(4 << 20);
    rig.answer(200, &large);
    let reader = std::thread::spawn(move || ends(&mut client).len());
    rig.server.drain();
    drop(rig);
    assert!(reader.join().unwrap() > large.len());
}

#[test]
fn one_monitor_a_path_and_nothing_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let lock = dir.path().join("api.sock.lock");
    let first = Server::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = Server::bind(&path).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
    assert!(
        UnixStream::connect(&path).is_ok(),
        "the first one's socket is untouched"
    );
    drop(first);
    assert!(!path.exists() && !lock.exists());
    // What SIGKILL leaves: a socket that nobody listens on, and a lock file that nobody holds.
    drop(UnixListener::bind(&path).unwrap());
    File::create(&lock).unwrap();
    assert!(path.exists());
    drop(Server::bind(&path).unwrap());
    assert!(!path.exists() && !lock.exists());
    // A monitor that takes no lock.
    let other = UnixListener::bind(&path).unwrap();
    assert!(matches!(Server::bind(&path).unwrap_err(), BindError::InUse { .. }));
    drop(other);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Server::bind(&path).unwrap_err(), BindError::NotASocket { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert!(Server::bind(Path::new("/nonexistent/x")).is_err());
}

#[test]
fn a_listening_descriptor_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut server = Server::from_fd(OwnedFd::from(UnixListener::bind(&path).unwrap())).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(PING).unwrap();
    assert!(readable(&server));
    let mut incoming = server.poll();
    incoming.extend(server.poll());
    assert_eq!(incoming.len(), 1);
    drop(server);
    assert!(path.exists(), "what was made by others stays");
}

fn readable(server: &Server) -> bool {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, server.as_raw_fd(), event).unwrap();
    epoll.wait(0, &mut [event]).unwrap() > 0
}
