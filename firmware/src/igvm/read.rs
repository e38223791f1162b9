//! From an IGVM file to a [`LaunchPlan`]: every header type is handled here, or refused by name. The order of the
//! steps is the order of the file.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use igvm_defs::{
    IGVM_VHS_ERROR_RANGE, IGVM_VHS_GUEST_POLICY, IGVM_VHS_PAGE_DATA, IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_AREA,
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_REQUIRED_MEMORY, IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY,
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE, IGVM_VHS_SUPPORTED_PLATFORM, IGVM_VHS_VP_CONTEXT, IgvmPageDataType,
    IgvmPlatformType, IgvmVariableHeaderType as Vht,
};
use zerocopy::FromBytes;

use super::error::{IgvmError, Reason};
use super::headers::{Container, FIXED_HEADER, Header, Section};
use super::pages::{Claims, Steps};
use super::{PlanOptions, ZeroPages, native};
use crate::plan::{
    GpaRange, IdBlock, IdPublicKey, IdSignature, KVM_VMSA_GPA, LaunchPlan, PAGE_SIZE, PageKind, Parameter,
    ParameterArea, ParameterKind, Platform, Step, VpContext,
};
use crate::vmsa;

/// Largest parameter area, in bytes: far above any table, far below what would hurt the host.
pub const MAX_AREA_SIZE: u64 = 16 << 20;
/// Most parameter directives in a file.
pub const MAX_PARAMETERS: usize = 1024;

/// Most variable headers in a file: twice the pages that a file can hold, so that what planning takes stays in
/// proportion to what is loaded (at most some 250 MB).
pub const MAX_HEADERS: usize = 1 << 21;

/// Guest physical addresses end here: the widest that x86-64 page tables reach.
const GPA_END: u64 = 1 << 52;

/// A platform that a file declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformInfo {
    /// Platform type (igvm_defs `IgvmPlatformType`).
    pub platform_type: u8,
    /// Its bit in compatibility masks.
    pub compatibility_mask: u32,
    /// Highest VTL, 0 or 2.
    pub highest_vtl: u8,
    /// Version of the platform definition.
    pub platform_version: u16,
    /// Boundary between private and shared addresses, 0 for none.
    pub shared_gpa_boundary: u64,
}

impl PlatformInfo {
    /// The platform a plan can be made for, if this is one.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        match IgvmPlatformType(self.platform_type) {
            IgvmPlatformType::NATIVE => Some(Platform::Native),
            IgvmPlatformType::SEV_SNP => Some(Platform::SevSnp),
            _ => None,
        }
    }

    /// The name of the platform type.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match IgvmPlatformType(self.platform_type) {
            IgvmPlatformType::NATIVE => "NATIVE",
            IgvmPlatformType::VSM_ISOLATION => "VSM_ISOLATION",
            IgvmPlatformType::SEV_SNP => "SEV_SNP",
            IgvmPlatformType::TDX => "TDX",
            IgvmPlatformType::SEV => "SEV",
            IgvmPlatformType::SEV_ES => "SEV_ES",
            IgvmPlatformType::CCA => "CCA",
            _ => "unknown",
        }
    }
}

/// The platforms an IGVM file declares, in file order.
///
/// # Errors
/// As [`plan`], for the fixed header and the platform headers.
pub fn platforms(file: &[u8]) -> Result<Vec<PlatformInfo>, IgvmError> {
    let container = Container::read(file)?;
    let mut found: Vec<PlatformInfo> = Vec::new();
    for header in container.headers() {
        let header = header?;
        if header.typ == Vht::IGVM_VHT_SUPPORTED_PLATFORM {
            let info = read_platform(&header)?;
            declare(&header, &found, &info)?;
            found.push(info);
        } else if !header.optional || matches!(Section::of(header.typ), Some(s) if s > Section::Platform) {
            break;
        }
    }
    Ok(found)
}

fn read_platform(header: &Header<'_>) -> Result<PlatformInfo, IgvmError> {
    let raw: IGVM_VHS_SUPPORTED_PLATFORM = header.read()?;
    if raw.compatibility_mask.count_ones() != 1 {
        return Err(header.field(
            "compatibility_mask",
            raw.compatibility_mask,
            "must have exactly one bit",
        ));
    }
    Ok(PlatformInfo {
        platform_type: raw.platform_type.0,
        compatibility_mask: raw.compatibility_mask,
        highest_vtl: raw.highest_vtl,
        platform_version: raw.platform_version,
        shared_gpa_boundary: raw.shared_gpa_boundary,
    })
}

