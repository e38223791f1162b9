//! The disk through a real virtqueue, on io_uring and on plain system calls alike.
#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};

use tempfile::{NamedTempFile, TempDir};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::virtio::testing::{Buf, Completed, Harness, RawBuf, TEST_MEMORY_SIZE};

mod hostile;
mod size;

const SECTORS: u64 = 2048;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&content(0, (SECTORS * 512) as usize)).unwrap();
    file
}

fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    out.truncate(len);
    out
}

fn open(path: &Path, change: impl FnOnce(&mut BlkOptions)) -> Harness<Blk> {
    let mut options = BlkOptions::new(path);
    change(&mut options);
    let mut h = Harness::new(Blk::open(options).unwrap());
    h.activate().unwrap();
    h
}

/// Runs `test` on io_uring (where there is one) and on plain calls.
fn on_both(test: impl Fn(&dyn Fn(&mut BlkOptions))) {
    test(&|_| {});
    test(&|options| options.disable_io_uring = true);
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend([0; 4]);
    out.extend(sector.to_le_bytes());
    out
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut out = sector.to_le_bytes().to_vec();
    out.extend(count.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out
}

/// Waits until nothing is in flight and `count` chains came back.
fn wait(h: &mut Harness<Blk>, queue: usize, count: usize) -> Vec<Completed> {
    let mut done = h.completed(queue);
    while done.len() < count {
        assert!(
            h.poll_events(10_000).unwrap(),
            "only {} of {count} chains came back",
            done.len()
        );
        done.extend(h.completed(queue));
    }
    assert_eq!(done.len(), count);
    done
}

fn run(h: &mut Harness<Blk>, bufs: &[Buf<'_>]) -> Completed {
    h.push(0, bufs);
    h.kick(0).unwrap();
    wait(h, 0, 1).remove(0)
}

fn run_raw(h: &mut Harness<Blk>, bufs: &[RawBuf]) -> Completed {
    h.push_raw(0, bufs);
    h.kick(0).unwrap();
    wait(h, 0, 1).remove(0)
}

fn status(done: &Completed) -> u8 {
    *done.data.last().unwrap()
}

fn counter(h: &Harness<Blk>, name: &str) -> u64 {
    h.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

fn read(h: &mut Harness<Blk>, sector: u64, len: u32) -> Completed {
    run(
        h,
        &[
            Buf::Read(&header(VIRTIO_BLK_T_IN, sector)),
            Buf::Write(len),
            Buf::Write(1),
        ],
    )
}

fn write(h: &mut Harness<Blk>, sector: u64, data: &[u8]) -> u8 {
    let done = run(
        h,
        &[
            Buf::Read(&header(VIRTIO_BLK_T_OUT, sector)),
            Buf::Read(data),
            Buf::Write(1),
        ],
    );
    assert_eq!(done.len, 1);
    status(&done)
}

fn ranged(h: &mut Harness<Blk>, kind: u32, ranges: &[u8]) -> u8 {
    let done = run(h, &[Buf::Read(&header(kind, 0)), Buf::Read(ranges), Buf::Write(1)]);
    assert_eq!(done.len, 1);
    status(&done)
}

fn disk_bytes(path: &Path, sector: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut out, sector * 512).unwrap();
    out
}

#[test]
fn io_uring_is_used_where_the_kernel_has_it() {
    let image = image();
    let h = open(image.path(), |_| {});
    match io_uring::IoUring::new(2) {
        Ok(_) => assert!(h.device.uses_io_uring()),
        Err(e) => eprintln!("skipped: no io_uring here: {e}"),
    }
    drop(h);
    let h = open(image.path(), |options| options.disable_io_uring = true);
    assert!(!h.device.uses_io_uring());
}

#[test]
fn reads_and_writes_reach_the_file() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        let done = read(&mut h, 3, 8192);
        assert_eq!((done.len, status(&done)), (8193, 0));
        assert_eq!(
            done.data[..8192],
            content(0, (SECTORS * 512) as usize)[3 * 512..][..8192]
        );
        let data = content(7, 64 << 10);
        assert_eq!(write(&mut h, 100, &data), 0);
        assert_eq!(disk_bytes(image.path(), 100, data.len()), data);
        assert_eq!(read(&mut h, 100, 64 << 10).data[..data.len()], data);
        assert_eq!(counter(&h, "read_ops"), 2);
        assert_eq!(counter(&h, "read_bytes"), 8192 + (64 << 10));
        assert_eq!((counter(&h, "write_ops"), counter(&h, "write_bytes")), (1, 64 << 10));
        assert_eq!(counter(&h, "failed_ops"), 0);
        assert_eq!(h.device.in_flight(), 0);
    });
}

