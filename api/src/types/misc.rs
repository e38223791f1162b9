//! The small devices: entropy, balloon, persistent memory, vsock, host devices.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The entropy device (`--rng src=/dev/urandom`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RngConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// Where the bytes come from.
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            id: None,
            pci_segment: 0,
            iommu: false,
            src: PathBuf::from("/dev/urandom"),
        }
    }
}

impl OptionForm for RngConfig {}

/// The balloon (`--balloon size=0,free_page_reporting=on`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct BalloonConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    pub pci_segment: u16,
    /// Bytes taken from the guest.
    pub size: u64,
    /// Give memory back when the guest runs out.
    pub deflate_on_oom: bool,
    /// Let the guest report free pages.
    pub free_page_reporting: bool,
}

impl OptionForm for BalloonConfig {}

/// Persistent memory (`--pmem file=/x,size=1G`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct PmemConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// The backing file, or the directory to make one in.
    pub file: PathBuf,
    /// Bytes; the file's size where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Map it privately, so that writes are lost.
    #[serde(default)]
    pub discard_writes: bool,
}

impl OptionForm for PmemConfig {}

/// The socket device (`--vsock cid=3,socket=/x`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VsockConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// The guest's context identifier, from 3 up.
    pub cid: u32,
    /// UNIX socket on the host that stands for the guest.
    pub socket: PathBuf,
}

impl OptionForm for VsockConfig {}

/// A device of the host given to the guest over VFIO (`--device path=/sys/bus/pci/devices/…`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DeviceConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// The device in sysfs.
    pub path: PathBuf,
}

impl OptionForm for DeviceConfig {}
