//! The device through a real virtqueue over a temporary directory: what a well-behaved guest does, what a read-only
//! share refuses, and what a hostile guest tries.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use tempfile::TempDir;

use super::validate::OUT_HEADER_SIZE;
use super::*;
use crate::virtio::testing::{Buf, Harness, RawBuf};

const ROOT: u64 = 1;
const QUEUE: usize = 1;

/// FUSE opcodes (Linux uapi fuse.h).
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const SETXATTR: u32 = 21;
    pub(super) const REMOVEXATTR: u32 = 24;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const ACCESS: u32 = 34;
    pub(super) const CREATE: u32 = 35;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const READDIRPLUS: u32 = 44;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const COPY_FILE_RANGE: u32 = 47;
    pub(super) const SETUPMAPPING: u32 = 48;
}

/// Little-endian fields, one after another.
macro_rules! body {
    ($($value:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$value.to_le_bytes());)*
        bytes
    }};
}

mod saved;

fn name(text: &str) -> Vec<u8> {
    CString::new(text).unwrap().into_bytes_with_nul()
}

fn with(mut front: Vec<u8>, back: &[u8]) -> Vec<u8> {
    front.extend_from_slice(back);
    front
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
}

fn header(len: usize, op: u32, unique: u64, node: u64) -> Vec<u8> {
    body!(u32::try_from(len).unwrap(), op, unique, node, 0u32, 0u32, 1u32, 0u32)
}

struct Guest {
    h: Harness<Fs>,
    dir: TempDir,
    unique: u64,
}

impl Guest {
    fn new() -> Self {
        Self::with_options(|_| {})
    }

    fn readonly() -> Self {
        Self::with_options(|options| options.readonly = true)
    }

    fn with_options(change: impl FnOnce(&mut FsOptions)) -> Self {
        // The share is a directory in a directory, so that there is something to escape to.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        std::fs::write(dir.path().join("share/hello"), "hello, guest").unwrap();
        let mut options = FsOptions::new("tag".into(), dir.path().join("share"));
        options.queue_size = 64;
        change(&mut options);
        let mut h = Harness::new(Fs::new(options).unwrap());
        h.activate().unwrap();
        let mut guest = Self { h, dir, unique: 0 };
        let out = guest.ok(op::INIT, 0, &body!(7u32, 38u32, 1u32 << 20, 0xbfff_ffffu32), 64);
        assert_eq!(out.len(), 64);
        assert_eq!(
            (u32_at(&out, 0), u32_at(&out, 20)),
            (7, 1 << 20),
            "FUSE 7, 1 MiB writes"
        );
        assert_eq!(u32_at(&out, 28) & 0xffff, 256, "max_pages");
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    /// Sends a request: its errno (0: none) and answer.
    fn call(&mut self, op: u32, node: u64, request: &[u8], room: u32) -> (i32, Vec<u8>) {
        self.unique += 1;
        let head = header(40 + request.len(), op, self.unique, node);
        let mut bufs = vec![Buf::Read(&head)];
        if !request.is_empty() {
            bufs.push(Buf::Read(request));
        }
        bufs.push(Buf::Write(OUT_HEADER_SIZE));
        if room > 0 {
            bufs.push(Buf::Write(room));
        }
        self.h.push(QUEUE, &bufs);
        self.h.kick(QUEUE).unwrap();
        let done = self.h.completed(QUEUE).pop().unwrap();
        assert!(done.len >= OUT_HEADER_SIZE, "no answer");
        assert_eq!(u32_at(&done.data, 0), done.len);
        assert_eq!(u64_at(&done.data, 8), self.unique);
        let error = u32_at(&done.data, 4).cast_signed();
        (-error, done.data[16..done.len as usize].to_vec())
    }

    fn ok(&mut self, op: u32, node: u64, request: &[u8], room: u32) -> Vec<u8> {
        let (errno, out) = self.call(op, node, request, room);
        assert_eq!(errno, 0, "operation {op}");
        out
    }

    fn errno(&mut self, op: u32, node: u64, request: &[u8]) -> i32 {
        let (errno, out) = self.call(op, node, request, 256);
        assert_eq!(out.len(), if errno == 0 { out.len() } else { 0 });
        errno
    }

    fn lookup(&mut self, parent: u64, file: &str) -> u64 {
        u64_at(&self.ok(op::LOOKUP, parent, &name(file), 128), 0)
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        u64_at(&self.ok(op::OPEN, node, &body!(flags, 0u32), 16), 0)
    }

    fn create(&mut self, file: &str, flags: i32) -> (u64, u64) {
        let request = with(body!(flags | libc::O_CREAT, 0o640u32, 0u32, 0u32), &name(file));
        let out = self.ok(op::CREATE, ROOT, &request, 144);
        (u64_at(&out, 0), u64_at(&out, 128))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Vec<u8> {
        self.ok(
            op::READ,
            node,
            &body!(handle, offset, size, 0u32, 0u64, 0u32, 0u32),
            size,
        )
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> (i32, Vec<u8>) {
        let size = u32::try_from(data.len()).unwrap();
        self.call(
            op::WRITE,
            node,
            &with(body!(handle, offset, size, 0u32, 0u64, 0u32, 0u32), data),
            8,
        )
    }

    fn counter(&self, name: &str) -> u64 {
        self.h
            .device
            .counters()
            .into_iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }
}

/// The names in the answer of READDIR (entries of 24 bytes and a name) or READDIRPLUS (128 bytes more).
fn names(out: &[u8], plus: bool) -> BTreeSet<String> {
    let skip = if plus { 128 } else { 0 };
    let mut all = BTreeSet::new();
    let mut rest = out;
    while rest.len() > skip {
        let entry = &rest[skip..];
        let len = u32_at(entry, 16) as usize;
        all.insert(String::from_utf8(entry[24..24 + len].to_vec()).unwrap());
        rest = &rest[(skip + 24 + len).next_multiple_of(8)..];
    }
    all
}

#[test]
fn identity() {
    let guest = Guest::with_options(|options| options.num_queues = 3);
    let device = &guest.h.device;
    assert_eq!(device.device_type(), 26);
    assert_eq!(device.queue_max_sizes(), [64; 4]);
    let mut config = [0xff; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..4], b"tag\0");
    assert_eq!(u32_at(&config, 36), 3);
    assert_eq!(u32_at(&config, 40), 0);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 44]);
}

