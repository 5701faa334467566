//! The log: files of frames, each with a checksum.
//!
//! ```text
//! file    := magic[8] number:u64 shard:u16 crc:u32 frame*
//! frame   := length:u32 crc:u32 payload[length]      crc over file number, length and payload
//! payload := first_seq:varint item*
//! item    := 1 id account[16] kind object[16]                          a series
//!          | 2 id length name                                          a name
//!          | 3 id count (name_id kind scale)*                          a shape
//!          | 4 series shape Δtimestamp (received−timestamp) hash:u64 length body     a message
//!          | 5 number bytes                                        the file before, and its length
//! ```
//!
//! Numbers are varints unless said; Δ is against the message before in the same
//! frame. Ids mean something within one file only, so a file is read alone.
//! Messages count on from `first_seq`. One group of appends is one frame, or
//! several where it is large; all of them are made durable with one sync.

#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths of frames are below FRAME_BYTES_MAX, series kinds are u8 by their repr"
)]

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_model::{AccountId, ParamName, Series, SeriesKind};
use uuid::Uuid;

use crate::codec::{Damage, Decoded, Input, checksum, put_bytes, put_signed, put_varint};
use crate::dict::{ColumnKey, Dict};
use crate::value::{Kind, Shape};

pub(crate) const MAGIC: &[u8; 8] = b"FLDWAL01";
pub(crate) const HEADER_BYTES: usize = 22;
const FRAME_HEADER_BYTES: usize = 8;

/// A frame is closed beyond this size.
pub(crate) const FRAME_BYTES_SOFT: usize = 4 << 20;
/// No frame is larger: one message of the largest size fits into one that is not closed yet.
pub(crate) const FRAME_BYTES_MAX: usize = 16 << 20;

const SERIES: u8 = 1;
const NAME: u8 = 2;
const SHAPE: u8 = 3;
const MESSAGE: u8 = 4;
const BEFORE: u8 = 5;

/// The name of file `number`.
pub(crate) fn file_name(number: u64) -> String {
    format!("wal-{number:012}.log")
}

/// What stands at the head of file `number`.
pub(crate) fn header(number: u64, shard: u16) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    let (start, crc) = out.split_at_mut(18);
    let (magic, rest) = start.split_at_mut(8);
    magic.copy_from_slice(MAGIC);
    let (at, of) = rest.split_at_mut(8);
    at.copy_from_slice(&number.to_le_bytes());
    of.copy_from_slice(&shard.to_le_bytes());
    crc.copy_from_slice(&checksum(&[start]).to_le_bytes());
    out
}

/// One message on its way into a frame.
pub(crate) struct Record<'a> {
    pub(crate) seq: u64,
    pub(crate) series: u32,
    pub(crate) shape: u32,
    pub(crate) timestamp: i64,
    pub(crate) received: i64,
    pub(crate) hash: u64,
    pub(crate) body: &'a [u8],
}

/// Builds the frames of one group.
pub(crate) struct Frames {
    pub(crate) out: Vec<u8>,
    file: u64,
    /// Where the open frame begins.
    open: Option<usize>,
    before: i64,
    file_before: Option<FileBefore>,
}

/// The log file before one, and up to where it was durable: where it is shorter later, its end is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileBefore {
    pub(crate) number: u64,
    pub(crate) bytes: u64,
}

impl Frames {
    /// `file_before` is told with the first frame of a file.
    pub(crate) fn new(mut buffer: Vec<u8>, file: u64, file_before: Option<FileBefore>) -> Self {
        buffer.clear();
        Self { out: buffer, file, open: None, before: 0, file_before }
    }