#[test]
fn scattered_buffers_of_any_framing() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        // Header in two pieces, the first data behind it in the same descriptor, empty descriptors between.
        let data = content(9, 1024);
        let head = header(VIRTIO_BLK_T_OUT, 10);
        let mut second = head[5..].to_vec();
        second.extend(&data[..100]);
        let bufs = [
            Buf::Read(&head[..5]),
            Buf::Read(&[]),
            Buf::Read(&second),
            Buf::Read(&data[100..777]),
            Buf::Read(&data[777..]),
            Buf::Write(1),
        ];
        assert_eq!(status(&run(&mut h, &bufs)), 0);
        assert_eq!(disk_bytes(image.path(), 10, 1024), data);
        // The status byte in the last data descriptor; through an indirect table as well.
        let head = header(VIRTIO_BLK_T_IN, 10);
        let bufs = [Buf::Read(&head), Buf::Write(500), Buf::Write(525)];
        let done = run(&mut h, &bufs);
        assert_eq!((done.len, status(&done)), (1025, 0));
        assert_eq!(done.data[..1024], data);
        h.push_indirect(0, &bufs);
        h.kick(0).unwrap();
        let done = wait(&mut h, 0, 1).remove(0);
        assert_eq!((done.len, &done.data[..1024]), (1025, data.as_slice()));
    });
}

#[test]
fn a_batch_is_one_interrupt() {
    let image = image();
    let mut h = open(image.path(), |options| options.disable_io_uring = true);
    for sector in 0..20 {
        h.push(
            0,
            &[
                Buf::Read(&header(VIRTIO_BLK_T_IN, sector)),
                Buf::Write(512),
                Buf::Write(1),
            ],
        );
    }
    h.kick(0).unwrap();
    assert_eq!(wait(&mut h, 0, 20).len(), 20);
    assert_eq!(h.interrupts(0), 1);
}

#[test]
fn many_rounds_on_a_full_queue() {
    on_both(|engine| {
        let image = image();
        let all = fs::read(image.path()).unwrap();
        let mut h = open(image.path(), engine);
        let features = h.device.features();
        assert_ne!(features & 1 << VIRTIO_RING_F_EVENT_IDX, 0);
        h.device.reset();
        h.activate_with(features).unwrap();
        for round in 0..20_u64 {
            let heads: Vec<_> = (0..42)
                .map(|i| {
                    let sector = (round * 97 + i * 31) % SECTORS;
                    let head = header(VIRTIO_BLK_T_IN, sector);
                    (
                        h.push(0, &[Buf::Read(&head), Buf::Write(512), Buf::Write(1)]).head,
                        sector,
                    )
                })
                .collect();
            h.kick(0).unwrap();
            for done in wait(&mut h, 0, 42) {
                let sector = heads.iter().find(|(head, _)| *head == done.head).unwrap().1;
                assert_eq!((done.len, status(&done)), (513, 0));
                assert_eq!(done.data[..512], all[sector as usize * 512..][..512]);
            }
        }
    });
}

#[test]
fn flush_and_id() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), |options| {
            engine(options);
            options.serial = Some("pod-disk-0".into());
        });
        let done = run(&mut h, &[Buf::Read(&header(VIRTIO_BLK_T_FLUSH, 0)), Buf::Write(1)]);
        assert_eq!((done.len, status(&done)), (1, 0));
        assert_eq!(counter(&h, "flush_ops"), 1);
        let done = run(
            &mut h,
            &[
                Buf::Read(&header(VIRTIO_BLK_T_GET_ID, 0)),
                Buf::Write(20),
                Buf::Write(1),
            ],
        );
        assert_eq!((done.len, status(&done)), (21, 0));
        assert_eq!(&done.data[..20], b"pod-disk-0\0\0\0\0\0\0\0\0\0\0");
        let done = run(
            &mut h,
            &[Buf::Read(&header(VIRTIO_BLK_T_GET_ID, 0)), Buf::Write(4), Buf::Write(1)],
        );
        assert_eq!((done.len, &done.data[..4]), (5, b"pod-".as_slice()));
    });
    let image = image();
    let mut h = open(image.path(), |_| {});
    let done = run(
        &mut h,
        &[
            Buf::Read(&header(VIRTIO_BLK_T_GET_ID, 0)),
            Buf::Write(20),
            Buf::Write(1),
        ],
    );
    let inode = image.as_file().metadata().unwrap().ino().to_string();
    let told = String::from_utf8(done.data[..20].to_vec()).unwrap();
    assert!(
        told.contains(&inode) || told.len() == 20,
        "{told:?} is made of the inode {inode}"
    );
}

