//! A fast hasher for keys that nobody outside can choose: ids and times.

use std::hash::{BuildHasherDefault, Hasher};

/// Folds words by multiplication. Not for keys from outside: collisions can be made.
#[derive(Default)]
pub(crate) struct FoldHasher(u64);

pub(crate) type FoldState = BuildHasherDefault<FoldHasher>;
pub(crate) type FoldMap<K, V> = std::collections::HashMap<K, V, FoldState>;

impl FoldHasher {
    fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

impl Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        self.0.wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(26)
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some((word, more)) = rest.split_first_chunk() {
            self.word(u64::from_le_bytes(*word));
            rest = more;
        }
        for byte in rest {
            self.word(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.word(u64::from(n));
    }

    fn write_u32(&mut self, n: u32) {
        self.word(u64::from(n));
    }

    fn write_u64(&mut self, n: u64) {
        self.word(n);
    }

    #[allow(clippy::cast_sign_loss, reason = "only the bits matter")]
    fn write_i64(&mut self, n: i64) {
        self.word(n as u64);
    }

    fn write_usize(&mut self, n: usize) {
        self.word(n as u64);
    }
}
