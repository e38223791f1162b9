//! A network device in use, from activation to reset: which queue pairs are in use, what each of them waits for, and
//! the TAP queues that are therefore watched. A queue that can make no progress is watched by nobody, so that the
//! event loop sleeps.

use std::sync::Arc;

use libc::c_uint;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::control::{Command, Request};
use super::rx::{Receiver, RxWait};
use super::tap::Tap;
use super::tx::{Sender, TxWait};
use super::{AGAIN, RX_TIMER, Shared, TX_TIMER};
use crate::memory::PodMemory;
use crate::virtio::device::{Activation, ActiveQueue, DeviceError};

/// The driver's features that say what it accepts in received frames, and what TAP calls them.
const OFFLOADS: [(u32, c_uint); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// A queue pair; None for a queue that the driver did not enable.
struct Pair {
    receiver: Option<Receiver>,
    sender: Option<Sender>,
    /// What its TAP queue is watched for.
    watched: EventSet,
}

/// A network device in use.
pub(super) struct Active {
    memory: Arc<PodMemory>,
    features: u64,
    pairs: Vec<Pair>,
    /// Pairs that the driver uses now: the first ones.
    in_use: usize,
    control: Option<ActiveQueue>,
    /// The control queue's index.
    control_index: usize,
    /// There may be commands that were not taken.
    control_pending: bool,
    /// The offloads that the interface was told of last, as features.
    offloads: u64,
}

/// What a snapshot holds of a device in use, beside its queues.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    /// Pairs that the driver uses.
    pairs: usize,
    /// As features.
    offloads: u64,
}

impl Active {
    /// Takes the queues of `activation` into use: one pair, until the driver asks for more (virtio 1.2 5.1.5).
    pub(super) fn new(shared: &mut Shared, activation: Activation) -> Result<Self, DeviceError> {
        let Activation {
            memory,
            features,
            mut queues,
            ..
        } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        let count = if has(VIRTIO_NET_F_MQ) { shared.taps.len() } else { 1 };
        let control_index = count.saturating_mul(2);
        let mut take = |index: usize| queues.get_mut(index).and_then(Option::take);
        let mut pairs = Vec::new();
        for index in 0..count {
            let receive = take(index.saturating_mul(2));
            let transmit = take(index.saturating_mul(2).saturating_add(1));
            pairs.push(Pair {
                receiver: receive.map(|q| Receiver::new(q, Arc::clone(&memory), has(VIRTIO_NET_F_MRG_RXBUF))),
                sender: transmit.map(|q| Sender::new(q, Arc::clone(&memory))),
                watched: EventSet::empty(),
            });
        }
        let control = take(control_index).filter(|_| has(VIRTIO_NET_F_CTRL_VQ));
        set_offload(&shared.taps, features).map_err(|source| DeviceError::Host {
            what: "setting the offloads of a TAP interface",
            source,
        })?;
        let mut this = Self {
            memory,
            features,
            pairs,
            in_use: 0,
            control,
            control_index,
            control_pending: true,
            offloads: features & offload_bits(),
        };
        this.use_pairs(shared, 1).map_err(|source| DeviceError::Host {
            what: "attaching the queues of a TAP interface",
            source,
        })?;
        // Buffers may be there already; the loop finds them.
        let _ = shared.again.write(1);
        Ok(this)
    }

    /// Uses the first `count` pairs. The kernel spreads frames over attached queues, so that the others are detached.
    fn use_pairs(&mut self, shared: &mut Shared, count: usize) -> std::io::Result<()> {
        // Detached queues read as failed: not watched before they are detached.
        self.in_use = count.min(self.in_use);
        self.watch(shared);
        for (index, tap) in shared.taps.iter_mut().enumerate() {
            tap.attach(index < count)?;
        }
        self.in_use = count;
        for pair in self.pairs.iter_mut().take(count) {
            pair.receiver.iter_mut().for_each(|r| r.wait = RxWait::Turn);
            pair.sender.iter_mut().for_each(|s| s.wait = TxWait::Turn);
        }
        Ok(())
    }

