//! What holds between devices: names and tags are each device's own, and the PCI segments they name exist.

use std::collections::BTreeSet;

use super::{ConfigError, Findings};
use crate::types::VmConfig;

/// Every PCI segment that a device names must exist.
pub(super) fn segments(config: &VmConfig, found: &mut Findings) {
    let count = config.platform.as_ref().map_or(1, |platform| platform.num_pci_segments);
    let mut used = vec![
        ("rng".to_owned(), config.rng.pci_segment),
        ("console".to_owned(), config.console.pci_segment),
    ];
    used.extend(
        config
            .disks()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("disks[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .net()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("net[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .fs()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("fs[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .pmem()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("pmem[{at}]"), d.pci_segment)),
    );
    used.extend(
        config
            .devices()
            .iter()
            .enumerate()
            .map(|(at, d)| (format!("devices[{at}]"), d.pci_segment)),
    );
    used.extend(config.scratch.iter().map(|d| ("scratch".to_owned(), d.pci_segment)));
    used.extend(config.vsock.iter().map(|d| ("vsock".to_owned(), d.pci_segment)));
    used.extend(config.balloon.iter().map(|d| ("balloon".to_owned(), d.pci_segment)));
    for (field, segment) in used {
        if segment >= count {
            let reason = format!("there is no segment {segment}; raise platform.num_pci_segments, now {count}");
            found.add(format!("{field}.pci_segment"), reason);
        }
    }
}

/// Each section of `pci_segments` is of a segment of its own that exists, and gives it something.
pub(super) fn segment_shares(config: &VmConfig, found: &mut Findings) {
    let count = config.platform.as_ref().map_or(1, |platform| platform.num_pci_segments);
    let mut seen = BTreeSet::new();
    for (at, share) in config.pci_segments.iter().flatten().enumerate() {
        let field = |name| format!("pci_segments[{at}].{name}");
        let segment = share.pci_segment;
        if segment >= count {
            let reason = format!("there is no segment {segment}; raise platform.num_pci_segments, now {count}");
            found.add(field("pci_segment"), reason);
        }
        if !seen.insert(segment) {
            let reason = format!("segment {segment} is given twice; give it one section");
            found.add(field("pci_segment"), reason);
        }
        for (name, weight) in [
            ("mmio32_aperture_weight", share.mmio32_aperture_weight),
            ("mmio64_aperture_weight", share.mmio64_aperture_weight),
        ] {
            if weight == 0 {
                found.add(field(name), "0 leaves the segment nothing; give 1 or more");
            }
        }
    }
}

pub(super) fn identifier(field: &str, id: &str, found: &mut Findings) {
    let shown: String = id.chars().take(80).collect();
    if id.is_empty() {
        found.add(field, "is empty; give a name or leave it out");
    } else if id.starts_with("__") {
        found.add(
            field,
            format!("`{shown}` is reserved: names that begin with __ are podvisor's own; give another"),
        );
    } else if id.len() > 255 {
        found.add(field, format!("`{shown}`… has {} bytes; give at most 255", id.len()));
    }
}

fn push_name<'c>(named: &mut Vec<(String, &'c str)>, field: String, id: &'c Option<String>) {
    named.extend(id.as_deref().map(|id| (field, id)));
}

/// Names must be well-formed and each device's own.
pub(super) fn identifiers(config: &VmConfig, found: &mut Findings) {
    let mut named: Vec<(String, &str)> = Vec::new();
    let mut add = |field, id| push_name(&mut named, field, id);
    config
        .disks()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("disks[{at}].id"), &d.id));
    config
        .net()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("net[{at}].id"), &d.id));
    config
        .fs()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("fs[{at}].id"), &d.id));
    config
        .pmem()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("pmem[{at}].id"), &d.id));
    config
        .devices()
        .iter()
        .enumerate()
        .for_each(|(at, d)| add(format!("devices[{at}].id"), &d.id));
    config.scratch.iter().for_each(|d| add("scratch.id".to_owned(), &d.id));
    config.vsock.iter().for_each(|d| add("vsock.id".to_owned(), &d.id));
    config.balloon.iter().for_each(|d| add("balloon.id".to_owned(), &d.id));
    add("rng.id".to_owned(), &config.rng.id);
    add("console.id".to_owned(), &config.console.id);
    let mut seen = BTreeSet::new();
    for (field, id) in named {
        identifier(&field, id, found);
        if !seen.insert(id) {
            let reason = format!("`{id}` is given to two devices; give each a name of its own, or none");
            found.0.push(ConfigError {
                field,
                reason,
                conflict: true,
            });
        }
    }
    let mut tags = BTreeSet::new();
    for (at, fs) in config.fs().iter().enumerate() {
        if !tags.insert(fs.tag.as_str()) {
            found.add(
                format!("fs[{at}].tag"),
                format!("`{}` is given to two file systems; give each a tag of its own", fs.tag),
            );
        }
    }
}
