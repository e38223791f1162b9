//! From a configuration to a [`PodPlan`]: the checks that need more than one section, the pod's sizing rules, and
//! what this host can do. The wire types and their own rules are `podvisor_api`'s; nothing is opened or allocated here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use podvisor_api::types::{HotplugMethod, Isolation, MemoryConfig, MemoryZoneConfig, PodConfig, VmConfig};
use podvisor_api::{ConfigError, Stage};
use podvisor_firmware::layout;
use podvisor_firmware::memory_map::ram_ranges;

use crate::cpuid::Topology;
use crate::memory::{RamOptions, Zone};
use crate::registry::{self, Groups};
use crate::sizing::{self, SizingError};
use crate::vcpu::Affinity;

/// What boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// An IGVM file or a PVH kernel; which of them is told by its first bytes.
    pub image: PathBuf,
    /// The configuration field that names it.
    pub field: &'static str,
    /// An initial RAM disk, for a kernel.
    pub initramfs: Option<PathBuf>,
    /// The kernel command line, or the value of an IGVM command-line parameter.
    pub cmdline: String,
}

/// A checked configuration: everything the machine is built from.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// The configuration, completed: sizes filled in, devices named.
    pub config: VmConfig,
    /// vCPUs.
    pub vcpus: u32,
    /// What the guest is told of their arrangement.
    pub topology: Option<Topology>,
    /// Bytes of RAM.
    pub memory: u64,
    /// How RAM is mapped that is in no zone.
    pub ram: RamOptions,
    /// The zones that make all of it, if any.
    pub zones: Vec<Zone>,
    /// Isolation.
    pub isolation: Isolation,
    /// Whether the emulated processor keeps private pages out of the monitor's reach.
    pub private_memory: bool,
    /// PCI segments.
    pub segments: u16,
    /// What boots; none: the pod can be created but not booted.
    pub boot: Option<Boot>,
    /// HOST_DATA of the pod's reports.
    pub host_data: [u8; 32],
    /// The launch digest that must come out.
    pub expect_digest: Option<[u8; 48]>,
    /// Descriptors that came with requests, by the name of the device they are for; a reboot uses them again.
    pub descriptors: Descriptors,
    /// The buckets of its rate limit groups; what is left in them outlives a device and a reboot.
    pub groups: Groups,
    /// PCI slots that devices have to be in, by their names, whatever the configuration says: those of a snapshot.
    pub slots: BTreeMap<String, u8>,
}

/// Why a configuration is refused. Names the field, the value and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A section breaks its own rules.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pod's limits.
    #[error("pod")]
    Sizing(#[from] SizingError),
    /// A value that cannot be.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Something that this version does not do.
    #[error("{field} is not supported yet by podvisor {}", env!("CARGO_PKG_VERSION"))]
    Unsupported {
        /// The field.
        field: &'static str,
    },
}

fn field(field: impl Into<String>, reason: impl Into<String>) -> PlanError {
    PlanError::Field {
        field: field.into(),
        reason: reason.into(),
    }
}

/// Descriptors by the name of the device that they are for.
pub type Descriptors = BTreeMap<String, Arc<Vec<OwnedFd>>>;

