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
use crate::memory::hotplug::{self, Filling, HotplugArea};
use crate::memory::{GuestRam, RamOptions, Zone};
use crate::registry::Wanted;

/// The name of the virtio-mem device, and how those of zones begin: no device of a configuration can have it.
const DEVICE: &str = "__mem";

/// How the pod of `plan` gets more memory; None: not at all.
pub(in crate::machine) fn filling(plan: &PodPlan) -> Option<Filling> {
    let memory = &plan.config.memory;
    let wanted = match &*plan.zones {
        [] => memory.hotplug_size.unwrap_or(0),
        zones => zones.iter().map(|zone| zone.hotplug_size).max().unwrap_or(0),
    };
    if plan.isolation != Isolation::None || wanted == 0 {
        return None;
    }
    Some(match memory.hotplug_method {
        HotplugMethod::Acpi => Filling::ByPiece,
        HotplugMethod::VirtioMem => Filling::ByGuest,
    })
}

/// Room that is asked for.
struct Wish {
    zone: Option<String>,
    boot: u64,
    size: u64,
    taken: u64,
    options: RamOptions,
}

impl Wish {
    fn all(plan: &PodPlan) -> Vec<Self> {
        let memory = &plan.config.memory;
        if plan.zones.is_empty() {
            return vec![Self {
                zone: None,
                boot: plan.memory,
                size: memory.hotplug_size.unwrap_or(0),
                taken: memory.hotplugged_size.unwrap_or(0),
                options: plan.ram,
            }];
        }
        let wish = |zone: &Zone| Self {
            zone: Some(zone.id.clone()),
            boot: zone.size,
            size: zone.hotplug_size,
            taken: zone.hotplugged_size,
            options: zone.options,
        };
        plan.zones
            .iter()
            .filter(|zone| zone.hotplug_size > 0)
            .map(wish)
            .collect()
    }
}

/// Room for more memory.
pub(in crate::machine) struct Room {
    area: Arc<HotplugArea>,
    /// The zone that grows into it; None: the memory, where it has no zones.
    zone: Option<String>,
    /// Bytes that it or the zone has at boot.
    boot: u64,
    /// Bytes of the area that the guest is to take at once, if it fills it.
    taken: u64,
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
    pub(in crate::machine) fn all(
        plan: &PodPlan,
        vm: &Arc<VmFd>,
        acpi: &AcpiMachine,
        ram: &GuestRam,
    ) -> Result<Vec<Self>, BootError> {
        let Some(filling) = filling(plan) else {
            return Ok(Vec::new());
        };
        let wishes = Wish::all(plan);
        let mut slots = u32::try_from(ram.slots().count()).unwrap_or(hotplug::END_SLOT)..hotplug::END_SLOT;
        let each = slots.len() / wishes.len().max(1);
        let mut end = ram
            .slots()
            .map(|slot| slot.gpa.saturating_add(slot.len))
            .max()
            .unwrap_or(0);
        let mut rooms = Vec::with_capacity(wishes.len());
        for wish in wishes {
            let range = hotplug::place(end, wish.size, acpi.device_area().mmio_start, filling);
            let first = slots.start;
            slots.start = first.saturating_add(u32::try_from(each).unwrap_or(0));
            if range.is_empty() || each == 0 {
                continue;
            }
            end = range.end;
            let area = HotplugArea::reserve(Arc::clone(vm), first..slots.start, range, filling, &wish.options);
            rooms.push(Self {
                area: Arc::new(area.during("hotplug_size")?),
                zone: wish.zone,
                boot: wish.boot,
                taken: wish.taken,
                device: None,
                pieces: 0,
            });
        }
        Ok(rooms)
    }

    /// The area.
    pub(in crate::machine) fn area(&self) -> &Arc<HotplugArea> {
        &self.area
    }

