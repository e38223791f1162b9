//! A guest's session with a shared directory, for a snapshot: the files that it knows by their paths, and what it has open.
//! Another monitor looks the paths up again, in the same directory, and opens what was open.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::{FsOptions, ROOT_ID};
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::api::validate_path_component;
use serde::{Deserialize, Serialize};

use super::share::{Handle, Share};
use crate::virtio::state::StateError;

/// More handles than a guest can have opened.
const MAX_HANDLE: u64 = 1 << 62;
/// The deepest path that is looked up: longer than PATH_MAX allows.
const MAX_DEPTH: usize = 2048;

/// A session.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    /// What the guest offered in FUSE_INIT.
    offered: u64,
    /// The number of the handle that was given last.
    last_handle: u64,
    known: Vec<Known>,
    open: Vec<Open>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    inode: u64,
    /// How often the guest looked it up.
    count: u64,
    /// From the directory; None: it has no name any more.
    path: Option<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Open {
    number: u64,
    inode: u64,
    flags: u32,
    directory: bool,
}

impl Share {
    /// The session; None when the guest has none.
    ///
    /// # Errors
    /// When the guest has a file open that no path leads to.
    pub(super) fn save(&self) -> Result<Option<Saved>, StateError> {
        let session = self.session();
        let Some(offered) = session.offered else {
            return Ok(None);
        };
        let mut known: Vec<_> = session
            .known
            .iter()
            .map(|(&inode, &count)| Known {
                inode,
                count,
                path: self.path_of(inode),
            })
            .collect();
        // Numbers are given to file systems below the directory in the order in which they are met.
        known.sort_unstable_by_key(|file| file.inode);
        let mut open = Vec::new();
        for (&number, handle) in &session.open {
            let named = |file: &Known| file.inode == handle.inode && file.path.is_some();
            if handle.inode != ROOT_ID && !known.iter().any(named) {
                let told = self.inner.readlinkat_proc_file(handle.inode);
                return Err(StateError::Refused(format!(
                    "the guest has a file open that has no name any more, or one that is not UTF-8 ({}): close it in the \
                     guest first",
                    told.map_or_else(|e| e.to_string(), |path| path.display().to_string())
                )));
            }
            open.push(Open {
                number,
                inode: handle.inode,
                flags: handle.flags,
                directory: handle.directory,
            });
        }
        open.sort_unstable_by_key(|open| open.number);
        Ok(Some(Saved {
            offered: offered.bits(),
            last_handle: session.last_handle,
            known,
            open,
        }))
    }

    /// Where `inode` is below the directory; None when its name is gone, or is no UTF-8.
    fn path_of(&self, inode: u64) -> Option<PathBuf> {
        let path = self.inner.readlinkat_proc_file(inode).ok()?;
        let (stat, _) = self.inner.getattr(&Context::default(), inode, None).ok()?;
        // A deleted file's link tells a path that is another file's or nobody's.
        let now = path.symlink_metadata().ok()?;
        let same = (now.dev(), now.ino()) == (stat.st_dev, stat.st_ino);
        let below = path.strip_prefix(&self.directory).ok()?;
        (same && below.to_str().is_some()).then(|| below.to_owned())
    }

    /// Takes over a session.
    ///
    /// # Errors
    /// When no guest could have had it, or a file that the guest has open is not there any more.
    pub(super) fn restore(&self, saved: Saved) -> Result<(), StateError> {
        let broken = |what: &str| StateError::Broken(what.to_owned());
        if saved.known.len() as u64 > self.limits.inodes || saved.open.len() as u64 > self.limits.handles {
            return Err(StateError::Refused(format!(
                "the guest knows {} files and has {} open, and this process may have {} and {}: raise its limit of open files",
                saved.known.len(),
                saved.open.len(),
                self.limits.inodes,
                self.limits.handles
            )));
        }
        let offered = FsOptions::from_bits_truncate(saved.offered);
        self.init(offered)
            .map_err(|source| host("starting a session", source))?;
        let mut known = HashMap::new();
        let mut here = vec![ROOT_ID];
        for file in &saved.known {
            if file.inode == ROOT_ID || file.count == 0 || known.insert(file.inode, file.count).is_some() {
                return Err(broken("a file with an impossible number or count"));
            }
            // One that is gone, or is another file now, is stale to the guest, as when it goes while the guest runs.
            if let Some(path) = &file.path
                && self.learn(path, file.inode)
            {
                here.push(file.inode);
            }
        }
        // The guest's next file gets a number after these.
        if saved.last_handle > MAX_HANDLE || saved.open.iter().any(|open| open.number > saved.last_handle) {
            return Err(broken("a handle with an impossible number"));
        }
        {
            let mut session = self.session();
            (session.known, session.last_handle) = (known, saved.last_handle);
        }
        here.sort_unstable();
        for open in &saved.open {
            if here.binary_search(&open.inode).is_err() {
                let path = saved.known.iter().find(|file| file.inode == open.inode);
                let path = path.and_then(|file| file.path.clone()).unwrap_or_default();
                return Err(StateError::Refused(format!(
                    "{}: the guest has this file open, and it is not there any more, or is another one: restore with the \
                     directory as it was",
                    self.directory.join(path).display()
                )));
            }
            self.reopen(open)?;
        }
        Ok(())
    }

    /// Looks up `path`, so that the crate knows it once; whether it is `inode`.
    fn learn(&self, path: &Path, inode: u64) -> bool {
        let ctx = Context::default();
        let mut passed = Vec::new();
        let mut at = ROOT_ID;
        let found = path.iter().count() <= MAX_DEPTH
            && path.iter().all(|name| {
                let Ok(name) = CString::new(name.as_bytes()) else {
                    return false;
                };
                if validate_path_component(&name).is_err() {
                    return false;
                }
                match self.inner.lookup(&ctx, at, &name) {
                    Ok(entry) => {
                        passed.push(entry.inode);
                        at = entry.inode;
                        true
                    }
                    Err(_) => false,
                }
            });
        let same = found && at == inode && at != ROOT_ID;
        if same {
            // What was looked up for it stays.
            passed.pop();
        }
        for other in passed {
            self.inner.forget(&ctx, other, 1);
        }
        same
    }

    fn reopen(&self, open: &Open) -> Result<(), StateError> {
        let ctx = Context::default();
        let opened = if open.directory {
            self.opendir(&ctx, open.inode, open.flags).map(|(handle, _)| handle)
        } else {
            // What is there stays; it was made when it was opened first.
            let once = libc::O_TRUNC | libc::O_EXCL | libc::O_CREAT;
            let flags = open.flags & !once.cast_unsigned();
            self.open(&ctx, open.inode, flags, 0).map(|(handle, ..)| handle)
        };
        let number = opened.map_err(|source| host("opening what the guest has open", source))?;
        let mut session = self.session();
        let handle: Option<Handle> = number.and_then(|number| session.open.remove(&number));
        match handle {
            Some(handle) if session.open.insert(open.number, handle).is_none() => Ok(()),
            _ => Err(StateError::Broken(format!("handle {} is there twice", open.number))),
        }
    }
}

fn host(what: &'static str, source: io::Error) -> StateError {
    StateError::Device(crate::virtio::device::DeviceError::Host { what, source })
}
