//! The harness against a device that copies what it reads into what it may write.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;

/// Writes each chain's readable bytes, in order, into its writable buffers.
#[derive(Default)]
struct Echo {
    active: Option<(Arc<PodMemory>, ActiveQueue)>,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }
    fn features(&self) -> u64 {
        1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.active = activation.queues.remove(0).map(|q| (activation.memory, q));
        Ok(())
    }
    fn on_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        let (memory, queue) = self.active.as_mut().unwrap();
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head_index();
            let mut bytes = Vec::new();
            for desc in chain.clone().readable() {
                let mut part = vec![0; desc.len() as usize];
                if memory.read_slice(&mut part, desc.addr()).is_ok() {
                    bytes.extend(part);
                }
            }
            let mut written = 0;
            for desc in chain.writable() {
                let n = (bytes.len() - written).min(desc.len() as usize);
                if memory.write_slice(&bytes[written..written + n], desc.addr()).is_ok() {
                    written += n;
                }
            }
            queue.add_used(memory, head, u32::try_from(written).unwrap())?;
        }
        queue.signal(memory)
    }
    fn reset(&mut self) {
        self.active = None;
    }
}

#[test]
fn a_chain_goes_through_direct_and_indirect_for_more_than_one_lap() {
    let mut h = Harness::new(Echo::default());
    h.activate().unwrap();
    for lap in 0..20u8 {
        let text = [lap, 1, 2, 3, 4, 5];
        let chain = if lap % 2 == 0 {
            h.push(
                0,
                &[
                    Buf::Read(&text[..2]),
                    Buf::Read(&text[2..]),
                    Buf::Write(4),
                    Buf::Write(4),
                ],
            )
        } else {
            h.push_indirect(0, &[Buf::Read(&text), Buf::Write(8)])
        };
        h.kick(0).unwrap();
        let done = h.completed(0);
        assert_eq!(done.len(), 1);
        assert_eq!((done[0].head, done[0].len), (chain.head, 6));
        assert_eq!(done[0].data, [lap, 1, 2, 3, 4, 5, 0xAA, 0xAA]);
    }
    assert_eq!(h.interrupts(0), 20);
}

#[test]
fn a_private_buffer_is_refused_and_the_queue_goes_on() {
    let mut h = Harness::new(Echo::default());
    h.activate().unwrap();
    let secret = h.alloc(4096);
    h.write(secret, &[0x5A; 4096]);
    h.gate.make_private(secret, 4096);
    let raw = [
        RawBuf {
            gpa: secret,
            len: 16,
            writable: false,
        },
        RawBuf {
            gpa: BUFFERS_START + 0x10_0000,
            len: 16,
            writable: true,
        },
    ];
    h.push_raw(0, &raw);
    h.kick(0).unwrap();
    let done = h.completed(0);
    assert_eq!(done[0].len, 0);
    assert!(done[0].data.iter().all(|b| *b == 0));
    h.push(0, &[Buf::Read(b"after"), Buf::Write(5)]);
    h.kick(0).unwrap();
    assert_eq!(h.completed(0)[0].data, b"after");
}

#[test]
fn a_ring_that_turns_private_is_an_error_not_a_hang() {
    let mut h = Harness::new(Echo::default());
    h.activate().unwrap();
    h.push(0, &[Buf::Read(b"x"), Buf::Write(1)]);
    h.gate.make_private(h.queues[0].avail_ring(), 4096);
    assert!(matches!(h.kick(0), Err(DeviceError::Queue { index: 0, .. })));
    h.gate.make_shared(h.queues[0].avail_ring(), 4096);
    h.kick(0).unwrap();
    assert_eq!(h.used(0).len(), 1);
}

#[test]
fn reset_starts_over() {
    let mut h = Harness::new(Echo::default());
    h.activate().unwrap();
    h.push(0, &[Buf::Read(b"x"), Buf::Write(1)]);
    h.kick(0).unwrap();
    h.reset();
    let idx: u16 = h.memory.read_obj(GuestAddress(h.queues[0].used_ring() + 2)).unwrap();
    assert_eq!(idx, 0);
    h.activate().unwrap();
    h.push(0, &[Buf::Read(b"y"), Buf::Write(1)]);
    h.kick(0).unwrap();
    assert_eq!(h.completed(0)[0].data, b"y");
}
