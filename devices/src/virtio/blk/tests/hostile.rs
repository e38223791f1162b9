//! What a hostile driver may send: every chain comes back, the disk keeps its size, the device goes on.

use std::fs;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::*;

#[test]
fn requests_outside_the_disk_fail() {
    let image = image();
    let mut h = open(image.path(), |_| {});
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX >> 9, 1024),
        (1 << 55, 512),
    ] {
        let done = read(&mut h, sector, len);
        assert_eq!((done.len, status(&done)), (1, IOERR), "sector {sector:#x}");
        assert_eq!(write(&mut h, sector, &vec![0; len as usize]), IOERR);
    }
    for len in [0, 1, 511, 513] {
        assert_eq!(status(&read(&mut h, 0, len)), IOERR, "length {len}");
    }
    assert_eq!(fs::metadata(image.path()).unwrap().len(), SECTORS * 512);
    assert_eq!(status(&read(&mut h, SECTORS - 1, 512)), 0);
}

#[test]
fn malformed_chains_come_back_and_the_queue_goes_on() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        let head = header(VIRTIO_BLK_T_IN, 0);
        let out = header(VIRTIO_BLK_T_OUT, 0);
        let id = header(VIRTIO_BLK_T_GET_ID, 0);
        let answered: &[(&[Buf<'_>], u8)] = &[
            (&[Buf::Read(&head[..15]), Buf::Write(512), Buf::Write(1)], IOERR),
            (&[Buf::Write(16), Buf::Write(512), Buf::Write(1)], IOERR),
            (&[Buf::Read(&head), Buf::Read(&[0; 512]), Buf::Write(1)], IOERR),
            (&[Buf::Read(&out), Buf::Write(512), Buf::Write(1)], IOERR),
            (
                &[Buf::Read(&out), Buf::Read(&[0; 512]), Buf::Write(512), Buf::Write(1)],
                IOERR,
            ),
            (&[Buf::Read(&id), Buf::Write(1)], IOERR),
            (&[Buf::Read(&header(VIRTIO_BLK_T_SCSI_CMD, 0)), Buf::Write(1)], UNSUPP),
            (
                &[Buf::Read(&header(VIRTIO_BLK_T_SECURE_ERASE, 0)), Buf::Write(1)],
                UNSUPP,
            ),
            (&[Buf::Read(&header(u32::MAX, 0)), Buf::Write(1)], UNSUPP),
        ];
        for (bufs, expected) in answered {
            let done = run(&mut h, bufs);
            assert_eq!((done.len, status(&done)), (1, *expected), "{bufs:?}");
        }
        let unanswered: &[&[Buf<'_>]] = &[
            &[Buf::Read(&head)],
            &[Buf::Read(&head), Buf::Write(512), Buf::Read(&[0])],
            &[Buf::Read(&head), Buf::Write(512), Buf::Write(0)],
        ];
        for bufs in unanswered {
            assert_eq!(run(&mut h, bufs).len, 0, "{bufs:?}");
        }
        assert_eq!(counter(&h, "malformed_chains"), unanswered.len() as u64);
        assert_eq!(counter(&h, "failed_ops"), (answered.len() + unanswered.len()) as u64);
        assert_eq!(status(&read(&mut h, 0, 512)), 0);
    });
}

#[test]
fn broken_chains_come_back_empty() {
    let image = image();
    let mut h = open(image.path(), |_| {});
    let table = h.queues[0].desc_table();
    let buffer = h.alloc(4096);
    let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
    for (flags, target) in [(next | write, 0_u16), (next, 0), (next, 999), (4, 0), (4 | next, 1)] {
        let chain = h.push_raw(
            0,
            &[RawBuf {
                gpa: buffer,
                len: 16,
                writable: false,
            }],
        );
        let at = table + 16 * u64::from(chain.head);
        let target = if target == 0 { chain.head } else { target };
        h.write(at + 12, &flags.to_le_bytes());
        h.write(at + 14, &target.to_le_bytes());
        h.kick(0).unwrap();
        assert_eq!(wait(&mut h, 0, 1)[0].len, 0, "flags {flags:#x}");
    }
    assert_eq!(status(&read(&mut h, 0, 512)), 0);
}

