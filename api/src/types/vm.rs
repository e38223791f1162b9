//! The VM: its whole configuration and its state.

use super::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DeviceConfig, DiskConfig, FsConfig, LandlockConfig,
    MemoryConfig, NetConfig, PayloadConfig, PciSegmentConfig, PlatformConfig, PmemConfig, PodConfig,
    RateLimitGroupConfig, RngConfig, ScratchConfig, SerialConfig, VsockConfig,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Configuration of a VM: body of `vm.create`, `config` of `vm.info`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// What boots. May be absent until boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// The pod's limits, from which vCPUs and memory are sized.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodConfig>,
    /// Limits that disks share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
    /// Disks, in the guest's order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Scratch disk; an addition to Cloud Hypervisor's schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch: Option<ScratchConfig>,
    /// Network devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Entropy device; always there.
    pub rng: RngConfig,
    /// Balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Shared file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Persistent memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<PmemConfig>>,
    /// Serial port.
    pub serial: SerialConfig,
    /// virtio console.
    pub console: ConsoleConfig,
    /// Debug port.
    pub debug_console: DebugConsoleConfig,
    /// Host devices; refused unless empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// Socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// A device that tells of guest panics.
    pub pvpanic: bool,
    /// A virtual IOMMU; refused if asked for.
    pub iommu: bool,
    /// A watchdog.
    pub watchdog: bool,
    /// Platform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// Shares of the PCI segments in the address space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// Restrict the monitor's file accesses.
    pub landlock_enable: bool,
    /// Paths allowed beyond the configuration's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// NUMA nodes; refused unless empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<Value>>,
    /// vDPA devices; refused unless empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Vec<Value>>,
    /// vfio-user devices; refused unless empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<Value>>,
    /// Generic vhost-user devices; refused unless empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<Value>>,
    /// Memory shared with other VMs; refused if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivshmem: Option<Value>,
    /// TPM; refused if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Value>,
}

impl VmConfig {
    /// The rate limit groups, none if absent.
    pub fn rate_limit_groups(&self) -> &[RateLimitGroupConfig] {
        self.rate_limit_groups.as_deref().unwrap_or_default()
    }

    /// The disks, none if absent.
    pub fn disks(&self) -> &[DiskConfig] {
        self.disks.as_deref().unwrap_or_default()
    }

    /// The network devices, none if absent.
    pub fn net(&self) -> &[NetConfig] {
        self.net.as_deref().unwrap_or_default()
    }

    /// The shared file systems, none if absent.
    pub fn fs(&self) -> &[FsConfig] {
        self.fs.as_deref().unwrap_or_default()
    }

    /// The persistent memory devices, none if absent.
    pub fn pmem(&self) -> &[PmemConfig] {
        self.pmem.as_deref().unwrap_or_default()
    }

    /// The host devices, none if absent.
    pub fn devices(&self) -> &[DeviceConfig] {
        self.devices.as_deref().unwrap_or_default()
    }

    /// The isolation asked for.
    pub fn isolation(&self) -> super::Isolation {
        self.platform
            .as_ref()
            .map(PlatformConfig::isolation)
            .unwrap_or_default()
    }
}

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum VmState {
    /// Configured, not booted.
    Created,
    /// vCPUs run.
    Running,
    /// Was booted, is off.
    Shutdown,
    /// vCPUs stand.
    Paused,
}

/// Response of `vm.info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmInfo {
    /// The configuration, as it stands now.
    pub config: VmConfig,
    /// The state.
    pub state: VmState,
    /// Bytes of memory that the guest has.
    #[serde(default)]
    pub memory_actual_size: u64,
    /// What only podvisor tells: digests, isolation, timings.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub podvisor: Map<String, Value>,
}
