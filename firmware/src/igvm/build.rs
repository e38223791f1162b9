//! Writes launch plans as an IGVM file: one plan, or one for each of two platforms, which then share the pages that
//! are the same in both. File data is 4 KiB-aligned, so that a launch can point the firmware at it, and each page
//! content is stored once. Long runs of pages are taken as they are, without a look at their contents.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;

use igvm_defs::{
    IGVM_FIXED_HEADER, IGVM_FIXED_HEADER_V2, IGVM_FORMAT_VERSION_1, IGVM_FORMAT_VERSION_2, IGVM_MAGIC_VALUE,
    IGVM_VHS_ERROR_RANGE, IGVM_VHS_GUEST_POLICY, IGVM_VHS_PAGE_DATA, IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_AREA,
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_REQUIRED_MEMORY, IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY,
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE, IGVM_VHS_SUPPORTED_PLATFORM, IGVM_VHS_VP_CONTEXT, IgvmArchitecture,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType, IgvmVariableHeaderType as Vht, RequiredMemoryFlags,
};
use zerocopy::{Immutable, IntoBytes};

use super::data::{Assembled, Data, same_bytes};
use super::{IgvmError, PlanOptions, native, plan};
use crate::plan::{
    GpaRange, IdBlock, IdPublicKey, IdSignature, LaunchPlan, PAGE_SIZE, PageKind, ParameterArea, ParameterKind,
    Platform, Step, VpContext,
};
use crate::vmsa::vmsa_page;

const PAGE: usize = 4096;
/// So many bytes of whole pages in a step are a run: a kernel, an initrd.
const RUN: usize = 1 << 20;

/// Version of the fixed header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FormatVersion {
    /// 2 if there is a native x64 VP context, for which the specification asks, else 1.
    #[default]
    Auto,
    /// 1: x64, 4 KiB pages.
    V1,
    /// 2: names architecture and page size.
    V2,
}

/// Choices of [`build`].
#[derive(Clone, Copy, Debug, Default)]
pub struct BuildOptions {
    /// Version of the fixed header.
    pub version: FormatVersion,
    /// Keep the plan's order of steps. Otherwise parameters come first and vCPUs last, which every known loader
    /// measures alike (QEMU 10.2 measures a parameter insert ahead of the pages before it).
    pub preserve_order: bool,
}

/// Why plans cannot be written as an IGVM file.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BuildError {
    /// One plan, or one a platform, is what a file takes.
    #[error("an IGVM file takes one plan for each of its platforms; given: {0:?}")]
    Platforms(Vec<Platform>),
    /// A step of bytes instead of pages.
    #[error("memory {gpa:#x}+{len:#x} is not whole pages; align it to 4096")]
    Unaligned {
        /// First byte.
        gpa: u64,
        /// Length.
        len: u64,
    },
    /// A step refers to a parameter area or vCPU that the plan lacks.
    #[error("a step refers to {what} {index}, which the plan does not have")]
    Dangling {
        /// What.
        what: &'static str,
        /// Which.
        index: usize,
    },
    /// A register that the native VP context has no place for.
    #[error("vCPU {index}: register {register} has a value a native VP context cannot hold")]
    Native {
        /// Index of the vCPU.
        index: u16,
        /// Name of the register.
        register: &'static str,
    },
    /// A VMSA that is not one page.
    #[error("vCPU {index}: the VMSA has {len} bytes; it must have 4096")]
    Vmsa {
        /// Index of the vCPU.
        index: u16,
        /// Its length.
        len: usize,
    },
    /// A range that a 32-bit length field cannot hold.
    #[error("memory {start:#x}+{len:#x} is longer than an IGVM range can be (4 GiB - 4 KiB)", start = .0.start, len = .0.len)]
    Range(GpaRange),
    /// The file would have 4 GiB or more.
    #[error("the file would be 4 GiB or longer, which IGVM cannot express")]
    TooLarge,
    /// The file would be refused by the reader.
    #[error("the plan breaks a rule of the format: {0}")]
    Invalid(#[from] IgvmError),
}