#[test]
fn addresses_that_wrap_or_are_absent_fail_their_request() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        for gpa in [TEST_MEMORY_SIZE - 256, TEST_MEMORY_SIZE, u64::MAX - 255, 1 << 63] {
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_GET_ID] {
                // The serial fits before the end of memory.
                if kind == VIRTIO_BLK_T_GET_ID && gpa < TEST_MEMORY_SIZE {
                    continue;
                }
                let mut bufs = h.place(&[Buf::Read(&header(kind, 0)), Buf::Write(1)]);
                let writable = kind != VIRTIO_BLK_T_OUT;
                bufs.insert(
                    1,
                    RawBuf {
                        gpa,
                        len: 512,
                        writable,
                    },
                );
                let chain = h.push_raw(0, &bufs);
                h.kick(0).unwrap();
                let done = wait(&mut h, 0, 1).remove(0);
                assert_eq!((done.head, done.len), (chain.head, 1));
                assert_eq!(status(&done), IOERR, "{gpa:#x}");
            }
            // The header, then the status byte.
            let bufs = h.place(&[Buf::Write(512), Buf::Write(1)]);
            let done = run_raw(
                &mut h,
                &[
                    RawBuf {
                        gpa,
                        len: 16,
                        writable: false,
                    },
                    bufs[0],
                    bufs[1],
                ],
            );
            let expected = if gpa == TEST_MEMORY_SIZE - 256 { 0 } else { IOERR };
            assert_eq!(status(&done), expected);
            let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_IN, 0)), Buf::Write(512)]);
            let done = run_raw(
                &mut h,
                &[
                    bufs[0],
                    bufs[1],
                    RawBuf {
                        gpa,
                        len: 257,
                        writable: true,
                    },
                ],
            );
            assert_eq!(done.len, 0);
        }
    });
}

#[test]
fn private_pages_are_refused_and_the_device_goes_on() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        let secret = h.alloc(4096);
        h.write(secret, &[0x5A; 4096]);
        let before = fs::read(image.path()).unwrap();
        h.gate.make_private(secret, 4096);
        let data = |len, writable| RawBuf {
            gpa: secret,
            len,
            writable,
        };
        for (kind, writable) in [
            (VIRTIO_BLK_T_IN, true),
            (VIRTIO_BLK_T_OUT, false),
            (VIRTIO_BLK_T_GET_ID, true),
        ] {
            let bufs = h.place(&[Buf::Read(&header(kind, 0)), Buf::Write(1)]);
            let done = run_raw(&mut h, &[bufs[0], data(512, writable), bufs[1]]);
            assert_eq!((done.len, status(&done)), (1, IOERR));
        }
        // A buffer that begins in a shared page and ends in a private one.
        let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_OUT, 0)), Buf::Write(1)]);
        let straddling = RawBuf {
            gpa: secret - 256,
            len: 512,
            writable: false,
        };
        assert_eq!(status(&run_raw(&mut h, &[bufs[0], straddling, bufs[1]])), IOERR);
        // A private header; a private status byte.
        let bufs = h.place(&[Buf::Write(512), Buf::Write(1)]);
        assert_eq!(status(&run_raw(&mut h, &[data(16, false), bufs[0], bufs[1]])), IOERR);
        let bufs = h.place(&[Buf::Read(&header(VIRTIO_BLK_T_OUT, 0)), Buf::Read(&[1; 512])]);
        assert_eq!(run_raw(&mut h, &[bufs[0], bufs[1], data(1, true)]).len, 0);
        h.gate.make_shared(secret, 4096);
        assert_eq!(h.read(secret, 4096), [0x5A; 4096]);
        assert_eq!(
            fs::read(image.path()).unwrap(),
            before,
            "nothing was written, not even without a status"
        );
        assert_eq!(status(&read(&mut h, 0, 512)), 0);
    });
}

