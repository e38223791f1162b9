//! SHA-256 with the processor's SHA instructions where it has them and without them elsewhere (FIPS 180-4 5 and 6.2). The
//! crate `sha2` cannot be asked for both: it finds out by CPUID, which faults on SEV-SNP hardware.

use core::sync::atomic::{AtomicBool, Ordering};

use sha2::Digest;

static INSTRUCTIONS: AtomicBool = AtomicBool::new(false);

/// The processor has the SHA instructions: hashes begun from now on use them.
pub fn use_instructions() {
    INSTRUCTIONS.store(true, Ordering::Relaxed);
}

/// A hash in the making.
#[derive(Clone)]
pub struct Sha256(Kind);

#[derive(Clone)]
enum Kind {
    Instructions(sha2::Sha256),
    Plain(Plain),
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl Sha256 {
    /// Of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(if INSTRUCTIONS.load(Ordering::Relaxed) {
            Kind::Instructions(sha2::Sha256::new())
        } else {
            Kind::Plain(Plain::new())
        })
    }

    /// Adds bytes.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.0 {
            Kind::Instructions(hash) => hash.update(data),
            Kind::Plain(hash) => hash.update(data),
        }
    }

    /// The hash of all that was added; what follows is another one.
    pub fn finalize_reset(&mut self) -> [u8; 32] {
        match core::mem::take(self).0 {
            Kind::Instructions(hash) => hash.finalize().into(),
            Kind::Plain(hash) => hash.finalize(),
        }
    }

    /// The hash of `data`.
    #[must_use]
    pub fn digest(data: &[u8]) -> [u8; 32] {
        let mut hash = Self::new();
        hash.update(data);
        hash.finalize_reset()
    }
}

#[derive(Clone)]
struct Plain {
    state: [u32; 8],
    block: [u8; 64],
    /// Bytes of `block` that wait.
    waiting: usize,
    /// Bytes added.
    len: u64,
}

const START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

const ROUND: [u32; 64] = [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
    0xe49b_69c1,
    0xefbe_4786,
    0x0fc1_9dc6,
    0x240c_a1cc,
    0x2de9_2c6f,
    0x4a74_84aa,
    0x5cb0_a9dc,
    0x76f9_88da,
    0x983e_5152,
    0xa831_c66d,
    0xb003_27c8,
    0xbf59_7fc7,
    0xc6e0_0bf3,
    0xd5a7_9147,
    0x06ca_6351,
    0x1429_2967,
    0x27b7_0a85,
    0x2e1b_2138,
    0x4d2c_6dfc,
    0x5338_0d13,
    0x650a_7354,
    0x766a_0abb,
    0x81c2_c92e,
    0x9272_2c85,
    0xa2bf_e8a1,
    0xa81a_664b,
    0xc24b_8b70,
    0xc76c_51a3,
    0xd192_e819,
    0xd699_0624,
    0xf40e_3585,
    0x106a_a070,
    0x19a4_c116,
    0x1e37_6c08,
    0x2748_774c,
    0x34b0_bcb5,
    0x391c_0cb3,
    0x4ed8_aa4a,
    0x5b9c_ca4f,
    0x682e_6ff3,
    0x748f_82ee,
    0x78a5_636f,
    0x84c8_7814,
    0x8cc7_0208,
    0x90be_fffa,
    0xa450_6ceb,
    0xbef9_a3f7,
    0xc671_78f2,
];

impl Plain {
    fn new() -> Self {
        Self {
            state: START,
            block: [0; 64],
            waiting: 0,
            len: 0,
        }
    }

    fn update(&mut self, mut data: &[u8]) {
        self.len = self.len.wrapping_add(data.len() as u64);
        while !data.is_empty() {
            let count = data.len().min(64 - self.waiting);
            let (now, rest) = data.split_at(count);
            if let Some(room) = self.block.get_mut(self.waiting..self.waiting + count) {
                room.copy_from_slice(now);
            }
            self.waiting += count;
            if self.waiting == 64 {
                compress(&mut self.state, &self.block);
                self.waiting = 0;
            }
            data = rest;
        }
    }

    fn finalize(mut self) -> [u8; 32] {
        let bits = self.len.wrapping_mul(8);
        self.update(&[0x80]);
        while self.waiting != 56 {
            self.update(&[0]);
        }
        self.update(&bits.to_be_bytes());
        let mut hash = [0; 32];
        for (to, word) in hash.chunks_exact_mut(4).zip(self.state) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        hash
    }
}

fn compress(state: &mut [u32; 8], block: &[u8; 64]) {
    let mut words = [0u32; 16];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (round, constant) in ROUND.iter().enumerate() {
        // The schedule in a ring of 16: word 0 is this round's.
        let [now, second, .., tenth, _, _, _, _, fifteenth, _] = words;
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let t1 = h
            .wrapping_add(s1)
            .wrapping_add(choice)
            .wrapping_add(*constant)
            .wrapping_add(now);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        (h, g, f, e) = (g, f, e, d.wrapping_add(t1));
        (d, c, b, a) = (c, b, a, t1.wrapping_add(s0.wrapping_add(majority)));
        if round < 48 {
            let low = second.rotate_right(7) ^ second.rotate_right(18) ^ (second >> 3);
            let high = fifteenth.rotate_right(17) ^ fifteenth.rotate_right(19) ^ (fifteenth >> 10);
            words[0] = now.wrapping_add(low).wrapping_add(tenth).wrapping_add(high);
        }
        words.rotate_left(1);
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_around_the_blocks_agrees_with_sha2() {
        let data: [u8; 300] = core::array::from_fn(|at| (at * 7 + 3) as u8);
        for len in 0..data.len() {
            for step in [1, 13, 64, 300] {
                let mut hash = Plain::new();
                data[..len].chunks(step).for_each(|piece| hash.update(piece));
                let want: [u8; 32] = sha2::Sha256::digest(&data[..len]).into();
                assert_eq!(hash.finalize(), want, "{len} bytes, {step} at a time");
            }
        }
    }

    #[test]
    fn both_ways_give_one_hash_and_begin_anew() {
        let mut hash = Sha256::new();
        hash.update(b"abc");
        let plain = hash.finalize_reset();
        assert_eq!(plain[..4], [0xba, 0x78, 0x16, 0xbf]);
        assert_eq!(hash.finalize_reset(), Sha256::digest(b""));
        let instructions: [u8; 32] = sha2::Sha256::digest(b"abc").into();
        assert_eq!(plain, instructions);
    }
}
