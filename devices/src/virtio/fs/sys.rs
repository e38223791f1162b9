//! The few process-wide facts that serving files depends on: the file-creation mask, the limit on open files, and who
//! we are.
#![expect(unsafe_code, reason = "libc calls without pointers, or with one to a local")]

use std::sync::{Mutex, MutexGuard, PoisonError};

static MASK: Mutex<()> = Mutex::new(());

/// While it lives, files are created with exactly the mode that is asked for; then the old mask is back. The mask
/// belongs to the process, hence the lock.
pub(super) struct NoUmask {
    old: libc::mode_t,
    _lock: MutexGuard<'static, ()>,
}

impl NoUmask {
    pub(super) fn new() -> Self {
        let lock = MASK.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: takes no pointers and cannot fail.
        let old = unsafe { libc::umask(0) };
        Self { old, _lock: lock }
    }
}

impl Drop for NoUmask {
    fn drop(&mut self) {
        // SAFETY: takes no pointers and cannot fail.
        unsafe { libc::umask(self.old) };
    }
}

/// How many descriptors this process may have open.
pub(super) fn max_open_files() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 1024,
        rlim_max: 1024,
    };
    // SAFETY: `limit` is a valid rlimit to write to. On failure it keeps POSIX's usual value.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

/// Whether this process is root (in its user namespace), so that it can act as other users.
pub(super) fn is_root() -> bool {
    // SAFETY: takes no pointers and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The mask as the kernel tells it, outside the life of every [`NoUmask`].
#[cfg(test)]
pub(super) fn mask() -> String {
    let _lock = MASK.lock().unwrap_or_else(PoisonError::into_inner);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status
        .lines()
        .find(|line| line.starts_with("Umask:"))
        .unwrap()
        .to_owned()
}
