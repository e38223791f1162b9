//! The device through real virtqueues and real UNIX sockets: both directions, flow control, resets, limits, clean-up.
//! Nothing here measures time; waits end when the thing waited for happens.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;

use super::connection::BUF_ALLOC;
use super::muxer::MAX_CONNECTIONS;
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::virtio::testing::{Buf, Harness, RawBuf};

const CID: u64 = 3;
const GUEST_BUF: u32 = 256 << 10;

/// A guest with one thing to say at a time, and the host's directory.
struct Guest {
    h: Harness<Vsock>,
    dir: TempDir,
    inbox: VecDeque<(Header, Vec<u8>)>,
    /// Bytes received, as told to the host.
    fwd_cnt: u32,
    rx_size: u32,
}

impl Guest {
    fn new() -> Self {
        Self::with_timeout(Duration::from_secs(600))
    }

    fn with_timeout(handshake_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = VsockOptions {
            handshake_timeout,
            ..VsockOptions::new(CID, dir.path().join("v.sock"))
        };
        let h = Harness::new(Vsock::new(options).unwrap());
        Self {
            h,
            dir,
            inbox: VecDeque::new(),
            fwd_cnt: 0,
            rx_size: 4096,
        }
    }

    fn ready() -> Self {
        let mut guest = Self::new();
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.h.activate().unwrap();
        self.post(64);
    }

    fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.h.push(RX, &[Buf::Write(self.rx_size)]);
        }
        self.h.kick(RX).unwrap();
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("v.sock")).unwrap()
    }

    fn dial(&self, text: &str) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// Lets the device handle everything that is there, and takes what it wrote.
    fn turn(&mut self) {
        loop {
            let events = self.h.poll_events(0).unwrap();
            let done = self.h.completed(RX);
            let count = done.len();
            for buffer in done {
                let (head, data) = buffer.data.split_at(44);
                let header = Header::from_bytes(head.try_into().unwrap());
                assert_eq!(buffer.len, 44 + header.len);
                self.inbox.push_back((header, data[..header.len as usize].to_vec()));
            }
            self.post(count);
            self.h.completed(TX);
            if !events && count == 0 {
                return;
            }
        }
    }

    fn recv(&mut self) -> (Header, Vec<u8>) {
        while self.inbox.is_empty() {
            assert!(self.h.poll_events(10_000).unwrap(), "nothing comes");
            self.turn();
        }
        self.inbox.pop_front().unwrap()
    }

    /// The next packet, which has to be an `op`.
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.recv();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn header(&self, host: u32, guest: u32, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: GUEST_BUF,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: u32::try_from(data.len()).unwrap(),
            ..header
        };
        let bytes = header.to_bytes();
        let mut bufs = vec![Buf::Read(&bytes)];
        if !data.is_empty() {
            bufs.push(Buf::Read(data));
        }
        self.h.push(TX, &bufs);
        self.h.kick(TX).unwrap();
        self.turn();
    }

    fn say(&mut self, host: u32, guest: u32, op: u16) {
        let header = self.header(host, guest, op);
        self.send(header, &[]);
    }

    /// A stream that a host process opened to guest port 1024, and its host port.
    fn open_from_host(&mut self) -> (UnixStream, u32) {
        let mut stream = self.dial("CONNECT 1024\n");
        let request = self.expect(op::REQUEST);
        assert_eq!(
            (request.src_cid, request.dst_cid, request.dst_port),
            (HOST_CID, CID, 1024)
        );
        self.say(request.src_port, 1024, op::RESPONSE);
        assert_eq!(line(&mut stream), format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }

    /// A stream that the guest opened to host port 52 from its port 5000.
    fn open_from_guest(&mut self) -> UnixStream {
        let listener = UnixListener::bind(self.dir.path().join("v.sock_52")).unwrap();
        self.say(52, 5000, op::REQUEST);
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (52, 5000));
        assert_eq!(response.buf_alloc, BUF_ALLOC);
        listener.accept().unwrap().0
    }

    fn counter(&self, name: &str) -> u64 {
        self.h
            .device
            .counters()
            .into_iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    while text.last() != Some(&b'\n') {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "closed after {text:?}");
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

fn closed_without_text(mut stream: UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert_eq!(rest, b""),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap())
        .collect()
}

#[test]
fn identity() {
    let guest = Guest::new();
    let device = &guest.h.device;
    assert_eq!(device.device_type(), 19);
    assert_eq!(device.queue_max_sizes().len(), 3);
    let mut config = [0xff; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 12]);
}

