//! virtio-rng (virtio 1.2 5.4): random bytes of the host for the pod. A confidential pod must not rely on them alone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::state::StateError;
use crate::memory::PodMemory;

/// Size of the one queue.
const QUEUE_SIZE: u16 = 256;
/// The most bytes that one request is given, so that one turn of the event loop stays short (a full queue: 1 MiB);
/// the driver asks again for the rest.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// The most descriptors of a request that are looked at.
const MAX_DESCRIPTORS: usize = 64;
/// Where random bytes come from when the source has none.
const KERNEL_SOURCE: &str = "/dev/urandom";

/// Why the source cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("rng src={path}: {what}: {source}")]
pub struct RngError {
    path: PathBuf,
    what: &'static str,
    source: io::Error,
}

/// A virtio entropy device.
pub struct Rng {
    source: File,
    /// The kernel's generator, when `source` is something else: used when that has nothing to give.
    spare: Option<File>,
    event: EventFd,
    active: Option<(Arc<PodMemory>, ActiveQueue)>,
    buffer: Box<[u8; MAX_REQUEST_BYTES]>,
    bytes: u64,
    ops: u64,
    spare_ops: u64,
    failed_ops: u64,
}

impl Rng {
    /// A device that takes its bytes from `path`, as a rule `/dev/urandom`. A source that has nothing to give at
    /// once is not waited for: the kernel's generator stands in.
    ///
    /// # Errors
    /// When the source cannot be opened.
    pub fn open(path: &Path) -> Result<Self, RngError> {
        let open = |path: &Path| {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
                .open(path);
            file.map_err(|source| RngError {
                path: path.to_owned(),
                what: "cannot open it for reading",
                source,
            })
        };
        let spare = Path::new(KERNEL_SOURCE);
        Ok(Self {
            source: open(path)?,
            spare: if path == spare { None } else { Some(open(spare)?) },
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| RngError {
                path: path.to_owned(),
                what: "making its eventfd",
                source,
            })?,
            active: None,
            buffer: Box::new([0; MAX_REQUEST_BYTES]),
            bytes: 0,
            ops: 0,
            spare_ops: 0,
            failed_ops: 0,
        })
    }

    /// Serves what the queue holds, at most two rounds of it; the event asks for another turn if there is more.
    fn service(&mut self) -> Result<(), DeviceError> {
        let Some((memory, mut queue)) = self.active.take() else {
            return Ok(());
        };
        let result = self.serve(&memory, &mut queue);
        self.active = Some((memory, queue));
        result
    }

    fn serve(&mut self, memory: &Arc<PodMemory>, queue: &mut ActiveQueue) -> Result<(), DeviceError> {
        let mut budget = u32::from(queue.size()).saturating_mul(2);
        let mut used = false;
        'all: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                let len = self.fill(memory, chain);
                queue.add_used(memory, head, len)?;
                used = true;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    // Full: it is readable already.
                    let _ = self.event.write(1);
                    break 'all;
                }
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        if used { queue.signal(memory) } else { Ok(()) }
    }

    /// Fills the writable buffers of `chain` from their beginning; how many bytes.
    fn fill(&mut self, memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> u32 {
        let mut written = 0_usize;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            if !descriptor.is_write_only() {
                continue;
            }
            let want = MAX_REQUEST_BYTES.saturating_sub(written).min(descriptor.len() as usize);
            let Some(bytes) = self.buffer.get_mut(..want) else {
                break;
            };
            let Some(got) = take(&mut self.source, self.spare.as_mut(), bytes, &mut self.spare_ops) else {
                break;
            };
            let Some(bytes) = self.buffer.get(..got) else {
                break;
            };
            if memory.write_slice(bytes, descriptor.addr()).is_err() {
                break;
            }
            written = written.saturating_add(got);
            if got < descriptor.len() as usize {
                break;
            }
        }
        // What was handed out is nobody else's.
        self.buffer.fill(0);
        let counter = if written == 0 {
            &mut self.failed_ops
        } else {
            &mut self.ops
        };
        *counter = counter.saturating_add(1);
        self.bytes = self.bytes.saturating_add(written as u64);
        u32::try_from(written).unwrap_or(0)
    }
}

