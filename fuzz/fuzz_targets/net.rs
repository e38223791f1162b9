//! virtio-net against random chains on all its queues, frames of the host in between, and rings overwritten with
//! noise: nothing panics, spins or grows, every chain of a whole ring comes back, private pages stay as they are and
//! are never sent.
#![no_main]

#[path = "common/chains.rs"]
mod chains;

use std::os::unix::net::UnixDatagram;

use chains::{Input, SECRET, check_secret, damage, harness, push, used};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::net::{Net, NetOptions};

const TX: usize = 1;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let pairs = if flags & 1 != 0 { 2 } else { 1 };
    let options = NetOptions {
        num_queues: 2 * pairs,
        queue_size: 64,
        ..NetOptions::default()
    };
    let (hosts, devices): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixDatagram::pair().unwrap()).unzip();
    let mut h = harness(Net::with_sockets(&options, devices).unwrap(), flags & 2 != 0);
    if flags & 4 != 0 {
        // Without mergeable buffers.
        h.reset();
        let features = h.device.features() & !(1 << 15);
        h.activate_with(features).unwrap();
    }
    for host in &hosts {
        host.set_nonblocking(true).unwrap();
    }
    let mut pushed = vec![0; h.queues.len()];
    let mut broken = false;
    let mut got = vec![0; 70_000];
    for _ in 0..12 {
        if input.0.is_empty() {
            break;
        }
        let step = input.byte();
        let queue = usize::from(step >> 3) % h.queues.len();
        let alive = match step & 7 {
            0..=3 => {
                // At most so many in all that the descriptors last.
                if pushed[queue] == 0 {
                    pushed[queue] += push(&mut h, queue, &mut input, 6);
                }
                h.kick(queue)
            }
            4 | 5 => {
                let len = usize::from(u16::from_le_bytes(input.bytes())).max(12);
                let _ = hosts[queue % hosts.len()].send(&vec![step; len]);
                h.poll_events(0).map(drop)
            }
            6 if flags & 8 != 0 => {
                broken = true;
                damage(&mut h, queue, &mut input);
                h.kick(queue)
            }
            _ => h.poll_events(0).map(drop),
        };
        if alive.is_err() {
            assert!(broken, "a device failed on whole rings");
            break;
        }
        for host in &hosts {
            while let Ok(len) = host.recv(&mut got) {
                assert!(
                    !got[..len].split(|b| *b != SECRET).any(|run| run.len() >= 64),
                    "private bytes were sent"
                );
            }
        }
    }
    if !broken {
        let mut turns = 0;
        while h.poll_events(0).unwrap() {
            turns += 1;
            assert!(turns < 1000, "the device does not come to rest");
        }
        assert_eq!(used(&h, TX), pushed[TX], "a sent chain did not come back");
    }
    check_secret(&h);
    h.device.reset();
    assert!(!h.poll_events(0).unwrap(), "after a reset nothing is watched");
});
