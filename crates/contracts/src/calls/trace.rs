//! What a piece of work belongs to, as W3C Trace Context writes it: it is carried from node to node.

use std::fmt;
use std::str::FromStr;

tokio::task_local! {
    static CURRENT: TraceParent;
}

/// A `traceparent`: the trace, the step that caused this one, and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace: u128,
    step: u64,
    flags: u8,
}

/// A text is no `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no traceparent: expected 00-TRACE-STEP-FLAGS in lower-case hexadecimal digits")]
pub struct TraceError;

impl TraceParent {
    /// Bytes of the text of version 0.
    const TEXT_BYTES: usize = 55;

    /// What the present task belongs to, if that is known.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|current| *current).ok()
    }

    /// A further step of what the present task belongs to, or the first of something new.
    #[must_use]
    pub fn next() -> Self {
        let fresh = || Self { trace: rand::random::<u128>() | 1, step: 0, flags: 1 };
        let current = Self::current().unwrap_or_else(fresh);
        Self { step: rand::random::<u64>() | 1, ..current }
    }

    /// Runs `work` as a part of this.
    pub async fn scope<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }

    /// The trace, as 32 hexadecimal digits: the same on all nodes.
    #[must_use]
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.step, self.flags)
    }
}

impl FromStr for TraceParent {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, TraceError> {
        // A later version may say more after a further `-`.
        let (known, more) = text.split_at_checked(Self::TEXT_BYTES).ok_or(TraceError)?;
        let mut parts = known.split('-');
        let mut part = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits)?;
            let hexadecimal =
                part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            u128::from_str_radix(part, 16).ok().filter(|_| hexadecimal)
        };
        let (version, trace) = (part(2).ok_or(TraceError)?, part(32).ok_or(TraceError)?);
        let (step, flags) = (part(16).ok_or(TraceError)?, part(2).ok_or(TraceError)?);
        let complete = match version {
            0 => more.is_empty(),
            0xff => false,
            _ => more.is_empty() || more.starts_with('-'),
        };
        let (step, flags) = (
            u64::try_from(step).map_err(|_| TraceError)?,
            u8::try_from(flags).map_err(|_| TraceError)?,
        );
        if complete && trace != 0 && step != 0 {
            Ok(Self { trace, step, flags })
        } else {
            Err(TraceError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_as_it_is_written() {
        let read: TraceParent = TEXT.parse().unwrap();
        assert_eq!(read.to_string(), TEXT);
        assert_eq!(read.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        let fresh = TraceParent::next();
        assert_eq!(fresh.to_string().parse(), Ok(fresh));
        let later = TEXT.replacen("00-", "01-", 1) + "-more";
        assert_eq!(later.parse::<TraceParent>(), Ok(read));
    }

    #[test]
    fn what_is_none_is_refused() {
        let zero_trace = format!("00-{:032x}-b7ad6b7169203331-01", 0);
        let zero_step = format!("00-0af7651916cd43dd8448eb211c80319c-{:016x}-01", 0);
        for text in [
            "",
            "00",
            &TEXT.replacen("00-", "ff-", 1),
            &TEXT.replacen("0af", "0AF", 1),
            &TEXT.replacen("0af", "+af", 1),
            &TEXT.replacen('-', "x", 2),
            &format!("{TEXT}-more"),
            &format!("{TEXT}0"),
            &TEXT.replacen("0a", "é", 1),
            &zero_trace,
            &zero_step,
        ] {
            assert_eq!(text.parse::<TraceParent>(), Err(TraceError), "{text}");
        }
    }

    #[tokio::test]
    async fn a_task_knows_what_it_belongs_to() {
        assert_eq!(TraceParent::current(), None);
        let trace: TraceParent = TEXT.parse().unwrap();
        let step = trace.scope(async { TraceParent::next() }).await;
        assert_eq!(step.trace_id(), trace.trace_id());
        assert_ne!(step, trace);
    }
}
