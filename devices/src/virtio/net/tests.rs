//! The network device through real virtqueues. Most tests have datagram sockets in place of TAP queues and run
//! everywhere; `tests/host.rs` has those with a real interface.

use std::os::unix::net::UnixDatagram;

use super::*;
use crate::rate_limiter::TokenBucketConfig;
use crate::virtio::testing::{Buf, Harness, RawBuf, TEST_MEMORY_SIZE};

mod host;

const RX: usize = 0;
const TX: usize = 1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A frame with its header, of `len` bytes in all.
fn frame(seed: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend((HEADER_LEN..len).map(|i| seed.wrapping_add((i % 251) as u8)));
    frame
}

fn options() -> NetOptions {
    NetOptions {
        queue_size: 16,
        ..NetOptions::default()
    }
}

fn device(options: &NetOptions) -> (Harness<Net>, Vec<UnixDatagram>) {
    let (ours, theirs) = (0..options.num_queues / 2)
        .map(|_| UnixDatagram::pair().unwrap())
        .unzip::<_, _, Vec<_>, Vec<_>>();
    for socket in &ours {
        socket.set_nonblocking(true).unwrap();
    }
    (Harness::new(Net::with_sockets(options, theirs).unwrap()), ours)
}

/// An active device with one pair.
fn active() -> (Harness<Net>, UnixDatagram) {
    let (mut h, mut host) = device(&options());
    h.activate().unwrap();
    (h, host.remove(0))
}

fn count(h: &Harness<Net>, name: &str) -> u64 {
    h.device.counters().iter().find(|c| c.0 == name).unwrap().1
}

/// Lets the device do all it can; fails when it never rests.
fn settle(h: &mut Harness<Net>) {
    for _ in 0..10_000 {
        if !h.poll_events(0).unwrap() {
            return;
        }
    }
    panic!("the device keeps the event loop busy");
}

/// The frame in what the device gave back, num_buffers checked and cleared; how many buffers it took.
fn received(h: &mut Harness<Net>, queue: usize) -> Vec<(Vec<u8>, usize)> {
    let mut done = h.completed(queue).into_iter();
    let mut out = Vec::new();
    while let Some(first) = done.next() {
        let mut bytes = first.data[..first.len as usize].to_vec();
        let buffers = u16::from_le_bytes([bytes[NUM_BUFFERS], bytes[NUM_BUFFERS + 1]]);
        bytes[NUM_BUFFERS..HEADER_LEN].fill(0);
        for _ in 1..buffers {
            let next = done.next().expect("all buffers of a frame at once");
            bytes.extend(&next.data[..next.len as usize]);
        }
        out.push((bytes, usize::from(buffers)));
    }
    out
}

const NUM_BUFFERS: usize = 10;

#[test]
fn frames_pass_both_ways() {
    let (mut h, host) = active();
    let sent = frame(1, 100);
    h.push(
        TX,
        &[Buf::Read(&sent[..12]), Buf::Read(&sent[12..40]), Buf::Read(&sent[40..])],
    );
    h.push_indirect(TX, &[Buf::Read(&sent[..20]), Buf::Read(&sent[20..])]);
    h.kick(TX).unwrap();
    for _ in 0..2 {
        let mut got = [0; 200];
        assert_eq!(host.recv(&mut got).unwrap(), 100);
        assert_eq!(got[..100], sent);
    }
    assert_eq!(h.used(TX).len(), 2);
    h.push(RX, &[Buf::Write(2000)]);
    h.push(RX, &[Buf::Write(5), Buf::Write(7), Buf::Write(100), Buf::Write(2000)]);
    h.kick(RX).unwrap();
    host.send(&frame(2, 100)).unwrap();
    host.send(&frame(3, 1500)).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(2, 100), 1), (frame(3, 1500), 1)]);
    assert_eq!(h.interrupts(RX), 1, "one interrupt a batch");
    assert_eq!((count(&h, "rx_frames"), count(&h, "rx_bytes")), (2, 1576));
    assert_eq!((count(&h, "tx_frames"), count(&h, "tx_bytes")), (2, 176));
}

