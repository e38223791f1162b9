//! The few system calls of the HTTP server that std has no safe form of: receiving descriptors, the lock of the socket's
//! path, the mode of a new socket.
#![expect(
    unsafe_code,
    reason = "recvmsg with descriptors, fcntl, flock and umask have no safe form in std 1.88"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Descriptors that one message can carry (Linux `SCM_MAX_FD`).
pub(super) const MAX_FDS: usize = 253;

/// Receives bytes into `buffer` and descriptors, which become close-on-exec.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iovec = [libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }];
    let mut raw: [RawFd; MAX_FDS] = [-1; MAX_FDS];
    // SAFETY: the one iovec spans `buffer`, which is borrowed mutably for the whole call.
    let received = unsafe { stream.recv_with_fds(&mut iovec, &mut raw) };
    let (bytes, count) = received.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // SAFETY: the kernel has just installed these descriptors for this process; nothing else knows their numbers.
    let files: Vec<OwnedFd> = raw
        .iter()
        .take(count)
        .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) })
        .collect();
    for file in &files {
        // SAFETY: fcntl on an owned descriptor touches no memory.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok((bytes, files))
}

/// Tries to take the exclusive lock of a file; false if another open file has it.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock on an owned descriptor touches no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        Ok(false)
    } else {
        Err(error)
    }
}

/// Binds a socket that only its owner may connect to, from the first moment.
pub(super) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: umask touches no memory and cannot fail. It is the process's, not the thread's: a file that another thread
    // makes meanwhile is at most more private than it would have been.
    let before = unsafe { libc::umask(0o177) };
    let bound = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    bound
}
