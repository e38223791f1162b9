//! The rules of memory zones and of the devices that are memory: persistent memory, the balloon.

use std::collections::BTreeSet;

use super::Findings;
use crate::types::{BalloonConfig, MemoryConfig, MemoryZoneConfig, PmemConfig};

/// What the size of persistent memory must be a multiple of: a huge page, as Cloud Hypervisor has it.
const PMEM_ALIGNMENT: u64 = 2 << 20;

/// What a balloon can take: its device counts pages of 4 KiB in 32 bits (virtio 1.2, 5.5.4).
const MAX_BALLOON: u64 = (u32::MAX as u64) << 12;

pub(super) fn page_multiple(field: String, size: u64, found: &mut Findings) {
    if !size.is_multiple_of(4096) {
        found.add(
            field,
            format!("{size} bytes are not whole pages; give a multiple of 4096"),
        );
    }
}

pub(super) fn zone_rules(zones: &[MemoryZoneConfig], found: &mut Findings) {
    let mut names = BTreeSet::new();
    for (at, zone) in zones.iter().enumerate() {
        let field = |name| format!("memory.zones[{at}].{name}");
        if zone.size == 0 {
            found.add(field("size"), "0 bytes make no zone; give a size or leave the zone out");
        }
        page_multiple(field("size"), zone.size, found);
        if zone.id.is_empty() || !names.insert(zone.id.as_str()) {
            let reason = format!(
                "`{}` is empty or given twice; give each zone a name of its own",
                zone.id
            );
            found.add(field("id"), reason);
        }
        if zone.file.as_ref().is_some_and(|file| file.as_os_str().is_empty()) {
            found.add(field("file"), "is empty; give a file or a directory, or leave it out");
        }
        if zone.hugepage_size.is_some() && !zone.hugepages {
            let reason = "is given without hugepages; set hugepages or leave it out";
            found.add(field("hugepage_size"), reason);
        }
        if zone.hotplugged_size.unwrap_or(0) > zone.hotplug_size.unwrap_or(0) {
            let reason = format!(
                "{} bytes are more than hotplug_size; give at most that",
                zone.hotplugged_size.unwrap_or(0)
            );
            found.add(field("hotplugged_size"), reason);
        }
    }
}

pub(super) fn pmem(pmem: &PmemConfig, field: &str, found: &mut Findings) {
    if pmem.file.as_os_str().is_empty() {
        found.add(
            format!("{field}.file"),
            "is empty; give a file, or a directory to make one in",
        );
    }
    if let Some(size) = pmem.size
        && (size == 0 || !size.is_multiple_of(PMEM_ALIGNMENT))
    {
        let reason = format!("{size} bytes cannot be mapped; give a multiple of {PMEM_ALIGNMENT}, or leave it out");
        found.add(format!("{field}.size"), reason);
    }
    if pmem.iommu {
        found.add(
            format!("{field}.iommu"),
            "there is no virtual IOMMU in podvisor; leave it out",
        );
    }
}

pub(super) fn balloon(balloon: &BalloonConfig, memory: &MemoryConfig, found: &mut Findings) {
    let total = memory.total().min(MAX_BALLOON);
    page_multiple("balloon.size".to_owned(), balloon.size, found);
    if balloon.size > total {
        let reason = format!(
            "{} bytes are more than the memory has, or a balloon can take: {total}; give at most that",
            balloon.size
        );
        found.add("balloon.size", reason);
    }
}
