//! The console through real virtqueues, against pipes, files and sockets.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::*;
use crate::host_console::{HostOutput, HostSide, MAX_INPUT, MAX_OUTPUT};
use crate::virtio::testing::{Buf, Harness, RawBuf};

fn console(output: HostOutput, input: Option<OwnedFd>, size: Option<(u16, u16)>) -> Console {
    let mut host = HostConsole::new(HostSide::Streams { output, input }).unwrap();
    if let Some((columns, rows)) = size {
        host.set_window(columns, rows).unwrap();
    }
    Console::new(Arc::new(Mutex::new(host))).unwrap()
}

fn harness(output: HostOutput, input: Option<OwnedFd>) -> Harness<Console> {
    let mut h = Harness::new(console(output, input, None));
    h.activate().unwrap();
    settle(&mut h);
    h
}

/// Lets the device do all it can do now.
fn settle(h: &mut Harness<Console>) {
    for _ in 0..1000 {
        if !h.poll_events(0).unwrap() {
            return;
        }
    }
    panic!("the console never comes to rest");
}

fn counter(h: &Harness<Console>, name: &str) -> u64 {
    h.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

fn send(h: &mut Harness<Console>, bytes: &[u8]) {
    h.push(TRANSMIT, &[Buf::Read(bytes)]);
    h.kick(TRANSMIT).unwrap();
    assert_eq!(h.used(TRANSMIT).len(), 1);
}

/// A writer that the test can look into.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn output_reaches_the_writer_in_order() {
    let sink = Shared::default();
    let mut h = harness(HostOutput::Writer(Box::new(sink.clone())), None);
    h.push(TRANSMIT, &[Buf::Read(b"hello "), Buf::Read(b""), Buf::Read(b"pod")]);
    h.push_indirect(TRANSMIT, &[Buf::Read(b"\n"), Buf::Write(5), Buf::Read(b"second")]);
    h.kick(TRANSMIT).unwrap();
    assert_eq!(h.used(TRANSMIT).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(h.interrupts(TRANSMIT), 1);
    assert_eq!(sink.0.lock().unwrap().as_slice(), b"hello pod\nsecond");
    assert_eq!(
        (counter(&h, "output_bytes"), counter(&h, "output_dropped_bytes")),
        (16, 0)
    );
}

#[test]
fn a_reader_that_does_not_read_costs_bytes_and_no_time() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut h = harness(HostOutput::Fd(writer.into()), None);
    let mut sent = Vec::new();
    for i in 0..100_u8 {
        let bytes = vec![i; 8192];
        send(&mut h, &bytes);
        sent.extend(bytes);
    }
    settle(&mut h);
    let dropped = usize::try_from(counter(&h, "output_dropped_bytes")).unwrap();
    assert!(dropped > 0 && dropped < sent.len());
    // Whoever reads late gets what was kept, then all that comes after.
    let kept = sent.len() - dropped;
    assert!(kept >= MAX_OUTPUT);
    let mut got = vec![0; kept];
    let mut filled = 0;
    while filled < kept {
        filled += reader.read(&mut got[filled..]).unwrap();
        settle(&mut h);
    }
    assert!(got == sent[..kept]);
    send(&mut h, b"after");
    let mut got = [0; 5];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"after");
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut h = harness(HostOutput::Discard, Some(ours.into()));
    // Buffers first.
    h.push(RECEIVE, &[Buf::Write(3), Buf::Write(100)]);
    h.push(RECEIVE, &[Buf::Write(8)]);
    h.kick(RECEIVE).unwrap();
    assert!(h.used(RECEIVE).is_empty());
    theirs.write_all(b"hello").unwrap();
    settle(&mut h);
    let done = h.completed(RECEIVE);
    assert_eq!(
        (done.len(), done[0].len, &done[0].data[..5]),
        (1, 5, b"hello".as_slice())
    );
    assert_eq!(h.interrupts(RECEIVE), 1);
    // Input first: more than the one buffer takes.
    theirs.write_all(b"0123456789").unwrap();
    settle(&mut h);
    let done = h.completed(RECEIVE);
    assert_eq!((done[0].len, done[0].data.as_slice()), (8, b"01234567".as_slice()));
    h.push(RECEIVE, &[Buf::Write(8)]);
    h.kick(RECEIVE).unwrap();
    assert_eq!(&h.completed(RECEIVE)[0].data[..2], b"89");
    assert_eq!(counter(&h, "input_bytes"), 15);
}

#[test]
fn input_without_a_driver_is_bounded_and_nothing_is_lost() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut h = Harness::new(console(HostOutput::Discard, Some(ours.into()), None));
    let mut sent = 0_usize;
    while let Ok(n) = theirs.write(&pattern(sent, 1000)) {
        sent += n;
    }
    // It takes what it can hold, then rests although more is there.
    settle(&mut h);
    assert!(sent > 4 * MAX_INPUT);
    h.activate().unwrap();
    let mut got: Vec<u8> = Vec::new();
    while got.len() < sent {
        h.push(RECEIVE, &[Buf::Write(700)]);
        h.kick(RECEIVE).unwrap();
        settle(&mut h);
        for done in h.completed(RECEIVE) {
            got.extend(&done.data[..done.len as usize]);
        }
    }
    assert!(got == pattern(0, sent));
}

