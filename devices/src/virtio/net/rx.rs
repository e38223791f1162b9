//! From the host to the driver: frames of one TAP queue into the buffers of one receiveq (virtio 1.2 5.1.6.4).
//!
//! A frame is read straight into the driver's buffers. Its length is known only afterwards, so that a call offers as
//! many buffers as frames needed of late, and behind them host memory for what is beyond; that part is then copied.
//! Buffers that were taken off the ring and not used wait for the next frame.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::tap::{GuestVectors, MAX_VECTORS, Tap};
use super::{Counters, MAX_DESCRIPTORS, MAX_FRAME};
use crate::memory::PodMemory;
use crate::rate_limiter::Throttle;
use crate::virtio::device::{ActiveQueue, DeviceError};

/// The most frames of one turn; the TAP queue stays readable if there are more.
const MAX_FRAMES: usize = 256;
/// The most chains that are taken off the ring in one turn.
const MAX_CHAINS: usize = 1024;
/// The smallest room that a call offers, in bytes, if the driver has it.
const MIN_EXPECTED: usize = 2048;
/// Where the number of buffers is in the header (`struct virtio_net_hdr`, virtio 1.2 5.1.6).
const NUM_BUFFERS: usize = 10;

/// What the receiver waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxWait {
    /// A frame.
    Frame,
    /// Buffers: a doorbell.
    Buffers,
    /// The rate limiter's timer.
    Timer,
    /// Nothing: another turn.
    Turn,
}

/// A chain of writable buffers, taken off the ring.
struct Chain {
    head: u16,
    segments: Vec<(GuestAddress, usize)>,
    len: usize,
}

/// A frame that waits for more buffers.
#[derive(Clone, Copy)]
struct Held {
    /// Its length with header.
    total: usize,
    /// Bytes that are in the first buffers; the rest is in the overflow.
    landed: usize,
}

/// The receiving half of a queue pair.
pub(super) struct Receiver {
    queue: ActiveQueue,
    memory: Arc<PodMemory>,
    /// A frame may lie in several chains.
    mergeable: bool,
    chains: VecDeque<Chain>,
    /// Bytes of `chains`.
    room: usize,
    /// Buffers of `chains`.
    segments: usize,
    spare: Vec<Vec<(GuestAddress, usize)>>,
    vectors: GuestVectors,
    overflow: Vec<u8>,
    held: Option<Held>,
    /// Bytes that a frame has, as a rule.
    expected: usize,
    /// The driver was told not to ring.
    quiet: bool,
    /// The driver must be told of buffers given back.
    signal: bool,
    used: Vec<(u16, u32)>,
    /// A chain was given back while others that came before it were at hand.
    out_of_turn: bool,
    /// Chains that this turn may still take.
    budget: usize,
    pub(super) wait: RxWait,
}

