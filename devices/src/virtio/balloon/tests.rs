//! The balloon through real virtqueues; the host's side is a list, or a memory file whose blocks are counted.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Mutex;

use super::*;
use crate::virtio::testing::{Buf, Harness, RawBuf, TEST_MEMORY_SIZE};

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Call {
    Discard(u64, u64),
    Provide(u64, u64),
}

#[derive(Default)]
struct Host {
    calls: Mutex<Vec<Call>>,
    /// Backs the discarded ranges, if there.
    file: Option<File>,
    refuse: bool,
}

impl Host {
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Reclaim for Host {
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        if self.refuse {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.calls.lock().unwrap().push(Call::Discard(gpa, len));
        match &self.file {
            Some(file) => vmm_sys_util::fallocate::fallocate(
                file,
                vmm_sys_util::fallocate::FallocateMode::PunchHole,
                true,
                gpa,
                len,
            )
            .map_err(Into::into),
            None => Ok(()),
        }
    }

    fn provide(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Provide(gpa, len));
        Ok(())
    }
}

const ALL: BalloonOptions = BalloonOptions {
    size: 0,
    deflate_on_oom: true,
    free_page_reporting: true,
};

fn balloon(host: Host) -> (Harness<Balloon>, Arc<Host>) {
    let host = Arc::new(host);
    let mut h = Harness::new(Balloon::new(ALL, Arc::clone(&host) as Arc<dyn Reclaim>).unwrap());
    h.activate().unwrap();
    (h, host)
}

