//! SHA-256 blocks with instructions that not every x86-64 processor has.
#![expect(
    unsafe_code,
    reason = "functions for instructions that the compiler does not take for granted"
)]

use core::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x, _mm_sha256msg1_epu32,
    _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
};

use super::{BLOCK, K};

/// With BMI2, which the caller of `digest` says the processor has.
pub(super) fn bmi2(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    #[target_feature(enable = "bmi2")]
    fn inner(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
        super::software(state, blocks);
    }
    // SAFETY: an engine is chosen by what the processor has.
    unsafe { inner(state, blocks) }
}

/// With the SHA extensions, which the caller of `digest` says the processor has.
pub(super) fn sha(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    // SAFETY: an engine is chosen by what the processor has.
    unsafe { with_extensions(state, blocks) }
}

fn load(words: &[u8; 16]) -> __m128i {
    // SAFETY: sixteen bytes are read, and need no alignment.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

fn constants(group: usize) -> __m128i {
    let words = K.as_chunks::<4>().0.get(group).unwrap_or(&[0; 4]);
    // SAFETY: as in `load`.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

/// Intel, "New Instructions Supporting the Secure Hash Algorithm on Intel Architecture Processors" (2013): the state is kept
/// as ABEF and CDGH, and a schedule of sixteen words as four registers.
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn with_extensions(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    let swap = _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203);
    let (halves, _) = state.as_chunks_mut::<4>();
    let [low, high] = halves else { return };
    // SAFETY: each half has sixteen bytes.
    let (dcba, hgfe) = unsafe {
        (
            _mm_loadu_si128(low.as_ptr().cast()),
            _mm_loadu_si128(high.as_ptr().cast()),
        )
    };
    let cdab = _mm_shuffle_epi32(dcba, 0xB1);
    let efgh = _mm_shuffle_epi32(hgfe, 0x1B);
    let mut abef = _mm_alignr_epi8(cdab, efgh, 8);
    let mut cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
    for block in blocks {
        let (before_abef, before_cdgh) = (abef, cdgh);
        let (words, _) = block.as_chunks::<16>();
        let mut schedule = [abef; 4];
        for (to, words) in schedule.iter_mut().zip(words) {
            *to = _mm_shuffle_epi8(load(words), swap);
        }
        for group in 0..16 {
            let [w0, w1, w2, w3] = schedule;
            let sum = _mm_add_epi32(w0, constants(group));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
            let next = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));
            schedule = [w1, w2, w3, _mm_sha256msg2_epu32(next, w3)];
        }
        abef = _mm_add_epi32(abef, before_abef);
        cdgh = _mm_add_epi32(cdgh, before_cdgh);
    }
    let feba = _mm_shuffle_epi32(abef, 0x1B);
    let dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    // SAFETY: each half has sixteen bytes.
    unsafe {
        _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_blend_epi16(feba, dchg, 0xF0));
        _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_alignr_epi8(dchg, feba, 8));
    }
}
