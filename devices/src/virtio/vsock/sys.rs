//! The socket calls that the standard library has no safe form of: reads that leave the bytes there, and transfers
//! between sockets and guest memory.
#![expect(
    unsafe_code,
    reason = "raw socket calls, each wrapped in a function with a safe signature"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

fn checked_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads into `buffer` without taking the bytes off the stream.
pub(super) fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` is writable for its length.
    checked_len(unsafe {
        libc::recv(
            stream.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    })
}

/// Reads into guest memory; 0 at the end of the stream.
pub(super) fn receive(stream: &UnixStream, to: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = to.ptr_guard_mut();
    // SAFETY: the guard keeps the slice's mapping, which is writable for its length; only the kernel writes through it.
    checked_len(unsafe { libc::recv(stream.as_raw_fd(), guard.as_ptr().cast(), to.len(), libc::MSG_DONTWAIT) })
}

/// Writes from guest memory; raises no SIGPIPE.
pub(super) fn send(stream: &UnixStream, from: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = from.ptr_guard();
    // SAFETY: the guard keeps the slice's mapping, which is readable for its length; only the kernel reads through it.
    checked_len(unsafe {
        libc::send(
            stream.as_raw_fd(),
            guard.as_ptr().cast(),
            from.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    })
}

/// Writes from host memory; raises no SIGPIPE.
pub(super) fn send_bytes(stream: &UnixStream, from: &[u8]) -> io::Result<usize> {
    // SAFETY: `from` is readable for its length.
    checked_len(unsafe {
        libc::send(
            stream.as_raw_fd(),
            from.as_ptr().cast(),
            from.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    })
}
