//! A pod's machine, built when it boots and dropped when it stops: the VM, its memory and vCPUs, the chipset and the
//! devices that the configuration asks for. A machine that cannot be built leaves nothing behind.

mod disk;
mod extras;
mod resize;
mod saved;

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use event_manager::MutEventSubscriber;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use podvisor_api::events::{Source, What};
use podvisor_api::types::Isolation;
use podvisor_devices::memory::{PodMemory, SharedPages};
use podvisor_devices::pci::Bdf;
use podvisor_devices::platform::Hypervisor;
use podvisor_devices::virtio::balloon::BalloonHandle;
use podvisor_devices::virtio::pci::{Standing, VirtioPci, Watch, add_to};
use podvisor_firmware::acpi::{AcpiMachine, AcpiTables};
use podvisor_firmware::igvm::{self, PlanOptions};
use podvisor_firmware::layout;
use podvisor_firmware::linux::place::Given;
use podvisor_firmware::linux::{self, ImageKind, detect};
use podvisor_firmware::machine::MachineDescription;
use podvisor_firmware::memory_map::memory_map;
use podvisor_firmware::plan::{LaunchPlan, Platform};

pub use self::disk::DiskError;
use self::extras::Extras;
use self::resize::{Growth, Room};
pub use self::resize::{ResizeError, Sizes};
pub use self::saved::{MachineState, SavedZone};
use crate::chipset::Chipset;
use crate::config::{Boot, PodPlan};
use crate::consoles::Consoles;
use crate::cpuid::CpuidTemplate;
use crate::device_memory::{DeviceMemory, Mapper};
use crate::isolation::Confidential;
use crate::kvm::{self, KvmHypervisor};
use crate::launch_plain;
use crate::memory::hotplug::{Filling, HotplugArea};
use crate::memory::{GuestRam, ProcessorGate};
use crate::registry::{self, Kept, Means, Wanted};
use crate::telling::Telling;
use crate::vcpu::exits::Exits;
use crate::vcpu::{ExitSignal, VcpuContext, Vcpus};

/// Why a pod cannot boot: what was being done, and the cause below it.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct BootError {
    what: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl BootError {
    /// An error with no cause below it.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: None,
        }
    }
}

/// Gives an error its place in the boot.
pub(crate) trait During<T> {
    /// The error with `what` above it.
    fn during(self, what: impl Into<String>) -> Result<T, BootError>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> During<T> for Result<T, E> {
    fn during(self, what: impl Into<String>) -> Result<T, BootError> {
        self.map_err(|e| BootError {
            what: what.into(),
            source: Some(e.into()),
        })
    }
}

/// A device as `vm.info` tells of it.
#[derive(Clone)]
pub struct DeviceInfo {
    /// Name.
    pub id: String,
    /// Kind.
    pub kind: &'static str,
    /// Where it is.
    pub bdf: Bdf,
    /// The guest was asked to let go of it.
    pub removing: bool,
    standing: Watch,
    function: Arc<Mutex<VirtioPci>>,
}

impl DeviceInfo {
    /// How it is: `removing`, `failed`, `active` (the guest's driver runs it) or `configuring`.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.standing.get() {
            _ if self.removing => "removing",
            Standing::Failed => "failed",
            Standing::Active => "active",
            Standing::Configuring => "configuring",
        }
    }
}

/// How long the parts of the boot took.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootTimings {
    /// Reading and planning the image.
    pub plan: Duration,
    /// The VM, its memory and devices.
    pub build: Duration,
    /// Putting the image into guest memory.
    pub launch: Duration,
    /// The whole boot.
    pub total: Duration,
}

/// A running pod. Fields are dropped in this order: first the vCPUs stop, last the memory goes.
pub struct Machine {
    vcpus: Vcpus,
    devices: Vec<DeviceInfo>,
    plug: Plug,
    extras: Extras,
    chipset: Chipset,
    confidential: Option<Confidential>,
    growth: Growth,
    timings: BootTimings,
    ram: GuestRam,
}