#[test]
fn host_opens_a_stream_and_both_speak() {
    let mut guest = Guest::ready();
    let (mut stream, port) = guest.open_from_host();
    stream.write_all(b"hello guest").unwrap();
    let (header, data) = guest.recv();
    assert_eq!((header.op, data.as_slice()), (op::RW, b"hello guest".as_slice()));
    let reply = guest.header(port, 1024, op::RW);
    guest.send(reply, b"hello host");
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello host");
    assert_eq!((guest.counter("rx_bytes"), guest.counter("tx_bytes")), (11, 10));
}

#[test]
fn lower_case_and_early_data() {
    let mut guest = Guest::ready();
    // What follows the command belongs to the stream, and only OK comes before the guest speaks.
    let mut stream = guest.dial("connect 1024\nearly");
    let request = guest.expect(op::REQUEST);
    guest.say(request.src_port, 1024, op::RESPONSE);
    assert_eq!(guest.recv().1, b"early");
    assert_eq!(line(&mut stream), format!("OK {}\n", request.src_port));
    let mut data = [0u8; 1];
    stream.set_nonblocking(true).unwrap();
    assert_eq!(stream.read(&mut data).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn wrong_commands_are_closed() {
    let mut guest = Guest::ready();
    for text in [
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        &"C".repeat(100),
    ] {
        let stream = guest.dial(text);
        guest.turn();
        closed_without_text(stream);
    }
    assert!(guest.inbox.is_empty());
    assert_eq!(guest.counter("connections_active"), 0);
}

#[test]
fn the_guest_refuses() {
    let mut guest = Guest::ready();
    let stream = guest.dial("CONNECT 9\n");
    let request = guest.expect(op::REQUEST);
    guest.say(request.src_port, 9, op::RST);
    closed_without_text(stream);
    assert_eq!(guest.counter("connections_active"), 0);
}

#[test]
fn a_guest_that_does_not_answer_loses_the_connection() {
    let mut guest = Guest::with_timeout(Duration::from_millis(5));
    guest.start();
    let stream = guest.dial("CONNECT 9\n");
    let request = guest.expect(op::REQUEST);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (request.src_port, 9));
    closed_without_text(stream);
    assert_eq!(guest.counter("handshake_timeouts"), 1);
    // Too late.
    guest.say(request.src_port, 9, op::RESPONSE);
    assert_eq!(guest.expect(op::RST).dst_port, 9);
}

#[test]
fn connections_wait_for_the_driver() {
    let mut guest = Guest::new();
    let mut early = guest.dial("CONNECT 1024\n");
    drop(guest.dial("CONNECT 1024\n"));
    assert!(!guest.h.poll_events(0).unwrap(), "an inactive device is idle");
    guest.start();
    let request = guest.expect(op::REQUEST);
    guest.say(request.src_port, 1024, op::RESPONSE);
    assert_eq!(line(&mut early), format!("OK {}\n", request.src_port));
}

#[test]
fn a_storm_of_redials() {
    let mut guest = Guest::ready();
    for _ in 0..1500 {
        let stream = guest.dial("CONNECT 1024\n");
        let request = guest.expect(op::REQUEST);
        guest.say(request.src_port, 1024, op::RST);
        closed_without_text(stream);
    }
    // And while the guest takes no packets at all: nothing piles up.
    let mut guest = Guest::new();
    guest.h.activate().unwrap();
    for _ in 0..1500 {
        drop(guest.dial("CONNECT 1024\n"));
        guest.turn();
    }
    assert_eq!(guest.counter("connections_active"), 0);
    assert!(!guest.h.device.muxer.has_output());
}

#[test]
fn guest_opens_a_stream() {
    let mut guest = Guest::ready();
    let mut stream = guest.open_from_guest();
    let rw = guest.header(52, 5000, op::RW);
    guest.send(rw, b"from the guest");
    let mut data = [0; 14];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"from the guest");
    // A second request for the same connection breaks it.
    guest.say(52, 5000, op::REQUEST);
    guest.expect(op::RST);
    closed_without_text(stream);
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::ready();
    guest.say(53, 5000, op::REQUEST);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port, reset.dst_cid), (53, 5000, CID));
}

