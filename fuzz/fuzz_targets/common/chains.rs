//! Turns fuzz input into descriptor chains on a test queue: good buffers, wrapping and absent addresses, a private
//! page, indirect tables, and rings that are overwritten with noise.

use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::testing::{Harness, RawBuf, TEST_MEMORY_SIZE};

/// Where buffers lie.
const BUFFERS: u64 = 32 << 20;
/// A page that devices may not touch.
pub const PRIVATE: u64 = 48 << 20;
/// Where indirect tables lie.
const TABLES: u64 = 40 << 20;
/// What the private page holds.
pub const SECRET: u8 = 0x5A;

/// Fuzz input, taken from the front; zeros once it is used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        out[..now.len()].copy_from_slice(now);
        self.0 = later;
        out
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }
}

/// A fresh, activated harness with a private page.
pub fn harness<D: VirtioDevice>(device: D, event_idx: bool) -> Harness<D> {
    let mut h = Harness::new(device);
    h.write(PRIVATE, &[SECRET; 4096]);
    h.gate.make_private(PRIVATE, 4096);
    if event_idx {
        h.activate_with(h.device.features()).unwrap();
    } else {
        h.activate().unwrap();
    }
    h
}

/// Makes chains available on `queue` until the input or the descriptors are used up; how many.
pub fn push<D: VirtioDevice>(h: &mut Harness<D>, queue: usize, input: &mut Input<'_>, limit: usize) -> u16 {
    let mut left = usize::from(h.queues[queue].size());
    let mut pushed = 0;
    while !input.0.is_empty() && usize::from(pushed) < limit {
        let count = usize::from(input.byte() % 6) + 1;
        if count > left {
            break;
        }
        left -= count;
        let mut indirect = false;
        let bufs: Vec<RawBuf> = (0..count).map(|_| buffer(h, input, &mut indirect)).collect();
        if indirect {
            let table = TABLES + u64::from(pushed) * 4096;
            h.queues[queue].push_indirect(&h.memory, table, &bufs);
        } else {
            h.push_raw(queue, &bufs);
        }
        pushed += 1;
    }
    pushed
}

fn buffer<D: VirtioDevice>(h: &mut Harness<D>, input: &mut Input<'_>, indirect: &mut bool) -> RawBuf {
    let control = input.byte();
    let [low, high] = input.bytes();
    let near = u64::from(u16::from_le_bytes([low, high]));
    let gpa = match control >> 1 & 7 {
        0..=4 => BUFFERS + near,
        5 => TEST_MEMORY_SIZE - u64::from(low),
        6 => u64::from_le_bytes(input.bytes()),
        _ => PRIVATE - 512 + near % 8192,
    };
    let len = match control >> 4 & 3 {
        0 => u32::from(input.byte()),
        1 => u32::from(u16::from_le_bytes(input.bytes())),
        2 => 512 * u32::from(input.byte()),
        _ => u32::from_le_bytes(input.bytes()),
    };
    if control & 0x40 != 0 && (BUFFERS..BUFFERS + (1 << 17)).contains(&gpa) {
        h.write(gpa, &input.bytes::<32>());
    }
    *indirect |= control & 0x80 != 0;
    RawBuf {
        gpa,
        len,
        writable: control & 1 != 0,
    }
}

/// Overwrites a piece of the descriptor table and the available index.
pub fn damage<D: VirtioDevice>(h: &mut Harness<D>, queue: usize, input: &mut Input<'_>) {
    let rings = &h.queues[queue];
    let (table, avail) = (rings.desc_table(), rings.avail_ring());
    let at = u64::from(input.byte()) % u64::from(rings.size());
    h.write(table + 16 * at, &input.bytes::<64>());
    h.write(avail + 2, &input.bytes::<2>());
}

/// How many chains the device gave back on `queue`.
pub fn used<D: VirtioDevice>(h: &Harness<D>, queue: usize) -> u16 {
    let bytes = h.read(h.queues[queue].used_ring() + 2, 2);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The private page still holds what the pod put there.
pub fn check_secret<D: VirtioDevice>(h: &Harness<D>) {
    h.gate.make_shared(PRIVATE, 4096);
    assert!(
        h.read(PRIVATE, 4096).iter().all(|b| *b == SECRET),
        "a device wrote to a private page"
    );
}