#[test]
fn wrong_options() {
    let dir = tempfile::tempdir().unwrap();
    let make = |change: &dyn Fn(&mut FsOptions)| {
        let mut options = FsOptions::new("t".into(), dir.path().to_owned());
        change(&mut options);
        Fs::new(options).err().unwrap().to_string()
    };
    assert!(make(&|o| o.tag = String::new()).contains("tag"));
    assert!(make(&|o| o.tag = "x".repeat(37)).contains("36 bytes"));
    assert!(make(&|o| o.num_queues = 0).contains("num_queues 0"));
    assert!(make(&|o| o.queue_size = 1000).contains("queue_size 1000"));
    assert!(make(&|o| o.shared_dir = "/does/not/exist".into()).contains("/does/not/exist"));
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(make(&|o| o.shared_dir = dir.path().join("file")).contains("not a directory"));
}

#[test]
fn reads() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    let attr = guest.ok(op::GETATTR, node, &body!(0u32, 0u32, 0u64), 104);
    assert_eq!(u64_at(&attr, 24), 12, "size");
    let handle = guest.open(node, libc::O_RDONLY);
    assert_eq!(guest.read(node, handle, 0, 4096), b"hello, guest");
    assert_eq!(guest.read(node, handle, 7, 3), b"gue");
    assert_eq!(guest.read(node, handle, 100, 3), b"");
    guest.ok(op::FLUSH, node, &body!(handle, 0u32, 0u32, 0u64), 0);
    guest.ok(op::RELEASE, node, &body!(handle, 0u32, 0u32, 0u64), 0);
    assert_eq!(
        guest.errno(op::READ, node, &body!(handle, 0u64, 1u32, 0u32, 0u64, 0u32, 0u32)),
        libc::EBADF
    );
    assert_eq!(guest.errno(op::LOOKUP, ROOT, &name("absent")), libc::ENOENT);
    assert_eq!(guest.ok(op::STATFS, ROOT, &[], 80).len(), 80);
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), (1, 0));
}

