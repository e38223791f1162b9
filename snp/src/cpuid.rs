//! The CPUID page of an SNP guest (AMD 56860 7.1): made from a vCPU's CPUID with what the firmware refuses taken out, and
//! the firmware's own check. Which leaves a vCPU has is decided by the monitor.

use kvm_bindings::kvm_cpuid_entry2;

use crate::digest::{PAGE_LEN, Page};

/// Most entries in a CPUID page.
pub const MAX_ENTRIES: usize = 64;
/// C-bit position of all SNP processors so far.
pub const C_BIT: u32 = 51;
/// The leaf by which a guest knows the emulation (`docs/emulated-processor.md`).
pub const EMULATION_LEAF: u32 = 0x4000_0100;
/// The MSR that stands for PVALIDATE in the emulation.
pub const MSR_VALIDATE: u32 = 0x504F_4456;
/// The MSR by which a guest makes the emulation an ordinary VM.
pub const MSR_HAND_OVER: u32 = 0x504F_4457;
/// Version of the interface to the emulation.
const EMULATION_VERSION: u32 = 2;
/// Largest order that [`MSR_VALIDATE`] takes.
pub const VALIDATE_MAX_ORDER: u32 = 18;

const HEADER: usize = 16;
const ENTRY: usize = 48;
/// Bytes of XSAVE area that XCR0 = 1 needs, the only XCR0 that the table is made for.
const XSAVE_LEGACY: u32 = 0x240;