    /// Adds a message, and before it what the log does not know of its series and shape.
    pub(crate) fn push(&mut self, dict: &mut Dict, record: &Record<'_>) {
        if self.open.is_some_and(|at| self.out.len() - at > FRAME_BYTES_SOFT) {
            self.close();
        }
        if self.open.is_none() {
            self.open = Some(self.out.len());
            self.out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
            put_varint(&mut self.out, record.seq);
            self.before = 0;
            if let Some(FileBefore { number, bytes }) = self.file_before.take() {
                self.out.push(BEFORE);
                put_varint(&mut self.out, number);
                put_varint(&mut self.out, bytes);
            }
        }
        self.define(dict, record);
        self.out.push(MESSAGE);
        put_varint(&mut self.out, u64::from(record.series));
        put_varint(&mut self.out, u64::from(record.shape));
        put_signed(&mut self.out, record.timestamp.wrapping_sub(self.before));
        put_signed(&mut self.out, record.received.wrapping_sub(record.timestamp));
        self.out.extend_from_slice(&record.hash.to_le_bytes());
        put_bytes(&mut self.out, record.body);
        self.before = record.timestamp;
    }

    fn define(&mut self, dict: &mut Dict, record: &Record<'_>) {
        let Dict { names, shapes, series, epoch, .. } = dict;
        let out = &mut self.out;
        if let Some(entry) = series.get_mut(record.series as usize)
            && entry.epoch != *epoch
        {
            entry.epoch = *epoch;
            let Series { account, kind, object } = entry.item.series;
            out.push(SERIES);
            put_varint(out, u64::from(record.series));
            out.extend_from_slice(account.as_bytes());
            out.push(kind as u8);
            out.extend_from_slice(object.as_bytes());
        }
        let Some(entry) = shapes.get_mut(record.shape as usize) else { return };
        if entry.epoch == *epoch {
            return;
        }
        entry.epoch = *epoch;
        for (id, _, _) in &entry.item.keys {
            if let Some(name) = names.get_mut(*id as usize)
                && name.epoch != *epoch
            {
                name.epoch = *epoch;
                out.push(NAME);
                put_varint(out, u64::from(*id));
                put_bytes(out, name.item.as_str().as_bytes());
            }
        }
        out.push(SHAPE);
        put_varint(out, u64::from(record.shape));
        put_varint(out, entry.item.keys.len() as u64);
        for (id, kind, scale) in &entry.item.keys {
            put_varint(out, u64::from(*id));
            out.extend_from_slice(&[*kind as u8, *scale]);
        }
    }

    /// Ends the open frame: its length and checksum are known now.
    pub(crate) fn close(&mut self) {
        let Some(start) = self.open.take() else { return };
        let Some(frame) = self.out.get_mut(start..) else { return };
        let Some((head, payload)) = frame.split_first_chunk_mut::<FRAME_HEADER_BYTES>() else {
            return;
        };
        let length = (payload.len() as u32).to_le_bytes();
        let crc = checksum(&[&self.file.to_le_bytes(), &length, payload]).to_le_bytes();
        let (first, second) = head.split_at_mut(4);
        first.copy_from_slice(&length);
        second.copy_from_slice(&crc);
    }
}

/// One message as a file holds it.
pub(crate) struct Replayed<'a> {
    pub(crate) seq: u64,
    pub(crate) series: Series,
    pub(crate) shape: &'a ReplayedShape,
    pub(crate) timestamp: i64,
    pub(crate) received: i64,
    pub(crate) hash: u64,
    pub(crate) body: &'a [u8],
}

/// A shape as a file defines it.
pub(crate) struct ReplayedShape {
    pub(crate) names: Vec<(ParamName, Kind, u8)>,
    shape: Shape,
}

/// How far a file could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes up to the end of the last sound frame; 0 if nothing is sound.
    pub(crate) sound: usize,
    /// Whether the header is sound.
    pub(crate) header: bool,
    /// Whether a sound frame follows what is damaged: then it is no torn tail.
    pub(crate) more: bool,
    /// What it says of the file before it.
    pub(crate) before: Option<FileBefore>,
}

/// Fewest bytes of one message in a file: what bounds how many are in damaged bytes.
pub(crate) const MESSAGE_BYTES_MIN: usize = 14;