impl PodPlan {
    /// Checks `config` as a whole. `expect_digest` is what the command line promises of the launch.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(mut config: VmConfig, expect_digest: Option<[u8; 48]>) -> Result<Self, PlanError> {
        if let Some(pod) = config.pod.clone() {
            size(&mut config, &pod)?;
        }
        Self::changed(config, expect_digest)
    }

    /// As [`PodPlan::new`], for the configuration of a pod that there is already: its sizes are what they have become,
    /// whatever its limits once made of them.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn changed(mut config: VmConfig, expect_digest: Option<[u8; 48]>) -> Result<Self, PlanError> {
        config.validate(Stage::Create)?;
        unsupported(&config)?;
        memory_fits(&config)?;
        registry::assign_ids(&mut config);
        let isolation = config.isolation();
        let private_memory = config.platform.as_ref().is_some_and(|platform| platform.private_memory);
        isolation_possible(isolation, private_memory)?;
        if expect_digest.is_some() && isolation == Isolation::None {
            return Err(field(
                "--expect-digest",
                "a pod without isolation has no launch digest: add --platform isolation=snp-emulated",
            ));
        }
        let payload = config.payload.clone().unwrap_or_default();
        let host_data = match (&payload.host_data, payload.host_data_bytes()) {
            (None, _) => [0; 32],
            (Some(_), Some(bytes)) => bytes,
            (Some(text), None) => {
                return Err(field(
                    "payload.host_data",
                    format!("{text:?} is not 64 hexadecimal digits"),
                ));
            }
        };
        let topology = config.cpus.topology.map(|t| Topology {
            threads_per_core: u32::from(t.threads_per_core),
            cores_per_package: u32::from(t.cores_per_die) * u32::from(t.dies_per_package),
        });
        let memory = &config.memory;
        let ram = RamOptions {
            shared: memory.shared,
            hugepages: memory.hugepages,
            // A huge page of the monitor's half would lie under private pages too.
            thp: memory.thp && !private_memory,
            mergeable: memory.mergeable,
            prefault: memory.prefault,
            secret: isolation != Isolation::None,
        };
        Ok(Self {
            vcpus: config.cpus.boot_vcpus,
            topology,
            memory: memory.total(),
            zones: zones(memory, ram)?,
            ram,
            isolation,
            private_memory,
            segments: config.platform.as_ref().map_or(1, |p| p.num_pci_segments),
            boot: boot(&config)?,
            host_data,
            expect_digest,
            descriptors: Descriptors::new(),
            groups: registry::groups(&config),
            slots: BTreeMap::new(),
            config,
        })
    }
}

/// Bytes of an image from which on its launch is expected to take long: 16 MiB are measured in about 10 ms.
const LARGE_IMAGE: u64 = 16 << 20;

impl PodPlan {
    /// Whether booting may take long: pages are touched one by one, a large image is copied or measured, or another
    /// process is asked for a device.
    #[must_use]
    pub fn boot_may_take_long(&self) -> bool {
        let config = &self.config;
        let large = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| file.len() >= LARGE_IMAGE);
        let boot = self.boot.as_ref();
        self.ram.prefault
            || config.fs().iter().any(|fs| fs.socket.is_some())
            || config.disks().iter().any(|disk| disk.vhost_user)
            || config.net().iter().any(|net| net.vhost_user)
            || boot.is_some_and(|boot| large(&boot.image) || boot.initramfs.as_ref().is_some_and(large))
    }

    /// The host CPUs of the vCPUs that have some of their own.
    #[must_use]
    pub fn affinity(&self) -> Affinity {
        let mut all = Affinity::new();
        for entry in self.config.cpus.affinity.iter().flatten() {
            all.entry(entry.vcpu).or_default().extend(&entry.host_cpus);
        }
        all
    }

    /// The plan with what only requests brought to `before`, the plan that it takes the place of.
    #[must_use]
    pub fn keeping(self, before: &Self) -> Self {
        Self {
            descriptors: before.descriptors.clone(),
            slots: before.slots.clone(),
            groups: before.groups.clone(),
            ..self
        }
    }

    /// The most vCPUs that the pod can come to have. The launch of a confidential pod measures how many it has.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        match self.isolation {
            Isolation::None => self.config.cpus.max_vcpus.max(self.vcpus),
            Isolation::Snp | Isolation::SnpEmulated => self.vcpus,
        }
    }
}

/// Fills in memory and vCPUs from the pod's limits.
fn size(config: &mut VmConfig, pod: &PodConfig) -> Result<(), PlanError> {
    let sizing = sizing::size(pod)?;
    config.apply_sizing(sizing.memory_bytes, sizing.vcpus)?;
    Ok(())
}