#[test]
fn unknown_and_foreign_packets() {
    let mut guest = Guest::ready();
    guest.say(1, 2, op::RW);
    guest.expect(op::RST);
    guest.say(1, 2, op::RST);
    let dgram = Header {
        kind: 3,
        ..guest.header(1, 2, op::RW)
    };
    guest.send(dgram, b"dgram");
    let reset = guest.expect(op::RST);
    assert_eq!(reset.kind, 3);
    let spoofed = Header {
        src_cid: 4,
        ..guest.header(1, 2, op::REQUEST)
    };
    guest.send(spoofed, &[]);
    let elsewhere = Header {
        dst_cid: 7,
        ..guest.header(1, 2, op::REQUEST)
    };
    guest.send(elsewhere, &[]);
    // A header that promises more data than the chain has.
    let bytes = Header {
        len: 100,
        ..guest.header(1, 2, op::RW)
    }
    .to_bytes();
    guest.h.push(TX, &[Buf::Read(&bytes), Buf::Read(&[0; 99])]);
    // A chain that is no packet.
    guest.h.push(TX, &[Buf::Read(&bytes[..43])]);
    guest.h.push(TX, &[Buf::Write(64)]);
    guest.h.kick(TX).unwrap();
    guest.turn();
    assert!(guest.inbox.is_empty());
    assert_eq!(guest.counter("tx_invalid"), 5);
}

#[test]
fn a_packet_cut_anywhere() {
    let mut guest = Guest::ready();
    let mut stream = guest.open_from_guest();
    let data = pattern(1000);
    let mut packet = Header {
        len: 1000,
        ..guest.header(52, 5000, op::RW)
    }
    .to_bytes()
    .to_vec();
    packet.extend(&data);
    for cuts in [[10usize, 44], [44, 500], [43, 45], [100, 101]] {
        let bufs = [
            Buf::Read(&packet[..cuts[0]]),
            Buf::Read(&packet[cuts[0]..cuts[1]]),
            Buf::Read(&packet[cuts[1]..]),
        ];
        guest.h.push_indirect(TX, &bufs);
        guest.h.kick(TX).unwrap();
        let mut got = vec![0; 1000];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(got, data);
    }
}

