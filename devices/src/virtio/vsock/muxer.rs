//! The host's side of all connections of one guest: the listening socket, the tables, one epoll set (edge-triggered, so
//! that nothing is ever registered again) and one timer. Packets come in from `mod` and go out through
//! [`Muxer::fill`]; the rules of one connection are in `connection`.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Key, Phase, Verdict};
use super::handshake::{self, CommandReader, Progress};
use super::packet::{
    HEADER_SIZE, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, Segments, TYPE_STREAM, op,
};
use super::{VsockError, VsockOptions, sys};
use crate::memory::PodMemory;
use crate::unix_socket::{self, PrivateListener};

/// Connections of one guest, those in their handshake included (Cloud Hypervisor's number).
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// Resets of unknown connections that may wait for the guest; with that many no more packets are taken from it.
const MAX_ORPHANS: usize = 64;
/// The largest data packet (Linux: VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const MAX_PACKET: usize = 64 << 10;
/// Host ports of connections that the host asks for.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;
/// Connections taken and events handled a round, so that other devices get their turn.
const ROUND: usize = 64;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const WAKE: u64 = 2;
const FIRST_ID: u64 = 16;

/// What has happened so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_bytes: u64,
    pub(super) rx_packets: u64,
    pub(super) tx_bytes: u64,
    pub(super) tx_packets: u64,
    pub(super) tx_invalid: u64,
    pub(super) connections: u64,
    pub(super) refused: u64,
    pub(super) timeouts: u64,
}

/// A connection and its socket; no socket when only the reset is left.
struct Entry {
    connection: Connection,
    stream: Option<UnixStream>,
    /// The socket may have data, or its end.
    readable: bool,
    /// The peer closed both directions.
    hung_up: bool,
    /// We closed our sending direction. Once: each time, the kernel reports an event on the socket.
    finished: bool,
    /// In the `ready` list.
    queued: bool,
    deadline: Option<Instant>,
}

/// See the module.
pub(super) struct Muxer {
    cid: u64,
    path: PathBuf,
    timeout: Duration,
    listener: PrivateListener,
    /// Whether the listener is in the epoll set.
    accepting: bool,
    active: bool,
    epoll: Epoll,
    timer: TimerFd,
    timer_armed: bool,
    wake: EventFd,
    next_id: u64,
    next_port: u32,
    handshakes: HashMap<u64, (UnixStream, CommandReader)>,
    entries: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    /// Connections that have something for the guest, in turn.
    ready: VecDeque<u64>,
    orphans: VecDeque<Header>,
    pub(super) counters: Counters,
}

