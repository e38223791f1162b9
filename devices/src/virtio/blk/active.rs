//! A disk in use, from activation to reset: takes chains off the queues, keeps the engine busy, gives chains back.

use std::sync::Arc;
use std::time::Instant;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::Shared;
use super::request::{Operation, Parser, Rejection, Request};
use super::ring::{Engine, IoVec};
use super::task::{Mode, Next, Status, Task, write_status};
use crate::memory::PodMemory;
use crate::rate_limiter::Throttle;
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, QueueInterrupt};

/// The most jobs that the host works on at once.
const MAX_DEPTH: usize = 256;
/// The most finished steps that are handled before the event loop gets its turn.
const MAX_STEPS: usize = 256;
/// The most host memory that bounced requests hold at once, in bytes.
const MAX_BOUNCED: u64 = 8 << 20;

/// A disk in use.
pub(super) struct Active {
    /// First, since dropping it waits for the host.
    engine: Engine<Task>,
    depth: usize,
    /// Tells the driver of another size.
    pub(super) config_changed: Arc<dyn QueueInterrupt>,
    memory: Arc<PodMemory>,
    features: u64,
    queues: Vec<Option<QueueState>>,
    parser: Parser,
    /// Vectors to reuse.
    spare: Vec<Vec<IoVec>>,
    /// Host memory that bounced requests hold, in bytes.
    bounced: u64,
}

struct QueueState {
    queue: ActiveQueue,
    /// There may be chains that were not popped.
    pending: bool,
    /// Chains were given back and the driver was not told yet.
    used: bool,
}

impl Active {
    /// Sets up the engine for the queues of `activation`.
    pub(super) fn new(shared: &Shared, activation: Activation) -> Result<Self, DeviceError> {
        let sizes = activation
            .queues
            .iter()
            .flatten()
            .map(|queue| usize::from(queue.size()));
        let depth = sizes.sum::<usize>().clamp(1, MAX_DEPTH);
        let ring = !shared.options.disable_io_uring;
        let engine =
            Engine::new(Arc::clone(&shared.disk), depth, &shared.event, ring).map_err(|source| DeviceError::Host {
                what: "setting up disk I/O",
                source,
            })?;
        let queues = activation.queues.into_iter().map(|queue| {
            queue.map(|queue| QueueState {
                queue,
                pending: false,
                used: false,
            })
        });
        Ok(Self {
            engine,
            depth,
            config_changed: activation.config_changed,
            memory: activation.memory,
            features: activation.features,
            queues: queues.collect(),
            parser: Parser::default(),
            spare: Vec::new(),
            bounced: 0,
        })
    }

    /// Jobs that the host works on.
    pub(super) fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    /// Whether io_uring does the work.
    pub(super) fn uses_ring(&self) -> bool {
        self.engine.uses_ring()
    }

    /// The driver rang the doorbell of queue `index`.
    pub(super) fn on_queue(&mut self, shared: &mut Shared, index: usize) -> Result<(), DeviceError> {
        self.service(shared, index)?;
        self.pump(shared)
    }

    /// The event was signalled: something finished, or there is more to do.
    pub(super) fn on_event(&mut self, shared: &mut Shared) -> Result<(), DeviceError> {
        self.pump(shared)?;
        let mut serviced = false;
        for index in 0..self.queues.len() {
            if self.state(index).is_some_and(|state| state.pending) {
                self.service(shared, index)?;
                serviced = true;
            }
        }
        if serviced { self.pump(shared) } else { Ok(()) }
    }