#[test]
fn discard_makes_holes() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        let before = image.as_file().metadata().unwrap().blocks();
        let mut ranges = range(0, 512, 0);
        ranges.extend(range(1024, 512, 0));
        ranges.extend(range(5, 0, 0));
        if h.device.features() & 1 << VIRTIO_BLK_F_DISCARD == 0 {
            eprintln!("skipped: the temporary file system cannot punch holes");
            assert_eq!(ranged(&mut h, VIRTIO_BLK_T_DISCARD, &ranges), UNSUPP);
            return;
        }
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_DISCARD, &ranges), 0);
        assert_eq!(image.as_file().metadata().unwrap().blocks(), before - 1024);
        assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
        assert_eq!(read(&mut h, 1024, 4096).data[..4096], [0; 4096]);
        assert_eq!(
            read(&mut h, 512, 512).data[..512],
            content(0, 1 << 20)[512 * 512..][..512]
        );
        assert_eq!(counter(&h, "discard_ops"), 1);
        // Unknown flags, too long, out of range, too many, half a range.
        for (ranges, expected) in [
            (range(0, 8, 1), UNSUPP),
            (range(0, 8, 4), UNSUPP),
            (range(SECTORS, 1, 0), IOERR),
            (range(SECTORS - 1, 2, 0), IOERR),
            (range(u64::MAX, 2, 0), IOERR),
            (range(0, u32::MAX, 0), IOERR),
            (range(0, 8, 0).repeat(33), IOERR),
            (range(0, 8, 0)[..15].to_vec(), IOERR),
        ] {
            assert_eq!(ranged(&mut h, VIRTIO_BLK_T_DISCARD, &ranges), expected, "{ranges:?}");
        }
        assert_eq!(
            read(&mut h, 512, 512).data[..512],
            content(0, 1 << 20)[512 * 512..][..512]
        );
    });
}

#[test]
fn write_zeroes_with_and_without_unmap() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        let before = image.as_file().metadata().unwrap().blocks();
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(3, 700, 0)), 0);
        assert_eq!(disk_bytes(image.path(), 3, 700 * 512), vec![0; 700 * 512]);
        assert_eq!(
            image.as_file().metadata().unwrap().blocks(),
            before,
            "without unmap the space stays"
        );
        assert_eq!(disk_bytes(image.path(), 2, 512), content(0, 1 << 20)[1024..][..512]);
        assert_eq!(
            disk_bytes(image.path(), 703, 512),
            content(0, 1 << 20)[703 * 512..][..512]
        );
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(1024, 1024, 1)), 0);
        assert_eq!(disk_bytes(image.path(), 1024, 1024 * 512), vec![0; 1024 * 512]);
        if h.device.features() & 1 << VIRTIO_BLK_F_DISCARD != 0 {
            assert_eq!(image.as_file().metadata().unwrap().blocks(), before - 1024);
        }
        assert_eq!(counter(&h, "write_zeroes_ops"), 2);
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(0, 8, 2)), UNSUPP);
        assert_eq!(
            ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(SECTORS - 7, 8, 1)),
            IOERR
        );
        assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
    });
}

