//! Which partition a message belongs to.
//!
//! A day has a partition of its own from a month before the tables were made on. What is older shares one a
//! year: a device whose clock is wrong, or an import of years ago, must not make thousands of tables. The
//! first day is chosen once, and stored.

use fieldline_model::Timestamp;

const DAY_MICROS: i64 = 86_400 * 1_000_000;

/// 2100-01-01: what is later shares a partition.
const LATE_DAY: i32 = 47_482;

/// A month: what devices had stored when they were moved here.
const DAYS_BEFORE: i32 = 31;

/// Number of a partition: days since 1970; a year below zero; or one of the two at the ends. Stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Bucket(pub(crate) i32);

/// All before 1970.
const ANCIENT: Bucket = Bucket(-1);
/// All from [`LATE_DAY`] on.
const FUTURE: Bucket = Bucket(i32::MAX);

/// How times fall into buckets in one database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Calendar {
    /// The first day with a partition of its own.
    pub(crate) first_day: i32,
}

/// The day of an instant.
fn day_of(at: i64) -> i64 {
    at.div_euclid(DAY_MICROS)
}

/// The year that a day since 1970 is in, and the day that it began with.
fn year_of(day: i32) -> (i32, i32) {
    // A year too far at most.
    let mut year = 1970 + day / 365;
    while first_of(year) > day {
        year -= 1;
    }
    (year, first_of(year))
}

/// The day, since 1970, that `year` begins with.
const fn first_of(year: i32) -> i32 {
    let before = year - 1;
    (year - 1970) * 365 + (before / 4 - 1969 / 4) - (before / 100 - 1969 / 100)
        + (before / 400 - 1969 / 400)
}

impl Calendar {
    /// For tables that are made at `now`.
    pub(crate) fn beginning(now: Timestamp) -> Self {
        let today = i32::try_from(day_of(now.as_micros())).unwrap_or(0);
        Self { first_day: (today - DAYS_BEFORE).clamp(0, LATE_DAY) }
    }

    pub(crate) fn bucket(self, at: i64) -> Bucket {
        let day = day_of(at);
        if day < 0 {
            return ANCIENT;
        }
        let day = i32::try_from(day).unwrap_or(i32::MAX);
        if day >= LATE_DAY {
            FUTURE
        } else if day >= self.first_day {
            Bucket(day)
        } else {
            Bucket(-year_of(day).0)
        }
    }

    /// From when, and until before when; `None` where there is no bound.
    pub(crate) fn bounds(self, bucket: Bucket) -> (Option<i64>, Option<i64>) {
        let at = |day: i32| i64::from(day) * DAY_MICROS;
        match bucket {
            ANCIENT => (None, Some(0)),
            FUTURE => (Some(at(LATE_DAY)), None),
            Bucket(day) if day >= 0 => (Some(at(day)), Some(at(day + 1))),
            Bucket(minus_year) => {
                let year = -minus_year;
                (Some(at(first_of(year))), Some(at(first_of(year + 1).min(self.first_day))))
            }
        }
    }

    /// The bounds as numbers that can be compared.
    pub(crate) fn range(self, bucket: Bucket) -> (i64, i64) {
        let (low, high) = self.bounds(bucket);
        (low.unwrap_or(i64::MIN), high.unwrap_or(i64::MAX))
    }
}

impl Bucket {
    /// The name of its table.
    pub(crate) fn table(self) -> String {
        match self {
            ANCIENT => "messages_before_1970".to_owned(),
            FUTURE => "messages_after_2100".to_owned(),
            Self(day) if day >= 0 => {
                let text = Timestamp::from_seconds(i64::from(day) * 86_400).to_string();
                let digits: String = text.chars().take(10).filter(char::is_ascii_digit).collect();
                format!("messages_{digits}")
            }
            Self(minus_year) => format!("messages_{}", -minus_year),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_instant_is_within_its_bucket(at in -DAY_MICROS * 1_000..DAY_MICROS * 60_000, first_day in 0..LATE_DAY) {
            let calendar = Calendar { first_day };
            let bucket = calendar.bucket(at);
            let (low, high) = calendar.range(bucket);
            prop_assert!(low <= at && at < high, "{low} {at} {high} {bucket:?}");
            prop_assert_eq!(calendar.bucket(low.max(0)), if bucket == ANCIENT { calendar.bucket(0) } else { bucket });
            prop_assert_eq!(bucket, calendar.bucket(high - 1));
        }
    }

    #[test]
    fn tables_are_named_after_their_time() {
        let calendar = Calendar { first_day: 20_000 };
        let table = |text: &str| {
            let at: Timestamp = text.parse().unwrap();
            calendar.bucket(at.as_micros()).table()
        };
        assert_eq!(table("2026-11-20T23:59:59Z"), "messages_20261120");
        assert_eq!(table("2003-01-01T00:00:00Z"), "messages_2003");
        assert_eq!(table("2024-10-03T23:00:00Z"), "messages_2024");
        assert_eq!(table("2024-10-04T00:00:00Z"), "messages_20241004");
        assert_eq!(calendar.bucket(i64::MIN).table(), "messages_before_1970");
        assert_eq!(calendar.bucket(i64::MAX).table(), "messages_after_2100");
        assert_eq!(
            (first_of(1970), first_of(1971), first_of(2000), first_of(2001)),
            (0, 365, 10_957, 11_323)
        );
    }
}
