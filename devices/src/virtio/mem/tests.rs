//! The device as Linux's virtio-mem driver uses it, and as a driver that wants to break it does.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::sync::lock;
use crate::virtio::testing::{Buf, Completed, Harness, RawBuf};

const START: u64 = 4 << 30;
/// Blocks of the area.
const COUNT: u64 = 100;

/// The host's memory: what was provided and discarded, and whether the next call fails.
#[derive(Default)]
struct Host {
    calls: Mutex<Vec<(&'static str, u64, u64)>>,
    broken: Mutex<bool>,
}

impl Host {
    fn note(&self, what: &'static str, gpa: u64, len: u64) -> io::Result<()> {
        if *lock(&self.broken) {
            return Err(io::Error::from(io::ErrorKind::OutOfMemory));
        }
        lock(&self.calls).push((what, (gpa - START) / BLOCK_SIZE, len / BLOCK_SIZE));
        Ok(())
    }

    fn take(&self) -> Vec<(&'static str, u64, u64)> {
        std::mem::take(&mut lock(&self.calls))
    }
}

impl Reclaim for Host {
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.note("discard", gpa, len)
    }
    fn provide(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.note("provide", gpa, len)
    }
}

struct Guest {
    h: Harness<Mem>,
    host: Arc<Host>,
    handle: MemHandle,
}

fn bytes(kind: u16, gpa: u64, blocks: u16) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

fn answer(done: &Completed) -> (u16, u16) {
    assert_eq!((done.len as usize, &done.data[2..8]), (RESPONSE_LEN, [0; 6].as_slice()));
    (
        u16::from_le_bytes([done.data[0], done.data[1]]),
        u16::from_le_bytes([done.data[8], done.data[9]]),
    )
}

impl Guest {
    fn new() -> Self {
        let host = Arc::new(Host::default());
        let blocks = Arc::new(Blocks::new(START, COUNT * BLOCK_SIZE, BLOCK_SIZE).unwrap());
        let device = Mem::new(blocks, None, host.clone()).unwrap();
        let handle = device.handle();
        let mut h = Harness::new(device);
        h.activate().unwrap();
        Self { h, host, handle }
    }

    /// The monitor asks for `blocks` blocks, and the event loop turns.
    fn request(&mut self, blocks: u64) {
        self.handle.request(blocks * BLOCK_SIZE).unwrap();
        while self.h.poll_events(0).unwrap() {}
    }

    fn raw(&mut self, kind: u16, gpa: u64, blocks: u16) -> (u16, u16) {
        self.h.push(0, &[Buf::Read(&bytes(kind, gpa, blocks)), Buf::Write(10)]);
        self.h.kick(0).unwrap();
        answer(&self.h.completed(0)[0])
    }