/// What the event loop runs for a machine: for the device at which place (none: the chipset), and what.
pub type Subscribers = Vec<(Option<Bdf>, Box<dyn MutEventSubscriber>)>;

/// What of its monitor a machine is connected to.
#[derive(Clone, Copy)]
pub struct Outside<'m> {
    /// Hears what the guest asks for.
    pub exit: &'m Arc<ExitSignal>,
    /// Hears what happens.
    pub telling: &'m Telling,
    /// The host's ends of the consoles.
    pub consoles: &'m Consoles,
    /// Devices of the machine before, which those that it wants are taken from.
    pub kept: &'m Kept,
}

/// The devices of a machine.
struct Parts {
    chipset: Chipset,
    plug: Plug,
    devices: Vec<DeviceInfo>,
    extras: Extras,
    subscribers: Subscribers,
}

/// What a device needs of the machine it is plugged into.
struct Plug {
    memory: Arc<PodMemory>,
    hypervisor: Arc<KvmHypervisor>,
    mapper: Mapper,
    balloon: OnceLock<BalloonHandle>,
    kept: Kept,
    confidential: bool,
    rooms: Vec<Room>,
    /// Those of the rooms.
    areas: Vec<Arc<HotplugArea>>,
}

impl Machine {
    /// Builds and starts the pod of `plan`. When it returns, the vCPU threads run.
    ///
    /// # Errors
    /// [`BootError`]; everything that was made is gone then.
    pub fn boot(plan: &PodPlan, outside: Outside<'_>) -> Result<(Self, Subscribers), BootError> {
        let start = Instant::now();
        let boot = plan.boot.as_ref().ok_or_else(|| {
            BootError::new("the pod has nothing to boot: give payload.igvm or payload.kernel in vm.create")
        })?;
        let kvm = open_kvm()?;
        let cpuid = cpuid_template(&kvm, plan)?;
        let image = Image::open(&boot.image).during(format!("{} {}", boot.field, boot.image.display()))?;
        let initrd = boot.initramfs.as_ref().map(Image::open).transpose();
        let initrd = initrd.during("payload.initramfs")?;
        let acpi = acpi_machine(plan, cpuid.phys_bits());
        let description = describe(plan, boot, &acpi)?;
        let launch_plan = plan_image(
            plan,
            boot,
            image.bytes(),
            initrd.as_ref().map(Image::bytes),
            &description,
            &acpi,
        )?;
        let planned = start.elapsed();

        let ram = match plan.zones.as_slice() {
            [] => GuestRam::new(plan.memory, &plan.ram),
            zones => GuestRam::in_zones(zones),
        }
        .during("guest memory")?;
        let confidential = Confidential::new(plan, &ram)?;
        let vm = create_vm(&kvm, &ram, confidential.as_ref(), &launch_plan)?;
        let fds = create_vcpus(&vm, plan.vcpus, &cpuid, outside.telling)?;
        let parts = add_devices(plan, &vm, &acpi, &ram, confidential.as_ref(), outside)?;
        let built = start.elapsed();

        let confidential = match confidential {
            Some(confidential) => Some(confidential.launch(plan, &vm, &fds, &launch_plan, &description)?),
            None => {
                let memory = ram.launch_memory().during("guest memory")?;
                launch_plain::launch(&launch_plan, &description, &memory, &fds).during("placing the image")?;
                None
            }
        };
        let launched = start.elapsed();
        let context = VcpuContext {
            io: Arc::clone(&parts.chipset.buses) as _,
            affinity: Arc::new(plan.affinity()),
            processor: confidential.as_ref().map(Confidential::shared_processor),
            exit: Arc::clone(outside.exit),
            exits: Arc::new(Exits::new(start, acpi.device_area().into())),
        };
        let vcpus = Vcpus::start(fds, &context).during("starting vCPU threads")?;
        let timings = BootTimings {
            plan: planned,
            build: built.saturating_sub(planned),
            launch: launched.saturating_sub(built),
            total: start.elapsed(),
        };
        let machine = Self {
            vcpus,
            devices: parts.devices,
            plug: parts.plug,
            extras: parts.extras,
            chipset: parts.chipset,
            confidential,
            growth: Growth::new(plan, cpuid, outside.telling),
            timings,
            ram,
        };
        Ok((machine, parts.subscribers))
    }

