//! An interrupted demo leaves nothing behind: SIGINT, SIGTERM and SIGHUP end the monitor, remove the files, and end the
//! demo with 128 and the signal's number.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::sys::{SignalFd, kill};

/// The signals, taken from the moment this exists but not yet acted on.
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// Takes the signals from here on, in this thread and those it starts later.
    ///
    /// # Errors
    /// When they cannot be taken.
    pub(crate) fn take() -> io::Result<Self> {
        SignalFd::new(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]).map(Self)
    }
}

/// What an interrupt has to clean up; the monitor's process is told when there is one.
pub(crate) struct Interrupt {
    monitor: Arc<AtomicU32>,
}

impl Interrupt {
    /// Acts on the signals: `files` go when one arrives.
    ///
    /// # Errors
    /// When the thread that waits for them cannot start.
    pub(crate) fn watch(Signals(signals): Signals, files: PathBuf) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, signals.as_raw_fd(), event)?;
        let monitor = Arc::new(AtomicU32::new(0));
        let pid = Arc::clone(&monitor);
        std::thread::Builder::new().name("interrupt".into()).spawn(move || {
            loop {
                // An interrupted wait is waited again.
                let _ = epoll.wait(-1, &mut [EpollEvent::default()]);
                if let Some(signal) = signals.next() {
                    kill(pid.load(Ordering::Acquire));
                    // Other threads may still be writing there; without their folder they soon fail.
                    while files.exists() {
                        let _ = std::fs::remove_dir_all(&files);
                    }
                    std::process::exit(128 + signal);
                }
            }
        })?;
        Ok(Self { monitor })
    }

    /// The monitor runs as process `pid`.
    pub(crate) fn monitor_is(&self, pid: u32) {
        self.monitor.store(pid, Ordering::Release);
    }
}