#[test]
fn a_mebibyte_at_once() {
    let mut guest = Guest::new();
    let data: Vec<u8> = (0..3 << 20).map(|i: u32| u8::try_from(i % 251).unwrap()).collect();
    std::fs::write(guest.path("big"), &data).unwrap();
    let node = guest.lookup(ROOT, "big");
    let handle = guest.open(node, libc::O_RDONLY);
    let mut got = Vec::new();
    for i in 0..3 {
        got.extend(guest.read(node, handle, i << 20, 1 << 20));
    }
    assert!(got == data);
    let (node, handle) = guest.create("copy", libc::O_RDWR);
    for (i, chunk) in data.chunks(1 << 20).enumerate() {
        let (errno, out) = guest.write(node, handle, (i as u64) << 20, chunk);
        assert_eq!((errno, u32_at(&out, 0)), (0, 1 << 20));
    }
    guest.ok(op::FSYNC, node, &body!(handle, 0u32, 0u32), 0);
    assert!(std::fs::read(guest.path("copy")).unwrap() == data);
}

#[test]
fn creates_and_removes() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("new", libc::O_WRONLY);
    assert_eq!(guest.write(node, handle, 3, b"abc").0, 0);
    assert_eq!(std::fs::read(guest.path("new")).unwrap(), b"\0\0\0abc");
    assert_eq!(
        std::fs::metadata(guest.path("new")).unwrap().permissions().mode() & 0o7777,
        0o640
    );
    guest.ok(op::FALLOCATE, node, &body!(handle, 0u64, 100u64, 0u32, 0u32), 0);
    assert_eq!(std::fs::metadata(guest.path("new")).unwrap().len(), 100);
    // SETATTR: valid, padding, fh, size, lock_owner, times, nanoseconds, mode, ...
    let size = with(body!(8u32, 0u32, 0u64, 5u64), &[0; 64]);
    assert_eq!(u64_at(&guest.ok(op::SETATTR, node, &size, 104), 24), 5);
    let out = guest.ok(op::MKDIR, ROOT, &with(body!(0o755u32, 0u32), &name("dir")), 128);
    let dir = u64_at(&out, 0);
    guest.ok(
        op::RENAME,
        ROOT,
        &with(body!(dir), &[name("new"), name("moved")].concat()),
        0,
    );
    assert!(guest.path("dir/moved").exists());
    assert_eq!(guest.errno(op::RMDIR, ROOT, &name("dir")), libc::ENOTEMPTY);
    guest.ok(op::SYMLINK, ROOT, &[name("link"), name("dir/moved")].concat(), 128);
    let link = guest.lookup(ROOT, "link");
    assert_eq!(guest.ok(op::READLINK, link, &[], 4096), b"dir/moved");
    guest.ok(op::UNLINK, dir, &name("moved"), 0);
    guest.ok(op::RMDIR, ROOT, &name("dir"), 0);
    guest.ok(
        op::MKNOD,
        ROOT,
        &with(body!(libc::S_IFIFO | 0o600, 0u32, 0u32, 0u32), &name("fifo")),
        128,
    );
    assert!(std::fs::metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    // Still open, still readable.
    assert_eq!(guest.errno(op::GETATTR, node, &body!(1u32, 0u32, handle)), 0);
}

#[test]
fn directories() {
    let mut guest = Guest::new();
    let mut expected = BTreeSet::from(["hello".to_owned()]);
    for i in 0..300 {
        std::fs::write(guest.path(&format!("file-{i}")), "").unwrap();
        expected.insert(format!("file-{i}"));
    }
    for (operation, plus) in [(op::READDIR, false), (op::READDIRPLUS, true)] {
        let handle = u64_at(&guest.ok(op::OPENDIR, ROOT, &body!(0u32, 0u32), 16), 0);
        let mut seen = BTreeSet::new();
        let mut offset = 0u64;
        loop {
            let request = body!(handle, offset, 4096u32, 0u32, 0u64, 0u32, 0u32);
            let out = guest.ok(operation, ROOT, &request, 4096);
            if out.is_empty() {
                break;
            }
            // The offset of the last entry is where to go on.
            let skip = if plus { 128 } else { 0 };
            let mut at = 0;
            while at < out.len() {
                offset = u64_at(&out, at + skip + 8);
                at += (skip + 24 + u32_at(&out, at + skip + 16) as usize).next_multiple_of(8);
            }
            seen.extend(names(&out, plus));
        }
        seen.retain(|file| file != "." && file != "..");
        assert_eq!(seen, expected);
        guest.ok(29, ROOT, &body!(handle, 0u32, 0u32, 0u64), 0);
    }
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), (301, 0));
}

