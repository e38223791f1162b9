//! The launch commands as KVM and the firmware answer them, with their state: order of calls, page rules, the digest of
//! the bytes received in the order received, the ID block check. Knows no KVM descriptor: registers come in as VMSA pages.

use aws_lc_rs::rand;
use podvisor_firmware::plan::{PAGE_SIZE, PageKind};
use vm_memory::{Bytes, GuestAddress};

use super::error::{Refusal, fw};
use super::runtime::Runtime;
use super::{Injection, Options};
use crate::cpuid::{self, Leaf};
use crate::digest::{LaunchDigest, PAGE_LEN, Page, sha384};
use crate::id_block::{self, IdIdentity};
use crate::processor::{LaunchFinish, LaunchUpdate};

/// Policy bit 17, which must be one (AMD 56860 table 9).
pub(crate) const POLICY_MUST_BE_ONE: u64 = 1 << 17;
/// VMPCKs of a guest.
pub(crate) const VMPCKS: usize = 4;

/// One memslot with private memory behind it, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) slot: u32,
    pub(super) gfn: u64,
    pub(super) pages: u64,
}

/// The guest context of the firmware after the launch. It holds keys, so it has no `Debug`.
pub(crate) struct GuestContext {
    pub(crate) policy: u64,
    pub(crate) digest: [u8; 48],
    pub(crate) host_data: [u8; 32],
    pub(crate) identity: IdIdentity,
    pub(crate) report_id: [u8; 32],
    pub(crate) vmpck: [[u8; 32]; VMPCKS],
    pub(crate) vcek_disabled: bool,
}

/// Pages that the launch imported, in frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Import {
    pub(super) gfns: std::ops::Range<u64>,
    /// They are the image's, byte for byte: whoever has the image has them.
    pub(super) of_image: bool,
}

struct Launching {
    policy: u64,
    chain: LaunchDigest,
    vmpck: [[u8; 32]; VMPCKS],
    cpuid_rejected: bool,
}

enum Phase {
    /// No INIT2 yet.
    Created,
    Initialised,
    Launching(Box<Launching>),
    /// vCPUs are sealed and the launch did not succeed.
    Broken,
    Finished([u8; 48]),
}

/// The state of one VM's launch.
pub(super) struct Launch {
    phase: Phase,
    features: u64,
    slots: Vec<Slot>,
    /// In the order of the launch, neighbours as one.
    imports: Vec<Import>,
}

