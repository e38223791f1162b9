//! virtio-console (virtio 1.2 5.3): one port, no multiport. Output never waits for its reader and input never
//! outruns the driver; the host's side is a [`HostConsole`].

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt, VirtioDevice};
use super::state::StateError;
use crate::host_console::{HostConsole, SharedHostConsole};
use crate::memory::PodMemory;
use crate::sync::lock;

/// Size of the two queues.
const QUEUE_SIZE: u16 = 64;
/// receiveq of port 0 (virtio 1.2 5.3.2): host to driver.
const RECEIVE: usize = 0;
/// transmitq of port 0: driver to host.
const TRANSMIT: usize = 1;
/// `VIRTIO_CONSOLE_F_SIZE` (virtio 1.2 5.3.3).
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// The most bytes that are taken from one chain; Linux sends at most 32 KiB.
const MAX_CHAIN_BYTES: usize = 64 << 10;
/// The most descriptors of a chain that are looked at.
const MAX_DESCRIPTORS: usize = 256;
/// Bytes that are copied at a time.
const PIECE: usize = 4096;

/// A virtio console.
pub struct Console {
    host: SharedHostConsole,
    /// Asks the event loop for another turn.
    again: EventFd,
    /// Columns and rows, if the driver is told.
    size: Option<(u16, u16)>,
    active: Option<Active>,
    output_bytes: u64,
    input_bytes: u64,
    failed_chains: u64,
}

struct Active {
    memory: Arc<PodMemory>,
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    config_changed: Arc<dyn QueueInterrupt>,
}

impl Console {
    /// A console that writes to `host` and reads from it. The size of the host's window, if it has one, is told to the
    /// driver.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(host: SharedHostConsole) -> io::Result<Self> {
        let size = {
            let mut host = lock(&host);
            // A client that waits already hears the first byte.
            host.on_ready();
            host.window()
        };
        Ok(Self {
            host,
            again: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            size,
            active: None,
            output_bytes: 0,
            input_bytes: 0,
            failed_chains: 0,
        })
    }

    /// Tells the driver of the host's window if it has changed.
    fn resize(&mut self) -> Result<(), DeviceError> {
        let size = lock(&self.host).window();
        if self.size.is_none() || self.size == size {
            return Ok(());
        }
        self.size = size;
        match &self.active {
            Some(active) => active.config_changed.signal_used().map_err(|source| DeviceError::Host {
                what: "raising the configuration interrupt",
                source,
            }),
            None => Ok(()),
        }
    }

    /// Gives waiting input to the driver, as far as it has buffers.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let Some(Active {
            memory,
            receive: Some(queue),
            ..
        }) = &mut self.active
        else {
            return Ok(());
        };
        let mut host = lock(&self.host);
        let mut used = false;
        let mut buffers = true;
        // Bounded by the input: each turn takes bytes of it, or a buffer that the driver wasted.
        let mut budget = u32::from(queue.size()).saturating_mul(2);
        while !host.input().is_empty() && budget > 0 {
            queue.disable_notification(memory)?;
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                buffers = false;
                break;
            };
            budget = budget.saturating_sub(1);
            let head = chain.head_index();
            let len = give(memory, chain, &mut host);
            if len == 0 {
                self.failed_chains = self.failed_chains.saturating_add(1);
            }
            self.input_bytes = self.input_bytes.saturating_add(u64::from(len));
            queue.add_used(memory, head, len)?;
            used = true;
        }
        host.input_taken();
        if buffers && !host.input().is_empty() {
            come_again(&self.again);
        }
        if used { queue.signal(memory) } else { Ok(()) }
    }

    /// Takes output from the driver.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(Active {
            memory,
            transmit: Some(queue),
            ..
        }) = &mut self.active
        else {
            return Ok(());
        };
        let mut host = lock(&self.host);
        let mut budget = u32::from(queue.size()).saturating_mul(2);
        let mut used = false;
        'all: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                match collect(memory, chain, &mut host) {
                    Some(len) => self.output_bytes = self.output_bytes.saturating_add(len),
                    None => self.failed_chains = self.failed_chains.saturating_add(1),
                }
                queue.add_used(memory, head, 0)?;
                used = true;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    come_again(&self.again);
                    break 'all;
                }
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        host.send();
        if used { queue.signal(memory) } else { Ok(()) }
    }
}

fn come_again(again: &EventFd) {
    // Full: it is readable already.
    let _ = again.write(1);
}

/// Fills the writable buffers of `chain` with waiting input; how many bytes. What could not be written waits on.
fn give(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>, host: &mut HostConsole) -> u32 {
    let mut written = 0_u32;
    for descriptor in chain.take(MAX_DESCRIPTORS) {
        if !descriptor.is_write_only() {
            continue;
        }
        let input = host.input();
        let waiting = input.make_contiguous();
        let want = waiting.len().min(descriptor.len() as usize);
        let Some(bytes) = waiting.get(..want) else {
            break;
        };
        if memory.write_slice(bytes, descriptor.addr()).is_err() {
            break;
        }
        input.drain(..want);
        written = written.saturating_add(u32::try_from(want).unwrap_or(0));
        if input.is_empty() {
            break;
        }
    }
    written
}

/// Takes the readable bytes of `chain`, at most [`MAX_CHAIN_BYTES`]; None when some cannot be read.
fn collect(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>, host: &mut HostConsole) -> Option<u64> {
    let mut taken = 0_usize;
    let mut piece = [0; PIECE];
    for descriptor in chain.take(MAX_DESCRIPTORS) {
        if descriptor.is_write_only() {
            continue;
        }
        let mut address = descriptor.addr().0;
        let mut left = (descriptor.len() as usize).min(MAX_CHAIN_BYTES.saturating_sub(taken));
        host.lose((descriptor.len() as usize).saturating_sub(left));
        while left > 0 {
            let bytes = piece.get_mut(..left.min(PIECE))?;
            memory.read_slice(bytes, vm_memory::GuestAddress(address)).ok()?;
            host.take(bytes);
            address = address.checked_add(bytes.len() as u64)?;
            left = left.saturating_sub(bytes.len());
            taken = taken.saturating_add(bytes.len());
        }
    }
    Some(taken as u64)
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_read,
    libc::SYS_write,
];

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let size = u64::from(self.size.is_some()) << VIRTIO_CONSOLE_F_SIZE;
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | size
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.unwrap_or_default();
        let (columns, rows) = (columns.to_le_bytes(), rows.to_le_bytes());
        let config = columns.iter().chain(&rows).copied().chain(std::iter::repeat(0));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(4);
        for (place, byte) in data.iter_mut().zip(config.skip(skip)) {
            *place = byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let receive = queues.next().flatten();
        let transmit = queues.next().flatten();
        self.active = Some(Active {
            memory: activation.memory,
            receive,
            transmit,
            config_changed: activation.config_changed,
        });
        // Input may have come before the driver.
        come_again(&self.again);
        Ok(())
    }

    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(),
            _ => Ok(()),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        let host = lock(&self.host).fd();
        [Some(self.again.as_raw_fd()), host].into_iter().flatten().collect()
    }

    fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        if index == 0 {
            // An error: it is not readable, another turn took it.
            let _ = self.again.read();
        } else {
            lock(&self.host).on_ready();
            self.resize()?;
        }
        self.receive()?;
        self.transmit()
    }

    fn save(&mut self) -> Result<Value, StateError> {
        Ok(Value::Null)
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.output_bytes),
            ("output_dropped_bytes", lock(&self.host).dropped()),
            ("input_bytes", self.input_bytes),
            ("failed_chains", self.failed_chains),
        ]
    }
}
