//! A paused machine taken apart for a snapshot, and one put together from it. What is on disk is `snapshot`'s.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::Kvm;
use podvisor_devices::bus::Bus;
use podvisor_devices::virtio::state::TransportState;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{BootError, BootTimings, Chipset, DeviceInfo, During, Growth, Machine, Outside, Subscribers};
use crate::config::PodPlan;
use crate::memory::{GuestRam, Zone};
use crate::vcpu::exits::Exits;
use crate::vcpu::state::VcpuState;
use crate::vcpu::{VcpuContext, Vcpus};

/// The state of a machine without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    vcpus: Vec<VcpuState>,
    /// Nanoseconds of the guest's paravirtual clock.
    clock: u64,
    /// By port.
    pio: BTreeMap<u64, Value>,
    /// By guest address.
    mmio: BTreeMap<u64, Value>,
    devices: Vec<DeviceState>,
    /// How many descriptors devices were given from outside, by their names.
    pub descriptors: BTreeMap<String, usize>,
    /// The settings of pvpanic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pvpanic: Option<Vec<u8>>,
    /// Bytes of RAM.
    pub memory: u64,
    /// The zones that make it, if any.
    pub zones: Vec<SavedZone>,
}

/// A zone of the RAM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedZone {
    id: String,
    size: u64,
    /// Its content is in its own file.
    in_file: bool,
}

impl SavedZone {
    /// What a snapshot has to know of `zone`.
    #[must_use]
    pub fn of(zone: &Zone) -> Self {
        Self {
            id: zone.id.clone(),
            size: zone.size,
            in_file: zone.keeps_itself(),
        }
    }
}

/// Maps the memory of a snapshot for `plan`.
fn restored_ram(plan: &PodPlan, zones: &[SavedZone], memory: Option<&File>) -> Result<GuestRam, BootError> {
    let planned = plan.zones.iter().map(|zone| (&*zone.id, zone.size));
    if !planned.eq(zones.iter().map(|zone| (&*zone.id, zone.size))) {
        return Err(BootError::new(
            "memory.zones of config.json are not those of state.json: of zones, only file and shared can be edited",
        ));
    }
    if let (true, Some(memory)) = (plan.zones.is_empty(), memory) {
        return GuestRam::from_file(plan.memory, &plan.ram, memory).during("guest memory");
    }
    let kept: Vec<&str> = zones.iter().filter(|z| z.in_file).map(|z| &*z.id).collect();
    GuestRam::from_zones(&plan.zones, &kept, memory).during("guest memory")
}

/// A virtio device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceState {
    id: String,
    kind: String,
    segment: u16,
    slot: u8,
    transport: TransportState,
}

fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, BootError> {
    let list = kvm.get_msr_index_list().during("KVM_GET_MSR_INDEX_LIST")?;
    Ok(list.as_slice().to_vec())
}

fn save_bus(bus: &Bus) -> BTreeMap<u64, Value> {
    let mut states = BTreeMap::new();
    for (base, device) in bus.devices() {
        let state = device.lock().unwrap_or_else(PoisonError::into_inner).save();
        if !state.is_null() {
            states.insert(base, state);
        }
    }
    states
}

fn restore_bus(bus: &Bus, name: &str, mut states: BTreeMap<u64, Value>) -> Result<(), BootError> {
    for (base, device) in bus.devices() {
        if let Some(state) = states.remove(&base) {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            device
                .restore(state)
                .during(format!("state.{name} of the device at {base:#x}"))?;
        }
    }
    match states.first_key_value() {
        None => Ok(()),
        Some((base, _)) => Err(BootError::new(format!(
            "state.{name} has a device at {base:#x}, and this machine has none there"
        ))),
    }
}

impl DeviceInfo {
    fn name(&self) -> String {
        format!("device {} ({})", self.id, self.kind)
    }

    /// Brings the device to rest; what is to be kept of it.
    fn save(&self) -> Result<DeviceState, BootError> {
        if self.removing {
            return Err(BootError::new(format!(
                "{} is on its way out of the pod: save it when the guest has let go of it",
                self.name()
            )));
        }
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(DeviceState {
            id: self.id.clone(),
            kind: self.kind.to_owned(),
            segment: self.bdf.segment,
            slot: self.bdf.slot,
            transport: function.save().during(self.name())?,
        })
    }

    /// Takes over what was kept; the vCPUs have their state already.
    fn restore(&self, chipset: &Chipset, saved: &DeviceState) -> Result<(), BootError> {
        let (have, had) = ((&*self.id, self.kind), (&*saved.id, &*saved.kind));
        if have != had || (self.bdf.segment, self.bdf.slot) != (saved.segment, saved.slot) {
            return Err(BootError::new(format!(
                "{} is at {}, and state.json has {} ({}) in slot {} of segment {}: the devices of config.json cannot be edited",
                self.name(),
                self.bdf,
                saved.id,
                saved.kind,
                saved.slot,
                saved.segment
            )));
        }
        if let Some(root) = chipset.segments.get(usize::from(saved.segment)) {
            let (offset, settings) = saved.transport.settings();
            root.write_config(saved.slot, 0, offset, settings);
        }
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.restore(&saved.transport).during(self.name())
    }
}

