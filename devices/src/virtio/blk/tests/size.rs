//! A disk that gets another size while it is used, and what its lock covers.

use super::*;

/// The end of each lock on `path` as the kernel tells it: the last byte, or `EOF`.
fn locks(path: &Path) -> Vec<String> {
    let inode = format!(":{} ", fs::metadata(path).unwrap().ino());
    let all = fs::read_to_string("/proc/locks").unwrap();
    let ours = all
        .lines()
        .filter(|line| line.contains("OFDLCK") && line.contains(&inode));
    let mut ends: Vec<_> = ours
        .map(|line| line.split(' ').next_back().unwrap().to_owned())
        .collect();
    ends.sort();
    ends
}

fn capacity(h: &Harness<Blk>) -> u64 {
    let mut sectors = [0; 8];
    h.device.read_config(0, &mut sectors);
    u64::from_le_bytes(sectors)
}

#[test]
fn a_disk_grows_and_shrinks_under_its_driver() {
    on_both(|change| {
        let file = image();
        let mut h = open(file.path(), change);
        assert_eq!(capacity(&h), SECTORS);
        assert_eq!(status(&read(&mut h, SECTORS, 512)), IOERR);
        h.device.set_capacity((SECTORS + 8) * 512).unwrap();
        assert_eq!((capacity(&h), h.config_interrupt.count()), (SECTORS + 8, 1));
        assert_eq!(file.as_file().metadata().unwrap().len(), (SECTORS + 8) * 512);
        assert_eq!(write(&mut h, SECTORS + 7, &content(3, 512)), 0);
        assert_eq!(disk_bytes(file.path(), SECTORS + 7, 512), content(3, 512));
        assert_eq!(disk_bytes(file.path(), SECTORS, 512), [0; 512]);
        assert_eq!(status(&read(&mut h, SECTORS + 8, 512)), IOERR);

        h.device.set_capacity(1024).unwrap();
        assert_eq!((capacity(&h), h.config_interrupt.count()), (2, 2));
        assert_eq!(status(&read(&mut h, 2, 512)), IOERR);
        assert_eq!(status(&read(&mut h, 1, 512)), 0);
        // The next driver finds that size.
        h.reset();
        h.device.set_capacity(4096).unwrap();
        assert_eq!((capacity(&h), h.config_interrupt.count()), (8, 2), "nobody to tell");
    });
}

#[test]
fn sizes_that_cannot_be_change_nothing() {
    let file = image();
    let mut h = open(file.path(), |_| {});
    let mut refused = |bytes| h.device.set_capacity(bytes).unwrap_err().to_string();
    for bytes in [0, 511, 513] {
        let text = refused(bytes);
        assert!(
            text.contains(&format!("desired_size {bytes}")) && text.contains("multiple of 512"),
            "{text}"
        );
    }
    assert!(refused(u64::MAX - 511).contains("desired_size"));
    assert_eq!((capacity(&h), h.config_interrupt.count()), (SECTORS, 0));
    assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * 512);
    drop(h);
    let mut h = open(file.path(), |options| options.readonly = true);
    assert!(
        h.device
            .set_capacity(512)
            .unwrap_err()
            .to_string()
            .contains("read-only")
    );
    assert_eq!(capacity(&h), SECTORS);
}

#[test]
fn a_lock_covers_the_bytes_or_the_file() {
    let file = image();
    let mut h = open(file.path(), |_| {});
    assert_eq!(locks(file.path()), [(SECTORS * 512 - 1).to_string()]);
    h.device.set_capacity(SECTORS * 1024).unwrap();
    assert_eq!(locks(file.path()), [(SECTORS * 1024 - 1).to_string()]);
    // What another monitor writes does not lie beside it.
    let other = Blk::open(BlkOptions::new(file.path())).err().unwrap();
    assert!(matches!(other, BlkError::Locked { .. }), "{other}");
    drop(h);
    assert!(locks(file.path()).is_empty());
    let whole = |options: &mut BlkOptions| {
        options.lock_range = LockRange::File;
        options.readonly = true;
    };
    let many: Vec<_> = (0..3).map(|_| open(file.path(), whole)).collect();
    assert_eq!(locks(file.path()), ["EOF"; 3]);
    drop(many);
}
