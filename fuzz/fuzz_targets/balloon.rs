//! virtio-balloon against random chains and page numbers: every chain comes back, and the host is given whole pages of
//! RAM that devices may touch, nothing else.
#![no_main]

#[path = "common/chains.rs"]
mod chains;

use std::io;
use std::sync::Arc;

use chains::{Input, PRIVATE, check_secret, damage, harness, push, used};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::memory::Reclaim;
use podvisor_devices::virtio::balloon::{Balloon, BalloonOptions};
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::testing::{Buf, TEST_MEMORY_SIZE};

struct Host;

impl Reclaim for Host {
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        assert!(len > 0 && gpa.is_multiple_of(4096) && len.is_multiple_of(4096));
        assert!(gpa.checked_add(len).is_some_and(|end| end <= TEST_MEMORY_SIZE));
        assert!(
            gpa + len <= PRIVATE || gpa >= PRIVATE + 4096,
            "a private page is given away"
        );
        Ok(())
    }

    fn provide(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.discard(gpa, len)
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let options = BalloonOptions {
        size: 0,
        deflate_on_oom: flags & 1 != 0,
        free_page_reporting: true,
    };
    let device = Balloon::new(options, Arc::new(Host)).unwrap();
    let handle = device.handle();
    let mut h = harness(device, flags & 2 != 0);
    let mut pushed = [0; 3];
    for queue in 0..3 {
        // Page numbers near the beginning of RAM and around the private page.
        let numbers: Vec<u8> = (0..input.byte() % 32)
            .flat_map(|_| {
                let [low, high] = input.bytes();
                let page = u32::from(u16::from_le_bytes([low, high]));
                let near = (PRIVATE / 4096 - 8) as u32 + page % 16;
                if high & 0x80 == 0 { page } else { near }.to_le_bytes()
            })
            .collect();
        if !numbers.is_empty() {
            h.push(queue, &[Buf::Read(&numbers)]);
            pushed[queue] += 1;
        }
        if queue != 1 {
            pushed[queue] += push(&mut h, queue, &mut input, 4);
        }
    }
    let broken = flags & 4 != 0;
    if broken {
        damage(&mut h, usize::from(flags >> 3) % 3, &mut input);
    }
    h.device.write_config(u64::from(input.byte()), &input.bytes::<4>());
    let _ = handle.resize(u64::from_le_bytes(input.bytes()) & !0xFFF);
    let mut alive = (0..3).all(|queue| h.kick(queue).is_ok());
    let mut turns = 0;
    while alive {
        match h.poll_events(0) {
            Ok(true) => turns += 1,
            Ok(false) => break,
            Err(_) => alive = false,
        }
        assert!(turns < 1000, "the device does not come to rest");
    }
    if !broken {
        assert!(alive);
        for queue in 0..3 {
            assert_eq!(used(&h, queue), pushed[queue], "a chain did not come back");
        }
    }
    check_secret(&h);
    h.reset();
    assert_eq!(handle.actual_size(), 0);
});
