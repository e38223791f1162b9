//! Persistent memory through a real queue; the files and sizes that cannot be.

use std::fs::File;
use std::sync::Mutex;

use super::*;
use crate::virtio::testing::{Buf, Harness, RawBuf};

const START: u64 = 1 << 40;

/// Places everything at [`START`], and remembers what.
#[derive(Default)]
struct Mapper(Mutex<Vec<(u64, bool)>>);

struct Place;

impl MappedFile for Place {
    fn start(&self) -> u64 {
        START
    }
}

impl FileMapper for Mapper {
    fn map(&self, file: &File, len: u64, private: bool) -> io::Result<Box<dyn MappedFile>> {
        if file.metadata()?.len() < len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.0.lock().unwrap().push((len, private));
        Ok(Box::new(Place))
    }
}

fn file(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn options(file: &tempfile::NamedTempFile) -> PmemOptions {
    PmemOptions {
        path: file.path().to_owned(),
        size: None,
        discard_writes: false,
    }
}

fn device(options: PmemOptions) -> Harness<Pmem> {
    let mut h = Harness::new(Pmem::open(options, &Mapper::default()).unwrap());
    h.activate().unwrap();
    h
}

fn count(h: &Harness<Pmem>, name: &str) -> u64 {
    h.device.counters().iter().find(|c| c.0 == name).unwrap().1
}

fn finish(h: &mut Harness<Pmem>, chains: usize) -> Vec<Vec<u8>> {
    let mut done = Vec::new();
    while done.len() < chains {
        done.extend(h.completed(0).into_iter().map(|d| d.data[..d.len as usize].to_vec()));
        if done.len() < chains {
            assert!(h.poll_events(60_000).unwrap(), "the end of a flush wakes the loop");
        }
    }
    done
}

#[test]
fn flushes_are_answered_together() {
    let file = file(ALIGNMENT);
    let mut h = device(options(&file));
    for _ in 0..5 {
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
        h.kick(0).unwrap();
    }
    assert_eq!(finish(&mut h, 5), vec![vec![0; 4]; 5]);
    assert_eq!(count(&h, "flushes"), 5);
    assert!((1..=5).contains(&count(&h, "host_flushes")));
    h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    h.kick(0).unwrap();
    h.reset();
    h.activate().unwrap();
    h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    h.kick(0).unwrap();
    assert_eq!(finish(&mut h, 1), [[0; 4]]);
}

#[test]
fn requests_that_are_none_fail_alone() {
    let file = file(ALIGNMENT);
    let mut h = device(options(&file));
    h.push(0, &[Buf::Read(&[1, 0, 0, 0]), Buf::Write(4)]);
    h.push(0, &[Buf::Read(&[0; 4])]);
    h.push(0, &[Buf::Write(4)]);
    h.push(0, &[Buf::Read(&[0; 3]), Buf::Write(4)]);
    h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(3)]);
    let gpa = u64::MAX - 4;
    h.push_raw(
        0,
        &[RawBuf {
            gpa,
            len: 4,
            writable: false,
        }],
    );
    h.kick(0).unwrap();
    let mut expected = vec![vec![]; 6];
    expected[0] = vec![0xFF; 4];
    assert_eq!(finish(&mut h, 6), expected);
    assert_eq!((count(&h, "failed_requests"), count(&h, "host_flushes")), (6, 0));
}

#[test]
fn a_driver_that_repeats_a_chain_makes_nothing_grow() {
    let file = file(ALIGNMENT);
    let mut h = device(options(&file));
    let chain = h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    let (avail, used) = (h.queues[0].avail_ring(), h.queues[0].used_ring());
    // Every slot of the ring holds the same chain, and all of them are made available again and again.
    for slot in 0..u64::from(QUEUE_SIZE) {
        h.write(avail + 4 + 2 * slot, &chain.head.to_le_bytes());
    }
    let mut idx = 1_u16;
    for _ in 0..20 {
        idx = idx.wrapping_add(QUEUE_SIZE - 1);
        h.write(avail + 2, &idx.to_le_bytes());
        h.kick(0).unwrap();
        let active = h.device.active.as_ref().unwrap();
        assert!(active.next.len().max(active.current.len()) <= usize::from(QUEUE_SIZE));
        while u16::from_le_bytes(h.read(used + 2, 2).try_into().unwrap()) != idx {
            assert!(h.poll_events(60_000).unwrap());
        }
    }
    while h.poll_events(0).unwrap() {}
}

