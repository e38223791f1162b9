//! One stream between a host socket and a guest socket: its phase, its two credit windows and what it still has to
//! tell the guest (virtio 1.2 section 5.10.6). A pure state machine: it holds no descriptors and does no I/O.

use std::collections::VecDeque;
use std::num::Wrapping;

use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op};

/// What the guest may have in flight on one connection, and so the most that is ever buffered for it.
pub(super) const BUF_ALLOC: u32 = 64 << 10;
/// The guest is told of freed space once this much of it is news.
const UPDATE_THRESHOLD: u32 = BUF_ALLOC / 2;

/// The two ports of a connection: unique among the connections of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The port on the host's side.
    pub(super) host: u32,
    /// The port on the guest's side.
    pub(super) guest: u32,
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    /// Data flows.
    Established,
    /// Over: only the reset is still to be told.
    Reset,
}

/// What a packet of the guest asks of the connection's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing beyond what [`Connection::next_control`] now has to say.
    Done,
    /// The guest accepted: tell the host.
    Accepted,
    /// The packet's data may be passed on.
    Data,
    /// The guest closed one or both directions.
    Shutdown,
    /// The guest reset the connection: forget it.
    Gone,
    /// The guest broke the rules: reset it.
    Broken,
}

/// Packets that are due.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    guest_cid: u64,
    phase: Phase,
    due: Due,
    /// The guest's window, as last told.
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    credit_requested: bool,
    /// Bytes of the guest that have left our hands.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest was last told.
    announced: Wrapping<u32>,
    /// Bytes of the guest that the host's socket would not take yet.
    backlog: VecDeque<u8>,
    peer_shutdown: u32,
    own_shutdown: u32,
}

impl Connection {
    fn new(key: Key, guest_cid: u64, phase: Phase) -> Self {
        Self {
            key,
            guest_cid,
            phase,
            due: Due::default(),
            peer_buf_alloc: 0,
            peer_fwd_cnt: Wrapping(0),
            sent: Wrapping(0),
            credit_requested: false,
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            backlog: VecDeque::new(),
            peer_shutdown: 0,
            own_shutdown: 0,
        }
    }

    /// A connection that a host process asks for.
    pub(super) fn from_host(key: Key, guest_cid: u64) -> Self {
        let mut connection = Self::new(key, guest_cid, Phase::Requested);
        connection.due.request = true;
        connection
    }

