//! The platform: isolation, PCI segments, identity shown to the guest.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};

/// How the guest is protected from the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Not at all: an ordinary VM.
    #[default]
    None,
    /// SEV-SNP by the processor.
    Snp,
    /// The SNP path on an emulated processor, which protects nothing.
    SnpEmulated,
}

/// The platform (`--platform num_pci_segments=2,sev_snp=on`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PlatformConfig {
    /// PCI segments.
    pub num_pci_segments: u16,
    /// Segments behind the virtual IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address bits of the virtual IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_address_width_bits: Option<u8>,
    /// Serial number in the SMBIOS tables.
    #[serde(alias = "system_serial_number", skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// UUID in the SMBIOS tables.
    #[serde(alias = "system_uuid", skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// OEM strings in the SMBIOS tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// Intel TDX; refused if asked for.
    #[serde(skip_serializing_if = "super::is_false")]
    pub tdx: bool,
    /// SEV-SNP by the processor (older shims say `snp`).
    #[serde(alias = "snp")]
    pub sev_snp: bool,
    /// Isolation by name (an addition to Cloud Hypervisor's schema).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// The emulated processor keeps private pages out of the monitor's reach, where the host's KVM has VMs for that
    /// (`KVM_X86_SW_PROTECTED_VM`). SEV-SNP by the processor always does (an addition to Cloud Hypervisor's schema).
    #[serde(skip_serializing_if = "super::is_false")]
    pub private_memory: bool,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: 1,
            iommu_segments: None,
            iommu_address_width_bits: None,
            serial_number: None,
            uuid: None,
            oem_strings: None,
            tdx: false,
            sev_snp: false,
            isolation: None,
            private_memory: false,
        }
    }
}

impl PlatformConfig {
    /// The isolation asked for by either name.
    pub fn isolation(&self) -> Isolation {
        match (self.isolation, self.sev_snp) {
            (Some(isolation), _) => isolation,
            (None, true) => Isolation::Snp,
            (None, false) => Isolation::None,
        }
    }
}

impl OptionForm for PlatformConfig {}

/// A PCI segment's share of the address space (`--pci-segment pci_segment=1,mmio32_aperture_weight=2`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct PciSegmentConfig {
    /// Number of the segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Weight of its window below 4 GiB. The monitor gives each segment an even share.
    #[serde(default = "one")]
    pub mmio32_aperture_weight: u32,
    /// Weight of its window above 4 GiB. The monitor gives each segment 4 GiB.
    #[serde(default = "one")]
    pub mmio64_aperture_weight: u32,
}

fn one() -> u32 {
    1
}

impl OptionForm for PciSegmentConfig {}
