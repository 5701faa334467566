//! `Idempotency-Key`: a POST that is sent again is not done again.
//!
//! Answers are kept in memory, so a restart forgets them; what must hold beyond
//! that is unique by itself (idents, names, messages). A request with a key runs
//! to its end even where its client goes away, so that its outcome is known.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fieldline_auth::IdentityKind;
use fieldline_model::AccountId;
use hyper::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use crate::problem::Problem;

/// How long an answer is kept.
const AGE_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Most answers kept of one account; its oldest go first.
const ANSWERS_MAX: usize = 10_000;
/// Most bytes of answers kept of one account; its oldest go first.
const BYTES_MAX: usize = 8 << 20;
/// Most accounts whose answers are kept; those of the one that was quiet for longest go first.
const ACCOUNTS_MAX: usize = 256;
/// Longest key.
const KEY_BYTES_MAX: usize = 200;

/// Who sent which key.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    account: AccountId,
    caller: Uuid,
    key: Arc<str>,
}

/// What became of a request, for [`Idempotency::finish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It was answered.
    Answered,
    /// It was answered with a secret, which is not kept.
    Secret,
    /// It did not end in time: whether anything was changed is not known, so the key stays.
    Unknown,
}

#[derive(Clone)]
struct Answer {
    fingerprint: u128,
    at: Instant,
    outcome: Outcome,
}

#[derive(Clone)]
enum Outcome {
    Running,
    Done {
        status: StatusCode,
        headers: HeaderMap,
        body: Bytes,
    },
    /// Done, and its answer held a secret, which is not kept.
    Secret,
    /// It broke off: it may have been done.
    Unknown,
}

/// The answers of one account.
#[derive(Default)]
struct Kept {
    answers: HashMap<Key, Answer>,
    order: VecDeque<(Key, Instant)>,
    bytes: usize,
    /// When it last sent a request with a key.
    used: Option<Instant>,
}

/// The answers of the last day, by account: a busy one pushes out only its own.
#[derive(Default)]
pub(crate) struct Idempotency(Mutex<HashMap<AccountId, Kept>>);

/// What to do with a request that has a key.
pub(crate) enum Begun {
    /// Do it, and then [`Idempotency::finish`].
    First(Key),
    /// Answer this: it was done before.
    Again { status: StatusCode, headers: HeaderMap, body: Bytes },
}

impl Idempotency {
    /// Begins a request with `key`.
    pub(crate) fn begin(
        &self,
        account: AccountId,
        caller: IdentityKind,
        key: &str,
        path: &str,
        body: &[u8],
    ) -> Result<Begun, Problem> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(Problem::bad_request(format!(
                "an Idempotency-Key has 1 to {KEY_BYTES_MAX} characters"
            )));
        }
        let caller = match caller {
            IdentityKind::User(id) => id.0,
            IdentityKind::Token(id) => id.0,
        };
        let key = Key { account, caller, key: key.into() };
        let mut hasher = Xxh3::new();
        hasher.update(path.as_bytes());
        hasher.update(&[0]);
        hasher.update(body);
        let fingerprint = hasher.digest128();
        let mut accounts = self.0.lock();
        make_room(&mut accounts, account);
        let kept = accounts.entry(account).or_default();
        kept.used = Some(Instant::now());
        kept.forget();
        if let Some(answer) = kept.answers.get(&key) {
            if answer.fingerprint != fingerprint {
                return Err(Problem::invalid(
                    "this Idempotency-Key was used for another request; use a fresh one",
                ));
            }
            return match &answer.outcome {
                Outcome::Done { status, headers, body } => Ok(Begun::Again {
                    status: *status,
                    headers: headers.clone(),
                    body: body.clone(),
                }),
                Outcome::Running => Err(Problem::repeated(
                    "the same request is running; its answer comes to the first",
                )
                .retry_after(1)),
                Outcome::Secret => Err(Problem::repeated(
                    "this was done already; its secret was shown once and is kept nowhere",
                )),
                Outcome::Unknown => Err(Problem::repeated(
                    "the same request broke off, and may have been done: look whether it was; \
                     if not, send it with a fresh key",
                )),
            };
        }
        let at = Instant::now();
        kept.answers.insert(key.clone(), Answer { fingerprint, at, outcome: Outcome::Running });
        kept.order.push_back((key.clone(), at));
        Ok(Begun::First(key))
    }

    /// Keeps the answer of a request that [`Idempotency::begin`] called the first.
    pub(crate) fn finish(
        &self,
        key: &Key,
        status: StatusCode,
        headers: &HeaderMap,
        body: &Bytes,
        ending: Ending,
    ) {
        let mut accounts = self.0.lock();
        let Some(kept) = accounts.get_mut(&key.account) else { return };
        let Some(answer) = kept.answers.get_mut(key) else { return };
        // What was refused before it began, or for now, is done anew.
        let anew =
            matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS);
        answer.outcome = match ending {
            Ending::Unknown => Outcome::Unknown,
            Ending::Secret if status.is_success() => Outcome::Secret,
            _ if status == StatusCode::INTERNAL_SERVER_ERROR => Outcome::Unknown,
            _ if anew => {
                kept.answers.remove(key);
                kept.forget();
                return;
            }
            _ => {
                kept.bytes += body.len();
                Outcome::Done { status, headers: headers.clone(), body: body.clone() }
            }
        };
        kept.forget();
    }
}

