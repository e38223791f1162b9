//! The launch path: turns a launch plan into a sealed SNP guest, whoever answers ([`Processor`]). What is measured comes
//! from the plan alone, so that the prediction and the launch cannot drift; both are compared before any vCPU may run.

use std::borrow::Cow;
use std::ops::Range;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};
use podvisor_firmware::plan::{GpaRange, LaunchPlan, PAGE_SIZE, PageKind};
use podvisor_firmware::vmsa::{VmsaError, kvm_reproducible};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::cpuid;
use crate::digest::{PAGE_LEN, PageRange, PredictError, Prediction, firmware_steps, predict};
use crate::id_block;
use crate::processor::{LaunchFinish, LaunchUpdate, Processor, ProcessorError, ProcessorKind};
use crate::vcpu_state::{self, RegisterError};

/// The policy of a plan that names none: must-be-one, SMT allowed.
pub const DEFAULT_POLICY: u64 = 0x30000;
/// `SEV_RET_INVALID_PARAM`: the firmware corrected the CPUID page.
const INVALID_PARAM: u32 = 0x16;
/// Most entries that KVM is asked for.
const MAX_KVM_CPUID: usize = 256;
/// Bytes copied at once when an image's data is not page-aligned in memory.
const SCRATCH_PAGES: usize = 64;

/// Pages that KVM may be pointed at.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct AlignedPage([u8; PAGE_LEN]);

/// What a launch is given beside the plan.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// RAM to make private before the launch: all of it, unless the image says otherwise.
    pub private_ram: Vec<GpaRange>,
    /// Contents of each parameter area of the plan, as `podvisor_firmware::parameters::fill` makes them from the
    /// machine; at most the area's length, the rest is zero.
    pub areas: Vec<Vec<u8>>,
    /// HOST_DATA.
    pub host_data: [u8; 32],
    /// The digest that the owner expects.
    pub expect_digest: Option<[u8; 48]>,
    /// Whether reports may not be signed by the VCEK.
    pub vcek_disabled: bool,
}

/// Where the time of a launch went.
#[derive(Clone, Copy, Debug, Default)]
pub struct LaunchTimings {
    /// Prediction and checks.
    pub predict: Duration,
    /// vCPU registers.
    pub registers: Duration,
    /// Page attributes.
    pub attributes: Duration,
    /// LAUNCH_START and all LAUNCH_UPDATEs.
    pub update: Duration,
    /// LAUNCH_FINISH.
    pub finish: Duration,
}

/// What a launch did.
#[derive(Clone, Debug)]
pub struct LaunchReport {
    /// Digest and counts from the plan alone.
    pub predicted: Prediction,
    /// The processor's own digest, where it tells it.
    pub launched: Option<[u8; 48]>,
    /// Policy of the guest.
    pub policy: u64,
    /// Whether the firmware corrected the CPUID page.
    pub cpuid_corrected: bool,
    /// Where the time went.
    pub timings: LaunchTimings,
}

