//! Stream sockets (virtio 1.2, 5.10): connections with flow control and half-close over the three queues. What a
//! stream's bytes mean is the agent's business.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::paging::PageTables;
use crate::pci::Function;
use crate::virtio::{Device, Piece, Queue};
use crate::window::{Shared, Window};

const HOST: u64 = 2;
const HEADER: usize = 44;
const RX_BUFFERS: usize = 16;
const TX_BUFFERS: usize = 16;
const BUFFER: usize = 64 << 10;
/// Bytes that a stream takes before its reader has used them.
const RECEIVE_SPACE: u32 = 256 << 10;
/// Bytes that a writer may leave unsent in a stream before it should wait.
pub const SEND_SPACE: usize = 256 << 10;
const MAX_STREAMS: usize = 64;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;

/// Operations of the packet header.
mod op {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const RESPONSE: u16 = 2;
    pub(super) const RST: u16 = 3;
    pub(super) const SHUTDOWN: u16 = 4;
    pub(super) const RW: u16 = 5;
    pub(super) const CREDIT_UPDATE: u16 = 6;
    pub(super) const CREDIT_REQUEST: u16 = 7;
}

/// A packet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    source: u64,
    destination: u64,
    source_port: u32,
    destination_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    space: u32,
    taken: u32,
}

const STREAM: u16 = 1;
/// Ports without streams, used by [`Vsock::probe`]: a packet from one of them is answered by a reset, if it is seen.
const PROBE_PORTS: [u32; 2] = [0x3FFF_FFFE, 0x3FFF_FFFF];

impl Header {
    fn read(from: Shared) -> Self {
        // Once, into private memory: the host may change it meanwhile.
        let mut bytes = [0; HEADER];
        from.read(0, &mut bytes);
        let reply = crate::fuse::Reply(&bytes);
        Self {
            source: reply.u64(0),
            destination: reply.u64(8),
            source_port: reply.u32(16),
            destination_port: reply.u32(20),
            len: reply.u32(24),
            kind: reply.u32(28) as u16,
            op: (reply.u32(28) >> 16) as u16,
            flags: reply.u32(32),
            space: reply.u32(36),
            taken: reply.u32(40),
        }
    }

    fn write(&self, to: Shared) {
        to.set(0, self.source);
        to.set(8, self.destination);
        to.set(16, self.source_port);
        to.set(20, self.destination_port);
        to.set(24, self.len);
        to.set(28, self.kind);
        to.set(30, self.op);
        to.set(32, self.flags);
        to.set(36, self.space);
        to.set(40, self.taken);
    }
}

/// Names a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(u64);

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Asked the host, no answer yet.
    Connecting,
    /// Open, at least one way.
    Open,
    /// The host ended it or refused it.
    Gone,
}

/// A stream.
pub struct Stream {
    /// Its name.
    pub id: Id,
    /// Where it is in its life.
    pub state: State,
    /// Bytes received and not yet used.
    pub received: VecDeque<u8>,
    /// Bytes to be sent.
    pub unsent: VecDeque<u8>,
    /// The host sends no more.
    pub peer_done: bool,
    /// The host also reads no more: it waits for the stream's end.
    pub peer_gone: bool,
    /// Shut down once `unsent` is empty.
    pub closing: bool,
    shut: bool,
    port: u32,
    peer_port: u32,
    sent: u32,
    peer_space: u32,
    peer_taken: u32,
    arrived: u32,
    told: u32,
}

impl Stream {
    fn new(id: Id, state: State, port: u32, peer_port: u32) -> Self {
        Self {
            id,
            state,
            received: VecDeque::new(),
            unsent: VecDeque::new(),
            peer_done: false,
            peer_gone: false,
            closing: false,
            shut: false,
            port,
            peer_port,
            sent: 0,
            peer_space: 0,
            peer_taken: 0,
            arrived: 0,
            told: 0,
        }
    }

    /// Bytes that the reader has used, as the credit field counts.
    fn taken(&self) -> u32 {
        self.arrived.wrapping_sub(self.received.len() as u32)
    }

    fn credit(&self) -> u32 {
        self.peer_space.saturating_sub(self.sent.wrapping_sub(self.peer_taken))
    }

