//! Passwords: argon2id, off the event loop, a few at a time.

use std::sync::OnceLock;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use tokio::sync::{Semaphore, TryAcquireError};

use crate::{AuthError, secret};

/// Lengths of passwords, in characters.
pub const PASSWORD_CHARS: std::ops::RangeInclusive<usize> = 10..=256;

/// Hashes computed at once: each takes 19 MiB and a core for some tens of milliseconds.
const AT_ONCE_MAX: usize = 2;

/// Callers that wait for their turn; further ones are told to come back.
const WAITING_MAX: usize = 32;

/// Computes and checks hashes.
pub(crate) struct Passwords {
    turns: Semaphore,
    places: Semaphore,
    /// Checked where there is no such user, so that both take equally long.
    decoy: OnceLock<String>,
}

impl Passwords {
    pub(crate) fn new() -> Self {
        Self {
            turns: Semaphore::new(AT_ONCE_MAX),
            places: Semaphore::new(AT_ONCE_MAX + WAITING_MAX),
            decoy: OnceLock::new(),
        }
    }

    /// The hash of `password` in PHC form, with a fresh salt.
    pub(crate) async fn hash(&self, password: String) -> Result<String, AuthError> {
        let hash = move || {
            let hash: PasswordHash =
                Argon2::default().hash_password(password.as_bytes()).map_err(fault)?;
            Ok(hash.to_string())
        };
        self.run(hash).await?
    }

    /// Whether `password` is the one of `hash`; without a hash it is not, and that takes as long to find out.
    pub(crate) async fn verify(
        &self,
        password: String,
        hash: Option<String>,
    ) -> Result<bool, AuthError> {
        let known = hash.is_some();
        let hash = match (hash, self.decoy.get()) {
            (Some(hash), _) => hash,
            (None, Some(decoy)) => decoy.clone(),
            (None, None) => {
                let decoy = self.hash(secret::fresh("")).await?;
                self.decoy.get_or_init(|| decoy).clone()
            }
        };
        let verify = move || {
            let hash = PasswordHash::new(&hash).map_err(fault)?;
            // Compares in constant time.
            Ok::<_, AuthError>(
                Argon2::default().verify_password(password.as_bytes(), &hash).is_ok(),
            )
        };
        let fits = self.run(verify).await??;
        Ok(fits && known)
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, AuthError> {
        let _place = self.places.try_acquire().map_err(|error| match error {
            TryAcquireError::NoPermits => AuthError::TooMany { retry_after_s: 2 },
            TryAcquireError::Closed => AuthError::Failed("password queue is closed".to_owned()),
        })?;
        let _turn = self.turns.acquire().await.map_err(fault)?;
        tokio::task::spawn_blocking(work).await.map_err(fault)
    }
}

fn fault(error: impl std::fmt::Display) -> AuthError {
    AuthError::Failed(error.to_string())
}

/// Checks what a person wants as password.
pub(crate) fn check_new(name: &str, password: &str) -> Result<(), AuthError> {
    let chars = password.chars().count();
    if !PASSWORD_CHARS.contains(&chars) {
        let (least, most) = (PASSWORD_CHARS.start(), PASSWORD_CHARS.end());
        return Err(AuthError::Refused(format!(
            "the password has {chars} characters; it needs {least} to {most}"
        )));
    }
    if password.to_lowercase().contains(&name.to_lowercase()) && name.chars().count() > 3 {
        return Err(AuthError::Refused("the password contains the user's name".to_owned()));
    }
    let mut chars: Vec<char> = password.chars().collect();
    chars.sort_unstable();
    chars.dedup();
    if chars.len() < 5 {
        return Err(AuthError::Refused(
            "the password repeats the same few characters; use five different ones at least"
                .to_owned(),
        ));
    }
    Ok(())
}
