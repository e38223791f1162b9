//! The pod saved and restored: what the API gives beside the snapshot's own files.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::SubscriberOps;
use podvisor_api::events::What;
use podvisor_api::types::{Isolation, RestoreConfig, VmConfig};

use super::{Events, Pod, PodError, PodSlot, Running};
use crate::config::{Descriptors, PodPlan};
use crate::consoles::Consoles;
use crate::machine::{BootError, Machine, Outside, SavedZone};
use crate::registry::Kept;
use crate::sandbox::landlock;
use crate::snapshot;

impl PodSlot {
    /// Writes a snapshot of the paused pod into directory `url`; the pod stays paused.
    ///
    /// # Errors
    /// When it is not paused, is confidential, or has something that cannot be saved; nothing is written then.
    pub fn snapshot(&mut self, url: &str) -> Result<(), PodError> {
        let pod = self.pod.as_ref().ok_or(PodError::NotCreated)?;
        let machine = &pod.running.as_ref().ok_or(PodError::NotRunning)?.machine;
        let directory = snapshot::directory("destination_url", url)?;
        let mut state = machine.save().map_err(PodError::Unsaved)?;
        let descriptors = pod.plan.descriptors.iter();
        state.descriptors = descriptors.map(|(id, fds)| (id.clone(), fds.len())).collect();
        state.zones = pod.plan.zones.iter().map(SavedZone::of).collect();
        self.telling.vm(What::Snapshotting);
        snapshot::write(&directory, &pod.plan, &state, machine.ram())?;
        self.telling.vm(What::Snapshotted);
        tracing::info!(directory = %directory.display(), "pod saved");
        Ok(())
    }

    /// Makes the pod whose snapshot `wanted` names: paused, or running if that is asked for. `files` are descriptors for its
    /// network devices.
    ///
    /// # Errors
    /// When there is a pod, or the snapshot cannot be restored; there is none then.
    pub fn restore(
        &mut self,
        wanted: &RestoreConfig,
        files: Vec<OwnedFd>,
        events: &mut Events,
    ) -> Result<(), PodError> {
        if self.pod.is_some() {
            return Err(PodError::AlreadyCreated);
        }
        let saved = snapshot::read(&snapshot::directory("source_url", &wanted.source_url)?)?;
        let mut plan = PodPlan::changed(saved.config, self.expect_digest)?;
        plan.slots = saved.state.slots();
        let copy = wanted.copies_memory();
        plan.ram.prefault |= copy;
        plan.zones.iter_mut().for_each(|zone| zone.options.prefault |= copy);
        plan.descriptors = descriptors(wanted, files, &plan.config, &saved.state.descriptors)?;
        if plan.isolation != Isolation::None {
            return Err(PodError::Unsaved(BootError::new(
                "config.json: a confidential pod has no snapshot that could be restored",
            )));
        }
        let consoles = Consoles::open(&mut plan.config)?;
        landlock::enter(&plan.config, &self.files)?;
        self.telling.vm(What::Restoring);
        let outside = Outside {
            exit: &self.exit,
            telling: &self.telling,
            consoles: &consoles,
            kept: &Kept::default(),
        };
        let (machine, subscribers) =
            Machine::restore(&plan, outside, saved.state, saved.memory.as_ref()).map_err(PodError::Unsaved)?;
        let subscribers = subscribers
            .into_iter()
            .map(|(place, s)| (place, events.add_subscriber(s)))
            .collect();
        let now = Some(self.start.elapsed());
        (self.created_at, self.booted_at) = (now, now);
        self.pod = Some(Pod {
            plan,
            timings: Some(machine.timings()),
            running: Some(Running { machine, subscribers }),
            consoles,
        });
        self.telling.vm(What::Restored);
        if wanted.resume { self.resume() } else { Ok(()) }
    }
}

/// Deals out the descriptors that came with a restore. `had` is how many each device of the saved pod had: those cannot be
/// opened by a name.
fn descriptors(
    wanted: &RestoreConfig,
    files: Vec<OwnedFd>,
    config: &VmConfig,
    had: &BTreeMap<String, usize>,
) -> Result<Descriptors, PodError> {
    let refuse = |reason: String| PodError::Unsaved(BootError::new(reason));
    let nets = wanted.net_fds.as_deref().unwrap_or_default();
    let named = nets.iter().fold(0, |all: usize, net| all.saturating_add(net.num_fds));
    if named != files.len() {
        return Err(refuse(format!(
            "net_fds: num_fds are {named} in all, and {} descriptors came with the request",
            files.len()
        )));
    }
    let mut files = files.into_iter();
    let mut all = Descriptors::new();
    for net in nets {
        let known = config.net().iter().any(|n| n.id.as_deref() == Some(&net.id));
        if !known || net.num_fds == 0 || all.contains_key(&net.id) {
            return Err(refuse(format!(
                "net_fds: id {:?}, num_fds {}: name network devices of config.json, once each, with their descriptors",
                net.id, net.num_fds
            )));
        }
        let own: Vec<_> = files.by_ref().take(net.num_fds).collect();
        all.insert(net.id.clone(), Arc::new(own));
    }
    match had.iter().find(|(id, _)| !all.contains_key(*id)) {
        None => Ok(all),
        Some((id, count)) => Err(refuse(format!(
            "network device {id} had {count} descriptors: send as many with the request, and say whose they are in net_fds"
        ))),
    }
}
