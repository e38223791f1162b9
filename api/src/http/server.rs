//! The server: a listener and its connections behind one descriptor, for an event loop of any kind. Nothing here blocks,
//! and what hostile clients can make it hold is bounded: connections, bytes, descriptors.

use super::connection::{Connection, Interest};
use super::listener::{BindError, Listener};
use super::message::{Request, Response};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Clients at one time; the next is told 503 and closed.
pub const MAX_CONNECTIONS: usize = 32;
/// Bytes of unfinished requests that all clients together may have here.
const MAX_BUFFERED: usize = 8 << 20;
/// Bytes taken from one client at a time.
const READ_SIZE: usize = 64 << 10;
/// Clients taken from the backlog at a time.
const ACCEPT_AT_ONCE: usize = 64;
const LISTENER: u64 = 0;
const WAKE: u64 = 1;
/// How long each client may hold up the end of the monitor when the last responses are flushed.
const DRAIN_PATIENCE: Duration = Duration::from_millis(200);

/// Names a connection; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(u64);

/// A request and where its response goes.
#[derive(Debug)]
pub struct Incoming {
    /// The connection that waits for the response.
    pub connection: ConnectionId,
    /// The request.
    pub request: Request,
}

/// The HTTP server on a UNIX socket.
///
/// Its descriptor is readable when [`Server::poll`] has something to do.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    epoll: Epoll,
    /// Raised when a request waits that no readiness of a socket will announce (it came behind another one).
    wake: EventFd,
    connections: BTreeMap<u64, Connection>,
    pending: BTreeSet<u64>,
    next_id: u64,
    /// Given up for a moment when descriptors run out, so that a client can be taken and turned away.
    spare: Option<File>,
    scratch: Vec<u8>,
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Server {
    /// Listens on `path`, mode 0600, and holds `<path>.lock` until dropped. A socket that nobody listens on any more is
    /// replaced; both files are removed on drop.
    ///
    /// # Errors
    /// [`BindError`]: another monitor has the path, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let listener = Listener::bind(path)?;
        Self::new(listener).map_err(|source| BindError::System {
            what: "cannot watch",
            path: path.to_owned(),
            source,
        })
    }

    /// Serves a listening socket that somebody else has made (`--api-socket fd=N`).
    ///
    /// # Errors
    /// It is no listening UNIX socket, or descriptors cannot be had.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::new(Listener::from_fd(fd)?)
    }

    /// The socket's path, if it was bound here.
    pub fn path(&self) -> Option<&Path> {
        self.listener.path()
    }

    fn new(listener: Listener) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let readable = |token| EpollEvent::new(EventSet::IN, token);
        epoll.ctl(ControlOperation::Add, listener.socket.as_raw_fd(), readable(LISTENER))?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), readable(WAKE))?;
        Ok(Self {
            listener,
            epoll,
            wake,
            connections: BTreeMap::new(),
            pending: BTreeSet::new(),
            next_id: WAKE + 1,
            spare: File::open("/dev/null").ok(),
            scratch: Vec::new(),
        })
    }

    /// Does all that can be done without waiting and returns the requests that have come whole.
    pub fn poll(&mut self) -> Vec<Incoming> {
        let mut events = [EpollEvent::default(); MAX_CONNECTIONS + 2];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        let mut touched = std::mem::take(&mut self.pending);
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(),
                WAKE => {
                    // Fails only when it was not raised.
                    let _ = self.wake.read();
                }
                id => {
                    touched.insert(id);
                    self.serve(id, event.event_set());
                }
            }
        }
        let mut incoming = Vec::new();
        for id in touched {
            if let Some(connection) = self.connections.get_mut(&id)
                && let Some(request) = connection.take_request()
            {
                incoming.push(Incoming {
                    connection: ConnectionId(id),
                    request,
                });
            }
            self.settle(id);
        }
        incoming
    }

    /// Sends the response of a connection's request; if the client has gone, that is no error.
    pub fn respond(&mut self, connection: ConnectionId, response: &Response) {
        let Some(open) = self.connections.get_mut(&connection.0) else {
            return;
        };
        open.respond(response);
        if open.buffered() > 0 && !open.is_busy() {
            self.pending.insert(connection.0);
            // Fails only when the counter is full, and then it is raised already.
            let _ = self.wake.write(1);
        }
        self.settle(connection.0);
    }

    /// Writes out what is still to be written, waiting a short while for each client; for the end of the monitor.
    pub fn drain(&mut self) {
        for connection in self
            .connections
            .values_mut()
            .filter(|connection| connection.interest().write)
        {
            let waits = connection.stream.set_nonblocking(false);
            let bounded = connection.stream.set_write_timeout(Some(DRAIN_PATIENCE));
            if waits.is_ok() && bounded.is_ok() {
                connection.flush();
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_AT_ONCE {
            match self.listener.socket.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    // Left in the backlog, the client would keep the listener readable and the loop turning.
                    if self.spare.take().is_none() {
                        return;
                    }
                    if let Ok((stream, _)) = self.listener.socket.accept() {
                        let mut connection = Connection::new(stream);
                        connection.refuse(503, "the monitor has no descriptor left; try again later");
                    }
                    self.spare = File::open("/dev/null").ok();
                }
                Err(_) => return,
            }
        }
    }

    fn admit(&mut self, stream: std::os::unix::net::UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let mut connection = Connection::new(stream);
        if self.connections.len() >= MAX_CONNECTIONS {
            let reason = format!("{MAX_CONNECTIONS} clients are connected already; close one or use its connection");
            connection.refuse(503, &reason);
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.connections.insert(id, connection);
        self.settle(id);
    }

    fn serve(&mut self, id: u64, ready: EventSet) {
        let others: usize = self
            .connections
            .iter()
            .filter(|(other, _)| **other != id)
            .map(|(_, c)| c.buffered())
            .sum();
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if ready.contains(EventSet::OUT) {
            connection.flush();
        }
        if connection.interest().read && ready.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            self.scratch.resize(READ_SIZE, 0);
            connection.read(&mut self.scratch);
            if others + connection.buffered() > MAX_BUFFERED {
                connection.refuse(
                    503,
                    "too many unfinished requests are held for other clients; try again later",
                );
            }
        } else if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.fail();
        }
    }

    /// Brings epoll's view of a connection up to date, or ends the connection.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let fd = connection.stream.as_raw_fd();
        if connection.is_done() {
            // Dropping it closes it, which removes it from epoll.
            self.connections.remove(&id);
            return;
        }
        let wanted = connection.interest();
        // A peer that has gone altogether is reported for ever; once known, it is watched no more.
        let gone = connection.is_busy() && connection.has_ended();
        let watch = (!gone).then_some(wanted);
        if watch == connection.watched {
            return;
        }
        let event = EpollEvent::new(event_set(wanted), id);
        let told = match (connection.watched, watch) {
            (None, Some(_)) => self.epoll.ctl(ControlOperation::Add, fd, event),
            (Some(_), Some(_)) => self.epoll.ctl(ControlOperation::Modify, fd, event),
            (Some(_), None) => self.epoll.ctl(ControlOperation::Delete, fd, event),
            (None, None) => Ok(()),
        };
        if told.is_ok() {
            connection.watched = watch;
        } else if !connection.is_busy() {
            self.connections.remove(&id);
        }
    }
}

fn event_set(interest: Interest) -> EventSet {
    let mut events = EventSet::empty();
    events.set(EventSet::IN, interest.read);
    events.set(EventSet::OUT, interest.write);
    events
}
