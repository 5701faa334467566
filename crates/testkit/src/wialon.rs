//! What a Wialon IPS tracker writes and reads, by hand.

use fieldline_model::Timestamp;

use crate::route::Sample;
use crate::teltonika::{Record, crc16};

/// The parameter that carries a record's sequence number.
pub const SEQUENCE_PARAM: &str = "seq";

/// Which version of the protocol a tracker speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.1: no checksums.
    One,
    /// 2.0: each body ends with a CRC.
    Two,
}

/// Year since 2000, month, day, hour, minute, second.
fn civil(at: Timestamp) -> (i64, i64, i64, i64, i64, i64) {
    let seconds = at.as_seconds();
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days from 0000-03-01, in eras of 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year.rem_euclid(100), month, day, rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Degrees and minutes as `DDMM.MMMMM`, with `width` digits of degrees.
fn degrees(value: f64, width: usize) -> String {
    let value = value.abs();
    let whole = value.floor();
    format!("{whole:0width$}{minutes:08.5}", minutes = (value - whole) * 60.0)
}

/// The sixteen fields of a D message.
#[must_use]
pub fn fields(record: &Record) -> String {
    let Record { at, sample, sequence } = record;
    let Sample { latitude, longitude, speed_kmh, direction, altitude_m, .. } = sample;
    let (year, month, day, hour, minute, second) = civil(*at);
    let (north, east) =
        (if *latitude < 0.0 { 'S' } else { 'N' }, if *longitude < 0.0 { 'W' } else { 'E' });
    format!(
        "{day:02}{month:02}{year:02};{hour:02}{minute:02}{second:02};{};{north};{};{east};\
         {speed_kmh:.0};{:.0};{altitude_m:.0};{};{:.2};{};0;;NA;\
         pwr_ext:2:{:.3},pwr_int:2:{:.3},mileage:2:{:.3},{SEQUENCE_PARAM}:1:{sequence}",
        degrees(*latitude, 2),
        degrees(*longitude, 3),
        direction.floor(),
        sample.satellites,
        sample.hdop,
        u8::from(sample.ignition),
        f64::from(sample.external_mv) / 1_000.0,
        f64::from(sample.battery_mv) / 1_000.0,
        f64::from(sample.odometer_m) / 1_000.0,
    )
}

/// A packet `#TYPE#body` and its line end; 2.0 adds the CRC after a last `;`.
fn packet(version: Version, kind: &str, body: &str) -> String {
    match version {
        Version::One => format!("#{kind}#{body}\r\n"),
        Version::Two => {
            let body = if kind == "B" { body.to_owned() } else { format!("{body};") };
            format!("#{kind}#{body}{:04X}\r\n", crc16(body.as_bytes()))
        }
    }
}

/// The first line of a connection.
#[must_use]
pub fn login(version: Version, ident: &str) -> String {
    match version {
        Version::One => packet(version, "L", &format!("{ident};NA")),
        Version::Two => packet(version, "L", &format!("2.0;{ident};NA")),
    }
}

/// The packet of one record, or of several.
#[must_use]
pub fn data(version: Version, records: &[Record]) -> String {
    match records {
        [record] => packet(version, "D", &fields(record)),
        records => {
            let bodies: Vec<String> = records.iter().map(fields).collect();
            match version {
                Version::One => packet(version, "B", &bodies.join("|")),
                Version::Two => packet(version, "B", &format!("{}|", bodies.join("|"))),
            }
        }
    }
}

/// A datagram: one packet after the device's name.
#[must_use]
pub fn datagram(version: Version, ident: &str, records: &[Record]) -> String {
    let head = if version == Version::Two { "2.0;" } else { "" };
    format!("{head}{ident}{}", data(version, records))
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromServer {
    /// The login was accepted or refused.
    Login(bool),
    /// So many records were accepted.
    Accepted(u32),
    /// A text for the driver, which our trackers take for a command.
    Command(String),
    /// Anything else.
    Other(String),
}

/// Takes one line of the server off `buffer`; `None` until it is whole.
pub fn take_from_server(buffer: &mut Vec<u8>) -> Option<FromServer> {
    let end = buffer.iter().position(|byte| *byte == b'\n')?;
    let line: Vec<u8> = buffer.drain(..=end).collect();
    let line = String::from_utf8_lossy(&line);
    let line = line.trim_end();
    let mut parts = line.splitn(3, '#').skip(1);
    let (kind, body) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    Some(match kind {
        "AL" => FromServer::Login(body == "1"),
        "AD" | "ASD" => FromServer::Accepted(u32::from(body == "1")),
        "AB" => FromServer::Accepted(body.parse().unwrap_or(0)),
        "M" => FromServer::Command(body.to_owned()),
        _ => FromServer::Other(line.to_owned()),
    })
}

/// A text to the server, such as the answer to a command.
#[must_use]
pub fn text(version: Version, text: &str) -> String {
    packet(version, "M", text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::route::Vehicle;

    #[test]
    fn a_day_is_written_as_trackers_write_it() {
        let mut vehicle = Vehicle::new(1, 1);
        let sample = Sample { latitude: -56.5, longitude: 9.25, ..vehicle.drive(1.0) };
        let at: Timestamp = "2024-02-29T23:59:58Z".parse().unwrap();
        let record = Record { at, sample, sequence: 7 };
        let body = fields(&record);
        assert!(body.starts_with("290224;235958;5630.00000;S;00915.00000;E;"), "{body}");
        assert!(body.ends_with(",seq:1:7"), "{body}");
        assert_eq!(body.split(';').count(), 16);
        let two = data(Version::Two, &[record, record]);
        assert_eq!(two.matches('|').count(), 2);
    }

    proptest! {
        #[test]
        fn anything_from_the_server_is_survived(mut bytes: Vec<u8>) {
            for _ in 0..10 {
                let _word = take_from_server(&mut bytes);
            }
        }

        #[test]
        fn days_are_those_of_the_calendar(second in 946_684_800_i64..4_102_444_800) {
            let at = Timestamp::from_seconds(second);
            let (year, month, day, hour, minute, seconds) = civil(at);
            let text = format!("20{year:02}-{month:02}-{day:02}T{hour:02}:{minute:02}:{seconds:02}Z");
            prop_assert_eq!(text, at.to_string());
        }
    }
}
