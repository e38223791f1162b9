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
    /// Read all memory before resuming.
    #[serde(default)]
    pub prefault: bool,
    /// Resume at once.
    #[serde(default)]
    pub resume: bool,
}

impl OptionForm for VmResize {}
impl OptionForm for VmResizeDisk {}
impl OptionForm for VmResizeZone {}
impl OptionForm for RestoreConfig {}
