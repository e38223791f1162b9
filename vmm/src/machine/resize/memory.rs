//! A running machine's memory: the room that is kept for more of it, and how it comes, through the chipset's memory slots
//! or the pod's virtio-mem device. What is in the guest's address space is `memory::hotplug`'s.

use std::sync::{Arc, PoisonError};

use kvm_ioctls::VmFd;
use podvisor_api::types::{HotplugMethod, Isolation};
use podvisor_devices::virtio::mem::{Mem, MemHandle};
use podvisor_firmware::acpi::AcpiMachine;
use podvisor_firmware::layout;

use super::{BootError, During, Machine, ResizeError};
use crate::config::PodPlan;
use crate::memory::GuestRam;
use crate::memory::hotplug::{self, Filling, HotplugArea};
use crate::registry::Wanted;

/// The name of the virtio-mem device, which no device of a configuration can have.
const DEVICE: &str = "__mem";

/// How the pod of `plan` gets more memory; None: not at all.
pub(in crate::machine) fn filling(plan: &PodPlan) -> Option<Filling> {
    let memory = &plan.config.memory;
    let zones = memory.zones.as_ref().is_some_and(|zones| !zones.is_empty());
    if plan.isolation != Isolation::None || zones || memory.hotplug_size.unwrap_or(0) == 0 {
        return None;
    }
    Some(match memory.hotplug_method {
        HotplugMethod::Acpi => Filling::ByPiece,
        HotplugMethod::VirtioMem => Filling::ByGuest,
    })
}

/// Room for more memory.
pub(in crate::machine) struct Room {
    area: Arc<HotplugArea>,
    /// The device through which the guest fills the area.
    device: Option<MemHandle>,
    /// Pieces that the monitor has put into it.
    pieces: u32,
}

impl Room {
    /// What `plan` asks for, in the pod of `vm`, whose RAM is `ram`.
    ///
    /// # Errors
    /// When the host cannot reserve the address space.
    pub(in crate::machine) fn new(
        plan: &PodPlan,
        vm: &Arc<VmFd>,
        acpi: &AcpiMachine,
        ram: &GuestRam,
    ) -> Result<Option<Self>, BootError> {
        let Some(filling) = filling(plan) else { return Ok(None) };
        let wanted = plan.config.memory.hotplug_size.unwrap_or(0);
        let end = ram.slots().map(|slot| slot.gpa.saturating_add(slot.len)).max();
        let range = hotplug::place(end.unwrap_or(0), wanted, acpi.device_area().mmio_start, filling);
        if range.is_empty() {
            return Ok(None);
        }
        let area = HotplugArea::reserve(Arc::clone(vm), range, filling, &plan.ram).during("memory.hotplug_size")?;
        Ok(Some(Self {
            area: Arc::new(area),
            device: None,
            pieces: 0,
        }))
    }

    /// The area.
    pub(in crate::machine) fn area(&self) -> &Arc<HotplugArea> {
        &self.area
    }

    /// The device through which the guest fills the area; None when the monitor does. It is asked to have what `plan`
    /// says that it had.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(in crate::machine) fn device(&mut self, plan: &PodPlan) -> Result<Option<Wanted>, BootError> {
        if self.area.filling() != Filling::ByGuest {
            return Ok(None);
        }
        let mem = Mem::new(Arc::clone(self.area.blocks()), None, Arc::clone(&self.area) as _);
        let mem = mem.during("the virtio-mem device")?;
        let handle = mem.handle();
        let size = plan.config.memory.hotplugged_size.unwrap_or(0);
        self.area.allow(size);
        handle.request(size).during("memory.hotplugged_size")?;
        self.device = Some(handle);
        Ok(Some(Wanted {
            id: DEVICE.to_owned(),
            kind: "mem",
            segment: 0,
            slot: None,
            device: Box::new(mem),
        }))
    }

    /// Bytes that the guest was given, or asked to have.
    fn promised(&self) -> u64 {
        let blocks = self.area.blocks();
        self.device
            .as_ref()
            .map_or(blocks.plugged_size(), MemHandle::requested_size)
    }
}