    /// What devices of this machine are made of when they are those of `plan`.
    #[must_use]
    pub fn means<'m>(&'m self, plan: &'m PodPlan) -> Means<'m> {
        self.plug.means(plan, &self.ram)
    }

    /// Plugs a device into the running pod and tells the guest. Where it is, and what the event loop is to run for it.
    ///
    /// # Errors
    /// When it does not fit; the machine is as before then.
    pub fn add(&mut self, wanted: Wanted) -> Result<(Bdf, Box<dyn MutEventSubscriber>), BootError> {
        let (device, subscriber) = self.plug.put(&self.chipset, wanted)?;
        let bdf = device.bdf;
        if let Err(error) = self.chipset.plugged(bdf) {
            self.take_off(bdf);
            return Err(error).during("telling the guest of the device");
        }
        self.devices.push(device);
        Ok((bdf, subscriber))
    }

    /// Asks the guest to let go of device `id`; false if there is none. It goes when the guest ejects it. A device that was
    /// asked for before is asked for again, for the guest may have missed it.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn unplug(&mut self, id: &str) -> io::Result<bool> {
        let named = |removing| self.devices.iter().position(|d| d.id == id && d.removing == removing);
        let Some(device) = named(false)
            .or_else(|| named(true))
            .and_then(|at| self.devices.get_mut(at))
        else {
            return Ok(false);
        };
        self.chipset.unplug(device.bdf)?;
        device.removing = true;
        Ok(true)
    }

    /// Takes out the device in a slot that the guest ejected; its name and where it was. An ejection that nobody asked for is ignored.
    pub fn ejected(&mut self, segment: u16, slot: u8) -> Option<(String, Bdf)> {
        let asked = |d: &DeviceInfo| d.removing && (d.bdf.segment, d.bdf.slot) == (segment, slot);
        let index = self.devices.iter().position(asked)?;
        let device = self.devices.remove(index);
        self.take_off(device.bdf);
        Some((device.id, device.bdf))
    }

    fn take_off(&self, bdf: Bdf) {
        if let Some(root) = self.chipset.segments.get(usize::from(bdf.segment)) {
            drop(root.remove(bdf.slot));
        }
    }

    /// Stops the guest where it is.
    pub fn pause(&mut self) {
        self.vcpus.pause();
        self.extras.set_paused(true);
    }

    /// Lets a paused guest go on.
    pub fn resume(&mut self) {
        self.extras.set_paused(false);
        self.vcpus.resume();
    }

    /// Ends it, and keeps the devices that outlive a reboot. The event loop runs none of them any more.
    #[must_use]
    pub fn end(self) -> Kept {
        let Self { vcpus, devices, .. } = &self;
        debug_assert!(vcpus.paused(), "no vCPU is in a device");
        let taken = devices.iter().filter_map(|device| {
            let mut function = device.function.lock().unwrap_or_else(PoisonError::into_inner);
            Some((device.id.clone(), function.take_off()?))
        });
        Mutex::new(taken.collect())
    }

    /// Whether it is paused.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.vcpus.paused()
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn power_button(&self) -> io::Result<()> {
        self.chipset.power_button()
    }

    /// Sends every vCPU an NMI; a paused guest takes it when it goes on.
    ///
    /// # Errors
    /// When a vCPU does not take it.
    pub fn nmi(&mut self) -> io::Result<()> {
        self.vcpus.nmi(self.plug.hypervisor.vm())
    }

    /// The devices, in the order of their slots.
    #[must_use]
    pub fn devices(&self) -> &[DeviceInfo] {
        &self.devices
    }

    /// The name and place of the device that is no virtio device, if it was asked for: pvpanic.
    #[must_use]
    pub fn pvpanic(&self) -> Option<(&'static str, Bdf)> {
        self.extras.pvpanic().map(|bdf| (extras::PVPANIC, bdf))
    }

    /// The counters of the devices, by name, and under a name that no device can have those of the vCPUs' exits.
    #[must_use]
    pub fn counters(&self) -> std::collections::BTreeMap<String, std::collections::BTreeMap<&'static str, u64>> {
        let mut all = std::collections::BTreeMap::new();
        for root in &self.chipset.segments {
            all.append(&mut root.counters());
        }
        all.insert(VCPUS.into(), self.vcpus.exits().counters());
        all
    }

    /// How it is isolated, and what its launch measured.
    #[must_use]
    pub fn confidential(&self) -> Option<&Confidential> {
        self.confidential.as_ref()
    }

    /// How long the boot took.
    #[must_use]
    pub fn timings(&self) -> BootTimings {
        self.timings
    }

    /// Its balloon, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.plug.balloon.get()
    }
}