#[test]
fn a_file_cut_short_is_an_error_of_the_request() {
    on_both(|engine| {
        let image = image();
        let mut h = open(image.path(), engine);
        image.as_file().set_len(10 * 512 + 100).unwrap();
        assert_eq!(status(&read(&mut h, 9, 512)), 0);
        assert_eq!(status(&read(&mut h, 10, 512)), IOERR);
        assert_eq!(status(&read(&mut h, 100, 4096)), IOERR);
        assert_eq!(status(&read(&mut h, 0, 512)), 0);
    });
}

#[test]
fn a_head_made_available_twice_is_bounded() {
    let image = image();
    let mut h = open(image.path(), |options| options.queue_size = 4);
    let chain = h.push(
        0,
        &[Buf::Read(&header(VIRTIO_BLK_T_IN, 0)), Buf::Write(512), Buf::Write(1)],
    );
    let avail = h.queues[0].avail_ring();
    for round in 1..200_u16 {
        for slot in 0..4 {
            h.write(avail + 4 + 2 * slot, &chain.head.to_le_bytes());
        }
        h.write(avail + 2, &(1 + round * 4).to_le_bytes());
        // An index too far ahead is an error of the queue, which the transport answers with NEEDS_RESET.
        if h.kick(0).is_err() {
            break;
        }
        assert!(h.device.in_flight() <= 4);
    }
    h.device.reset();
    assert_eq!(h.device.in_flight(), 0);
}

/// One descriptor of a random chain.
fn random_buf() -> impl Strategy<Value = RawBuf> {
    let gpa = prop_oneof![
        8 => (16_u64 << 20)..(17 << 20),
        1 => Just(TEST_MEMORY_SIZE - 100),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        Just(0),
        Just(1),
        Just(16),
        Just(512),
        Just(4096),
        0..2000_u32,
        any::<u32>()
    ];
    (gpa, len, any::<bool>()).prop_map(|(gpa, len, writable)| RawBuf { gpa, len, writable })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever the chain, it comes back, the disk keeps its size, and the next good request works.
    #[test]
    fn any_chain_comes_back(
        chains in prop::collection::vec(prop::collection::vec(random_buf(), 1..6), 1..8),
        kind in prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        sector in prop_oneof![0..SECTORS, any::<u64>()],
        plain in any::<bool>(),
    ) {
        let image = image();
        let mut h = open(image.path(), |options| options.disable_io_uring = plain);
        for chain in &chains {
            let mut bufs = h.place(&[Buf::Read(&header(kind, sector))]);
            bufs.extend(chain);
            h.push_raw(0, &bufs);
        }
        h.kick(0).unwrap();
        let used = h.queues[0].used_ring() + 2;
        while usize::from(u16::from_le_bytes([h.read(used, 1)[0], h.read(used + 1, 1)[0]])) < chains.len() {
            prop_assert!(h.poll_events(10_000).unwrap());
        }
        prop_assert_eq!(h.device.in_flight(), 0);
        h.reset();
        h.activate().unwrap();
        prop_assert_eq!(status(&read(&mut h, 0, 512)), 0);
        prop_assert_eq!(fs::metadata(image.path()).unwrap().len(), SECTORS * 512);
    }

    /// Writes and reads of random sectors agree with a model.
    #[test]
    fn reads_see_writes(
        steps in prop::collection::vec((0..SECTORS - 64, 1..64_usize, any::<u64>()), 1..20),
        plain in any::<bool>(),
    ) {
        let image = image();
        let mut model = fs::read(image.path()).unwrap();
        let mut h = open(image.path(), |options| options.disable_io_uring = plain);
        for (sector, count, seed) in steps {
            let data = content(seed, count * 512);
            prop_assert_eq!(write(&mut h, sector, &data), 0);
            model[sector as usize * 512..][..data.len()].copy_from_slice(&data);
        }
        let done = read(&mut h, 0, (SECTORS * 512) as u32);
        prop_assert_eq!(status(&done), 0);
        prop_assert!(done.data[..model.len()] == model[..]);
    }
}