#[test]
fn forgetting_frees() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    assert_eq!(guest.lookup(ROOT, "hello"), node);
    for (times, left) in [(1u64, 1), (1, 0)] {
        let head = header(48, op::FORGET, 9, node);
        guest
            .h
            .push(QUEUE, &[Buf::Read(&head), Buf::Read(&times.to_le_bytes())]);
        guest.h.kick(QUEUE).unwrap();
        assert_eq!(guest.h.used(QUEUE).len(), 1);
        assert_eq!(guest.counter("inodes"), left);
    }
    assert_eq!(guest.errno(op::GETATTR, node, &body!(0u32, 0u32, 0u64)), libc::EBADF);
}

#[test]
fn what_is_kept_open_is_bounded() {
    let mut guest = Guest::with_options(|o| o.limits = FsLimits { inodes: 10, handles: 5 });
    for i in 0..20 {
        std::fs::write(guest.path(&format!("f{i}")), "").unwrap();
    }
    let first = guest.lookup(ROOT, "f0");
    for i in 1..10 {
        guest.lookup(ROOT, &format!("f{i}"));
    }
    assert_eq!(guest.errno(op::LOOKUP, ROOT, &name("f10")), libc::ENFILE);
    assert_eq!(guest.lookup(ROOT, "f0"), first, "what is known stays known");
    for _ in 0..5 {
        guest.open(first, libc::O_RDONLY);
    }
    assert_eq!(guest.errno(op::OPEN, first, &body!(0u32, 0u32)), libc::ENFILE);
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), (10, 5));
    guest.h.reset();
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), (0, 0));
}

#[test]
fn read_only_refuses_every_change() {
    let mut guest = Guest::readonly();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(node, libc::O_RDONLY);
    let before = std::fs::metadata(guest.path("hello")).unwrap();
    let attempts: Vec<(u32, u64, Vec<u8>)> = vec![
        (op::SETATTR, node, with(body!(8u32, 0u32, 0u64, 0u64), &[0; 64])),
        (op::SETATTR, node, with(body!(1u32, 0u32, 0u64, 0u64), &[0; 64])),
        (op::SYMLINK, ROOT, [name("l"), name("hello")].concat()),
        (
            op::MKNOD,
            ROOT,
            with(body!(libc::S_IFREG | 0o600, 0u32, 0u32, 0u32), &name("n")),
        ),
        (op::MKDIR, ROOT, with(body!(0o755u32, 0u32), &name("d"))),
        (op::UNLINK, ROOT, name("hello")),
        (op::RMDIR, ROOT, name("hello")),
        (
            op::RENAME,
            ROOT,
            with(body!(ROOT), &[name("hello"), name("h")].concat()),
        ),
        (
            op::RENAME2,
            ROOT,
            with(body!(ROOT, 0u32, 0u32), &[name("hello"), name("h")].concat()),
        ),
        (op::LINK, ROOT, with(body!(node), &name("h"))),
        (op::OPEN, node, body!(libc::O_WRONLY, 0u32)),
        (op::OPEN, node, body!(libc::O_RDWR, 0u32)),
        (op::OPEN, node, body!(libc::O_RDONLY | libc::O_TRUNC, 0u32)),
        (op::OPEN, ROOT, body!(libc::O_RDWR | libc::O_TMPFILE, 0u32)),
        (
            op::CREATE,
            ROOT,
            with(body!(libc::O_RDONLY, 0o600u32, 0u32, 0u32), &name("c")),
        ),
        (
            op::CREATE,
            ROOT,
            with(body!(libc::O_RDONLY, 0o600u32, 0u32, 0u32), &name("hello")),
        ),
        (
            op::WRITE,
            node,
            with(body!(handle, 0u64, 1u32, 0u32, 0u64, 0u32, 0u32), b"x"),
        ),
        (op::FALLOCATE, node, body!(handle, 0u64, 100u64, 0u32, 0u32)),
        (op::ACCESS, node, body!(2u32, 0u32)),
    ];
    for (operation, target, request) in attempts {
        assert_eq!(
            guest.errno(operation, target, &request),
            libc::EROFS,
            "operation {operation}"
        );
    }
    // Not served at all, so they cannot change anything either.
    for (operation, request) in [
        (op::SETXATTR, with(body!(1u32, 0u32), b"user.a\0x")),
        (op::REMOVEXATTR, name("user.a")),
        (op::COPY_FILE_RANGE, body!(handle, 0u64, node, handle, 0u64, 1u64, 0u64)),
        (op::IOCTL, body!(handle, 0u32, 0x4020_940du32, 0u64, 0u32, 0u32)),
        (op::SETUPMAPPING, body!(handle, 0u64, 4096u64, 3u64, 0u64)),
    ] {
        assert_eq!(
            guest.errno(operation, node, &request),
            libc::ENOSYS,
            "operation {operation}"
        );
    }
    assert_eq!(guest.read(node, handle, 0, 100), b"hello, guest");
    let after = std::fs::metadata(guest.path("hello")).unwrap();
    assert_eq!(
        (before.ctime(), before.ctime_nsec()),
        (after.ctime(), after.ctime_nsec())
    );
    assert_eq!(std::fs::read_dir(guest.path("")).unwrap().count(), 1);
}