/// Under which name vm.counters has the vCPUs.
pub const VCPUS: &str = "__vcpus";

/// Opens /dev/kvm.
///
/// # Errors
/// One line that says what to do.
pub fn open_kvm() -> Result<Kvm, BootError> {
    Kvm::new().map_err(|e| {
        let cause = io::Error::from_raw_os_error(e.errno());
        BootError::new(format!(
            "no usable /dev/kvm ({cause}): podvisor needs KVM; load kvm_amd or kvm_intel, and let this user open /dev/kvm"
        ))
    })
}

/// A file mapped into memory, read only as far as it is used.
struct Image {
    map: Option<memmap2::Mmap>,
}

impl Image {
    fn open(path: &PathBuf) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self {
            map: (metadata.len() > 0).then(|| crate::sys::map_file(&file)).transpose()?,
        })
    }

    fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

fn acpi_machine(plan: &PodPlan, phys_bits: u8) -> AcpiMachine {
    AcpiMachine {
        vcpus: plan.vcpus,
        max_vcpus: plan.max_vcpus(),
        segments: plan.segments,
        // Where no memory can be plugged, the guest is not told of a controller.
        memory_slots: match resize::filling(plan) {
            Some(Filling::ByPiece) => layout::MEMORY_SLOTS,
            Some(Filling::ByGuest) | None => 0,
        },
        phys_bits,
        serial: plan.config.serial.mode != podvisor_api::types::ConsoleMode::Off,
    }
}

fn describe(plan: &PodPlan, boot: &Boot, acpi: &AcpiMachine) -> Result<MachineDescription, BootError> {
    let limit = acpi.device_area().mmio_start;
    Ok(MachineDescription {
        vcpus: plan.vcpus,
        max_vcpus: plan.max_vcpus(),
        memory: memory_map(plan.memory, limit).during("memory.size")?,
        mmio: acpi.windows(0),
        command_line: boot.cmdline.clone(),
        memory_is_shared: plan.isolation == Isolation::None,
    })
}

fn plan_image<'i>(
    plan: &PodPlan,
    boot: &Boot,
    image: &'i [u8],
    initrd: Option<&'i [u8]>,
    description: &MachineDescription,
    acpi: &AcpiMachine,
) -> Result<LaunchPlan<'i>, BootError> {
    let what = || format!("{} {}", boot.field, boot.image.display());
    if detect(image) == ImageKind::Igvm || boot.field == "payload.igvm" {
        let platform = match plan.isolation {
            Isolation::None => Platform::Native,
            Isolation::Snp | Isolation::SnpEmulated => Platform::SevSnp,
        };
        if initrd.is_some() {
            return Err(BootError::new(
                "payload.initramfs: an IGVM image carries its own; leave it out",
            ));
        }
        let options = PlanOptions {
            platform: Some(platform),
            ..PlanOptions::default()
        };
        return igvm::plan(image, &options).during(what());
    }
    if plan.isolation != Isolation::None {
        return Err(BootError::new(format!(
            "{}: a confidential pod boots from an IGVM image; build one that holds this kernel",
            what()
        )));
    }
    let tables = AcpiTables::build(acpi).during("ACPI tables")?;
    let given = Given {
        initrd,
        cmdline: &boot.cmdline,
        machine: description,
        acpi: Some(&tables),
    };
    linux::plan(image, &given).during(what())
}