#[test]
fn a_snapshot_waits_for_the_file_and_goes_on_where_the_guest_has_it() {
    let (file, copy) = (file(ALIGNMENT), file(ALIGNMENT));
    let features = 1 << VIRTIO_RING_F_INDIRECT_DESC;
    let open = |file| Pmem::open(options(file), &Mapper::default()).unwrap();
    let mut h = Harness::new(open(&file));
    h.activate_with(features).unwrap();
    for _ in 0..3 {
        h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    }
    h.kick(0).unwrap();
    let old = h.moved_to(open(&copy), features).unwrap();
    assert_eq!(old.flushes, 3, "nothing is under way in a snapshot");
    assert_eq!(h.completed(0).len(), 3);
    h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    h.kick(0).unwrap();
    assert_eq!(finish(&mut h, 1), [[0; 4]]);
    let large = self::file(2 * ALIGNMENT);
    let error = h.moved_to(open(&large), features).err().unwrap();
    assert!(error.to_string().contains("2097152 bytes"), "{error}");
}

#[test]
fn a_private_mapping_needs_no_host() {
    let file = file(2 * ALIGNMENT);
    let shared = PmemOptions {
        discard_writes: true,
        ..options(&file)
    };
    let mut h = device(shared.clone());
    let _second = Pmem::open(shared, &Mapper::default()).unwrap();
    h.push(0, &[Buf::Read(&[0; 4]), Buf::Write(4)]);
    h.kick(0).unwrap();
    assert_eq!(finish(&mut h, 1), [[0; 4]]);
    assert_eq!(count(&h, "host_flushes"), 0);
    let error = Pmem::open(options(&file), &Mapper::default()).err().unwrap();
    assert!(matches!(error, PmemError::File { .. }), "{error}");
    let mut config = [0xEE; 18];
    h.device.read_config(0, &mut config);
    assert_eq!(config[..8], START.to_le_bytes());
    assert_eq!(config[8..], [0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn sizes_that_cannot_be_mapped_are_refused() {
    for len in [0, 1, ALIGNMENT - 1, ALIGNMENT + 4096] {
        let error = Pmem::open(options(&file(len)), &Mapper::default()).err().unwrap();
        assert!(error.to_string().contains(&format!("{len} bytes")), "{error}");
    }
    let file = file(2 * ALIGNMENT + 4096);
    for size in [0, 4096, ALIGNMENT + 1, 3 * ALIGNMENT, u64::MAX] {
        let wanted = PmemOptions {
            size: Some(size),
            ..options(&file)
        };
        let error = Pmem::open(wanted, &Mapper::default()).err().unwrap();
        assert!(error.to_string().contains(&size.to_string()), "{error}");
    }
}

#[test]
fn a_part_of_a_file_or_a_file_of_its_own() {
    let file = file(2 * ALIGNMENT + 4096);
    let mapper = Mapper::default();
    let part = PmemOptions {
        size: Some(ALIGNMENT),
        ..options(&file)
    };
    drop(Pmem::open(part, &mapper).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let made = |size| PmemOptions {
        path: dir.path().to_owned(),
        size,
        discard_writes: false,
    };
    let h = Pmem::open(made(Some(2 * ALIGNMENT)), &mapper).unwrap();
    assert_eq!(*mapper.0.lock().unwrap(), [(ALIGNMENT, false), (2 * ALIGNMENT, false)]);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nobody else can open it"
    );
    drop(h);
    let error = Pmem::open(made(None), &mapper).err().unwrap();
    assert!(matches!(error, PmemError::NoSize { .. }), "{error}");
}