#[test]
fn private_pages_are_not_touched() {
    let mut guest = Guest::ready();
    let stream = guest.open_from_guest();
    stream.set_nonblocking(true).unwrap();
    let header = Header {
        len: 16,
        ..guest.header(52, 5000, op::RW)
    }
    .to_bytes();
    let mut bufs = guest.h.place(&[Buf::Read(&header)]);
    let secret = guest.h.alloc(4096);
    guest.h.write(secret, b"private contents");
    bufs.push(RawBuf {
        gpa: secret,
        len: 16,
        writable: false,
    });
    guest.h.gate.make_private(secret, 4096);
    guest.h.push_raw(TX, &bufs);
    guest.h.kick(TX).unwrap();
    assert_eq!(guest.h.used(TX).len(), 1);
    assert_eq!(
        (&stream).read(&mut [0; 16]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    // The device goes on, and other memory still works.
    let rw = guest.header(52, 5000, op::RW);
    guest.send(rw, b"shared");
    let mut data = [0; 6];
    (&stream).read_exact(&mut data).unwrap();
    assert_eq!(&data, b"shared");
}

#[test]
fn a_private_receive_buffer_loses_no_data() {
    let mut guest = Guest::new();
    guest.h.activate().unwrap();
    let page = guest.h.alloc(4096);
    guest.h.gate.make_private(page, 4096);
    guest.h.push_raw(
        RX,
        &[RawBuf {
            gpa: page,
            len: 4096,
            writable: true,
        }],
    );
    guest.h.push_raw(
        RX,
        &[RawBuf {
            gpa: u64::MAX - 5,
            len: 4096,
            writable: true,
        }],
    );
    guest.h.push(RX, &[Buf::Write(44)]);
    let _stream = guest.dial("CONNECT 5\n");
    assert!(guest.h.poll_events(10_000).unwrap());
    assert!(guest.h.used(RX).iter().all(|&(_, len)| len == 0));
    guest.post(4);
    guest.expect(op::REQUEST);
}

/// The guest streams `total` bytes to the host within its credit, while `reader` reads.
fn stream_from_guest(guest: &mut Guest, data: &[u8]) {
    let (mut at, mut acknowledged) = (0usize, 0u32);
    let mut chunk = 1;
    while at < data.len() {
        let flight = u32::try_from(at).unwrap().wrapping_sub(acknowledged);
        let room = (BUF_ALLOC - flight) as usize;
        let n = chunk.min(room).min(data.len() - at);
        if n == 0 {
            let (header, _) = guest.recv();
            assert_eq!(header.op, op::CREDIT_UPDATE);
            acknowledged = header.fwd_cnt;
            continue;
        }
        let rw = guest.header(52, 5000, op::RW);
        guest.send(rw, &data[at..at + n]);
        at += n;
        chunk = chunk * 7 % 65_521 + 1;
        while let Some((header, _)) = guest.inbox.pop_front() {
            acknowledged = header.fwd_cnt;
        }
    }
}

#[test]
fn a_mebibyte_to_the_host() {
    let mut guest = Guest::ready();
    let mut stream = guest.open_from_guest();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let data = pattern(1 << 20);
    stream_from_guest(&mut guest, &data);
    let shutdown = Header {
        flags: SHUTDOWN_BOTH,
        ..guest.header(52, 5000, op::SHUTDOWN)
    };
    guest.send(shutdown, &[]);
    while guest.recv().0.op != op::RST {}
    assert_eq!(reader.join().unwrap(), data);
    assert_eq!(guest.counter("connections_active"), 0);
}

#[test]
fn a_mebibyte_to_the_guest_within_its_credit() {
    for rx_size in [4096, 300, 45] {
        let mut guest = Guest::new();
        guest.rx_size = rx_size;
        guest.start();
        let (mut stream, port) = guest.open_from_host();
        let data = pattern(if rx_size == 4096 { 1 << 20 } else { 20_000 });
        let copy = data.clone();
        let writer = std::thread::spawn(move || {
            stream.write_all(&copy).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            stream
        });
        let mut got = Vec::new();
        let window = 10_000;
        loop {
            let (header, bytes) = guest.recv();
            match header.op {
                op::RW => got.extend(bytes),
                op::CREDIT_REQUEST => {
                    guest.fwd_cnt = u32::try_from(got.len()).unwrap();
                    let update = Header {
                        buf_alloc: window,
                        ..guest.header(port, 1024, op::CREDIT_UPDATE)
                    };
                    guest.send(update, &[]);
                }
                op::SHUTDOWN => {
                    assert_eq!(header.flags, SHUTDOWN_SEND);
                    break;
                }
                other => panic!("unexpected operation {other}"),
            }
            let flight = got.len() - guest.fwd_cnt as usize;
            assert!(flight <= GUEST_BUF as usize);
        }
        assert!(got == data, "rx buffers of {rx_size}");
        drop(writer.join().unwrap());
        // The host's process is gone altogether.
        assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    }
}

#[test]
fn a_peer_that_does_not_read_stalls_nobody_else() {
    let mut guest = Guest::ready();
    let mut slow = guest.open_from_guest();
    let (mut lively, port) = guest.open_from_host();
    let data = pattern(8 << 20);
    let (mut at, mut acknowledged) = (0usize, 0u32);
    // As much as the credit allows: the socket's buffer, and ours.
    while at - acknowledged as usize + 4096 <= BUF_ALLOC as usize {
        let rw = guest.header(52, 5000, op::RW);
        guest.send(rw, &data[at..at + 4096]);
        at += 4096;
        while let Some((header, _)) = guest.inbox.pop_front() {
            acknowledged = header.fwd_cnt;
        }
    }
    assert!(at < data.len(), "the host's socket took everything");
    lively.write_all(b"ping").unwrap();
    assert_eq!(guest.recv().1, b"ping");
    let rw = guest.header(port, 1024, op::RW);
    guest.send(rw, b"pong");
    let mut pong = [0; 4];
    lively.read_exact(&mut pong).unwrap();
    // Closing loses nothing: what the guest sent is still delivered.
    let shutdown = Header {
        flags: SHUTDOWN_BOTH,
        ..guest.header(52, 5000, op::SHUTDOWN)
    };
    guest.send(shutdown, &[]);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        slow.read_to_end(&mut all).unwrap();
        all
    });
    while guest.recv().0.op != op::RST {}
    assert!(reader.join().unwrap() == data[..at], "bytes were lost");
}

#[test]
fn a_guest_that_exceeds_its_credit_is_reset() {
    let mut guest = Guest::ready();
    let stream = guest.open_from_guest();
    let mut resets = 0;
    for _ in 0..2000 {
        let rw = guest.header(52, 5000, op::RW);
        guest.send(rw, &[0; 8192]);
        resets += guest.inbox.drain(..).filter(|(header, _)| header.op == op::RST).count();
        if resets > 0 {
            break;
        }
    }
    assert_eq!(resets, 1);
    drop(stream);
}

#[test]
fn half_close_of_the_guest() {
    let mut guest = Guest::ready();
    let mut stream = guest.open_from_guest();
    let shutdown = Header {
        flags: SHUTDOWN_SEND,
        ..guest.header(52, 5000, op::SHUTDOWN)
    };
    guest.send(shutdown, &[]);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    // The other direction still works, and its end completes the connection.
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.recv().1, b"answer");
    drop(stream);
    guest.expect(op::SHUTDOWN);
    guest.expect(op::RST);
    assert_eq!(guest.counter("connections_active"), 0);
}

