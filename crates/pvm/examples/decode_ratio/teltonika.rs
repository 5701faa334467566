//! Teltonika codecs 8, 8E and 16, as one would write them in Rust.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::LazyLock;

use fieldline_model::{Decimal, Decoded, ParamName, Params, Timestamp, Value};

/// How an id's value is read.
#[derive(Clone, Copy)]
enum Kind {
    Unsigned,
    Bool,
    Signed,
}

struct Entry {
    name: ParamName,
    raw: ParamName,
    kind: Kind,
    scale: u8,
    except: &'static [i64],
}

const CODES: &[i64] = &[850, 2_000, 3_000, 4_000, 5_000];
const BLE_CODES: &[i64] = &[2_000, 3_000, 4_000];

type Row = (u16, &'static str, Kind, u8, &'static [i64]);

use Kind::{Bool, Signed, Unsigned};

#[rustfmt::skip]
const ROWS: &[Row] = &[
    (1, "digital.input.1", Bool, 0, &[]), (2, "digital.input.2", Bool, 0, &[]),
    (3, "digital.input.3", Bool, 0, &[]), (4, "digital.input.4", Bool, 0, &[]),
    (6, "analog.input.2", Unsigned, 3, &[]), (9, "analog.input.1", Unsigned, 3, &[]),
    (11, "gsm.iccid.high", Unsigned, 0, &[]), (14, "gsm.iccid.low", Unsigned, 0, &[]),
    (16, "odometer", Unsigned, 3, &[]), (17, "acceleration.x", Signed, 3, &[]),
    (18, "acceleration.y", Signed, 3, &[]), (19, "acceleration.z", Signed, 3, &[]),
    (21, "gsm.signal", Unsigned, 0, &[]), (25, "ble.temperature.1", Signed, 2, BLE_CODES),
    (26, "ble.temperature.2", Signed, 2, BLE_CODES), (27, "ble.temperature.3", Signed, 2, BLE_CODES),
    (28, "ble.temperature.4", Signed, 2, BLE_CODES), (30, "vehicle.trouble.count", Unsigned, 0, &[]),
    (31, "obd.load", Unsigned, 0, &[]), (32, "obd.coolant.temperature", Signed, 0, &[]),
    (36, "obd.rpm", Unsigned, 0, &[]), (37, "obd.speed", Unsigned, 0, &[]),
    (48, "obd.fuel.level", Unsigned, 0, &[]), (66, "external.voltage", Unsigned, 3, &[]),
    (67, "battery.voltage", Unsigned, 3, &[]), (68, "battery.current", Unsigned, 3, &[]),
    (69, "gnss.status", Unsigned, 0, &[]), (72, "temperature.1", Signed, 1, CODES),
    (73, "temperature.2", Signed, 1, CODES), (74, "temperature.3", Signed, 1, CODES),
    (75, "temperature.4", Signed, 1, CODES), (76, "temperature.sensor.1.id", Unsigned, 0, &[]),
    (77, "temperature.sensor.2.id", Unsigned, 0, &[]), (78, "ibutton", Unsigned, 0, &[]),
    (79, "temperature.sensor.3.id", Unsigned, 0, &[]), (80, "data.mode", Unsigned, 0, &[]),
    (81, "can.speed", Unsigned, 0, &[]), (83, "can.fuel.used", Unsigned, 1, &[]),
    (84, "can.fuel.volume", Unsigned, 1, &[]), (85, "can.rpm", Unsigned, 0, &[]),
    (87, "can.mileage", Unsigned, 3, &[]), (89, "can.fuel.level", Unsigned, 0, &[]),
    (113, "battery.level", Unsigned, 0, &[]), (179, "digital.output.1", Bool, 0, &[]),
    (180, "digital.output.2", Bool, 0, &[]), (181, "position.pdop", Unsigned, 1, &[]),
    (182, "position.hdop", Unsigned, 1, &[]), (199, "trip.odometer", Unsigned, 3, &[]),
    (200, "sleep.mode", Unsigned, 0, &[]), (205, "gsm.cellid", Unsigned, 0, &[]),
    (206, "gsm.lac", Unsigned, 0, &[]), (237, "gsm.network.type", Unsigned, 0, &[]),
    (239, "engine.ignition", Bool, 0, &[]), (240, "movement", Bool, 0, &[]),
    (241, "gsm.operator", Unsigned, 0, &[]), (246, "towing", Bool, 0, &[]),
    (247, "crash", Unsigned, 0, &[]), (249, "jamming", Bool, 0, &[]),
    (250, "trip.status", Unsigned, 0, &[]), (251, "idling", Bool, 0, &[]),
    (252, "unplugged", Bool, 0, &[]), (253, "green.driving.type", Unsigned, 0, &[]),
    (254, "green.driving.value", Unsigned, 2, &[]), (255, "overspeed.value", Unsigned, 0, &[]),
];