impl Receiver {
    pub(super) fn new(queue: ActiveQueue, memory: Arc<PodMemory>, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            chains: VecDeque::new(),
            room: 0,
            segments: 0,
            spare: Vec::new(),
            vectors: GuestVectors::new(Arc::clone(&memory)),
            memory,
            overflow: vec![0; MAX_FRAME],
            held: None,
            expected: MIN_EXPECTED,
            quiet: false,
            signal: false,
            used: Vec::new(),
            out_of_turn: false,
            budget: 0,
            wait: RxWait::Turn,
        }
    }

    /// Gives the driver the frames that wait at `tap`, as far as it has buffers.
    pub(super) fn receive(
        &mut self,
        tap: &Tap,
        throttle: Option<&mut Throttle>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        // A driver that adds chains as fast as they are taken must not keep the event loop here.
        self.budget = MAX_CHAINS;
        self.wait = self.run(tap, throttle, counters)?;
        if std::mem::take(&mut self.signal) {
            self.queue.signal(&self.memory)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        tap: &Tap,
        mut throttle: Option<&mut Throttle>,
        counters: &mut Counters,
    ) -> Result<RxWait, DeviceError> {
        for _ in 0..MAX_FRAMES {
            if let Some(throttle) = throttle.as_deref_mut()
                && !throttle.is_open().map_err(super::timer_failed)?
            {
                return Ok(RxWait::Timer);
            }
            let frame = match self.held.take() {
                Some(frame) => frame,
                None => match self.read(tap, counters)? {
                    Ok(frame) => frame,
                    Err(wait) => return Ok(wait),
                },
            };
            let more = self.gather(frame.total, counters)?;
            if self.fits(frame.total) {
                self.deliver(frame, throttle.as_deref(), counters)?;
            } else if self.mergeable && more != RxWait::Frame {
                self.held = Some(frame);
                return Ok(more);
            } else {
                // No number of buffers that this driver can offer will do.
                counters.rx_dropped = counters.rx_dropped.saturating_add(1);
            }
        }
        Ok(RxWait::Frame)
    }

    /// Gives up the buffers at hand, so that the ring holds all that the driver offered. A frame that waits for more is
    /// lost, as on a wire.
    pub(super) fn rest(&mut self, counters: &mut Counters) -> Result<(), DeviceError> {
        if self.held.take().is_some() {
            counters.rx_dropped = counters.rx_dropped.saturating_add(1);
        }
        let count = self.chains.len();
        if std::mem::take(&mut self.out_of_turn) && count > 0 {
            // They are not the last ones of the ring any more: the driver gets them back empty.
            while let Some((head, _)) = self.remove(0) {
                self.queue.add_used(&self.memory, head, 0)?;
            }
            self.queue.signal(&self.memory)?;
        } else {
            while self.remove(0).is_some() {}
            self.queue.undo_pops(u16::try_from(count).unwrap_or(0));
        }
        self.wait = RxWait::Turn;
        Ok(())
    }

    /// Whether a frame of `total` bytes fits the chains at hand.
    fn fits(&self, total: usize) -> bool {
        let front = self.chains.front().map_or(0, |chain| chain.len);
        total <= if self.mergeable { self.room } else { front }
    }

    /// Takes chains off the ring until there is room for `want` bytes (one chain, if frames may not lie in several).
    /// `Frame`: there is, or no more can be taken; `Buffers`: the ring is empty; `Turn`: the turn is over.
    fn gather(&mut self, want: usize, counters: &mut Counters) -> Result<RxWait, DeviceError> {
        let want = if self.mergeable { want } else { 1 };
        loop {
            let taken = self.chains.len() >= usize::from(self.queue.size());
            if self.room >= want || taken || self.segments.saturating_add(MAX_DESCRIPTORS) > MAX_VECTORS {
                return Ok(RxWait::Frame);
            }
            if self.budget == 0 {
                return Ok(RxWait::Turn);
            }
            if !self.quiet {
                self.queue.disable_notification(&self.memory)?;
                self.quiet = true;
            }
            self.budget = self.budget.saturating_sub(1);
            if let Some(chain) = self.queue.pop(&self.memory)? {
                self.take(chain, counters)?;
                continue;
            }
            self.quiet = false;
            if !self.queue.enable_notification(&self.memory)? {
                return Ok(RxWait::Buffers);
            }
        }
    }

    /// Keeps the buffers of a chain; one that has others than writable ones is given back.
    fn take(&mut self, chain: DescriptorChain<Arc<PodMemory>>, counters: &mut Counters) -> Result<(), DeviceError> {
        let head = chain.head_index();
        let mut segments = self.spare.pop().unwrap_or_default();
        segments.clear();
        let mut len = 0_usize;
        let mut good = true;
        for (count, descriptor) in chain.enumerate() {
            if !descriptor.is_write_only() || count >= MAX_DESCRIPTORS {
                good = false;
                break;
            }
            // No frame is longer.
            let part = (descriptor.len() as usize).min(MAX_FRAME.saturating_sub(len));
            if part > 0 {
                segments.push((descriptor.addr(), part));
                len = len.saturating_add(part);
            }
        }
        // Where a frame begins there must be room for its header.
        if !good || len < super::HEADER_LEN {
            self.spare.push(segments);
            return self.refuse(head, counters);
        }
        self.room = self.room.saturating_add(len);
        self.segments = self.segments.saturating_add(segments.len());
        self.chains.push_back(Chain { head, segments, len });
        Ok(())
    }

    fn refuse(&mut self, head: u16, counters: &mut Counters) -> Result<(), DeviceError> {
        counters.rx_malformed = counters.rx_malformed.saturating_add(1);
        self.out_of_turn |= !self.chains.is_empty();
        self.signal = true;
        self.queue.add_used(&self.memory, head, 0)
    }

    /// Takes chain `index` out of those at hand; its head and length.
    fn remove(&mut self, index: usize) -> Option<(u16, usize)> {
        let chain = self.chains.remove(index)?;
        self.room = self.room.saturating_sub(chain.len);
        self.segments = self.segments.saturating_sub(chain.segments.len());
        let out = (chain.head, chain.len);
        if self.spare.len() < usize::from(self.queue.size()) {
            self.spare.push(chain.segments);
        }
        Some(out)
    }

    /// Reads a frame; what to wait for if there is none.
    fn read(&mut self, tap: &Tap, counters: &mut Counters) -> Result<Result<Held, RxWait>, DeviceError> {
        let more = self.gather(self.expected, counters)?;
        self.offer(counters)?;
        if self.vectors.len() == 0 {
            // All chains were bad. If the ring held as many as can be taken, there may be more now.
            return Ok(Err(if more == RxWait::Frame { RxWait::Turn } else { more }));
        }
        match tap.read(&mut self.vectors, &mut self.overflow) {
            Ok(total) if total >= super::HEADER_LEN => {
                let shrunk = self.expected.saturating_sub(self.expected / 8).max(MIN_EXPECTED);
                self.expected = total.max(shrunk);
                let landed = total.min(self.vectors.len());
                Ok(Ok(Held { total, landed }))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Err(RxWait::Frame)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Err(RxWait::Turn)),
            // The interface is gone, or the queue detached: looked at again when the driver rings. A descriptor
            // that is readable for ever must not be watched.
            result => {
                tracing::debug!(tap = tap.name(), ?result, "no frames can be read");
                counters.rx_errors = counters.rx_errors.saturating_add(1);
                if self.quiet {
                    self.quiet = false;
                    // What is there already is enough to read with, when the interface is back.
                    self.queue.enable_notification(&self.memory)?;
                }
                Ok(Err(RxWait::Buffers))
            }
        }
    }

    /// Makes the vectors of the first chains, enough for what is expected. Page states are looked at here, anew for
    /// each frame: a chain that is private by now is given back.
    fn offer(&mut self, counters: &mut Counters) -> Result<(), DeviceError> {
        self.vectors.clear();
        let mut index = 0;
        while self.vectors.len() < self.expected {
            let Some(chain) = self.chains.get(index) else {
                break;
            };
            let head = chain.head;
            let mark = self.vectors.mark();
            let good = (chain.segments.iter()).all(|(address, len)| self.vectors.push(*address, *len));
            if !good {
                self.vectors.back_to(mark);
                self.remove(index);
                self.refuse(head, counters)?;
                continue;
            }
            if !self.mergeable {
                break;
            }
            index = index.saturating_add(1);
        }
        Ok(())
    }

    /// Completes a frame for which there is room, and gives its chains back.
    fn deliver(
        &mut self,
        frame: Held,
        throttle: Option<&Throttle>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        let mut count = 0_usize;
        let mut room = 0_usize;
        for chain in &self.chains {
            if room >= frame.total {
                break;
            }
            room = room.saturating_add(chain.len);
            count = count.saturating_add(1);
        }
        let rest = self.overflow.get(..frame.total.saturating_sub(frame.landed));
        let number = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        let complete = rest.is_some_and(|rest| self.write(frame.landed, rest)) && self.write(NUM_BUFFERS, &number);
        self.used.clear();
        let mut left = if complete { frame.total } else { 0 };
        for _ in 0..count {
            let Some((head, len)) = self.remove(0) else {
                break;
            };
            let filled = left.min(len);
            left = left.saturating_sub(filled);
            self.used.push((head, u32::try_from(filled).unwrap_or(0)));
        }
        self.signal = true;
        self.queue.add_used_together(&self.memory, &self.used)?;
        if complete {
            let bytes = frame.total.saturating_sub(super::HEADER_LEN) as u64;
            counters.rx_frames = counters.rx_frames.saturating_add(1);
            counters.rx_bytes = counters.rx_bytes.saturating_add(bytes);
            if let Some(throttle) = throttle {
                throttle.charge(bytes, 1);
            }
        } else {
            counters.rx_dropped = counters.rx_dropped.saturating_add(1);
        }
        Ok(())
    }

    /// Writes `bytes` at `offset` of the chains at hand, as if they were one buffer.
    fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let mut skip = offset;
        let mut rest = bytes;
        for (address, len) in self.chains.iter().flat_map(|chain| &chain.segments) {
            if rest.is_empty() {
                break;
            }
            if skip >= *len {
                skip = skip.saturating_sub(*len);
                continue;
            }
            let part = rest.len().min(len.saturating_sub(skip));
            let (now, later) = rest.split_at_checked(part).unwrap_or((rest, &[]));
            let Some(at) = address.0.checked_add(skip as u64) else {
                return false;
            };
            if self.memory.write_slice(now, GuestAddress(at)).is_err() {
                return false;
            }
            skip = 0;
            rest = later;
        }
        rest.is_empty()
    }
}