#[derive(Default)]
struct Names {
    names: HashMap<u32, ParamName>,
    shapes: HashMap<u32, Arc<ReplayedShape>>,
    series: HashMap<u32, Series>,
    before: Option<FileBefore>,
}

/// Reads file `number` of `shard`: hands over every message of every sound frame,
/// up to the first that is not. A frame is handed over whole or not at all. What the
/// header says is in every checksum, too: frames are read where it is damaged.
pub(crate) fn replay(
    bytes: &[u8],
    number: u64,
    shard: u16,
    mut visit: impl FnMut(Replayed<'_>),
) -> Extent {
    let has_header = bytes.get(..HEADER_BYTES) == Some(&header(number, shard)[..]);
    let mut next_seq = 0;
    let mut visit = |message: Replayed<'_>| {
        next_seq = message.seq.saturating_add(1);
        visit(message);
    };
    let mut known = Names::default();
    let mut sound = HEADER_BYTES;
    while let Some((payload, end)) = frame_at(bytes, sound, number) {
        // First a dry run: the checksum fits, but the writer may have been another program.
        if read_frame(payload, &mut known, &mut |_| {}).is_err() {
            break;
        }
        let read = read_frame(payload, &mut known, &mut visit);
        debug_assert!(read.is_ok(), "the dry run passed");
        sound = end;
    }
    let more = sound < bytes.len() && frame_after(bytes, sound, number, next_seq);
    let sound = if has_header || sound > HEADER_BYTES { sound } else { 0 };
    Extent { sound, header: has_header, more, before: known.before }
}

/// `bytes` as a log file: a header before them, and every frame with its right checksum.
pub(crate) fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut out = header(1, 0).to_vec();
    let mut input = Input(bytes);
    while let Ok(length) = input.u8() {
        let length = usize::from(length).min(input.left());
        let Ok(payload) = input.take(length) else { break };
        let length = (payload.len() as u32).to_le_bytes();
        let crc = checksum(&[&1_u64.to_le_bytes(), &length, payload]);
        out.extend_from_slice(&length);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(payload);
    }
    out
}

/// The payload of the sound frame at `start`, and where it ends.
fn frame_at(bytes: &[u8], start: usize, number: u64) -> Option<(&[u8], usize)> {
    let mut input = Input(bytes.get(start..)?);
    let length = input.u32().ok()?;
    let crc = input.u32().ok()?;
    if length == 0 || length as usize > FRAME_BYTES_MAX {
        return None;
    }
    let payload = input.take(length as usize).ok()?;
    let fits = checksum(&[&number.to_le_bytes(), &length.to_le_bytes(), payload]) == crc;
    fits.then_some((payload, start + FRAME_HEADER_BYTES + payload.len()))
}

/// Whether a sound frame follows the damaged one at `start`, by its own length or
/// anywhere behind it. Checksums are taken only where a frame could begin: its
/// first sequence is not before `next_seq`, and an item follows.
fn frame_after(bytes: &[u8], start: usize, number: u64, next_seq: u64) -> bool {
    /// Checksums are taken over as many bytes.
    const BYTES_MAX: usize = 256 << 20;
    /// More numbers are not given between two frames of one file.
    const SEQS_MAX: u64 = 1 << 40;
    let declared = bytes.get(start..).and_then(|b| Input(b).u32().ok());
    let by_length = declared.map(|length| start + FRAME_HEADER_BYTES + length as usize);
    if by_length.is_some_and(|at| frame_at(bytes, at, number).is_some()) {
        return true;
    }
    let begins = |frame: &[u8]| -> Decoded<usize> {
        let mut input = Input(frame);
        let (length, _crc) = (input.u32()?, input.u32()?);
        let fits = length > 0 && length as usize <= FRAME_BYTES_MAX.min(input.left());
        let seq = input.varint()?;
        let follows = seq >= next_seq && seq - next_seq < SEQS_MAX;
        let item = (SERIES..=BEFORE).contains(&input.u8()?);
        if fits && follows && item { Ok(length as usize) } else { Err(Damage("no frame")) }
    };
    let mut budget = BYTES_MAX;
    for at in start + 1..bytes.len() {
        let Ok(length) = begins(bytes.get(at..).unwrap_or(&[])) else { continue };
        if length <= budget {
            budget -= length;
            if frame_at(bytes, at, number).is_some() {
                return true;
            }
        }
    }
    false
}