    /// The answer to a request for `blocks` blocks from block `first` on.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> u16 {
        self.raw(kind, START + first * BLOCK_SIZE, blocks).0
    }

    fn config(&self, at: u64) -> u64 {
        let mut data = [0xEE; 8];
        self.h.device.read_config(at, &mut data);
        u64::from_le_bytes(data)
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

use request::{PLUG, STATE, UNPLUG, UNPLUG_ALL};
const ACK: u16 = Answer::Ack as u16;
const NACK: u16 = Answer::Nack as u16;
const BUSY: u16 = Answer::Busy as u16;
const ERROR: u16 = Answer::Error as u16;

#[test]
fn the_configuration_space_is_the_specifications() {
    let mut g = Guest::new();
    assert_eq!(
        [0, 8, 16, 24, 32, 40, 48].map(|at| g.config(at)),
        [BLOCK_SIZE, 0, START, COUNT * BLOCK_SIZE, COUNT * BLOCK_SIZE, 0, 0]
    );
    assert_eq!((g.config(56), g.config(u64::MAX)), (0, 0));
    g.request(3);
    assert_eq!(g.ask(PLUG, 5, 2), ACK);
    assert_eq!((g.config(40), g.config(48)), (2 * BLOCK_SIZE, 3 * BLOCK_SIZE));
    let mut half = [0; 4];
    g.h.device.write_config(48, &[0xFF; 8]);
    g.h.device.read_config(48, &mut half);
    assert_eq!(u64::from(u32::from_le_bytes(half)), 3 * BLOCK_SIZE);
    assert_eq!(g.h.device.features() & 3, 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    let blocks = Arc::clone(g.handle.blocks());
    let device = Mem::new(blocks, Some(7), g.host.clone()).unwrap();
    let mut node = [0; 2];
    device.read_config(8, &mut node);
    assert_eq!((u16::from_le_bytes(node), device.features() & 3), (7, 3));
}

#[test]
fn memory_grows_to_what_was_asked_for_and_shrinks_again() {
    let mut g = Guest::new();
    assert_eq!(g.ask(PLUG, 0, 1), NACK, "nothing was asked for");
    g.request(10);
    assert_eq!(g.h.config_interrupt.count(), 1);
    assert_eq!(g.ask(PLUG, 0, 8), ACK);
    assert_eq!(g.ask(PLUG, 8, 3), NACK, "one too many");
    assert_eq!(g.ask(PLUG, 99, 2), ERROR, "beyond the area");
    assert_eq!(g.ask(PLUG, 98, 2), ACK);
    assert_eq!(g.handle.plugged_size(), 10 * BLOCK_SIZE);
    assert_eq!(g.host.take(), [("provide", 0, 8), ("provide", 98, 2)]);
    g.request(4);
    assert_eq!(g.h.config_interrupt.count(), 2);
    assert_eq!(g.ask(UNPLUG, 4, 4), ACK);
    assert_eq!(g.ask(UNPLUG, 98, 2), ACK);
    assert_eq!(g.host.take(), [("discard", 4, 4), ("discard", 98, 2)]);
    assert_eq!(g.ask(PLUG, 50, 1), NACK);
    assert_eq!(g.handle.blocks().runs(), [(START, 4 * BLOCK_SIZE)]);
    assert_eq!((g.counter("plugged_blocks"), g.counter("unplugged_blocks")), (10, 6));
}

#[test]
fn states_are_told() {
    let mut g = Guest::new();
    g.request(COUNT);
    assert_eq!(g.ask(PLUG, 60, 10), ACK);
    let at = |block: u64| START + block * BLOCK_SIZE;
    for (first, blocks, state) in [(60, 10, 0), (0, 60, 1), (70, 30, 1), (59, 2, 2), (0, 100, 2)] {
        assert_eq!(g.raw(STATE, at(first), blocks), (ACK, state), "{first}+{blocks}");
    }
    assert_eq!(g.raw(STATE, at(0), 101), (ERROR, 0));
    assert_eq!(g.raw(STATE, at(0), 0), (ERROR, 0));
}

#[test]
fn everything_goes_at_once() {
    let mut g = Guest::new();
    assert_eq!(g.ask(UNPLUG_ALL, 77, 9), ACK);
    assert_eq!(g.host.take(), [], "there was nothing");
    g.request(COUNT);
    for block in (0..COUNT).step_by(2) {
        assert_eq!(g.ask(PLUG, block, 1), ACK);
    }
    g.host.take();
    assert_eq!(g.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(g.host.take(), [("discard", 0, COUNT)]);
    assert_eq!(g.handle.plugged_size(), 0);
    assert_eq!(g.ask(PLUG, 0, 100), ACK, "all of it can come again");
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let mut g = Guest::new();
    g.request(COUNT);
    assert_eq!(g.ask(PLUG, 10, 10), ACK);
    g.host.take();
    for (kind, first, blocks) in [
        (PLUG, 19, 2),
        (PLUG, 0, 0),
        (PLUG, 0, 101),
        (PLUG, 100, 1),
        (UNPLUG, 9, 2),
        (UNPLUG, 19, 2),
        (UNPLUG, 10, 0),
        (UNPLUG, 0, 100),
        (4, 0, 1),
        (0xFFFF, 0, 1),
    ] {
        assert_eq!(g.ask(kind, first, blocks), ERROR, "{kind} {first}+{blocks}");
    }
    for gpa in [
        0,
        START - BLOCK_SIZE,
        START + 4096,
        START + 1,
        u64::MAX,
        u64::MAX - BLOCK_SIZE + 1,
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(g.raw(kind, gpa, 1).0, ERROR, "{kind} {gpa:#x}");
            assert_eq!(g.raw(kind, gpa, u16::MAX).0, ERROR, "{kind} {gpa:#x}");
        }
    }
    assert_eq!((g.host.take(), g.handle.plugged_size()), (vec![], 10 * BLOCK_SIZE));
}

#[test]
fn a_host_that_cannot_is_busy_and_nothing_changes() {
    let mut g = Guest::new();
    g.request(COUNT);
    assert_eq!(g.ask(PLUG, 0, 5), ACK);
    *lock(&g.host.broken) = true;
    assert_eq!(g.ask(PLUG, 5, 5), BUSY);
    assert_eq!(g.ask(UNPLUG, 0, 5), BUSY);
    assert_eq!(g.ask(UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(g.handle.plugged_size(), 5 * BLOCK_SIZE);
    *lock(&g.host.broken) = false;
    assert_eq!(g.ask(UNPLUG, 0, 5), ACK);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let mut g = Guest::new();
    g.request(7);
    for size in [1, BLOCK_SIZE + 4096, (COUNT + 1) * BLOCK_SIZE, u64::MAX] {
        let error = g.handle.request(size).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{size} bytes")) && error.contains("2097152"),
            "{error}"
        );
    }
    assert!(!g.h.poll_events(0).unwrap());
    assert_eq!(
        (g.handle.requested_size(), g.config(48)),
        (7 * BLOCK_SIZE, 7 * BLOCK_SIZE)
    );
    // The same size again is no change.
    g.request(7);
    assert_eq!(g.h.config_interrupt.count(), 1);
}

#[test]
fn a_driver_that_comes_late_is_told_and_plugged_memory_outlives_a_reset() {
    let mut g = Guest::new();
    g.request(10);
    assert_eq!(g.ask(PLUG, 0, 10), ACK);
    g.h.reset();
    g.request(20);
    assert_eq!(g.h.config_interrupt.count(), 1, "nobody to tell");
    g.h.kick(0).unwrap();
    g.h.activate().unwrap();
    assert_eq!(g.h.config_interrupt.count(), 2);
    assert_eq!((g.config(40), g.config(48)), (10 * BLOCK_SIZE, 20 * BLOCK_SIZE));
    // A size that the event loop has not seen yet bounds already.
    g.handle.request(10 * BLOCK_SIZE).unwrap();
    assert_eq!(g.ask(PLUG, 10, 1), NACK);
    assert_eq!(g.ask(UNPLUG_ALL, 0, 0), ACK);
}

#[test]
fn chains_of_any_shape_come_back() {
    let mut g = Guest::new();
    g.request(COUNT);
    let plug = bytes(PLUG, START, 1);
    let state = bytes(STATE, START, 1);
    // Split over descriptors, and the answer before the request.
    g.h.push(
        0,
        &[
            Buf::Write(3),
            Buf::Read(&plug[..5]),
            Buf::Read(&plug[5..]),
            Buf::Write(4),
            Buf::Write(100),
        ],
    );
    g.h.push_indirect(0, &[Buf::Read(&state), Buf::Read(&[9; 50]), Buf::Write(10)]);
    g.h.kick(0).unwrap();
    let done = g.h.completed(0);
    assert_eq!(done.iter().map(answer).collect::<Vec<_>>(), [(ACK, 0), (ACK, 0)]);
    assert_eq!(done[0].data[10..], [0xAA; 97]);
    // No room for an answer: nothing is done.
    let unplug = bytes(UNPLUG, START, 1);
    g.h.push(0, &[Buf::Read(&unplug), Buf::Write(9)]);
    g.h.push(0, &[Buf::Read(&unplug)]);
    // Too short.
    g.h.push(0, &[Buf::Read(&unplug[..23]), Buf::Write(10)]);
    g.h.push(0, &[Buf::Write(10)]);
    g.h.kick(0).unwrap();
    let done = g.h.completed(0);
    assert_eq!(done.iter().map(|c| c.len).collect::<Vec<_>>(), [0, 0, 10, 10]);
    assert_eq!((answer(&done[2]).0, answer(&done[3]).0), (ERROR, ERROR));
    assert_eq!((g.handle.plugged_size(), g.counter("failed_requests")), (BLOCK_SIZE, 2));
}

#[test]
fn private_and_absent_buffers_are_errors_of_their_request() {
    let mut g = Guest::new();
    g.request(COUNT);
    let place = |g: &mut Guest| g.h.place(&[Buf::Read(&bytes(PLUG, START, 1)), Buf::Write(10)]);
    let page = g.h.alloc(4096);
    g.h.gate.make_private(page, 4096);
    for gpa in [page, page + 4090, u64::MAX - 4, START] {
        let good = place(&mut g);
        let bad = RawBuf { gpa, ..good[0] };
        g.h.push_raw(0, &[bad, good[1]]);
        g.h.kick(0).unwrap();
        assert_eq!(answer(&g.h.completed(0)[0]).0, ERROR, "{gpa:#x}");
        let bad = RawBuf { gpa, ..good[1] };
        g.h.push_raw(0, &[good[0], bad]);
        g.h.kick(0).unwrap();
        assert_eq!(g.h.used(0)[0].1, 0, "{gpa:#x}");
        assert_eq!(g.ask(UNPLUG_ALL, 0, 0), ACK);
    }
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let mut g = Guest::new();
    g.request(COUNT);
    for block in 0..60 {
        let plug = bytes(PLUG, START + block * BLOCK_SIZE, 1);
        g.h.push(0, &[Buf::Read(&plug), Buf::Write(10)]);
    }
    g.h.kick(0).unwrap();
    assert_eq!(g.handle.plugged_size(), u64::from(TURN) * BLOCK_SIZE);
    while g.h.poll_events(0).unwrap() {}
    assert_eq!(g.handle.plugged_size(), 60 * BLOCK_SIZE);
    assert_eq!((g.h.completed(0).len(), g.h.interrupts(0)), (60, 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn requests_agree_with_a_model(ops in proptest::collection::vec((0u16..5, 0u64..110, 0u16..12, 0u64..=COUNT), 1..40)) {
        let mut g = Guest::new();
        let (mut model, mut requested) = ([false; COUNT as usize], 0);
        for (op, first, blocks, size) in ops {
            let end = first + u64::from(blocks);
            let inside = blocks > 0 && end <= COUNT;
            let range = if inside { first as usize..end as usize } else { 0..0 };
            let plugged = model[range.clone()].iter().filter(|on| **on).count();
            let total = model.iter().filter(|on| **on).count() as u64;
            let expected = match op {
                PLUG if !inside || plugged > 0 => ERROR,
                PLUG if total + u64::from(blocks) > requested => NACK,
                UNPLUG if !inside || plugged < usize::from(blocks) => ERROR,
                STATE if !inside => ERROR,
                _ => ACK,
            };
            if op == 4 {
                g.request(size);
                requested = size;
                continue;
            }
            prop_assert_eq!(g.ask(op, first, blocks), expected);
            match op {
                PLUG | UNPLUG if expected == ACK => model[range].fill(op == PLUG),
                UNPLUG_ALL => model.fill(false),
                _ => {}
            }
            let total = model.iter().filter(|on| **on).count() as u64;
            prop_assert_eq!(g.handle.plugged_size(), total * BLOCK_SIZE);
        }
    }
}

#[test]
fn a_device_without_plugged_memory_is_saved() {
    let mut g = Guest::new();
    g.request(2);
    assert_eq!(g.ask(PLUG, 0, 2), ACK);
    let refused = |g: &mut Guest| g.h.device.save().err().unwrap().to_string();
    assert!(refused(&mut g).contains(&format!("{} bytes", 2 * BLOCK_SIZE)));
    g.request(0);
    assert!(refused(&mut g).contains("vm.resize"));
    assert_eq!(g.ask(UNPLUG, 0, 2), ACK);
    let mut next = Guest::new();
    let handle = next.handle.clone();
    next.h.reset();
    let features = g.h.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
    drop(g.h.moved_to(next.h.device, features).unwrap());
    handle.request(BLOCK_SIZE).unwrap();
    while g.h.poll_events(0).unwrap() {}
    assert_eq!(g.ask(PLUG, 3, 1), ACK);
    assert_eq!(handle.plugged_size(), BLOCK_SIZE);
    assert!(g.h.device.restore(Value::Bool(true)).is_err());
}
