//! virtio-mem against random requests, chains and rings: every chain comes back, what is plugged never exceeds what
//! was asked for when it was plugged, the host hears of exactly what is plugged and unplugged, a private page stays.
#![no_main]

#[path = "common/chains.rs"]
mod chains;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use chains::{Input, check_secret, damage, harness, push, used};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::memory::Reclaim;
use podvisor_devices::memory::blocks::Blocks;
use podvisor_devices::virtio::mem::{BLOCK_SIZE, Mem, MemHandle};
use podvisor_devices::virtio::testing::{Buf, Harness};

const START: u64 = 4 << 30;
const COUNT: u64 = 70;

/// The blocks that the host holds memory for.
#[derive(Default)]
struct Host(Mutex<(BTreeSet<u64>, u8)>);

impl Host {
    fn blocks(gpa: u64, len: u64) -> std::ops::Range<u64> {
        assert!(gpa >= START && len > 0 && gpa + len <= START + COUNT * BLOCK_SIZE);
        (gpa - START) / BLOCK_SIZE..(gpa - START + len) / BLOCK_SIZE
    }

    /// Every third call fails.
    fn fails(calls: &mut u8) -> io::Result<()> {
        *calls = calls.wrapping_add(1);
        if calls.is_multiple_of(3) {
            Err(io::ErrorKind::OutOfMemory.into())
        } else {
            Ok(())
        }
    }
}

impl Reclaim for Host {
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        Self::fails(&mut inner.1)?;
        inner.0.retain(|block| !Self::blocks(gpa, len).contains(block));
        Ok(())
    }

    fn provide(&self, gpa: u64, len: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        Self::fails(&mut inner.1)?;
        for block in Self::blocks(gpa, len) {
            assert!(inner.0.insert(block), "block {block} is plugged twice");
        }
        Ok(())
    }
}

/// Lets the device do what it can; false when it needs a reset.
fn settle(h: &mut Harness<Mem>) -> bool {
    for _ in 0..1000 {
        match h.poll_events(0) {
            Ok(true) => {}
            Ok(false) => return true,
            Err(_) => return false,
        }
    }
    panic!("the device never comes to rest");
}

fn check(handle: &MemHandle, host: &Host) {
    let held: u64 = host.0.lock().unwrap().0.len() as u64 * BLOCK_SIZE;
    assert_eq!(handle.plugged_size(), held);
    assert_eq!(handle.blocks().runs().iter().map(|(_, len)| len).sum::<u64>(), held);
}

fn request(h: &mut Harness<Mem>, input: &mut Input<'_>) {
    let mut bytes = [0; 24];
    bytes[0] = input.byte() % 5;
    let [first, count] = input.bytes();
    let gpa = START - BLOCK_SIZE + u64::from(first % 80) * BLOCK_SIZE + u64::from(first >> 7);
    bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
    bytes[16] = count % 90;
    h.push(0, &[Buf::Read(&bytes), Buf::Write(10)]);
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let host = Arc::new(Host::default());
    let blocks = Arc::new(Blocks::new(START, COUNT * BLOCK_SIZE, BLOCK_SIZE).unwrap());
    let device = Mem::new(blocks, None, host.clone()).unwrap();
    let handle = device.handle();
    let mut h = harness(device, flags & 4 != 0);
    let mut pushed = 0;
    for _ in 0..flags >> 3 {
        let size = u64::from(input.byte()) % (COUNT + 2) * BLOCK_SIZE;
        assert_eq!(handle.request(size).is_ok(), size <= COUNT * BLOCK_SIZE);
        assert!(settle(&mut h));
        let before = handle.plugged_size();
        request(&mut h, &mut input);
        pushed += 1;
        assert!(h.kick(0).is_ok() && settle(&mut h));
        assert!(handle.plugged_size() <= before.max(handle.requested_size()));
        check(&handle, &host);
        assert_eq!(h.completed(0).len(), 1);
    }
    let broken = flags & 2 != 0;
    pushed += push(&mut h, 0, &mut input, 20);
    if broken {
        damage(&mut h, 0, &mut input);
    }
    let alive = h.kick(0).is_ok() && settle(&mut h);
    assert!(broken || (alive && used(&h, 0) == pushed));
    check(&handle, &host);
    check_secret(&h);
});