/// At most 32 platforms can be declared, one a mask bit: the search is short.
fn declare(header: &Header<'_>, found: &[PlatformInfo], info: &PlatformInfo) -> Result<(), IgvmError> {
    let duplicate = |what, value| Err(header.error(Reason::Duplicate { what, value }));
    if found
        .iter()
        .any(|other| other.compatibility_mask == info.compatibility_mask)
    {
        return duplicate("compatibility_mask", u64::from(info.compatibility_mask));
    }
    if found.iter().any(|other| other.platform_type == info.platform_type) {
        return duplicate("platform_type", u64::from(info.platform_type));
    }
    Ok(())
}

/// Plans the launch of an IGVM file. Borrows page contents from `file`.
///
/// # Errors
/// [`IgvmError`] naming the first header, in file order, that is malformed, breaks a rule of the format, or asks
/// for something this monitor does not do; overlaps of memory are found after all else.
pub fn plan<'a>(file: &'a [u8], options: &PlanOptions) -> Result<LaunchPlan<'a>, IgvmError> {
    let container = Container::read(file)?;
    let found = platforms(file)?;
    let chosen = choose(&found, options)?;
    let mut planner = Planner::new(container, &found, chosen, options);
    let mut section = Section::Platform;
    for header in container.headers() {
        let header = header?;
        if header.index >= MAX_HEADERS {
            return Err(header.field("count of headers", header.index as u64 + 1, "must be at most 2097152"));
        }
        match Section::of(header.typ) {
            Some(of) if of < section => return Err(header.error(Reason::SectionOrder(of.name()))),
            Some(of) => section = of,
            None if header.optional => continue,
            None => return Err(header.error(Reason::UnknownType(header.typ.0))),
        }
        planner.header(&header)?;
    }
    planner.finish()
}

fn choose(found: &[PlatformInfo], options: &PlanOptions) -> Result<(PlatformInfo, Platform), IgvmError> {
    let find = |wanted| {
        found
            .iter()
            .find(|info| info.platform() == Some(wanted))
            .map(|info| (*info, wanted))
    };
    let chosen = match options.platform {
        Some(wanted) => find(wanted),
        None => find(Platform::SevSnp).or_else(|| find(Platform::Native)),
    };
    chosen.ok_or_else(|| {
        let wanted = match options.platform {
            Some(Platform::Native) => "NATIVE",
            Some(Platform::SevSnp) => "SEV_SNP",
            None => "SEV_SNP or NATIVE",
        };
        let names: Vec<&str> = found.iter().map(PlatformInfo::name).collect();
        let has = if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        };
        IgvmError::file(FIXED_HEADER, 0, Reason::NoPlatform { wanted, has })
    })
}

/// A declared parameter area.
struct Area<'a> {
    /// Taken when the plan is complete.
    area: Option<ParameterArea<'a>>,
    len: u64,
    inserted: bool,
}

struct Planner<'a> {
    container: Container<'a>,
    platform: Platform,
    info: PlatformInfo,
    declared_masks: u32,
    zero_kind: PageKind,
    plan: LaunchPlan<'a>,
    steps: Steps<'a>,
    claims: Claims,
    areas: Vec<Area<'a>>,
    /// From a file's area index to the position in `areas`.
    area_of: HashMap<u32, usize>,
    vp_indices: HashSet<u16>,
    parameters: usize,
    version_string: bool,
}

impl<'a> Planner<'a> {
    fn new(
        container: Container<'a>,
        found: &[PlatformInfo],
        (info, platform): (PlatformInfo, Platform),
        options: &PlanOptions,
    ) -> Self {
        let as_zero = platform == Platform::SevSnp && options.zero_pages == ZeroPages::AsZero;
        Self {
            container,
            platform,
            info,
            declared_masks: found.iter().fold(0, |masks, info| masks | info.compatibility_mask),
            zero_kind: if as_zero { PageKind::Zero } else { PageKind::Normal },
            plan: LaunchPlan::new(platform),
            steps: Steps::new(container.file()),
            claims: Claims::default(),
            areas: Vec::new(),
            area_of: HashMap::new(),
            vp_indices: HashSet::new(),
            parameters: 0,
            version_string: false,
        }
    }

