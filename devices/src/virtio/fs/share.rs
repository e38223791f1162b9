//! A shared directory as the guest may use it: fuse-backend-rs's pass-through file system behind the checks that a
//! hostile guest calls for. Read-only shares, names and open flags, bounds on what the guest can make us keep open.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, ROOT_ID, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::api::validate_path_component;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

use super::sys;

/// How long the guest may believe what it was told (virtiofsd's `auto`).
const TIMEOUT: Duration = Duration::from_secs(1);
/// Open flags that the guest decides. The others would change what is opened: with O_PATH, O_CREAT would follow a
/// symbolic link out of the share; O_TMPFILE makes a file, O_ASYNC sends signals.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_EXCL
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_NOFOLLOW
    | libc::O_DIRECTORY
    | libc::O_LARGEFILE;

/// How much a guest can make the monitor keep open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsLimits {
    /// Files that the guest knows (one descriptor each) before it has to forget some; then ENFILE.
    pub inodes: u64,
    /// Files that the guest has open at once; then ENFILE.
    pub handles: u64,
}

impl FsLimits {
    /// Three quarters of the process's open-file limit for known files, an eighth for open ones.
    #[must_use]
    pub fn of_process() -> Self {
        let files = sys::max_open_files();
        Self {
            inodes: files / 4 * 3,
            handles: files / 8,
        }
    }
}

/// See the module.
pub(super) struct Share {
    pub(super) inner: PassthroughFs,
    /// An absolute path without symbolic links.
    pub(super) directory: PathBuf,
    pub(super) readonly: bool,
    /// Not root: everything is done as the user that we are.
    squash: bool,
    pub(super) limits: FsLimits,
    session: Mutex<Session>,
}

/// What the guest's session holds of us.
#[derive(Default)]
pub(super) struct Session {
    /// The options that the guest offered in FUSE_INIT; None before it and after FUSE_DESTROY.
    pub(super) offered: Option<FsOptions>,
    /// Lookup counts of the files that the guest knows, the root aside. The crate counts too, but for a restored session
    /// it begins anew: a file is forgotten there when it is forgotten here.
    pub(super) known: HashMap<u64, u64>,
    /// What the guest has open, by the number that it knows.
    pub(super) open: HashMap<u64, Handle>,
    /// The number given last.
    pub(super) last_handle: u64,
}

/// A file or directory that the guest has open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle {
    /// The crate's number.
    pub(super) inner: u64,
    pub(super) inode: u64,
    /// As it was opened.
    pub(super) flags: u32,
    pub(super) directory: bool,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn flags_for_host(flags: u32) -> u32 {
    (flags.cast_signed() & OPEN_FLAGS).cast_unsigned()
}

