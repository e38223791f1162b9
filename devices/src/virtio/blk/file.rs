//! The file or block device behind a disk: how it is opened and locked, how large it is, what alignment it wants.
//! Data moves in `ring.rs`.
#![expect(
    unsafe_code,
    reason = "fcntl, ioctl and statx have no safe wrapper among our dependencies"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libc::{c_int, c_ulong};

use super::request::SECTOR_SIZE;
use super::scratch::{BLOCK, make};

/// `BLKSSZGET` of linux/fs.h: logical block size of a block device.
const BLKSSZGET: c_ulong = 0x1268;
/// `BLKPBSZGET` of linux/fs.h: physical block size of a block device.
const BLKPBSZGET: c_ulong = 0x127b;
/// `BLKGETSIZE64` of linux/fs.h: size of a block device in bytes.
const BLKGETSIZE64: c_ulong = 0x8008_1272;
/// Alignment that direct I/O always satisfies where the file system does not tell its own.
const SAFE_DIRECT_ALIGNMENT: u32 = 4096;

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The path cannot be opened.
    #[error("disk {path}: cannot open it for {access}: {source}")]
    Open {
        /// The disk's path.
        path: PathBuf,
        /// How it was to be opened.
        access: &'static str,
        /// The error.
        source: io::Error,
    },
    /// Direct I/O was asked for and the file system does not have it.
    #[error("disk {path}: the file system has no direct I/O ({source}): use direct=off")]
    Direct {
        /// The disk's path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk {path}: it is {kind}; a disk is a regular file or a block device")]
    NotADisk {
        /// The disk's path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Someone else has the disk.
    #[error("disk {path}: {holder}; detach it there, or open it read-only in both places (readonly=on)")]
    Locked {
        /// The disk's path.
        path: PathBuf,
        /// Who holds which lock, as far as that can be told.
        holder: String,
    },
    /// The disk cannot have the size that was asked for.
    #[error("disk {path}: desired_size {bytes}: {reason}")]
    Size {
        /// The disk's path.
        path: PathBuf,
        /// Bytes asked for.
        bytes: u64,
        /// Why not, and what can be done.
        reason: String,
    },
    /// A property of the disk cannot be read or set.
    #[error("disk {path}: {what}: {source}")]
    Host {
        /// The disk's path.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// An option has a value that cannot be.
    #[error("disk {path}: {option}={value}: {remedy}")]
    Option {
        /// The disk's path.
        path: PathBuf,
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        remedy: &'static str,
    },
}

/// What the advisory lock covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockRange {
    /// The bytes that the disk has.
    #[default]
    Bytes,
    /// The file, whatever its size.
    File,
}

/// What direct I/O demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    /// Of each buffer's address, in bytes; a power of two.
    pub(super) memory: u64,
    /// Of the offset and of each buffer's length, in bytes; a power of two.
    pub(super) offset: u64,
}

/// An open, locked disk.
#[derive(Debug)]
pub(super) struct DiskFile {
    /// Through the page cache; holds the lock.
    cached: File,
    /// Past the page cache, if asked for.
    direct: Option<(File, DirectAlignment)>,
    /// A block device, whose size is not ours to change.
    block_device: bool,
    readonly: bool,
    range: LockRange,
    /// Bytes, as they were when it was opened.
    pub(super) size: u64,
    /// Logical block size, in bytes.
    pub(super) logical_block: u32,
    /// Physical block size, in bytes.
    pub(super) physical_block: u32,
    /// Holes can be punched (checked for regular files, assumed for block devices).
    pub(super) can_punch: bool,
    /// Nothing of it outlives the device: the file is empty when this is dropped.
    pub(super) transient: bool,
    /// What the serial is made of when none was given.
    pub(super) identity: String,
}

impl DiskFile {
    /// Opens, checks and locks the disk at `path`.
    pub(super) fn open(path: &Path, readonly: bool, direct: bool, range: LockRange) -> Result<Self, BlkError> {
        Self::of(path, open_file(path, readonly, 0)?, readonly, direct, range)
    }

    /// Makes a file of `len` zeros in `directory`, which nobody else can open and which is gone when it is closed.
    pub(super) fn temporary(directory: &Path, len: u64) -> Result<Self, BlkError> {
        let file = make(directory).map_err(|source| BlkError::Open {
            path: directory.to_owned(),
            access: "a file without a name",
            source,
        })?;
        file.set_len(len).map_err(|source| BlkError::Host {
            path: directory.to_owned(),
            what: "giving a file in it its size",
            source,
        })?;
        Self::of(directory, file, false, false, LockRange::File)
    }