#[test]
fn without_buffers_nothing_is_watched_and_nothing_is_lost() {
    let (mut h, host) = active();
    settle(&mut h);
    for i in 0..5 {
        host.send(&frame(i, 64)).unwrap();
    }
    assert!(!h.poll_events(0).unwrap(), "no buffers: frames wake nobody");
    for _ in 0..3 {
        h.push(RX, &[Buf::Write(1526)]);
    }
    h.kick(RX).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX).len(), 3);
    for _ in 0..3 {
        h.push(RX, &[Buf::Write(1526)]);
    }
    h.kick(RX).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(3, 64), 1), (frame(4, 64), 1)]);
}

#[test]
fn a_large_frame_lies_in_several_buffers_with_or_without_a_copy() {
    for event_idx in [0, EVENT_IDX] {
        let (mut h, mut hosts) = device(&options());
        h.activate_with(MERGEABLE | event_idx).unwrap();
        let host = hosts.remove(0);
        // The first is longer than expected, the second is expected, the third short again.
        for len in [20_000, 20_000, 60] {
            for _ in 0..14 {
                h.push_indirect(RX, &[Buf::Write(700), Buf::Write(836)]);
            }
            h.kick(RX).unwrap();
            host.send(&frame(9, len)).unwrap();
            settle(&mut h);
            let got = received(&mut h, RX);
            assert_eq!(got.len(), 1);
            assert!(got[0].0 == frame(9, len));
            assert_eq!(got[0].1, len.div_ceil(1536));
            let unused = 14 - got[0].1;
            for seed in 0..unused {
                host.send(&frame(seed as u8, 1536)).unwrap();
            }
            settle(&mut h);
            assert_eq!(received(&mut h, RX).len(), unused);
        }
    }
}

#[test]
fn a_frame_waits_for_the_rest_of_its_buffers() {
    for event_idx in [0, EVENT_IDX] {
        let (mut h, mut hosts) = device(&options());
        h.activate_with(MERGEABLE | event_idx).unwrap();
        let host = hosts.remove(0);
        h.push(RX, &[Buf::Write(1000)]);
        h.kick(RX).unwrap();
        host.send(&frame(5, 9000)).unwrap();
        host.send(&frame(6, 100)).unwrap();
        settle(&mut h);
        assert!(h.completed(RX).is_empty());
        for _ in 0..7 {
            h.push(RX, &[Buf::Write(1000)]);
            h.kick(RX).unwrap();
        }
        settle(&mut h);
        assert!(h.completed(RX).is_empty());
        h.push(RX, &[Buf::Write(1000)]);
        h.push(RX, &[Buf::Write(1000)]);
        h.kick(RX).unwrap();
        settle(&mut h);
        assert!(received(&mut h, RX) == [(frame(5, 9000), 9), (frame(6, 100), 1)]);
    }
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_the_next_passes() {
    let (mut h, mut hosts) = device(&options());
    let host = hosts.remove(0);
    h.activate_with(MERGEABLE).unwrap();
    for _ in 0..16 {
        h.push(RX, &[Buf::Write(200)]);
    }
    h.kick(RX).unwrap();
    host.send(&frame(1, 9000)).unwrap();
    host.send(&frame(2, 100)).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(2, 100), 1)]);
    assert_eq!(count(&h, "rx_dropped"), 1);
    // Without mergeable buffers a frame has one chain.
    h.reset();
    h.activate_with(0).unwrap();
    h.push(RX, &[Buf::Write(500)]);
    h.push(RX, &[Buf::Write(5000)]);
    h.kick(RX).unwrap();
    host.send(&frame(3, 501)).unwrap();
    host.send(&frame(4, 500)).unwrap();
    host.send(&frame(5, 3000)).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(4, 500), 1), (frame(5, 3000), 1)]);
    assert_eq!(count(&h, "rx_dropped"), 2);
}