    fn header(&mut self, header: &Header<'a>) -> Result<(), IgvmError> {
        match header.typ {
            Vht::IGVM_VHT_SUPPORTED_PLATFORM => self.supported_platform(header),
            Vht::IGVM_VHT_GUEST_POLICY => self.guest_policy(header),
            Vht(0x104 | 0x105) => self.corim(header),
            Vht::IGVM_VHT_VERSION_STRING => self.version_string(header),
            Vht::IGVM_VHT_PARAMETER_AREA => self.parameter_area(header),
            Vht::IGVM_VHT_PAGE_DATA => self.page_data(header),
            Vht::IGVM_VHT_PARAMETER_INSERT => self.parameter_insert(header),
            Vht::IGVM_VHT_VP_CONTEXT => self.vp_context(header),
            Vht::IGVM_VHT_REQUIRED_MEMORY => self.required_memory(header),
            Vht::IGVM_VHT_VP_COUNT_PARAMETER => self.parameter(header, ParameterKind::VpCount),
            Vht::IGVM_VHT_SRAT => self.parameter(header, ParameterKind::Srat),
            Vht::IGVM_VHT_MADT => self.parameter(header, ParameterKind::Madt),
            Vht::IGVM_VHT_MMIO_RANGES => self.parameter(header, ParameterKind::MmioRanges),
            Vht::IGVM_VHT_SNP_ID_BLOCK => self.id_block(header),
            Vht::IGVM_VHT_MEMORY_MAP => self.parameter(header, ParameterKind::MemoryMap),
            Vht::IGVM_VHT_ERROR_RANGE => self.error_range(header),
            Vht::IGVM_VHT_COMMAND_LINE => self.parameter(header, ParameterKind::CommandLine),
            Vht::IGVM_VHT_SLIT => self.parameter(header, ParameterKind::Slit),
            Vht::IGVM_VHT_PPTT => self.parameter(header, ParameterKind::Pptt),
            Vht::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER => self.parameter(header, ParameterKind::EnvironmentInfo),
            _ => self.refused_type(header),
        }
    }

    /// What is known and not done: passed over when marked optional or when it is for another platform.
    fn refused_type(&self, header: &Header<'_>) -> Result<(), IgvmError> {
        if header.optional {
            return Ok(());
        }
        // These begin with their compatibility mask.
        let masked = |what| match <u32>::read_from_prefix(header.content) {
            Ok((mask, _)) if !self.applies(header, mask)? => Ok(()),
            Ok(_) => Err(header.error(Reason::Unsupported(what))),
            Err(_) => Err(header.error(Reason::Truncated {
                what: "compatibility_mask",
                needed: 4,
                have: header.content.len() as u64,
            })),
        };
        match header.typ {
            Vht::IGVM_VHT_RELOCATABLE_REGION => masked("relocation; link the image at fixed addresses"),
            Vht::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION => {
                masked("page table relocation; link the image at fixed addresses")
            }
            Vht::IGVM_VHT_CCA_POLICY => masked("policies of the CCA platform"),
            Vht::IGVM_VHT_VBS_MEASUREMENT => masked("measurements of the VSM isolation platform"),
            Vht::IGVM_VHT_DEVICE_TREE => Err(header.error(Reason::Unsupported(
                "a device tree parameter; x86 pods are described by ACPI (MADT, SRAT, SLIT, PPTT)",
            ))),
            Vht::RESERVED_DO_NOT_USE => Err(header.error(Reason::Unsupported("header type 0x306, which is reserved"))),
            other => Err(header.error(Reason::UnknownType(other.0))),
        }
    }

    /// Whether a header with this mask is for the chosen platform.
    fn applies(&self, header: &Header<'_>, mask: u32) -> Result<bool, IgvmError> {
        if mask == 0 || mask & !self.declared_masks != 0 {
            return Err(header.field("compatibility_mask", mask, "must name platforms the file declares"));
        }
        Ok(mask & self.info.compatibility_mask != 0)
    }

