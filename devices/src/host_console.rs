//! The host's end of a console, the same for the serial port, the virtio console and the debug port: where its bytes go
//! and come from. Nothing here ever waits: output that the host does not take at once waits in a bounded buffer, what
//! does not fit there or has no reader is dropped and counted, and input is read only while there is room for it.

mod fd;
mod pty;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet as Wakes, Events, MutEventSubscriber};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use self::fd::Descriptor;
pub use self::pty::{Pty, RawMode};
use crate::sync::lock;
use crate::unix_socket::PrivateListener;

/// The most bytes of output that wait for a slow reader; what comes then is dropped and counted.
pub const MAX_OUTPUT: usize = 64 << 10;
/// The most bytes of input that wait for the guest; the rest waits in the host's pipe, terminal or socket.
pub const MAX_INPUT: usize = 4 << 10;
/// Clients taken from a listening socket in one turn; only the last of them stays.
const MAX_ACCEPTS: usize = 16;

/// Where a console's output goes.
pub enum HostOutput {
    /// Nowhere.
    Discard,
    /// A writer of the monitor's own; one that waits makes the event loop wait.
    Writer(Box<dyn Write + Send>),
    /// A descriptor that may be shared with other processes: a pipe, terminal, socket or file.
    Fd(OwnedFd),
}

/// The other side of a console.
pub enum HostSide {
    /// What is there once, and if it goes is gone.
    Streams {
        /// Where output goes.
        output: HostOutput,
        /// Where input comes from. Its end ends the input only.
        input: Option<OwnedFd>,
    },
    /// A pseudo-terminal. Output while nobody has its slave open is dropped.
    Pty(Pty),
    /// A socket that one client at a time connects to; a new client takes the place of the one before, as in Cloud
    /// Hypervisor. Output without a client is dropped.
    Socket(PrivateListener),
}

/// What tells when output or input ends, and what follows from that.
enum Peer {
    /// Nothing: the descriptors are there once.
    Fixed,
    /// A pseudo-terminal. Its state (writable, hung up) is asked for before each write: nothing tells when a slave is
    /// opened.
    Pty(Epoll),
    /// The clients of a socket.
    Socket(PrivateListener),
}

/// Where output goes.
enum Sink {
    /// Nowhere, as it should.
    Discard,
    /// Nowhere: there is no client.
    Nobody,
    Writer(Box<dyn Write + Send>),
    Fd(Output),
}

struct Output {
    descriptor: Descriptor,
    /// Whether it is in the epoll set. Only while output waits: a reader that keeps up wakes nobody.
    watched: bool,
}

struct Input {
    descriptor: Descriptor,
    /// It is in the epoll set, edge-triggered; else it is always ready.
    watched: bool,
    /// There may be something to read.
    ready: bool,
    /// The other side closed both directions.
    hung_up: bool,
}

/// What came of an attempt to write.
enum Written {
    Bytes(usize),
    /// Later.
    Full,
    /// Nobody is there, or the disk is full: these bytes are lost.
    Lost,
}

/// What is behind the epoll descriptor.
const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const LISTENER: u64 = 2;
const WINDOW: u64 = 3;

/// A host's end as its device and the monitor share it: it outlives the device at a reboot.
pub type SharedHostConsole = Arc<Mutex<HostConsole>>;

/// The host's end of a console. One descriptor ([`HostConsole::fd`]) is readable when anything can be done.
pub struct HostConsole {
    /// None when there is nothing to watch.
    epoll: Option<Epoll>,
    peer: Peer,
    sink: Sink,
    source: Option<Input>,
    waiting_output: VecDeque<u8>,
    waiting_input: VecDeque<u8>,
    dropped: u64,
    window: Option<Window>,
}

/// A terminal's window.
struct Window {
    columns: u16,
    rows: u16,
    changed: EventFd,
}

impl HostSide {
    /// Output to `output`, and no input.
    #[must_use]
    pub fn output(output: HostOutput) -> Self {
        Self::Streams { output, input: None }
    }
}