fn read_frame(
    payload: &[u8],
    known: &mut Names,
    visit: &mut impl FnMut(Replayed<'_>),
) -> Decoded<()> {
    let mut input = Input(payload);
    let mut seq = input.varint()?;
    let mut before = 0_i64;
    while !input.is_empty() {
        match input.u8()? {
            SERIES => {
                let id = input.id()?;
                let account = AccountId::from_bytes(input.array()?);
                let kind = SeriesKind::from_u8(input.u8()?).ok_or(Damage("unknown series kind"))?;
                let object = Uuid::from_bytes(input.array()?);
                known.series.insert(id, Series { account, kind, object });
            }
            NAME => {
                let id = input.id()?;
                let name = ParamName::new(input.text()?).map_err(|_| Damage("no name"))?;
                known.names.insert(id, name);
            }
            SHAPE => {
                let id = input.id()?;
                let count = input.count()?;
                let mut names = Vec::new();
                for _ in 0..count {
                    let name = known.names.get(&input.id()?).ok_or(Damage("unknown name"))?;
                    let kind = Kind::from_u8(input.u8()?)?;
                    names.push((name.clone(), kind, input.u8()?));
                }
                let columns = names.iter().map(|(name, kind, scale)| crate::value::Column {
                    name: name.clone(),
                    kind: *kind,
                    scale: *scale,
                });
                let shape = Shape(columns.collect());
                known.shapes.insert(id, Arc::new(ReplayedShape { names, shape }));
            }
            MESSAGE => {
                let series = *known.series.get(&input.id()?).ok_or(Damage("unknown series"))?;
                let shape = known.shapes.get(&input.id()?).ok_or(Damage("unknown shape"))?;
                let timestamp = before.wrapping_add(input.signed()?);
                let received = timestamp.wrapping_add(input.signed()?);
                let hash = input.u64()?;
                let body = input.bytes()?;
                shape.shape.check(body)?;
                visit(Replayed { seq, series, shape, timestamp, received, hash, body });
                before = timestamp;
                seq = seq.checked_add(1).ok_or(Damage("a sequence runs over"))?;
            }
            BEFORE => {
                known.before = Some(FileBefore { number: input.varint()?, bytes: input.varint()? });
            }
            _ => return Err(Damage("unknown item")),
        }
    }
    Ok(())
}

impl ReplayedShape {
    /// Its number in `dict`.
    pub(crate) fn intern(&self, dict: &mut Dict) -> u32 {
        let keys: Box<[ColumnKey]> =
            self.names.iter().map(|(name, kind, scale)| (dict.name(name), *kind, *scale)).collect();
        dict.shape_of(keys)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_recovered_without_panic(bytes: Vec<u8>) {
            let extent = replay(&bytes, 1, 0, |_| {});
            prop_assert!(extent.sound <= bytes.len());
            let framed = with_checksums(&bytes);
            let sound = replay(&framed, 1, 0, |_| {}).sound;
            prop_assert!(sound >= HEADER_BYTES);
        }
    }

    #[test]
    fn a_file_of_another_number_or_shard_is_not_read() {
        let bytes = header(5, 2);
        assert_eq!(replay(&bytes, 5, 2, |_| {}).sound, HEADER_BYTES);
        assert_eq!(replay(&bytes, 6, 2, |_| {}).sound, 0);
        assert_eq!(replay(&bytes, 5, 1, |_| {}).sound, 0);
    }
}
