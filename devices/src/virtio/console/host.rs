//! The host's end of a console: descriptors that never make the event loop wait, and bounded buffers before them.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// The most bytes of output that wait for a slow reader; what comes then is dropped and counted.
pub(super) const MAX_OUTPUT: usize = 64 << 10;
/// The most bytes of input that wait for the driver; the rest waits in the host's pipe or terminal.
pub(super) const MAX_INPUT: usize = 4 << 10;
/// `st_rdev` of /dev/ptmx: opening it again would make another pseudo-terminal.
const PTMX: u64 = libc::makedev(5, 2);

/// Makes a descriptor that never waits out of `fd`. Pipes and terminals are often shared with other processes, so
/// they are opened anew rather than switched; sockets and the like are switched to non-blocking; regular files stay
/// as they are, with their offset.
///
/// # Errors
/// When `fd` can neither be opened anew nor switched.
pub fn nonblocking(fd: OwnedFd, write: bool) -> io::Result<File> {
    let file = File::from(fd);
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    if kind.is_fifo() || (kind.is_char_device() && metadata.rdev() != PTMX) {
        let again = OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        if let Ok(again) = again {
            return Ok(again);
        }
    }
    // FIONBIO, which works on any descriptor.
    let socket = UnixStream::from(OwnedFd::from(file));
    socket.set_nonblocking(true)?;
    Ok(File::from(OwnedFd::from(socket)))
}

/// Where a console's output goes.
pub enum ConsoleOutput {
    /// A descriptor; see [`nonblocking`].
    Fd(OwnedFd),
    /// A writer of the monitor's own; one that waits makes the event loop wait.
    Writer(Box<dyn Write + Send>),
    /// Nowhere.
    Discard,
}

/// What is behind the epoll descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Again,
    Input,
    Output,
}

/// A descriptor in the epoll set, added and removed as it matters.
struct Watched {
    file: File,
    source: Source,
    watched: bool,
    /// It cannot be watched (a regular file, /dev/null): it is always ready.
    always_ready: bool,
}

impl Watched {
    fn new(file: File, source: Source) -> Self {
        Self {
            file,
            source,
            watched: false,
            always_ready: false,
        }
    }

    /// Watches the descriptor, or not.
    fn watch(&mut self, epoll: &Epoll, wanted: bool) {
        if wanted == self.watched || self.always_ready {
            return;
        }
        let events = match self.source {
            Source::Output => EventSet::OUT,
            Source::Input | Source::Again => EventSet::IN,
        };
        let operation = if wanted {
            ControlOperation::Add
        } else {
            ControlOperation::Delete
        };
        match epoll.ctl(
            operation,
            self.file.as_raw_fd(),
            EpollEvent::new(events, self.source as u64),
        ) {
            Ok(()) => self.watched = wanted,
            Err(_) if wanted => self.always_ready = true,
            Err(_) => self.watched = false,
        }
    }
}

/// The host's end. One descriptor ([`HostEnd::fd`]) is readable when anything can be done.
pub(super) struct HostEnd {
    epoll: Epoll,
    again: EventFd,
    output: Option<Watched>,
    writer: Option<Box<dyn Write + Send>>,
    input: Option<Watched>,
    waiting_output: VecDeque<u8>,
    waiting_input: VecDeque<u8>,
    /// Bytes that were taken from the driver and dropped.
    pub(super) dropped: u64,
}

impl HostEnd {
    pub(super) fn new(output: ConsoleOutput, input: Option<OwnedFd>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let again = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let event = EpollEvent::new(EventSet::IN, Source::Again as u64);
        epoll.ctl(ControlOperation::Add, again.as_raw_fd(), event)?;
        let (output, writer) = match output {
            ConsoleOutput::Fd(fd) => (Some(Watched::new(nonblocking(fd, true)?, Source::Output)), None),
            ConsoleOutput::Writer(writer) => (None, Some(writer)),
            ConsoleOutput::Discard => (None, None),
        };
        let input = match input {
            Some(fd) => Some(Watched::new(nonblocking(fd, false)?, Source::Input)),
            None => None,
        };
        let mut host = Self {
            epoll,
            again,
            output,
            writer,
            input,
            waiting_output: VecDeque::new(),
            waiting_input: VecDeque::new(),
            dropped: 0,
        };
        host.watch();
        Ok(host)
    }

