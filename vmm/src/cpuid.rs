//! The CPUID leaves of a vCPU: what KVM supports, with the identity and topology of the one vCPU filled in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// Threads, cores and packages as the guest shall see them. Cloud Hypervisor's `cpus.topology`; a die is a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Threads of a core.
    pub threads_per_core: u32,
    /// Cores of a package.
    pub cores_per_package: u32,
}

/// What KVM can offer, read once.
pub struct CpuidTemplate {
    supported: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    max_phys_bits: u8,
}

impl CpuidTemplate {
    /// Asks `kvm`. `vcpus` is the number of vCPUs, `max_phys_bits` the widest physical address to offer.
    ///
    /// # Errors
    /// When KVM does not answer.
    pub fn new(
        kvm: &Kvm,
        vcpus: u32,
        topology: Option<Topology>,
        max_phys_bits: u8,
    ) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            topology: topology.unwrap_or(Topology {
                threads_per_core: 1,
                cores_per_package: vcpus.max(1),
            }),
            max_phys_bits,
        })
    }

    /// Bits of a guest physical address: the host's, capped.
    #[must_use]
    pub fn phys_bits(&self) -> u8 {
        let host = self
            .supported
            .iter()
            .find(|e| e.function == 0x8000_0008)
            .map_or(36, |e| e.eax.to_le_bytes()[0]);
        host.min(self.max_phys_bits)
    }

    /// The leaves of vCPU `index`.
    ///
    /// # Errors
    /// Never: KVM takes at least as many entries as it gives.
    pub fn for_vcpu(&self, index: u32) -> Result<CpuId, kvm_ioctls::Error> {
        let mut entries: Vec<kvm_cpuid_entry2> = Vec::with_capacity(self.supported.len() + 8);
        let mut has_extended_topology = false;
        for entry in &self.supported {
            if matches!(entry.function, 0xB | 0x1F) {
                has_extended_topology |= entry.function == 0xB;
                continue;
            }
            let mut entry = *entry;
            self.patch(&mut entry, index);
            entries.push(entry);
        }
        if has_extended_topology {
            entries.extend(self.extended_topology(index));
        }
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }

    fn patch(&self, entry: &mut kvm_cpuid_entry2, index: u32) {
        match entry.function {
            1 => {
                let logical = self.threads_per_package().min(255);
                entry.ebx = (entry.ebx & 0x0000_FFFF) | (logical << 16) | (index << 24);
                // Bit 31: running under a hypervisor; bit 24: the TSC-deadline timer, which KVM's own APIC has.
                entry.ecx |= 1 << 31 | 1 << 24;
                let htt = u32::from(logical > 1);
                entry.edx = (entry.edx & !(1 << 28)) | (htt << 28);
            }
            // Intel: deterministic cache parameters share the caches as the topology says.
            4 if entry.eax & 0x1F != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level < 3 {
                    self.topology.threads_per_core
                } else {
                    self.threads_per_package()
                };
                entry.eax = (entry.eax & 0x3FFF)
                    | (sharing.saturating_sub(1) & 0xFFF) << 14
                    | (self.topology.cores_per_package.saturating_sub(1) & 0x3F) << 26;
            }
            0x8000_0008 => {
                entry.eax = (entry.eax & !0xFF) | u32::from(self.phys_bits());
                let bits = width(self.threads_per_package());
                entry.ecx = (bits << 12) | (self.threads_per_package().saturating_sub(1) & 0xFF);
            }
            // AMD: the same caches in leaf 0x8000001D.
            0x8000_001D if entry.eax & 0x1F != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level < 3 {
                    self.topology.threads_per_core
                } else {
                    self.threads_per_package()
                };
                entry.eax = (entry.eax & 0x3FFF) | (sharing.saturating_sub(1) & 0xFFF) << 14;
            }
            0x8000_001E => {
                entry.eax = index;
                let core = (index % self.threads_per_package()) / self.topology.threads_per_core.max(1);
                entry.ebx = (self.topology.threads_per_core.saturating_sub(1) << 8) | (core & 0xFF);
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    fn threads_per_package(&self) -> u32 {
        self.topology
            .threads_per_core
            .saturating_mul(self.topology.cores_per_package)
            .max(1)
    }

    /// Leaves 0xB and 0x1F: level 0 threads, level 1 cores, level 2 the end.
    fn extended_topology(&self, index: u32) -> Vec<kvm_cpuid_entry2> {
        let threads = self.topology.threads_per_core.max(1);
        let package = self.threads_per_package();
        let levels = [(1u32, width(threads), threads), (2, width(package), package), (0, 0, 0)];
        [0xB, 0x1F]
            .into_iter()
            .flat_map(|function| {
                (0u32..)
                    .zip(levels)
                    .map(move |(level, (kind, shift, count))| kvm_cpuid_entry2 {
                        function,
                        index: level,
                        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                        eax: shift,
                        ebx: count,
                        ecx: kind << 8 | level,
                        edx: index,
                        ..Default::default()
                    })
            })
            .collect()
    }
}

/// Bits that hold `count` values.
fn width(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(vcpus: u32) -> CpuidTemplate {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuidTemplate {
            supported: vec![
                leaf(1, 0),
                leaf(0xB, 0),
                leaf(0x8000_0008, 0x3030),
                leaf(0x8000_001E, 0),
            ],
            topology: Topology {
                threads_per_core: 1,
                cores_per_package: vcpus,
            },
            max_phys_bits: 46,
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let t = template(4);
        let cpuid = t.for_vcpu(3).unwrap();
        let leaf = |f| *cpuid.as_slice().iter().find(|e| e.function == f).unwrap();
        assert_eq!(leaf(1).ebx >> 24, 3);
        assert_eq!(leaf(1).ebx >> 16 & 0xFF, 4);
        assert_ne!(leaf(1).ecx & 1 << 31, 0);
        assert_eq!(leaf(0xB).edx, 3);
        assert_eq!(leaf(0x8000_001E).eax, 3);
        assert_eq!(leaf(0x8000_0008).eax, 0x302E);
        assert_eq!(t.phys_bits(), 46);
    }

    #[test]
    fn topology_levels_are_wide_enough() {
        assert_eq!([width(1), width(2), width(3), width(4), width(255)], [0, 1, 2, 2, 8]);
        let levels: Vec<_> = template(3)
            .extended_topology(2)
            .into_iter()
            .filter(|e| e.function == 0xB)
            .collect();
        assert_eq!(levels[1].eax, 2);
        assert_eq!(levels[1].ebx, 3);
    }
}