/// Why a launch was given up. No vCPU may run then.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The plan has no digest.
    #[error(transparent)]
    Plan(#[from] PredictError),
    /// A vCPU context that KVM would not seal as the image has it.
    #[error("VP context {index}: {source}")]
    Vmsa {
        /// Virtual processor.
        index: u16,
        /// Which field.
        source: VmsaError,
    },
    /// Contexts disagree about SEV_FEATURES, which are the VM's.
    #[error("VP context {index}: sev_features {features:#x} but the VM was initialised with {vm:#x}; make them equal")]
    Features {
        /// Virtual processor.
        index: u16,
        /// Its features.
        features: u64,
        /// The VM's.
        vm: u64,
    },
    /// The processor refused.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// A vCPU refused its registers.
    #[error("vCPU {vcpu}: {source}")]
    Registers {
        /// Index of the vCPU.
        vcpu: usize,
        /// Which ioctl.
        source: RegisterError,
    },
    /// The CPUID page cannot be made.
    #[error("CPUID page: {0}")]
    Cpuid(String),
    /// A parameter area that was filled with more than it holds, or not at all.
    #[error("parameter area {area}: {got:#x} bytes for an area of {len:#x}")]
    Area {
        /// Index of the area.
        area: usize,
        /// Bytes given.
        got: usize,
        /// Its length.
        len: u64,
    },
    /// Shared pages that are not RAM.
    #[error("shared pages at {gpa:#x}, {len:#x} bytes: {reason}")]
    Shared {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        reason: String,
    },
    /// The digests are not the same.
    #[error("launch digest: {what} is {got} but the plan's is {want}; the image is not the one that was expected")]
    Digest {
        /// Whose.
        what: &'static str,
        /// That digest, hex.
        got: String,
        /// The plan's, hex.
        want: String,
    },
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// SEV_FEATURES that `KVM_SEV_INIT2` must be given for `plan` (without the SNP bit, which KVM adds): those of its VP contexts.
#[must_use]
pub fn vmsa_features(plan: &LaunchPlan<'_>) -> u64 {
    plan.vps.first().map_or(0, |vp| vp.state.sev_features & !1)
}

/// Checks `plan` without launching it, and predicts its digest for `vcpus` vCPUs: contexts that KVM can seal,
/// features the same for all, and the digests that `options` and the ID block promise.
///
/// # Errors
/// [`LaunchError`].
pub fn check(plan: &LaunchPlan<'_>, vcpus: u32, options: &LaunchOptions) -> Result<Prediction, LaunchError> {
    let predicted = predict(plan, vcpus)?;
    let vm = vmsa_features(plan) | 1;
    for vp in &plan.vps {
        let (index, features) = (vp.index, vp.state.sev_features);
        kvm_reproducible(&vp.vmsa).map_err(|source| LaunchError::Vmsa { index, source })?;
        if features != vm {
            return Err(LaunchError::Features { index, features, vm });
        }
    }
    let promised = [
        ("--expect-digest", options.expect_digest),
        ("the ID block's", plan.id_block.as_ref().map(|id| id.ld)),
    ];
    for (what, digest) in promised {
        same(what, digest, &predicted.digest)?;
    }
    Ok(predicted)
}

fn same(what: &'static str, got: Option<[u8; 48]>, want: &[u8; 48]) -> Result<(), LaunchError> {
    match got {
        Some(got) if got != *want => Err(LaunchError::Digest {
            what,
            got: hex(&got),
            want: hex(want),
        }),
        _ => Ok(()),
    }
}

/// Launches `plan` on `vm`, whose processor was initialised with [`vmsa_features`], whose RAM is mapped by
/// [`Processor::map_region`] (and, its shared half, by `memory`), and whose vCPUs exist and have their CPUID.
/// On success the vCPUs may run.
///
/// # Errors
/// [`LaunchError`]; the VM is of no further use.
pub fn launch(
    processor: &dyn Processor,
    vm: &VmFd,
    vcpus: &[VcpuFd],
    memory: &GuestMemoryMmap<()>,
    plan: &LaunchPlan<'_>,
    options: &LaunchOptions,
) -> Result<LaunchReport, LaunchError> {
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
    let mut timings = LaunchTimings::default();
    let count = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
    let predicted = check(plan, count, options)?;
    timings.predict = lap();
    set_registers(vcpus, plan)?;
    timings.registers = lap();
    for range in &options.private_ram {
        processor.set_private(vm, range.start, range.len, true)?;
    }
    timings.attributes = lap();
    let policy = plan.policy.unwrap_or(DEFAULT_POLICY);
    processor.launch_start(vm, policy)?;
    let mut importer = Importer {
        processor,
        vm,
        scratch: Vec::new(),
        cpuid_corrected: false,
    };
    for range in firmware_steps(plan) {
        let range = range?;
        match range.kind {
            PageKind::Shared => importer.place_shared(memory, &range)?,
            PageKind::Cpuid => importer.cpuid(vcpus, &range)?,
            _ => importer.pages(&with_area(range, plan, options)?)?,
        }
    }
    let cpuid_corrected = importer.cpuid_corrected;
    timings.update = lap();
    processor.launch_finish(vm, vcpus, &finish(plan, policy, options))?;
    timings.finish = lap();
    let launched = processor.launch_digest();
    same("the processor's", launched, &predicted.digest)?;
    Ok(LaunchReport {
        predicted,
        launched,
        policy,
        cpuid_corrected,
        timings,
    })
}

fn set_registers(vcpus: &[VcpuFd], plan: &LaunchPlan<'_>) -> Result<(), LaunchError> {
    for (index, vcpu) in vcpus.iter().enumerate() {
        let context = u16::try_from(index)
            .ok()
            .and_then(|index| plan.vcpu_state(index))
            .ok_or(PredictError::NoContext)?;
        vcpu_state::apply(vcpu, &context.state).map_err(|source| LaunchError::Registers { vcpu: index, source })?;
    }
    Ok(())
}

fn finish(plan: &LaunchPlan<'_>, policy: u64, options: &LaunchOptions) -> LaunchFinish {
    LaunchFinish {
        id_block: plan
            .id_block
            .as_ref()
            .map(|id| (id_block::block(id, policy), id_block::auth(id))),
        author_key_enabled: plan.id_block.as_ref().is_some_and(|id| id.author_key_enabled),
        host_data: options.host_data,
        vcek_disabled: options.vcek_disabled,
    }
}

/// The range with the contents of its parameter area, if it is one.
fn with_area<'p>(
    range: PageRange<'p>,
    plan: &LaunchPlan<'_>,
    options: &'p LaunchOptions,
) -> Result<PageRange<'p>, LaunchError> {
    let Some(area) = range.area else {
        return Ok(range);
    };
    let len = plan.areas.get(area).map_or(0, |area| area.len);
    match options.areas.get(area) {
        Some(filled) if filled.len() as u64 <= len => Ok(PageRange { data: filled, ..range }),
        filled => Err(LaunchError::Area {
            area,
            got: filled.map_or(0, Vec::len),
            len,
        }),
    }
}

