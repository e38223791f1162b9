//! The file of a scratch disk: made in a directory, without a name, thin, and gone when its last descriptor is closed. How
//! it is used as a disk is `file.rs`'s.
#![expect(unsafe_code, reason = "fstatfs has no safe wrapper among our dependencies")]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use libc::c_int;

use super::file::punch_probe;

/// Size of a scratch disk's blocks in bytes, which its size is a multiple of: those of the file systems that it lies on, so
/// that a write never makes the host read first, and a discarded block is a hole.
pub const BLOCK: u32 = 4096;
/// How many names are tried where a file cannot be made without one.
const NAMES: u32 = 100;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// Why a scratch disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The directory is none.
    #[error("dir {dir}: it is not a directory; give one on a file system with room for what the pod writes")]
    NotADirectory {
        /// What was given.
        dir: PathBuf,
    },
    /// There is nothing of that name.
    #[error("dir {dir}: it does not exist; make it, or give another directory")]
    Missing {
        /// What was given.
        dir: PathBuf,
    },
    /// No file can be made in it.
    #[error("dir {dir}: no file can be made in it ({source}); give a directory that podvisor may write to")]
    Unwritable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What the pod discards would stay.
    #[error(
        "dir {dir}: its file system cannot make holes in a file, so that what the pod discards would stay; give a directory \
         on ext4, xfs, btrfs or tmpfs"
    )]
    NoHoles {
        /// The directory.
        dir: PathBuf,
    },
    /// No file of that size can be there.
    #[error("size {size}: no file in {dir} can have that size ({source}); give less, or another dir")]
    Size {
        /// Bytes asked for.
        size: u64,
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes a file of `size` bytes in `dir` that has no name, takes no room, and can give back what it came to take.
///
/// # Errors
/// [`ScratchError`], which names the section's field.
pub fn make_scratch(dir: &Path, size: u64) -> Result<File, ScratchError> {
    let at = || dir.to_owned();
    if !dir.is_dir() {
        return Err(match dir.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => ScratchError::Missing { dir: at() },
            _ => ScratchError::NotADirectory { dir: at() },
        });
    }
    let file = make(dir).map_err(|source| ScratchError::Unwritable { dir: at(), source })?;
    file.set_len(size).map_err(|source| ScratchError::Size {
        size,
        dir: at(),
        source,
    })?;
    if !punch_probe(&file, size) {
        return Err(ScratchError::NoHoles { dir: at() });
    }
    if in_memory(&file) {
        tracing::warn!(
            "scratch.dir {}: its file system is in memory: what the pod writes to its scratch disk takes the host's memory, up \
             to scratch.size {size}; give a directory on a disk",
            dir.display()
        );
    }
    Ok(file)
}

/// Makes an empty file in `dir` that nobody else can open.
pub(super) fn make(dir: &Path) -> io::Result<File> {
    // O_EXCL: it cannot be given a name later (open(2)).
    match open(dir, libc::O_TMPFILE | libc::O_EXCL) {
        // EISDIR: a kernel without O_TMPFILE; the others: a file system without it.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
            ) =>
        {
            make_named(dir)
        }
        made => made,
    }
}

/// The same where a file needs a name when it is made: it has one for the time of a system call.
fn make_named(dir: &Path) -> io::Result<File> {
    for number in 0..NAMES {
        let name = dir.join(format!(".podvisor-scratch-{}-{number}", std::process::id()));
        match open(&name, libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW) {
            Ok(file) => {
                std::fs::remove_file(&name)?;
                return Ok(file);
            }
            // Another monitor's of this number in another container, or one that was killed between the two calls.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn open(path: &Path, flags: c_int) -> io::Result<File> {
    let (create, flags) = (flags & libc::O_CREAT != 0, flags & !libc::O_CREAT);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(create)
        .mode(0o600)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(path)
}

/// Whether the file's pages are the host's memory.
fn in_memory(file: &File) -> bool {
    let mut out = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `out` is room for one statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), out.as_mut_ptr()) } < 0 {
        return false;
    }
    // SAFETY: statfs is made of integers, all of which were zeroed or written by the kernel.
    let kind = unsafe { out.assume_init() }.f_type;
    // The type is a 32-bit number, whatever the width of the field.
    IN_MEMORY.iter().any(|magic| i64::from(*magic) == kind)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_file_has_no_name_takes_no_room_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        for made in [make(dir.path()).unwrap(), make_named(dir.path()).unwrap()] {
            made.set_len(1 << 40).unwrap();
            let metadata = made.metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.blocks()), (0, 0));
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
            made.write_all_at(b"podvisor", 1 << 39).unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_another_left_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(format!(".podvisor-scratch-{}-0", std::process::id()));
        std::fs::write(&left, "another's").unwrap();
        make_named(dir.path()).unwrap();
        assert_eq!(std::fs::read(&left).unwrap(), b"another's");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_is_told_with_the_field_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = |dir: &Path, size| make_scratch(dir, size).unwrap_err().to_string();
        assert_eq!(
            error(&file, 4096),
            format!(
                "dir {}: it is not a directory; give one on a file system with room for what the pod writes",
                file.display()
            )
        );
        assert_eq!(
            error(Path::new("/nonexistent/x"), 4096),
            "dir /nonexistent/x: it does not exist; make it, or give another directory"
        );
        let proc = error(Path::new("/proc/self"), 4096);
        assert!(
            proc.starts_with("dir /proc/self: no file can be made in it (") && proc.ends_with("podvisor may write to"),
            "{proc}"
        );
        let size = i64::MAX as u64 - 4095;
        let large = error(dir.path(), size);
        assert!(large.starts_with(&format!("size {size}: no file in ")), "{large}");
    }
}