/// One entry of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "registers, by their architectural names")]
pub struct Leaf {
    pub eax_in: u32,
    pub ecx_in: u32,
    pub xcr0_in: u64,
    pub xss_in: u64,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Leaf {
    /// Whether the leaf's answer depends on ECX.
    fn indexed(eax: u32) -> bool {
        matches!(
            eax,
            4 | 7 | 0xB | 0xD | 0xF | 0x10 | 0x12 | 0x14 | 0x17..=0x1D | 0x1F | 0x8000_001D | 0x8000_0026
        )
    }

    fn is_empty(&self) -> bool {
        self.eax | self.ebx | self.ecx | self.edx == 0
    }
}

/// A table that does not fit into its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CPUID: {0} leaves have contents but a CPUID page holds {MAX_ENTRIES}; remove leaves from the vCPU's CPUID")]
pub struct TooManyLeaves(pub usize);

/// The table for a vCPU with `cpuid`, acceptable to the firmware at the first try. `emulated` adds the leaves by
/// which the guest knows the emulation.
///
/// # Errors
/// [`TooManyLeaves`].
pub fn table(cpuid: &[kvm_cpuid_entry2], emulated: bool) -> Result<Vec<Leaf>, TooManyLeaves> {
    let mut leaves: Vec<Leaf> = Vec::new();
    for entry in cpuid {
        let mut leaf = Leaf {
            eax_in: entry.function,
            ecx_in: if Leaf::indexed(entry.function) { entry.index } else { 0 },
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Leaf::default()
        };
        sanitise(&mut leaf);
        let ours = emulated && leaf.eax_in & !0xFF == EMULATION_LEAF;
        let again = leaves
            .iter()
            .any(|l| (l.eax_in, l.ecx_in) == (leaf.eax_in, leaf.ecx_in));
        if !leaf.is_empty() && leaf.eax_in != 0x8000_001F && !ours && !again {
            leaves.push(leaf);
        }
    }
    leaves.push(Leaf {
        eax_in: 0x8000_001F,
        // SEV, SEV-ES, SNP; the C-bit costs one physical address bit; a cache flush is not needed.
        eax: 1 << 1 | 1 << 3 | 1 << 4,
        ebx: C_BIT | 1 << 6 | 1 << 31,
        ..Leaf::default()
    });
    if let Some(top) = leaves.iter_mut().find(|leaf| leaf.eax_in == 0x8000_0000) {
        top.eax = top.eax.max(0x8000_001F);
    }
    if emulated {
        leaves.extend(emulation_leaves());
    }
    if leaves.len() > MAX_ENTRIES {
        return Err(TooManyLeaves(leaves.len()));
    }
    Ok(leaves)
}

fn emulation_leaves() -> [Leaf; 2] {
    let word = |text: [u8; 4]| u32::from_le_bytes(text);
    [
        Leaf {
            eax_in: EMULATION_LEAF,
            eax: EMULATION_LEAF + 1,
            ebx: word(*b"Podv"),
            ecx: word(*b"isor"),
            edx: word(*b"Emul"),
            ..Leaf::default()
        },
        Leaf {
            eax_in: EMULATION_LEAF + 1,
            eax: EMULATION_VERSION,
            ebx: MSR_VALIDATE,
            ecx: VALIDATE_MAX_ORDER,
            edx: MSR_HAND_OVER,
            ..Leaf::default()
        },
    ]
}

/// Takes out of `leaf` what the firmware does not let a hypervisor claim; true when something was.
fn sanitise(leaf: &mut Leaf) -> bool {
    let before = *leaf;
    match (leaf.eax_in, leaf.ecx_in) {
        // TSC-deadline timer.
        (1, _) => leaf.ecx &= !(1 << 24),
        // TSC_ADJUST; SPEC_CTRL, STIBP, ARCH_CAPABILITIES, SSBD and what else is in EDX.
        (7, 0) => {
            leaf.ebx &= !(1 << 1);
            leaf.edx = 0;
        }
        (0xD, 0 | 1) => {
            leaf.ebx = XSAVE_LEGACY;
            leaf.xcr0_in = 1;
            leaf.xss_in = 0;
        }
        // VIRT_SSBD.
        (0x8000_0008, _) => leaf.ebx &= !(1 << 25),
        (0x8000_0021, _) => {
            leaf.eax &= !(1 << 9);
            leaf.ecx = 0;
        }
        _ => {}
    }
    *leaf != before
}

/// The page that holds `leaves`; those past [`MAX_ENTRIES`] are left out.
#[must_use]
pub fn page(leaves: &[Leaf]) -> Page {
    let mut page = [0; PAGE_LEN];
    let count = leaves.len().min(MAX_ENTRIES);
    if let Some(to) = page.first_chunk_mut::<4>() {
        *to = u32::try_from(count).unwrap_or(0).to_le_bytes();
    }
    for (leaf, slot) in leaves
        .iter()
        .zip(page.split_at_mut(HEADER).1.chunks_exact_mut(ENTRY).take(count))
    {
        let mut bytes = [0; ENTRY];
        let words = [
            u64::from(leaf.eax_in) | u64::from(leaf.ecx_in) << 32,
            leaf.xcr0_in,
            leaf.xss_in,
            u64::from(leaf.eax) | u64::from(leaf.ebx) << 32,
            u64::from(leaf.ecx) | u64::from(leaf.edx) << 32,
        ];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        slot.copy_from_slice(&bytes);
    }
    page
}

/// Reads a page back; None when its count is above [`MAX_ENTRIES`] or a reserved field is set.
#[must_use]
pub fn parse(page: &Page) -> Option<Vec<Leaf>> {
    let (header, rest) = page.split_at(HEADER);
    let count = usize::try_from(u32::from_le_bytes(*header.first_chunk::<4>()?)).ok()?;
    if count > MAX_ENTRIES || header.iter().skip(4).any(|byte| *byte != 0) {
        return None;
    }
    rest.chunks_exact(ENTRY)
        .take(count)
        .map(|entry| {
            let mut words = entry
                .chunks_exact(8)
                .map(|word| word.first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word)));
            let mut next = || words.next().unwrap_or(0);
            let (input, xcr0_in, xss_in, low, high, reserved) = (next(), next(), next(), next(), next(), next());
            (reserved == 0).then_some(Leaf {
                eax_in: lower(input),
                ecx_in: lower(input >> 32),
                xcr0_in,
                xss_in,
                eax: lower(low),
                ebx: lower(low >> 32),
                ecx: lower(high),
                edx: lower(high >> 32),
            })
        })
        .collect()
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is asked for")]
fn lower(word: u64) -> u32 {
    word as u32
}