#[test]
fn a_driver_is_interrupted_where_it_asked_to_be_when_buffers_come_together() {
    let (mut h, mut hosts) = device(&options());
    let host = hosts.remove(0);
    h.activate_with(MERGEABLE | EVENT_IDX).unwrap();
    // used_event: an interrupt when the third buffer is used.
    let event = h.queues[RX].avail_ring() + 4 + 2 * 16;
    h.write(event, &2_u16.to_le_bytes());
    for _ in 0..8 {
        h.push(RX, &[Buf::Write(1000)]);
    }
    h.kick(RX).unwrap();
    host.send(&frame(0, 2000)).unwrap();
    settle(&mut h);
    assert_eq!((h.completed(RX).len(), h.interrupts(RX)), (2, 0));
    host.send(&frame(0, 3000)).unwrap();
    settle(&mut h);
    assert_eq!((h.completed(RX).len(), h.interrupts(RX)), (3, 1));
    host.send(&frame(0, 2000)).unwrap();
    settle(&mut h);
    assert_eq!(
        (h.completed(RX).len(), h.interrupts(RX)),
        (2, 1),
        "it did not ask again"
    );
}

#[test]
fn bad_chains_come_back_and_cost_nothing_else() {
    let (mut h, host) = active();
    let secret = 48 << 20;
    h.write(secret, &[0x5A; 8192]);
    h.gate.make_private(secret, 4096);
    let good = h.place(&[Buf::Read(&frame(7, 60)), Buf::Write(2000)]);
    let raw = |gpa, len, writable| RawBuf { gpa, len, writable };
    let tx_bad: [&[RawBuf]; 7] = [
        &[raw(good[0].gpa, 12, false)],
        &[raw(good[0].gpa, 60, true)],
        &[good[0], raw(good[1].gpa, 10, true)],
        &[good[0], raw(secret, 100, false)],
        &[good[0], raw(TEST_MEMORY_SIZE - 10, 100, false)],
        &[good[0], raw(u64::MAX - 3, 100, false)],
        &[good[0], raw(32 << 20, 70_000, false)],
    ];
    for bufs in tx_bad {
        h.push_raw(TX, bufs);
        h.kick(TX).unwrap();
        assert_eq!(h.used(TX).len(), 1, "{bufs:?}");
    }
    assert_eq!(count(&h, "tx_malformed_chains"), 7);
    assert!(host.recv(&mut [0; 100]).is_err(), "nothing was sent");
    h.push_raw(TX, &[good[0]]);
    h.kick(TX).unwrap();
    assert_eq!(host.recv(&mut [0; 100]).unwrap(), 60);
    let rx_bad: [&[RawBuf]; 6] = [
        &[raw(good[1].gpa, 11, true)],
        &[raw(good[1].gpa, 2000, false)],
        &[good[1], raw(good[0].gpa, 60, false)],
        &[raw(secret, 2000, true)],
        &[good[1], raw(secret + 4095, 2, true)],
        &[raw(u64::MAX - 3, 2000, true)],
    ];
    for bufs in rx_bad {
        h.push_raw(RX, bufs);
    }
    h.push_raw(RX, &[good[1]]);
    h.kick(RX).unwrap();
    host.send(&frame(8, 90)).unwrap();
    settle(&mut h);
    let done = h.completed(RX);
    assert_eq!(done.iter().map(|d| d.len).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 0, 90]);
    h.gate.make_shared(secret, 4096);
    assert!(h.read(secret, 8192).iter().all(|b| *b == 0x5A));
}

#[test]
fn a_buffer_that_became_private_is_not_written() {
    let (mut h, host) = active();
    let page = h.alloc(4096);
    h.write(page, &[0x5A; 4096]);
    let raw = RawBuf {
        gpa: page,
        len: 4096,
        writable: true,
    };
    h.push_raw(RX, &[raw]);
    h.push(RX, &[Buf::Write(4096)]);
    h.kick(RX).unwrap();
    settle(&mut h);
    h.gate.make_private(page, 4096);
    host.send(&frame(1, 400)).unwrap();
    settle(&mut h);
    let done = h.used(RX);
    assert_eq!(done.iter().map(|d| d.1).collect::<Vec<_>>(), [0, 400]);
    h.gate.make_shared(page, 4096);
    assert_eq!(h.read(page, 4096), [0x5A; 4096]);
}

