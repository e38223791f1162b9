//! Whether the host takes what the pod writes: told when it stops and when it goes on, not for each request, and not as often
//! as a guest that writes until it fails, over and over, would have it.

use std::io;
use std::time::{Duration, Instant};

use super::file::DiskFile;

/// How long nothing must have failed before the host is said to take writes again.
const QUIET: Duration = Duration::from_secs(1);

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageNews {
    /// The host refuses writes, with this error number.
    Failing(i32),
    /// It takes them again.
    Working,
}

#[derive(Debug)]
struct Failing {
    code: i32,
    /// When a write failed last.
    last: Instant,
    /// The least that the file had since, in bytes.
    allocated: Option<u64>,
}

/// How the host's storage stands, as the pod's writes find it.
#[derive(Debug, Default)]
pub(super) struct Storage {
    failing: Option<Failing>,
    news: Option<StorageNews>,
}

impl Storage {
    /// The host refused a write with error number `code`.
    pub(super) fn failed(&mut self, code: i32, disk: &DiskFile, now: Instant) {
        if self.failing.is_none() {
            tracing::warn!(error = %io::Error::from_raw_os_error(code), "a disk's writes fail on the host");
            self.news = Some(StorageNews::Failing(code));
        }
        self.failing = Some(Failing {
            code: self.failing.as_ref().map_or(code, |failing| failing.code),
            last: now,
            allocated: disk.allocated(),
        });
    }

    /// The host took a write. `now` is asked for only while writes have been failing.
    pub(super) fn succeeded(&mut self, disk: &DiskFile, now: impl FnOnce() -> Instant) {
        let Some(failing) = &mut self.failing else { return };
        if now().saturating_duration_since(failing.last) < QUIET {
            return;
        }
        // A full file system still takes what was written before: only more of it tells that there is room.
        let full = matches!(failing.code, libc::ENOSPC | libc::EDQUOT | libc::EFBIG);
        let allocated = disk.allocated();
        if full && allocated.is_some() && allocated <= failing.allocated {
            failing.allocated = allocated;
            return;
        }
        tracing::info!("the host takes a disk's writes again");
        self.failing = None;
        self.news = Some(StorageNews::Working);
    }

    /// What changed since it was asked last.
    pub(super) fn take_news(&mut self) -> Option<StorageNews> {
        self.news.take()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::scratch::make_scratch;
    use super::*;

    #[test]
    fn a_change_is_told_once_and_an_overwrite_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = make_scratch(dir.path(), 1 << 20).unwrap();
        let disk = DiskFile::transient(dir.path(), file.try_clone().unwrap(), 1 << 20).unwrap();
        let mut storage = Storage::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        storage.succeeded(&disk, || unreachable!("nobody asks for the time"));
        assert_eq!(storage.take_news(), None);
        for second in 0..3 {
            storage.failed(libc::ENOSPC, &disk, at(second));
            assert_eq!(
                storage.take_news(),
                (second == 0).then_some(StorageNews::Failing(libc::ENOSPC))
            );
        }
        file.write_all_at(&[1; 8192], 0).unwrap();
        storage.succeeded(&disk, || at(2));
        assert_eq!(storage.take_news(), None, "something failed a moment ago");
        storage.failed(libc::EIO, &disk, at(5));
        storage.succeeded(&disk, || at(10));
        assert_eq!(storage.take_news(), None, "nothing more was written");
        // What was discarded meanwhile is no reason to wait until as much is written.
        let hole = vmm_sys_util::fallocate::FallocateMode::PunchHole;
        vmm_sys_util::fallocate::fallocate(&file, hole, true, 0, 8192).unwrap();
        storage.succeeded(&disk, || at(10));
        assert_eq!(storage.take_news(), None);
        file.write_all_at(&[1; 4096], 65536).unwrap();
        storage.succeeded(&disk, || at(10));
        assert_eq!(storage.take_news(), Some(StorageNews::Working));
        storage.failed(libc::EIO, &disk, at(11));
        assert_eq!(storage.take_news(), Some(StorageNews::Failing(libc::EIO)));
        storage.succeeded(&disk, || at(12));
        assert_eq!(
            storage.take_news(),
            Some(StorageNews::Working),
            "it need not grow for this"
        );
    }
}
