//! The rules of what boots, of the pod's limits and of the platform. Memory and devices are not here.

use super::{Findings, Stage};
use crate::types::{Isolation, PayloadConfig, PlatformConfig, VmConfig};

/// Most PCI segments: as many as the address map has room for ECAM windows (256 MiB at 1 MiB each, less the last).
const MAX_PCI_SEGMENTS: u16 = 96;

pub(super) fn payload(config: &VmConfig, stage: Stage, found: &mut Findings) {
    let empty = PayloadConfig::default();
    let payload = config.payload.as_ref().unwrap_or(&empty);
    let (kernel, firmware, igvm) = (
        payload.kernel.is_some(),
        payload.firmware.is_some(),
        payload.igvm.is_some(),
    );
    if stage == Stage::Boot && !(kernel || firmware || igvm) {
        found.add(
            "payload",
            "there is nothing to boot; give payload.kernel, payload.firmware or payload.igvm",
        );
    }
    if kernel && firmware {
        found.add(
            "payload.firmware",
            "is given beside payload.kernel; give one of the two",
        );
    }
    if igvm && firmware {
        found.add(
            "payload.firmware",
            "is given beside payload.igvm, which holds the firmware; give one of the two",
        );
    }
    if let Some(host_data) = &payload.host_data
        && payload.host_data_bytes().is_none()
    {
        let shown: String = host_data.chars().take(80).collect();
        let reason = format!(
            "`{shown}` ({} bytes) is not 64 hexadecimal digits; give 32 bytes in hexadecimal or leave it out",
            host_data.len()
        );
        found.add("payload.host_data", reason);
    }
    // The largest command line that Cloud Hypervisor hands to a guest.
    if let Some(cmdline) = &payload.cmdline {
        if cmdline.len() >= 65536 {
            found.add(
                "payload.cmdline",
                format!("{} bytes are too many; give at most 65535", cmdline.len()),
            );
        }
        if cmdline.contains('\0') {
            found.add(
                "payload.cmdline",
                "holds a zero byte, where the kernel would stop reading; leave it out",
            );
        }
    }
}

pub(super) fn pod(config: &VmConfig, found: &mut Findings) {
    if let Some(pod) = &config.pod
        && !matches!(pod.handler.as_str(), "kata-cc" | "kata")
    {
        let shown: String = pod.handler.chars().take(80).collect();
        found.add(
            "pod.handler",
            format!("`{shown}` is no known handler; give kata-cc or kata"),
        );
    }
    let zones = config.memory.zones.as_ref().is_some_and(|zones| !zones.is_empty());
    if config.pod.is_some() && zones {
        found.add(
            "memory.zones",
            "are given beside pod, whose limits size the memory; give one of the two",
        );
    }
}

pub(super) fn platform(platform: &PlatformConfig, payload: Option<&PayloadConfig>, found: &mut Findings) {
    if !(1..=MAX_PCI_SEGMENTS).contains(&platform.num_pci_segments) {
        let reason = format!(
            "{} segments cannot be; give 1 to {MAX_PCI_SEGMENTS}",
            platform.num_pci_segments
        );
        found.add("platform.num_pci_segments", reason);
    }
    for (at, segment) in platform.iommu_segments.iter().flatten().enumerate() {
        if *segment >= platform.num_pci_segments {
            let reason = format!(
                "there is no segment {segment}; num_pci_segments is {}",
                platform.num_pci_segments
            );
            found.add(format!("platform.iommu_segments[{at}]"), reason);
        }
    }
    if platform.sev_snp
        && let Some(isolation @ (Isolation::None | Isolation::SnpEmulated)) = platform.isolation
    {
        let named = if isolation == Isolation::None {
            "none"
        } else {
            "snp-emulated"
        };
        found.add(
            "platform.isolation",
            format!("\"{named}\" contradicts sev_snp, which means the processor's SNP; leave one of the two out"),
        );
    }
    if platform.private_memory && platform.isolation() != Isolation::SnpEmulated {
        let reason = match platform.isolation() {
            Isolation::Snp => "is the processor's own with SEV-SNP; leave it out",
            _ => "is a confidential pod's; give platform.isolation snp-emulated, or leave it out",
        };
        found.add("platform.private_memory", reason);
    }
    if platform.isolation() != Isolation::None && payload.is_none_or(|payload| payload.igvm.is_none()) {
        let field = if platform.isolation.is_some() {
            "platform.isolation"
        } else {
            "platform.sev_snp"
        };
        found.add(field, "SEV-SNP boots IGVM images only; give payload.igvm");
    }
}