#[test]
fn a_full_host_queue_keeps_frames_and_order() {
    let (mut h, host) = active();
    let mut sent = 0_u8;
    // Until the socket takes no more.
    while count(&h, "tx_frames") == u64::from(sent) {
        h.push(TX, &[Buf::Read(&frame(sent, 9000))]);
        h.kick(TX).unwrap();
        sent += 1;
        assert!(h.used(TX).len() <= 1);
    }
    settle(&mut h);
    for i in 0..sent {
        let mut got = [0; 9000];
        host.recv(&mut got).unwrap();
        assert!(got[..] == frame(i, 9000));
        settle(&mut h);
    }
    assert_eq!(count(&h, "tx_frames"), u64::from(sent));
    assert_eq!(count(&h, "tx_dropped"), 0);
}

#[test]
fn a_host_that_is_gone_does_not_busy_the_loop() {
    let (mut h, host) = active();
    h.push(RX, &[Buf::Write(2000)]);
    h.kick(RX).unwrap();
    settle(&mut h);
    drop(host);
    h.push(TX, &[Buf::Read(&frame(0, 60))]);
    h.kick(TX).unwrap();
    settle(&mut h);
    assert_eq!(h.used(TX).len(), 1);
    assert_eq!(count(&h, "tx_dropped"), 1);
}

#[test]
fn limited_frames_wait_for_the_timer() {
    let limiter = || {
        let one = TokenBucketConfig {
            size: 1,
            one_time_burst: 1,
            refill_time: 1,
        };
        RateLimiter::new(None, Some(one))
    };
    let options = NetOptions {
        rx_limiter: limiter(),
        tx_limiter: limiter(),
        ..options()
    };
    let (mut h, mut hosts) = device(&options);
    h.activate().unwrap();
    let host = hosts.remove(0);
    for i in 0..8 {
        h.push(RX, &[Buf::Write(2000)]);
        h.push(TX, &[Buf::Read(&frame(i, 60))]);
        host.send(&frame(i, 60)).unwrap();
    }
    h.kick(RX).unwrap();
    h.kick(TX).unwrap();
    while count(&h, "rx_frames") < 8 || count(&h, "tx_frames") < 8 {
        assert!(h.poll_events(60_000).unwrap(), "a timer or a frame wakes the loop");
    }
    assert_eq!(received(&mut h, RX).len(), 8);
    assert_eq!(h.used(TX).len(), 8);
    // A reset in the middle of a wait leaves no timer behind that would stop the next driver.
    h.reset();
    h.activate().unwrap();
    h.push(TX, &[Buf::Read(&frame(0, 60))]);
    h.kick(TX).unwrap();
    while count(&h, "tx_frames") < 9 {
        assert!(h.poll_events(60_000).unwrap());
    }
}

