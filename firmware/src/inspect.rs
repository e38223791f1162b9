//! What is in an IGVM file, for people and for programs: plain data that serializes. Everything is counted; a
//! platform whose plan is refused is listed with the reason, so that a file can be looked at that cannot be booted.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::igvm::headers::{Container, type_name};
use crate::igvm::{IgvmError, PlanOptions, ZeroPages, plan, platforms};
use crate::plan::{GpaRange, IdBlock, LaunchPlan, PAGE_SIZE, PageKind, Platform, Step, VpContext};
use crate::vmsa::kvm_reproducible;

/// All of a file.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Version of the fixed header.
    pub format_version: u32,
    /// CRC32 of the headers, which was checked.
    pub checksum: u32,
    /// Bytes of variable headers.
    pub header_bytes: u64,
    /// Offset at which file data may start.
    pub data_start: u64,
    /// The image's version string.
    pub version_string: Option<String>,
    /// Variable headers by type.
    pub headers: Vec<HeaderCount>,
    /// The platforms, in file order.
    pub platforms: Vec<PlatformSummary>,
}

/// How often a header type occurs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderCount {
    /// Name, as igvm_defs has it.
    pub name: &'static str,
    /// Type.
    #[serde(rename = "type")]
    pub typ: u32,
    /// Occurrences.
    pub count: u64,
}

/// A platform and what the image does on it.
#[derive(Clone, Debug, Serialize)]
pub struct PlatformSummary {
    /// Name of the type.
    pub name: &'static str,
    /// Type.
    pub platform_type: u8,
    /// Bit in compatibility masks.
    pub compatibility_mask: u32,
    /// The plan; none for a platform that is not supported, or whose plan is refused.
    pub plan: Option<PlanSummary>,
    /// Why there is no plan.
    pub refused: Option<String>,
}

/// What a launch does.
#[derive(Clone, Debug, Serialize)]
pub struct PlanSummary {
    /// SNP guest policy.
    pub policy: Option<PolicySummary>,
    /// Memory in the order in which it is filled.
    pub memory: Vec<MemorySummary>,
    /// Bytes whose contents are measured, the VMSAs of the image among them.
    pub measured_bytes: u64,
    /// Pages handed to the firmware, one command each.
    pub firmware_pages: u64,
    /// Initial vCPU states.
    pub vcpus: Vec<VcpuSummary>,
    /// RAM that must exist.
    pub required_memory: Vec<RangeSummary>,
    /// RAM for error information.
    pub error_ranges: Vec<RangeSummary>,
    /// ID block.
    pub id_block: Option<IdBlockSummary>,
}

/// A guest policy (AMD 56860, 4.3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicySummary {
    /// As it is.
    pub raw: u64,
    /// Least firmware ABI, major.minor.
    pub abi: String,
    /// SMT is allowed.
    pub smt: bool,
    /// A migration agent is allowed.
    pub migrate_ma: bool,
    /// Debugging is allowed.
    pub debug: bool,
    /// Only one socket is allowed.
    pub single_socket: bool,
}

impl PolicySummary {
    /// Takes a policy apart.
    #[must_use]
    pub fn new(raw: u64) -> Self {
        let bit = |bit: u32| raw >> bit & 1 == 1;
        Self {
            raw,
            abi: format!("{}.{}", raw >> 8 & 0xFF, raw & 0xFF),
            smt: bit(16),
            migrate_ma: bit(18),
            debug: bit(19),
            single_socket: bit(20),
        }
    }
}

/// A range of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RangeSummary {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Memory that the launch fills.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemorySummary {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// `normal`, `zero`, `unmeasured`, `secrets`, `cpuid`, `shared` or `parameters`.
    pub kind: &'static str,
    /// Whether the contents are measured.
    pub measured: bool,
    /// Offset of the contents in the file.
    pub file_offset: Option<u64>,
    /// Digest of the contents in the file, in hex.
    pub digest: Option<String>,
    /// What parameters are filled in, as `kind@offset`.
    pub parameters: Vec<String>,
}

/// The initial state of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuSummary {
    /// Index.
    pub index: u16,
    /// GPA of the VMSA.
    pub gpa: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// SEV_FEATURES.
    pub sev_features: u64,
    /// Why KVM cannot start with this VMSA, if so.
    pub not_reproducible: Option<String>,
}

