//! `vm.resize`: which of the pod's sizes may change, one function a member of the request. All of them are looked at
//! before the first changes. And `vm.resize-disk`.

use podvisor_api::events::What;
use podvisor_api::types::{HotplugMethod, VmResize, VmResizeDisk};

use super::memory::{refused, resized_balloon};
use super::{Pod, PodError, PodSlot};
use crate::config::PodPlan;
use crate::machine::Sizes;

impl PodSlot {
    /// Gives the pod the sizes that `wanted` names: at once to its configuration, and to the machine if it runs. What
    /// the guest does about it, it does in its own time.
    ///
    /// # Errors
    /// When there is no pod, or it cannot have one of the sizes; nothing has changed then.
    pub fn resize(&mut self, wanted: &VmResize) -> Result<(), PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        let plan = resized(pod, wanted, self.expect_digest)?;
        if let Some(running) = &mut pod.running {
            self.telling.vm(What::Resizing);
            running.machine.resize(sizes(wanted))?;
            if let (Some(size), Some(balloon)) = (wanted.desired_balloon, running.machine.balloon()) {
                balloon
                    .resize(size)
                    .map_err(|e| refused("desired_balloon", e.to_string()))?;
            }
            self.telling.vm(What::Resized);
        }
        pod.plan = plan;
        tracing::info!(?wanted, "pod resized");
        Ok(())
    }

    /// Gives a disk of the running pod another size.
    ///
    /// # Errors
    /// When it does not run, there is no such disk, or it cannot have that size; nothing has changed then.
    pub fn resize_disk(&mut self, wanted: &VmResizeDisk) -> Result<(), PodError> {
        let machine = self.machine_mut()?;
        if !machine.resize_disk(&wanted.id, wanted.desired_size)? {
            return Err(PodError::NoDevice(wanted.id.clone()));
        }
        // A scratch disk has no file that would tell its size at the next boot.
        let scratch = self.pod.as_mut().and_then(|pod| pod.plan.config.scratch.as_mut());
        if let Some(scratch) = scratch.filter(|scratch| scratch.id.as_deref() == Some(&wanted.id)) {
            scratch.size = wanted.desired_size;
        }
        Ok(())
    }

    /// Parks the vCPUs that the guest has let go of.
    pub(super) fn vcpus_ejected(&mut self) {
        for index in self.exit.take_ejected_vcpus() {
            let running = self.pod.as_mut().and_then(|pod| pod.running.as_mut());
            if running.is_some_and(|running| running.machine.vcpu_ejected(index)) {
                tracing::info!(index, "vCPU removed");
            } else {
                tracing::debug!(index, "the guest ejects a vCPU that it was not asked to");
            }
        }
    }
}

fn sizes(wanted: &VmResize) -> Sizes {
    Sizes {
        vcpus: wanted.desired_vcpus,
        memory: wanted.desired_ram,
    }
}

/// The pod's plan with the sizes of `wanted`, with which it also boots the next time.
fn resized(pod: &Pod, wanted: &VmResize, expect_digest: Option<[u8; 48]>) -> Result<PodPlan, PodError> {
    let zones = !pod.plan.zones.is_empty();
    if let Some(desired) = wanted
        .desired_ram
        .filter(|desired| zones && *desired != pod.plan.memory)
    {
        let reason = format!(
            "{desired} bytes cannot be: the pod's memory, {} bytes, is in zones; change one of them with vm.resize-zone",
            pod.plan.memory
        );
        return Err(refused("desired_ram", reason));
    }
    // What the machine says of sizes that it cannot have is told first.
    if let Some(running) = &pod.running {
        running.machine.may_resize(sizes(wanted))?;
    }
    let mut config = pod.plan.config.clone();
    if let Some(vcpus) = wanted.desired_vcpus {
        config.cpus.boot_vcpus = vcpus;
    }
    if let Some(size) = wanted.desired_balloon {
        config.balloon = Some(resized_balloon(&config, size)?);
    }
    if let Some(desired) = wanted.desired_ram.filter(|_| !zones) {
        let memory = &mut config.memory;
        // What a guest takes through virtio-mem it is asked to take again.
        if pod.running.is_some() && memory.hotplug_method == HotplugMethod::VirtioMem {
            memory.hotplugged_size = desired.checked_sub(memory.size).filter(|size| *size > 0);
        } else {
            (memory.size, memory.hotplugged_size) = (desired, None);
        }
    }
    Ok(PodPlan::changed(config, expect_digest)?.keeping(&pod.plan))
}
