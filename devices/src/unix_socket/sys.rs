//! The socket calls that the standard library has no safe form of: sockets that are private before they are reachable,
//! and connects that do not wait.
#![expect(
    unsafe_code,
    reason = "raw socket calls, each wrapped in a function with a safe signature"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Connections that may wait in the backlog (the kernel takes less where somaxconn is lower).
const BACKLOG: libc::c_int = 4096;
#[expect(clippy::cast_possible_truncation, reason = "a constant: 1")]
const AF_UNIX: libc::sa_family_t = libc::AF_UNIX as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "a constant: 110")]
const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: `fd` was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The socket address of `path` and its length.
fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    // One byte stays for the final NUL.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a socket path has 1 to {} bytes, this has {}",
                address.sun_path.len() - 1,
                bytes.len()
            ),
        ));
    }
    address.sun_family = AF_UNIX;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((address, ADDRESS_LEN))
}

/// Listens on `path` with mode 0600 from the first moment, without blocking.
pub(crate) fn listen_private(path: &Path) -> io::Result<UnixListener> {
    let fd = socket()?;
    let (address, len) = address(path)?;
    // The mode of an unbound socket's inode is the mode that bind gives the file (Linux, net/unix/af_unix.c).
    // SAFETY: the descriptor is open; no pointers.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), 0o600) })?;
    // SAFETY: `address` is a sockaddr_un of `len` bytes that outlives the call.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: the descriptor is open; no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
    Ok(UnixListener::from(fd))
}

/// Connects to `path` at once or fails (`WouldBlock` when the listener's backlog is full).
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let fd = socket()?;
    let (address, len) = address(path)?;
    // SAFETY: `address` is a sockaddr_un of `len` bytes that outlives the call.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(UnixStream::from(fd))
}