/// The image's ID block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IdBlockSummary {
    /// Launch digest it demands, in hex.
    pub launch_digest: String,
    /// Family id, in hex.
    pub family_id: String,
    /// Image id, in hex.
    pub image_id: String,
    /// Version.
    pub version: u32,
    /// Guest SVN.
    pub guest_svn: u32,
    /// Whether there is an author key.
    pub author_key: bool,
}

/// Computes a digest of bytes, for [`inspect`].
pub type Digest<'d> = &'d dyn Fn(&[u8]) -> Vec<u8>;

/// Looks at all of `file`. With `digest`, contents of memory are digested.
///
/// # Errors
/// When the container itself, a header's framing or a platform header is wrong.
pub fn inspect(file: &[u8], zero_pages: ZeroPages, digest: Option<Digest<'_>>) -> Result<Inspection, IgvmError> {
    let container = Container::read(file)?;
    let mut counts: BTreeMap<u32, (&'static str, u64)> = BTreeMap::new();
    let mut version_string = None;
    for header in container.headers() {
        let header = header?;
        let (_, count) = counts.entry(header.typ.0).or_insert((type_name(header.typ), 0));
        *count = count.saturating_add(1);
        if header.typ == igvm_defs::IgvmVariableHeaderType::IGVM_VHT_VERSION_STRING {
            version_string = std::str::from_utf8(header.content).ok().map(str::to_owned);
        }
    }
    let found = platforms(file)?.into_iter().map(|info| {
        let (plan, refused) = match info.platform() {
            None => (None, Some("platform not supported".to_owned())),
            Some(platform) => match plan(
                file,
                &PlanOptions {
                    platform: Some(platform),
                    zero_pages,
                },
            ) {
                Ok(plan) => (Some(summarize(&plan, file, digest)), None),
                Err(e) => (None, Some(e.to_string())),
            },
        };
        PlatformSummary {
            name: info.name(),
            platform_type: info.platform_type,
            compatibility_mask: info.compatibility_mask,
            plan,
            refused,
        }
    });
    Ok(Inspection {
        file_bytes: file.len() as u64,
        format_version: container.format_version,
        checksum: container.checksum,
        header_bytes: container.data_start.saturating_sub(container.headers_start),
        data_start: container.data_start,
        version_string,
        platforms: found.collect(),
        headers: counts
            .into_iter()
            .map(|(typ, (name, count))| HeaderCount { name, typ, count })
            .collect(),
    })
}

/// The name of a page kind.
#[must_use]
pub fn kind_name(kind: PageKind) -> &'static str {
    match kind {
        PageKind::Normal => "normal",
        PageKind::Zero => "zero",
        PageKind::Unmeasured => "unmeasured",
        PageKind::Secrets => "secrets",
        PageKind::Cpuid => "cpuid",
        PageKind::Shared => "shared",
    }
}

fn summarize(plan: &LaunchPlan<'_>, file: &[u8], digest: Option<Digest<'_>>) -> PlanSummary {
    let snp = plan.platform == Platform::SevSnp;
    let mut memory = Vec::new();
    let (mut measured_bytes, mut firmware_pages) = (0u64, 0u64);
    for step in &plan.steps {
        let summary = match step {
            Step::Pages { gpa, len, kind, data } => MemorySummary {
                start: *gpa,
                len: *len,
                kind: kind_name(*kind),
                measured: snp && *kind == PageKind::Normal,
                file_offset: offset_in(file, data),
                digest: digest.filter(|_| !data.is_empty()).map(|digest| hex(&digest(data))),
                parameters: Vec::new(),
            },
            Step::Parameters { gpa, area } => {
                let Some(area) = plan.areas.get(*area) else { continue };
                let parameters = area
                    .parameters
                    .iter()
                    .map(|p| format!("{:?}@{:#x}", p.kind, p.offset))
                    .collect();
                MemorySummary {
                    start: *gpa,
                    len: area.len,
                    kind: "parameters",
                    measured: false,
                    file_offset: offset_in(file, &area.initial),
                    digest: None,
                    parameters,
                }
            }
            Step::Vcpu { .. } => {
                measured_bytes = measured_bytes.saturating_add(if snp { PAGE_SIZE } else { 0 });
                continue;
            }
        };
        measured_bytes = measured_bytes.saturating_add(if summary.measured { summary.len } else { 0 });
        if snp && summary.kind != "shared" {
            firmware_pages = firmware_pages.saturating_add(summary.len / PAGE_SIZE);
        }
        memory.push(summary);
    }
    let ranges = |ranges: &[GpaRange]| {
        ranges
            .iter()
            .map(|r| RangeSummary {
                start: r.start,
                len: r.len,
            })
            .collect()
    };
    PlanSummary {
        policy: plan.policy.map(PolicySummary::new),
        memory,
        measured_bytes,
        firmware_pages,
        vcpus: plan.vps.iter().map(|vp| vcpu(vp, snp)).collect(),
        required_memory: ranges(&plan.required_memory),
        error_ranges: ranges(&plan.error_ranges),
        id_block: plan.id_block.as_ref().map(id_block),
    }
}