/// Lets go of the quietest account, should a new one be one too many.
fn make_room(accounts: &mut HashMap<AccountId, Kept>, account: AccountId) {
    if accounts.len() < ACCOUNTS_MAX || accounts.contains_key(&account) {
        return;
    }
    let quietest = accounts.iter().min_by_key(|(_, kept)| kept.used).map(|(id, _)| *id);
    if let Some(quietest) = quietest {
        accounts.remove(&quietest);
    }
}

impl Kept {
    fn forget(&mut self) {
        while let Some((key, at)) = self.order.front() {
            let full = self.order.len() > ANSWERS_MAX || self.bytes > BYTES_MAX;
            if !full && at.elapsed() < AGE_MAX {
                break;
            }
            // The same key may have been used anew since: then this place is an old one.
            if self.answers.get(key).is_some_and(|answer| answer.at == *at)
                && let Some(Answer { outcome: Outcome::Done { body, .. }, .. }) =
                    self.answers.remove(key)
            {
                self.bytes -= body.len();
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_model::TokenId;

    use super::*;

    const CALLER: IdentityKind = IdentityKind::Token(TokenId::from_bytes([1; 16]));

    fn begin(kept: &Idempotency, key: &str, body: &str) -> Result<Begun, Problem> {
        kept.begin(AccountId::from_bytes([1; 16]), CALLER, key, "/x", body.as_bytes())
    }

    fn first(begun: Result<Begun, Problem>) -> Key {
        match begun {
            Ok(Begun::First(key)) => key,
            Ok(Begun::Again { .. }) => panic!("was taken for a repetition"),
            Err(problem) => panic!("{problem:?}"),
        }
    }

    #[test]
    fn the_same_again_gets_the_same_answer() {
        let kept = Idempotency::default();
        let key = first(begin(&kept, "k", "a"));
        assert_eq!(begin(&kept, "k", "a").err().unwrap().status(), StatusCode::CONFLICT);
        let body = Bytes::from_static(b"done");
        kept.finish(&key, StatusCode::CREATED, &HeaderMap::new(), &body, Ending::Answered);
        assert!(
            matches!(begin(&kept, "k", "a"), Ok(Begun::Again { body: same, .. }) if same == body)
        );
        let other = begin(&kept, "k", "b").err().unwrap();
        assert_eq!(other.status(), StatusCode::UNPROCESSABLE_ENTITY);
    }

    #[test]
    fn what_was_refused_is_tried_anew_and_a_secret_is_not_kept() {
        let kept = Idempotency::default();
        let (none, nothing) = (HeaderMap::new(), Bytes::new());
        let key = first(begin(&kept, "k", "a"));
        kept.finish(&key, StatusCode::SERVICE_UNAVAILABLE, &none, &nothing, Ending::Answered);
        let key = first(begin(&kept, "k", "a"));
        kept.finish(&key, StatusCode::CREATED, &none, &Bytes::from_static(b"flt_"), Ending::Secret);
        assert_eq!(begin(&kept, "k", "a").err().unwrap().status(), StatusCode::CONFLICT);
    }

    #[test]
    fn what_may_have_been_done_is_not_done_again() {
        let kept = Idempotency::default();
        let (none, nothing) = (HeaderMap::new(), Bytes::new());
        let key = first(begin(&kept, "k", "a"));
        kept.finish(&key, StatusCode::SERVICE_UNAVAILABLE, &none, &nothing, Ending::Unknown);
        let problem = begin(&kept, "k", "a").err().unwrap();
        assert_eq!(problem.status(), StatusCode::CONFLICT);
        assert!(problem.detail().contains("may have been done"));
        let key = first(begin(&kept, "l", "a"));
        kept.finish(&key, StatusCode::INTERNAL_SERVER_ERROR, &none, &nothing, Ending::Answered);
        assert_eq!(begin(&kept, "l", "a").err().unwrap().status(), StatusCode::CONFLICT);
    }

    #[test]
    fn what_is_kept_is_bounded_by_account() {
        let kept = Idempotency::default();
        let quiet = AccountId::from_bytes([2; 16]);
        let quiet = |body: &str| kept.begin(quiet, CALLER, "k", "/x", body.as_bytes());
        let key = first(quiet("a"));
        let none = HeaderMap::new();
        kept.finish(&key, StatusCode::OK, &none, &Bytes::from_static(b"done"), Ending::Answered);
        let body = Bytes::from(vec![0; 4 << 20]);
        for n in 0..20 {
            let key = first(begin(&kept, &n.to_string(), "a"));
            kept.finish(&key, StatusCode::OK, &none, &body, Ending::Answered);
        }
        let busy = AccountId::from_bytes([1; 16]);
        assert!(kept.0.lock().get(&busy).unwrap().bytes <= BYTES_MAX);
        for n in 0..ANSWERS_MAX + 50 {
            first(begin(&kept, &format!("x{n}"), "a"));
        }
        first(begin(&kept, "last", "a"));
        assert!(kept.0.lock().get(&busy).unwrap().answers.len() <= ANSWERS_MAX + 1);
        assert!(matches!(quiet("a"), Ok(Begun::Again { .. })), "the other's answers stay");
        for n in 0..=u8::MAX {
            let account = AccountId::from_bytes([n; 16]);
            drop(kept.begin(account, CALLER, "k", "/x", b"a"));
            drop(kept.begin(account, CALLER, "k2", "/x", b"a"));
        }
        assert!(kept.0.lock().len() <= ACCOUNTS_MAX);
    }
}
