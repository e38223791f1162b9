//! The SNP launch digest: the chain of SHA-384 over page descriptions that the firmware keeps (AMD 56860 8.17.2), and
//! its prediction from a launch plan alone. Nothing here needs KVM, and nothing here launches.

use std::borrow::Cow;

use aws_lc_rs::digest::{SHA256, SHA384, SHA512, digest};
use podvisor_firmware::initdata::{self, Algorithm, InitdataError};
use podvisor_firmware::plan::{KVM_VMSA_GPA, LaunchPlan, PAGE_SIZE, PageKind, Platform, Step};
use podvisor_firmware::vmsa::vmsa_page;

/// Bytes in a launch digest.
pub const DIGEST_LEN: usize = 48;

/// Most pages that one launch may hand to the firmware (64 GiB): a bound on the time a hostile image can take.
pub const MAX_PAGES: u64 = 1 << 24;

/// [`PAGE_SIZE`] as a length.
pub const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// Bytes of one page.
pub type Page = [u8; PAGE_LEN];

const PAGE_INFO_LEN: u16 = 0x70;
/// Page type VMSA of `PAGE_INFO`; user space never passes it to KVM.
const TYPE_VMSA: u8 = 2;

/// The SNP page type that KVM and the firmware use for `kind` (AMD 56860 table 58, `KVM_SEV_SNP_PAGE_TYPE_*`);
/// None for pages that the firmware never sees.
#[must_use]
pub fn page_type(kind: PageKind) -> Option<u8> {
    match kind {
        PageKind::Normal => Some(1),
        PageKind::Zero => Some(3),
        PageKind::Unmeasured => Some(4),
        PageKind::Secrets => Some(5),
        PageKind::Cpuid => Some(6),
        PageKind::Shared => None,
    }
}

/// SHA-384 of `bytes`.
#[must_use]
pub fn sha384(bytes: &[u8]) -> [u8; DIGEST_LEN] {
    let mut out = [0; DIGEST_LEN];
    out.copy_from_slice(digest(&SHA384, bytes).as_ref());
    out
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// HOST_DATA of a pod with the initdata in `file`, which is the TOML or a disk with it: the first 32 bytes of its hash.
///
/// # Errors
/// [`InitdataError`].
pub fn initdata_host_data(file: &[u8]) -> Result<[u8; 32], InitdataError> {
    let (toml, algorithm) = initdata::read(file)?;
    let hash = digest(
        match algorithm {
            Algorithm::Sha256 => &SHA256,
            Algorithm::Sha384 => &SHA384,
            Algorithm::Sha512 => &SHA512,
        },
        &toml,
    );
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(hash.as_ref()) {
        *to = *from;
    }
    Ok(out)
}

/// A launch digest being built: `LD(0)` is 48 zero bytes, `LD(i+1) = SHA-384(PAGE_INFO(i))`.
#[derive(Clone, Debug)]
pub struct LaunchDigest {
    current: [u8; DIGEST_LEN],
    pages: u64,
}

impl Default for LaunchDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl LaunchDigest {
    /// `LD(0)`.
    #[must_use]
    pub fn new() -> Self {
        Self {
            current: [0; DIGEST_LEN],
            pages: 0,
        }
    }

    /// Adds one page of type `kind` at `gpa`. `contents` is the SHA-384 of the page; it is used for
    /// [`PageKind::Normal`] only. [`PageKind::Shared`] adds nothing.
    pub fn update(&mut self, kind: PageKind, gpa: u64, contents: &[u8; DIGEST_LEN]) {
        if let Some(page_type) = page_type(kind) {
            let contents = if kind == PageKind::Normal {
                *contents
            } else {
                [0; DIGEST_LEN]
            };
            self.chain(page_type, gpa, &contents);
        }
    }

    /// Adds one VMSA page, as KVM does for each vCPU at the finish.
    pub fn update_vmsa(&mut self, vmsa: &Page) {
        self.chain(TYPE_VMSA, KVM_VMSA_GPA, &sha384(vmsa));
    }

    /// Pages added so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> [u8; DIGEST_LEN] {
        self.current
    }

    fn chain(&mut self, page_type: u8, gpa: u64, contents: &[u8; DIGEST_LEN]) {
        let mut info = [0u8; PAGE_INFO_LEN as usize];
        let fields: [(usize, &[u8]); 5] = [
            (0x00, &self.current),
            (0x30, contents),
            (0x60, &PAGE_INFO_LEN.to_le_bytes()),
            (0x62, &[page_type]),
            (0x68, &gpa.to_le_bytes()),
        ];
        for (offset, bytes) in fields {
            if let Some(to) = info.get_mut(offset..offset + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        }
        self.current = sha384(&info);
        self.pages += 1;
    }
}

/// What a launch of a plan will measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// The launch digest.
    pub digest: [u8; DIGEST_LEN],
    /// Bytes whose contents are measured (NORMAL and VMSA pages).
    pub measured_bytes: u64,
    /// Pages of every type handed to the firmware, VMSAs included.
    pub pages: u64,
}

