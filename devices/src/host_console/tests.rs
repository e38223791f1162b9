//! The host's end against pipes, files, pseudo-terminals and sockets.

use std::fs::OpenOptions;
use std::io::{PipeReader, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

fn fds(output: Option<OwnedFd>, input: Option<OwnedFd>) -> HostConsole {
    let output = output.map_or(HostOutput::Discard, HostOutput::Fd);
    HostConsole::new(HostSide::Streams { output, input }).unwrap()
}

fn piped() -> (PipeReader, HostConsole) {
    let (reader, writer) = io::pipe().unwrap();
    (reader, fds(Some(writer.into()), None))
}

/// Waits until there is something to do, and does it.
fn turn(host: &mut HostConsole) {
    let epoll = host.epoll.as_ref().unwrap();
    let outer = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    outer.ctl(ControlOperation::Add, epoll.as_raw_fd(), event).unwrap();
    assert_eq!(outer.wait(10_000, &mut [EpollEvent::default()]).unwrap(), 1);
    host.on_ready();
}

/// Whether the event loop would sleep now.
fn rests(host: &mut HostConsole) -> bool {
    // One turn takes what is left of edges.
    host.on_ready();
    let outer = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    outer.ctl(ControlOperation::Add, host.fd().unwrap(), event).unwrap();
    outer.wait(0, &mut [EpollEvent::default()]).unwrap() == 0
}

fn say(host: &mut HostConsole, bytes: &[u8]) {
    host.take(bytes);
    host.send();
}

fn heard(host: &mut HostConsole) -> Vec<u8> {
    let bytes = host.input().drain(..).collect();
    host.input_taken();
    bytes
}

fn expect(reader: &mut impl Read, wanted: &[u8]) {
    let mut got = vec![0; wanted.len()];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(wanted));
}

#[test]
fn a_full_pipe_blocks_nobody_and_loses_only_what_does_not_fit() {
    let (mut reader, mut host) = piped();
    let data: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
    for part in data.chunks(100) {
        say(&mut host, part);
    }
    assert!(rests(&mut host));
    let kept = data.len() - usize::try_from(host.dropped()).unwrap();
    assert!(kept < data.len() && kept > MAX_OUTPUT, "{kept}");
    let mut got = Vec::new();
    let mut part = vec![0; 65536];
    while got.len() < kept {
        let n = reader.read(&mut part).unwrap();
        got.extend_from_slice(&part[..n]);
        host.on_ready();
    }
    assert!(got == data[..kept]);
    say(&mut host, b"after");
    expect(&mut reader, b"after");
    assert!(rests(&mut host), "a reader that keeps up wakes nobody");
}

#[test]
fn the_shared_pipe_itself_stays_blocking() {
    let (_reader, writer) = io::pipe().unwrap();
    let kept = writer.try_clone().unwrap();
    let _host = fds(Some(writer.into()), None);
    let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", kept.as_raw_fd())).unwrap();
    let flags = flags.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim();
    assert_eq!(i32::from_str_radix(flags, 8).unwrap() & libc::O_NONBLOCK, 0);
}

#[test]
fn a_reader_that_is_gone_and_a_full_disk_cost_the_bytes_only() {
    let (reader, mut host) = piped();
    drop(reader);
    say(&mut host, b"lost");
    say(&mut host, b"lost too");
    assert_eq!(host.dropped(), 12);
    assert!(rests(&mut host));
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut host = fds(Some(full.into()), None);
    say(&mut host, b"lost");
    assert_eq!(host.dropped(), 4);
}

#[test]
fn a_file_is_written_where_it_stands_and_needs_no_descriptor() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before|").unwrap();
    let mut host = fds(Some(file.try_clone().unwrap().into()), None);
    assert_eq!(host.fd(), None);
    say(&mut host, b"console");
    file.rewind().unwrap();
    expect(&mut file, b"before|console");
}

#[test]
fn nowhere_costs_nothing() {
    let mut host = HostConsole::new(HostSide::output(HostOutput::Discard)).unwrap();
    say(&mut host, &[b'x'; 100_000]);
    assert_eq!((host.fd(), host.dropped(), host.waiting_output.len()), (None, 0, 0));
}

#[test]
fn the_end_of_the_input_is_noticed_once() {
    let null = File::open("/dev/null").unwrap();
    let host = fds(None, Some(null.into()));
    assert!(host.source.is_none() && host.fd().is_none());
    let (reader, mut writer) = io::pipe().unwrap();
    let mut host = fds(None, Some(reader.into()));
    writer.write_all(b"last words").unwrap();
    drop(writer);
    turn(&mut host);
    assert_eq!(heard(&mut host), b"last words");
    assert!(rests(&mut host) && host.source.is_none());
}

#[test]
fn input_is_read_as_there_is_room() {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..3 * MAX_INPUT + 77).map(|i| (i % 251) as u8).collect();
    file.write_all(&content).unwrap();
    file.rewind().unwrap();
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(&content).unwrap();
    for input in [OwnedFd::from(file), reader.into()] {
        let mut host = fds(None, Some(input));
        let mut got = Vec::new();
        while got.len() < content.len() {
            assert!(host.input().len() <= MAX_INPUT);
            let part = heard(&mut host);
            assert!(!part.is_empty(), "stuck at {}", got.len());
            got.extend(part);
        }
        assert!(got == content);
    }
}