    /// The driver rang the doorbell of queue `index`.
    pub(super) fn on_queue(&mut self, shared: &mut Shared, index: usize) -> Result<(), DeviceError> {
        if index == self.control_index {
            self.serve_control(shared)?;
        } else if index / 2 < self.in_use {
            let rx = |wait| matches!(wait, RxWait::Buffers | RxWait::Turn);
            let tx = |wait| matches!(wait, TxWait::Doorbell | TxWait::Turn);
            self.serve(shared, index / 2, rx, tx)?;
        }
        self.watch(shared);
        Ok(())
    }

    /// `data` of the device's epoll was reported.
    pub(super) fn on_event(&mut self, shared: &mut Shared, data: u64) -> Result<(), DeviceError> {
        if let Ok(pair) = usize::try_from(data)
            && pair < self.in_use
        {
            self.serve(shared, pair, |rx| rx == RxWait::Frame, |tx| tx == TxWait::Room)?;
        } else if matches!(data, AGAIN | RX_TIMER | TX_TIMER) {
            for pair in 0..self.in_use {
                let rx = |wait| match wait {
                    RxWait::Turn => data == AGAIN,
                    RxWait::Timer => data == RX_TIMER,
                    RxWait::Frame | RxWait::Buffers => false,
                };
                let tx = |wait| match wait {
                    TxWait::Turn => data == AGAIN,
                    TxWait::Timer => data == TX_TIMER,
                    TxWait::Doorbell | TxWait::Room => false,
                };
                self.serve(shared, pair, rx, tx)?;
            }
            if data == AGAIN && self.control_pending {
                self.serve_control(shared)?;
            }
        }
        self.watch(shared);
        Ok(())
    }

    /// Gives each half of a pair its turn if what it waits for has come.
    fn serve(
        &mut self,
        shared: &mut Shared,
        index: usize,
        rx: impl Fn(RxWait) -> bool,
        tx: impl Fn(TxWait) -> bool,
    ) -> Result<(), DeviceError> {
        let (Some(pair), Some(tap)) = (self.pairs.get_mut(index), shared.taps.get(index)) else {
            return Ok(());
        };
        if let Some(sender) = pair.sender.as_mut().filter(|sender| tx(sender.wait)) {
            sender.transmit(tap, shared.tx_throttle.as_mut(), &mut shared.counters)?;
            if sender.wait == TxWait::Turn {
                // Full: it is readable already.
                let _ = shared.again.write(1);
            }
        }
        if let Some(receiver) = pair.receiver.as_mut().filter(|receiver| rx(receiver.wait)) {
            receiver.receive(tap, shared.rx_throttle.as_mut(), &mut shared.counters)?;
            if receiver.wait == RxWait::Turn {
                let _ = shared.again.write(1);
            }
        }
        Ok(())
    }

    /// Carries out the commands of the control queue.
    fn serve_control(&mut self, shared: &mut Shared) -> Result<(), DeviceError> {
        let Some(mut queue) = self.control.take() else {
            self.control_pending = false;
            return Ok(());
        };
        let result = self.run_control(shared, &mut queue);
        self.control = Some(queue);
        result
    }

    fn run_control(&mut self, shared: &mut Shared, queue: &mut ActiveQueue) -> Result<(), DeviceError> {
        let memory = Arc::clone(&self.memory);
        let mut budget = 2 * u32::from(queue.size());
        let mut used = false;
        self.control_pending = true;
        while self.control_pending {
            queue.disable_notification(&memory)?;
            while budget > 0
                && let Some(chain) = queue.pop(&memory)?
            {
                budget = budget.saturating_sub(1);
                let head = chain.head_index();
                let request = Request::parse(&memory, chain);
                let success = self.execute(shared, request.command);
                queue.add_used(&memory, head, request.answer(&memory, success))?;
                used = true;
            }
            if budget == 0 {
                let _ = shared.again.write(1);
                break;
            }
            self.control_pending = queue.enable_notification(&memory)?;
        }
        if used { queue.signal(&memory) } else { Ok(()) }
    }

