//! SHA-256 (FIPS 180-4) of whole pieces of memory: with the SHA extensions where the processor has them, else in software.
//! Which it has is the caller's to know: an encrypted guest does not ask the processor.

#[cfg(target_arch = "x86_64")]
mod extensions;

/// Bytes in a block.
const BLOCK: usize = 64;

/// How blocks are worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Portable code.
    Software,
    /// The same with BMI2's rotate, which leaves the flags alone.
    Bmi2,
    /// The SHA extensions, with SSSE3 and SSE4.1.
    Extensions,
}

const K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
    0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
    0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
    0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2,
];

const START: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

/// The digest of `data`.
#[must_use]
pub fn digest(engine: Engine, data: &[u8]) -> [u8; 32] {
    let mut state = START;
    let (blocks, rest) = data.as_chunks::<BLOCK>();
    compress(engine, &mut state, blocks);
    let mut tail = [[0; BLOCK]; 2];
    let flat = tail.as_flattened_mut();
    for (to, byte) in flat.iter_mut().zip(rest.iter().chain(&[0x80])) {
        *to = *byte;
    }
    let used = if rest.len() < BLOCK - 8 { 1 } else { 2 };
    let bits = (data.len() as u64).wrapping_mul(8).to_be_bytes();
    if let Some(end) = flat.get_mut(used * BLOCK - 8..used * BLOCK) {
        end.copy_from_slice(&bits);
    }
    compress(engine, &mut state, tail.get(..used).unwrap_or(&[]));
    let mut digest = [0; 32];
    for (to, word) in digest.chunks_exact_mut(4).zip(state) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    digest
}

fn compress(engine: Engine, state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    match engine {
        Engine::Software => software(state, blocks),
        #[cfg(target_arch = "x86_64")]
        Engine::Bmi2 => extensions::bmi2(state, blocks),
        #[cfg(target_arch = "x86_64")]
        Engine::Extensions => extensions::sha(state, blocks),
        #[cfg(not(target_arch = "x86_64"))]
        _ => software(state, blocks),
    }
}

/// One round; the variables' names move instead of their values.
macro_rules! round {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        let big = $e.rotate_right(6) ^ $e.rotate_right(11) ^ $e.rotate_right(25);
        let chosen = ($e & ($f ^ $g)) ^ $g;
        $h = $h
            .wrapping_add(big)
            .wrapping_add(chosen)
            .wrapping_add($k)
            .wrapping_add($w);
        $d = $d.wrapping_add($h);
        let big = $a.rotate_right(2) ^ $a.rotate_right(13) ^ $a.rotate_right(22);
        let majority = ($a & $b) | ($c & ($a | $b));
        $h = $h.wrapping_add(big).wrapping_add(majority);
    };
}

/// Sixteen rounds with the words of `w`, then (but for the last sixteen) the next words.
macro_rules! rounds {
    ($state:ident, $w:ident, $k:expr) => {
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = $state;
        let [k0, k1, k2, k3, k4, k5, k6, k7] = *$k;
        let [w0, w1, w2, w3, w4, w5, w6, w7] = $w;
        round!(a b c d e f g h, k0, w0);
        round!(h a b c d e f g, k1, w1);
        round!(g h a b c d e f, k2, w2);
        round!(f g h a b c d e, k3, w3);
        round!(e f g h a b c d, k4, w4);
        round!(d e f g h a b c, k5, w5);
        round!(c d e f g h a b, k6, w6);
        round!(b c d e f g h a, k7, w7);
        $state = [a, b, c, d, e, f, g, h];
    };
}

/// Eight more words of the schedule from the last sixteen: `old` are the first eight, `new` the others.
#[inline(always)]
fn schedule(old: &[u32; 8], new: &[u32; 8]) -> [u32; 8] {
    let small0 = |x: u32| x.rotate_right(7) ^ x.rotate_right(18) ^ (x >> 3);
    let small1 = |x: u32| x.rotate_right(17) ^ x.rotate_right(19) ^ (x >> 10);
    let [a0, a1, a2, a3, a4, a5, a6, a7] = *old;
    let [b0, b1, b2, b3, b4, b5, b6, b7] = *new;
    let next = |w0: u32, w1, w9: u32, w14| w0.wrapping_add(small0(w1)).wrapping_add(w9).wrapping_add(small1(w14));
    let c0 = next(a0, a1, b1, b6);
    let c1 = next(a1, a2, b2, b7);
    let c2 = next(a2, a3, b3, c0);
    let c3 = next(a3, a4, b4, c1);
    let c4 = next(a4, a5, b5, c2);
    let c5 = next(a5, a6, b6, c3);
    let c6 = next(a6, a7, b7, c4);
    let c7 = next(a7, b0, c0, c5);
    [c0, c1, c2, c3, c4, c5, c6, c7]
}

#[inline(always)]
fn software(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    let (k, _) = K.as_chunks::<8>();
    for block in blocks {
        let word = |index: usize| {
            block
                .as_chunks::<4>()
                .0
                .get(index)
                .map_or(0, |bytes| u32::from_be_bytes(*bytes))
        };
        let mut old: [u32; 8] = core::array::from_fn(word);
        let mut new: [u32; 8] = core::array::from_fn(|index| word(index + 8));
        let before = *state;
        let mut now = before;
        let [k0, k1, rest @ ..] = k else { return };
        rounds!(now, old, k0);
        rounds!(now, new, k1);
        for pair in rest.as_chunks::<2>().0 {
            let [k0, k1] = pair;
            old = schedule(&old, &new);
            rounds!(now, old, k0);
            new = schedule(&new, &old);
            rounds!(now, new, k1);
        }
        for (value, (before, now)) in state.iter_mut().zip(before.iter().zip(now)) {
            *value = before.wrapping_add(now);
        }
    }
}