/// Hands pages to the processor.
struct Importer<'l> {
    processor: &'l dyn Processor,
    vm: &'l VmFd,
    scratch: Vec<AlignedPage>,
    cpuid_corrected: bool,
}

impl Importer<'_> {
    /// Imports a range: whole pages straight from the image where they are aligned, the rest by way of a scratch buffer.
    fn pages(&mut self, range: &PageRange<'_>) -> Result<(), LaunchError> {
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        if range.kind == PageKind::Zero {
            return self.import(range.gpa, range.len, &[], range.kind);
        }
        let page = PAGE_LEN;
        let direct = if range.data.as_ptr().addr().is_multiple_of(page) {
            range.data.len() / page * page
        } else {
            0
        };
        if let Some(aligned) = range.data.get(..direct).filter(|aligned| !aligned.is_empty()) {
            self.import(range.gpa, direct as u64, aligned, range.kind)?;
        }
        let mut at = direct;
        while at < len {
            let chunk = (len - at).min(SCRATCH_PAGES * page);
            let scratch = self.fill(range.data, at..at + chunk);
            let result = self.import(range.gpa + at as u64, chunk as u64, scratch.as_bytes(), range.kind);
            self.scratch = scratch;
            result?;
            at += chunk;
        }
        Ok(())
    }

    /// The scratch buffer with `data[part]`, zeros past the end of the data.
    fn fill(&mut self, data: &[u8], part: Range<usize>) -> Vec<AlignedPage> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let pages = part.len() / PAGE_LEN;
        scratch.resize(pages, AlignedPage([0; PAGE_LEN]));
        let data = data
            .get(part.start.min(data.len())..part.end.min(data.len()))
            .unwrap_or(&[]);
        let (head, tail) = scratch.as_mut_bytes().split_at_mut(data.len());
        head.copy_from_slice(data);
        tail.fill(0);
        scratch
    }

    /// LAUNCH_UPDATE until nothing remains.
    fn import(&self, gpa: u64, len: u64, source: &[u8], kind: PageKind) -> Result<(), LaunchError> {
        let mut update = LaunchUpdate {
            gfn: gpa / PAGE_SIZE,
            source,
            len,
            kind,
        };
        while update.len > 0 {
            let before = update.len;
            self.processor.launch_update(self.vm, &mut update, None)?;
            if update.len >= before {
                return Err(LaunchError::Processor(ProcessorError {
                    op: "KVM_SEV_SNP_LAUNCH_UPDATE",
                    errno: libc::EIO,
                    fw_error: 0,
                    reason: format!("no progress at frame {:#x}", update.gfn),
                }));
            }
        }
        Ok(())
    }

    /// The CPUID page from the first vCPU's CPUID. A correction by the firmware is accepted once, and logged.
    fn cpuid(&mut self, vcpus: &[VcpuFd], range: &PageRange<'_>) -> Result<(), LaunchError> {
        let vcpu = vcpus.first().ok_or(PredictError::Vcpus(0))?;
        let cpuid = vcpu
            .get_cpuid2(MAX_KVM_CPUID)
            .map_err(|error| LaunchError::Cpuid(format!("KVM_GET_CPUID2: {error}")))?;
        let emulated = self.processor.kind() == ProcessorKind::Emulated;
        let table = cpuid::table(cpuid.as_slice(), emulated).map_err(|error| LaunchError::Cpuid(error.to_string()))?;
        for page in 0..range.len / PAGE_SIZE {
            // Leaves past the first page of a longer range have no place in the format: those pages are empty tables.
            let leaves: Cow<'_, [_]> = if page == 0 {
                Cow::Borrowed(&table)
            } else {
                Cow::Borrowed(&[])
            };
            self.cpuid_page(range.gpa + page * PAGE_SIZE, &leaves)?;
        }
        Ok(())
    }

    fn cpuid_page(&mut self, gpa: u64, leaves: &[cpuid::Leaf]) -> Result<(), LaunchError> {
        let source = AlignedPage(cpuid::page(leaves));
        let mut corrected = AlignedPage([0; PAGE_LEN]);
        let mut update = LaunchUpdate {
            gfn: gpa / PAGE_SIZE,
            source: source.as_bytes(),
            len: PAGE_SIZE,
            kind: PageKind::Cpuid,
        };
        match self
            .processor
            .launch_update(self.vm, &mut update, Some(corrected.as_mut_bytes()))
        {
            Ok(()) => Ok(()),
            Err(error) if error.fw_error == INVALID_PARAM => {
                log_correction(leaves, &corrected);
                self.cpuid_corrected = true;
                self.import(gpa, PAGE_SIZE, corrected.as_bytes(), PageKind::Cpuid)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Shared pages are plain memory: the firmware never sees them.
    fn place_shared(&self, memory: &GuestMemoryMmap<()>, range: &PageRange<'_>) -> Result<(), LaunchError> {
        let refused = |reason: String| LaunchError::Shared {
            gpa: range.gpa,
            len: range.len,
            reason,
        };
        self.processor.set_private(self.vm, range.gpa, range.len, false)?;
        if !self.processor.is_shared(range.gpa, range.len) {
            return Err(refused("not RAM".to_string()));
        }
        // What the data does not cover is zero: the conversion left zeros.
        memory
            .write_slice(range.data, GuestAddress(range.gpa))
            .map_err(|error| refused(error.to_string()))
    }
}

fn log_correction(asked: &[cpuid::Leaf], corrected: &AlignedPage) {
    let corrected = cpuid::parse(&corrected.0).unwrap_or_default();
    for leaf in asked {
        let now = corrected
            .iter()
            .find(|to| (to.eax_in, to.ecx_in) == (leaf.eax_in, leaf.ecx_in));
        if now != Some(leaf) {
            tracing::warn!("CPUID page: the firmware corrected {leaf:x?} to {now:x?}");
        }
    }
}
