//! Makes a file durable without making the event loop wait: what other devices that have a file use of the engine.

use std::io;
use std::path::Path;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::BlkError;
use super::file::{DiskFile, LockRange};
use super::ring::{Buffer, Engine, Job, Op};

/// An open, locked file and the engine that makes it durable.
pub(in crate::virtio) struct Flusher {
    disk: Arc<DiskFile>,
    engine: Engine<()>,
}

impl Flusher {
    /// Opens and locks the file or block device at `path`. `event` is signalled when [`Flusher::finished`] has news.
    ///
    /// # Errors
    /// When it cannot be opened, is no disk, or is locked by someone else.
    pub(in crate::virtio) fn open(path: &Path, readonly: bool, event: &EventFd) -> Result<Self, BlkError> {
        Self::of(path, DiskFile::open(path, readonly, false, LockRange::File)?, event)
    }

    /// The same for a file of `len` zeros made in `directory`, which is gone with it.
    ///
    /// # Errors
    /// When the directory's file system cannot have such a file.
    pub(in crate::virtio) fn temporary(directory: &Path, len: u64, event: &EventFd) -> Result<Self, BlkError> {
        Self::of(directory, DiskFile::temporary(directory, len)?, event)
    }

    fn of(path: &Path, disk: DiskFile, event: &EventFd) -> Result<Self, BlkError> {
        let disk = Arc::new(disk);
        let engine = Engine::new(Arc::clone(&disk), 1, event, true).map_err(|source| BlkError::Host {
            path: path.to_owned(),
            what: "setting up its I/O",
            source,
        })?;
        Ok(Self { disk, engine })
    }

    /// The file.
    pub(in crate::virtio) fn file(&self) -> &std::fs::File {
        self.disk.cached()
    }

    /// Its size in bytes, when it was opened.
    pub(in crate::virtio) fn size(&self) -> u64 {
        self.disk.size
    }

    /// Whether a flush is under way; then no other can be started.
    pub(in crate::virtio) fn is_busy(&self) -> bool {
        self.engine.in_flight() > 0
    }

    /// Starts to make durable what was written so far. True: ask [`Flusher::finished`] at once, there will be no
    /// signal.
    ///
    /// # Errors
    /// When the host takes no I/O.
    pub(in crate::virtio) fn start(&mut self) -> io::Result<bool> {
        self.engine.submit(Job {
            op: Op::Sync,
            direct: false,
            buffer: Buffer::default(),
            tag: (),
        });
        if !self.engine.flush()? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(!self.engine.uses_ring())
    }

    /// Waits for the end of the flush under way.
    ///
    /// # Errors
    /// When the host's queue fails.
    pub(in crate::virtio) fn wait(&mut self) -> io::Result<()> {
        self.engine.wait()
    }

    /// How the flush under way ended, if it has.
    pub(in crate::virtio) fn finished(&mut self) -> Option<io::Result<()>> {
        self.engine.next_done().map(|(_, result)| result.map(drop))
    }
}
