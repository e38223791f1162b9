//! The rules of vCPUs and memory. What boots on them is not here.

use super::memory::{page_multiple, zone_rules};
use super::{Findings, MAX_MEMORY_BYTES, MAX_VCPUS};
use crate::types::{CpusConfig, MemoryConfig, VmConfig};

pub(super) fn cpus(cpus: &CpusConfig, found: &mut Findings) {
    let (boot, max) = (cpus.boot_vcpus, cpus.max_vcpus);
    if boot == 0 {
        found.add("cpus.boot_vcpus", "0 vCPUs cannot boot; give at least 1");
    }
    if max > MAX_VCPUS || boot > MAX_VCPUS {
        let field = if boot > MAX_VCPUS {
            "cpus.boot_vcpus"
        } else {
            "cpus.max_vcpus"
        };
        found.add(
            field,
            format!("{} vCPUs are too many; give at most {MAX_VCPUS}", boot.max(max)),
        );
    }
    if max < boot {
        found.add(
            "cpus.max_vcpus",
            format!("{max} is below boot_vcpus, {boot}; give at least that or leave it out"),
        );
    }
    if let Some(t) = &cpus.topology {
        let counts = [t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages];
        let product = counts
            .iter()
            .fold(1u64, |product, n| product.saturating_mul(u64::from(*n)));
        if product != u64::from(max) {
            let [threads, cores, dies, packages] = counts;
            let reason = format!(
                "{threads} threads x {cores} cores x {dies} dies x {packages} packages are {product} vCPUs, max_vcpus is {max}; make them equal"
            );
            found.add("cpus.topology", reason);
        }
    }
    if !(32..=52).contains(&cpus.max_phys_bits) {
        let reason = format!(
            "{} address bits cannot be; give 32 to 52 or leave it out",
            cpus.max_phys_bits
        );
        found.add("cpus.max_phys_bits", reason);
    }
    for (at, entry) in cpus.affinity.iter().flatten().enumerate() {
        if entry.vcpu >= max {
            found.add(
                format!("cpus.affinity[{at}].vcpu"),
                format!("there is no vCPU {}; max_vcpus is {max}", entry.vcpu),
            );
        }
        if entry.host_cpus.is_empty() {
            found.add(
                format!("cpus.affinity[{at}].host_cpus"),
                "no host CPU is named; name at least one",
            );
        }
    }
}

pub(super) fn memory(memory: &MemoryConfig, found: &mut Findings) {
    let zones = memory.zones.as_deref().unwrap_or_default();
    if memory.size == 0 && zones.is_empty() {
        found.add(
            "memory.size",
            "0 bytes cannot boot; give the size in bytes, for example 536870912",
        );
    }
    if memory.size != 0 && !zones.is_empty() {
        let reason = format!(
            "{} bytes are given beside zones; give 0 here, the zones' sizes count",
            memory.size
        );
        found.add("memory.size", reason);
    }
    let zones_sum = zones.iter().fold(0u64, |sum, zone| sum.saturating_add(zone.size));
    let total = memory.size.saturating_add(zones_sum);
    if total > MAX_MEMORY_BYTES {
        found.add(
            "memory.size",
            format!("{total} bytes are too much; give at most {MAX_MEMORY_BYTES}"),
        );
    }
    page_multiple("memory.size".to_owned(), memory.size, found);
    if let Some(size) = memory.hotplug_size
        && total.saturating_add(size) > MAX_MEMORY_BYTES
    {
        let reason = format!("{size} bytes beside {total} are too much; give at most {MAX_MEMORY_BYTES} together");
        found.add("memory.hotplug_size", reason);
    }
    if let Some(hotplugged) = memory.hotplugged_size
        && hotplugged > memory.hotplug_size.unwrap_or(0)
    {
        found.add(
            "memory.hotplugged_size",
            format!("{hotplugged} bytes are more than hotplug_size; give at most that"),
        );
    }
    if memory.hugepage_size.is_some() && !memory.hugepages {
        found.add(
            "memory.hugepage_size",
            "is given without hugepages; set hugepages or leave it out",
        );
    }
    if let Some(size) = memory.hugepage_size
        && (!size.is_power_of_two() || size < 4096)
    {
        found.add(
            "memory.hugepage_size",
            format!("{size} is no page size; give a power of two, for example 2097152"),
        );
    }
    zone_rules(zones, found);
}

/// Memory that would be there twice: the monitor's half of a page is to hold nothing while the guest sees the other.
pub(super) fn private_memory(config: &VmConfig, found: &mut Findings) {
    if !config.platform.as_ref().is_some_and(|platform| platform.private_memory) {
        return;
    }
    const TWICE: &str = "would hold each page twice with platform.private_memory; leave one of the two out";
    let memory = &config.memory;
    for (asked, field) in [
        (memory.hugepages, "memory.hugepages"),
        (memory.prefault, "memory.prefault"),
    ] {
        if asked {
            found.add(field, TWICE);
        }
    }
    for (at, zone) in memory.zones.iter().flatten().enumerate() {
        for (asked, field) in [(zone.hugepages, "hugepages"), (zone.prefault, "prefault")] {
            if asked {
                found.add(format!("memory.zones[{at}].{field}"), TWICE);
            }
        }
    }
}