#[test]
fn queue_pairs_are_used_as_the_driver_says() {
    let (mut h, hosts) = device(&NetOptions {
        num_queues: 6,
        ..options()
    });
    h.activate().unwrap();
    let control = 6;
    let pairs = |h: &mut Harness<Net>, count: u16| {
        h.push(
            control,
            &[Buf::Read(&[4, 0]), Buf::Read(&count.to_le_bytes()), Buf::Write(1)],
        );
        h.kick(control).unwrap();
        let done = h.completed(control);
        assert_eq!((done.len(), done[0].len), (1, 1));
        done[0].data[0]
    };
    for (pair, host) in hosts.iter().enumerate() {
        h.push(2 * pair, &[Buf::Write(2000)]);
        h.kick(2 * pair).unwrap();
        host.send(&frame(pair as u8, 60)).unwrap();
    }
    settle(&mut h);
    assert_eq!(received(&mut h, 0).len(), 1);
    assert!(received(&mut h, 2).is_empty() && received(&mut h, 4).is_empty());
    assert_eq!((pairs(&mut h, 0), pairs(&mut h, 4), pairs(&mut h, 3)), (1, 1, 0));
    settle(&mut h);
    assert_eq!(received(&mut h, 2), [(frame(1, 60), 1)]);
    assert_eq!(received(&mut h, 4), [(frame(2, 60), 1)]);
    assert_eq!(pairs(&mut h, 1), 0);
    h.push(3, &[Buf::Read(&frame(0, 60))]);
    h.kick(3).unwrap();
    settle(&mut h);
    assert!(h.used(3).is_empty(), "a pair that is not in use is left alone");
    assert_eq!(pairs(&mut h, 2), 0);
    settle(&mut h);
    assert_eq!(h.used(3).len(), 1);
    // Without MQ the control queue is the third.
    h.reset();
    h.activate_with(1 << VIRTIO_NET_F_CTRL_VQ).unwrap();
    h.push(2, &[Buf::Read(&[4, 0, 1, 0]), Buf::Write(1)]);
    h.kick(2).unwrap();
    assert_eq!(h.completed(2)[0].data, [1]);
}

#[test]
fn commands_are_answered_whatever_they_are() {
    let (mut h, _host) = active();
    let offloads = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let cases = [
        (offloads(csum), 0),
        (offloads(csum | 1 << VIRTIO_NET_F_GUEST_TSO4), 0),
        (offloads(0), 0),
        (offloads(1 << 63), 1),
        (offloads(csum)[..9].to_vec(), 1),
        (vec![0, 0, 1], 1),
        (vec![], 1),
        (vec![4, 0, 1, 0], 1),
        (vec![4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1),
    ];
    for (bytes, answer) in cases {
        h.push(2, &[Buf::Read(&bytes), Buf::Write(1)]);
        h.kick(2).unwrap();
        assert_eq!(h.completed(2)[0].data, [answer], "{bytes:?}");
    }
    h.push(2, &[Buf::Read(&offloads(0))]);
    h.kick(2).unwrap();
    assert_eq!(h.completed(2)[0].len, 0);
}

#[test]
fn the_driver_is_told_what_there_is() {
    let mac = [2, 0, 0, 1, 2, 3];
    let (h, _hosts) = device(&NetOptions {
        mac: Some(mac),
        mtu: Some(1400),
        num_queues: 4,
        ..options()
    });
    let mut config = [0xEE; 14];
    h.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 1, 2, 3, 1, 0, 2, 0, 0x78, 5, 0, 0]);
    h.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 14]);
    let has = |h: &Harness<Net>, bit: u32| h.device.features() & 1 << bit != 0;
    assert!(has(&h, VIRTIO_NET_F_MAC) && has(&h, VIRTIO_NET_F_MTU) && has(&h, VIRTIO_NET_F_MQ));
    assert!(has(&h, VIRTIO_NET_F_HOST_TSO6) && has(&h, VIRTIO_NET_F_GUEST_UFO));
    let (h, _hosts) = device(&NetOptions {
        offload_csum: false,
        ..options()
    });
    assert!(!has(&h, VIRTIO_NET_F_CSUM) && !has(&h, VIRTIO_NET_F_HOST_TSO4) && !has(&h, VIRTIO_NET_F_MQ));
    assert!(!has(&h, VIRTIO_NET_F_MAC) && !has(&h, VIRTIO_NET_F_MTU));
}

#[test]
fn options_that_cannot_be_are_named() {
    let refused = |options: NetOptions| Net::with_sockets(&options, Vec::new()).err().unwrap().to_string();
    for num_queues in [0, 1, 3, 514] {
        let error = refused(NetOptions {
            num_queues,
            ..options()
        });
        assert!(error.starts_with(&format!("net num_queues={num_queues}: ")), "{error}");
    }
    for queue_size in [0, 1, 3, 32769] {
        let error = refused(NetOptions {
            queue_size,
            ..options()
        });
        assert!(error.starts_with(&format!("net queue_size={queue_size}: ")), "{error}");
    }
    assert!(
        refused(NetOptions {
            mtu: Some(67),
            ..options()
        })
        .starts_with("net mtu=67: ")
    );
    let (socket, _other) = UnixDatagram::pair().unwrap();
    let error = Net::from_fds(&options(), vec![socket.into()]).err().unwrap();
    assert!(
        error.to_string().starts_with("net fds[0]: not a usable TAP queue: "),
        "{error}"
    );
    assert!(Net::from_fds(&options(), Vec::new()).is_err());
}