/// tmpfs has no ZERO_RANGE: the zeros are written.
#[test]
fn write_zeroes_where_the_file_system_cannot() {
    let Ok(dir) = TempDir::new_in("/dev/shm") else {
        eprintln!("skipped: no /dev/shm");
        return;
    };
    let path = dir.path().join("disk");
    let len = 8 << 20;
    fs::write(&path, content(3, len)).unwrap();
    on_both(|engine| {
        let mut h = open(&path, engine);
        assert_eq!(write(&mut h, 0, &content(3, 16384)), 0);
        let sectors = u32::try_from(len / 512 - 8).unwrap();
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(1, sectors, 0)), 0);
        assert_eq!(
            disk_bytes(&path, 1, sectors as usize * 512),
            vec![0; sectors as usize * 512]
        );
        assert_eq!(disk_bytes(&path, 0, 512), content(3, 512));
        assert_eq!(
            disk_bytes(&path, u64::from(sectors) + 1, 512),
            content(3, len)[len - 7 * 512..][..512]
        );
    });
}

#[test]
fn sparse_off_keeps_the_space() {
    let image = image();
    let mut h = open(image.path(), |options| options.sparse = false);
    assert_eq!(h.device.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(ranged(&mut h, VIRTIO_BLK_T_DISCARD, &range(0, 64, 0)), UNSUPP);
    let before = image.as_file().metadata().unwrap().blocks();
    assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(0, 512, 1)), 0);
    assert_eq!(image.as_file().metadata().unwrap().blocks(), before);
}

#[test]
fn readonly_disks_are_not_written() {
    on_both(|engine| {
        let image = image();
        let before = fs::read(image.path()).unwrap();
        let mut h = open(image.path(), |options| {
            engine(options);
            options.readonly = true;
        });
        assert_ne!(h.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(h.device.features() & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
        assert_eq!(write(&mut h, 0, &[1; 512]), IOERR);
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_DISCARD, &range(0, 8, 0)), IOERR);
        assert_eq!(ranged(&mut h, VIRTIO_BLK_T_WRITE_ZEROES, &range(0, 8, 0)), IOERR);
        assert_eq!(status(&read(&mut h, 0, 512)), 0);
        assert_eq!(
            status(&run(
                &mut h,
                &[Buf::Read(&header(VIRTIO_BLK_T_FLUSH, 0)), Buf::Write(1)]
            )),
            0
        );
        assert_eq!(fs::read(image.path()).unwrap(), before);
    });
}

/// Chains that end in the air: a loop, a `next` behind the table, an indirect table that is no table.
#[test]
fn direct_io_of_any_alignment() {
    on_both(|engine| {
        let image = image();
        let mut options = BlkOptions::new(image.path());
        engine(&mut options);
        options.direct = true;
        let device = match Blk::open(options) {
            Ok(device) => device,
            Err(e @ BlkError::Direct { .. }) => {
                eprintln!("skipped: {e}");
                return;
            }
            Err(e) => panic!("{e}"),
        };
        let mut h = Harness::new(device);
        h.activate().unwrap();
        let mut expected = fs::read(image.path()).unwrap();
        let base = h.alloc(1 << 20);
        // (sector, bytes, offset of the guest buffer in its page)
        let cases = [
            (0, 4096, 0),
            (8, 8192, 0),
            (8, 4096, 16),
            (3, 512, 0),
            (5, 1536, 7),
            (16, 65536, 1),
            (2047, 512, 3),
        ];
        for (round, (sector, len, shift)) in cases.into_iter().enumerate() {
            let data = content(round as u64 + 50, len as usize);
            h.write(base + shift, &data);
            let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_OUT, sector)), Buf::Write(1)]);
            let done = run_raw(
                &mut h,
                &[
                    bufs[0],
                    RawBuf {
                        gpa: base + shift,
                        len,
                        writable: false,
                    },
                    bufs[1],
                ],
            );
            assert_eq!(status(&done), 0);
            expected[sector as usize * 512..][..len as usize].copy_from_slice(&data);
            h.write(base, &vec![0; 70000]);
            let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_IN, sector)), Buf::Write(1)]);
            let done = run_raw(
                &mut h,
                &[
                    bufs[0],
                    RawBuf {
                        gpa: base + shift,
                        len,
                        writable: true,
                    },
                    bufs[1],
                ],
            );
            assert_eq!((done.len, status(&done)), (len + 1, 0));
            assert_eq!(
                done.data[..len as usize],
                data,
                "sector {sector}, {len} bytes, shift {shift}"
            );
        }
        assert!(fs::read(image.path()).unwrap() == expected);
        // A bounced buffer is checked, too.
        h.gate.make_private(base, 4096);
        let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_IN, 0)), Buf::Write(1)]);
        let done = run_raw(
            &mut h,
            &[
                bufs[0],
                RawBuf {
                    gpa: base + 8,
                    len: 4096,
                    writable: true,
                },
                bufs[1],
            ],
        );
        assert_eq!(status(&done), IOERR);
    });
}

