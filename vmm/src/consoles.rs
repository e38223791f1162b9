//! The host's ends of a pod's serial port, virtio console and debug port, as their sections of the configuration have
//! them. They are made when the pod is created and go when it is deleted: a reboot changes neither a pseudo-terminal nor
//! a client, and empties no file.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use podvisor_api::types::{ConsoleMode, VmConfig};
use podvisor_devices::host_console::{HostConsole, HostOutput, HostSide, Pty, RawMode, SharedHostConsole};
use podvisor_devices::unix_socket::PrivateListener;

use crate::sys;

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{field}")]
pub struct ConsoleError {
    /// The configuration field, with its value.
    field: String,
    source: io::Error,
}

/// The host's ends of a pod's consoles; none for one that is off.
#[derive(Default)]
pub struct Consoles {
    /// The serial port's.
    pub serial: Option<SharedHostConsole>,
    /// The virtio console's.
    pub console: Option<SharedHostConsole>,
    /// The debug port's, and its port.
    pub debug: Option<(u16, SharedHostConsole)>,
    _terminal: Option<RawTerminal>,
    /// The virtio console is on the monitor's terminal.
    windowed: bool,
}

/// One console's section of the configuration.
struct Section<'c> {
    name: &'static str,
    mode: ConsoleMode,
    file: &'c mut Option<PathBuf>,
    socket: Option<&'c Path>,
    /// Whether standard input is its.
    reads: bool,
}

impl Consoles {
    /// Makes those that `config` asks for. The paths of pseudo-terminals are put into it, as Cloud Hypervisor does.
    ///
    /// # Errors
    /// When a file, socket, pseudo-terminal or descriptor cannot be had; nothing is left then, but a file may be empty.
    pub fn open(config: &mut VmConfig) -> Result<Self, ConsoleError> {
        let tty = ConsoleMode::Tty;
        let (serial, console, debug) = (&mut config.serial, &mut config.console, &mut config.debug_console);
        // There is one standard input: it is the serial port's if both ask.
        let console_reads = serial.mode != tty;
        let reads = serial.mode == tty || console.mode == tty;
        let mut sections = [
            Section {
                name: "serial",
                mode: serial.mode,
                file: &mut serial.file,
                socket: serial.socket.as_deref(),
                reads: true,
            },
            Section {
                name: "console",
                mode: console.mode,
                file: &mut console.file,
                socket: console.socket.as_deref(),
                reads: console_reads,
            },
            Section {
                name: "debug_console",
                mode: debug.mode,
                file: &mut debug.file,
                socket: None,
                reads: false,
            },
        ];
        let mut paths = [None, None, None];
        let mut ends = [None, None, None];
        for ((section, path), end) in sections.iter_mut().zip(&mut paths).zip(&mut ends) {
            *end = section.open(path)?;
        }
        // All are there: now their paths are true.
        for (section, path) in sections.into_iter().zip(paths) {
            if path.is_some() {
                *section.file = path;
            }
        }
        let [serial_end, console_end, debug_end] = ends;
        let mut this = Self {
            serial: serial_end,
            console: console_end,
            debug: debug_end.map(|end| (debug.iobase.unwrap_or(DEBUG_PORT), end)),
            _terminal: reads.then(RawTerminal::take).flatten(),
            windowed: console.mode == tty && sys::window_size(io::stdout().as_raw_fd()).is_some(),
        };
        this.window_changed();
        Ok(this)
    }

    /// Tells the virtio console how large the monitor's terminal is now, if it is there.
    pub fn window_changed(&mut self) {
        if self.windowed
            && let (Some(host), Some((columns, rows))) = (&self.console, sys::window_size(io::stdout().as_raw_fd()))
        {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = host.set_window(columns, rows) {
                tracing::warn!(%error, "the guest is not told the terminal's size");
                self.windowed = false;
            }
        }
    }
}

/// Where the debug port is, unless the configuration says.
const DEBUG_PORT: u16 = 0xE9;

impl Section<'_> {
    /// Its host's end; a pseudo-terminal's path goes into `path`.
    fn open(&self, path: &mut Option<PathBuf>) -> Result<Option<SharedHostConsole>, ConsoleError> {
        let fail = |text: String| move |source| ConsoleError { field: text, source };
        let named = |field: &str, value: Option<&Path>| {
            let value = value.map(|path| format!(" {}", path.display())).unwrap_or_default();
            format!("{}.{field}{value}", self.name)
        };
        let mode = format!("{}.mode {:?}", self.name, self.mode);
        let side = match self.mode {
            ConsoleMode::Off => return Ok(None),
            ConsoleMode::Null => HostSide::output(HostOutput::Discard),
            ConsoleMode::Tty => standard_streams(self.reads).map_err(fail(mode.clone()))?,
            ConsoleMode::File => {
                let file = self.file.as_deref();
                HostSide::output(open_file(file).map_err(fail(named("file", file)))?)
            }
            ConsoleMode::Pty => {
                let pty = Pty::open().map_err(fail(mode.clone()))?;
                *path = Some(pty.path().to_owned());
                HostSide::Pty(pty)
            }
            ConsoleMode::Socket => {
                let field = named("socket", self.socket);
                let socket = self
                    .socket
                    .ok_or_else(|| missing("mode Socket needs the socket's path"));
                HostSide::Socket(socket.and_then(PrivateListener::bind).map_err(fail(field))?)
            }
        };
        HostConsole::shared(side).map(Some).map_err(fail(mode))
    }
}

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn standard_streams(reads: bool) -> io::Result<HostSide> {
    // A monitor in the background goes on when it reads from the terminal or writes to it.
    sys::ignore_job_control();
    let input = reads.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()?;
    Ok(HostSide::Streams {
        output: HostOutput::Fd(io::stdout().as_fd().try_clone_to_owned()?),
        input,
    })
}

/// Opens a console's output file, emptied; made if it is not there. A FIFO that nobody reads yet is opened too.
fn open_file(path: Option<&Path>) -> io::Result<HostOutput> {
    let path = path.ok_or_else(|| missing("mode File needs the file's path"))?;
    let open = |read: bool| -> io::Result<File> {
        OpenOptions::new()
            .read(read)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
    };
    let file = open(true).or_else(|error| match error.kind() {
        // A file that may only be written.
        io::ErrorKind::PermissionDenied => open(false),
        _ => Err(error),
    })?;
    Ok(HostOutput::Fd(file.into()))
}

/// The monitor's terminal in raw mode, until this is dropped.
struct RawTerminal(Option<RawMode>);

impl RawTerminal {
    /// Sets standard input to raw mode if it is a terminal and this process is in its foreground.
    fn take() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || !sys::in_foreground(stdin.as_raw_fd()) {
            return None;
        }
        match RawMode::set(stdin.as_raw_fd()) {
            Ok(mode) => Some(Self(Some(mode))),
            Err(error) => {
                tracing::warn!(%error, "the terminal stays in line mode");
                None
            }
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(mode) = self.0.take()
            && let Err(error) = mode.undo(io::stdin().as_raw_fd())
        {
            tracing::debug!(%error, "the terminal is gone");
        }
    }
}
