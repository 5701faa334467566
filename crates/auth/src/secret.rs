//! Secrets: how they are made, and what is kept of them.

use fieldline_model::value::to_hex;
use rand::RngExt as _;
use sha2::{Digest as _, Sha256};

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Random characters of a secret: 238 bits.
const CHARS: usize = 40;

/// Characters that a token's prefix has, `flt_` included: enough to tell tokens apart, far too few to guess the rest.
const PREFIX_CHARS: usize = 10;

/// Lengths that a secret from outside may have.
const BYTES: std::ops::RangeInclusive<usize> = 20..=256;

/// What is kept of a secret: its SHA-256. The secret itself is random and long, so no salt or slow hash is needed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SecretHash([u8; 32]);

impl SecretHash {
    /// The hash of `secret`, or `None` for what cannot be one: too short, too long, or not of visible ASCII.
    pub(crate) fn of(secret: &str) -> Option<Self> {
        let fits = BYTES.contains(&secret.len()) && secret.bytes().all(|b| b.is_ascii_graphic());
        fits.then(|| Self(Sha256::digest(secret.as_bytes()).into()))
    }

    /// As it is stored: lower-case hex digits.
    pub(crate) fn to_hex(self) -> String {
        to_hex(&self.0)
    }
}

/// A fresh secret that begins with `prefix`, from the system's randomness by a cryptographic generator.
pub(crate) fn fresh(prefix: &str) -> String {
    let mut generator = rand::rng();
    let mut secret = String::with_capacity(prefix.len() + CHARS);
    secret.push_str(prefix);
    for _ in 0..CHARS {
        let at = generator.random_range(0..BASE62.len());
        secret.push(char::from(BASE62.get(at).copied().unwrap_or(b'0')));
    }
    secret
}

/// The first characters of a secret, to be shown.
pub(crate) fn prefix(secret: &str) -> String {
    secret.chars().take(PREFIX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_long_random_and_hashed() {
        let (a, b) = (fresh("flt_"), fresh("flt_"));
        assert_ne!(a, b);
        assert!(a.starts_with("flt_") && a.len() == 44);
        assert!(a.bytes().skip(4).all(|c| BASE62.contains(&c)));
        assert_eq!(prefix(&a).len(), 10);
        // SHA-256 of "abcdefghijklmnopqrstuvwxyz" is published with its implementations.
        assert_eq!(
            SecretHash::of("abcdefghijklmnopqrstuvwxyz").map(SecretHash::to_hex).as_deref(),
            Some("71c480df93d6ae2f1efad1447c66c9525e316218cf51fc8d9ed832f2daf18b73")
        );
    }

    #[test]
    fn what_cannot_be_a_secret_has_no_hash() {
        for text in
            ["", "short", &"x".repeat(257), "with a space in the midst", "ümlautümlautümlaut"]
        {
            assert!(SecretHash::of(text).is_none(), "{text}");
        }
    }
}