/// Writes `plans` as one IGVM file. Each is for another platform; pages, parameter areas and ranges that both have
/// are written once, with both bits in their compatibility mask, where the order of both allows it.
///
/// # Errors
/// [`BuildError`]; whatever this returns as a file, [`super::plan`] accepts.
pub fn build(plans: &[LaunchPlan<'_>], options: &BuildOptions) -> Result<Vec<u8>, BuildError> {
    let file = assemble(plans, options)?.to_vec();
    check(&file, plans)?;
    Ok(file)
}

/// Checks that the reader takes `file`, which was made of `plans`.
///
/// # Errors
/// [`BuildError::Invalid`].
pub fn check(file: &[u8], plans: &[LaunchPlan<'_>]) -> Result<(), BuildError> {
    for plan_of in plans {
        plan(
            file,
            &PlanOptions {
                platform: Some(plan_of.platform),
                ..PlanOptions::default()
            },
        )?;
    }
    Ok(())
}

/// As [`build`], in parts that are not copied and not read again: [`check`] the file where it was written to.
///
/// # Errors
/// [`BuildError`] but for [`BuildError::Invalid`].
pub fn assemble<'p>(plans: &'p [LaunchPlan<'p>], options: &BuildOptions) -> Result<Assembled<'p>, BuildError> {
    let (first, second) = match plans {
        [one] => (one, None),
        [one, two] if one.platform != two.platform => (one, Some(two)),
        _ => return Err(BuildError::Platforms(plans.iter().map(|plan| plan.platform).collect())),
    };
    let mut writer = Writer::default();
    writer.platforms(plans);
    let a = items(first, options)?;
    let b = second.map(|plan| items(plan, options)).transpose()?.unwrap_or_default();
    let merged = merge(&a, &b, Item::key, Item::same);
    let mut placed = Vec::with_capacity(merged.len());
    for pair in merged {
        // Of a shared page the SNP plan's view is written: it knows what is measured.
        let snp_second = second.is_some_and(|plan| plan.platform == Platform::SevSnp);
        let chosen = if snp_second {
            pair.pick_last(&a, &b)
        } else {
            pair.pick(&a, &b)
        };
        placed.extend(chosen);
    }
    writer.areas(&placed)?;
    let more = |get: for<'x> fn(&'x LaunchPlan<'_>) -> &'x [GpaRange]| second.map(get).unwrap_or_default();
    for (range, mask) in merge_ranges(&first.required_memory, more(|plan| &plan.required_memory)) {
        writer.required_memory(range, mask)?;
    }
    for (range, mask) in merge_ranges(&first.error_ranges, more(|plan| &plan.error_ranges)) {
        writer.error_range(range, mask)?;
    }
    for (item, mask) in &placed {
        writer.item(item, *mask)?;
    }
    for (plan, mask) in plans.iter().zip([1, 2]) {
        if let Some(id_block) = &plan.id_block {
            writer.id_block(id_block, mask);
        }
    }
    let native_context = plans
        .iter()
        .any(|plan| plan.platform == Platform::Native && !plan.vps.is_empty());
    let v2 = match options.version {
        FormatVersion::Auto => native_context,
        FormatVersion::V1 => false,
        FormatVersion::V2 => true,
    };
    writer.finish(v2)
}

/// What a step becomes in the file.
#[derive(Clone, Debug)]
enum Item<'p> {
    Page {
        gpa: u64,
        kind: PageKind,
        data: Cow<'p, [u8]>,
    },
    /// Many pages, each with data.
    Run {
        gpa: u64,
        kind: PageKind,
        data: &'p [u8],
    },
    Insert {
        gpa: u64,
        area: &'p ParameterArea<'p>,
    },
    Vp {
        platform: Platform,
        vp: &'p VpContext<'p>,
    },
}

impl Item<'_> {
    fn key(&self) -> (u8, u64) {
        match self {
            Self::Page { gpa, .. } => (0, *gpa),
            Self::Run { gpa, .. } => (4, *gpa),
            Self::Insert { gpa, .. } => (1, *gpa),
            Self::Vp {
                platform: Platform::Native,
                vp,
            } => (2, u64::from(vp.index)),
            Self::Vp {
                platform: Platform::SevSnp,
                vp,
            } => (3, u64::from(vp.index)),
        }
    }

    /// Whether two items of different platforms with one key may be one directive.
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Page { data: a, .. }, Self::Page { data: b, .. }) => {
                let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
                a == b || (a.is_empty() && zero(b)) || (b.is_empty() && zero(a))
            }
            (Self::Run { data: a, .. }, Self::Run { data: b, .. }) => same_bytes(a, b),
            (Self::Insert { area: a, .. }, Self::Insert { area: b, .. }) => a == b,
            _ => false,
        }
    }
}

