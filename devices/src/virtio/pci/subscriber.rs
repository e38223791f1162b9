//! A virtio device on an event loop: doorbells and the device's own descriptors, registered once for its life.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Phase, Standing, VirtioPci};
use crate::platform::DeviceStep;
use crate::sync::lock;

/// A device as the event manager runs it; the PCI root holds the same one.
#[derive(Clone)]
pub struct VirtioPciSubscriber(pub Arc<Mutex<VirtioPci>>);

impl MutEventSubscriber for VirtioPciSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        let this = lock(&self.0);
        let doorbells = this.doorbells.iter().enumerate();
        let watched = doorbells.map(|(index, d)| (!this.device.handles_doorbell(index)).then(|| d.fd.as_raw_fd()));
        let own = this.device.event_fds().into_iter().map(Some);
        for (data, fd) in (0u32..).zip(watched.chain(own)) {
            let Some(fd) = fd else { continue };
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                tracing::error!(
                    id = this.id,
                    ?error,
                    "a descriptor cannot be watched: the device will not work"
                );
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut guard = lock(&self.0);
        let this = &mut *guard;
        let index = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if let Some(doorbell) = this.doorbells.get_mut(index) {
            // Nothing to read: a reset or another wake-up took it.
            let _ = doorbell.fd.read();
            match this.phase {
                Phase::Active(..) => {
                    // A failure is told to the driver; the loop has nothing to add.
                    let _ = this.drive(|device| device.on_queue(index));
                }
                Phase::Configuring(_) => doorbell.early = true,
                Phase::Failed(_) => {}
            }
            return;
        }
        let event = index.saturating_sub(this.doorbells.len());
        let (was_active, was) = (this.is_active(), this.standing());
        if let Err(error) = this.drive(|device| device.on_event(event))
            && !was_active
        {
            // No driver to tell, and a readable descriptor that nobody drains would spin the loop.
            tracing::error!(id = this.id, event, %error, "a descriptor is watched no longer");
            this.stand();
            if was != Standing::Failed {
                this.hypervisor.stepped(&this.id, DeviceStep::Failed);
            }
            if let Err(error) = ops.remove(Events::with_data_raw(events.fd(), events.data(), EventSet::IN)) {
                tracing::warn!(?error, "a descriptor cannot be taken off the loop");
            }
        }
    }
}