#[test]
fn no_way_out() {
    let mut guest = Guest::new();
    let outside = guest.dir.path().join("secret");
    std::os::unix::fs::symlink(&outside, guest.path("link")).unwrap();
    std::os::unix::fs::symlink("..", guest.path("up")).unwrap();
    std::fs::create_dir(guest.path("sub")).unwrap();
    let sub = guest.lookup(ROOT, "sub");
    for (parent, file) in [
        (ROOT, ".."),
        (sub, ".."),
        (ROOT, "."),
        (ROOT, "../secret"),
        (ROOT, "sub/../../secret"),
        (ROOT, "/etc/passwd"),
    ] {
        assert_eq!(guest.errno(op::LOOKUP, parent, &name(file)), libc::EINVAL, "{file:?}");
        let create = with(body!(libc::O_RDWR, 0o600u32, 0u32, 0u32), &name(file));
        assert_eq!(guest.errno(op::CREATE, parent, &create), libc::EINVAL, "{file:?}");
        assert_eq!(guest.errno(op::UNLINK, parent, &name(file)), libc::EINVAL, "{file:?}");
        assert_eq!(
            guest.errno(op::MKDIR, parent, &with(body!(0o755u32, 0u32), &name(file))),
            libc::EINVAL
        );
        let rename = with(body!(parent), &[name("hello"), name(file)].concat());
        assert_eq!(guest.errno(op::RENAME, ROOT, &rename), libc::EINVAL, "{file:?}");
        assert_eq!(
            guest.errno(op::SYMLINK, parent, &[name(file), name("x")].concat()),
            libc::EINVAL
        );
    }
    // Names without an end, with one in the middle, and empty.
    assert_ne!(guest.errno(op::LOOKUP, ROOT, b"hello"), 0);
    assert_eq!(guest.errno(op::LOOKUP, ROOT, b""), libc::EINVAL);
    assert_ne!(guest.errno(op::LOOKUP, ROOT, b"\0"), 0);
    assert_eq!(
        guest.errno(op::LOOKUP, ROOT, b"hello\0/../secret\0"),
        0,
        "the name ends at its NUL"
    );
    // Symbolic links are the guest's to follow: the host does not.
    for file in ["link", "up"] {
        let node = guest.lookup(ROOT, file);
        assert_ne!(guest.errno(op::OPEN, node, &body!(libc::O_RDONLY, 0u32)), 0, "{file}");
        assert_ne!(guest.errno(op::OPENDIR, node, &body!(0u32, 0u32)), 0, "{file}");
        assert_ne!(guest.errno(op::LOOKUP, node, &name("secret")), 0, "{file}");
    }
    // CREATE over a link: O_PATH would make the kernel forget O_CREAT, and follow it.
    for flags in [
        libc::O_RDWR,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_PATH,
        libc::O_PATH | libc::O_DIRECTORY,
    ] {
        let request = with(body!(flags | libc::O_CREAT, 0o600u32, 0u32, 0u32), &name("link"));
        assert_ne!(guest.errno(op::CREATE, ROOT, &request), 0, "flags {flags:#x}");
    }
    let link = guest.lookup(ROOT, "link");
    let truncate = with(body!(8u32, 0u32, 0u64, 0u64), &[0; 64]);
    assert_ne!(guest.errno(op::SETATTR, link, &truncate), 0);
    assert_eq!(std::fs::read(outside).unwrap(), b"outside");
    let device = with(body!(libc::S_IFCHR | 0o600, 0x0103u32, 0u32, 0u32), &name("null"));
    assert_eq!(guest.errno(op::MKNOD, ROOT, &device), libc::EPERM);
}

