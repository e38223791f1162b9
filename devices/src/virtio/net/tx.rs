//! From the driver to the host: chains of one transmitq (virtio 1.2 5.1.6.2), each written to the TAP queue in one
//! call, straight from guest memory.

use std::io;
use std::sync::Arc;

use virtio_queue::DescriptorChain;

use super::tap::{GuestVectors, Tap};
use super::{Counters, HEADER_LEN, MAX_DESCRIPTORS, MAX_FRAME};
use crate::memory::PodMemory;
use crate::rate_limiter::Throttle;
use crate::virtio::device::{ActiveQueue, DeviceError};

/// The most frames of one turn.
const MAX_FRAMES: u32 = 512;

/// What the sender waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxWait {
    /// A doorbell.
    Doorbell,
    /// Room in the TAP queue.
    Room,
    /// The rate limiter's timer.
    Timer,
    /// Nothing: another turn.
    Turn,
}

/// The sending half of a queue pair.
pub(super) struct Sender {
    queue: ActiveQueue,
    memory: Arc<PodMemory>,
    vectors: GuestVectors,
    /// The rate limiter has admitted the next frame already.
    admitted: bool,
    pub(super) wait: TxWait,
}

impl Sender {
    pub(super) fn new(queue: ActiveQueue, memory: Arc<PodMemory>) -> Self {
        Self {
            queue,
            vectors: GuestVectors::new(Arc::clone(&memory)),
            memory,
            admitted: false,
            wait: TxWait::Turn,
        }
    }

    /// Sends what the queue holds, as far as the host takes it now.
    pub(super) fn transmit(
        &mut self,
        tap: &Tap,
        throttle: Option<&mut Throttle>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        let mut used = false;
        self.wait = self.run(tap, throttle, counters, &mut used)?;
        if used { self.queue.signal(&self.memory) } else { Ok(()) }
    }

    fn run(
        &mut self,
        tap: &Tap,
        mut throttle: Option<&mut Throttle>,
        counters: &mut Counters,
        used: &mut bool,
    ) -> Result<TxWait, DeviceError> {
        // A driver that adds frames as fast as they are sent must not keep the event loop here.
        let mut budget = MAX_FRAMES;
        loop {
            self.queue.disable_notification(&self.memory)?;
            while let Some(chain) = self.queue.pop(&self.memory)? {
                let head = chain.head_index();
                if self.collect(chain) {
                    if let Some(wait) = self.send(tap, throttle.as_deref_mut(), counters)? {
                        self.queue.undo_pop();
                        return Ok(wait);
                    }
                } else {
                    counters.tx_malformed = counters.tx_malformed.saturating_add(1);
                }
                self.queue.add_used(&self.memory, head, 0)?;
                *used = true;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    return Ok(TxWait::Turn);
                }
            }
            if !self.queue.enable_notification(&self.memory)? {
                return Ok(TxWait::Doorbell);
            }
        }
    }

    /// Sends the collected frame; what to wait for before it can be.
    fn send(
        &mut self,
        tap: &Tap,
        throttle: Option<&mut Throttle>,
        counters: &mut Counters,
    ) -> Result<Option<TxWait>, DeviceError> {
        let bytes = self.vectors.len().saturating_sub(HEADER_LEN) as u64;
        if !self.admitted
            && let Some(throttle) = throttle
            && !throttle.admit(bytes, 1).map_err(super::timer_failed)?
        {
            return Ok(Some(TxWait::Timer));
        }
        match tap.write(&self.vectors) {
            Ok(_) => {
                counters.tx_frames = counters.tx_frames.saturating_add(1);
                counters.tx_bytes = counters.tx_bytes.saturating_add(bytes);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.admitted = true;
                return Ok(Some(TxWait::Room));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                self.admitted = true;
                return Ok(Some(TxWait::Turn));
            }
            // The kernel refuses the frame, or the interface is down: lost, as on a wire.
            Err(_) => counters.tx_dropped = counters.tx_dropped.saturating_add(1),
        }
        self.admitted = false;
        Ok(None)
    }

    /// Makes the vectors of a chain's readable buffers; false when it is no frame.
    fn collect(&mut self, chain: DescriptorChain<Arc<PodMemory>>) -> bool {
        self.vectors.clear();
        for (count, descriptor) in chain.enumerate() {
            let len = descriptor.len() as usize;
            let fits = count < MAX_DESCRIPTORS && len <= MAX_FRAME.saturating_sub(self.vectors.len());
            if descriptor.is_write_only() || !fits {
                return false;
            }
            if len > 0 && !self.vectors.push(descriptor.addr(), len) {
                return false;
            }
        }
        self.vectors.len() > HEADER_LEN
    }
}