impl Muxer {
    /// Makes the listening socket; nothing is taken from it before [`Muxer::start`].
    pub(super) fn new(options: VsockOptions) -> Result<Self, VsockError> {
        let host = |what| move |source| VsockError::Host { what, source };
        let path = options.socket;
        let epoll = Epoll::new().map_err(host("epoll"))?;
        let timer = TimerFd::new().map_err(|e| host("timerfd")(e.into()))?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        for (fd, id) in [(timer.as_raw_fd(), TIMER), (wake.as_raw_fd(), WAKE)] {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))
                .map_err(host("epoll_ctl"))?;
        }
        let listener = PrivateListener::bind(&path).map_err(|source| VsockError::Socket {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            cid: options.cid,
            path,
            timeout: options.handshake_timeout,
            listener,
            accepting: false,
            active: false,
            epoll,
            timer,
            timer_armed: false,
            wake,
            next_id: FIRST_ID,
            next_port: HOST_PORTS.start,
            handshakes: HashMap::new(),
            entries: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            orphans: VecDeque::new(),
            counters: Counters::default(),
        })
    }

    /// The descriptor that is readable when [`Muxer::on_events`] has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The guest's driver is there: takes the connections that wait in the backlog, and new ones.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.active = true;
        self.set_accepting(true)
    }

    /// The guest's driver is gone: all connections end.
    pub(super) fn stop(&mut self) {
        self.active = false;
        if let Err(error) = self.set_accepting(false) {
            tracing::warn!(%error, "vsock: cannot pause the listener");
        }
        self.handshakes.clear();
        self.entries.clear();
        self.by_key.clear();
        self.ready.clear();
        self.orphans.clear();
    }

    fn set_accepting(&mut self, accepting: bool) -> io::Result<()> {
        if accepting != self.accepting {
            let change = if accepting {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            self.epoll.ctl(
                change,
                self.listener.as_raw_fd(),
                EpollEvent::new(EventSet::IN, LISTENER),
            )?;
            self.accepting = accepting;
        }
        Ok(())
    }

    /// Makes [`Muxer::fd`] readable: there is more to do when others had their turn.
    pub(super) fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::debug!(%error, "vsock: wake-up");
        }
    }

    fn open_count(&self) -> usize {
        self.entries.len().saturating_add(self.handshakes.len())
    }

    /// Connections that are open.
    pub(super) fn active_connections(&self) -> u64 {
        self.open_count() as u64
    }

    /// Handles what the descriptors report.
    pub(super) fn on_events(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); ROUND];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => self.on_timer(),
                WAKE => {
                    // Non-blocking; a spurious wake-up is harmless.
                    let _ = self.wake.read();
                }
                id => self.on_socket(id, event.event_set()),
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..ROUND {
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => continue,
                Err(error) => {
                    // Out of descriptors or memory: let the backlog wait, look again when the timer fires.
                    tracing::warn!(%error, path = %self.path.display(), "vsock: accept");
                    if let Err(error) = self.set_accepting(false) {
                        tracing::warn!(%error, "vsock: cannot pause the listener");
                    }
                    self.arm_timer(self.timeout);
                    return;
                }
            };
            if self.open_count() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
                self.counters.refused += 1;
                continue;
            }
            let id = self.new_id();
            if self.watch(&stream, id) {
                self.handshakes.insert(id, (stream, CommandReader::default()));
                // The command is mostly there already.
                self.on_handshake(id);
            }
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn watch(&mut self, stream: &UnixStream, id: u64) -> bool {
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = self
            .epoll
            .ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, id));
        if let Err(error) = &watched {
            tracing::warn!(%error, "vsock: epoll_ctl");
            self.counters.refused += 1;
        }
        watched.is_ok()
    }

    fn on_handshake(&mut self, id: u64) {
        let Some((stream, reader)) = self.handshakes.get_mut(&id) else {
            return;
        };
        let port = match reader.read(stream) {
            Progress::Waiting => return,
            Progress::Port(port) => port,
            Progress::Refused => {
                self.handshakes.remove(&id);
                self.counters.refused += 1;
                return;
            }
        };
        let Some((stream, _)) = self.handshakes.remove(&id) else {
            return;
        };
        let key = self.free_key(port);
        let deadline = Instant::now().checked_add(self.timeout);
        self.insert(id, Connection::from_host(key, self.cid), stream, deadline);
        self.arm_timer(self.timeout);
    }

    /// A host port that no connection to `guest` uses: there are a million times more ports than connections.
    fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key {
                host: self.next_port,
                guest,
            };
            self.next_port = self.next_port.wrapping_add(1);
            if !HOST_PORTS.contains(&self.next_port) {
                self.next_port = HOST_PORTS.start;
            }
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    fn insert(&mut self, id: u64, connection: Connection, stream: UnixStream, deadline: Option<Instant>) {
        self.by_key.insert(connection.key(), id);
        let entry = Entry {
            connection,
            stream: Some(stream),
            // What came before the edges were looked at.
            readable: true,
            hung_up: false,
            finished: false,
            queued: true,
            deadline,
        };
        self.entries.insert(id, entry);
        self.ready.push_back(id);
        self.counters.connections += 1;
    }

    fn remove(&mut self, id: u64) {
        if let Some(entry) = self.entries.remove(&id) {
            self.by_key.remove(&entry.connection.key());
            if entry.queued {
                self.ready.retain(|&other| other != id);
            }
        }
    }

    /// Puts `id` in line when it has something for the guest.
    fn requeue(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let data = entry.readable && entry.connection.has_use_for_data();
        if !entry.queued && (data || entry.connection.has_control()) {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Ends a connection from this side; one that the guest never heard of just goes.
    fn abort(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.connection.is_known_to_guest() {
            entry.stream = None;
            entry.deadline = None;
            entry.connection.abort();
            self.requeue(id);
        } else {
            self.remove(id);
        }
    }

    fn on_socket(&mut self, id: u64, events: EventSet) {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if self.handshakes.contains_key(&id) {
            if hung_up {
                self.handshakes.remove(&id);
            } else {
                self.on_handshake(id);
            }
            return;
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.hung_up |= hung_up;
        entry.readable |= hung_up || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        if hung_up && entry.connection.phase() == Phase::Requested {
            self.abort(id);
            return;
        }
        if hung_up && entry.connection.phase() == Phase::Established && !entry.connection.may_send() {
            // Its end was read before, or will never be: this is all there is to tell.
            entry.connection.shut_down(SHUTDOWN_BOTH);
        }
        if events.contains(EventSet::OUT) || hung_up {
            self.flush(id);
        }
        self.requeue(id);
    }

    /// Passes on what waits for the host's socket, then closes what the guest closed.
    fn flush(&mut self, id: u64) {
        let Some(Entry {
            connection,
            stream: Some(stream),
            finished,
            ..
        }) = self.entries.get_mut(&id)
        else {
            return;
        };
        while !connection.backlog().is_empty() {
            match sys::send_bytes(stream, connection.backlog().as_slices().0) {
                Ok(sent) => connection.on_flushed(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    let lost = connection.backlog().len();
                    connection.on_flushed(lost);
                    connection.shut_down(SHUTDOWN_RCV);
                }
            }
        }
        if connection.is_complete() {
            self.abort(id);
        } else if connection.guest_is_finished() && !std::mem::replace(finished, true) {
            // Fails only when the peer is gone, which its hang-up tells.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn arm_timer(&mut self, after: Duration) {
        if self.timer_armed {
            return;
        }
        match self.timer.reset(after.max(Duration::from_millis(1)), None) {
            Ok(()) => self.timer_armed = true,
            Err(error) => tracing::warn!(%error, "vsock: timerfd"),
        }
    }

    fn on_timer(&mut self) {
        self.timer_armed = false;
        if let Err(error) = self.timer.wait() {
            tracing::debug!(%error, "vsock: timerfd");
        }
        if self.active && !self.accepting && self.set_accepting(true).is_err() {
            self.arm_timer(self.timeout);
        }
        let now = Instant::now();
        let expired: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, e)| e.deadline.is_some_and(|d| d <= now))
            .map(|(&id, _)| id)
            .collect();
        for id in expired {
            self.counters.timeouts += 1;
            self.abort(id);
        }
        if let Some(next) = self.entries.values().filter_map(|e| e.deadline).min() {
            self.arm_timer(next.saturating_duration_since(now));
        }
    }

    /// Whether a packet of the guest can be handled now, whatever it is.
    pub(super) fn takes_packets(&self) -> bool {
        self.orphans.len() < MAX_ORPHANS
    }

    /// Handles a packet of the guest.
    pub(super) fn on_packet(&mut self, memory: &PodMemory, packet: &Segments) {
        let Some(header) = packet.header(memory) else {
            self.counters.tx_invalid += 1;
            return;
        };
        let data = packet.len().saturating_sub(HEADER_SIZE);
        let announced = header.len as usize;
        // A packet under another's name, to another, or with less data than it says is not answered.
        if header.src_cid != self.cid || header.dst_cid != HOST_CID || (header.op == op::RW && announced > data) {
            self.counters.tx_invalid += 1;
            return;
        }
        self.counters.tx_packets += 1;
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let known = self.by_key.get(&key).copied().filter(|_| header.kind == TYPE_STREAM);
        match known {
            Some(id) => self.on_known(id, &header, memory, packet, announced),
            None if header.op == op::RST => {}
            None if header.op == op::REQUEST && header.kind == TYPE_STREAM => self.on_request(key, &header),
            None => self.orphans.push_back(header.reset()),
        }
    }

    fn on_request(&mut self, key: Key, request: &Header) {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", key.host));
        let id = self.new_id();
        if self.open_count() < MAX_CONNECTIONS
            && let Ok(stream) = unix_socket::sys::connect(Path::new(&path))
            && self.watch(&stream, id)
        {
            self.insert(id, Connection::from_guest(key, self.cid, request), stream, None);
        } else {
            self.counters.refused += 1;
            self.orphans.push_back(request.reset());
        }
    }

    fn on_known(&mut self, id: u64, header: &Header, memory: &PodMemory, packet: &Segments, len: usize) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match entry.connection.on_packet(header) {
            Verdict::Done => {}
            Verdict::Accepted => {
                entry.deadline = None;
                let text = handshake::accepted(entry.connection.key().host);
                let told = entry
                    .stream
                    .as_ref()
                    .and_then(|stream| sys::send_bytes(stream, text.as_bytes()).ok());
                if told != Some(text.len()) {
                    self.abort(id);
                }
            }
            Verdict::Data => {
                if !entry.connection.admits(len) || !self.on_data(id, memory, packet, len) {
                    self.abort(id);
                }
            }
            Verdict::Shutdown => {
                if let Some(stream) = entry.stream.as_ref().filter(|_| !entry.connection.may_send()) {
                    let _ = stream.shutdown(Shutdown::Read);
                }
                self.flush(id);
            }
            Verdict::Gone => self.remove(id),
            Verdict::Broken => self.abort(id),
        }
        self.requeue(id);
    }

    /// Passes `len` bytes of `packet` to the host, or keeps what its socket does not take; false when they cannot be
    /// read.
    fn on_data(&mut self, id: u64, memory: &PodMemory, packet: &Segments, len: usize) -> bool {
        let Some(Entry {
            connection,
            stream: Some(stream),
            ..
        }) = self.entries.get_mut(&id)
        else {
            return true;
        };
        self.counters.tx_bytes += len as u64;
        if connection.host_is_deaf() {
            connection.on_forwarded(len);
            return true;
        }
        let mut sent = 0;
        if connection.backlog().is_empty() {
            match packet.send(memory, 0, len, stream) {
                Ok(n) => sent = n,
                Err(_) => {
                    connection.on_forwarded(len);
                    connection.shut_down(SHUTDOWN_RCV);
                    return true;
                }
            }
            connection.on_forwarded(sent);
        }
        if sent == len {
            return true;
        }
        let kept = packet.append_to(memory, sent, len.saturating_sub(sent), connection.backlog());
        // The socket may have drained meanwhile, and then no edge would tell.
        self.flush(id);
        kept
    }

    /// Whether something may be there for the guest.
    pub(super) fn has_output(&self) -> bool {
        !self.orphans.is_empty() || !self.ready.is_empty()
    }

    /// Puts the next packet for the guest into `chain` (which has room for a header and data): the bytes written, or
    /// None when there is nothing.
    pub(super) fn fill(&mut self, memory: &PodMemory, chain: &Segments) -> Option<usize> {
        if let Some(header) = self.orphans.pop_front() {
            return Some(self.put(memory, chain, header));
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(entry) = self.entries.get_mut(&id) else {
                continue;
            };
            entry.queued = false;
            let header = match entry.connection.next_control() {
                Some(header) => {
                    self.after_control(id, header.op);
                    Some(header)
                }
                None => self.next_data(id, memory, chain),
            };
            self.requeue(id);
            if let Some(header) = header {
                return Some(self.put(memory, chain, header));
            }
        }
        None
    }

    fn put(&mut self, memory: &PodMemory, chain: &Segments, header: Header) -> usize {
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += u64::from(header.len);
        if chain.set_header(memory, header) {
            HEADER_SIZE.saturating_add(header.len as usize)
        } else {
            0
        }
    }

    /// What follows from having told the guest `op`.
    fn after_control(&mut self, id: u64, op: u16) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match op {
            op::RST => self.remove(id),
            op::SHUTDOWN if entry.connection.is_complete() => self.abort(id),
            op::SHUTDOWN if entry.hung_up => {
                // The host's process is gone: the guest has this long to close its side.
                entry.deadline = Instant::now().checked_add(self.timeout);
                self.arm_timer(self.timeout);
            }
            _ => {}
        }
    }

    /// Reads from the connection's socket straight into `chain`.
    fn next_data(&mut self, id: u64, memory: &PodMemory, chain: &Segments) -> Option<Header> {
        let entry = self.entries.get_mut(&id)?;
        if !entry.readable || !entry.connection.may_send() {
            return None;
        }
        let stream = entry.stream.as_ref()?;
        let limit = (entry.connection.credit() as usize).min(MAX_PACKET);
        if limit == 0 {
            // `readable` stays: the guest's next packet with credit puts the connection in line again.
            entry.connection.want_credit();
            return entry.connection.next_control();
        }
        match chain.receive(memory, limit, stream) {
            Ok(0) => {
                entry.readable = false;
                let flags = if entry.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                entry.connection.shut_down(flags);
                None
            }
            Ok(count) => Some(entry.connection.data_header(u32::try_from(count).unwrap_or(u32::MAX))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                entry.readable = false;
                None
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => {
                entry.readable = false;
                entry.connection.shut_down(SHUTDOWN_BOTH);
                None
            }
        }
    }
}
