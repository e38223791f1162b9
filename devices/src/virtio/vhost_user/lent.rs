//! The queues of a device that its back end runs: from the transport to the back end and back, with their doorbells
//! and interrupts.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::frontend::Frontend;
use super::{VhostUserError, table};
use crate::memory::PodMemory;
use crate::virtio::device::{Activation, DeviceError, QueueInterrupt};

/// Features of the rings that this front end can pass on; it makes split rings only.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A queue that the back end runs.
struct Lent {
    interrupt: Arc<dyn QueueInterrupt>,
    doorbell: EventFd,
}

/// What the kinds of devices share: the connection and the queues that the back end runs.
pub(super) struct LentQueues {
    pub(super) frontend: Frontend,
    /// Written by the back end to interrupt, where the interrupt has no descriptor of its own.
    calls: Vec<EventFd>,
    lent: Vec<Option<Lent>>,
    active: bool,
    interrupts_forwarded: u64,
}

/// The number of a queue in a message.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl LentQueues {
    /// Connects to `socket` for `queues` queues; a back end that does not say how many it has, has `implied`.
    pub(super) fn connect(socket: &Path, queues: usize, implied: u64) -> Result<Self, VhostUserError> {
        Self::over(Frontend::open(socket)?, socket, queues, implied)
    }

    /// As [`LentQueues::connect`], over a connection.
    pub(super) fn over(
        mut frontend: Frontend,
        socket: &Path,
        queues: usize,
        implied: u64,
    ) -> Result<Self, VhostUserError> {
        if frontend.features() & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(frontend.lacks("virtio 1.0 (VIRTIO_F_VERSION_1)"));
        }
        let has = frontend.queue_count()?.unwrap_or(implied);
        if has < queues as u64 {
            return Err(VhostUserError::Queues {
                path: socket.to_owned(),
                wanted: queues,
                has,
            });
        }
        let calls = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK));
        let calls = calls
            .collect::<io::Result<_>>()
            .map_err(|source| VhostUserError::Host {
                what: "making an eventfd",
                source,
            })?;
        Ok(Self {
            frontend,
            calls,
            lent: (0..queues).map(|_| None).collect(),
            active: false,
            interrupts_forwarded: 0,
        })
    }

    /// Which of the features `wanted` the device can offer: with those of the rings, as far as the back end has them.
    pub(super) fn features(&self, wanted: u64) -> u64 {
        self.frontend.features() & (wanted | RING_FEATURES)
    }

    /// Whether queue `index` is the back end's.
    pub(super) fn has(&self, index: usize) -> bool {
        index < self.lent.len()
    }

    /// Lends the queues of `activation` that are the back end's; the others are left in it. Those before `enabled` are
    /// enabled.
    pub(super) fn start(&mut self, activation: &mut Activation, enabled: usize) -> Result<(), VhostUserError> {
        self.active = true;
        self.frontend.begin();
        let features = activation.features & self.frontend.features();
        self.frontend.set_features(features)?;
        self.frontend.set_memory(&activation.memory, false)?;
        let queues = activation.queues.iter_mut().zip(&mut self.lent).zip(&self.calls);
        for (index, ((queue, lent), call)) in queues.enumerate() {
            let Some(queue) = queue.take() else { continue };
            let parts = queue.into_parts().ok_or(VhostUserError::NoDoorbell(index))?;
            let direct = parts.interrupt.eventfd();
            let call = direct.as_ref().unwrap_or(call);
            // Kept before the back end hears of it: from its first message on it has to be stopped.
            let lent = lent.insert(Lent {
                interrupt: parts.interrupt,
                doorbell: parts.doorbell,
            });
            self.frontend
                .start_ring(number(index), &parts.queue, &lent.doorbell, call)?;
        }
        for index in 0..enabled {
            self.enable(index, true)?;
        }
        Ok(())
    }

    /// Enables or disables queue `index`, if the driver has set it up.
    pub(super) fn enable(&mut self, index: usize, on: bool) -> Result<(), VhostUserError> {
        match self.lent.get(index) {
            Some(Some(_)) => self.frontend.enable_ring(number(index), on),
            _ => Ok(()),
        }
    }

    /// Takes the queues back. When this returns, the back end uses them no longer, or is given up.
    pub(super) fn stop(&mut self) {
        self.active = false;
        self.frontend.begin();
        for (index, lent) in self.lent.iter_mut().enumerate() {
            if lent.take().is_none() || self.frontend.is_gone() {
                continue;
            }
            if let Err(error) = self.frontend.stop_ring(number(index)) {
                tracing::error!(%error, index, "a queue cannot be taken back: the back end is given up");
                self.frontend.give_up();
            }
        }
        for call in &self.calls {
            // What a queue that is gone still wanted.
            let _ = call.read();
        }
    }

    /// Tells the back end of other memory, if a driver uses it or it knows of some; else it learns of it when one does.
    pub(super) fn update_memory(&mut self, memory: &Arc<PodMemory>) -> Result<(), VhostUserError> {
        table::regions(memory)?;
        // What it has mapped of a machine that is gone would stay in use until the next driver is ready.
        if self.active || self.frontend.has_memory() {
            self.frontend.begin();
            self.frontend.set_memory(memory, self.active)?;
        }
        Ok(())
    }

    /// Tells the back end how queue `index` interrupts now.
    pub(super) fn interrupt_moved(&mut self, index: usize) -> Result<(), VhostUserError> {
        let (Some(Some(lent)), Some(call)) = (self.lent.get(index), self.calls.get(index)) else {
            return Ok(());
        };
        let direct = lent.interrupt.eventfd();
        self.frontend.begin();
        self.frontend.set_call(number(index), direct.as_ref().unwrap_or(call))
    }

    /// The connection, then a descriptor a queue.
    pub(super) fn event_fds(&self) -> Vec<RawFd> {
        let calls = self.calls.iter().map(AsRawFd::as_raw_fd);
        std::iter::once(self.frontend.as_raw_fd()).chain(calls).collect()
    }

    /// Descriptor `index` of [`LentQueues::event_fds`] is readable.
    pub(super) fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(queue) = index.checked_sub(1) else {
            return Ok(self.frontend.check()?);
        };
        let Some(call) = self.calls.get(queue) else {
            return Ok(());
        };
        if call.read().is_ok()
            && let Some(Some(lent)) = self.lent.get(queue)
        {
            self.interrupts_forwarded += 1;
            lent.interrupt.signal_used().map_err(|source| DeviceError::Host {
                what: "raising a queue interrupt",
                source,
            })?;
        }
        Ok(())
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("interrupts_forwarded", self.interrupts_forwarded),
            ("back_end_gone", u64::from(self.frontend.is_gone())),
        ]
    }
}