/// The pages, inserts and vCPUs of a plan in the order in which they are written.
fn items<'p>(plan: &'p LaunchPlan<'p>, options: &BuildOptions) -> Result<Vec<Item<'p>>, BuildError> {
    let mut items = Vec::new();
    let mut used = vec![false; plan.vps.len()];
    for step in &plan.steps {
        match step {
            Step::Pages { gpa, len, kind, data } => pages(&mut items, plan.platform, (*gpa, *len), *kind, data)?,
            Step::Parameters { gpa, area } => {
                let what = "parameter area";
                let declared = plan
                    .areas
                    .get(*area)
                    .ok_or(BuildError::Dangling { what, index: *area })?;
                items.push(Item::Insert {
                    gpa: *gpa,
                    area: declared,
                });
            }
            Step::Vcpu { vp } => {
                let context = plan.vps.get(*vp).ok_or(BuildError::Dangling {
                    what: "vCPU",
                    index: *vp,
                })?;
                if let Some(used) = used.get_mut(*vp) {
                    *used = true;
                }
                items.push(Item::Vp {
                    platform: plan.platform,
                    vp: context,
                });
            }
        }
    }
    let unused = plan.vps.iter().zip(used).filter(|(_, used)| !used);
    items.extend(unused.map(|(vp, _)| Item::Vp {
        platform: plan.platform,
        vp,
    }));
    if !options.preserve_order {
        items.sort_by_key(|item| match item {
            Item::Insert { .. } => 0,
            Item::Page { .. } | Item::Run { .. } => 1,
            Item::Vp { .. } => 2,
        });
    }
    Ok(items)
}

fn pages<'p>(
    items: &mut Vec<Item<'p>>,
    platform: Platform,
    (gpa, len): (u64, u64),
    kind: PageKind,
    data: &'p [u8],
) -> Result<(), BuildError> {
    if !gpa.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) || data.len() as u64 > len {
        return Err(BuildError::Unaligned { gpa, len });
    }
    // Only zeros that are measured as a NORMAL page are written out; they take one page of the file.
    let explicit = platform == Platform::SevSnp && kind == PageKind::Normal;
    let mut first = 0;
    let mut rest = data;
    if data.len() >= RUN && kind != PageKind::Zero {
        items.push(Item::Run { gpa, kind, data });
        (first, rest) = ((data.len() as u64).div_ceil(PAGE_SIZE), &[]);
    }
    let mut chunks = rest.chunks(PAGE);
    for number in first..len / PAGE_SIZE {
        let gpa = gpa
            .checked_add(number * PAGE_SIZE)
            .ok_or(BuildError::Unaligned { gpa, len })?;
        let data = match chunks.next() {
            Some(chunk) if chunk.len() == PAGE => Cow::Borrowed(chunk),
            Some(chunk) => {
                let mut page = chunk.to_vec();
                page.resize(PAGE, 0);
                Cow::Owned(page)
            }
            None if explicit => Cow::Owned(vec![0; PAGE]),
            None => Cow::Borrowed(&[][..]),
        };
        let data = if kind == PageKind::Zero {
            Cow::Borrowed(&[][..])
        } else {
            data
        };
        items.push(Item::Page { gpa, kind, data });
    }
    Ok(())
}

/// Where a merged element comes from.
#[derive(Clone, Copy, Debug)]
struct Pair {
    a: Option<usize>,
    b: Option<usize>,
}

impl Pair {
    fn mask(self) -> u32 {
        u32::from(self.a.is_some()) | u32::from(self.b.is_some()) << 1
    }

    fn pick<'t, T>(self, a: &'t [T], b: &'t [T]) -> Option<(&'t T, u32)> {
        let from = self.a.and_then(|i| a.get(i)).or_else(|| self.b.and_then(|i| b.get(i)));
        from.map(|element| (element, self.mask()))
    }

    fn pick_last<'t, T>(self, a: &'t [T], b: &'t [T]) -> Option<(&'t T, u32)> {
        let from = self.b.and_then(|i| b.get(i)).or_else(|| self.a.and_then(|i| a.get(i)));
        from.map(|element| (element, self.mask()))
    }
}