    fn execute(&mut self, shared: &mut Shared, command: Command) -> bool {
        let has = |bit: u32| self.features & 1 << bit != 0;
        let result = match command {
            Command::Pairs(count) if has(VIRTIO_NET_F_MQ) && count > 0 && usize::from(count) <= self.pairs.len() => {
                let result = self.use_pairs(shared, usize::from(count));
                // The new pairs may have buffers.
                let _ = shared.again.write(1);
                result
            }
            Command::Offloads(bits)
                if has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) && bits & !(self.features & offload_bits()) == 0 =>
            {
                self.offloads = bits;
                set_offload(&shared.taps, bits)
            }
            _ => return false,
        };
        if let Err(error) = &result {
            tracing::warn!(%error, ?command, "a command of the network driver failed");
        }
        result.is_ok()
    }

    /// Gives up what was taken off the rings; the next turn takes it again.
    pub(super) fn save(&mut self, shared: &mut Shared) -> Result<Saved, DeviceError> {
        for receiver in self.pairs.iter_mut().filter_map(|pair| pair.receiver.as_mut()) {
            receiver.rest(&mut shared.counters)?;
        }
        let _ = shared.again.write(1);
        self.watch(shared);
        Ok(Saved {
            pairs: self.in_use,
            offloads: self.offloads,
        })
    }

    /// Takes over what the driver of another monitor's device had chosen; false when no driver could have.
    pub(super) fn restore(&mut self, shared: &mut Shared, saved: Saved) -> bool {
        let pairs = u16::try_from(saved.pairs).unwrap_or(0);
        let chosen = saved.pairs == self.in_use || self.execute(shared, Command::Pairs(pairs));
        let told = saved.offloads == self.offloads || self.execute(shared, Command::Offloads(saved.offloads));
        chosen && told
    }

    /// Watches each TAP queue for what its pair waits for.
    fn watch(&mut self, shared: &Shared) {
        for (index, (pair, tap)) in self.pairs.iter_mut().zip(&shared.taps).enumerate() {
            let mut wanted = EventSet::empty();
            if index < self.in_use {
                let frame = pair.receiver.as_ref().is_some_and(|r| r.wait == RxWait::Frame);
                let room = pair.sender.as_ref().is_some_and(|s| s.wait == TxWait::Room);
                wanted.set(EventSet::IN, frame);
                wanted.set(EventSet::OUT, room);
            }
            if wanted == pair.watched {
                continue;
            }
            let operation = match (pair.watched.is_empty(), wanted.is_empty()) {
                (true, _) => ControlOperation::Add,
                (_, true) => ControlOperation::Delete,
                _ => ControlOperation::Modify,
            };
            let event = EpollEvent::new(wanted, index as u64);
            match shared.epoll.ctl(operation, tap.fd(), event) {
                Ok(()) => pair.watched = wanted,
                Err(error) => tracing::warn!(%error, tap = tap.name(), "a TAP queue cannot be watched"),
            }
        }
    }

    /// Watches nothing any more.
    pub(super) fn unwatch(&mut self, shared: &Shared) {
        self.in_use = 0;
        self.watch(shared);
    }
}

/// The features that can be switched at run time.
fn offload_bits() -> u64 {
    OFFLOADS.iter().fold(0, |all, (bit, _)| all | 1 << bit)
}

/// Tells the kernel what `features` of the driver mean for received frames. The offloads are the interface's: one
/// queue sets them for all.
fn set_offload(taps: &[Tap], features: u64) -> std::io::Result<()> {
    let mut flags = OFFLOADS
        .iter()
        .filter(|(bit, _)| features & 1 << bit != 0)
        .fold(0, |all, (_, flag)| all | flag);
    // A driver may leave out what others depend on (virtio 1.2 5.1.3.1); the kernel refuses that.
    if flags & libc::TUN_F_CSUM == 0 {
        flags = 0;
    }
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    match taps.first() {
        Some(tap) => tap.set_offload(flags),
        None => Ok(()),
    }
}
