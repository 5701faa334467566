//! Calendar arithmetic.

/// Days from 1970-01-01 to a date of the Gregorian calendar.
pub(crate) fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the leap day is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Whether there is such a day, in the years 1 to 9999.
pub(crate) fn is_date(year: i64, month: i64, day: i64) -> bool {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return false,
    };
    (1..=9_999).contains(&year) && (1..=days).contains(&day)
}

/// A time being read piece by piece by a pattern.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    micros: i64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { year: 1970, month: 1, day: 1, hour: 0, minute: 0, second: 0, micros: 0 }
    }
}

impl Clock {
    /// Reads `text` by `pattern`: `YYYY YY MM DD hh mm ss` are digits, a final `.f` is an optional
    /// fraction, all else must stand as it is. Two digits of a year mean 1980 to 2079.
    pub(crate) fn read(&mut self, pattern: &str, text: &[u8]) -> Option<()> {
        let (pattern, fraction) = match pattern.strip_suffix(".f") {
            Some(pattern) => (pattern, true),
            None => (pattern, false),
        };
        let mut pattern = pattern.as_bytes();
        let mut text = text;
        while let Some((&letter, _)) = pattern.split_first() {
            let run = pattern.iter().take_while(|b| **b == letter).count();
            let field = match letter {
                b'Y' => &mut self.year,
                b'M' => &mut self.month,
                b'D' => &mut self.day,
                b'h' => &mut self.hour,
                b'm' => &mut self.minute,
                b's' => &mut self.second,
                literal => {
                    let (first, rest) = text.split_first()?;
                    if *first != literal {
                        return None;
                    }
                    (text, pattern) = (rest, pattern.get(1..)?);
                    continue;
                }
            };
            let digits = text.get(..run)?;
            let mut number = 0_i64;
            for digit in digits {
                if !digit.is_ascii_digit() {
                    return None;
                }
                number = number.checked_mul(10)?.checked_add(i64::from(digit - b'0'))?;
            }
            if letter == b'Y' && run == 2 {
                number += if number >= 80 { 1900 } else { 2000 };
            }
            *field = number;
            (text, pattern) = (text.get(run..)?, pattern.get(run..)?);
        }
        if fraction && let Some(digits) = text.strip_prefix(b".") {
            let mut unit = 100_000;
            for digit in digits {
                if !digit.is_ascii_digit() {
                    return None;
                }
                self.micros += i64::from(digit - b'0') * unit;
                unit /= 10;
            }
            text = &[];
        }
        text.is_empty().then_some(())
    }

    /// Microseconds since 1970, if date and time exist.
    pub(crate) fn micros(&self) -> Option<i64> {
        let in_day = (0..24).contains(&self.hour)
            && (0..60).contains(&self.minute)
            && (0..60).contains(&self.second);
        if !in_day || !is_date(self.year, self.month, self.day) {
            return None;
        }
        let days = days_from_civil(self.year, self.month, self.day);
        let seconds = days * 86_400 + self.hour * 3_600 + self.minute * 60 + self.second;
        Some(seconds * 1_000_000 + self.micros)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pattern: &str, text: &str) -> Option<String> {
        let mut clock = Clock::default();
        clock.read(pattern, text.as_bytes())?;
        Some(fieldline_model::Timestamp::from_micros(clock.micros()?).to_string())
    }

    #[test]
    fn patterns_read_what_they_say() {
        let time = |text: &str| Some(text.to_owned());
        assert_eq!(read("DDMMYYhhmmss", "290224235959"), time("2024-02-29T23:59:59Z"));
        assert_eq!(
            read("YYYY-MM-DD hh:mm:ss", "1999-12-31 00:00:01"),
            time("1999-12-31T00:00:01Z")
        );
        assert_eq!(read("hhmmss.f", "010203.25"), time("1970-01-01T01:02:03.25Z"));
        assert_eq!(read("DDMMYY", "290223"), None);
        assert_eq!(read("hhmmss", "240000"), None);
        assert_eq!(read("hhmmss", "0101011"), None);
    }

    proptest! {
        #[test]
        fn days_agree_with_the_calendar(days in -500_000_i64..2_500_000) {
            let at = fieldline_model::Timestamp::from_seconds(days * 86_400).to_string();
            let mut clock = Clock::default();
            prop_assume!(!at.starts_with('-'));
            prop_assert_eq!(clock.read("YYYY-MM-DDThh:mm:ssZ", at.as_bytes()), Some(()));
            prop_assert_eq!(clock.micros(), Some(days * 86_400_000_000));
        }

        #[test]
        fn any_text_and_pattern_are_survived(pattern in "[YMDhms.f:x-]{0,40}", text: Vec<u8>) {
            let mut clock = Clock::default();
            let _read = clock.read(&pattern, &text).and_then(|()| clock.micros());
        }
    }
}