#[test]
fn special_files_do_not_stop_the_monitor() {
    let mut guest = Guest::new();
    guest.ok(
        op::MKNOD,
        ROOT,
        &with(body!(libc::S_IFIFO | 0o600, 0u32, 0u32, 0u32), &name("fifo")),
        128,
    );
    let fifo = guest.lookup(ROOT, "fifo");
    // Nobody writes to it: an open that went through would wait for ever.
    assert_eq!(guest.errno(op::OPEN, fifo, &body!(libc::O_RDONLY, 0u32)), libc::EBADF);
    let create = with(
        body!(libc::O_RDONLY | libc::O_CREAT, 0o600u32, 0u32, 0u32),
        &name("fifo"),
    );
    assert_eq!(guest.errno(op::CREATE, ROOT, &create), libc::EBADF);
    let truncate = with(body!(8u32, 0u32, 0u64, 0u64), &[0; 64]);
    assert_eq!(guest.errno(op::SETATTR, fifo, &truncate), libc::EBADF);
}

#[test]
fn malformed_requests() {
    let mut guest = Guest::new();
    let long = header(4096, op::LOOKUP, 77, ROOT);
    let short = header(10, op::LOOKUP, 77, ROOT);
    let fine = header(40, op::STATFS, 77, ROOT);
    let answered = |guest: &mut Guest, bufs: &[Buf<'_>]| {
        guest.h.push(QUEUE, bufs);
        guest.h.kick(QUEUE).unwrap();
        let done = guest.h.completed(QUEUE).pop().unwrap();
        (
            done.len,
            done.data
                .get(4..8)
                .map_or(0, |error| -i32::from_le_bytes(error.try_into().unwrap())),
        )
    };
    assert_eq!(
        answered(&mut guest, &[Buf::Read(&long), Buf::Write(16)]),
        (16, libc::EINVAL)
    );
    assert_eq!(
        answered(&mut guest, &[Buf::Read(&short), Buf::Write(16)]),
        (16, libc::EINVAL)
    );
    assert_eq!(answered(&mut guest, &[Buf::Read(&fine[..39]), Buf::Write(16)]).0, 0);
    assert_eq!(answered(&mut guest, &[Buf::Write(16)]).0, 0);
    assert_eq!(answered(&mut guest, &[Buf::Read(&fine)]).0, 0);
    assert_eq!(answered(&mut guest, &[Buf::Read(&fine), Buf::Write(15)]).0, 0);
    // Room for the header only.
    assert_eq!(
        answered(&mut guest, &[Buf::Read(&fine), Buf::Write(16)]),
        (16, libc::EINVAL)
    );
    // Cut anywhere.
    let parts = [
        Buf::Read(&fine[..3]),
        Buf::Read(&fine[3..40]),
        Buf::Write(40),
        Buf::Write(60),
    ];
    assert_eq!(answered(&mut guest, &parts).0, 96);
    // Readable behind writable.
    let mixed = [Buf::Read(&fine), Buf::Write(16), Buf::Read(&fine), Buf::Write(80)];
    assert_eq!(answered(&mut guest, &mixed), (16, libc::EINVAL));
    // A directory read into more memory than there is.
    let handle = u64_at(&guest.ok(op::OPENDIR, ROOT, &body!(0u32, 0u32), 16), 0);
    let request = body!(handle, 0u64, u32::MAX, 0u32, 0u64, 0u32, 0u32);
    assert_eq!(guest.call(op::READDIR, ROOT, &request, 4096).0, libc::ENOMEM);
    guest.lookup(ROOT, "hello");
}