/// Merges two sequences, keeping the order of both; elements with one key that are the same become one where the
/// order allows it.
fn merge<T, K: Hash + Eq>(a: &[T], b: &[T], key: impl Fn(&T) -> K, same: impl Fn(&T, &T) -> bool) -> Vec<Pair> {
    let positions: HashMap<K, usize> = b.iter().enumerate().map(|(i, element)| (key(element), i)).collect();
    let mut merged = Vec::with_capacity(a.len().max(b.len()));
    let mut next_b = 0;
    for (i, element) in a.iter().enumerate() {
        let twin = positions.get(&key(element)).copied().filter(|at| *at >= next_b);
        match twin.filter(|at| b.get(*at).is_some_and(|other| same(element, other))) {
            Some(at) => {
                merged.extend((next_b..at).map(|b| Pair { a: None, b: Some(b) }));
                merged.push(Pair {
                    a: Some(i),
                    b: Some(at),
                });
                next_b = at + 1;
            }
            None => merged.push(Pair { a: Some(i), b: None }),
        }
    }
    merged.extend((next_b..b.len()).map(|b| Pair { a: None, b: Some(b) }));
    merged
}

fn merge_ranges(a: &[GpaRange], b: &[GpaRange]) -> Vec<(GpaRange, u32)> {
    let merged = merge(a, b, |range| (range.start, range.len), |_, _| true);
    merged
        .into_iter()
        .filter_map(|pair| pair.pick(a, b))
        .map(|(range, mask)| (*range, mask))
        .collect()
}

/// A file under construction: variable headers, whose file offsets count from the start of the data until the end,
/// and the data.
#[derive(Default)]
struct Writer<'p> {
    headers: Vec<u8>,
    /// Positions in `headers` of file offsets.
    fixups: Vec<usize>,
    data: Data<'p>,
    areas: u32,
}

impl<'p> Writer<'p> {
    fn header(&mut self, typ: Vht, content: &(impl IntoBytes + Immutable)) -> usize {
        let content = content.as_bytes();
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        self.headers.extend_from_slice(&typ.0.to_le_bytes());
        self.headers.extend_from_slice(&length.to_le_bytes());
        let start = self.headers.len();
        self.headers.extend_from_slice(content);
        self.headers.resize(self.headers.len().next_multiple_of(8), 0);
        start
    }