impl Machine {
    /// Bytes of memory that the guest has.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.ram.size().saturating_add(self.grown_memory())
    }

    /// Those that it did not have at boot.
    pub(super) fn grown_memory(&self) -> u64 {
        self.plug
            .room
            .as_ref()
            .map_or(0, |room| room.area.blocks().plugged_size())
    }

    pub(super) fn may_have_memory(&self, desired: u64) -> Result<(), ResizeError> {
        let boot = self.ram.size();
        let refuse = |reason: String| Err(ResizeError::Memory { desired, reason });
        if desired == boot.saturating_add(self.plug.room.as_ref().map_or(0, Room::promised)) {
            return Ok(());
        }
        if self.confidential.is_some() {
            let field = "desired_ram";
            return Err(ResizeError::Confidential { field, desired });
        }
        let Some(room) = &self.plug.room else {
            return refuse(format!(
                "the pod has {boot} bytes and no room for more; give memory.hotplug_size in vm.create"
            ));
        };
        let most = boot.saturating_add(room.area.blocks().size());
        if desired > most {
            return refuse(format!(
                "the pod can have up to {most} bytes; more need a higher memory.hotplug_size in vm.create"
            ));
        }
        let (from, step) = match room.area.filling() {
            Filling::ByGuest => (boot, room.area.blocks().block_size()),
            Filling::ByPiece => (self.memory(), layout::MEMORY_BLOCK_SIZE),
        };
        let Some(more) = desired.checked_sub(from) else {
            return refuse(match room.area.filling() {
                Filling::ByGuest => format!("the pod was booted with {boot} bytes and cannot have less"),
                Filling::ByPiece => format!(
                    "the pod has {from} bytes, and what came through ACPI does not go; \
                     memory.hotplug_method VirtioMem in vm.create makes memory that does"
                ),
            });
        };
        if !more.is_multiple_of(step) {
            let below = desired - more % step;
            return refuse(format!(
                "memory comes in pieces of {step} bytes; ask for {below} or {}",
                below.saturating_add(step)
            ));
        }
        if room.area.filling() == Filling::ByPiece && room.pieces >= layout::MEMORY_SLOTS.into() {
            return refuse(format!(
                "all {} memory slots are taken; a reboot makes one piece of what the pod has",
                layout::MEMORY_SLOTS
            ));
        }
        Ok(())
    }

    /// Gives the guest `desired` bytes, which [`Machine::may_have_memory`], or asks it to take them.
    pub(super) fn resize_memory(&mut self, desired: u64) -> Result<(), BootError> {
        let (boot, now) = (self.ram.size(), self.memory());
        let Some(room) = &mut self.plug.room else { return Ok(()) };
        if let Some(device) = &room.device {
            let size = desired.saturating_sub(boot);
            room.area.allow(size);
            return device.request(size).during("the virtio-mem device");
        }
        let len = desired.saturating_sub(now);
        if len == 0 {
            return Ok(());
        }
        let (piece, gpa) = (
            room.pieces,
            room.area.blocks().start().saturating_add(now.saturating_sub(boot)),
        );
        let area = Arc::clone(&room.area);
        area.fill(piece, gpa, len).during(format!("desired_ram {desired}"))?;
        room.pieces = room.pieces.saturating_add(1);
        let told = self.lend().and_then(|()| {
            let slot = self.chipset.memory_plugged(gpa, len);
            slot.during("the chipset's memory slots")
        });
        if told.is_err() {
            area.empty(piece, gpa, len);
            self.plug.room.iter_mut().for_each(|room| room.pieces = piece);
            if let Err(error) = self.lend() {
                tracing::warn!(%error, "a device cannot go back to the memory that it had");
            }
        }
        told
    }

    /// Tells the devices whose memory other processes map what there is of it.
    fn lend(&self) -> Result<(), BootError> {
        for device in &self.devices {
            let mut function = device.function.lock().unwrap_or_else(PoisonError::into_inner);
            function
                .update_memory(Arc::clone(&self.plug.memory))
                .during(format!("telling device {} of new memory", device.id))?;
        }
        Ok(())
    }
}
