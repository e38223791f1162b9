//! What the tests are made of: a deterministic generator, plans from it, and files written header by header.

use std::borrow::Cow;

use zerocopy::IntoBytes;

use crate::plan::*;
use crate::vmsa::vmsa_page;

/// splitmix64.
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .take(len)
            .collect()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().unwrap()
    }
}

/// A 64-bit state both platforms can hold.
pub(crate) fn long_mode(rip: u64, platform: Platform) -> VcpuState {
    let data = Segment {
        selector: 0x18,
        attrib: 0xC93,
        limit: u32::MAX,
        base: 0,
    };
    let snp = platform == Platform::SevSnp;
    VcpuState {
        rip,
        rsp: 0x9000,
        cs: Segment {
            selector: 0x10,
            attrib: 0xA9B,
            ..data
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        gdtr: Segment {
            limit: 0xFFFF,
            ..Segment::default()
        },
        idtr: Segment {
            limit: 0xFFFF,
            ..Segment::default()
        },
        cr0: 0x8000_0031,
        cr3: 0x2000,
        cr4: if snp { 0x60 } else { 0x20 },
        efer: if snp { 0x1D00 } else { 0xD00 },
        sev_features: u64::from(snp),
        ..VcpuState::reset()
    }
}

const KINDS: [ParameterKind; 9] = [
    ParameterKind::VpCount,
    ParameterKind::MemoryMap,
    ParameterKind::CommandLine,
    ParameterKind::Madt,
    ParameterKind::Srat,
    ParameterKind::Slit,
    ParameterKind::Pptt,
    ParameterKind::MmioRanges,
    ParameterKind::EnvironmentInfo,
];

fn id_block(rng: &mut Rng) -> IdBlock {
    let author_key_enabled = rng.below(2) == 1;
    IdBlock {
        ld: rng.array(),
        family_id: rng.array(),
        image_id: rng.array(),
        version: 1,
        guest_svn: 7,
        id_key_algorithm: 1,
        author_key_algorithm: u32::from(author_key_enabled),
        id_block_signature: IdSignature {
            r: rng.array(),
            s: rng.array(),
        },
        id_key: IdPublicKey {
            curve: 2,
            qx: rng.array(),
            qy: rng.array(),
        },
        author_key_enabled,
        id_key_signature: IdSignature {
            r: rng.array(),
            s: rng.array(),
        },
        author_key: IdPublicKey {
            curve: 2,
            qx: rng.array(),
            qy: rng.array(),
        },
    }
}

/// A plan drawn from `seed`: any order of steps, every kind of page and parameter the platform has.
pub(crate) fn sample_plan(seed: u64, platform: Platform) -> LaunchPlan<'static> {
    let mut rng = Rng(seed);
    let snp = platform == Platform::SevSnp;
    let mut plan = LaunchPlan::new(platform);
    plan.policy = snp.then_some(0x3_0000);
    let mut gpa = 0x10_0000;
    for _ in 0..1 + rng.below(12) {
        gpa += PAGE_SIZE * rng.below(3);
        if rng.below(5) == 0 {
            let len = PAGE_SIZE * (1 + rng.below(3));
            let initial = if rng.below(3) == 0 {
                Cow::Owned(rng.bytes(len as usize))
            } else {
                Cow::Borrowed(&[][..])
            };
            let parameters = (0..rng.below(4))
                .map(|_| Parameter {
                    kind: KINDS[rng.below(9) as usize],
                    offset: rng.below(4000) as u32,
                })
                .collect();
            plan.steps.push(Step::Parameters {
                gpa,
                area: plan.areas.len(),
            });
            plan.areas.push(ParameterArea {
                len,
                initial,
                parameters,
            });
            gpa += len;
            continue;
        }
        let pages = 1 + rng.below(4);
        let kind = match rng.below(6) {
            _ if !snp => PageKind::Normal,
            0 => PageKind::Unmeasured,
            1 => PageKind::Secrets,
            2 => PageKind::Cpuid,
            3 => PageKind::Shared,
            _ => PageKind::Normal,
        };
        let len = pages * PAGE_SIZE;
        let filled = match kind {
            PageKind::Secrets | PageKind::Cpuid => 0,
            _ => len - rng.below(5000).min(len),
        };
        let data = Cow::Owned(rng.bytes(filled as usize));
        plan.steps.push(Step::Pages { gpa, len, kind, data });
        gpa += len;
    }
    for index in 0..1 + rng.below(3) as u16 {
        let state = long_mode(0x10_0000 + u64::from(index), platform);
        let (gpa, vmsa) = match platform {
            Platform::SevSnp => (KVM_VMSA_GPA, Cow::Owned(vmsa_page(&state).to_vec())),
            Platform::Native => (0, Cow::Borrowed(&[][..])),
        };
        plan.steps.push(Step::Vcpu { vp: plan.vps.len() });
        plan.vps.push(VpContext {
            index,
            gpa,
            state,
            vmsa,
        });
    }
    plan.required_memory.push(GpaRange {
        start: 0,
        len: 0x800_0000,
    });
    if rng.below(2) == 0 {
        plan.error_ranges.push(GpaRange {
            start: 0x700_0000,
            len: 0x2000,
        });
    }
    if snp && rng.below(2) == 0 {
        plan.id_block = Some(id_block(&mut rng));
    }
    plan
}