    /// A connection that the guest asked for with `request` and that the host has taken.
    pub(super) fn from_guest(key: Key, guest_cid: u64, request: &Header) -> Self {
        let mut connection = Self::new(key, guest_cid, Phase::Established);
        connection.due.response = true;
        connection.learn_credit(request);
        connection
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest has heard of this connection.
    pub(super) fn is_known_to_guest(&self) -> bool {
        !self.due.request
    }

    fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Takes a packet of the guest.
    pub(super) fn on_packet(&mut self, header: &Header) -> Verdict {
        if header.op == op::RST {
            return Verdict::Gone;
        }
        match self.phase {
            Phase::Reset => return Verdict::Done,
            Phase::Requested if header.op != op::RESPONSE || self.due.request => return Verdict::Broken,
            Phase::Established if header.op == op::RESPONSE => return Verdict::Broken,
            Phase::Requested | Phase::Established => self.learn_credit(header),
        }
        match header.op {
            op::RESPONSE => {
                self.phase = Phase::Established;
                Verdict::Accepted
            }
            op::RW => Verdict::Data,
            op::SHUTDOWN => {
                self.peer_shutdown |= header.flags & SHUTDOWN_BOTH;
                Verdict::Shutdown
            }
            op::CREDIT_UPDATE => Verdict::Done,
            op::CREDIT_REQUEST => {
                self.due.credit_update = true;
                Verdict::Done
            }
            _ => Verdict::Broken,
        }
    }

    /// Whether the guest may send `len` bytes now: it must not exceed the window or speak after its own shutdown.
    pub(super) fn admits(&self, len: usize) -> bool {
        self.peer_shutdown & SHUTDOWN_SEND == 0
            && self
                .backlog
                .len()
                .checked_add(len)
                .is_some_and(|total| total <= BUF_ALLOC as usize)
    }

    /// `len` bytes of the guest have left our hands.
    pub(super) fn on_forwarded(&mut self, len: usize) {
        self.forwarded += Wrapping(u32::try_from(len).unwrap_or(u32::MAX));
        if (self.forwarded - self.announced).0 >= UPDATE_THRESHOLD {
            self.due.credit_update = true;
        }
    }

    /// What the host's socket would not take yet.
    pub(super) fn backlog(&mut self) -> &mut VecDeque<u8> {
        &mut self.backlog
    }

    /// The first `len` bytes of the backlog have left our hands. An empty backlog gives its memory back.
    pub(super) fn on_flushed(&mut self, len: usize) {
        let len = len.min(self.backlog.len());
        self.backlog.drain(..len);
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.on_forwarded(len);
    }

    /// Bytes that the guest can take now.
    pub(super) fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_fwd_cnt).0)
    }

    /// Whether data of the host may go to the guest at all (credit aside).
    pub(super) fn may_send(&self) -> bool {
        self.phase == Phase::Established
            && self.peer_shutdown & SHUTDOWN_RCV == 0
            && self.own_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether data of the host would lead to a packet now: to data, or to a request for credit.
    pub(super) fn has_use_for_data(&self) -> bool {
        self.may_send() && (self.credit() > 0 || !self.credit_requested)
    }

    /// There is data but no credit: asks for some, once.
    pub(super) fn want_credit(&mut self) {
        if !self.credit_requested {
            self.credit_requested = true;
            self.due.credit_request = true;
        }
    }

    /// The host's socket is closed for `flags`; the guest is told when that is new.
    pub(super) fn shut_down(&mut self, flags: u32) {
        if self.own_shutdown | flags != self.own_shutdown {
            self.own_shutdown |= flags;
            self.due.shutdown = true;
        }
    }

    /// Whether the host's socket takes no more data.
    pub(super) fn host_is_deaf(&self) -> bool {
        self.own_shutdown & SHUTDOWN_RCV != 0
    }

    /// Whether all that the guest sent has been passed on and it will send no more.
    pub(super) fn guest_is_finished(&self) -> bool {
        self.peer_shutdown & SHUTDOWN_SEND != 0 && self.backlog.is_empty()
    }

    /// Whether the connection has nothing left to do in either direction.
    pub(super) fn is_complete(&self) -> bool {
        let closed = self.peer_shutdown
            | if self.own_shutdown & SHUTDOWN_SEND != 0 {
                SHUTDOWN_RCV
            } else {
                0
            };
        self.phase == Phase::Established && closed == SHUTDOWN_BOTH && self.backlog.is_empty() && !self.due.shutdown
    }

    /// Ends the connection: the guest will be sent a reset.
    pub(super) fn abort(&mut self) {
        self.phase = Phase::Reset;
        self.due = Due::default();
        self.backlog = VecDeque::new();
    }

    /// Whether [`Connection::next_control`] has something to say.
    pub(super) fn has_control(&self) -> bool {
        let due = self.due;
        self.phase == Phase::Reset
            || due.request
            || due.response
            || due.credit_update
            || due.credit_request
            || due.shutdown
    }

    /// The next packet without data that is due. After a reset was taken the connection is to be dropped.
    pub(super) fn next_control(&mut self) -> Option<Header> {
        if self.phase == Phase::Reset {
            return Some(self.header(op::RST, 0));
        }
        let due = &mut self.due;
        let next = if std::mem::take(&mut due.request) {
            op::REQUEST
        } else if std::mem::take(&mut due.response) {
            op::RESPONSE
        } else if std::mem::take(&mut due.credit_update) {
            op::CREDIT_UPDATE
        } else if std::mem::take(&mut due.credit_request) {
            op::CREDIT_REQUEST
        } else if std::mem::take(&mut due.shutdown) {
            let flags = self.own_shutdown;
            return Some(Header {
                flags,
                ..self.header(op::SHUTDOWN, 0)
            });
        } else {
            return None;
        };
        Some(self.header(next, 0))
    }

    /// The header of a data packet of `len` bytes, which counts as sent.
    pub(super) fn data_header(&mut self, len: u32) -> Header {
        self.sent += Wrapping(len);
        self.header(op::RW, len)
    }

    fn header(&mut self, op: u16, len: u32) -> Header {
        // Every packet carries the window, so it is news no more.
        self.announced = self.forwarded;
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host,
            dst_port: self.key.guest,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { host: 7, guest: 1024 };

    fn from_guest(op: u16, buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            op,
            buf_alloc,
            fwd_cnt,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }

    fn established() -> Connection {
        let mut c = Connection::from_guest(KEY, 3, &from_guest(op::REQUEST, 1000, 0));
        assert_eq!(c.next_control().unwrap().op, op::RESPONSE);
        c
    }

    #[test]
    fn host_side_handshake() {
        let mut c = Connection::from_host(KEY, 3);
        assert!(!c.is_known_to_guest());
        assert_eq!(
            c.on_packet(&from_guest(op::RESPONSE, 1, 0)),
            Verdict::Broken,
            "answered before asked"
        );
        let request = c.next_control().unwrap();
        assert_eq!((request.op, request.src_port, request.dst_port), (op::REQUEST, 7, 1024));
        assert_eq!((request.src_cid, request.dst_cid, request.buf_alloc), (2, 3, BUF_ALLOC));
        assert_eq!(c.on_packet(&from_guest(op::RESPONSE, 10, 0)), Verdict::Accepted);
        assert_eq!(c.credit(), 10);
        assert_eq!(c.on_packet(&from_guest(op::RESPONSE, 10, 0)), Verdict::Broken);
        assert_eq!(c.on_packet(&from_guest(op::RST, 0, 0)), Verdict::Gone);
    }

    #[test]
    fn data_before_the_handshake_is_broken() {
        let mut c = Connection::from_host(KEY, 3);
        c.next_control().unwrap();
        assert_eq!(c.on_packet(&from_guest(op::RW, 0, 0)), Verdict::Broken);
        c.abort();
        assert_eq!(c.on_packet(&from_guest(op::RW, 0, 0)), Verdict::Done);
        assert_eq!(c.next_control().unwrap().op, op::RST);
    }

    #[test]
    fn credit_towards_the_guest_wraps() {
        let mut c = established();
        assert_eq!(c.credit(), 1000);
        c.sent = Wrapping(u32::MAX - 99);
        c.on_packet(&from_guest(op::CREDIT_UPDATE, 1000, u32::MAX - 99));
        assert_eq!(c.data_header(600).len, 600);
        assert_eq!(c.credit(), 400);
        c.on_packet(&from_guest(op::CREDIT_UPDATE, 1000, 500));
        assert_eq!(c.credit(), 1000);
        // A guest that lies about what it took gets nothing, and nothing breaks.
        c.on_packet(&from_guest(op::CREDIT_UPDATE, 1000, 501));
        assert_eq!(c.credit(), 0);
    }

    #[test]
    fn credit_is_asked_for_once() {
        let mut c = established();
        c.want_credit();
        c.want_credit();
        assert_eq!(c.next_control().unwrap().op, op::CREDIT_REQUEST);
        assert!(c.next_control().is_none());
        c.want_credit();
        assert!(!c.has_control());
    }

    #[test]
    fn the_guest_is_told_of_half_a_window() {
        let mut c = established();
        c.on_forwarded(UPDATE_THRESHOLD as usize - 1);
        assert!(!c.has_control());
        c.on_forwarded(1);
        let update = c.next_control().unwrap();
        assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, UPDATE_THRESHOLD));
        assert!(!c.has_control());
        // Data carries the news as well.
        c.on_forwarded(UPDATE_THRESHOLD as usize);
        assert_eq!(c.data_header(1).fwd_cnt, 2 * UPDATE_THRESHOLD);
        assert!(!c.has_control());
    }

    #[test]
    fn the_window_is_enforced() {
        let mut c = established();
        assert!(c.admits(BUF_ALLOC as usize));
        assert!(!c.admits(BUF_ALLOC as usize + 1));
        c.backlog().extend([1; 10]);
        assert!(!c.admits(BUF_ALLOC as usize - 9));
        c.on_flushed(10);
        assert!(c.admits(BUF_ALLOC as usize));
        assert_eq!(c.backlog().capacity(), 0);
    }

    #[test]
    fn half_closes() {
        let mut c = established();
        let shut = |flags| Header {
            flags,
            ..from_guest(op::SHUTDOWN, 1000, 0)
        };
        assert_eq!(c.on_packet(&shut(SHUTDOWN_SEND)), Verdict::Shutdown);
        assert!(c.guest_is_finished() && c.may_send() && !c.is_complete());
        assert!(!c.admits(1));
        c.shut_down(SHUTDOWN_SEND);
        assert!(!c.may_send() && !c.is_complete(), "the guest has not been told");
        let told = c.next_control().unwrap();
        assert_eq!((told.op, told.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
        assert!(c.is_complete());
        c.shut_down(SHUTDOWN_SEND);
        assert!(!c.has_control());
    }
}
