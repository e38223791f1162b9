//! virtio-blk against random chains, headers and rings, on io_uring and on plain calls: every chain comes back, the
//! disk keeps its size, a private page stays as it is.
#![no_main]

#[path = "common/chains.rs"]
mod chains;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use chains::{Input, check_secret, damage, harness, push, used};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::virtio::blk::{Blk, BlkOptions};
use podvisor_devices::virtio::device::VirtioDevice;

const SIZE: u64 = 128 * 512;

/// A disk without a name, in memory where possible.
fn disk() -> &'static File {
    static DISK: OnceLock<File> = OnceLock::new();
    DISK.get_or_init(|| {
        let shm = std::path::Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            shm.to_owned()
        } else {
            std::env::temp_dir()
        };
        let path = dir.join(format!("podvisor-fuzz-blk-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file
    })
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let mut options = BlkOptions::new(format!("/proc/self/fd/{}", disk().as_raw_fd()));
    options.disable_io_uring = flags & 1 != 0;
    options.readonly = flags & 2 != 0;
    options.sparse = flags & 4 == 0;
    options.direct = flags & 8 != 0;
    options.queue_size = 64;
    // A file system without direct I/O refuses it.
    let Ok(device) = Blk::open(options) else {
        return;
    };
    let mut h = harness(device, flags & 16 != 0);
    let pushed = push(&mut h, 0, &mut input, 10);
    let broken = flags & 32 != 0;
    if broken {
        damage(&mut h, 0, &mut input);
    }
    let mut alive = h.kick(0).is_ok();
    while alive && h.device.in_flight() > 0 {
        alive = h.poll_events(1000).is_ok();
    }
    if !broken {
        assert!(alive && used(&h, 0) == pushed, "a chain did not come back");
    }
    check_secret(&h);
    h.device.reset();
    assert_eq!(h.device.in_flight(), 0);
    assert_eq!(disk().metadata().unwrap().len(), SIZE, "the disk changed its size");
    let mut sector = vec![0; SIZE as usize];
    disk().read_exact_at(&mut sector, 0).unwrap();
    assert!(
        !sector.split(|b| *b != chains::SECRET).any(|run| run.len() >= 64),
        "private bytes are on the disk"
    );
});
