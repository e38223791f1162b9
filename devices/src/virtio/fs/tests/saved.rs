//! The guest's session in another device on the same directory.

use serde_json::{Value, json};

use super::*;

impl Guest {
    /// A fresh device on the same directory.
    fn another(&self, change: impl FnOnce(&mut FsOptions)) -> Fs {
        let mut options = FsOptions::new("tag".into(), self.dir.path().join("share"));
        options.queue_size = 64;
        change(&mut options);
        Fs::new(options).unwrap()
    }

    fn forget(&mut self, node: u64, count: u64) {
        self.unique += 1;
        let request = header(48, op::FORGET, self.unique, node);
        self.h
            .push(QUEUE, &[Buf::Read(&request), Buf::Read(&count.to_le_bytes())]);
        self.h.kick(QUEUE).unwrap();
        self.h.completed(QUEUE);
    }

    fn moved(&mut self) {
        let next = self.another(|_| {});
        let features = self.h.device.features();
        let features = features & !(1 << VIRTIO_RING_F_EVENT_IDX);
        drop(self.h.moved_to(next, features).unwrap());
    }
}

#[test]
fn a_session_goes_on_in_another_device() {
    let mut guest = Guest::new();
    std::fs::create_dir_all(guest.path("a/b")).unwrap();
    std::fs::write(guest.path("a/b/deep"), "deep inside").unwrap();
    let a = guest.lookup(ROOT, "a");
    let b = guest.lookup(a, "b");
    let deep = guest.lookup(b, "deep");
    assert_eq!(guest.lookup(b, "deep"), deep);
    let closed = guest.open(deep, libc::O_RDONLY);
    let reader = guest.open(deep, libc::O_RDONLY);
    let (new, writer) = guest.create("new", libc::O_RDWR | libc::O_EXCL | libc::O_TRUNC);
    assert_eq!(guest.write(new, writer, 0, b"before ").0, 0);
    let dir = u64_at(&guest.ok(op::OPENDIR, ROOT, &body!(0u32, 0u32), 16), 0);
    guest.ok(op::RELEASE, deep, &body!(closed, 0u32, 0u32, 0u64), 0);
    let used = (guest.counter("inodes"), guest.counter("handles"));
    assert_eq!(used, (4, 3));
    guest.moved();
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), used);
    assert_eq!(guest.read(deep, reader, 0, 100), b"deep inside");
    assert_eq!(guest.write(new, writer, 7, b"and after").0, 0);
    assert_eq!(std::fs::read(guest.path("new")).unwrap(), b"before and after");
    let listed = guest.ok(
        op::READDIR,
        ROOT,
        &body!(dir, 0u64, 4096u32, 0u32, 0u64, 0u32, 0u32),
        4096,
    );
    assert!(names(&listed, false).contains("hello"));
    assert_eq!(guest.lookup(a, "b"), b);
    // What was closed stays closed, what is opened gets a number of its own.
    let request = body!(closed, 0u64, 1u32, 0u32, 0u64, 0u32, 0u32);
    assert_eq!(guest.errno(op::READ, deep, &request), libc::EBADF);
    let another = guest.open(deep, libc::O_RDONLY);
    assert!(![closed, reader, writer, dir].contains(&another));
    // Looked up twice before: once forgotten, it is still known.
    guest.forget(deep, 1);
    assert_eq!(guest.read(deep, reader, 0, 4), b"deep");
    assert_eq!(guest.errno(op::GETATTR, deep, &body!(0u32, 0u32, 0u64)), 0);
    for handle in [reader, another] {
        guest.ok(op::RELEASE, deep, &body!(handle, 0u32, 0u32, 0u64), 0);
    }
    guest.forget(deep, 1);
    assert_eq!(guest.errno(op::GETATTR, deep, &body!(0u32, 0u32, 0u64)), libc::EBADF);
    // And once more.
    guest.moved();
    assert_eq!(guest.read(new, writer, 0, 6), b"before");
    assert_eq!((guest.counter("inodes"), guest.counter("handles")), (3, 2));
}

#[test]
fn files_without_a_name_are_refused_while_open_and_stale_afterwards() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(node, libc::O_RDONLY);
    std::fs::remove_file(guest.path("hello")).unwrap();
    let next = guest.another(|_| {});
    let error = guest.h.moved_to(next, 0).err().unwrap().to_string();
    assert!(error.contains("hello") && error.contains("close it"), "{error}");
    // The session is as it was.
    assert_eq!(guest.read(node, handle, 0, 5), b"hello");
    guest.ok(op::RELEASE, node, &body!(handle, 0u32, 0u32, 0u64), 0);
    guest.moved();
    assert_eq!(guest.errno(op::GETATTR, node, &body!(0u32, 0u32, 0u64)), libc::EBADF);
    guest.forget(node, 1);
    assert_eq!(guest.counter("inodes"), 0);
}

#[test]
fn a_directory_that_has_changed_is_refused_where_a_file_is_open() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    guest.open(node, libc::O_RDWR);
    let state = guest.h.device.save().unwrap();
    // Only read from now on.
    let mut next = guest.another(|options| options.readonly = true);
    assert!(next.restore(state.clone()).is_err());
    // Another file of that name; the first one stays there, so that its number is not used again.
    std::fs::rename(guest.path("hello"), guest.path("moved")).unwrap();
    std::fs::write(guest.path("hello"), "another").unwrap();
    let error = guest.another(|_| {}).restore(state).err().unwrap().to_string();
    assert!(error.contains("share/hello"), "{error}");
}

#[test]
fn states_that_no_guest_has_are_refused() {
    let mut guest = Guest::new();
    let node = guest.lookup(ROOT, "hello");
    guest.open(node, libc::O_RDONLY);
    let good = guest.h.device.save().unwrap();
    let cases: [(&str, Value); 9] = [
        ("/known/0/inode", json!(1)),
        ("/known/0/count", json!(0)),
        ("/known/0/path", json!("../secret")),
        ("/known/0/path", json!("/etc/passwd")),
        ("/known/0/path", json!("hello\0")),
        ("/open/0/number", json!(u64::MAX)),
        ("/last_handle", json!(u64::MAX)),
        ("/last_handle", json!(0)),
        ("/open/0/inode", json!(7)),
    ];
    for (pointer, value) in cases {
        let mut state = good.clone();
        *state.pointer_mut(pointer).unwrap() = value.clone();
        let outcome = guest.another(|_| {}).restore(state);
        assert!(outcome.is_err(), "{pointer} {value}");
    }
    let mut twice = good.clone();
    let open = twice["open"][0].clone();
    twice["open"].as_array_mut().unwrap().push(open);
    assert!(guest.another(|_| {}).restore(twice).is_err());
    let few = |options: &mut FsOptions| options.limits.handles = 0;
    let error = guest.another(few).restore(good.clone()).err().unwrap().to_string();
    assert!(error.contains("limit of open files"), "{error}");
    guest.another(|_| {}).restore(good).unwrap();
}
