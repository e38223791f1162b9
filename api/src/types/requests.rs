//! Bodies of the requests and responses other than the configuration itself.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};

/// `vmm.ping`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct VmmPingResponse {
    /// What was built, exactly.
    pub build_version: String,
    /// The release.
    pub version: String,
    /// Process identifier of the monitor.
    pub pid: i64,
    /// What it can do.
    pub features: Vec<String>,
}

/// Where a device was put: response of the `vm.add-…` requests on a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct PciDeviceInfo {
    /// Name of the device.
    pub id: String,
    /// Its PCI address, `0000:00:DD.0`.
    pub bdf: String,
}

/// `vm.resize`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct VmResize {
    /// vCPUs wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// Bytes of memory wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes wanted in the balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// `vm.resize-disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmResizeDisk {
    /// Name of the disk.
    pub id: String,
    /// Bytes wanted.
    pub desired_size: u64,
}

/// `vm.resize-zone`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmResizeZone {
    /// Name of the zone.
    pub id: String,
    /// Bytes wanted.
    pub desired_ram: u64,
}

/// `vm.remove-device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmRemoveDevice {
    /// Name of the device.
    pub id: String,
}

/// `vm.snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmSnapshotConfig {
    /// `file://` and a directory.
    pub destination_url: String,
}

/// `vm.restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RestoreConfig {
    /// `file://` and a directory.
    pub source_url: String,
    /// Have a private copy of all memory before the answer.
    #[serde(default)]
    pub prefault: bool,
    /// When memory is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_restore_mode: Option<MemoryRestoreMode>,
    /// Descriptors for network devices, which come beside the request, in this order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNetConfig>>,
    /// Resume at once.
    #[serde(default)]
    pub resume: bool,
}

impl RestoreConfig {
    /// Whether all memory is copied before the answer.
    #[must_use]
    pub fn copies_memory(&self) -> bool {
        self.prefault || self.memory_restore_mode == Some(MemoryRestoreMode::Copy)
    }
}

/// When the memory of a restored VM is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum MemoryRestoreMode {
    /// All of it before the answer.
    #[serde(alias = "copy")]
    Copy,
    /// Page by page, when the guest touches it.
    #[serde(alias = "ondemand")]
    OnDemand,
    /// The same: pages that the guest only reads stay those of the file.
    #[serde(alias = "copyonwrite")]
    CopyOnWrite,
}

/// The descriptors of one network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RestoredNetConfig {
    /// Name of the device.
    pub id: String,
    /// How many of the descriptors are its own.
    #[serde(default)]
    pub num_fds: usize,
    /// Numbers that mean nothing here: the descriptors come beside the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i64>>,
}

impl OptionForm for VmResize {}
impl OptionForm for VmResizeDisk {}
impl OptionForm for VmResizeZone {}
impl OptionForm for RestoreConfig {}