/// Reads up to `bytes.len()` bytes, from `spare` when `source` has nothing now; None when both fail.
fn take(source: &mut File, spare: Option<&mut File>, bytes: &mut [u8], spare_ops: &mut u64) -> Option<usize> {
    if bytes.is_empty() {
        return Some(0);
    }
    match source.read(bytes) {
        Ok(got) if got > 0 => return Some(got),
        Ok(_) | Err(_) => {}
    }
    *spare_ops = spare_ops.saturating_add(1);
    match spare?.read(bytes) {
        Ok(got) if got > 0 => Some(got),
        Ok(_) | Err(_) => None,
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.into_iter().next().flatten();
        self.active = queue.map(|queue| (activation.memory, queue));
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.service()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.event.as_raw_fd()]
    }

    fn on_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        // An error: it is not readable, another turn took it.
        let _ = self.event.read();
        self.service()
    }

    fn save(&mut self) -> Result<Value, StateError> {
        Ok(Value::Null)
    }

    fn reset(&mut self) {
        self.active = None;
        let _ = self.event.read();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("bytes", self.bytes),
            ("ops", self.ops),
            ("spare_ops", self.spare_ops),
            ("failed_ops", self.failed_ops),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;
    use crate::virtio::testing::{Buf, Harness, RawBuf, TEST_MEMORY_SIZE};

    fn harness(path: &Path) -> Harness<Rng> {
        let mut h = Harness::new(Rng::open(path).unwrap());
        h.activate().unwrap();
        h
    }

    fn counter(h: &Harness<Rng>, name: &str) -> u64 {
        h.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    #[test]
    fn bytes_come_from_the_source() {
        let mut file = NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..200_u8).collect();
        file.write_all(&content).unwrap();
        let mut h = harness(file.path());
        h.push(0, &[Buf::Write(100)]);
        h.push_indirect(0, &[Buf::Write(30), Buf::Write(70)]);
        h.kick(0).unwrap();
        let done = h.completed(0);
        assert_eq!(done.iter().map(|c| c.len).collect::<Vec<_>>(), [100, 100]);
        assert_eq!([done[0].data.as_slice(), &done[1].data].concat(), content);
        assert_eq!(h.interrupts(0), 1);
        assert_eq!((counter(&h, "bytes"), counter(&h, "ops")), (200, 2));
        // The source is at its end: the kernel's generator goes on.
        h.push(0, &[Buf::Write(64)]);
        h.kick(0).unwrap();
        let done = h.completed(0);
        assert_eq!((done[0].len, counter(&h, "spare_ops")), (64, 1));
        assert_ne!(done[0].data, [0xAA; 64]);
    }

    #[test]
    fn a_request_is_given_a_bounded_number_of_bytes() {
        let mut h = harness(Path::new(KERNEL_SOURCE));
        h.push(0, &[Buf::Write(3000), Buf::Write(1 << 20)]);
        h.kick(0).unwrap();
        let done = h.completed(0);
        assert_eq!(done[0].len as usize, MAX_REQUEST_BYTES);
        assert_ne!(done[0].data[..MAX_REQUEST_BYTES], [0xAA; MAX_REQUEST_BYTES]);
        assert!(done[0].data[MAX_REQUEST_BYTES..].iter().all(|b| *b == 0xAA));
    }

    #[test]
    fn what_cannot_be_written_comes_back_empty() {
        let mut h = harness(Path::new(KERNEL_SOURCE));
        let private = h.alloc(4096);
        h.write(private, &[0x5A; 4096]);
        h.gate.make_private(private, 4096);
        for gpa in [private, private + 4000, TEST_MEMORY_SIZE - 1, u64::MAX - 3] {
            h.push_raw(
                0,
                &[RawBuf {
                    gpa,
                    len: 200,
                    writable: true,
                }],
            );
            h.kick(0).unwrap();
            assert_eq!(h.completed(0)[0].len, 0, "{gpa:#x}");
        }
        h.push(0, &[Buf::Read(&[1; 16])]);
        h.push(0, &[Buf::Write(0)]);
        h.push(0, &[Buf::Read(&[1; 16]), Buf::Write(8)]);
        h.kick(0).unwrap();
        assert_eq!(h.used(0).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0, 0, 8]);
        h.gate.make_shared(private, 4096);
        assert_eq!(h.read(private, 4096), [0x5A; 4096]);
        h.reset();
        h.kick(0).unwrap();
        h.device.on_event(0).unwrap();
    }

    #[test]
    fn a_full_queue_is_served_in_one_turn() {
        let mut h = harness(Path::new(KERNEL_SOURCE));
        for _ in 0..3 {
            for _ in 0..QUEUE_SIZE {
                h.push(0, &[Buf::Write(16)]);
            }
            h.kick(0).unwrap();
            assert_eq!(h.used(0).len(), usize::from(QUEUE_SIZE));
        }
        assert_eq!(h.interrupts(0), 3);
    }

    #[test]
    fn an_absent_source_is_named() {
        let error = Rng::open(Path::new("/absent/source")).err().unwrap().to_string();
        assert!(error.starts_with("rng src=/absent/source: cannot open it"), "{error}");
    }
}