/// Creates the VM with its memory and local APICs.
fn create_vm(
    host: &Kvm,
    ram: &GuestRam,
    confidential: Option<&Confidential>,
    image: &LaunchPlan<'_>,
) -> Result<Arc<VmFd>, BootError> {
    let vm = loop {
        let made = match confidential {
            Some(confidential) => host.create_vm_with_type(confidential.processor().vm_type()),
            None => host.create_vm(),
        };
        // A signal that is pending ends the call and is no failure.
        match made {
            Err(error) if error.errno() == libc::EINTR => {}
            made => break made.during("KVM_CREATE_VM")?,
        }
    };
    if !vm.check_extension(Cap::ImmediateExit) {
        return Err(BootError::new(
            "this KVM lacks KVM_CAP_IMMEDIATE_EXIT: Linux 4.13 or newer is needed",
        ));
    }
    if let Some(confidential) = confidential {
        confidential.init(&vm, image)?;
    }
    ram.give_to(&vm, confidential.map(Confidential::processor))
        .during("guest memory")?;
    let tss = usize::try_from(layout::KVM_TSS_START).during("KVM_SET_TSS_ADDR")?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
        .during("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(tss).during("KVM_SET_TSS_ADDR")?;
    kvm::split_irqchip(&vm).during("KVM_CAP_SPLIT_IRQCHIP")?;
    Ok(Arc::new(vm))
}

/// As [`create_vm`], for a pod that is not confidential.
fn create_plain_vm(host: &Kvm, ram: &GuestRam) -> Result<Arc<VmFd>, BootError> {
    create_vm(host, ram, None, &LaunchPlan::new(Platform::Native))
}

/// What KVM offers a vCPU of `plan`, whose guest is told of as many as there can come to be.
fn cpuid_template(kvm: &Kvm, plan: &PodPlan) -> Result<CpuidTemplate, BootError> {
    CpuidTemplate::new(kvm, plan.max_vcpus(), plan.topology, plan.config.cpus.max_phys_bits)
        .during("KVM_GET_SUPPORTED_CPUID")
}

fn create_vcpus(vm: &VmFd, count: u32, cpuid: &CpuidTemplate, telling: &Telling) -> Result<Vec<VcpuFd>, BootError> {
    (0..count)
        .map(|index| create_vcpu(vm, index, cpuid, telling).during(format!("vCPU {index} (cpus.boot_vcpus {count})")))
        .collect()
}

fn create_vcpu(vm: &VmFd, index: u32, cpuid: &CpuidTemplate, telling: &Telling) -> Result<VcpuFd, BootError> {
    let vcpu = vm.create_vcpu(index.into()).during("KVM_CREATE_VCPU")?;
    let leaves = cpuid.for_vcpu(index).during("CPUID")?;
    vcpu.set_cpuid2(&leaves).during("KVM_SET_CPUID2")?;
    telling.tell(Source::CpuManager, What::CreateVcpu, &[("id", &index.to_string())]);
    Ok(vcpu)
}

/// Builds the chipset and plugs the devices of the configuration.
fn add_devices(
    plan: &PodPlan,
    vm: &Arc<VmFd>,
    acpi: &AcpiMachine,
    ram: &GuestRam,
    confidential: Option<&Confidential>,
    outside: Outside<'_>,
) -> Result<Parts, BootError> {
    let hypervisor = Arc::new(KvmHypervisor::new(Arc::clone(vm)).told_to(outside.telling));
    let chipset = Chipset::new(acpi, plan.memory, outside.consoles, &hypervisor, outside.exit).during("devices")?;
    let gate = confidential.map(|c| Arc::new(ProcessorGate(c.shared_processor())) as Arc<dyn SharedPages>);
    let mut rooms = Room::all(plan, vm, acpi, ram)?;
    let mems = rooms.iter_mut().map(Room::device).collect::<Result<Vec<_>, _>>()?;
    let areas: Vec<_> = rooms.iter().map(|room| Arc::clone(room.area())).collect();
    let plug = Plug {
        memory: ram
            .pod_memory(gate, areas.iter().map(|area| area.pod_region()))
            .during("guest memory")?,
        mapper: Mapper(DeviceMemory::new(Arc::clone(vm), acpi.file_area())),
        balloon: OnceLock::new(),
        kept: Mutex::new(std::mem::take(
            &mut outside.kept.lock().unwrap_or_else(PoisonError::into_inner),
        )),
        hypervisor,
        confidential: plan.isolation != Isolation::None,
        rooms,
        areas,
    };
    let mut subscribers: Subscribers = Vec::new();
    subscribers.extend(chipset.subscribers().into_iter().map(|s| (None, s)));
    let mut all = Vec::new();
    if let Some(host) = &outside.consoles.console {
        all.push(registry::fixed::console(&plan.config, host).during("devices")?);
    }
    all.extend(registry::devices(&plan.config, &plug.means(plan, ram)).during("devices")?);
    // What the guest had been asked to let go of is not wanted again.
    plug.kept.lock().unwrap_or_else(PoisonError::into_inner).clear();
    all.extend(mems.into_iter().flatten());
    let mut extras = Extras::new(&plan.config, outside, &mut all)?;
    let mut devices = Vec::new();
    for mut wanted in all {
        wanted.slot = plan.slots.get(&wanted.id).copied().or(wanted.slot);
        let (device, subscriber) = plug.put(&chipset, wanted)?;
        subscribers.push((Some(device.bdf), subscriber));
        devices.push(device);
    }
    if plan.config.pvpanic {
        extras.add_pvpanic(&chipset, outside.telling)?;
    }
    Ok(Parts {
        chipset,
        plug,
        devices,
        extras,
        subscribers,
    })
}

impl Plug {
    fn means<'m>(&'m self, plan: &'m PodPlan, ram: &'m GuestRam) -> Means<'m> {
        Means {
            descriptors: &plan.descriptors,
            groups: &plan.groups,
            mapper: &self.mapper,
            ram,
            grown: &self.areas,
            balloon: &self.balloon,
            kept: &self.kept,
        }
    }

    /// Puts a device into its segment.
    fn put(&self, chipset: &Chipset, wanted: Wanted) -> Result<(DeviceInfo, Box<dyn MutEventSubscriber>), BootError> {
        let what = format!("device {}", wanted.id);
        let root = chipset.segments.get(usize::from(wanted.segment)).ok_or_else(|| {
            BootError::new(format!(
                "{what}: pci_segment {} does not exist: raise platform.num_pci_segments ({})",
                wanted.segment,
                chipset.segments.len()
            ))
        })?;
        let function = VirtioPci::new(
            wanted.device,
            wanted.id.clone(),
            Arc::clone(&self.memory),
            Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>,
            self.confidential,
        )
        .during(what.clone())?;
        let standing = function.watch();
        let (bdf, subscriber) = add_to(root, function, wanted.slot).during(what)?;
        let info = DeviceInfo {
            id: wanted.id,
            kind: wanted.kind,
            bdf,
            removing: false,
            standing,
            function: Arc::clone(&subscriber.0),
        };
        Ok((info, Box::new(subscriber)))
    }
}
