//! The byte pattern of the protocol: splitmix64, eight little-endian bytes an output.

/// The bytes of a seed, endless.
#[derive(Clone, Debug)]
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Pattern {
    /// The pattern of `seed`, from its start.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed,
            word: [0; 8],
            used: 8,
        }
    }

    fn next_word(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31).to_le_bytes()
    }

    /// Writes the next `into.len()` bytes.
    pub fn fill(&mut self, into: &mut [u8]) {
        let mut rest = into;
        while !rest.is_empty() {
            if self.used == 8 && rest.len() >= 8 {
                let (words, tail) = rest.as_chunks_mut::<8>();
                words.iter_mut().for_each(|word| *word = self.next_word());
                rest = tail;
                continue;
            }
            if self.used == 8 {
                self.word = self.next_word();
                self.used = 0;
            }
            let ready = self.word.get(self.used..).unwrap_or_default();
            let count = ready.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.iter_mut().zip(ready).for_each(|(to, from)| *to = *from);
            self.used += count;
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_splitmix64() {
        // First outputs from state 1234567, as the reference implementation prints them.
        let mut bytes = [0; 24];
        Pattern::new(1_234_567).fill(&mut bytes);
        let expected = [
            6_457_827_717_110_365_317_u64,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(bytes.to_vec(), expected.map(u64::to_le_bytes).concat());
    }

    #[test]
    fn pieces_make_the_whole() {
        let mut whole = [0; 100];
        Pattern::new(42).fill(&mut whole);
        let mut pieces = [0; 100];
        let mut pattern = Pattern::new(42);
        for range in [0..3, 3..8, 8..25, 25..26, 26..99, 99..100] {
            pattern.fill(&mut pieces[range]);
        }
        assert_eq!(whole, pieces);
    }
}