/// The firmware's check of a CPUID page at launch: Ok when it is accepted, else the page as the firmware corrects it.
/// Leaves of hypervisors (`0x4000_xxxx`) are not checked.
///
/// # Errors
/// The corrected page.
pub fn firmware_check(page: &Page) -> Result<(), Box<Page>> {
    let Some(mut leaves) = parse(page) else {
        return Err(Box::new(self::page(&[])));
    };
    let mut corrected = false;
    for leaf in &mut leaves {
        if leaf.eax_in & 0xF000_0000 != 0x4000_0000 {
            corrected |= sanitise(leaf);
        }
    }
    if corrected {
        Err(Box::new(self::page(&leaves)))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..kvm_cpuid_entry2::default()
        }
    }

    #[test]
    fn a_table_is_accepted_at_the_first_try_and_reads_back() {
        let all = u32::MAX;
        let cpuid = [
            entry(0, 0, 0x10),
            entry(1, 0, all),
            entry(7, 0, all),
            entry(7, 1, 0),
            entry(0xD, 0, all),
            entry(0xD, 1, all),
            entry(0x8000_0000, 0, 0x8000_0008),
            entry(0x8000_0008, 0, all),
            entry(0x8000_0021, 0, all),
        ];
        let table = table(&cpuid, true).unwrap();
        let page = page(&table);
        assert_eq!(firmware_check(&page), Ok(()));
        assert_eq!(parse(&page).unwrap(), table);
        let leaf = |eax| *table.iter().find(|leaf| leaf.eax_in == eax).unwrap();
        assert_eq!(leaf(1).ecx, !(1 << 24));
        assert_eq!(leaf(7).edx, 0);
        assert_eq!((leaf(0xD).ebx, leaf(0xD).xcr0_in), (0x240, 1));
        assert_eq!(leaf(0x8000_001F).ebx & 0x3F, 51);
        assert_eq!(leaf(0x8000_0000).eax, 0x8000_001F);
        assert_eq!(leaf(EMULATION_LEAF).ebx.to_le_bytes(), *b"Podv");
        assert!(
            !table.iter().any(|leaf| (leaf.eax_in, leaf.ecx_in) == (7, 1)),
            "empty leaves are left out"
        );
    }

    #[test]
    fn every_forbidden_claim_is_corrected_once() {
        let cases = [
            Leaf {
                eax_in: 1,
                ecx: 1 << 24,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 7,
                ebx: 2,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 7,
                edx: 1 << 26,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 0xD,
                ebx: 0x240,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 0xD,
                ecx_in: 1,
                ebx: 0x340,
                xcr0_in: 1,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 0x8000_0008,
                ebx: 1 << 25,
                ..Leaf::default()
            },
            Leaf {
                eax_in: 0x8000_0021,
                ecx: 1,
                ..Leaf::default()
            },
        ];
        for leaf in cases {
            let corrected = firmware_check(&page(&[leaf])).unwrap_err();
            assert_eq!(firmware_check(&corrected), Ok(()), "{leaf:?}");
        }
        let hypervisor = Leaf {
            eax_in: 0x4000_0001,
            edx: 7,
            ..Leaf::default()
        };
        assert_eq!(firmware_check(&page(&[hypervisor])), Ok(()));
    }

    #[test]
    fn more_leaves_than_fit_are_refused() {
        let cpuid: Vec<_> = (0..70).map(|index| entry(4, index, 1)).collect();
        assert_eq!(table(&cpuid, false), Err(TooManyLeaves(71)));
    }

    proptest! {
        #[test]
        fn any_page_is_checked_without_a_panic(seed in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut page = [0; 4096];
            page[..seed.len()].copy_from_slice(&seed);
            if let Err(corrected) = firmware_check(&page) {
                prop_assert_eq!(firmware_check(&corrected), Ok(()));
            }
        }
    }
}