/// Why a plan has no launch digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PredictError {
    /// The plan is not for SNP.
    #[error("plan: platform is {0:?}; only a SEV-SNP plan has a launch digest")]
    Platform(Platform),
    /// A vCPU count that no launch can have.
    #[error("vcpus: {0} is not between 1 and 65536")]
    Vcpus(u32),
    /// A range that is not made of whole pages, wraps, or holds more data than it is long.
    #[error("plan step {step}: pages at {gpa:#x}, {len:#x} bytes, {data:#x} bytes of data: must be whole 4 KiB pages")]
    Range {
        /// Index of the step.
        step: usize,
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Bytes of data.
        data: usize,
    },
    /// A step names an area or vCPU context that does not exist.
    #[error("plan step {step}: refers to {what} {index}, which the plan does not have")]
    Reference {
        /// Index of the step.
        step: usize,
        /// What is referred to.
        what: &'static str,
        /// The index.
        index: usize,
    },
    /// The plan hands over more than [`MAX_PAGES`].
    #[error("plan: more than {MAX_PAGES} pages would be handed to the firmware; make the image smaller")]
    TooManyPages,
    /// No context for vCPU 0.
    #[error("plan: no vCPU context with index 0; add a VP context to the image")]
    NoContext,
}

/// Predicts the digest of launching `plan` with `vcpus` vCPUs on KVM, without launching it: steps in order, a NORMAL
/// page without data as a page of zeros, parameter areas as unmeasured pages, and one VMSA a vCPU at the end.
///
/// # Errors
/// [`PredictError`] names the step and what is wrong with it.
pub fn predict(plan: &LaunchPlan<'_>, vcpus: u32) -> Result<Prediction, PredictError> {
    let mut last = Err(PredictError::Vcpus(vcpus));
    predict_each(plan, vcpus, |prediction| last = Ok(prediction))?;
    last
}

/// As [`predict`], for every count from 1 to `vcpus`, in order, at the cost of one.
///
/// # Errors
/// As [`predict`].
pub fn predict_each(plan: &LaunchPlan<'_>, vcpus: u32, mut each: impl FnMut(Prediction)) -> Result<(), PredictError> {
    if plan.platform != Platform::SevSnp {
        return Err(PredictError::Platform(plan.platform));
    }
    if !(1..=65536).contains(&vcpus) {
        return Err(PredictError::Vcpus(vcpus));
    }
    let (mut chain, mut measured_bytes) = measure_pages(plan)?;
    for index in 0..vcpus {
        let context = u16::try_from(index)
            .ok()
            .and_then(|index| plan.vcpu_state(index))
            .ok_or(PredictError::NoContext)?;
        chain.update_vmsa(&vmsa_page(&context.state));
        measured_bytes += PAGE_SIZE;
        each(Prediction {
            digest: chain.current,
            measured_bytes,
            pages: chain.pages(),
        });
    }
    Ok(())
}