#[test]
fn a_saved_device_gives_its_buffers_to_the_next() {
    let (mut h, host) = active();
    for _ in 0..4 {
        h.push(RX, &[Buf::Write(1526)]);
    }
    h.kick(RX).unwrap();
    host.send(&frame(1, 100)).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(1, 100), 1)]);
    // A frame that needs more buffers than there are: it is lost, its buffers are not.
    host.send(&frame(2, 6000)).unwrap();
    settle(&mut h);
    let (theirs, other) = UnixDatagram::pair().unwrap();
    other.set_nonblocking(true).unwrap();
    let features = h.device.features() & !EVENT_IDX;
    let mut old = h
        .moved_to(Net::with_sockets(&options(), vec![theirs]).unwrap(), features)
        .unwrap();
    assert_eq!(old.counters().iter().find(|c| c.0 == "rx_dropped").unwrap().1, 1);
    for seed in 3..6 {
        other.send(&frame(seed, 200)).unwrap();
    }
    settle(&mut h);
    let expected: Vec<_> = (3..6).map(|seed| (frame(seed, 200), 1)).collect();
    assert_eq!(received(&mut h, RX), expected);
    let sent = frame(9, 64);
    h.push(TX, &[Buf::Read(&sent)]);
    h.kick(TX).unwrap();
    let mut got = [0; 100];
    assert_eq!(other.recv(&mut got).unwrap(), 64);
    old.on_event(0).unwrap();
}

#[test]
fn buffers_held_out_of_order_come_back_empty_when_a_device_is_saved() {
    let (mut h, _host) = active();
    let held = h.push(RX, &[Buf::Write(200)]);
    let bad = h.push(RX, &[Buf::Read(&[0; 200])]);
    h.kick(RX).unwrap();
    settle(&mut h);
    assert_eq!(h.used(RX), [(bad.head, 0)]);
    let (theirs, other) = UnixDatagram::pair().unwrap();
    let features = h.device.features() & !EVENT_IDX;
    drop(
        h.moved_to(Net::with_sockets(&options(), vec![theirs]).unwrap(), features)
            .unwrap(),
    );
    assert_eq!(h.used(RX), [(held.head, 0)]);
    h.push(RX, &[Buf::Write(2000)]);
    h.kick(RX).unwrap();
    other.send(&frame(1, 100)).unwrap();
    settle(&mut h);
    assert_eq!(received(&mut h, RX), [(frame(1, 100), 1)]);
}

#[test]
fn pairs_and_offloads_are_kept_and_impossible_ones_refused() {
    let options = NetOptions {
        num_queues: 4,
        ..options()
    };
    let (mut h, _host) = device(&options);
    h.activate().unwrap();
    h.push(4, &[Buf::Read(&[4, 0]), Buf::Read(&[2, 0]), Buf::Write(1)]);
    h.kick(4).unwrap();
    assert_eq!(h.completed(4)[0].data, [0]);
    let features = h.device.features() & !EVENT_IDX;
    let (next, _next_host) = device(&options);
    drop(h.moved_to(next.device, features).unwrap());
    let state = h.device.save().unwrap();
    assert_eq!(state["pairs"], 2);
    for (field, value) in [("pairs", 3), ("pairs", 0), ("offloads", 1_u64 << 40)] {
        let mut state = state.clone();
        state[field] = serde_json::json!(value);
        assert!(h.device.restore(state).is_err(), "{field} {value}");
    }
    assert!(h.device.restore(serde_json::Value::Null).is_err());
}
