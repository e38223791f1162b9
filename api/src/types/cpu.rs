//! `cpus` of the VM configuration.

use crate::node::{FieldError, Node};
use crate::options::{OptionForm, OptionMap};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The vCPUs (`--cpus boot=1,max=4,topology=1:4:1:1`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema), schemars(!from, default))]
#[serde(from = "CpusWire")]
pub struct CpusConfig {
    /// vCPUs present at boot.
    pub boot_vcpus: u32,
    /// vCPUs that can ever be present; as many as `boot_vcpus` where not given.
    #[cfg_attr(feature = "openapi", schemars(extend("default" = null)))]
    pub max_vcpus: u32,
    /// How the vCPUs are told to be arranged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Offer Hyper-V enlightenments.
    pub kvm_hyperv: bool,
    /// Upper bound of the guest's physical address bits.
    pub max_phys_bits: u8,
    /// Host CPUs that each vCPU thread may run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Processor features that are off unless asked for.
    pub features: CpuFeatures,
    /// Offer nested virtualization.
    pub nested: bool,
    /// Core scheduling of the vCPU threads.
    pub core_scheduling: CoreScheduling,
    /// The processor model shown to the guest.
    pub profile: CpuProfile,
    /// Whether the request gave `cpus` at all (a pod's sizing must then agree with it). Not on the wire.
    #[serde(skip)]
    pub given: bool,
}

impl Default for CpusConfig {
    fn default() -> Self {
        let mut cpus = Self::from(CpusWire::default());
        cpus.given = false;
        cpus
    }
}

/// [`CpusConfig`] as it arrives: `max_vcpus` may be left out.
#[derive(Deserialize)]
#[serde(default)]
struct CpusWire {
    #[serde(alias = "boot")]
    boot_vcpus: u32,
    #[serde(alias = "max")]
    max_vcpus: Option<u32>,
    topology: Option<CpuTopology>,
    kvm_hyperv: bool,
    max_phys_bits: u8,
    affinity: Option<Vec<CpuAffinity>>,
    features: CpuFeatures,
    nested: bool,
    core_scheduling: CoreScheduling,
    profile: CpuProfile,
}

impl Default for CpusWire {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: None,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: 46,
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: CoreScheduling::default(),
            profile: CpuProfile::default(),
        }
    }
}

impl From<CpusWire> for CpusConfig {
    fn from(wire: CpusWire) -> Self {
        Self {
            boot_vcpus: wire.boot_vcpus,
            max_vcpus: wire.max_vcpus.unwrap_or(wire.boot_vcpus),
            topology: wire.topology,
            kvm_hyperv: wire.kvm_hyperv,
            max_phys_bits: wire.max_phys_bits,
            affinity: wire.affinity,
            features: wire.features,
            nested: wire.nested,
            core_scheduling: wire.core_scheduling,
            profile: wire.profile,
            given: true,
        }
    }
}

impl OptionForm for CpusConfig {
    /// `topology=threads:cores:dies:packages`, `affinity=[0@[0,2-3],1@[4]]`, `features=amx`.
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        if let Some(text) = options.take_text("topology") {
            let names = ["threads_per_core", "cores_per_die", "dies_per_package", "packages"];
            let counts: Vec<&str> = text.split(':').collect();
            if counts.len() != names.len() {
                return Err(FieldError::new(format!("`{text}` is not threads:cores:dies:packages")).within("topology"));
            }
            let fields = names
                .iter()
                .zip(counts)
                .map(|(n, c)| ((*n).to_owned(), Node::Text(c.to_owned())));
            options.set("topology", Node::Options(fields.collect()));
        }
        if let Some(text) = options.take_text("affinity") {
            let entries = affinity(&text, "vcpu").map_err(|e| e.within("affinity"))?;
            options.set("affinity", Node::List(entries));
        }
        if let Some(text) = options.take_text("features") {
            let mut features = BTreeMap::new();
            for node in crate::options::list(&text).map_err(|e| e.within("features"))? {
                if let Node::Text(name) = node {
                    features.insert(name, Node::Flag);
                }
            }
            options.set("features", Node::Options(features));
        }
        Ok(())
    }
}

/// Host CPUs that one affinity list may name; more than any machine has.
const MAX_HOST_CPUS: u64 = 8192;

/// `[0@[0,2-3],1@[4]]` as a list of `{<index name>: 0, host_cpus: [0,2,3]}`.
pub(super) fn affinity(text: &str, index_name: &str) -> Result<Vec<Node>, FieldError> {
    let mut entries = Vec::new();
    for node in crate::options::list(text)? {
        let Node::Text(entry) = node else { continue };
        let (index, cpus) = entry
            .split_once('@')
            .ok_or_else(|| FieldError::new(format!("`{entry}` is not index@[host CPUs]")))?;
        let mut host_cpus = Vec::new();
        for node in crate::options::list(cpus)? {
            let Node::Text(range) = node else { continue };
            let (first, last) = range.split_once('-').unwrap_or((&range, &range));
            let (first, last) = (crate::node::parse_size(first)?, crate::node::parse_size(last)?);
            if last < first || last >= MAX_HOST_CPUS {
                return Err(FieldError::new(format!(
                    "`{range}` is no range of host CPUs below {MAX_HOST_CPUS}"
                )));
            }
            host_cpus.extend((first..=last).map(Node::Unsigned));
        }
        entries.push(Node::Options(BTreeMap::from([
            (index_name.to_owned(), Node::Text(index.to_owned())),
            ("host_cpus".to_owned(), Node::List(host_cpus)),
        ])));
    }
    Ok(entries)
}

/// Arrangement of the vCPUs; the product of the four is `max_vcpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuTopology {
    /// Threads of one core.
    pub threads_per_core: u16,
    /// Cores of one die.
    pub cores_per_die: u16,
    /// Dies of one package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

/// Host CPUs of one vCPU's thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuAffinity {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Host CPU numbers.
    pub host_cpus: Vec<usize>,
}

/// Features off unless asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct CpuFeatures {
    /// Advanced Matrix Extensions.
    pub amx: bool,
}

/// Which vCPU threads may share a core (core scheduling cookies).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum CoreScheduling {
    /// Threads of the same VM only.
    #[default]
    Vm,
    /// None: each vCPU has a cookie of its own.
    Vcpu,
    /// No restriction.
    Off,
}

/// The processor model shown to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum CpuProfile {
    /// The host's, as KVM supports it.
    #[default]
    Host,
    /// A named model; which ones exist is the monitor's matter.
    #[serde(untagged)]
    Named(String),
}