/// The digest of the pages of `plan` alone, before the first vCPU: what launches of the same pages have in common.
///
/// # Errors
/// As [`predict`], but for what concerns vCPUs.
pub fn predict_pages(plan: &LaunchPlan<'_>) -> Result<[u8; DIGEST_LEN], PredictError> {
    measure_pages(plan).map(|(chain, _)| chain.current)
}

/// The digest before the first VMSA, and the bytes that it measures.
fn measure_pages(plan: &LaunchPlan<'_>) -> Result<(LaunchDigest, u64), PredictError> {
    let mut chain = LaunchDigest::new();
    let mut measured = 0;
    let zero_page = sha384(&[0; PAGE_LEN]);
    for range in firmware_steps(plan) {
        let range = range?;
        // Pages that the firmware never sees are not looked at.
        if range.kind == PageKind::Shared {
            continue;
        }
        if chain.pages().saturating_add(range.len / PAGE_SIZE) > MAX_PAGES {
            return Err(PredictError::TooManyPages);
        }
        for (gpa, data) in pages_of(range.gpa, range.len, range.data) {
            let contents = match range.kind {
                PageKind::Normal => {
                    measured += PAGE_SIZE;
                    if data.is_empty() { zero_page } else { hash_page(data) }
                }
                _ => [0; DIGEST_LEN],
            };
            chain.update(range.kind, gpa, &contents);
        }
    }
    Ok((chain, measured))
}

/// One range of pages of one kind, as the launch handles it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageRange<'p> {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) kind: PageKind,
    pub(crate) data: &'p [u8],
    /// The parameter area that fills it, if any.
    pub(crate) area: Option<usize>,
}

/// The page steps of `plan` in order, checked: [`Step::Parameters`] become unmeasured pages, vCPU contexts are left out.
pub(crate) fn firmware_steps<'p>(
    plan: &'p LaunchPlan<'_>,
) -> impl Iterator<Item = Result<PageRange<'p>, PredictError>> {
    plan.steps.iter().enumerate().filter_map(|(step, what)| {
        let range = match what {
            Step::Pages { gpa, len, kind, data } => PageRange {
                gpa: *gpa,
                len: *len,
                kind: *kind,
                data: match data {
                    Cow::Borrowed(bytes) => bytes,
                    Cow::Owned(bytes) => bytes,
                },
                area: None,
            },
            Step::Parameters { gpa, area } => match plan.areas.get(*area) {
                Some(found) => PageRange {
                    gpa: *gpa,
                    len: found.len,
                    kind: PageKind::Unmeasured,
                    data: &[],
                    area: Some(*area),
                },
                None => {
                    return Some(Err(PredictError::Reference {
                        step,
                        what: "parameter area",
                        index: *area,
                    }));
                }
            },
            Step::Vcpu { vp } => {
                return (*vp >= plan.vps.len()).then_some(Err(PredictError::Reference {
                    step,
                    what: "vCPU context",
                    index: *vp,
                }));
            }
        };
        let whole = range.gpa.is_multiple_of(PAGE_SIZE)
            && range.len.is_multiple_of(PAGE_SIZE)
            && range.gpa.checked_add(range.len).is_some()
            && range.data.len() as u64 <= range.len;
        Some(whole.then_some(range).ok_or(PredictError::Range {
            step,
            gpa: range.gpa,
            len: range.len,
            data: range.data.len(),
        }))
    })
}

/// The pages of `[gpa, gpa + len)` with the part of `data` in each (empty past its end).
fn pages_of(gpa: u64, len: u64, data: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut chunks = data.chunks(PAGE_LEN);
    (0..len / PAGE_SIZE).map(move |page| (gpa + page * PAGE_SIZE, chunks.next().unwrap_or(&[])))
}

fn hash_page(data: &[u8]) -> [u8; DIGEST_LEN] {
    if data.len() == PAGE_LEN {
        return sha384(data);
    }
    let mut page = [0; PAGE_LEN];
    if let Some(to) = page.get_mut(..data.len()) {
        to.copy_from_slice(data);
    }
    sha384(&page)
}

#[cfg(test)]
mod tests;