#[test]
fn credit_on_request() {
    let mut guest = Guest::ready();
    let _stream = guest.open_from_guest();
    let rw = guest.header(52, 5000, op::RW);
    guest.send(rw, &[1; 100]);
    guest.say(52, 5000, op::CREDIT_REQUEST);
    let update = guest.expect(op::CREDIT_UPDATE);
    assert_eq!((update.fwd_cnt, update.buf_alloc), (100, BUF_ALLOC));
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::ready();
    let mut streams = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        streams.push(guest.connect());
        guest.turn();
    }
    assert_eq!(guest.counter("connections_active"), MAX_CONNECTIONS as u64);
    let late = guest.connect();
    guest.turn();
    closed_without_text(late);
    let _listener = UnixListener::bind(guest.dir.path().join("v.sock_52")).unwrap();
    guest.say(52, 5000, op::REQUEST);
    guest.expect(op::RST);
    streams.pop();
    guest.turn();
    guest.say(52, 5000, op::REQUEST);
    guest.expect(op::RESPONSE);
}

#[test]
fn a_guest_that_takes_no_resets_is_not_listened_to() {
    let mut guest = Guest::new();
    guest.h.activate().unwrap();
    let header = guest.header(1, 2, op::RW).to_bytes();
    for _ in 0..100 {
        guest.h.push(TX, &[Buf::Read(&header)]);
    }
    guest.h.kick(TX).unwrap();
    assert_eq!(guest.h.used(TX).len(), 64);
    guest.post(128);
    guest.turn();
    assert_eq!(guest.inbox.len(), 100);
}

#[test]
fn reset_closes_and_starts_anew() {
    let mut guest = Guest::ready();
    let (stream, _) = guest.open_from_host();
    guest.h.reset();
    closed_without_text(stream);
    let mut waiting = guest.dial("CONNECT 1024\n");
    assert!(!guest.h.poll_events(0).unwrap());
    guest.start();
    let request = guest.expect(op::REQUEST);
    guest.say(request.src_port, 1024, op::RESPONSE);
    assert!(line(&mut waiting).starts_with("OK "));
}

#[test]
fn the_socket_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let make = || Vsock::new(VsockOptions::new(CID, path.clone()));
    let first = make().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let error = make().err().unwrap().to_string();
    assert!(error.contains("v.sock") && error.contains("another process"), "{error}");
    drop(first);
    assert!(!path.exists());
    // Left behind by a process that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let device = make().unwrap();
    // Not ours any more: left alone.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    drop(device);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert!(make().err().unwrap().to_string().contains("not a socket"));
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let options = VsockOptions::new(cid, dir.path().join("other"));
        assert!(matches!(Vsock::new(options), Err(VsockError::Cid(_))));
    }
    let long = VsockOptions::new(CID, dir.path().join("x".repeat(108)));
    assert!(Vsock::new(long).err().unwrap().to_string().contains("107 bytes"));
}

#[test]
fn a_restored_driver_hears_that_its_streams_are_gone() {
    for early in [true, false] {
        let mut guest = Guest::ready();
        let (mut stream, _) = guest.open_from_host();
        if early {
            guest.h.push(EVENT, &[Buf::Write(4)]);
        }
        let next = Vsock::new(VsockOptions::new(CID, guest.dir.path().join("next.sock"))).unwrap();
        let features = guest.h.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        let mut old = guest.h.moved_to(next, features).unwrap();
        if !early {
            assert!(guest.h.completed(EVENT).is_empty());
            guest.h.push(EVENT, &[Buf::Write(4)]);
            guest.h.kick(EVENT).unwrap();
        }
        let told = guest.h.completed(EVENT);
        assert_eq!((told[0].len, &told[0].data[..]), (4, &[0, 0, 0, 0][..]));
        guest.h.push(EVENT, &[Buf::Write(4)]);
        guest.h.kick(EVENT).unwrap();
        assert!(guest.h.completed(EVENT).is_empty(), "told once");
        // A stream of before is unknown here; the saved device still has it.
        guest.say(1 << 30, 1234, op::CREDIT_UPDATE);
        guest.expect(op::RST);
        old.on_event(0).unwrap();
        stream.set_nonblocking(true).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut stream = UnixStream::connect(guest.dir.path().join("next.sock")).unwrap();
        stream.write_all(b"CONNECT 52\n").unwrap();
        guest.expect(op::REQUEST);
    }
}