impl HostConsole {
    /// The host's end that `side` describes.
    ///
    /// # Errors
    /// When a descriptor can neither be made non-blocking nor watched, or there are no descriptors left.
    pub fn new(side: HostSide) -> io::Result<Self> {
        let mut this = Self {
            epoll: None,
            peer: Peer::Fixed,
            sink: Sink::Discard,
            source: None,
            waiting_output: VecDeque::new(),
            waiting_input: VecDeque::new(),
            dropped: 0,
            window: None,
        };
        match side {
            HostSide::Streams { output, input } => this.open_streams(output, input)?,
            HostSide::Pty(pty) => this.open_pty(File::from(pty.master))?,
            HostSide::Socket(listener) => {
                let epoll = Epoll::new()?;
                let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
                epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
                this.epoll = Some(epoll);
                this.sink = Sink::Nobody;
                this.peer = Peer::Socket(listener);
            }
        }
        this.read();
        Ok(this)
    }

    /// As [`HostConsole::new`], for a device and its monitor.
    ///
    /// # Errors
    /// As [`HostConsole::new`].
    pub fn shared(side: HostSide) -> io::Result<SharedHostConsole> {
        Ok(Arc::new(Mutex::new(Self::new(side)?)))
    }

    fn open_streams(&mut self, output: HostOutput, input: Option<OwnedFd>) -> io::Result<()> {
        if input.is_none() && matches!(output, HostOutput::Discard) {
            return Ok(());
        }
        let epoll = Epoll::new()?;
        let mut needed = false;
        match output {
            HostOutput::Discard => {}
            HostOutput::Writer(writer) => self.sink = Sink::Writer(writer),
            HostOutput::Fd(fd) => {
                let descriptor = Descriptor::new(fd, true)?;
                needed |= fd::watchable(&epoll, &descriptor.file)?;
                self.sink = Sink::Fd(Output {
                    descriptor,
                    watched: false,
                });
            }
        }
        if let Some(input) = input {
            let descriptor = Descriptor::new(input, false)?;
            let watched = fd::watchable(&epoll, &descriptor.file)?;
            needed |= watched;
            self.source = Some(Input::new(descriptor, watched.then_some(&epoll))?);
        }
        self.epoll = needed.then_some(epoll);
        Ok(())
    }

    fn open_pty(&mut self, master: File) -> io::Result<()> {
        let (epoll, state) = (Epoll::new()?, Epoll::new()?);
        let event = EpollEvent::new(EventSet::OUT, 0);
        state.ctl(ControlOperation::Add, master.as_raw_fd(), event)?;
        self.source = Some(Input::new(Descriptor::own(master.try_clone()?), Some(&epoll))?);
        self.sink = Sink::Fd(Output {
            descriptor: Descriptor::own(master),
            watched: false,
        });
        self.peer = Peer::Pty(state);
        self.epoll = Some(epoll);
        Ok(())
    }