    /// `[gpa, gpa + len)` must be whole pages below 2^52.
    fn range(&self, header: &Header<'_>, gpa: u64, len: u64, len_field: &'static str) -> Result<(), IgvmError> {
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(header.field("gpa", gpa, "must be a multiple of 4096"));
        }
        if !len.is_multiple_of(PAGE_SIZE) {
            return Err(header.field(len_field, len, "must be a multiple of 4096"));
        }
        if gpa.checked_add(len).is_none_or(|end| end > GPA_END) {
            return Err(header.field("gpa", gpa, "the memory must end at or below 2^52"));
        }
        Ok(())
    }

    fn supported_platform(&self, header: &Header<'_>) -> Result<(), IgvmError> {
        let info = read_platform(header)?;
        if info.compatibility_mask != self.info.compatibility_mask {
            return Ok(());
        }
        if info.platform_version != 1 {
            return Err(header.field("platform_version", info.platform_version, "must be 1"));
        }
        if info.highest_vtl != 0 {
            return Err(header.field(
                "highest_vtl",
                info.highest_vtl,
                "must be 0: KVM has no virtual trust levels",
            ));
        }
        if info.shared_gpa_boundary != 0 {
            let rule = "must be 0: KVM has no virtual top of memory";
            return Err(header.field("shared_gpa_boundary", info.shared_gpa_boundary, rule));
        }
        Ok(())
    }

    fn guest_policy(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_GUEST_POLICY = header.read()?;
        if raw.reserved != 0 {
            return Err(header.field("reserved", raw.reserved, "must be zero"));
        }
        if self.applies(header, raw.compatibility_mask)? && self.platform == Platform::SevSnp {
            if self.plan.policy.is_some() {
                return Err(header.error(Reason::Duplicate {
                    what: "guest policy",
                    value: raw.policy,
                }));
            }
            self.plan.policy = Some(raw.policy);
        }
        Ok(())
    }

    /// CoRIM documents and signatures accompany the image; a launch does nothing with them.
    fn corim(&self, header: &Header<'_>) -> Result<(), IgvmError> {
        let [mask, file_offset, size_bytes, reserved]: [u32; 4] = header.read()?;
        if reserved != 0 {
            return Err(header.field("reserved", reserved, "must be zero"));
        }
        self.applies(header, mask)?;
        if file_offset != 0 {
            self.container
                .data(file_offset, u64::from(size_bytes))
                .map_err(|reason| header.error(reason))?;
        }
        Ok(())
    }

    fn version_string(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        if self.version_string {
            return Err(header.error(Reason::Duplicate {
                what: "version string",
                value: header.index as u64,
            }));
        }
        self.version_string = true;
        match std::str::from_utf8(header.content) {
            Ok(_) => Ok(()),
            Err(e) => Err(header.field(
                "UTF-8 text valid up to",
                e.valid_up_to() as u64,
                "must be UTF-8 to its end",
            )),
        }
    }

    fn parameter_area(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_PARAMETER_AREA = header.read()?;
        let len = raw.number_of_bytes;
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > MAX_AREA_SIZE {
            return Err(header.field(
                "number_of_bytes",
                len,
                "must be a multiple of 4096, from 4096 to 16 MiB",
            ));
        }
        let initial = match raw.file_offset {
            0 => &[][..],
            offset => self
                .container
                .data(offset, len)
                .map_err(|reason| header.error(reason))?,
        };
        if self
            .area_of
            .insert(raw.parameter_area_index, self.areas.len())
            .is_some()
        {
            return Err(header.error(Reason::Duplicate {
                what: "parameter area",
                value: u64::from(raw.parameter_area_index),
            }));
        }
        let area = ParameterArea {
            len,
            initial: Cow::Borrowed(initial),
            parameters: Vec::new(),
        };
        self.areas.push(Area {
            area: Some(area),
            len,
            inserted: false,
        });
        Ok(())
    }

    fn area(&mut self, header: &Header<'_>, index: u32) -> Result<(usize, &mut Area<'a>), IgvmError> {
        let position = self.area_of.get(&index).copied();
        let area = position.and_then(|position| Some((position, self.areas.get_mut(position)?)));
        match area {
            None => Err(header.error(Reason::NoSuchArea(index))),
            Some((_, area)) if area.inserted => Err(header.error(Reason::AreaInserted(index))),
            Some(area) => Ok(area),
        }
    }

    fn parameter(&mut self, header: &Header<'_>, kind: ParameterKind) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_PARAMETER = header.read()?;
        self.parameters = self.parameters.saturating_add(1);
        if self.parameters > MAX_PARAMETERS {
            return Err(header.field("count of parameters", self.parameters as u64, "must be at most 1024"));
        }
        let (_, Area { area, len, .. }) = self.area(header, raw.parameter_area_index)?;
        let (byte_offset, len, needed) = (raw.byte_offset, *len, kind.min_size());
        if u64::from(byte_offset) + needed > len {
            return Err(header.error(Reason::ParameterOutside {
                byte_offset,
                needed,
                len,
            }));
        }
        if let Some(area) = area {
            area.parameters.push(Parameter {
                kind,
                offset: byte_offset,
            });
        }
        Ok(())
    }

    fn parameter_insert(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_PARAMETER_INSERT = header.read()?;
        if !self.applies(header, raw.compatibility_mask)? {
            return Ok(());
        }
        let (position, area) = self.area(header, raw.parameter_area_index)?;
        area.inserted = true;
        let len = area.len;
        self.range(header, raw.gpa, len, "number_of_bytes")?;
        self.claims.add(header, raw.gpa, len);
        self.steps.push(Step::Parameters {
            gpa: raw.gpa,
            area: position,
        });
        Ok(())
    }

    fn page_data(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_PAGE_DATA = header.read()?;
        if raw.reserved != 0 {
            return Err(header.field("reserved", raw.reserved, "must be zero"));
        }
        if !self.applies(header, raw.compatibility_mask)? {
            return Ok(());
        }
        let flags = raw.flags;
        if flags.reserved() != 0 {
            return Err(header.field("flags", u32::from(flags), "bits 31..3 must be zero"));
        }
        if flags.is_2mb_page() {
            return Err(header.error(Reason::Unsupported("2 MiB pages (flags bit 0); use 4 KiB pages")));
        }
        let data = match raw.file_offset {
            0 => None,
            offset => {
                self.container
                    .data(offset, PAGE_SIZE)
                    .map_err(|reason| header.error(reason))?;
                Some(u64::from(offset))
            }
        };
        let kind = self.page_kind(header, &raw)?;
        self.range(header, raw.gpa, PAGE_SIZE, "length")?;
        self.claims.add(header, raw.gpa, PAGE_SIZE);
        self.steps.page(raw.gpa, kind, data);
        Ok(())
    }

    fn page_kind(&self, header: &Header<'_>, raw: &IGVM_VHS_PAGE_DATA) -> Result<PageKind, IgvmError> {
        let special = match raw.data_type {
            IgvmPageDataType::NORMAL => None,
            IgvmPageDataType::SECRETS => Some(PageKind::Secrets),
            IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => Some(PageKind::Cpuid),
            other => return Err(header.field("data_type", other.0, "must be 0 to 3")),
        };
        if self.platform == Platform::Native {
            // Nothing is measured and nothing is private: contents are all that counts.
            return Ok(PageKind::Normal);
        }
        if let Some(kind) = special {
            if raw.flags.shared() {
                return Err(header.field("data_type", raw.data_type.0, "must be 0 (NORMAL) for a shared page"));
            }
            return Ok(kind);
        }
        Ok(if raw.flags.shared() {
            PageKind::Shared
        } else if raw.flags.unmeasured() {
            PageKind::Unmeasured
        } else if raw.file_offset == 0 {
            self.zero_kind
        } else {
            PageKind::Normal
        })
    }

    fn vp_context(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_VP_CONTEXT = header.read()?;
        if raw.reserved != 0 {
            return Err(header.field("reserved", raw.reserved, "must be zero"));
        }
        if !self.applies(header, raw.compatibility_mask)? {
            return Ok(());
        }
        if raw.file_offset == 0 {
            return Err(header.field("file_offset", raw.file_offset, "a VP context needs file data"));
        }
        let gpa = raw.gpa.get();
        self.range(header, gpa, PAGE_SIZE, "length")?;
        let data = self
            .container
            .data(raw.file_offset, PAGE_SIZE)
            .map_err(|reason| header.error(reason))?;
        if !self.vp_indices.insert(raw.vp_index) {
            return Err(header.error(Reason::Duplicate {
                what: "vp_index",
                value: u64::from(raw.vp_index),
            }));
        }
        let context = match self.platform {
            Platform::SevSnp => {
                if gpa != KVM_VMSA_GPA {
                    self.claims.add(header, gpa, PAGE_SIZE);
                }
                let state = vmsa::state_of(data).map_err(|e| header.error(Reason::Vmsa(e)))?;
                VpContext {
                    index: raw.vp_index,
                    gpa,
                    state,
                    vmsa: Cow::Borrowed(data),
                }
            }
            Platform::Native => {
                let state = native::read(data).map_err(|reason| header.error(reason))?;
                VpContext {
                    index: raw.vp_index,
                    gpa: 0,
                    state,
                    vmsa: Cow::Borrowed(&[]),
                }
            }
        };
        self.steps.push(Step::Vcpu {
            vp: self.plan.vps.len(),
        });
        self.plan.vps.push(context);
        Ok(())
    }

    fn required_memory(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_REQUIRED_MEMORY = header.read()?;
        if raw.reserved != 0 {
            return Err(header.field("reserved", raw.reserved, "must be zero"));
        }
        if u32::from(raw.flags) & !1 != 0 {
            return Err(header.field("flags", u32::from(raw.flags), "bits 31..1 must be zero"));
        }
        if !self.applies(header, raw.compatibility_mask)? {
            return Ok(());
        }
        if raw.flags.vtl2_protectable() {
            return Err(header.error(Reason::Unsupported("memory that VTL 2 protects (flags bit 0)")));
        }
        let len = u64::from(raw.number_of_bytes);
        self.range(header, raw.gpa, len, "number_of_bytes")?;
        self.plan.required_memory.push(GpaRange { start: raw.gpa, len });
        Ok(())
    }

    fn error_range(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_ERROR_RANGE = header.read()?;
        if !self.applies(header, raw.compatibility_mask)? {
            return Ok(());
        }
        let len = u64::from(raw.size_bytes);
        self.range(header, raw.gpa, len, "size_bytes")?;
        self.claims.add(header, raw.gpa, len);
        self.plan.error_ranges.push(GpaRange { start: raw.gpa, len });
        Ok(())
    }

    fn id_block(&mut self, header: &Header<'_>) -> Result<(), IgvmError> {
        let raw: IGVM_VHS_SNP_ID_BLOCK = header.read()?;
        if raw.reserved != [0; 3] {
            let value = raw.reserved.iter().find(|byte| **byte != 0).copied().unwrap_or(0);
            return Err(header.field("reserved", value, "must be zero"));
        }
        if raw.author_key_enabled > 1 {
            return Err(header.field("author_key_enabled", raw.author_key_enabled, "must be 0 or 1"));
        }
        for key in [&raw.id_public_key, &raw.author_public_key] {
            if key.reserved != 0 {
                return Err(header.field("public key reserved", key.reserved, "must be zero"));
            }
        }
        if !self.applies(header, raw.compatibility_mask)? || self.platform != Platform::SevSnp {
            return Ok(());
        }
        if self.plan.id_block.is_some() {
            return Err(header.error(Reason::Duplicate {
                what: "SNP ID block with SVN",
                value: raw.guest_svn.into(),
            }));
        }
        self.plan.id_block = Some(IdBlock {
            ld: raw.ld,
            family_id: raw.family_id,
            image_id: raw.image_id,
            version: raw.version,
            guest_svn: raw.guest_svn,
            id_key_algorithm: raw.id_key_algorithm,
            author_key_algorithm: raw.author_key_algorithm,
            id_block_signature: signature(&raw.id_key_signature),
            id_key: public_key(&raw.id_public_key),
            author_key_enabled: raw.author_key_enabled == 1,
            id_key_signature: signature(&raw.author_key_signature),
            author_key: public_key(&raw.author_public_key),
        });
        Ok(())
    }

    fn finish(mut self) -> Result<LaunchPlan<'a>, IgvmError> {
        self.claims.check()?;
        // Areas are numbered by their insertion; those that only another platform inserts are not part of this plan.
        self.plan.steps = self.steps.finish();
        for step in &mut self.plan.steps {
            if let Step::Parameters { area, .. } = step
                && let Some(inserted) = self.areas.get_mut(*area).and_then(|area| area.area.take())
            {
                *area = self.plan.areas.len();
                self.plan.areas.push(inserted);
            }
        }
        Ok(self.plan)
    }
}

fn signature(raw: &IGVM_VHS_SNP_ID_BLOCK_SIGNATURE) -> IdSignature {
    IdSignature {
        r: raw.r_comp,
        s: raw.s_comp,
    }
}

fn public_key(raw: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY) -> IdPublicKey {
    IdPublicKey {
        curve: raw.curve,
        qx: raw.qx,
        qy: raw.qy,
    }
}

impl ParameterKind {
    /// The least bytes a value of this kind takes.
    #[must_use]
    pub fn min_size(self) -> u64 {
        match self {
            Self::VpCount | Self::EnvironmentInfo => 4,
            // The terminating entry.
            Self::MemoryMap => 24,
            Self::CommandLine => 1,
            // An ACPI table header.
            Self::Madt | Self::Srat | Self::Slit | Self::Pptt => 36,
            Self::MmioRanges => 32,
        }
    }
}
