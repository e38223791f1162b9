//! What of a pod's memory changes while it runs beside its size: the balloon, the zones.

use podvisor_api::types::{BalloonConfig, VmConfig, VmResizeZone};

use super::{PodError, PodSlot};
use crate::config::{PlanError, PodPlan};

pub(super) fn refused(field: &str, reason: impl Into<String>) -> PodError {
    PodError::Config(PlanError::Field {
        field: field.to_owned(),
        reason: reason.into(),
    })
}

/// The balloon of `config` when the guest is asked to give up `size` bytes.
pub(super) fn resized_balloon(config: &VmConfig, size: u64) -> Result<BalloonConfig, PodError> {
    let Some(balloon) = &config.balloon else {
        let field = format!("desired_balloon {size}");
        return Err(refused(&field, "the pod has no balloon; give it one in vm.create"));
    };
    Ok(BalloonConfig {
        size,
        ..balloon.clone()
    })
}

impl PodSlot {
    /// Bytes that the guest has: what it was given, less what the balloon took.
    pub(super) fn actual_memory(&self, given: u64) -> u64 {
        let machine = self
            .pod
            .as_ref()
            .and_then(|pod| pod.running.as_ref())
            .map(|r| &r.machine);
        let taken = machine.and_then(|machine| machine.balloon());
        given.saturating_sub(taken.map_or(0, |balloon| balloon.actual_size()))
    }

    /// Gives a zone another size, as far as it has room: at once in the configuration, and by asking the guest if it runs.
    ///
    /// # Errors
    /// When there is no pod or no such zone, or it cannot have that size; nothing has changed then.
    pub fn resize_zone(&mut self, wanted: &VmResizeZone) -> Result<(), PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        let (id, desired) = (&wanted.id, wanted.desired_ram);
        let mut config = pod.plan.config.clone();
        let mut zones = config.memory.zones.iter_mut().flatten();
        let Some(zone) = zones.find(|zone| zone.id == *id) else {
            let reason = format!("no memory zone is named {id:?}: vm.info has the names");
            return Err(refused("id", reason));
        };
        let boot = zone.size;
        if pod.running.is_some() {
            // What a guest takes through virtio-mem it is asked to take again.
            zone.hotplugged_size = desired.checked_sub(boot).filter(|size| *size > 0);
        } else {
            (zone.size, zone.hotplugged_size) = (desired, None);
        }
        if let Some(running) = &mut pod.running {
            running.machine.resize_zone(id, boot, desired)?;
        }
        pod.plan = PodPlan::changed(config, self.expect_digest)?.keeping(&pod.plan);
        tracing::info!(?wanted, "zone resized");
        Ok(())
    }
}