    /// Readable when there is something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes note of what became ready: reads input and sends output.
    pub(super) fn on_ready(&mut self) {
        let mut events = [EpollEvent::default(); 3];
        // On error (a signal) the set stays ready, and the event loop comes again.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            match event.data() {
                data if data == Source::Again as u64 => {
                    let _ = self.again.read();
                }
                data if data == Source::Input as u64 => self.read_input(),
                _ => {}
            }
        }
        if self.input.as_ref().is_some_and(|input| input.always_ready) {
            self.read_input();
        }
        self.send();
        self.watch();
    }

    /// Asks for another turn.
    pub(super) fn come_again(&self) {
        // Full: it is readable already.
        let _ = self.again.write(1);
    }

    /// Bytes for the driver.
    pub(super) fn input(&mut self) -> &mut VecDeque<u8> {
        &mut self.waiting_input
    }

    /// Makes room for input that waits at the host.
    pub(super) fn input_taken(&mut self) {
        let ready = self.input.as_ref().is_some_and(|input| input.always_ready);
        if ready && self.waiting_input.len() < MAX_INPUT {
            self.come_again();
        }
        self.watch();
    }

    /// Takes `bytes` from the driver.
    pub(super) fn take(&mut self, bytes: &[u8]) {
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
                self.dropped = self.dropped.saturating_add(rest.len() as u64);
                return;
            }
        }
    }

    /// Sends what waits, as far as the reader takes it now.
    pub(super) fn send(&mut self) {
        while !self.waiting_output.is_empty() {
            let (bytes, _) = self.waiting_output.as_slices();
            let result = match (&mut self.output, &mut self.writer) {
                (Some(output), _) => output.file.write(bytes),
                (None, Some(writer)) => writer.write(bytes),
                (None, None) => Ok(bytes.len()),
            };
            match result {
                Ok(0) => break,
                Ok(sent) => {
                    self.waiting_output.drain(..sent.min(self.waiting_output.len()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads, or the disk is full: this output is lost, later output is tried again.
                Err(_) => {
                    self.dropped = self.dropped.saturating_add(self.waiting_output.len() as u64);
                    self.waiting_output.clear();
                }
            }
        }
        if let Some(writer) = &mut self.writer {
            // What it could not pass on, it has counted or kept.
            let _ = writer.flush();
        }
    }

    /// Watches what can make progress, nothing else, so that the event loop sleeps when nothing can.
    pub(super) fn watch(&mut self) {
        let (more, room) = (!self.waiting_output.is_empty(), self.waiting_input.len() < MAX_INPUT);
        if let Some(output) = &mut self.output {
            output.watch(&self.epoll, more);
        }
        if let Some(input) = &mut self.input {
            input.watch(&self.epoll, room);
        }
    }

    /// Reads once, as much as there is room for. The end of the input, or an error, closes it: the console goes on.
    fn read_input(&mut self) {
        let Some(input) = &mut self.input else {
            return;
        };
        let mut bytes = [0; MAX_INPUT];
        let room = MAX_INPUT.saturating_sub(self.waiting_input.len());
        let Some(place) = bytes.get_mut(..room).filter(|place| !place.is_empty()) else {
            return;
        };
        match input.file.read(place) {
            Ok(got) if got > 0 => self.waiting_input.extend(bytes.iter().take(got)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(_) | Err(_) => {
                input.watch(&self.epoll, false);
                self.input = None;
            }
        }
    }
}