    /// Checks and locks the file that is open at `path`.
    fn of(path: &Path, cached: File, readonly: bool, direct: bool, range: LockRange) -> Result<Self, BlkError> {
        let host = |what| {
            move |source| BlkError::Host {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let metadata = cached.metadata().map_err(host("reading its metadata"))?;
        let block_device = check_kind(path, &metadata)?;
        clear_nonblock(&cached).map_err(host("clearing O_NONBLOCK"))?;
        let (mut logical_block, mut physical_block) = (512, 512);
        let size = match block_device {
            true => ioctl_read::<u64>(&cached, BLKGETSIZE64).map_err(host("reading its size (BLKGETSIZE64)"))?,
            false => metadata.len(),
        };
        lock(path, &cached, readonly, range, size)?;
        if block_device {
            logical_block = ioctl_read::<c_int>(&cached, BLKSSZGET)
                .ok()
                .and_then(|v| u32::try_from(v).ok())
                .filter(|v| v.is_power_of_two() && *v >= 512)
                .unwrap_or(512);
            physical_block = ioctl_read::<u32>(&cached, BLKPBSZGET)
                .ok()
                .filter(|v| v.is_power_of_two())
                .unwrap_or(logical_block)
                .max(logical_block);
        } else if let Ok(block) = u32::try_from(metadata.blksize())
            && block.is_power_of_two()
        {
            physical_block = block.clamp(512, SAFE_DIRECT_ALIGNMENT);
        }
        let direct = direct
            .then(|| open_direct(path, readonly, &metadata, logical_block))
            .transpose()?;
        let can_punch = !readonly && (block_device || punch_probe(&cached, size));
        let identity = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
        Ok(Self {
            cached,
            direct,
            block_device,
            readonly,
            range,
            size,
            logical_block,
            physical_block,
            can_punch,
            transient: false,
            identity,
        })
    }

    /// A disk of `size` bytes in `file`, of which nothing is kept: it is emptied now and at the end. `directory` is where it
    /// was made, for messages.
    pub(super) fn transient(directory: &Path, file: File, size: u64) -> Result<Self, BlkError> {
        let sized = file.set_len(0).and_then(|()| file.set_len(size));
        sized.map_err(|source| BlkError::Size {
            path: directory.to_owned(),
            bytes: size,
            reason: format!("a file there cannot have that size: {source}"),
        })?;
        let mut disk = Self::of(directory, file, false, false, LockRange::File)?;
        disk.transient = true;
        disk.logical_block = BLOCK;
        disk.physical_block = disk.physical_block.max(BLOCK);
        Ok(disk)
    }

    /// Bytes of the host's file system that the file takes; None for a block device.
    pub(super) fn allocated(&self) -> Option<u64> {
        // stat(2): st_blocks counts 512 bytes whatever the file system's blocks are.
        let blocks = self.cached.metadata().ok()?.blocks();
        (!self.block_device).then(|| blocks.saturating_mul(512))
    }

    /// Gives the file `bytes` bytes; a block device must have them already.
    pub(super) fn resize(&self, path: &Path, bytes: u64) -> Result<(), BlkError> {
        let refuse = |reason: String| BlkError::Size {
            path: path.to_owned(),
            bytes,
            reason,
        };
        let (whole, block) = match self.transient {
            true => ("blocks", u64::from(BLOCK)),
            false => ("sectors", SECTOR_SIZE),
        };
        if bytes == 0 || !bytes.is_multiple_of(block) {
            return Err(refuse(format!(
                "a disk has whole {whole}; give a multiple of {block} above 0"
            )));
        }
        if self.readonly {
            return Err(refuse("the disk is read-only".to_owned()));
        }
        if self.block_device {
            let has = ioctl_read::<u64>(&self.cached, BLKGETSIZE64)
                .map_err(|e| refuse(format!("reading its size (BLKGETSIZE64): {e}")))?;
            return match has == bytes {
                true => Ok(()),
                false => Err(refuse(format!("the block device has {has} bytes; resize it first"))),
            };
        }
        // First what may be refused without a trace.
        lock(path, &self.cached, self.readonly, self.range, bytes)?;
        let set = self.cached.set_len(bytes);
        set.map_err(|e| refuse(format!("the file cannot have that size: {e}")))
    }

    /// The descriptor that goes through the page cache.
    pub(super) fn cached(&self) -> &File {
        &self.cached
    }

    /// The descriptor that goes past the page cache, with what it demands.
    pub(super) fn direct(&self) -> Option<(&File, DirectAlignment)> {
        self.direct.as_ref().map(|(file, alignment)| (file, *alignment))
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // Others have it open too: whoever uses it again finds it empty, and until then it takes no room.
        if self.transient
            && let Err(error) = self.cached.set_len(0)
        {
            tracing::warn!(%error, "a scratch disk keeps its space until its file is closed");
        }
    }
}

/// Opens without waiting (a FIFO would) and without becoming the controlling terminal of anything.
fn open_file(path: &Path, readonly: bool, flags: c_int) -> Result<File, BlkError> {
    OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY | flags)
        .open(path)
        .map_err(|source| BlkError::Open {
            path: path.to_owned(),
            access: if readonly { "reading" } else { "reading and writing" },
            source,
        })
}

/// True for a block device, false for a regular file, an error for anything else.
fn check_kind(path: &Path, metadata: &std::fs::Metadata) -> Result<bool, BlkError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind.is_block_device());
    }
    let kind = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "a special file"
    };
    Err(BlkError::NotADisk {
        path: path.to_owned(),
        kind,
    })
}

