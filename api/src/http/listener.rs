//! The listening socket: one monitor per path, for as long as it lives, and no socket left over that blocks the next.

use super::sys;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another monitor has it.
    #[error("{path} is in use by another monitor; stop that one or give another path with --api-socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{path} exists and is no socket; remove it or give another path with --api-socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{what} {path}")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BindError {
    let path = path.to_owned();
    move |source| BindError::System { what, path, source }
}

/// A file's identity, to remove only what one has made.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// The listening socket and, when it was bound here, its path and lock.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    bound: Option<Bound>,
}

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    made: Option<(u64, u64)>,
    lock_path: PathBuf,
    _lock: File,
}

impl Drop for Bound {
    fn drop(&mut self) {
        // The socket first: while the lock is held, nobody else can have put another one there.
        if self.made.is_some() && identity(&self.path) == self.made {
            let _ = fs::remove_file(&self.path);
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

impl Listener {
    /// Takes `<path>.lock`, replaces a socket that nobody listens on, and listens.
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = take_lock(path, &lock_path)?;
        let mut bound = Bound {
            path: path.to_owned(),
            made: None,
            lock_path,
            _lock: lock,
        };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system("cannot look at", path)(error)),
            Ok(there) if !there.file_type().is_socket() => return Err(BindError::NotASocket { path: path.to_owned() }),
            // A monitor that takes no lock may listen there.
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(BindError::InUse { path: path.to_owned() }),
            Ok(_) => fs::remove_file(path).map_err(system("cannot remove the left-over socket", path))?,
        }
        let socket = sys::bind_private(path).map_err(system("cannot listen on", path))?;
        bound.made = identity(path);
        socket
            .set_nonblocking(true)
            .map_err(system("cannot listen without blocking on", path))?;
        Ok(Self {
            socket,
            bound: Some(bound),
        })
    }

    /// Takes over a listening socket that somebody else has made.
    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let socket = UnixListener::from(fd);
        socket.local_addr()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, bound: None })
    }

    pub(super) fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }
}

fn take_lock(path: &Path, lock_path: &Path) -> Result<File, BindError> {
    loop {
        let mut options = OpenOptions::new();
        // No symbolic link is followed: the directory may be another user's.
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW);
        let lock = options
            .open(lock_path)
            .map_err(system("cannot open the lock", lock_path))?;
        if !sys::try_lock(&lock).map_err(system("cannot lock", lock_path))? {
            return Err(BindError::InUse { path: path.to_owned() });
        }
        // The last owner may have removed the file between our open and our lock; then the lock is on nothing.
        let held = lock.metadata().map_err(system("cannot look at", lock_path))?;
        if identity(lock_path) == Some((held.dev(), held.ino())) {
            return Ok(lock);
        }
    }
}
