//! Making a pseudo-terminal.
#![expect(
    unsafe_code,
    reason = "the terminal calls that the standard library has no name for, one block each"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A pseudo-terminal in raw mode, whose slave nobody has open.
#[derive(Debug)]
pub struct Pty {
    pub(super) master: OwnedFd,
    path: PathBuf,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Pty {
    /// Makes one (pts(4)).
    ///
    /// # Errors
    /// When /dev/ptmx cannot be opened, or there are no more pseudo-terminals.
    pub fn open() -> io::Result<Self> {
        let master = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/ptmx")?;
        let fd = master.as_raw_fd();
        let unlock: libc::c_int = 0;
        // SAFETY: TIOCSPTLCK reads an int.
        check(unsafe { libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlock) })?;
        let mut number: libc::c_uint = 0;
        // SAFETY: TIOCGPTN writes an unsigned int.
        check(unsafe { libc::ioctl(fd, libc::TIOCGPTN, &raw mut number) })?;
        // SAFETY: TIOCGPTPEER takes flags and gives a descriptor.
        let slave =
            check(unsafe { libc::ioctl(fd, libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) })?;
        // SAFETY: the kernel has just given us this descriptor and nobody else holds it.
        let slave = unsafe { File::from_raw_fd(slave) };
        RawMode::set(slave.as_raw_fd())?;
        // Open once and closed: from now on the master says whether somebody has it open.
        Ok(Self {
            master: master.into(),
            path: PathBuf::from(format!("/dev/pts/{number}")),
        })
    }

    /// Where its slave is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The settings that a terminal had before it was set to raw mode.
pub struct RawMode(libc::termios);

impl RawMode {
    /// Sets terminal `fd` to raw mode: bytes pass as they are, none has a meaning (cfmakeraw(3)).
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn set(fd: RawFd) -> io::Result<Self> {
        let mut settings = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: the pointer is to a live structure of the right type.
        check(unsafe { libc::tcgetattr(fd, settings.as_mut_ptr()) })?;
        // SAFETY: all-zero bytes are a valid termios, and the call filled it.
        let before = unsafe { settings.assume_init() };
        let mut raw = before;
        // SAFETY: a live structure.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // SAFETY: as above; the call reads it.
        check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) })?;
        Ok(Self(before))
    }

    /// Sets terminal `fd` to what it was.
    ///
    /// # Errors
    /// When it is no terminal any more.
    pub fn undo(self, fd: RawFd) -> io::Result<()> {
        // SAFETY: the call reads a live structure.
        check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const self.0) })?;
        Ok(())
    }
}