fn pty() -> (PathBuf, HostConsole) {
    let pty = Pty::open().unwrap();
    (pty.path().to_owned(), HostConsole::new(HostSide::Pty(pty)).unwrap())
}

fn slave(path: &std::path::Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open(path).unwrap()
}

#[test]
fn a_pseudo_terminal_has_readers_that_come_and_go() {
    let (path, mut host) = pty();
    assert!(rests(&mut host), "hung up, and quiet about it");
    say(&mut host, b"nobody hears");
    assert_eq!(host.dropped(), 12);
    for round in 0..3 {
        let mut reader = slave(&path);
        say(&mut host, b"hello\n");
        expect(&mut reader, b"hello\n");
        reader.write_all(b"typed\n").unwrap();
        turn(&mut host);
        assert_eq!(heard(&mut host), b"typed\n");
        assert!(rests(&mut host), "round {round}");
        drop(reader);
        assert!(rests(&mut host));
        say(&mut host, b"gone");
    }
    assert_eq!(host.dropped(), 12 + 3 * 4);
}

#[test]
fn a_terminal_that_nobody_reads_is_full_and_no_more() {
    let (path, mut host) = pty();
    let stuck = slave(&path);
    for _ in 0..4000 {
        say(&mut host, &[b'x'; 100]);
    }
    assert!(host.dropped() > 0 && host.waiting_output.len() <= MAX_OUTPUT);
    assert!(rests(&mut host));
    drop(stuck);
    turn(&mut host);
    assert!(host.waiting_output.is_empty() && rests(&mut host));
}

fn listening() -> (tempfile::TempDir, PathBuf, HostConsole) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let host = HostConsole::new(HostSide::Socket(PrivateListener::bind(&path).unwrap())).unwrap();
    (dir, path, host)
}

#[test]
fn clients_of_a_socket_come_and_go() {
    let (_dir, path, mut host) = listening();
    say(&mut host, b"nobody hears");
    assert_eq!(host.dropped(), 12);
    for _ in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"early").unwrap();
        turn(&mut host);
        assert_eq!(heard(&mut host), b"early");
        say(&mut host, b"hello");
        expect(&mut client, b"hello");
        client.write_all(b"bye").unwrap();
        drop(client);
        turn(&mut host);
        assert_eq!(heard(&mut host), b"bye");
        assert!(rests(&mut host));
        assert!(matches!(host.sink, Sink::Nobody) && host.source.is_none());
    }
    drop(host);
    assert!(!path.exists());
}

#[test]
fn a_new_client_takes_the_place_of_the_one_before() {
    let (_dir, path, mut host) = listening();
    let mut first = UnixStream::connect(&path).unwrap();
    turn(&mut host);
    // What waits for a client that does not read goes with it.
    while host.waiting_output.is_empty() {
        say(&mut host, &[b'x'; 4096]);
    }
    let mut second = UnixStream::connect(&path).unwrap();
    turn(&mut host);
    assert!(host.waiting_output.is_empty() && host.dropped() > 0);
    say(&mut host, b"hello");
    expect(&mut second, b"hello");
    let mut all = Vec::new();
    first.read_to_end(&mut all).unwrap();
    assert!(!all.is_empty() && all.iter().all(|b| *b == b'x'));
    second.write_all(b"typed").unwrap();
    turn(&mut host);
    assert_eq!(heard(&mut host), b"typed");
    assert!(rests(&mut host));
}

#[test]
fn many_clients_at_once_are_taken_turn_by_turn() {
    let (_dir, path, mut host) = listening();
    let clients: Vec<_> = (0..3 * MAX_ACCEPTS)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    for _ in 0..3 {
        turn(&mut host);
    }
    assert!(rests(&mut host));
    say(&mut host, b"last");
    expect(&mut clients.last().unwrap(), b"last");
}

#[test]
fn a_client_that_only_reads_is_served_until_it_goes() {
    let (_dir, path, mut host) = listening();
    let mut client = UnixStream::connect(&path).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    turn(&mut host);
    assert!(rests(&mut host));
    say(&mut host, b"hello");
    expect(&mut client, b"hello");
    drop(client);
    turn(&mut host);
    assert!(matches!(host.sink, Sink::Nobody) && rests(&mut host));
}

#[test]
fn what_a_client_typed_before_it_went_arrives_although_there_was_no_room() {
    let (_dir, path, mut host) = listening();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&vec![b'y'; 3 * MAX_INPUT]).unwrap();
    drop(client);
    turn(&mut host);
    host.on_ready();
    let mut got = 0;
    while got < 3 * MAX_INPUT {
        let part = heard(&mut host);
        assert!(!part.is_empty(), "stuck at {got}");
        got += part.len();
    }
    assert!(matches!(host.sink, Sink::Nobody) && rests(&mut host));
}
