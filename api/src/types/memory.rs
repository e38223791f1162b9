//! `memory` of the VM configuration.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How memory is added to a running VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum HotplugMethod {
    /// ACPI memory devices.
    #[default]
    Acpi,
    /// A virtio-mem device.
    VirtioMem,
}

/// The guest's memory (`--memory size=512M,shared=on`). Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema), schemars(!from, default))]
#[serde(from = "MemoryWire")]
pub struct MemoryConfig {
    /// Size at boot; 0 where zones hold all of it.
    pub size: u64,
    /// Let the host merge equal pages (KSM).
    pub mergeable: bool,
    /// How memory is added later.
    pub hotplug_method: HotplugMethod,
    /// How much can be added later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// How much of that is there already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Map it shared, so that another process can be handed it.
    pub shared: bool,
    /// Back it with huge pages.
    pub hugepages: bool,
    /// Size of those huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Fault all of it in before boot.
    pub prefault: bool,
    /// Reserve swap for it (no overcommit).
    pub reserve: bool,
    /// Zones, where the memory is not of one kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
    /// Allow transparent huge pages.
    pub thp: bool,
    /// Whether the request gave `size` (a pod's sizing must then agree with it). Not on the wire.
    #[serde(skip)]
    pub size_given: bool,
}

impl MemoryConfig {
    /// The size of a VM that is given none: 512 MiB, as Cloud Hypervisor has it.
    pub const DEFAULT_SIZE: u64 = 512 << 20;

    /// Bytes at boot: `size`, or what the zones come to.
    pub fn total(&self) -> u64 {
        let zones = self.zones.iter().flatten();
        zones.fold(self.size, |sum, zone| sum.saturating_add(zone.size))
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryWire::default().into()
    }
}

impl OptionForm for MemoryConfig {}

/// [`MemoryConfig`] as it arrives: `size` may be left out.
#[derive(Deserialize)]
#[serde(default)]
struct MemoryWire {
    size: Option<u64>,
    mergeable: bool,
    hotplug_method: HotplugMethod,
    hotplug_size: Option<u64>,
    hotplugged_size: Option<u64>,
    shared: bool,
    hugepages: bool,
    hugepage_size: Option<u64>,
    prefault: bool,
    reserve: bool,
    zones: Option<Vec<MemoryZoneConfig>>,
    thp: bool,
}

impl Default for MemoryWire {
    fn default() -> Self {
        Self {
            size: None,
            mergeable: false,
            hotplug_method: HotplugMethod::Acpi,
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            zones: None,
            thp: true,
        }
    }
}

impl From<MemoryWire> for MemoryConfig {
    fn from(wire: MemoryWire) -> Self {
        Self {
            size: wire.size.unwrap_or(Self::DEFAULT_SIZE),
            mergeable: wire.mergeable,
            hotplug_method: wire.hotplug_method,
            hotplug_size: wire.hotplug_size,
            hotplugged_size: wire.hotplugged_size,
            shared: wire.shared,
            hugepages: wire.hugepages,
            hugepage_size: wire.hugepage_size,
            prefault: wire.prefault,
            reserve: wire.reserve,
            zones: wire.zones,
            thp: wire.thp,
            size_given: wire.size.is_some(),
        }
    }
}

/// A part of the memory with properties of its own (`--memory-zone id=mem0,size=1G,file=/x`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MemoryZoneConfig {
    /// Name, unique among the zones.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// File that backs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Map it shared.
    #[serde(default)]
    pub shared: bool,
    /// Back it with huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those huge pages in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Host NUMA node to take it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Bytes that can be added later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of that which are there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Fault it in before boot.
    #[serde(default)]
    pub prefault: bool,
    /// Reserve swap for it.
    #[serde(default)]
    pub reserve: bool,
    /// Let the host merge equal pages.
    #[serde(default)]
    pub mergeable: bool,
}

impl OptionForm for MemoryZoneConfig {}