fn numbers(pages: impl IntoIterator<Item = u32>) -> Vec<u8> {
    pages.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn count(h: &Harness<Balloon>, name: &str) -> u64 {
    h.device.counters().iter().find(|c| c.0 == name).unwrap().1
}

#[test]
fn neighbours_go_together_in_whatever_order_they_come() {
    let (mut h, host) = balloon(Host::default());
    h.push(
        INFLATE,
        &[Buf::Read(&numbers([9, 7, 8, 8, 3])), Buf::Read(&numbers([4, 100, 6]))],
    );
    h.kick(INFLATE).unwrap();
    let expected = [(3, 2), (6, 4), (100, 1)].map(|(page, n)| Call::Discard(page * PAGE, n * PAGE));
    assert_eq!(host.calls(), expected);
    assert_eq!(count(&h, "inflated_bytes"), 7 * PAGE);
    h.push(DEFLATE, &[Buf::Read(&numbers([8, 7]))]);
    h.kick(DEFLATE).unwrap();
    assert_eq!(host.calls(), [Call::Provide(7 * PAGE, 2 * PAGE)]);
    assert_eq!((h.used(INFLATE).len(), h.used(DEFLATE).len()), (1, 1));
    assert_eq!((h.interrupts(INFLATE), h.interrupts(DEFLATE)), (1, 1));
}

#[test]
fn pages_that_are_not_there_or_private_are_refused_and_the_others_taken() {
    let (mut h, host) = balloon(Host::default());
    h.gate.make_private(20 * PAGE, 1);
    let last = u32::try_from(TEST_MEMORY_SIZE / PAGE - 1).unwrap();
    h.push(INFLATE, &[Buf::Read(&numbers([20, 22, last, last + 5, u32::MAX]))]);
    h.kick(INFLATE).unwrap();
    assert_eq!(
        host.calls(),
        [
            Call::Discard(22 * PAGE, PAGE),
            Call::Discard(u64::from(last) * PAGE, PAGE)
        ]
    );
    assert_eq!(count(&h, "refused_ranges"), 3);
    // A run with one private page is refused as a whole.
    h.push(INFLATE, &[Buf::Read(&numbers(19..22))]);
    // Numbers that cannot be read, or are not meant to be.
    h.push_raw(
        INFLATE,
        &[RawBuf {
            gpa: u64::MAX - 8,
            len: 64,
            writable: false,
        }],
    );
    h.push(INFLATE, &[Buf::Read(&numbers([40])), Buf::Write(16)]);
    h.kick(INFLATE).unwrap();
    assert_eq!(host.calls(), []);
    assert_eq!(h.used(INFLATE).len(), 4);
    assert_eq!(count(&h, "refused_ranges"), 6);
}

#[test]
fn free_pages_are_really_given_back() {
    let file = File::from(memory_file());
    file.write_all_at(&vec![1; TEST_MEMORY_SIZE as usize], 0).unwrap();
    let full = file.metadata().unwrap().blocks();
    let host = Host {
        file: Some(file.try_clone().unwrap()),
        ..Host::default()
    };
    let (mut h, host) = balloon(host);
    let lent = |gpa, len| RawBuf {
        gpa,
        len,
        writable: true,
    };
    h.push_raw(REPORTING, &[lent(32 << 20, 16 << 20), lent((8 << 20) + 100, 3 * 4096)]);
    h.push(INFLATE, &[Buf::Read(&numbers(256..512))]);
    h.kick(REPORTING).unwrap();
    h.kick(INFLATE).unwrap();
    assert_eq!(
        host.calls(),
        [
            Call::Discard(32 << 20, 16 << 20),
            Call::Discard((8 << 20) + 4096, 2 * 4096),
            Call::Discard(1 << 20, 1 << 20)
        ]
    );
    let given = full - file.metadata().unwrap().blocks();
    assert_eq!(given * 512, (17 << 20) + 2 * 4096);
    assert_eq!(count(&h, "reported_bytes"), (16 << 20) + 2 * 4096);
}

/// A memory file without a name.
fn memory_file() -> std::os::fd::OwnedFd {
    let dir = std::path::Path::new("/dev/shm");
    let file = if dir.is_dir() {
        tempfile::tempfile_in(dir)
    } else {
        tempfile::tempfile()
    };
    file.unwrap().into()
}

#[test]
fn reported_ranges_that_are_none_are_refused() {
    let (mut h, host) = balloon(Host::default());
    h.gate.make_private(0x80_0000, 1);
    let raw = |gpa, len, writable| RawBuf { gpa, len, writable };
    for buf in [
        raw(0x40_0000, 0x1000, false),
        raw(0x40_0001, 0x1000, true),
        raw(0x40_0000, 0xFFF, true),
        raw(0x7F_F000, 0x2000, true),
        raw(TEST_MEMORY_SIZE - 0x1000, 0x2000, true),
        raw(u64::MAX - 10, 0x2000, true),
        raw(0x1000, u32::MAX, true),
    ] {
        h.push_raw(REPORTING, &[buf]);
        h.kick(REPORTING).unwrap();
        assert_eq!(host.calls(), [], "{buf:x?}");
        assert_eq!(h.used(REPORTING).len(), 1);
    }
    assert_eq!(count(&h, "refused_ranges"), 7);
}

#[test]
fn a_chain_counts_up_to_its_limit_and_a_turn_ends() {
    let (mut h, host) = balloon(Host::default());
    let far_apart = numbers((0..2000).map(|i| 2 * i));
    let bufs = h.place(&[Buf::Read(&far_apart)]);
    for _ in 0..100 {
        h.push_raw(INFLATE, &bufs);
    }
    h.kick(INFLATE).unwrap();
    assert_eq!(host.calls().len(), TURN, "two chains of 1024 ranges");
    assert_eq!(h.used(INFLATE).len(), 2);
    let mut turns = 0;
    while h.poll_events(0).unwrap() {
        turns += 1;
    }
    assert_eq!(turns, 50, "the last finds nothing");
    assert_eq!(h.used(INFLATE).len(), 98);
}

#[test]
fn the_size_is_asked_for_told_once_and_answered() {
    let (mut h, _host) = balloon(Host::default());
    let handle = h.device.handle();
    let config = |h: &Harness<Balloon>| {
        let mut bytes = [0xEE; 10];
        h.device.read_config(0, &mut bytes);
        bytes
    };
    assert_eq!(config(&h), [0; 10]);
    handle.resize(256 << 20).unwrap();
    handle.resize(512 << 20).unwrap();
    assert!(h.poll_events(0).unwrap());
    assert_eq!(h.config_interrupt.count(), 1);
    assert_eq!(config(&h), [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    h.device.write_config(4, &0x1_0000_u32.to_le_bytes());
    h.device.write_config(0, &[9; 4]);
    h.device.write_config(5, &[9; 4]);
    h.device.write_config(4, &[9; 3]);
    h.device.write_config(u64::MAX, &[9; 8]);
    assert_eq!((handle.wanted_size(), handle.actual_size()), (512 << 20, 256 << 20));
    assert_eq!(handle.resize(4095), Err(BalloonSizeError(4095)));
    assert_eq!(handle.resize(1 << 44), Err(BalloonSizeError(1 << 44)));
    assert_eq!(handle.wanted_size(), 512 << 20);
    h.reset();
    assert_eq!(handle.actual_size(), 0);
    handle.resize(0).unwrap();
    assert!(h.poll_events(0).unwrap());
    h.activate().unwrap();
    assert_eq!(h.config_interrupt.count(), 1, "without a driver nobody is told");
}

#[test]
fn features_and_queues_are_those_asked_for() {
    let bare = Balloon::new(BalloonOptions::default(), Arc::new(Host::default())).unwrap();
    assert_eq!(bare.queue_max_sizes(), [128, 128]);
    assert_eq!(bare.features() & 0xFF, 0);
    let (h, _host) = balloon(Host::default());
    assert_eq!(h.device.queue_max_sizes(), [128, 128, 32]);
    assert_eq!(h.device.features() & 0xFF, 1 << 2 | 1 << 5);
    let odd = BalloonOptions { size: 1, ..ALL };
    let error = Balloon::new(odd, Arc::new(Host::default())).err().unwrap();
    assert!(error.to_string().contains("multiple of 4096"));
}

#[test]
fn a_host_that_takes_nothing_fails_no_request() {
    let (mut h, _host) = balloon(Host {
        refuse: true,
        ..Host::default()
    });
    h.push(INFLATE, &[Buf::Read(&numbers([1, 3]))]);
    h.kick(INFLATE).unwrap();
    assert_eq!(h.used(INFLATE).len(), 1);
    assert_eq!((count(&h, "failed_ranges"), count(&h, "inflated_bytes")), (2, 0));
}
