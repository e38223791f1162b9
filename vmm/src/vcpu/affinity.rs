//! The host CPUs that a vCPU's thread may run on.
#![expect(unsafe_code, reason = "pthread_setaffinity_np takes a pointer to the set")]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// Has `thread` run on `cpus` only.
///
/// # Errors
/// As `pthread_setaffinity_np(3)`: none of them is there, or this process may use none of them.
pub(super) fn bind<T>(thread: &JoinHandle<T>, cpus: &[usize]) -> io::Result<()> {
    const BITS: usize = u64::BITS as usize;
    let mut set = vec![0u64; cpus.iter().max().map_or(0, |last| last / BITS + 1)];
    for cpu in cpus {
        if let Some(word) = set.get_mut(cpu / BITS) {
            *word |= 1 << (cpu % BITS);
        }
    }
    let size = size_of_val(set.as_slice());
    // SAFETY: the handle is of a thread that has not been joined, and the set is `size` bytes that the call only reads.
    match unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size, set.as_ptr().cast()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