    fn state(&mut self, index: usize) -> Option<&mut QueueState> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// Pops what queue `index` holds, as far as the host can take it now; leaves `pending` set if that is not all.
    fn service(&mut self, shared: &mut Shared, index: usize) -> Result<(), DeviceError> {
        let memory = Arc::clone(&self.memory);
        // A driver that adds chains as fast as they are popped must not keep the event loop here.
        let Some(mut budget) = self
            .state(index)
            .map(|state| u32::from(state.queue.size()).saturating_mul(2))
        else {
            return Ok(());
        };
        while let Some(state) = self.state(index) {
            state.pending = true;
            state.queue.disable_notification(&memory)?;
            while let Some(chain) = match self.state(index) {
                Some(state) => state.queue.pop(&memory)?,
                None => None,
            } {
                if !self.accept(shared, index, chain)? {
                    // The rate limiter's timer comes back to it.
                    self.state(index).into_iter().for_each(|state| state.queue.undo_pop());
                    return Ok(());
                }
                budget = budget.saturating_sub(1);
                if budget == 0 || self.engine.in_flight() >= self.depth {
                    return Ok(());
                }
            }
            if let Some(state) = self.state(index)
                && !state.queue.enable_notification(&memory)?
            {
                state.pending = false;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Parses one chain and starts it, or answers it at once. False: the rate limiter lets it wait.
    fn accept(
        &mut self,
        shared: &mut Shared,
        index: usize,
        chain: DescriptorChain<Arc<PodMemory>>,
    ) -> Result<bool, DeviceError> {
        let head = chain.head_index();
        let request = match self.parser.parse(chain, &self.memory, &shared.limits) {
            Ok(request) => request,
            Err(rejection) => {
                shared.counters.failed();
                let answer = match rejection {
                    Rejection::NoStatus => {
                        shared.counters.malformed();
                        None
                    }
                    Rejection::IoError(status) => Some((status, Status::IoError)),
                    Rejection::Unsupported(status) => Some((status, Status::Unsupported)),
                };
                return self.give_back(index, head, answer, 0).map(|()| true);
            }
        };
        if !admit(shared, &request)? {
            return Ok(false);
        }
        let mode = Mode {
            durable: !shared.options.readonly && !shared.config.writeback(self.features),
            sparse: shared.limits.discard,
            bounce: MAX_BOUNCED.saturating_sub(self.bounced),
        };
        let iovecs = self.spare.pop().unwrap_or_default();
        let host = (&*shared.disk, &self.memory, mode);
        match Task::start((index, head), request, &self.parser, host, iovecs) {
            Some(Next::Step(job)) => {
                self.bounced = self.bounced.saturating_add(job.tag.bounced);
                self.engine.submit(job);
            }
            Some(Next::Done(task, status, iovecs)) => self.finish(shared, &task, status, iovecs)?,
            None => {
                shared.counters.failed();
                self.give_back(index, head, Some((request.status, Status::IoError)), 0)?;
            }
        }
        Ok(true)
    }

    /// Answers a request that is done.
    fn finish(
        &mut self,
        shared: &mut Shared,
        task: &Task,
        mut status: Status,
        iovecs: Vec<IoVec>,
    ) -> Result<(), DeviceError> {
        self.bounced = self.bounced.saturating_sub(task.bounced);
        if iovecs.capacity() != 0 && self.spare.len() < MAX_DEPTH {
            self.spare.push(iovecs);
        }
        let mut written = 0;
        match task.request.operation {
            Operation::GetId => match self.write_serial(&shared.serial) {
                Some(len) => written = len,
                None => status = Status::IoError,
            },
            Operation::In { len, .. } if status == Status::Ok => written = len,
            _ => {}
        }
        shared.counters.count(&task.request, status);
        match (task.request.operation, task.error) {
            (Operation::In { .. } | Operation::GetId, _) => {}
            (_, Some(code)) => shared.storage.failed(code, &shared.disk, Instant::now()),
            (Operation::Out { .. }, None) => shared.storage.succeeded(&shared.disk, Instant::now),
            _ => {}
        }
        self.give_back(task.queue, task.head, Some((task.request.status, status)), written)
    }

    /// Writes the status, if there is room for one, and gives the chain back; `data` bytes lie before the status.
    fn give_back(
        &mut self,
        index: usize,
        head: u16,
        answer: Option<(GuestAddress, Status)>,
        data: u64,
    ) -> Result<(), DeviceError> {
        let told = answer.is_some_and(|(address, status)| write_status(&self.memory, address, status));
        let len = if told {
            u32::try_from(data.saturating_add(1)).unwrap_or(u32::MAX)
        } else {
            0
        };
        let Some(state) = self.queues.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        state.used = true;
        state.queue.add_used(&self.memory, head, len)
    }

    /// Writes the serial into the buffers of the request just parsed; how many bytes.
    fn write_serial(&self, serial: &[u8]) -> Option<u64> {
        let mut rest = serial;
        let mut written = 0_u64;
        for segment in self.parser.segments() {
            let (part, tail) = rest.split_at_checked(rest.len().min(segment.len as usize))?;
            self.memory.write_slice(part, segment.address).ok()?;
            written = written.saturating_add(part.len() as u64);
            rest = tail;
        }
        Some(written)
    }

    /// Starts what was submitted, follows what is finished, tells the driver, and asks for another turn when there
    /// is more to do than fits into one.
    fn pump(&mut self, shared: &mut Shared) -> Result<(), DeviceError> {
        let mut steps = 0;
        self.engine.mute();
        let more = loop {
            let started = self.engine.flush().map_err(|source| DeviceError::Host {
                what: "submitting disk I/O",
                source,
            })?;
            if steps >= MAX_STEPS {
                break true;
            }
            if let Some((job, result)) = self.engine.next_done() {
                steps += 1;
                match Task::next(job, result, &self.memory) {
                    Next::Step(job) => self.engine.submit(job),
                    Next::Done(task, status, iovecs) => self.finish(shared, &task, status, iovecs)?,
                }
            } else if !started {
                break true;
            } else if !self.engine.unmute() {
                break false;
            } else {
                self.engine.mute();
            }
        };
        self.engine.unmute();
        self.notify(shared, more)
    }

    /// Takes no more from the queues and waits for the host to finish what it works on; all of it is given back then. What
    /// is still in the queues is come back to.
    pub(super) fn rest(&mut self, shared: &mut Shared) -> Result<(), DeviceError> {
        let broken = |source| DeviceError::Host {
            what: "waiting for disk I/O",
            source,
        };
        while self.engine.in_flight() > 0 {
            self.engine.flush().map_err(broken)?;
            self.engine.wait().map_err(broken)?;
            while let Some((job, result)) = self.engine.next_done() {
                match Task::next(job, result, &self.memory) {
                    Next::Step(job) => self.engine.submit(job),
                    Next::Done(task, status, iovecs) => self.finish(shared, &task, status, iovecs)?,
                }
            }
        }
        self.notify(shared, true)
    }

    /// One interrupt for each queue that got something back; another turn if there is `more` to do.
    fn notify(&mut self, shared: &Shared, mut more: bool) -> Result<(), DeviceError> {
        let limited = shared.throttle.as_ref().is_some_and(Throttle::is_waiting);
        let room = self.engine.in_flight() < self.depth && !limited;
        for state in self.queues.iter_mut().flatten() {
            if std::mem::take(&mut state.used) {
                state.queue.signal(&self.memory)?;
            }
            more |= state.pending && room;
        }
        if more {
            // Full: it is readable already.
            let _ = shared.event.write(1);
        }
        Ok(())
    }
}

/// Whether the rate limiter lets `request` pass now.
fn admit(shared: &mut Shared, request: &Request) -> Result<bool, DeviceError> {
    let Some(throttle) = &mut shared.throttle else {
        return Ok(true);
    };
    let bytes = match request.operation {
        Operation::In { len, .. } | Operation::Out { len, .. } => len,
        Operation::Flush | Operation::GetId | Operation::Discard | Operation::WriteZeroes => 0,
    };
    throttle.admit(bytes, 1).map_err(|source| DeviceError::Host {
        what: "setting the rate limiter's timer",
        source,
    })
}