impl MachineState {
    /// Whether some memory is in no file of its own.
    #[must_use]
    pub fn has_memory_file(&self) -> bool {
        self.zones.is_empty() || self.zones.iter().any(|zone| !zone.in_file)
    }

    /// Which slot each device is in, by its name.
    #[must_use]
    pub fn slots(&self) -> BTreeMap<String, u8> {
        let slots = self.devices.iter().map(|device| (device.id.clone(), device.slot));
        slots.collect()
    }
}

impl Machine {
    /// The machine's state; it must be paused, and stays so.
    ///
    /// # Errors
    /// When it is confidential, or has something that cannot be saved, by its name. Nothing has changed then.
    pub fn save(&self) -> Result<MachineState, BootError> {
        if self.confidential.is_some() {
            return Err(BootError::new(
                "the pod is confidential: its memory and registers are nobody's but its own, and there is no snapshot of it",
            ));
        }
        if !self.paused() {
            return Err(BootError::new("the pod runs: send vm.pause first"));
        }
        self.may_be_saved()?;
        // Before the vCPUs: coming to rest, a device may interrupt them.
        let devices = self.devices.iter().map(DeviceInfo::save).collect::<Result<_, _>>()?;
        let vm = self.plug.hypervisor.vm();
        let msrs = msr_indices(&super::open_kvm()?)?;
        let vcpus = self.vcpus.save(vm, &msrs).during("vCPUs")?;
        Ok(MachineState {
            vcpus,
            clock: vm.get_clock().during("KVM_GET_CLOCK")?.clock,
            pio: save_bus(&self.chipset.buses.pio),
            mmio: save_bus(&self.chipset.buses.mmio),
            devices,
            descriptors: BTreeMap::new(),
            pvpanic: self.extras.save(),
            memory: self.ram.size(),
            zones: Vec::new(),
        })
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Puts together the machine of `plan` as it was in `state`, with the memory in `memory`, as far as it is not in
    /// the files of its zones. It is paused.
    ///
    /// # Errors
    /// When the state is not that of a machine of this plan; everything that was made is gone then.
    pub fn restore(
        plan: &PodPlan,
        outside: Outside<'_>,
        state: MachineState,
        memory: Option<&File>,
    ) -> Result<(Self, Subscribers), BootError> {
        let start = Instant::now();
        if usize::try_from(plan.vcpus) != Ok(state.vcpus.len()) || plan.memory != state.memory {
            return Err(BootError::new(format!(
                "config.json has {} vCPUs and {} bytes of memory, state.json {} and {}: these cannot be edited",
                plan.vcpus,
                plan.memory,
                state.vcpus.len(),
                state.memory
            )));
        }
        let kvm = super::open_kvm()?;
        let cpuid = super::cpuid_template(&kvm, plan)?;
        let acpi = super::acpi_machine(plan, cpuid.phys_bits());
        let ram = restored_ram(plan, &state.zones, memory)?;
        let vm = super::create_plain_vm(&kvm, &ram)?;
        let fds = super::create_vcpus(&vm, plan.vcpus, &cpuid, outside.telling)?;
        let mut parts = super::add_devices(plan, &vm, &acpi, &ram, None, outside)?;
        restore_bus(&parts.chipset.buses.pio, "pio", state.pio)?;
        restore_bus(&parts.chipset.buses.mmio, "mmio", state.mmio)?;
        // Before the watchdog has its state: no time passes for a paused pod.
        parts.extras.set_paused(true);
        parts.extras.restore(&parts.chipset, state.pvpanic.as_deref())?;
        vm.set_clock(&kvm_clock_data {
            clock: state.clock,
            ..Default::default()
        })
        .during("KVM_SET_CLOCK")?;
        for (index, (fd, vcpu)) in fds.iter().zip(&state.vcpus).enumerate() {
            vcpu.write(fd).during(format!("vCPU {index}"))?;
        }
        if parts.devices.len() != state.devices.len() {
            return Err(BootError::new(format!(
                "config.json has {} devices, state.json {}: the list of devices cannot be edited",
                parts.devices.len(),
                state.devices.len()
            )));
        }
        let (chipset, devices) = (&parts.chipset, &mut parts.devices);
        devices.sort_by_key(|device| state.devices.iter().position(|saved| saved.id == device.id));
        // After the vCPUs: what may have been on its way is raised again.
        for device in devices {
            let saved = state.devices.iter().find(|saved| saved.id == device.id);
            let saved = saved.ok_or_else(|| BootError::new(format!("state.json has no {}", device.name())))?;
            device.restore(chipset, saved)?;
        }
        let context = VcpuContext {
            io: Arc::clone(&chipset.buses) as _,
            affinity: Arc::new(plan.affinity()),
            processor: None,
            exit: Arc::clone(outside.exit),
            exits: Arc::new(Exits::new(start, acpi.device_area().into())),
        };
        let vcpus = Vcpus::start_paused(fds, &context).during("starting vCPU threads")?;
        let total = start.elapsed();
        let timings = BootTimings {
            build: total,
            total,
            ..BootTimings::default()
        };
        let machine = Self {
            vcpus,
            devices: parts.devices,
            chipset: parts.chipset,
            plug: parts.plug,
            extras: parts.extras,
            confidential: None,
            growth: Growth::new(plan, cpuid, outside.telling),
            timings,
            ram,
        };
        Ok((machine, parts.subscribers))
    }
}
