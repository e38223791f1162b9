//! Sockets that a device listens on: private from their first moment, at a path that a dead process may have left
//! occupied, and gone from there when their owner goes. Who connects, and what for, is the device's business.

pub(crate) mod sys;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket and its file, which goes with it.
#[derive(Debug)]
pub struct PrivateListener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: only that one is removed.
    file: (u64, u64),
}

impl PrivateListener {
    /// Listens on `path` with mode 0600, without blocking. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// When another process listens there, something that is no socket is there, or the system refuses.
    pub fn bind(path: &Path) -> io::Result<Self> {
        remove_stale(path)?;
        let socket = sys::listen_private(path)?;
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            file: (meta.dev(), meta.ino()),
        })
    }

    /// The next client, non-blocking as the listener is; its stream is not.
    ///
    /// # Errors
    /// `WouldBlock` when nobody waits; else as accept(2).
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsRawFd for PrivateListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for PrivateListener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a socket stays behind");
        }
    }
}

/// Removes the socket file that a dead process left at `path`.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is not a socket is there; remove it or give another path",
            ));
        }
        Ok(_) => {}
    }
    match sys::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens there; stop it or give another path",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_goes_with_its_owner_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = PrivateListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = PrivateListener::bind(&path).unwrap_err();
        assert!(error.to_string().contains("another process listens"), "{error}");
        // Somebody else's file at the path is left alone.
        std::fs::remove_file(&path).unwrap();
        let second = PrivateListener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_left_over_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = PrivateListener::bind(&path).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener);
        std::fs::write(&path, "mine").unwrap();
        assert!(PrivateListener::bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