fn pattern(from: usize, len: usize) -> Vec<u8> {
    (0..251).cycle().skip(from % 251).take(len).collect()
}

#[test]
fn the_end_of_input_ends_the_input_only() {
    for input in [File::open("/dev/null").unwrap().into(), {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        OwnedFd::from(ours)
    }] {
        let sink = Shared::default();
        let mut h = harness(HostOutput::Writer(Box::new(sink.clone())), Some(input));
        h.push(RECEIVE, &[Buf::Write(100)]);
        h.kick(RECEIVE).unwrap();
        settle(&mut h);
        assert!(h.used(RECEIVE).is_empty());
        send(&mut h, b"still here");
        assert_eq!(sink.0.lock().unwrap().as_slice(), b"still here");
    }
}

#[test]
fn a_file_as_input_is_read_whole() {
    let mut file = tempfile::tempfile().unwrap();
    let content = pattern(0, 3 * MAX_INPUT + 77);
    file.write_all(&content).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut h = harness(HostOutput::Discard, Some(file.into()));
    let mut got: Vec<u8> = Vec::new();
    for _ in 0..30 {
        h.push(RECEIVE, &[Buf::Write(1000)]);
        h.kick(RECEIVE).unwrap();
        settle(&mut h);
        for done in h.completed(RECEIVE) {
            got.extend(&done.data[..done.len as usize]);
        }
    }
    assert!(got == content);
}

#[test]
fn private_pages_are_refused_and_the_console_goes_on() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let sink = Shared::default();
    let mut h = harness(HostOutput::Writer(Box::new(sink.clone())), Some(ours.into()));
    let secret = h.alloc(4096);
    h.write(secret, &[0x5A; 4096]);
    h.gate.make_private(secret, 4096);
    for gpa in [secret, u64::MAX - 2, 1 << 60] {
        h.push_raw(
            TRANSMIT,
            &[RawBuf {
                gpa,
                len: 16,
                writable: false,
            }],
        );
        h.push_raw(
            RECEIVE,
            &[RawBuf {
                gpa,
                len: 16,
                writable: true,
            }],
        );
    }
    theirs.write_all(b"kept").unwrap();
    h.kick(TRANSMIT).unwrap();
    settle(&mut h);
    assert_eq!((h.used(TRANSMIT).len(), h.used(RECEIVE).len()), (3, 3));
    assert_eq!(counter(&h, "failed_chains"), 6);
    assert!(sink.0.lock().unwrap().is_empty());
    h.push(RECEIVE, &[Buf::Write(16)]);
    h.kick(RECEIVE).unwrap();
    assert_eq!(&h.completed(RECEIVE)[0].data[..4], b"kept");
    h.gate.make_shared(secret, 4096);
    assert_eq!(h.read(secret, 4096), [0x5A; 4096]);
}

#[test]
fn an_oversized_chain_is_cut() {
    let sink = Shared::default();
    let mut h = harness(HostOutput::Writer(Box::new(sink.clone())), None);
    let gpa = h.alloc(1 << 20);
    let huge = RawBuf {
        gpa,
        len: 1 << 20,
        writable: false,
    };
    h.push_raw(TRANSMIT, &[huge, huge, huge]);
    h.kick(TRANSMIT).unwrap();
    assert_eq!(sink.0.lock().unwrap().len(), MAX_CHAIN_BYTES);
    assert_eq!(counter(&h, "output_dropped_bytes"), (3 << 20) - MAX_CHAIN_BYTES as u64);
}

#[test]
fn the_size_is_told_and_changed() {
    let mut h = Harness::new(console(HostOutput::Discard, None, Some((80, 25))));
    assert_eq!(h.device.features() & 1, 1);
    h.activate().unwrap();
    let mut data = [0xFF; 6];
    h.device.read_config(0, &mut data);
    assert_eq!(data, [80, 0, 25, 0, 0, 0]);
    let host = Arc::clone(&h.device.host);
    lock(&host).set_window(80, 25).unwrap();
    settle(&mut h);
    assert_eq!(h.config_interrupt.count(), 0);
    lock(&host).set_window(300, 50).unwrap();
    settle(&mut h);
    assert_eq!(h.config_interrupt.count(), 1);
    h.device.read_config(1, &mut data);
    assert_eq!(data, [1, 50, 0, 0, 0, 0]);
    h.device.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 6]);
    h.reset();
    h.kick(TRANSMIT).unwrap();
    h.device.on_event(0).unwrap();
    let plain = console(HostOutput::Discard, None, None);
    assert_eq!(plain.features() & 1, 0);
}