    /// The device through which the guest fills the area; None when the monitor does. It is asked to have what the
    /// configuration says that it had.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(in crate::machine) fn device(&mut self) -> Result<Option<Wanted>, BootError> {
        if self.area.filling() != Filling::ByGuest {
            return Ok(None);
        }
        let mem = Mem::new(Arc::clone(self.area.blocks()), None, Arc::clone(&self.area) as _);
        let mem = mem.during("the virtio-mem device")?;
        let handle = mem.handle();
        self.area.allow(self.taken);
        handle.request(self.taken).during("hotplugged_size")?;
        self.device = Some(handle);
        Ok(Some(Wanted {
            id: self
                .zone
                .as_ref()
                .map_or(DEVICE.to_owned(), |zone| format!("{DEVICE}-{zone}")),
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

    /// Whether it, with what is there at boot, can be `desired` bytes.
    fn may_be(&self, desired: u64) -> Result<(), String> {
        let (boot, blocks) = (self.boot, self.area.blocks());
        let most = boot.saturating_add(blocks.size());
        if desired > most {
            let field = if self.zone.is_some() {
                "hotplug_size of the zone"
            } else {
                "memory.hotplug_size"
            };
            return Err(format!(
                "there can be up to {most} bytes; more need a higher {field} in vm.create"
            ));
        }
        let (from, step) = match self.area.filling() {
            Filling::ByGuest => (boot, blocks.block_size()),
            Filling::ByPiece => (boot.saturating_add(blocks.plugged_size()), layout::MEMORY_BLOCK_SIZE),
        };
        let Some(more) = desired.checked_sub(from) else {
            return Err(match self.area.filling() {
                Filling::ByGuest => format!("the pod was booted with {boot} bytes and cannot have less"),
                Filling::ByPiece => format!(
                    "the pod has {from} bytes, and what came through ACPI does not go; \
                     memory.hotplug_method VirtioMem in vm.create makes memory that does"
                ),
            });
        };
        if !more.is_multiple_of(step) {
            let below = desired - more % step;
            return Err(format!(
                "memory comes in pieces of {step} bytes; ask for {below} or {}",
                below.saturating_add(step)
            ));
        }
        if self.area.filling() == Filling::ByPiece && self.pieces >= layout::MEMORY_SLOTS.into() {
            return Err(format!(
                "all {} memory slots are taken; a reboot makes one piece of what the pod has",
                layout::MEMORY_SLOTS
            ));
        }
        Ok(())
    }

    /// Asks the guest to have `desired` bytes; false: it is the monitor that fills the area.
    fn request(&self, desired: u64) -> Result<bool, BootError> {
        let Some(device) = &self.device else { return Ok(false) };
        let size = desired.saturating_sub(self.boot);
        self.area.allow(size);
        device.request(size).during("the virtio-mem device")?;
        Ok(true)
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
        let grown = self.plug.rooms.iter().map(|room| room.area.blocks().plugged_size());
        grown.fold(0, u64::saturating_add)
    }

    /// The room that memory without zones has, or zone `zone`.
    fn room(&self, zone: Option<&str>) -> Option<&Room> {
        self.plug.rooms.iter().find(|room| room.zone.as_deref() == zone)
    }

    pub(super) fn may_have_memory(&self, desired: u64) -> Result<(), ResizeError> {
        let (boot, room) = (self.ram.size(), self.room(None));
        if desired == boot.saturating_add(room.map_or(0, Room::promised)) {
            return Ok(());
        }
        if self.confidential.is_some() {
            let field = "desired_ram";
            return Err(ResizeError::Confidential { field, desired });
        }
        let none = || format!("the pod has {boot} bytes and no room for more; give memory.hotplug_size in vm.create");
        let may = room.ok_or_else(none).and_then(|room| room.may_be(desired));
        may.map_err(|reason| ResizeError::Memory { desired, reason })
    }

    /// Asks the guest to have `desired` bytes of zone `id`, whose size at boot is `boot`.
    ///
    /// # Errors
    /// When the zone cannot have that size.
    pub fn resize_zone(&mut self, id: &str, boot: u64, desired: u64) -> Result<(), ResizeError> {
        let room = self.room(Some(id));
        if desired == boot.saturating_add(room.map_or(0, Room::promised)) {
            return Ok(());
        }
        let none = || format!("zone {id:?} has {boot} bytes and no room for more; give it a hotplug_size in vm.create");
        let refuse = |reason| ResizeError::Memory { desired, reason };
        let room = room.ok_or_else(none).map_err(refuse)?;
        room.may_be(desired).map_err(refuse)?;
        room.request(desired)?;
        Ok(())
    }

    /// Gives the guest `desired` bytes, which [`Machine::may_have_memory`], or asks it to take them.
    pub(super) fn resize_memory(&mut self, desired: u64) -> Result<(), BootError> {
        let (boot, now) = (self.ram.size(), self.memory());
        let Some(room) = self.plug.rooms.iter_mut().find(|room| room.zone.is_none()) else {
            return Ok(());
        };
        let len = desired.saturating_sub(now);
        if room.request(desired)? || len == 0 {
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
            self.plug.rooms.iter_mut().for_each(|room| room.pieces = piece);
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