#[test]
fn private_pages_are_not_touched() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    let (new, handle) = guest.create("new", libc::O_RDWR);
    let reader = guest.open(node, libc::O_RDONLY);
    let page = guest.h.alloc(4096);
    guest.h.write(page, b"private contents");
    guest.h.gate.make_private(page, 4096);
    let private = |writable| RawBuf {
        gpa: page,
        len: 16,
        writable,
    };
    // A write of a private page to a file.
    let head = with(
        header(96, op::WRITE, 5, new),
        &body!(handle, 0u64, 16u32, 0u32, 0u64, 0u32, 0u32),
    );
    let mut bufs = guest.h.place(&[Buf::Read(&head), Buf::Write(24)]);
    bufs.insert(1, private(false));
    guest.h.push_raw(QUEUE, &bufs);
    // A read of a file into one.
    let head = with(
        header(80, op::READ, 6, node),
        &body!(reader, 0u64, 16u32, 0u32, 0u64, 0u32, 0u32),
    );
    let mut bufs = guest.h.place(&[Buf::Read(&head), Buf::Write(16)]);
    bufs.push(private(true));
    guest.h.push_raw(QUEUE, &bufs);
    // A request in one, and an answer to one.
    guest.h.push_raw(QUEUE, &[private(false)]);
    let mut bufs = guest.h.place(&[Buf::Read(&header(40, op::STATFS, 7, ROOT))]);
    bufs.push(RawBuf {
        gpa: page + 4096 - 8,
        len: 96,
        writable: true,
    });
    guest.h.push_raw(QUEUE, &bufs);
    guest.h.kick(QUEUE).unwrap();
    let done = guest.h.completed(QUEUE);
    let lens: Vec<u32> = done.iter().map(|done| done.len).collect();
    assert_eq!(lens, [16, 16, 0, 0]);
    for done in &done[..2] {
        assert_eq!(u32_at(&done.data, 4).cast_signed(), -libc::EFAULT);
    }
    guest.h.gate.make_shared(page, 4096);
    assert_eq!(guest.h.read(page, 16), b"private contents");
    assert_eq!(std::fs::read(guest.path("new")).unwrap(), b"");
    assert_eq!(guest.read(node, reader, 0, 5), b"hello");
}

#[test]
fn one_interrupt_a_batch_and_a_budget() {
    let mut guest = Guest::with_options(|o| o.queue_size = 512);
    let before = guest.h.interrupts(QUEUE);
    let head = header(40, op::STATFS, 1, ROOT);
    for _ in 0..100 {
        guest.h.push(QUEUE, &[Buf::Read(&head), Buf::Write(96)]);
    }
    guest.h.kick(QUEUE).unwrap();
    assert_eq!(guest.h.used(QUEUE).len(), BUDGET);
    assert!(guest.h.poll_events(0).unwrap());
    assert_eq!(guest.h.used(QUEUE).len(), 100 - BUDGET);
    assert_eq!(guest.h.interrupts(QUEUE) - before, 2);
    assert!(!guest.h.poll_events(0).unwrap());
}

#[test]
fn the_high_priority_queue_serves_too() {
    let mut guest = Guest::new();
    let head = header(40, op::STATFS, 1, ROOT);
    guest.h.push(0, &[Buf::Read(&head), Buf::Write(96)]);
    guest.h.kick(0).unwrap();
    assert_eq!(guest.h.used(0)[0].1, 96);
}

#[test]
fn the_process_keeps_its_umask() {
    let before = sys::mask();
    let mut guest = Guest::new();
    assert_eq!(sys::mask(), before);
    guest.create("new", libc::O_WRONLY);
    guest.h.reset();
    assert_eq!(sys::mask(), before);
}
