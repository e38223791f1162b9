//! Descriptors as a console uses them: never waiting, and watched only while that says something.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// `st_rdev` of /dev/ptmx: opening it again would make another pseudo-terminal.
const PTMX: u64 = libc::makedev(5, 2);

/// A descriptor that never waits.
pub(super) struct Descriptor {
    pub(super) file: File,
    /// It is shared with other processes, was made non-blocking for all of them, and is a terminal.
    borrowed: bool,
}

impl Descriptor {
    /// Makes one out of `fd`. Pipes and terminals are often shared with other processes, so they are opened anew rather
    /// than switched; what cannot be opened anew is switched, a terminal until the descriptor is dropped. Regular files
    /// stay as they are, with their offset.
    pub(super) fn new(fd: OwnedFd, write: bool) -> io::Result<Self> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if kind.is_file() || kind.is_block_device() {
            return Ok(Self::own(file));
        }
        if kind.is_fifo() || (kind.is_char_device() && metadata.rdev() != PTMX) {
            let again = OpenOptions::new()
                .read(!write)
                .write(write)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
            if let Ok(again) = again {
                return Ok(Self::own(again));
            }
        }
        Ok(Self {
            file: set_nonblocking(file, true)?,
            borrowed: kind.is_char_device(),
        })
    }

    /// One of our own, which does not wait.
    pub(super) fn own(file: File) -> Self {
        Self { file, borrowed: false }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.borrowed
            && let Ok(file) = self.file.try_clone()
        {
            // As it was found; if not, whoever reads it next copes or not as with any other program.
            let _ = set_nonblocking(file, false);
        }
    }
}

/// FIONBIO, which works on any descriptor.
fn set_nonblocking(file: File, on: bool) -> io::Result<File> {
    let socket = UnixStream::from(OwnedFd::from(file));
    socket.set_nonblocking(on)?;
    Ok(File::from(OwnedFd::from(socket)))
}

/// Whether `file` can be watched; what cannot (a regular file, /dev/null) is always ready.
pub(super) fn watchable(epoll: &Epoll, file: &File) -> io::Result<bool> {
    let (fd, event) = (file.as_raw_fd(), EpollEvent::new(EventSet::empty(), 0));
    match epoll.ctl(ControlOperation::Add, fd, event) {
        Ok(()) => epoll.ctl(ControlOperation::Delete, fd, event).map(|()| true),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        Err(e) => Err(e),
    }
}
