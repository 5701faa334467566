//! Wialon IPS data lines, as one would write them in Rust.

use std::sync::{Arc, LazyLock};

use fieldline_model::{Decimal, Decoded, ParamName, Params, Timestamp, Value};

struct Names {
    latitude: ParamName,
    longitude: ParamName,
    speed: ParamName,
    direction: ParamName,
    altitude: ParamName,
    satellites: ParamName,
    hdop: ParamName,
    inputs: ParamName,
    outputs: ParamName,
    adc: ParamName,
    driver: ParamName,
}

static NAMES: LazyLock<Option<Names>> = LazyLock::new(|| {
    let name = |text: &str| ParamName::new(text).ok();
    Some(Names {
        latitude: name("position.latitude")?,
        longitude: name("position.longitude")?,
        speed: name("position.speed")?,
        direction: name("position.direction")?,
        altitude: name("position.altitude")?,
        satellites: name("position.satellites")?,
        hdop: name("position.hdop")?,
        inputs: name("digital.inputs")?,
        outputs: name("digital.outputs")?,
        adc: name("adc")?,
        driver: name("driver.id")?,
    })
});

fn crc16(bytes: &[u8]) -> u16 {
    let mut crc = 0_u16;
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xA001 } else { crc >> 1 };
        }
    }
    crc
}

fn known(text: &str) -> Option<&str> {
    (!text.is_empty() && text != "NA").then_some(text)
}

/// The messages of one line of type SD, D or B.
pub(crate) fn decode(line: &[u8]) -> Option<Vec<Decoded>> {
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\n').trim_end_matches('\r');
    let (kind, body) = line.strip_prefix('#')?.split_once('#')?;
    match kind {
        "SD" | "D" => {
            let fields = if kind == "D" { 16 } else { 10 };
            let part = if body.split(';').count() == fields + 1 {
                let (part, stated) = body.rsplit_once(';')?;
                check(body.get(..=part.len())?, stated)?;
                part
            } else {
                body
            };
            Some(vec![record(part, fields)?])
        }
        "B" => {
            let (part, last) = body.rsplit_once('|').unwrap_or(("", body));
            let part = if !last.is_empty() && !last.contains(';') {
                check(body.get(..=part.len())?, last)?;
                part
            } else {
                body
            };
            let records = part.split('|').filter(|one| !one.is_empty());
            records
                .map(|one| record(one, if one.split(';').count() == 10 { 10 } else { 16 }))
                .collect()
        }
        _ => None,
    }
}

fn check(part: &str, stated: &str) -> Option<()> {
    let stated = stated.strip_prefix("0x").unwrap_or(stated);
    (u16::from_str_radix(stated, 16).ok()? == crc16(part.as_bytes())).then_some(())
}

fn record(body: &str, fields: usize) -> Option<Decoded> {
    if body.split(';').count() != fields {
        return None;
    }
    let names = NAMES.as_ref()?;
    let mut field = body.split(';');
    let timestamp = time(field.next()?, field.next()?)?;
    let mut params = Params::with_capacity(24);
    for (name, limit) in [(&names.latitude, 90), (&names.longitude, 180)] {
        let (text, hemisphere) = (field.next()?, field.next()?);
        if let Some(text) = known(text) {
            params.push(name.clone(), degrees(text, hemisphere, limit)?);
        }
    }
    for name in [&names.speed, &names.direction, &names.altitude, &names.satellites] {
        push_number(&mut params, name, field.next()?)?;
    }
    if fields == 16 {
        for name in [&names.hdop, &names.inputs, &names.outputs] {
            push_number(&mut params, name, field.next()?)?;
        }
        if let Some(list) = known(field.next()?) {
            let item = |text: &str| match known(text) {
                None => Some(serde_json::Value::Null),
                Some(text) => number(text).map(|value| value.to_json()),
            };
            let list: Option<Vec<_>> = list.split(',').map(item).collect();
            params.push(names.adc.clone(), Value::Json(Arc::new(list?.into())));
        }
        if let Some(driver) = known(field.next()?) {
            params.push(names.driver.clone(), Value::from(driver));
        }
        for param in known(field.next()?).unwrap_or("").split(',').filter(|p| !p.is_empty()) {
            let mut parts = param.splitn(3, ':');
            let (name, kind, value) = (parts.next()?, parts.next()?, parts.next()?);
            let Some(value) = known(value) else { continue };
            let value = if kind == "3" { Value::from(value) } else { number(value)? };
            params.push(ParamName::new(name).ok()?, value);
        }
    }
    Some(Decoded { timestamp, params })
}

fn push_number(params: &mut Params, name: &ParamName, text: &str) -> Option<()> {
    if let Some(text) = known(text) {
        params.push(name.clone(), number(text)?);
    }
    Some(())
}

fn number(text: &str) -> Option<Value> {
    let decimal = if text.contains(',') {
        Decimal::parse(&text.replace(',', "."))
    } else {
        Decimal::parse(text)
    }?;
    Some(if decimal.scale() == 0 {
        Value::Int(decimal.mantissa())
    } else {
        Value::Decimal(decimal)
    })
}

fn pair(text: &str, at: usize) -> Option<i64> {
    text.get(at..at + 2)?.parse().ok()
}

fn time(date: &str, time: &str) -> Option<Option<Timestamp>> {
    let (date, time) = match (known(date), known(time)) {
        (None, None) => return Some(None),
        (date, time) => (date?, time?),
    };
    let (day, month, year) = (pair(date, 0)?, pair(date, 2)?, pair(date, 4)? + 2_000);
    let (hour, minute, second) = (pair(time, 0)?, pair(time, 2)?, pair(time, 4)?);
    let years = if month <= 2 { year - 1 } else { year };
    let of_era = years.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = years.div_euclid(400) * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year
        - 719_468;
    Some(Some(Timestamp::from_seconds(days * 86_400 + hour * 3_600 + minute * 60 + second)))
}

fn degrees(text: &str, hemisphere: &str, limit: i128) -> Option<Value> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i128 = whole.parse().ok()?;
    let (mut minutes, mut unit) = (whole % 100, 1_i128);
    for digit in fraction.bytes() {
        minutes = minutes * 10 + i128::from(digit.is_ascii_digit().then(|| digit - b'0')?);
        unit *= 10;
    }
    let rounded = (minutes * 20_000_000 + 60 * unit) / (120 * unit);
    let units = whole / 100 * 10_000_000 + rounded;
    if units > limit * 10_000_000 {
        return None;
    }
    let negative = matches!(hemisphere, "S" | "W");
    Value::scaled(i64::try_from(if negative { -units } else { units }).ok()?, 7)
}