    fn header(&self, cid: u64, op: u16, len: u32, flags: u32) -> Header {
        Header {
            source: cid,
            destination: HOST,
            source_port: self.port,
            destination_port: self.peer_port,
            len,
            kind: STREAM,
            op,
            flags,
            space: RECEIVE_SPACE,
            taken: self.taken(),
        }
    }

    /// Room for bytes to be sent.
    #[must_use]
    pub fn send_room(&self) -> usize {
        SEND_SPACE.saturating_sub(self.unsent.len())
    }

    /// Whether everything, the shutdown included, has left.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.shut
    }
}

/// The socket device.
pub struct Vsock {
    device: Device,
    rx: Queue,
    tx: Queue,
    events: Queue,
    event: Shared,
    rx_buffers: Vec<(u16, Shared)>,
    tx_buffers: Vec<(Option<u16>, Shared)>,
    replies: VecDeque<Header>,
    cid: u64,
    port: u32,
    next_id: u64,
    next_port: u32,
    /// Which of the two probes were answered.
    probes: [bool; 2],
    /// The streams there are.
    pub streams: Vec<Stream>,
}

impl Vsock {
    /// Brings the device up, listening on `port`.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window, port: u32) -> Result<Self, &'static str> {
        let full = "the shared window is used up";
        let device = Device::start(function, tables, 0)?;
        let mut rx = device.queue(window, 0, 64)?;
        let tx = device.queue(window, 1, 64)?;
        let mut events = device.queue(window, 2, 4)?;
        let event = window.take(8).ok_or(full)?;
        events.push(&[Piece::Out(event)]).ok_or("the queue is full")?;
        let mut rx_buffers = Vec::new();
        for _ in 0..RX_BUFFERS {
            let buffer = window.take(BUFFER).ok_or(full)?;
            let token = rx.push(&[Piece::Out(buffer)]).ok_or("the queue is full")?;
            rx_buffers.push((token, buffer));
        }
        let mut tx_buffers = Vec::new();
        for _ in 0..TX_BUFFERS {
            tx_buffers.push((None, window.take(BUFFER).ok_or(full)?));
        }
        device.go();
        rx.kick();
        events.kick();
        let cid = u64::from(device.config(4)) << 32 | u64::from(device.config(0));
        Ok(Self {
            device,
            rx,
            tx,
            events,
            event,
            rx_buffers,
            tx_buffers,
            replies: VecDeque::new(),
            cid,
            port,
            next_id: 0,
            next_port: 0x4000_0000,
            probes: [false; 2],
            streams: Vec::new(),
        })
    }

    /// Opens a stream to the host's `port`.
    ///
    /// # Errors
    /// When there are too many streams.
    pub fn connect(&mut self, port: u32) -> Result<Id, &'static str> {
        if self.streams.len() >= MAX_STREAMS {
            return Err("too many streams");
        }
        let id = self.new_id();
        self.next_port = 0x4000_0000 | self.next_port.wrapping_add(1);
        let stream = Stream::new(id, State::Connecting, self.next_port, port);
        self.replies.push_back(stream.header(self.cid, op::REQUEST, 0, 0));
        self.streams.push(stream);
        Ok(id)
    }

    fn new_id(&mut self) -> Id {
        self.next_id += 1;
        Id(self.next_id)
    }

    /// The stream of that name.
    pub fn stream(&mut self, id: Id) -> Option<&mut Stream> {
        self.streams.iter_mut().find(|stream| stream.id == id)
    }

    /// Drops a stream; the host is told, unless it ended it itself.
    pub fn remove(&mut self, id: Id) {
        if let Some(at) = self.streams.iter().position(|stream| stream.id == id) {
            let stream = self.streams.swap_remove(at);
            if stream.state != State::Gone {
                self.replies.push_back(stream.header(self.cid, op::RST, 0, 0));
            }
        }
    }

    /// Takes what has come and sends what can go. True when something happened.
    pub fn poll(&mut self) -> bool {
        let mut any = false;
        while let Some(used) = self.rx.pop() {
            any = true;
            let Some((_, buffer)) = self.rx_buffers.iter().find(|(token, _)| *token == used.token).copied() else {
                continue;
            };
            if used.len as usize >= HEADER {
                self.packet(buffer, (used.len as usize - HEADER).min(BUFFER - HEADER));
            }
            let token = self.rx.push(&[Piece::Out(buffer)]);
            for place in self
                .rx_buffers
                .iter_mut()
                .filter(|(token, _)| *token == used.token)
                .take(1)
            {
                place.0 = token.unwrap_or(u16::MAX);
            }
        }
        while let Some(used) = self.tx.pop() {
            any = true;
            for place in self
                .tx_buffers
                .iter_mut()
                .filter(|(token, _)| *token == Some(used.token))
            {
                place.0 = None;
            }
        }
        while self.events.pop().is_some() {
            any = true;
            // The one event there is: the pod goes on from a snapshot, and nobody knows its streams any more.
            if self.event.get::<u32>(0) == TRANSPORT_RESET {
                self.replies.clear();
                for stream in &mut self.streams {
                    (stream.state, stream.peer_done, stream.peer_gone) = (State::Gone, true, true);
                }
            }
            let _ = self.events.push(&[Piece::Out(self.event)]);
            self.events.kick();
        }
        any |= self.send();
        self.rx.kick();
        self.tx.kick();
        any
    }

    /// Sleeps until the device has something.
    pub fn wait(&mut self) {
        crate::idle::wait_for(&[&self.rx, &self.tx, &self.events]);
        let _ = &self.device;
    }

    /// Whether the device has taken every packet.
    #[must_use]
    pub fn all_sent(&self) -> bool {
        self.replies.is_empty() && self.tx_buffers.iter().all(|(token, _)| token.is_none())
    }

    /// Whether the device has written nonsense.
    #[must_use]
    pub fn broken(&self) -> bool {
        self.rx.broken() || self.tx.broken()
    }

    fn packet(&mut self, buffer: Shared, available: usize) {
        let header = Header::read(buffer);
        if header.source != HOST || header.destination != self.cid || header.len as usize > available {
            return;
        }
        let at = self
            .streams
            .iter()
            .position(|stream| stream.port == header.destination_port && stream.peer_port == header.source_port);
        let Some(stream) = at.and_then(|at| self.streams.get_mut(at)) else {
            self.stranger(&header);
            return;
        };
        if stream.state == State::Gone {
            return;
        }
        stream.peer_space = header.space;
        stream.peer_taken = header.taken;
        match header.op {
            op::RESPONSE if stream.state == State::Connecting => stream.state = State::Open,
            op::RST => stream.state = State::Gone,
            op::SHUTDOWN => {
                stream.peer_done |= header.flags & SHUTDOWN_SEND != 0;
                if header.flags & (SHUTDOWN_SEND | SHUTDOWN_RECEIVE) == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                    // Nobody reads what is still unsent.
                    stream.unsent.clear();
                    stream.peer_gone = true;
                }
            }
            op::RW => {
                let len = header.len as usize;
                if stream.received.len() + len > RECEIVE_SPACE as usize {
                    // The host ignores the credit it was given.
                    let reset = stream.header(self.cid, op::RST, 0, 0);
                    stream.state = State::Gone;
                    self.replies.push_back(reset);
                    return;
                }
                stream.arrived = stream.arrived.wrapping_add(header.len);
                append(&mut stream.received, buffer.part(HEADER, len));
            }
            op::CREDIT_REQUEST => {
                stream.told = stream.taken();
                let update = stream.header(self.cid, op::CREDIT_UPDATE, 0, 0);
                self.replies.push_back(update);
            }
            _ => {}
        }
    }

    /// A packet of no stream: a request for a new one, or an error.
    fn stranger(&mut self, header: &Header) {
        if let (op::RST, Some(at)) = (
            header.op,
            PROBE_PORTS.iter().position(|port| *port == header.destination_port),
        ) {
            self.probes.get_mut(at).map(|seen| core::mem::replace(seen, true));
            return;
        }
        if self.streams.len() >= MAX_STREAMS
            && let Some(ended) = self.streams.iter().find(|stream| stream.shut).map(|stream| stream.id)
        {
            self.remove(ended);
        }
        let id = self.new_id();
        let mut stream = Stream::new(id, State::Open, header.destination_port, header.source_port);
        let welcome = header.op == op::REQUEST
            && header.kind == STREAM
            && header.destination_port == self.port
            && self.streams.len() < MAX_STREAMS;
        if welcome {
            stream.peer_space = header.space;
            stream.peer_taken = header.taken;
            self.replies.push_back(stream.header(self.cid, op::RESPONSE, 0, 0));
            self.streams.push(stream);
        } else if header.op != op::RST && self.replies.len() < MAX_STREAMS {
            self.replies.push_back(stream.header(self.cid, op::RST, 0, 0));
        }
    }

    fn send(&mut self) -> bool {
        let mut any = false;
        while let Some(header) = self.replies.front().copied() {
            if !self.transmit(&header, |_| ()) {
                return any;
            }
            any = true;
            self.replies.pop_front();
        }
        let mut streams = core::mem::take(&mut self.streams);
        for stream in streams.iter_mut().filter(|stream| stream.state == State::Open) {
            any |= self.send_stream(stream);
        }
        self.streams = streams;
        any
    }

    fn send_stream(&mut self, stream: &mut Stream) -> bool {
        let mut any = false;
        while !stream.unsent.is_empty() && !stream.shut {
            let count = stream.unsent.len().min(stream.credit() as usize).min(BUFFER - HEADER);
            if count == 0 {
                break;
            }
            let header = stream.header(self.cid, op::RW, count as u32, 0);
            let unsent = &mut stream.unsent;
            if !self.transmit(&header, |payload| take(unsent, payload)) {
                return any;
            }
            stream.sent = stream.sent.wrapping_add(count as u32);
            stream.told = header.taken;
            any = true;
        }
        if stream.taken().wrapping_sub(stream.told) >= RECEIVE_SPACE / 2 {
            let header = stream.header(self.cid, op::CREDIT_UPDATE, 0, 0);
            if self.transmit(&header, |_| ()) {
                stream.told = header.taken;
                any = true;
            }
        }
        if stream.closing && stream.unsent.is_empty() && !stream.shut {
            let header = stream.header(self.cid, op::SHUTDOWN, 0, SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
            stream.shut = self.transmit(&header, |_| ());
            any |= stream.shut;
        }
        any
    }

    /// Sends one packet if a buffer is free.
    fn transmit(&mut self, header: &Header, fill: impl FnOnce(Shared)) -> bool {
        let Some((place, buffer)) = self
            .tx_buffers
            .iter_mut()
            .find(|(token, _)| token.is_none())
            .map(|(t, b)| (t, *b))
        else {
            return false;
        };
        header.write(buffer);
        let len = header.len as usize;
        if len > 0 {
            fill(buffer.part(HEADER, len));
        }
        *place = self.tx.push(&[Piece::In(buffer.part(0, HEADER + len))]);
        place.is_some()
    }

    /// Asks the device to send a packet from the private page `page`: one of no stream, which the host answers with a
    /// reset if it ever sees it. A shared one follows as a fence. True when the private one was answered.
    ///
    /// # Errors
    /// When the queue is full or broken.
    pub fn probe(&mut self, page: Shared) -> Result<bool, &'static str> {
        self.probes = [false; 2];
        let [hidden, fence] = PROBE_PORTS.map(|port| Header {
            source: self.cid,
            destination: HOST,
            source_port: port,
            destination_port: port,
            len: 0,
            kind: STREAM,
            op: op::CREDIT_REQUEST,
            flags: 0,
            space: RECEIVE_SPACE,
            taken: 0,
        });
        hidden.write(page);
        while self.tx.room() < 2 || self.tx_buffers.iter().all(|(token, _)| token.is_some()) {
            self.wait();
            self.poll();
        }
        if self.tx.push(&[Piece::In(page)]).is_none() || !self.transmit(&fence, |_| ()) {
            return Err("the queue is full");
        }
        self.tx.kick();
        while !self.probes[1] {
            if self.broken() {
                return Err("the device broke its queue");
            }
            self.wait();
            self.poll();
        }
        Ok(self.probes[0])
    }
}

fn append(to: &mut VecDeque<u8>, from: Shared) {
    let old = to.len();
    to.resize(old + from.len(), 0);
    let (front, back) = to.as_mut_slices();
    // The new bytes are the last of the two slices.
    let in_front = front.len().saturating_sub(old);
    if in_front > 0 {
        from.read(0, front.get_mut(old..).unwrap_or_default());
    }
    let skip = old.saturating_sub(front.len());
    from.read(in_front, back.get_mut(skip..).unwrap_or_default());
}

fn take(from: &mut VecDeque<u8>, to: Shared) {
    let (front, back) = from.as_slices();
    let first = front.len().min(to.len());
    to.write(0, front.get(..first).unwrap_or_default());
    to.write(first, back.get(..to.len() - first).unwrap_or_default());
    from.drain(..to.len());
}