fn name(text: &str) -> ParamName {
    // The names above are short and without control characters.
    ParamName::new(text).unwrap_or_else(|_| unreachable!("a fixed name"))
}

struct Names {
    priority: ParamName,
    longitude: ParamName,
    latitude: ParamName,
    altitude: ParamName,
    direction: ParamName,
    satellites: ParamName,
    speed: ParamName,
    valid: ParamName,
    event: ParamName,
    generation: ParamName,
    entries: Vec<Option<Entry>>,
    vin: ParamName,
    beacons: ParamName,
}

static NAMES: LazyLock<Names> = LazyLock::new(|| {
    let mut entries: Vec<Option<Entry>> = (0..256).map(|_| None).collect();
    for (id, text, kind, scale, except) in ROWS {
        let entry = Entry {
            name: name(text),
            raw: name(&format!("io.{id}")),
            kind: *kind,
            scale: *scale,
            except,
        };
        if let Some(slot) = entries.get_mut(usize::from(*id)) {
            *slot = Some(entry);
        }
    }
    Names {
        priority: name("priority"),
        longitude: name("position.longitude"),
        latitude: name("position.latitude"),
        altitude: name("position.altitude"),
        direction: name("position.direction"),
        satellites: name("position.satellites"),
        speed: name("position.speed"),
        valid: name("position.valid"),
        event: name("event.id"),
        generation: name("generation.type"),
        entries,
        vin: name("vehicle.vin"),
        beacons: name("ble.beacons"),
    }
});

thread_local! {
    static UNKNOWN: RefCell<HashMap<u16, ParamName>> = RefCell::new(HashMap::new());
}

fn unknown(id: u16) -> ParamName {
    UNKNOWN.with_borrow_mut(|names| {
        names.entry(id).or_insert_with(|| name(&format!("io.{id}"))).clone()
    })
}

#[allow(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "a byte is below 256")]
const CRC: [u16; 256] = {
    let mut table = [0_u16; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u16;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xA001 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[allow(clippy::indexing_slicing, reason = "a byte is below 256")]
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| (crc >> 8) ^ CRC[usize::from((crc ^ u16::from(*byte)) & 0xFF)])
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn wide(&mut self, wide: bool) -> Option<u16> {
        if wide { self.u16() } else { self.u8().map(u16::from) }
    }
}

/// The messages of one TCP packet of codec 8, 8E or 16.
pub(crate) fn decode(frame: &[u8]) -> Option<Vec<Decoded>> {
    let mut reader = Reader(frame);
    if reader.u32()? != 0 {
        return None;
    }
    let length = usize::try_from(reader.u32()?).ok()?;
    let body = reader.bytes(length)?;
    if reader.u32()? != u32::from(crc16(body)) || !reader.0.is_empty() {
        return None;
    }
    let mut reader = Reader(body);
    let codec = reader.u8()?;
    if !matches!(codec, 0x08 | 0x8E | 0x10) {
        return None;
    }
    let count = reader.u8()?;
    let mut messages: Vec<Decoded> = Vec::with_capacity(usize::from(count));
    let mut room = 32;
    for _ in 0..count {
        let message = record(&mut reader, codec, room)?;
        room = message.params.len();
        messages.push(message);
    }
    (reader.u8()? == count && reader.0.is_empty()).then_some(messages)
}

