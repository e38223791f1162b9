//! Reads and writes of the virtio transport's registers in any order, over a device that runs its queues: nothing
//! panics, and the device is never given queues twice without a reset.
#![no_main]

use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::bus::Bus;
use podvisor_devices::mock::MockHypervisor;
use podvisor_devices::pci::{PciRoot, Window};
use podvisor_devices::platform::Hypervisor;
use podvisor_devices::virtio::device::{Activation, DeviceError, VirtioDevice};
use podvisor_devices::virtio::pci::{VirtioPci, VirtioPciSubscriber, add_to};
use podvisor_devices::virtio::testing::test_memory;
use vm_memory::{Bytes, GuestAddress};

#[derive(Default)]
struct Dummy(Option<Activation>);

impl VirtioDevice for Dummy {
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        1 << 29 | 1 << 28
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert!(self.0.is_none(), "activated twice without a reset");
        self.0 = Some(activation);
        Ok(())
    }
    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let Activation { memory, queues, .. } = self.0.as_mut().expect("only called while active");
        if let Some(queue) = queues[index].as_mut() {
            while let Some(chain) = queue.pop(memory)? {
                queue.add_used(memory, chain.head_index(), 0)?;
            }
            queue.signal(memory)?;
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.0 = None;
    }
}

/// Writes that bring a driver up, so that the interesting states are near.
const UP: [(u64, usize, u64); 13] = [
    (0x14, 1, 3),
    (0x08, 4, 1),
    (0x0C, 4, 1),
    (0x14, 1, 0xB),
    (0x20, 8, 0x1000),
    (0x28, 8, 0x2000),
    (0x30, 8, 0x3000),
    (0x1A, 2, 1),
    (0x1C, 2, 1),
    (0x8010, 8, 0xFEE0_0000),
    (0x801C, 4, 0),
    (0x14, 1, 0xF),
    (0x6000, 2, 0),
];

fuzz_target!(|data: &[u8]| {
    let bus = Arc::new(Bus::new());
    let root = PciRoot::new(
        0,
        Arc::clone(&bus),
        Window {
            start: 1 << 40,
            len: 1 << 32,
        },
        Window {
            start: 0xC000_0000,
            len: 1 << 29,
        },
    );
    let memory = test_memory(0x1_0000, None);
    let hypervisor = MockHypervisor::new();
    let function = VirtioPci::new(
        Box::new(Dummy::default()),
        "_fuzz0".to_owned(),
        Arc::clone(&memory),
        Arc::clone(&hypervisor) as Arc<dyn Hypervisor>,
        data.len() % 2 == 1,
    )
    .expect("the dummy fits");
    let (_, subscriber) = add_to(&root, function, None).expect("the first slot is free");
    let mut manager = EventManager::<VirtioPciSubscriber>::new().expect("epoll works");
    manager.add_subscriber(subscriber);
    root.write_config(1, 0, 4, &[6, 0]);
    let bar = 1u64 << 40;
    let ecam = root.ecam();
    // 10 bytes an operation: kind and width, where, value.
    for op in data.chunks_exact(10) {
        let len = 1 + usize::from(op[0] >> 5);
        let at = u64::from(u16::from_le_bytes([op[1], op[2]]));
        let value = &op[2..2 + len];
        let mut buffer = [0u8; 8];
        match op[0] & 0x1F {
            0..=9 => {
                bus.write(bar + at, value);
            }
            10..=13 => {
                bus.read(bar + at, &mut buffer[..len]);
            }
            14 => {
                for (offset, len, v) in UP {
                    bus.write(bar + offset, &v.to_le_bytes()[..len]);
                }
            }
            15..=17 => root.write_config(1, 0, at as u16 & 0xFFF, value),
            18 => root.read_config(1, 0, at as u16 & 0xFFF, &mut buffer[..len]),
            19 => {
                let _ = memory.write_slice(value, GuestAddress(at));
            }
            20 => {
                bus.write(bar + 0x8_0000 - u64::from(op[1]), value);
            }
            21 => {
                hypervisor.ring(bar + 0x6000 + 4 * (at % 3));
            }
            22 => {
                let mut ecam = ecam.lock().expect("no panic held it");
                ecam.write(1 << 15 | at, value);
            }
            23 => {
                // The common configuration with a byte offset, to be dense.
                bus.write(bar + at % 0x40, value);
            }
            _ => {
                let _ = manager.run_with_timeout(0);
            }
        }
    }
    root.remove(1);
});