#[test]
fn configuration_space() {
    let image = image();
    let mut h = open(image.path(), |options| options.num_queues = 3);
    let get = |h: &Harness<Blk>, offset, len| {
        let mut data = vec![0xFF; len];
        h.device.read_config(offset, &mut data);
        data
    };
    assert_eq!(get(&h, 0, 8), SECTORS.to_le_bytes());
    assert_eq!(get(&h, 12, 4), 126_u32.to_le_bytes());
    assert_eq!(get(&h, 20, 4), 512_u32.to_le_bytes());
    assert_eq!(get(&h, 34, 2), 3_u16.to_le_bytes());
    assert_eq!(get(&h, 48, 8), [0, 0, 2, 0, 1, 0, 0, 0]);
    assert_ne!(h.device.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(get(&h, 58, 8), [0; 8], "bytes behind the structure are zero");
    assert_eq!(get(&h, u64::MAX, 4), [0; 4]);
    // Only `writeback` is writable, and only with 0 or 1.
    h.device.write_config(0, &[0xEE; 32]);
    h.device.write_config(33, &[0xEE; 100]);
    h.device.write_config(u64::MAX, &[1]);
    h.device.write_config(32, &[2]);
    assert_eq!(
        (get(&h, 0, 8), get(&h, 32, 1)),
        (SECTORS.to_le_bytes().to_vec(), vec![1])
    );
    h.device.write_config(32, &[0]);
    assert_eq!(get(&h, 32, 1), [0]);
    assert_eq!(write(&mut h, 0, &[9; 512]), 0);
    assert_eq!(disk_bytes(image.path(), 0, 512), [9; 512]);
    h.reset();
    assert_eq!(get(&h, 32, 1), [1]);
}

#[test]
fn several_queues_and_queues_left_out() {
    let image = image();
    let mut h = open(image.path(), |options| options.num_queues = 4);
    for queue in 0..4 {
        h.push(
            queue,
            &[Buf::Read(&header(VIRTIO_BLK_T_IN, 1)), Buf::Write(512), Buf::Write(1)],
        );
    }
    for queue in [2, 0, 3, 1] {
        h.kick(queue).unwrap();
        assert_eq!(status(&wait(&mut h, queue, 1)[0]), 0);
        assert_eq!(h.interrupts(queue), 1);
    }
    h.kick(4).unwrap();
}

#[test]
fn reset_ends_what_is_in_flight() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        for round in 0..10 {
            for i in 0..40 {
                let head = header(VIRTIO_BLK_T_IN, round * 40 + i);
                h.push(0, &[Buf::Read(&head), Buf::Write(512), Buf::Write(1)]);
            }
            h.push(0, &[Buf::Read(&header(VIRTIO_BLK_T_FLUSH, 0)), Buf::Write(1)]);
            h.kick(0).unwrap();
            h.reset();
            assert_eq!(h.device.in_flight(), 0);
            h.device.on_event(0).unwrap();
            h.activate().unwrap();
            assert_eq!(status(&read(&mut h, 0, 512)), 0);
        }
    });
}