    fn platforms(&mut self, plans: &[LaunchPlan<'_>]) {
        for (plan, compatibility_mask) in plans.iter().zip([1, 2]) {
            let platform_type = match plan.platform {
                Platform::Native => IgvmPlatformType::NATIVE,
                Platform::SevSnp => IgvmPlatformType::SEV_SNP,
            };
            let content = IGVM_VHS_SUPPORTED_PLATFORM {
                compatibility_mask,
                highest_vtl: 0,
                platform_type,
                platform_version: 1,
                shared_gpa_boundary: 0,
            };
            self.header(Vht::IGVM_VHT_SUPPORTED_PLATFORM, &content);
        }
        for (plan, compatibility_mask) in plans.iter().zip([1, 2]) {
            if let Some(policy) = plan.policy {
                let content = IGVM_VHS_GUEST_POLICY {
                    policy,
                    compatibility_mask,
                    reserved: 0,
                };
                self.header(Vht::IGVM_VHT_GUEST_POLICY, &content);
            }
        }
    }

    /// Declares the area of every insert, with its parameters, in the order of the inserts.
    fn areas(&mut self, placed: &[(&Item<'p>, u32)]) -> Result<(), BuildError> {
        let inserts = placed.iter().filter_map(|(item, _)| match item {
            Item::Insert { area, .. } => Some(*area),
            _ => None,
        });
        let areas: Vec<&ParameterArea<'_>> = inserts.collect();
        for (index, area) in (0..).zip(&areas) {
            let len = usize::try_from(area.len).ok().filter(|len| area.initial.len() <= *len);
            let len = len.ok_or(BuildError::Unaligned { gpa: 0, len: area.len })?;
            let stored = !area.initial.is_empty();
            let file_offset = if stored {
                let at = self.data.append(&area.initial)?;
                self.data.at_least(at as usize + len.next_multiple_of(PAGE));
                at
            } else {
                0
            };
            let content = IGVM_VHS_PARAMETER_AREA {
                number_of_bytes: area.len,
                parameter_area_index: index,
                file_offset,
            };
            let start = self.header(Vht::IGVM_VHT_PARAMETER_AREA, &content);
            if stored {
                self.fixups
                    .push(start + std::mem::offset_of!(IGVM_VHS_PARAMETER_AREA, file_offset));
            }
        }
        for (parameter_area_index, area) in (0..).zip(&areas) {
            for parameter in &area.parameters {
                let content = IGVM_VHS_PARAMETER {
                    parameter_area_index,
                    byte_offset: parameter.offset,
                };
                self.header(parameter_type(parameter.kind), &content);
            }
        }
        Ok(())
    }

    fn required_memory(&mut self, range: GpaRange, compatibility_mask: u32) -> Result<(), BuildError> {
        let content = IGVM_VHS_REQUIRED_MEMORY {
            gpa: range.start,
            compatibility_mask,
            number_of_bytes: u32::try_from(range.len).map_err(|_| BuildError::Range(range))?,
            flags: RequiredMemoryFlags::new(),
            reserved: 0,
        };
        self.header(Vht::IGVM_VHT_REQUIRED_MEMORY, &content);
        Ok(())
    }

    fn error_range(&mut self, range: GpaRange, compatibility_mask: u32) -> Result<(), BuildError> {
        let size_bytes = u32::try_from(range.len).map_err(|_| BuildError::Range(range))?;
        let content = IGVM_VHS_ERROR_RANGE {
            gpa: range.start,
            compatibility_mask,
            size_bytes,
        };
        self.header(Vht::IGVM_VHT_ERROR_RANGE, &content);
        Ok(())
    }

    fn item(&mut self, item: &Item<'p>, mask: u32) -> Result<(), BuildError> {
        match item {
            Item::Page { gpa, kind, data } => {
                let stored = match data {
                    data if data.is_empty() => None,
                    data => Some(self.data.page(data.clone())?),
                };
                self.page_data(*gpa, *kind, stored, mask);
                Ok(())
            }
            Item::Run { gpa, kind, data } => {
                let stored = self.data.run(data)?;
                for number in 0..u32::try_from(data.len().div_ceil(PAGE)).map_err(|_| BuildError::TooLarge)? {
                    // The run lies in the data, whose offsets are 32 bits wide; `pages` checked its addresses.
                    let at = number.saturating_mul(4096);
                    let gpa = gpa.saturating_add(u64::from(at));
                    self.page_data(gpa, *kind, Some(stored.saturating_add(at)), mask);
                }
                Ok(())
            }
            Item::Insert { gpa, .. } => {
                let content = IGVM_VHS_PARAMETER_INSERT {
                    gpa: *gpa,
                    compatibility_mask: mask,
                    parameter_area_index: self.areas,
                };
                self.areas = self.areas.checked_add(1).ok_or(BuildError::TooLarge)?;
                self.header(Vht::IGVM_VHT_PARAMETER_INSERT, &content);
                Ok(())
            }
            Item::Vp { platform, vp } => self.vp_context(*platform, vp, mask),
        }
    }

    /// A page whose data are at `stored`; none: zeros, or what the firmware fills in.
    fn page_data(&mut self, gpa: u64, kind: PageKind, stored: Option<u32>, mask: u32) {
        let data_type = match kind {
            PageKind::Secrets => IgvmPageDataType::SECRETS,
            PageKind::Cpuid => IgvmPageDataType::CPUID_DATA,
            _ => IgvmPageDataType::NORMAL,
        };
        let flags = IgvmPageDataFlags::new()
            .with_unmeasured(kind == PageKind::Unmeasured)
            .with_shared(kind == PageKind::Shared);
        let content = IGVM_VHS_PAGE_DATA {
            gpa,
            compatibility_mask: mask,
            file_offset: stored.unwrap_or(0),
            flags,
            data_type,
            reserved: 0,
        };
        let start = self.header(Vht::IGVM_VHT_PAGE_DATA, &content);
        if stored.is_some() {
            self.fixups
                .push(start + std::mem::offset_of!(IGVM_VHS_PAGE_DATA, file_offset));
        }
    }

    fn vp_context(&mut self, platform: Platform, vp: &'p VpContext<'p>, mask: u32) -> Result<(), BuildError> {
        let index = vp.index;
        let (gpa, page) = match platform {
            Platform::Native => {
                let page = native::write(&vp.state).map_err(|register| BuildError::Native { index, register })?;
                (0, Cow::Owned(page))
            }
            Platform::SevSnp if vp.vmsa.is_empty() => (vp.gpa, Cow::Owned(vmsa_page(&vp.state).to_vec())),
            Platform::SevSnp if vp.vmsa.len() == PAGE => (vp.gpa, Cow::Borrowed(&*vp.vmsa)),
            Platform::SevSnp => {
                return Err(BuildError::Vmsa {
                    index,
                    len: vp.vmsa.len(),
                });
            }
        };
        let content = IGVM_VHS_VP_CONTEXT {
            gpa: gpa.into(),
            compatibility_mask: mask,
            file_offset: self.data.page(page)?,
            vp_index: index,
            reserved: 0,
        };
        let start = self.header(Vht::IGVM_VHT_VP_CONTEXT, &content);
        self.fixups
            .push(start + std::mem::offset_of!(IGVM_VHS_VP_CONTEXT, file_offset));
        Ok(())
    }

    fn id_block(&mut self, block: &IdBlock, compatibility_mask: u32) {
        let content = IGVM_VHS_SNP_ID_BLOCK {
            compatibility_mask,
            author_key_enabled: u8::from(block.author_key_enabled),
            reserved: [0; 3],
            ld: block.ld,
            family_id: block.family_id,
            image_id: block.image_id,
            version: block.version,
            guest_svn: block.guest_svn,
            id_key_algorithm: block.id_key_algorithm,
            author_key_algorithm: block.author_key_algorithm,
            id_key_signature: signature(&block.id_block_signature),
            id_public_key: public_key(&block.id_key),
            author_key_signature: signature(&block.id_key_signature),
            author_public_key: public_key(&block.author_key),
        };
        self.header(Vht::IGVM_VHT_SNP_ID_BLOCK, &content);
    }

    fn finish(mut self, v2: bool) -> Result<Assembled<'p>, BuildError> {
        let too_large = |_| BuildError::TooLarge;
        let fixed_len = if v2 {
            size_of::<IGVM_FIXED_HEADER_V2>()
        } else {
            size_of::<IGVM_FIXED_HEADER>()
        };
        let data_start = (fixed_len + self.headers.len()).next_multiple_of(PAGE);
        // The igvm crate refuses a file without file data.
        self.data.at_least(8);
        let base = u32::try_from(data_start).map_err(too_large)?;
        for at in &self.fixups {
            let Some(field) = self.headers.get_mut(*at..).and_then(|rest| rest.first_chunk_mut::<4>()) else {
                continue;
            };
            let offset = u32::from_le_bytes(*field)
                .checked_add(base)
                .ok_or(BuildError::TooLarge)?;
            *field = offset.to_le_bytes();
        }
        let mut fixed = IGVM_FIXED_HEADER_V2 {
            magic: IGVM_MAGIC_VALUE,
            format_version: if v2 {
                IGVM_FORMAT_VERSION_2
            } else {
                IGVM_FORMAT_VERSION_1
            },
            variable_header_offset: u32::try_from(fixed_len).map_err(too_large)?,
            variable_header_size: u32::try_from(self.headers.len()).map_err(too_large)?,
            total_file_size: u32::try_from(data_start as u64 + self.data.len()).map_err(too_large)?,
            checksum: 0,
            architecture: IgvmArchitecture::X64,
            page_size: 4096,
        };
        let mut crc = crc32fast::Hasher::new();
        crc.update(fixed.as_bytes().get(..fixed_len).unwrap_or_default());
        crc.update(&self.headers);
        fixed.checksum = crc.finalize();
        let mut head = Vec::with_capacity(data_start);
        head.extend_from_slice(fixed.as_bytes().get(..fixed_len).unwrap_or_default());
        head.extend_from_slice(&self.headers);
        head.resize(data_start, 0);
        Ok(Assembled::new(head, self.data))
    }
}

fn parameter_type(kind: ParameterKind) -> Vht {
    match kind {
        ParameterKind::VpCount => Vht::IGVM_VHT_VP_COUNT_PARAMETER,
        ParameterKind::MemoryMap => Vht::IGVM_VHT_MEMORY_MAP,
        ParameterKind::CommandLine => Vht::IGVM_VHT_COMMAND_LINE,
        ParameterKind::Madt => Vht::IGVM_VHT_MADT,
        ParameterKind::Srat => Vht::IGVM_VHT_SRAT,
        ParameterKind::Slit => Vht::IGVM_VHT_SLIT,
        ParameterKind::Pptt => Vht::IGVM_VHT_PPTT,
        ParameterKind::MmioRanges => Vht::IGVM_VHT_MMIO_RANGES,
        ParameterKind::EnvironmentInfo => Vht::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER,
    }
}

fn signature(signature: &IdSignature) -> IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
        r_comp: signature.r,
        s_comp: signature.s,
    }
}

fn public_key(key: &IdPublicKey) -> IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
    IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
        curve: key.curve,
        reserved: 0,
        qx: key.qx,
        qy: key.qy,
    }
}