impl Launch {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Created,
            features: 0,
            slots: Vec::new(),
            imports: Vec::new(),
        }
    }

    /// What was imported, which the launch forgets.
    pub(super) fn take_imports(&mut self) -> Vec<Import> {
        std::mem::take(&mut self.imports)
    }

    fn note_import(&mut self, gfns: std::ops::Range<u64>, of_image: bool) {
        match self.imports.last_mut() {
            Some(last) if last.gfns.end == gfns.start && last.of_image == of_image => last.gfns.end = gfns.end,
            _ => self.imports.push(Import { gfns, of_image }),
        }
    }

    /// `KVM_SEV_INIT2`.
    pub(super) fn init(&mut self, options: &Options, features: u64, vcpus_exist: bool) -> Result<(), Refusal> {
        if !matches!(self.phase, Phase::Created) {
            return Err(Refusal::einval("called before; a VM is initialised once"));
        }
        if vcpus_exist {
            return Err(Refusal::einval("a vCPU exists; initialise the VM before its vCPUs"));
        }
        if features & !options.vmsa_features != 0 {
            return Err(Refusal::einval(format!(
                "vmsa_features {features:#x}: only bits of {:#x} are supported, and the SNP bit is KVM's to add",
                options.vmsa_features
            )));
        }
        self.features = features;
        self.phase = Phase::Initialised;
        Ok(())
    }

    /// Features of INIT2, as a VMSA holds them.
    pub(super) fn features(&self) -> u64 {
        self.features | 1
    }

    /// Whether `slot` may be registered: EEXIST for an overlap, EINVAL for a slot that exists.
    pub(super) fn check_slot(&self, slot: Slot) -> Result<(), Refusal> {
        if self.slots.iter().any(|known| known.slot == slot.slot) {
            return Err(Refusal::einval(format!(
                "slot {} has private memory already; such a slot cannot be changed",
                slot.slot
            )));
        }
        let overlap = |known: &&Slot| slot.gfn < known.gfn + known.pages && known.gfn < slot.gfn + slot.pages;
        match self.slots.iter().find(overlap) {
            Some(known) => Err(Refusal::new(libc::EEXIST, 0, format!("overlaps slot {}", known.slot))),
            None => Ok(()),
        }
    }

    pub(super) fn add_slot(&mut self, slot: Slot) {
        self.slots.push(slot);
    }

    /// `KVM_SEV_SNP_LAUNCH_START`.
    pub(super) fn start(&mut self, options: &Options, policy: u64) -> Result<(), Refusal> {
        match self.phase {
            Phase::Initialised => {}
            Phase::Created => return Err(Refusal::new(libc::ENOTTY, 0, "KVM_SEV_INIT2 was not called")),
            _ => return Err(Refusal::einval("the launch has started before; a VM is launched once")),
        }
        if policy & POLICY_MUST_BE_ONE == 0 {
            return Err(Refusal::einval(format!("policy {policy:#x}: bit 17 must be one")));
        }
        if policy & !options.policy_bits != 0 {
            return Err(Refusal::einval(format!(
                "policy {policy:#x}: bits {:#x} are not supported",
                policy & !options.policy_bits
            )));
        }
        let [minor, major, ..] = policy.to_le_bytes();
        if (major, minor) > options.abi_version {
            return Err(Refusal::firmware(
                fw::POLICY_FAILURE,
                format!(
                    "policy {policy:#x} asks for firmware ABI {major}.{minor}, this is {:?}",
                    options.abi_version
                ),
            ));
        }
        let mut vmpck = [[0; 32]; VMPCKS];
        for key in &mut vmpck {
            rand::fill(key).map_err(|_| Refusal::new(libc::EIO, fw::RESOURCE_LIMIT, "no randomness for the VMPCKs"))?;
        }
        self.phase = Phase::Launching(Box::new(Launching {
            policy,
            chain: LaunchDigest::new(),
            vmpck,
            cpuid_rejected: false,
        }));
        Ok(())
    }

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`.
    pub(super) fn update(
        &mut self,
        options: &Options,
        runtime: &Runtime,
        update: &mut LaunchUpdate<'_>,
        correction: Option<&mut [u8]>,
    ) -> Result<(), Refusal> {
        if matches!(self.phase, Phase::Created | Phase::Initialised) {
            return Err(Refusal::einval("KVM_SEV_SNP_LAUNCH_START was not called"));
        }
        check_arguments(update)?;
        let slot = self
            .slots
            .iter()
            .find(|slot| (slot.gfn..slot.gfn + slot.pages).contains(&update.gfn))
            .ok_or_else(|| Refusal::einval(format!("frame {:#x} is in no slot with private memory", update.gfn)))?;
        let asked = update.len / PAGE_SIZE;
        let clipped = asked.min(slot.gfn + slot.pages - update.gfn);
        let pages = options
            .injection
            .most_pages_per_update
            .unwrap_or(clipped)
            .clamp(1, clipped.max(1));
        let Phase::Launching(launching) = &mut self.phase else {
            return Err(Refusal::firmware(fw::INVALID_GUEST_STATE, "the launch is finished"));
        };
        let mut done = 0;
        let mut correction = correction;
        for page in 0..pages {
            let result = launching.page(options, runtime, update, page, correction.as_deref_mut());
            match result {
                Ok(()) => done += 1,
                // Whatever the cause, KVM says EIO for the first page and reports progress for a later one.
                Err(refusal) if done == 0 => {
                    return Err(Refusal::new(libc::EIO, refusal.fw_error, refusal.reason));
                }
                Err(_) => break,
            }
        }
        let bytes = done * PAGE_SIZE;
        if options.private_memory && done > 0 {
            self.note_import(update.gfn..update.gfn + done, update.kind == PageKind::Normal);
        }
        update.gfn += done;
        update.len -= bytes;
        if update.kind != PageKind::Zero {
            let from = usize::try_from(bytes).unwrap_or(usize::MAX);
            update.source = update.source.get(from..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// `KVM_SEV_SNP_LAUNCH_FINISH`, with the VMSA of each vCPU as KVM has sealed it.
    pub(super) fn finish(&mut self, vmsas: &[Box<Page>], finish: &LaunchFinish) -> Result<GuestContext, Refusal> {
        self.check_can_finish()?;
        // The vCPUs are sealed from here on, whatever the firmware says.
        let Phase::Launching(mut launching) = std::mem::replace(&mut self.phase, Phase::Broken) else {
            return Err(Refusal::einval("the launch has not started"));
        };
        for vmsa in vmsas {
            launching.chain.update_vmsa(vmsa);
        }
        let digest = launching.chain.finish();
        let identity = match &finish.id_block {
            None => IdIdentity::default(),
            Some((block, auth)) => id_block::check(block, auth, finish.author_key_enabled, &digest, launching.policy)
                .map_err(|error| Refusal::firmware(error.firmware_status(), error.to_string()))?,
        };
        let mut report_id = [0; 32];
        rand::fill(&mut report_id).map_err(|_| Refusal::firmware(fw::RESOURCE_LIMIT, "no randomness"))?;
        self.phase = Phase::Finished(digest);
        Ok(GuestContext {
            policy: launching.policy,
            digest,
            host_data: finish.host_data,
            identity,
            report_id,
            vmpck: launching.vmpck,
            vcek_disabled: finish.vcek_disabled,
        })
    }

    /// Whether a finish may seal the vCPUs now.
    pub(super) fn check_can_finish(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Launching(_) => Ok(()),
            Phase::Created | Phase::Initialised => Err(Refusal::einval("KVM_SEV_SNP_LAUNCH_START was not called")),
            Phase::Broken | Phase::Finished(_) => {
                Err(Refusal::einval("the vCPUs are sealed; a launch is finished once"))
            }
        }
    }

    pub(super) fn digest(&self) -> Option<[u8; 48]> {
        match self.phase {
            Phase::Finished(digest) => Some(digest),
            _ => None,
        }
    }
}

/// The checks on the arguments of an update that come before any page.
fn check_arguments(update: &LaunchUpdate<'_>) -> Result<(), Refusal> {
    if crate::digest::page_type(update.kind).is_none() {
        return Err(Refusal::einval(format!("{:?} is no SNP page type", update.kind)));
    }
    if update.len == 0 || !update.len.is_multiple_of(PAGE_SIZE) {
        return Err(Refusal::einval(format!(
            "len {:#x} must be a multiple of 4096 and not zero",
            update.len
        )));
    }
    let source = update.source.as_ptr().addr();
    if update.kind != PageKind::Zero && !source.is_multiple_of(PAGE_LEN) {
        return Err(Refusal::einval("the source buffer must be 4096-byte aligned"));
    }
    Ok(())
}

impl Launching {
    /// Imports page `index` of `update`.
    fn page(
        &mut self,
        options: &Options,
        runtime: &Runtime,
        update: &LaunchUpdate<'_>,
        index: u64,
        correction: Option<&mut [u8]>,
    ) -> Result<(), Refusal> {
        let gfn = update.gfn + index;
        let source = source_page(update, index)?;
        if !runtime.pages().is_private(gfn..gfn + 1) {
            return Err(Refusal::einval(format!(
                "frame {gfn:#x} is not private; set its attribute first"
            )));
        }
        if runtime.pages().any_launched(gfn..gfn + 1) {
            return Err(Refusal::new(
                libc::EEXIST,
                0,
                format!("frame {gfn:#x} was imported before"),
            ));
        }
        let contents = match update.kind {
            PageKind::Zero => [0; PAGE_LEN],
            PageKind::Secrets => secrets_page(options, &self.vmpck),
            PageKind::Cpuid => {
                runtime.set_cpuid(self.accept_cpuid(&options.injection, &source, correction)?);
                *source
            }
            _ => *source,
        };
        let hash = sha384(&contents);
        let gpa = gfn * PAGE_SIZE;
        runtime
            .memory()
            .write_slice(&contents, GuestAddress(gpa))
            .map_err(|error| Refusal::new(libc::EFAULT, 0, format!("frame {gfn:#x}: {error}")))?;
        runtime.pages().mark_launched(gfn..gfn + 1);
        self.chain.update(update.kind, gpa, &hash);
        Ok(())
    }

    /// The firmware's check of a CPUID page, with its correction written back.
    fn accept_cpuid(
        &mut self,
        injection: &Injection,
        page: &Page,
        correction: Option<&mut [u8]>,
    ) -> Result<Vec<Leaf>, Refusal> {
        let mut verdict = cpuid::firmware_check(page);
        if verdict.is_ok() && injection.reject_cpuid_once && !self.cpuid_rejected {
            self.cpuid_rejected = true;
            verdict = Err(Box::new(*page));
        }
        if let Err(corrected) = verdict {
            if let Some(to) = correction.and_then(|to| to.get_mut(..PAGE_LEN)) {
                to.copy_from_slice(&corrected[..]);
            }
            return Err(Refusal::firmware(
                fw::INVALID_PARAM,
                "the CPUID table claims what the firmware does not allow",
            ));
        }
        cpuid::parse(page).ok_or_else(|| Refusal::firmware(fw::INVALID_PARAM, "the CPUID table is malformed"))
    }
}

/// Page `index` of the source; zeros for ZERO pages. A short source faults, as an unmapped one does.
fn source_page(update: &LaunchUpdate<'_>, index: u64) -> Result<Box<Page>, Refusal> {
    if update.kind == PageKind::Zero {
        return Ok(Box::new([0; PAGE_LEN]));
    }
    usize::try_from(index * PAGE_SIZE)
        .ok()
        .and_then(|start| update.source.get(start..)?.first_chunk())
        .map(|page| Box::new(*page))
        .ok_or_else(|| Refusal::new(libc::EFAULT, 0, "the source buffer is shorter than len"))
}

/// The secrets page (AMD 56860 table 71): version 3, family/model/stepping, VMPCKs; the OS area is the guest's.
fn secrets_page(options: &Options, vmpck: &[[u8; 32]; VMPCKS]) -> Page {
    let mut page = [0; PAGE_LEN];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(to) = page.get_mut(offset..offset + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(0, &3u32.to_le_bytes());
    put(8, &options.processor_signature.to_le_bytes());
    for (index, key) in vmpck.iter().enumerate() {
        put(0x20 + 32 * index, key);
    }
    page
}
