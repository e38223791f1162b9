//! What of a pod's memory changes while it runs beside its size: the balloon, the zones.

use podvisor_api::types::{BalloonConfig, VmConfig, VmResizeZone};

use super::{PodError, PodSlot};
use crate::config::PlanError;

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

    /// Changes the size of a zone, as far as that is nothing: zones have the size they began with.
    ///
    /// # Errors
    /// When there is no pod or no such zone, or it is to have another size.
    pub fn resize_zone(&mut self, wanted: &VmResizeZone) -> Result<(), PodError> {
        let pod = self.pod.as_ref().ok_or(PodError::NotCreated)?;
        let mut zones = pod.plan.zones.iter();
        match zones.find(|zone| zone.id == wanted.id) {
            None => Err(refused(
                "id",
                format!("no memory zone is named {:?}: vm.info has the names", wanted.id),
            )),
            Some(zone) if zone.size == wanted.desired_ram => Ok(()),
            Some(zone) => Err(refused(
                "desired_ram",
                format!(
                    "zone {:?} has {} bytes and keeps them while the pod is there: give zones their size in vm.create",
                    zone.id, zone.size
                ),
            )),
        }
    }
}