    /// Readable when there is something to do: then call [`HostConsole::on_ready`]. None for an end that never has.
    #[must_use]
    pub fn fd(&self) -> Option<RawFd> {
        self.epoll.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Columns and rows of the terminal, if it is one that has a window.
    #[must_use]
    pub fn window(&self) -> Option<(u16, u16)> {
        self.window.as_ref().map(|window| (window.columns, window.rows))
    }

    /// Tells how large the terminal's window is. A device that was made before the first time does not hear of it.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn set_window(&mut self, columns: u16, rows: u16) -> io::Result<()> {
        if let Some(window) = &mut self.window {
            (window.columns, window.rows) = (columns, rows);
            // Full: it is readable already.
            let _ = window.changed.write(1);
            return Ok(());
        }
        let changed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = match self.epoll.take() {
            Some(epoll) => epoll,
            None => Epoll::new()?,
        };
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, WINDOW);
        let watched = epoll.ctl(ControlOperation::Add, changed.as_raw_fd(), event);
        self.epoll = Some(epoll);
        watched?;
        self.window = Some(Window { columns, rows, changed });
        Ok(())
    }

    /// Bytes that were taken from the guest and dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Takes note of what became ready: clients, input, room for output.
    pub fn on_ready(&mut self) {
        let Some(epoll) = &self.epoll else { return };
        let mut events = [EpollEvent::default(); 4];
        // On error (a signal) the set stays ready, and the event loop comes again.
        let count = epoll.wait(0, &mut events).unwrap_or(0);
        let mut clients = false;
        for event in events.iter().take(count) {
            match (event.data(), &mut self.source) {
                (LISTENER, _) => clients = true,
                (INPUT, Some(source)) => {
                    source.ready = true;
                    source.hung_up |= event.event_set().contains(EventSet::HANG_UP);
                }
                _ => {}
            }
        }
        self.read();
        self.send();
        if clients {
            // Last: what was reported is the client's that was there.
            self.accept();
        }
    }

    /// Bytes for the guest. Whoever takes some calls [`HostConsole::input_taken`] then.
    pub fn input(&mut self) -> &mut VecDeque<u8> {
        &mut self.waiting_input
    }

    /// Makes use of the room for input that waits at the host.
    pub fn input_taken(&mut self) {
        self.read();
    }

    /// Takes `bytes` from the guest; [`HostConsole::send`] sends them.
    pub fn take(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        loop {
            let room = MAX_OUTPUT.saturating_sub(self.waiting_output.len()).min(rest.len());
            let (now, later) = rest.split_at_checked(room).unwrap_or((rest, &[]));
            self.waiting_output.extend(now);
            rest = later;
            if rest.is_empty() {
                return;
            }
            self.send();
            if self.waiting_output.len() >= MAX_OUTPUT {
                self.lose(rest.len());
                return;
            }
        }
    }

    /// Sends what waits, as far as the reader takes it now.
    pub fn send(&mut self) {
        while !self.waiting_output.is_empty() {
            match self.write_some() {
                Written::Bytes(sent) => drop(self.waiting_output.drain(..sent.min(self.waiting_output.len()))),
                Written::Full => break,
                Written::Lost => {
                    self.lose(self.waiting_output.len());
                    self.waiting_output.clear();
                    if matches!(self.peer, Peer::Socket(_)) {
                        self.hang_up();
                    }
                }
            }
        }
        self.watch_output();
    }

    /// Counts `bytes` of the guest's as dropped.
    pub(crate) fn lose(&mut self, bytes: usize) {
        self.dropped = self.dropped.saturating_add(bytes as u64);
    }

    fn write_some(&mut self) -> Written {
        let (bytes, _) = self.waiting_output.as_slices();
        let writer: &mut dyn Write = match &mut self.sink {
            Sink::Discard => return Written::Bytes(bytes.len()),
            Sink::Nobody => return Written::Lost,
            Sink::Writer(writer) => writer,
            Sink::Fd(output) => &mut output.descriptor.file,
        };
        if let Peer::Pty(state) = &self.peer {
            let mut events = [EpollEvent::default()];
            match state.wait(0, &mut events) {
                Ok(0) => return Written::Full,
                Ok(_) if events.iter().any(|e| e.event_set().contains(EventSet::HANG_UP)) => return Written::Lost,
                Ok(_) | Err(_) => {}
            }
        }
        loop {
            return match writer.write(bytes) {
                Ok(0) => Written::Lost,
                Ok(sent) => Written::Bytes(sent),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Written::Full,
                Err(_) => Written::Lost,
            };
        }
    }

    /// Watches the output while something waits for it, so that the event loop sleeps when nothing can be done.
    fn watch_output(&mut self) {
        let (Sink::Fd(output), Some(epoll)) = (&mut self.sink, &self.epoll) else {
            return;
        };
        let wanted = !self.waiting_output.is_empty();
        if wanted == output.watched {
            return;
        }
        let operation = if wanted {
            ControlOperation::Add
        } else {
            ControlOperation::Delete
        };
        let event = EpollEvent::new(EventSet::OUT, OUTPUT);
        match epoll.ctl(operation, output.descriptor.file.as_raw_fd(), event) {
            Ok(()) => output.watched = wanted,
            // What waits goes with the next byte.
            Err(error) => tracing::debug!(%error, wanted, "watching a console's output"),
        }
    }

    /// Reads what there is room for.
    fn read(&mut self) {
        if !self.source.as_ref().is_some_and(|source| source.ready) {
            return;
        }
        let mut bytes = [0; MAX_INPUT];
        while let Some(source) = self.source.as_mut().filter(|source| source.ready) {
            let room = MAX_INPUT.saturating_sub(self.waiting_input.len());
            let Some(place) = bytes.get_mut(..room).filter(|place| !place.is_empty()) else {
                return;
            };
            match source.descriptor.file.read(place) {
                Ok(got) if got > 0 => self.waiting_input.extend(bytes.iter().take(got)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => source.ready = false,
                Ok(_) | Err(_) => self.input_ended(),
            }
        }
    }

    /// The input has ended, for good or until the next client. The console goes on.
    fn input_ended(&mut self) {
        let Some(source) = &mut self.source else { return };
        source.ready = false;
        match &self.peer {
            Peer::Fixed => self.unwatch_input(),
            // Nobody has the slave open: the next who does will be heard.
            Peer::Pty(_) => {}
            Peer::Socket(_) if source.hung_up => self.hang_up(),
            // A client that only reads.
            Peer::Socket(_) => {}
        }
    }

    fn unwatch_input(&mut self) {
        if let Some(source) = self.source.take()
            && source.watched
            && let Some(epoll) = &self.epoll
            && let Err(error) = epoll.ctl(
                ControlOperation::Delete,
                source.descriptor.file.as_raw_fd(),
                EpollEvent::default(),
            )
        {
            tracing::warn!(%error, "a console's input");
        }
    }

    /// The client is gone, and what waited for it.
    fn hang_up(&mut self) {
        self.unwatch_input();
        self.lose(self.waiting_output.len());
        self.waiting_output.clear();
        self.watch_output();
        self.sink = Sink::Nobody;
    }

    /// Takes the clients that wait: the last of them stays.
    fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            let Peer::Socket(listener) = &self.peer else { return };
            let accepted = match listener.accept() {
                Ok(stream) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => continue,
                Err(error) => {
                    // It waits in the backlog until somebody else comes: without a descriptor nothing can be done for it.
                    tracing::warn!(%error, "a console's client");
                    return;
                }
            };
            self.hang_up();
            if let Err(error) = accepted
                .set_nonblocking(true)
                .and_then(|()| self.serve(accepted.into()))
            {
                tracing::warn!(%error, "a console's client");
                self.hang_up();
            }
        }
        // More may wait: watched anew, they are reported anew.
        if let (Peer::Socket(listener), Some(epoll)) = (&self.peer, &self.epoll) {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
            if let Err(error) = epoll.ctl(ControlOperation::Modify, listener.as_raw_fd(), event) {
                tracing::warn!(%error, "a console's socket");
            }
        }
    }

    fn serve(&mut self, client: OwnedFd) -> io::Result<()> {
        let client = File::from(client);
        let input = Descriptor::own(client.try_clone()?);
        self.sink = Sink::Fd(Output {
            descriptor: Descriptor::own(client),
            watched: false,
        });
        self.source = Some(Input::new(input, self.epoll.as_ref())?);
        self.read();
        Ok(())
    }
}

impl Input {
    /// Input from `descriptor`, told by `epoll`; without one it is always ready.
    fn new(descriptor: Descriptor, epoll: Option<&Epoll>) -> io::Result<Self> {
        if let Some(epoll) = epoll {
            // Edges: a hung-up descriptor reports that once.
            let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            let fd = descriptor.file.as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, INPUT))?;
        }
        Ok(Self {
            descriptor,
            watched: epoll.is_some(),
            ready: true,
            hung_up: false,
        })
    }
}

impl Drop for HostConsole {
    fn drop(&mut self) {
        self.send();
    }
}

/// A host's end on an event loop, for a device that has nothing to do when it becomes ready.
pub struct HostConsoleSubscriber(pub SharedHostConsole);

impl MutEventSubscriber for HostConsoleSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        if let Some(fd) = lock(&self.0).fd()
            && let Err(error) = ops.add(Events::new_raw(fd, Wakes::IN))
        {
            tracing::error!(?error, "a console cannot be watched");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        lock(&self.0).on_ready();
    }
}