/// One step's worth of what a plan does, page by page and without regard to how steps are joined.
#[derive(Debug, PartialEq)]
pub(crate) enum Effect<'p> {
    Page(u64, PageKind, Vec<u8>),
    Area(u64, &'p ParameterArea<'p>),
    Vcpu(&'p VpContext<'p>),
}

/// What a plan does.
pub(crate) fn effects<'p>(plan: &'p LaunchPlan<'_>) -> Vec<Effect<'p>> {
    let mut effects = Vec::new();
    for step in &plan.steps {
        match step {
            Step::Pages { gpa, len, kind, data } => {
                let mut bytes = data.to_vec();
                bytes.resize(*len as usize, 0);
                for (i, page) in bytes.chunks(4096).enumerate() {
                    effects.push(Effect::Page(gpa + 4096 * i as u64, *kind, page.to_vec()));
                }
            }
            Step::Parameters { gpa, area } => effects.push(Effect::Area(*gpa, &plan.areas[*area])),
            Step::Vcpu { vp } => effects.push(Effect::Vcpu(&plan.vps[*vp])),
        }
    }
    effects
}

/// A file written header by header.
#[derive(Clone, Default)]
pub(crate) struct RawFile {
    pub headers: Vec<u8>,
    /// Offset in the file of each header.
    pub offsets: Vec<u64>,
    pub v2: bool,
    pub data: Vec<u8>,
}

impl RawFile {
    /// Starts with the SNP platform as mask 1 and VSM isolation as mask 2.
    pub(crate) fn snp() -> Self {
        Self::default().with(1, &platform(1, 2)).with(1, &platform(2, 1))
    }

    pub(crate) fn with(mut self, typ: u32, content: &[u8]) -> Self {
        let start = if self.v2 { 32 } else { 24 };
        self.offsets.push(start + self.headers.len() as u64);
        self.headers.extend_from_slice(&typ.to_le_bytes());
        self.headers.extend_from_slice(&(content.len() as u32).to_le_bytes());
        self.headers.extend_from_slice(content);
        self.headers.resize(self.headers.len().next_multiple_of(8), 0);
        self
    }

    /// Offset of the first page of file data when `data` has pages; tests keep headers below it.
    pub(crate) const DATA: u32 = 0x1000;

    pub(crate) fn file(&self) -> Vec<u8> {
        let fixed_len: u32 = if self.v2 { 32 } else { 24 };
        let mut file = Vec::new();
        file.extend_from_slice(b"IGVM");
        file.extend_from_slice(&(1 + u32::from(self.v2)).to_le_bytes());
        file.extend_from_slice(&fixed_len.to_le_bytes());
        file.extend_from_slice(&(self.headers.len() as u32).to_le_bytes());
        let total = if self.data.is_empty() {
            fixed_len as usize + self.headers.len()
        } else {
            0x1000 + self.data.len()
        };
        file.extend_from_slice(&(total as u32).to_le_bytes());
        file.extend_from_slice(&[0; 4]);
        if self.v2 {
            file.extend_from_slice([0u32, 4096].as_bytes());
        }
        file.extend_from_slice(&self.headers);
        file.resize(total - self.data.len(), 0);
        file.extend_from_slice(&self.data);
        seal(&mut file);
        file
    }
}

/// SUPPORTED_PLATFORM content.
pub(crate) fn platform(mask: u32, platform_type: u8) -> Vec<u8> {
    let mut content = mask.to_le_bytes().to_vec();
    content.extend_from_slice(&[0, platform_type, 1, 0]);
    content.extend_from_slice(&[0; 8]);
    content
}

/// Makes the checksum right again, where the headers' extent can be told.
pub(crate) fn seal(file: &mut [u8]) {
    let word = |file: &[u8], at: usize| {
        file.get(at..at + 4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()) as usize)
    };
    let (Some(version), Some(start), Some(len)) = (word(file, 4), word(file, 8), word(file, 12)) else {
        return;
    };
    let fixed_len = if version == 2 { 32 } else { 24 };
    let (Some(fixed), Some(headers)) = (file.get(..fixed_len), file.get(start..start.saturating_add(len))) else {
        return;
    };
    let mut crc = crc32fast::Hasher::new();
    crc.update(&fixed[..20]);
    crc.update(&[0; 4]);
    crc.update(&fixed[24..]);
    crc.update(headers);
    let crc = crc.finalize();
    file[20..24].copy_from_slice(&crc.to_le_bytes());
}