/// A driver that makes the same head available again and again does not grow anything.
#[test]
fn locks_are_shared_for_reading_and_exclusive_for_writing() {
    let image = image();
    let readonly = |readonly| {
        let mut options = BlkOptions::new(image.path());
        options.readonly = readonly;
        Blk::open(options)
    };
    let first = readonly(true).unwrap();
    let second = readonly(true).unwrap();
    let text = readonly(false).err().unwrap().to_string();
    assert!(
        text.contains(&image.path().display().to_string()) && text.contains("read-only"),
        "{text}"
    );
    drop((first, second));
    let writer = readonly(false).unwrap();
    for refused in [true, false] {
        let error = readonly(refused).err().unwrap();
        assert!(matches!(error, BlkError::Locked { .. }), "{error}");
        assert!(error.to_string().contains("writable"), "{error}");
    }
    drop(writer);
    readonly(false).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let refused = |path: &Path, change: &dyn Fn(&mut BlkOptions)| {
        let mut options = BlkOptions::new(path);
        change(&mut options);
        Blk::open(options).err().unwrap().to_string()
    };
    let absent = dir.path().join("absent");
    assert!(refused(&absent, &|_| {}).contains("absent: cannot open it for reading and writing"));
    assert!(refused(dir.path(), &|o| o.readonly = true).contains("it is a directory"));
    assert!(refused(Path::new("/dev/null"), &|_| {}).contains("it is a character device"));
    let image = image();
    for (change, expected) in [
        (
            (&|o: &mut BlkOptions| o.num_queues = 0) as &dyn Fn(&mut BlkOptions),
            "num_queues=0",
        ),
        (&|o| o.num_queues = 257, "num_queues=257"),
        (&|o| o.queue_size = 100, "queue_size=100"),
        (&|o| o.queue_size = 0, "queue_size=0"),
        (&|o| o.serial = Some("x".repeat(21)), "give at most 20 bytes"),
    ] {
        let text = refused(image.path(), change);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn limited_disks_share_their_limit_and_do_all_their_requests() {
    on_both(|change| {
        let one = crate::rate_limiter::TokenBucketConfig {
            size: 1,
            one_time_burst: 0,
            refill_time: 1,
        };
        let limiter = RateLimiter::new(None, Some(one)).unwrap();
        let file = image();
        let limited = |options: &mut BlkOptions| {
            change(options);
            options.readonly = true;
            options.limiter = Some(Arc::clone(&limiter));
        };
        let mut disks = [open(file.path(), limited), open(file.path(), limited)];
        for h in &mut disks {
            for sector in 0..8 {
                h.push(
                    0,
                    &[
                        Buf::Read(&header(VIRTIO_BLK_T_IN, sector)),
                        Buf::Write(512),
                        Buf::Write(1),
                    ],
                );
            }
            h.kick(0).unwrap();
        }
        let mut done = [Vec::new(), Vec::new()];
        while done.iter().any(|done| done.len() < 8) {
            for (h, done) in disks.iter_mut().zip(&mut done) {
                if done.len() < 8 {
                    assert!(h.poll_events(60_000).unwrap(), "the timer wakes the loop");
                }
                done.extend(h.completed(0).into_iter().map(|one| one.data));
            }
        }
        let mut expected: Vec<Vec<u8>> = content(0, 8 * 512).chunks(512).map(|s| [s, &[0]].concat()).collect();
        expected.sort();
        for mut done in done {
            done.sort();
            assert!(done == expected);
        }
        // At rest: neither timer nor event.
        for h in &mut disks {
            while h.poll_events(0).unwrap() {}
        }
    });
}

#[test]
fn a_saved_disk_is_at_rest_and_another_goes_on() {
    on_both(|change| {
        let file = image();
        let copy = image();
        let mut h = open(file.path(), |o| {
            change(o);
            o.queue_size = 64;
        });
        h.device.write_config(32, &[0]);
        for i in 0..8 {
            h.push(
                0,
                &[Buf::Read(&header(VIRTIO_BLK_T_IN, i)), Buf::Write(512), Buf::Write(1)],
            );
        }
        h.kick(0).unwrap();
        // Not looked at yet when the disk is saved.
        h.push(
            0,
            &[Buf::Read(&header(VIRTIO_BLK_T_IN, 8)), Buf::Write(512), Buf::Write(1)],
        );
        let mut options = BlkOptions::new(copy.path());
        change(&mut options);
        options.queue_size = 64;
        let features = h.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        let mut old = h.moved_to(Blk::open(options).unwrap(), features).unwrap();
        assert_eq!(old.in_flight(), 0);
        let done = wait(&mut h, 0, 9);
        let bytes = content(0, 9 * 512);
        for (completed, sector) in done.iter().zip(bytes.chunks(512)) {
            assert_eq!((&completed.data[..512], completed.data[512]), (sector, 0));
        }
        let mut writeback = [1];
        h.device.read_config(32, &mut writeback);
        assert_eq!(writeback, [0]);
        // The one that was saved goes on as well.
        old.on_event(0).unwrap();
        assert!(h.device.restore(serde_json::json!("on")).is_err());
    });
}
