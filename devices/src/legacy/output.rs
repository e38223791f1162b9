//! Where a console's bytes go, without ever stopping a vCPU: what the host does not take at once waits in a bounded
//! buffer, and what does not fit there is dropped and counted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes that wait at most.
const PENDING_MAX: usize = 64 << 10;
/// Bytes written at once. A pipe that is ready takes this many without blocking (PIPE_BUF).
const CHUNK: usize = 4096;

/// A console's output.
pub struct Output {
    out: Box<dyn Write + Send>,
    /// Tells whether a write would block; None for what is always ready.
    ready: Option<(Epoll, RawFd)>,
    pending: VecDeque<u8>,
    dropped: u64,
}

impl Output {
    /// Output to something that does not block.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            ready: None,
            pending: VecDeque::new(),
            dropped: 0,
        }
    }

    /// Output to a descriptor: a pipe, terminal, socket or file. Its flags are left alone, for it may be shared with
    /// other processes.
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let raw = fd.as_raw_fd();
        let epoll = Epoll::new()?;
        let ready = match epoll.ctl(ControlOperation::Add, raw, EpollEvent::new(EventSet::OUT, 0)) {
            Ok(()) => Some((epoll, raw)),
            // Files cannot be watched; they are always ready.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => None,
            Err(e) => return Err(e),
        };
        let mut this = Self::new(Box::new(File::from(fd)));
        this.ready = ready;
        Ok(this)
    }

    /// The descriptor to watch for becoming writable.
    #[must_use]
    pub fn watch_fd(&self) -> Option<RawFd> {
        self.ready.as_ref().map(|(_, fd)| *fd)
    }

    /// Bytes dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn is_ready(&self) -> bool {
        let Some((epoll, _)) = &self.ready else { return true };
        let mut events = [EpollEvent::default()];
        matches!(epoll.wait(0, &mut events), Ok(n) if n > 0)
    }

    /// Hands over what waits, as far as the host takes it now.
    pub fn drain(&mut self) {
        while !self.pending.is_empty() && self.is_ready() {
            let (front, _) = self.pending.as_slices();
            let chunk = front.get(..front.len().min(CHUNK)).unwrap_or(front);
            match self.out.write(chunk) {
                Ok(0) => break,
                Ok(n) => drop(self.pending.drain(..n.min(chunk.len()))),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    // Nobody is there to read any more: the pod goes on without a console.
                    self.dropped = self.dropped.saturating_add(self.pending.len() as u64);
                    self.pending.clear();
                }
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let room = PENDING_MAX.saturating_sub(self.pending.len());
        if room < data.len() {
            self.drain();
        }
        let room = PENDING_MAX.saturating_sub(self.pending.len());
        let (kept, lost) = data.split_at(room.min(data.len()));
        self.pending.extend(kept);
        self.dropped = self.dropped.saturating_add(lost.len() as u64);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.drain();
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.drain();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_full_pipe_blocks_nobody_and_loses_only_what_does_not_fit() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut out = Output::from_fd(writer.into()).unwrap();
        let data: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
        for part in data.chunks(100) {
            out.write_all(part).unwrap();
            out.flush().unwrap();
        }
        let kept = data.len() - usize::try_from(out.dropped()).unwrap();
        assert!(kept < data.len() && kept >= PENDING_MAX + CHUNK, "{kept}");
        let mut got = Vec::new();
        let mut part = vec![0; 65536];
        while got.len() < kept {
            let n = reader.read(&mut part).unwrap();
            got.extend_from_slice(&part[..n]);
            out.drain();
        }
        assert!(got == data[..kept]);
    }

    #[test]
    fn a_file_takes_everything_and_a_closed_pipe_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        let mut out = Output::from_fd(file.try_clone().unwrap().into()).unwrap();
        assert_eq!(out.watch_fd(), None);
        out.write_all(&[7; 100_000]).unwrap();
        out.flush().unwrap();
        drop(out);
        assert_eq!(file.metadata().unwrap().len(), PENDING_MAX as u64);
        std::io::Seek::rewind(&mut file).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut out = Output::from_fd(writer.into()).unwrap();
        out.write_all(b"gone").unwrap();
        out.flush().unwrap();
        assert_eq!(out.dropped(), 4);
    }
}