/// The second descriptor, with O_DIRECT, of the very same file.
fn open_direct(
    path: &Path,
    readonly: bool,
    same_as: &std::fs::Metadata,
    logical_block: u32,
) -> Result<(File, DirectAlignment), BlkError> {
    let host = |what| {
        move |source| BlkError::Host {
            path: path.to_owned(),
            what,
            source,
        }
    };
    let file = match open_file(path, readonly, libc::O_DIRECT) {
        Err(BlkError::Open { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
            return Err(BlkError::Direct {
                path: path.to_owned(),
                source,
            });
        }
        other => other?,
    };
    let metadata = file.metadata().map_err(host("reading its metadata"))?;
    if (metadata.dev(), metadata.ino()) != (same_as.dev(), same_as.ino()) {
        let source = io::Error::other("the path was replaced while it was being opened");
        return Err(host("opening it for direct I/O")(source));
    }
    clear_nonblock(&file).map_err(host("clearing O_NONBLOCK"))?;
    let fallback = if metadata.file_type().is_block_device() {
        logical_block
    } else {
        SAFE_DIRECT_ALIGNMENT
    };
    let (memory, offset) = direct_alignment(file.as_raw_fd()).unwrap_or((fallback, fallback));
    let alignment = DirectAlignment {
        memory: u64::from(memory),
        offset: u64::from(offset).max(SECTOR_SIZE),
    };
    Ok((file, alignment))
}

/// Whether holes can be punched: asked for beyond the end, where it changes nothing.
pub(super) fn punch_probe(file: &File, size: u64) -> bool {
    use vmm_sys_util::fallocate::{FallocateMode, fallocate};
    fallocate(file, FallocateMode::PunchHole, true, size, SECTOR_SIZE).is_ok()
}

/// Takes the advisory lock of Cloud Hypervisor (an open file description lock): shared for a read-only disk, exclusive
/// for a writable one of `size` bytes. It goes with the descriptor.
fn lock(path: &Path, file: &File, readonly: bool, range: LockRange, size: u64) -> Result<(), BlkError> {
    let wanted = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    // 0: up to the end, wherever that is.
    let len = match range {
        LockRange::Bytes => i64::try_from(size).unwrap_or(0),
        LockRange::File => 0,
    };
    let Err(source) = fcntl_lock(file.as_raw_fd(), libc::F_OFD_SETLK, wanted, len) else {
        return Ok(());
    };
    if !matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
        return Err(BlkError::Host {
            path: path.to_owned(),
            what: "taking the lock (F_OFD_SETLK)",
            source,
        });
    }
    let held = match fcntl_lock(file.as_raw_fd(), libc::F_OFD_GETLK, wanted, len) {
        Ok(held) if held == libc::F_RDLCK => "read-only",
        Ok(held) if held == libc::F_WRLCK => "writable",
        _ => "already",
    };
    Err(BlkError::Locked {
        path: path.to_owned(),
        holder: format!("another virtual machine or process has it open ({held})"),
    })
}

/// One lock call on the first `len` bytes; the lock type that the kernel leaves in the structure.
fn fcntl_lock(fd: RawFd, command: c_int, kind: c_int, len: i64) -> io::Result<c_int> {
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(io::Error::other)?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: 0,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid `flock` that lives over the call, and both commands take a pointer to one.
    let result = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(c_int::from(lock.l_type))
}

/// io_uring takes O_NONBLOCK as "fail rather than wait", also for regular files.
fn clear_nonblock(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes an integer and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Plain numbers that an ioctl may fill.
trait Number: Copy + Default {}
impl Number for u64 {}
impl Number for u32 {}
impl Number for c_int {}

/// Reads a number by an ioctl whose result type is `T`.
fn ioctl_read<T: Number>(file: &File, request: c_ulong) -> io::Result<T> {
    let mut value = T::default();
    // SAFETY: the callers pair each request with the type that the kernel writes for it (linux/fs.h): u64 for
    // BLKGETSIZE64, int for BLKSSZGET, unsigned int for BLKPBSZGET; `value` lives over the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// What the file system says that direct I/O demands (statx, Linux 6.1): of memory and of offset.
fn direct_alignment(fd: RawFd) -> Option<(u32, u32)> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, as AT_EMPTY_PATH wants it, and `out` is room for one statx.
    let result = unsafe {
        libc::statx(
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            out.as_mut_ptr(),
        )
    };
    if result < 0 {
        return None;
    }
    // SAFETY: statx is made of integers, all of which were zeroed or written by the kernel.
    let out = unsafe { out.assume_init() };
    let (memory, offset) = (out.stx_dio_mem_align, out.stx_dio_offset_align);
    let told = out.stx_mask & libc::STATX_DIOALIGN != 0;
    (told && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}