fn record(reader: &mut Reader<'_>, codec: u8, room: usize) -> Option<Decoded> {
    let names = &*NAMES;
    let millis = i64::try_from(u64::from_be_bytes(reader.take()?)).ok()?;
    let mut params = Params::with_capacity(room);
    params.push(names.priority.clone(), Value::Int(i64::from(reader.u8()?)));
    let longitude = i32::from_be_bytes(reader.take()?);
    params.push(names.longitude.clone(), Value::scaled(i64::from(longitude), 7)?);
    let latitude = i32::from_be_bytes(reader.take()?);
    params.push(names.latitude.clone(), Value::scaled(i64::from(latitude), 7)?);
    let altitude = i16::from_be_bytes(reader.take()?);
    params.push(names.altitude.clone(), Value::Int(i64::from(altitude)));
    params.push(names.direction.clone(), Value::Int(i64::from(reader.u16()?)));
    let satellites = reader.u8()?;
    params.push(names.satellites.clone(), Value::Int(i64::from(satellites)));
    params.push(names.speed.clone(), Value::Int(i64::from(reader.u16()?)));
    params.push(names.valid.clone(), Value::Bool(satellites > 0));
    let wide_ids = codec != 0x08;
    let wide_counts = codec == 0x8E;
    params.push(names.event.clone(), Value::Int(i64::from(reader.wide(wide_ids)?)));
    if codec == 0x10 {
        params.push(names.generation.clone(), Value::Int(i64::from(reader.u8()?)));
    }
    let _total = reader.wide(wide_counts)?;
    for width in [1_u32, 2, 4, 8] {
        for _ in 0..reader.wide(wide_counts)? {
            let id = reader.wide(wide_ids)?;
            let raw = match width {
                1 => u64::from(reader.u8()?),
                2 => u64::from(reader.u16()?),
                4 => u64::from(reader.u32()?),
                _ => u64::from_be_bytes(reader.take()?),
            };
            entry(&mut params, id, raw, width);
        }
    }
    if codec == 0x8E {
        for _ in 0..reader.u16()? {
            let id = reader.u16()?;
            let length = usize::from(reader.u16()?);
            let bytes = reader.bytes(length)?;
            match (id, std::str::from_utf8(bytes)) {
                (256, Ok(text)) => params.push(names.vin.clone(), Value::from(text)),
                (385, _) => params.push(names.beacons.clone(), Value::from(bytes)),
                _ => params.push(unknown(id), Value::from(bytes)),
            }
        }
    }
    Some(Decoded { timestamp: Some(Timestamp::from_millis(millis)), params })
}

fn entry(params: &mut Params, id: u16, raw: u64, width: u32) {
    let Some(Some(entry)) = NAMES.entries.get(usize::from(id)) else {
        return params.push(unknown(id), Value::from(raw));
    };
    let number = match entry.kind {
        Bool if raw <= 1 => return params.push(entry.name.clone(), Value::Bool(raw == 1)),
        Bool => return params.push(entry.raw.clone(), Value::from(raw)),
        Unsigned => match i64::try_from(raw) {
            Ok(number) => number,
            Err(_) => return params.push(entry.raw.clone(), Value::from(raw)),
        },
        Signed => {
            let unused = 64 - 8 * width;
            (raw << unused).cast_signed() >> unused
        }
    };
    if entry.except.contains(&number) {
        return params.push(entry.raw.clone(), Value::from(raw));
    }
    let value = match entry.scale {
        0 => Value::Int(number),
        scale => Decimal::new(number, scale).map_or(Value::Int(number), Value::Decimal),
    };
    params.push(entry.name.clone(), value);
}