impl Share {
    /// Serves `directory`, an absolute path without symbolic links.
    pub(super) fn new(directory: &Path, readonly: bool, limits: FsLimits) -> io::Result<Self> {
        let root_dir = directory
            .to_str()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not UTF-8"))?;
        let config = Config {
            root_dir: root_dir.to_owned(),
            cache_policy: CachePolicy::Auto,
            entry_timeout: TIMEOUT,
            attr_timeout: TIMEOUT,
            // Else the crate remembers every file that ever was.
            use_host_ino: true,
            ..Config::default()
        };
        Ok(Self {
            inner: PassthroughFs::new(config)?,
            directory: directory.to_owned(),
            readonly,
            squash: !sys::is_root(),
            limits,
            session: Mutex::default(),
        })
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files that the guest knows, and has open.
    pub(super) fn in_use(&self) -> (u64, u64) {
        let session = self.session();
        (session.known.len() as u64, session.open.len() as u64)
    }

    fn writable(&self) -> io::Result<()> {
        if self.readonly { Err(errno(libc::EROFS)) } else { Ok(()) }
    }

    /// What an operation that makes or renames `name` needs.
    fn changes(&self, name: &CStr) -> io::Result<()> {
        self.writable()?;
        validate_path_component(name)
    }

    /// The server is about to tell the guest of `entry`.
    fn admit(&self, ctx: &Context, entry: Entry) -> io::Result<Entry> {
        if entry.inode == ROOT_ID {
            return Ok(entry);
        }
        {
            let known = &mut self.session().known;
            let full = known.len() as u64 >= self.limits.inodes;
            match known.get_mut(&entry.inode) {
                Some(count) => {
                    *count = count.saturating_add(1);
                    return Ok(entry);
                }
                None if !full => {
                    known.insert(entry.inode, 1);
                    return Ok(entry);
                }
                None => {}
            }
        }
        self.inner.forget(ctx, entry.inode, 1);
        Err(errno(libc::ENFILE))
    }

    /// The guest forgets a file as often; whether it knows it no more.
    fn unlearn(&self, inode: u64, times: u64) -> bool {
        let known = &mut self.session().known;
        let Some(count) = known.get_mut(&inode) else {
            return false;
        };
        *count = count.saturating_sub(times);
        let gone = *count == 0;
        if gone {
            known.remove(&inode);
        }
        gone
    }

    fn may_open(&self) -> io::Result<()> {
        if self.session().open.len() as u64 >= self.limits.handles {
            Err(errno(libc::ENFILE))
        } else {
            Ok(())
        }
    }

    /// The guest's number for what was opened.
    fn opened(&self, inner: Option<u64>, inode: u64, flags: u32, directory: bool) -> Option<u64> {
        let handle = Handle {
            inner: inner?,
            inode,
            flags,
            directory,
        };
        let mut session = self.session();
        session.last_handle = session.last_handle.saturating_add(1);
        let number = session.last_handle;
        session.open.insert(number, handle);
        Some(number)
    }

    /// The crate's number for the guest's.
    fn handle(&self, number: u64) -> io::Result<u64> {
        let handle = self.session().open.get(&number).copied();
        handle.map(|h| h.inner).ok_or_else(|| errno(libc::EBADF))
    }

    /// Closes by `close`, which is given the crate's number.
    fn close(&self, number: u64, close: impl FnOnce(u64) -> io::Result<()>) -> io::Result<()> {
        close(self.handle(number)?)?;
        self.session().open.remove(&number);
        Ok(())
    }
}

/// Everything that is not here is answered ENOSYS by the trait: extended attributes, locks, ioctl, poll, bmap, DAX.
impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // The crate clears the process's mask here.
        let _mask = sys::NoUmask::new();
        let wanted = self.inner.init(capable - FsOptions::PERFILE_DAX)?;
        self.session().offered = Some(capable);
        Ok(wanted
            | FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS)
    }

    fn destroy(&self) {
        let _mask = sys::NoUmask::new();
        self.inner.destroy();
        *self.session() = Session::default();
    }

    fn id_remap(&self, ctx: &mut Context) -> io::Result<()> {
        if self.squash {
            (ctx.uid, ctx.gid) = (0, 0);
        }
        Ok(())
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        // No export support was negotiated, so no guest needs "." or "..".
        validate_path_component(name)?;
        self.admit(ctx, self.inner.lookup(ctx, parent, name)?)
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        if self.unlearn(inode, count) {
            self.inner.forget(ctx, inode, u64::MAX);
        }
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let handle = handle.map(|h| self.handle(h)).transpose()?;
        self.inner.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.writable()?;
        let handle = handle.map(|h| self.handle(h)).transpose()?;
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, linkname: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.changes(name)?;
        self.admit(ctx, self.inner.symlink(ctx, linkname, parent, name)?)
    }

    fn mknod(&self, ctx: &Context, inode: u64, name: &CStr, mode: u32, rdev: u32, umask: u32) -> io::Result<Entry> {
        self.changes(name)?;
        // Device nodes would give host processes access to devices; 0/0 is overlayfs's whiteout.
        let kind = mode & libc::S_IFMT;
        if kind == libc::S_IFBLK || (kind == libc::S_IFCHR && rdev != 0) {
            return Err(errno(libc::EPERM));
        }
        let _mask = sys::NoUmask::new();
        self.admit(ctx, self.inner.mknod(ctx, inode, name, mode, rdev, umask)?)
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        self.changes(name)?;
        let _mask = sys::NoUmask::new();
        self.admit(ctx, self.inner.mkdir(ctx, parent, name, mode, umask)?)
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.changes(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.changes(name)?;
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.changes(oldname)?;
        self.changes(newname)?;
        self.inner.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        self.changes(newname)?;
        self.admit(ctx, self.inner.link(ctx, inode, newparent, newname)?)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = flags_for_host(flags);
        let signed = flags.cast_signed();
        if signed & libc::O_ACCMODE != libc::O_RDONLY || signed & libc::O_TRUNC != 0 {
            self.writable()?;
        }
        self.may_open()?;
        let (inner, options, backing) = self.inner.open(ctx, inode, flags, fuse_flags)?;
        Ok((self.opened(inner, inode, flags, false), options, backing))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.changes(name)?;
        self.may_open()?;
        let args = CreateIn {
            flags: flags_for_host(args.flags),
            ..args
        };
        let _mask = sys::NoUmask::new();
        let (entry, handle, options, backing) = self.inner.create(ctx, parent, name, args)?;
        let inode = entry.inode;
        match self.admit(ctx, entry) {
            Ok(entry) => Ok((entry, self.opened(handle, inode, args.flags, false), options, backing)),
            Err(error) => {
                let handle = handle.unwrap_or_default();
                self.inner.release(ctx, inode, 0, handle, false, false, None)?;
                Err(error)
            }
        }
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(handle)?;
        self.inner
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags_for_host(flags))
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        let (flags, handle) = (flags_for_host(flags), self.handle(handle)?);
        self.inner.write(
            ctx,
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, self.handle(handle)?, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, self.handle(handle)?)
    }

    fn fallocate(&self, ctx: &Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?;
        self.inner
            .fallocate(ctx, inode, self.handle(handle)?, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close(handle, |inner| {
            self.inner
                .release(ctx, inode, flags, inner, flush, flock_release, lock_owner)
        })
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn opendir(&self, ctx: &Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.may_open()?;
        // A directory is only ever read.
        let flags = flags_for_host(flags).cast_signed() & !(libc::O_ACCMODE | libc::O_TRUNC);
        let flags = flags.cast_unsigned();
        let (inner, options) = self.inner.opendir(ctx, inode, flags)?;
        Ok((self.opened(inner, inode, flags, true), options))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.inner
            .readdir(ctx, inode, self.handle(handle)?, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handle(handle)?;
        self.inner
            .readdirplus(ctx, inode, handle, size, offset, &mut |name, entry| {
                let entry = self.admit(ctx, entry)?;
                let known = entry.inode;
                let added = add_entry(name, entry);
                // No room: the guest was not told. The crate forgets by itself only where nothing failed.
                match &added {
                    Ok(0) => {
                        self.unlearn(known, 1);
                    }
                    Ok(_) => {}
                    Err(_) => self.forget(ctx, known, 1),
                }
                added
            })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, self.handle(handle)?)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.close(handle, |inner| self.inner.releasedir(ctx, inode, flags, inner))
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        if mask.cast_signed() & libc::W_OK != 0 {
            self.writable()?;
        }
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, self.handle(handle)?, offset, whence)
    }
}