/// The zones of `memory`, which are mapped as `ram` says where they have no word of their own.
fn zones(memory: &MemoryConfig, ram: RamOptions) -> Result<Vec<Zone>, PlanError> {
    let zone = |(at, zone): (usize, &MemoryZoneConfig)| {
        let named = |name: &str| format!("memory.zones[{at}].{name}");
        if ram.secret && zone.file.is_some() {
            let reason = "a confidential pod's memory is its own and never in a file; leave it out";
            return Err(field(named("file"), reason));
        }
        if zone.host_numa_node.is_some() {
            let reason = "memory of one host node is not supported; leave it out, and start podvisor under numactl";
            return Err(field(named("host_numa_node"), reason));
        }
        let hotplug_size = zone.hotplug_size.unwrap_or(0);
        if hotplug_size > 0 && memory.hotplug_method != HotplugMethod::VirtioMem {
            let reason = "a zone grows through virtio-mem only: give memory.hotplug_method VirtioMem, or leave it out";
            return Err(field(named("hotplug_size"), reason));
        }
        if hotplug_size > 0 && zone.file.is_some() {
            let reason = "a zone in a file keeps its size: leave file or hotplug_size out";
            return Err(field(named("hotplug_size"), reason));
        }
        Ok(Zone {
            id: zone.id.clone(),
            size: zone.size,
            file: zone.file.clone(),
            options: RamOptions {
                shared: zone.shared,
                hugepages: zone.hugepages,
                mergeable: zone.mergeable,
                prefault: zone.prefault,
                ..ram
            },
            hotplug_size,
            hotplugged_size: zone.hotplugged_size.unwrap_or(0),
        })
    };
    memory.zones.iter().flatten().enumerate().map(zone).collect()
}

/// Refuses what is asked for and would silently not be there yet; what will never be is refused by the rules of the API.
fn unsupported(config: &VmConfig) -> Result<(), PlanError> {
    let asked = [(
        "payload.firmware",
        config.payload.as_ref().is_some_and(|p| p.firmware.is_some()),
    )];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((field, _)) => Err(PlanError::Unsupported { field }),
        None => Ok(()),
    }
}

/// The pod's memory must lie below its devices.
fn memory_fits(config: &VmConfig) -> Result<(), PlanError> {
    let limit = layout::device_area(config.cpus.max_phys_bits).mmio_start;
    ram_ranges(config.memory.total(), limit).map_err(|e| field("memory.size", e.to_string()))?;
    let memory = &config.memory;
    if let Some(size @ 1..) = memory.hotplugged_size
        && memory.hotplug_method != HotplugMethod::VirtioMem
    {
        return Err(field(
            "memory.hotplugged_size",
            format!("{size} bytes need memory.hotplug_method VirtioMem; through ACPI a pod boots with memory.size"),
        ));
    }
    Ok(())
}

/// `KVM_CAP_VM_TYPES` (Linux `include/uapi/linux/kvm.h`).
const CAP_VM_TYPES: u64 = 235;
/// `KVM_X86_SNP_VM`.
const SNP_VM: i32 = 4;

/// Whether this host's KVM has SEV-SNP guests.
#[must_use]
pub fn host_has_snp() -> bool {
    let types = Kvm::new().map_or(0, |kvm| kvm.check_extension_raw(CAP_VM_TYPES));
    types & 1 << SNP_VM != 0 && std::path::Path::new("/dev/sev").exists()
}

fn isolation_possible(isolation: Isolation, private_memory: bool) -> Result<(), PlanError> {
    if private_memory
        && let Ok(kvm) = Kvm::new()
        && let Some(what) = podvisor_snp::private_memory::missing(&kvm)
    {
        let reason = format!("this host's KVM has no {what}; leave it out");
        return Err(field("platform.private_memory", reason));
    }
    if isolation != Isolation::Snp {
        return Ok(());
    }
    let reason = if host_has_snp() {
        format!(
            "this host has SEV-SNP, but podvisor {} launches only on the emulated processor; \
             ask for isolation=snp-emulated by name, which protects nothing",
            env!("CARGO_PKG_VERSION")
        )
    } else {
        "this host has no SEV-SNP (/dev/sev and KVM's VM type 4); to try the path without protection, \
         ask for isolation=snp-emulated by name"
            .to_owned()
    };
    Err(field("platform.sev_snp", reason))
}

/// What boots: an IGVM file, or a kernel.
fn boot(config: &VmConfig) -> Result<Option<Boot>, PlanError> {
    let Some(payload) = &config.payload else {
        return Ok(None);
    };
    let (image, name) = match (&payload.igvm, &payload.kernel) {
        (Some(_), Some(_)) => {
            return Err(field(
                "payload.kernel",
                "a kernel beside payload.igvm is not supported yet; give an image that holds the kernel",
            ));
        }
        (Some(igvm), None) => (igvm, "payload.igvm"),
        (None, Some(kernel)) => (kernel, "payload.kernel"),
        (None, None) => return Ok(None),
    };
    Ok(Some(Boot {
        image: image.clone(),
        field: name,
        initramfs: payload.initramfs.clone(),
        cmdline: payload.cmdline.clone().unwrap_or_default(),
    }))
}
