//! What the processor can do: from the CPUID page on SEV-SNP hardware, where the instruction would fault, and by the
//! instruction elsewhere. (The emulated processor's page is what the hypervisor claims, and some claim less than ring 3
//! then has.)

use core::arch::x86_64::__cpuid_count;

use crate::layout;
use crate::window::Shared;

const ENTRY_LEN: usize = 48;
const MAX_ENTRIES: usize = 64;

/// EAX, EBX, ECX, EDX of a leaf, from the CPUID page or by the instruction; zeros when the page has no such leaf.
#[must_use]
pub fn leaf(from_page: bool, leaf: u32, subleaf: u32) -> [u32; 4] {
    if !from_page {
        let answer = __cpuid_count(leaf, subleaf);
        return [answer.eax, answer.ebx, answer.ecx, answer.edx];
    }
    let page = Shared::parameter_page(layout::CPUID_PAGE);
    let count = (page.get::<u32>(0) as usize).min(MAX_ENTRIES);
    (0..count)
        .map(|index| 16 + index * ENTRY_LEN)
        .find(|at| page.get::<u32>(*at) == leaf && page.get::<u32>(at + 4) == subleaf)
        .map_or([0; 4], |at| [24, 28, 32, 36].map(|register| page.get(at + register)))
}

/// Whether the processor has the SHA instructions.
#[must_use]
pub fn has_sha(from_page: bool) -> bool {
    const SHA: u32 = 1 << 29;
    let [_, extended, _, _] = leaf(from_page, 7, 0);
    extended & SHA != 0
}

/// Whether the processor has the other instructions that this image is compiled for.
#[must_use]
pub fn suffices(from_page: bool) -> bool {
    const SSSE3_SSE41_AES_PCLMUL: u32 = 1 << 9 | 1 << 19 | 1 << 25 | 1 << 1;
    let [_, _, features, _] = leaf(from_page, 1, 0);
    features & SSSE3_SSE41_AES_PCLMUL == SSSE3_SSE41_AES_PCLMUL
}

/// Number of the emulated processor's validation MSR (docs/emulated-processor.md).
#[must_use]
pub fn emulation_msr() -> u32 {
    let [_, msr, _, _] = leaf(true, 0x4000_0101, 0);
    msr
}