fn vcpu(vp: &VpContext<'_>, snp: bool) -> VcpuSummary {
    VcpuSummary {
        index: vp.index,
        gpa: vp.gpa,
        rip: vp.state.rip,
        sev_features: vp.state.sev_features,
        not_reproducible: if snp {
            kvm_reproducible(&vp.vmsa).err().map(|e| e.to_string())
        } else {
            None
        },
    }
}

fn id_block(block: &IdBlock) -> IdBlockSummary {
    IdBlockSummary {
        launch_digest: hex(&block.ld),
        family_id: hex(&block.family_id),
        image_id: hex(&block.image_id),
        version: block.version,
        guest_svn: block.guest_svn,
        author_key: block.author_key_enabled,
    }
}

/// Where in the file borrowed contents are.
fn offset_in(file: &[u8], part: &[u8]) -> Option<u64> {
    if part.is_empty() {
        return None;
    }
    let offset = part.as_ptr().addr().checked_sub(file.as_ptr().addr())?;
    (offset < file.len()).then_some(offset as u64)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::igvm::tests::samples::{RawFile, sample_plan};
    use crate::igvm::{BuildOptions, build};

    #[test]
    fn everything_is_counted() {
        for seed in 0..20 {
            let plans = [
                sample_plan(seed, Platform::Native),
                sample_plan(seed + 50, Platform::SevSnp),
            ];
            let file = build(&plans, &BuildOptions::default()).unwrap();
            let inspection = inspect(&file, ZeroPages::AsNormal, Some(&|bytes| vec![bytes[0]])).unwrap();
            let counted: u64 = inspection.headers.iter().map(|header| header.count).sum();
            assert_eq!(counted, Container::read(&file).unwrap().headers().count() as u64);
            assert_eq!(inspection.file_bytes, file.len() as u64);
            assert_eq!(inspection.platforms.len(), 2);
            let snp = inspection.platforms[1].plan.as_ref().unwrap();
            for memory in snp.memory.iter().filter(|memory| memory.kind == "normal") {
                let at = usize::try_from(memory.file_offset.unwrap()).unwrap();
                assert_eq!(memory.digest, Some(hex(&file[at..=at])));
            }
            let pages = |kind: &str| snp.memory.iter().filter(|m| m.kind == kind).map(|m| m.len).sum::<u64>();
            assert_eq!(snp.measured_bytes, pages("normal") + 4096 * snp.vcpus.len() as u64);
            assert!(snp.vcpus.iter().all(|vcpu| vcpu.not_reproducible.is_none()));
            assert_eq!(snp.id_block.is_some(), plans[1].id_block.is_some());
        }
    }

    #[test]
    fn a_refused_platform_says_why() {
        let file = RawFile::snp().with(0x102, &[1; 40]).with(0x107, b"v1").file();
        let inspection = inspect(&file, ZeroPages::AsNormal, None).unwrap();
        assert_eq!(inspection.version_string.as_deref(), Some("v1"));
        let [snp, vsm] = &inspection.platforms[..] else {
            panic!()
        };
        assert!(snp.plan.is_none() && snp.refused.as_ref().unwrap().contains("IGVM_VHT_RELOCATABLE_REGION"));
        assert_eq!(
            (vsm.name, vsm.refused.as_deref()),
            ("VSM_ISOLATION", Some("platform not supported"))
        );
    }

    #[test]
    fn policies_are_taken_apart() {
        let policy = PolicySummary::new(0x1B_0137);
        assert_eq!(
            (
                policy.abi.as_str(),
                policy.smt,
                policy.migrate_ma,
                policy.debug,
                policy.single_socket
            ),
            ("1.55", true, false, true, true)
        );
    }
}
