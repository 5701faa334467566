//! Columns as bytes: integers, floats and blobs, each in the way that makes it smallest.

#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "floats and unsigned numbers are carried as the bits of an i64"
)]

use pco::ChunkConfig;
use pco::standalone::{simple_compress, simple_decompress_into};

use crate::codec::{Damage, Decoded, Input, put_signed, put_squeezed, put_varint, unsqueeze};
use crate::value::Kind;

/// Fewer numbers than these are not worth the tables of pco.
const PCO_ROWS_MIN: usize = 48;

const CONST: u8 = 0;
const LINEAR: u8 = 1;
const DELTA: u8 = 2;
const PCO: u8 = 3;
const PLAIN: u8 = 4;

/// How much work to put into size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// When a memtable is sealed: it must keep pace with appends.
    Seal,
    /// When segments are merged in the background.
    Merge,
}

impl Effort {
    const fn pco_level(self) -> usize {
        match self {
            Self::Seal => 4,
            Self::Merge => 8,
        }
    }

    pub(crate) const fn zstd_level(self) -> i32 {
        match self {
            Self::Seal => 1,
            Self::Merge => 3,
        }
    }
}

/// Appends integers; how many there are must be known to the reader.
pub(crate) fn put_ints(out: &mut Vec<u8>, numbers: &[i64], effort: Effort) {
    let Some((&first, rest)) = numbers.split_first() else { return };
    let step = rest.first().map_or(0, |second| second.wrapping_sub(first));
    let steady = numbers.windows(2).all(|w| match w {
        [a, b] => b.wrapping_sub(*a) == step,
        _ => true,
    });
    if steady {
        out.push(if step == 0 { CONST } else { LINEAR });
        put_signed(out, first);
        if step != 0 {
            put_signed(out, step);
        }
        return;
    }
    let mut deltas = Vec::with_capacity(numbers.len() * 2);
    let mut before = 0_i64;
    for number in numbers {
        put_signed(&mut deltas, number.wrapping_sub(before));
        before = *number;
    }
    let start = out.len();
    out.push(DELTA);
    put_squeezed(out, &deltas, effort.zstd_level());
    if numbers.len() >= PCO_ROWS_MIN {
        let config = ChunkConfig::default().with_compression_level(effort.pco_level());
        if let Ok(small) = simple_compress(numbers, &config)
            && small.len() + 1 < out.len() - start
        {
            out.truncate(start);
            out.push(PCO);
            out.extend_from_slice(&small);
        }
    }
}

/// Reads `count` integers out of all of `bytes`.
pub(crate) fn ints(bytes: &[u8], count: usize) -> Decoded<Vec<i64>> {
    if count == 0 {
        return if bytes.is_empty() {
            Ok(Vec::new())
        } else {
            Err(Damage("bytes in an empty column"))
        };
    }
    let mut input = Input(bytes);
    match input.u8()? {
        CONST => Ok(vec![input.signed()?; count]),
        LINEAR => {
            let (mut number, step) = (input.signed()?, input.signed()?);
            Ok((0..count)
                .map(|_| {
                    let this = number;
                    number = number.wrapping_add(step);
                    this
                })
                .collect())
        }
        DELTA => {
            let plain = unsqueeze(input.0)?;
            let mut input = Input(&plain);
            let mut number = 0_i64;
            let mut numbers = Vec::with_capacity(count.min(plain.len()));
            for _ in 0..count {
                number = number.wrapping_add(input.signed()?);
                numbers.push(number);
            }
            if input.is_empty() { Ok(numbers) } else { Err(Damage("too many numbers in a column")) }
        }
        PCO => pco_numbers(input.0, count),
        _ => Err(Damage("unknown form of column")),
    }
}

fn pco_numbers<T: pco::data_types::Number + Default>(
    bytes: &[u8],
    count: usize,
) -> Decoded<Vec<T>> {
    let mut numbers = vec![T::default(); count];
    let progress = simple_decompress_into(bytes, &mut numbers)
        .map_err(|_| Damage("a column cannot be decompressed"))?;
    if progress.n_processed == count {
        Ok(numbers)
    } else {
        Err(Damage("too few numbers in a column"))
    }
}

/// Appends floats, exact to the bit.
pub(crate) fn put_floats(out: &mut Vec<u8>, bits: &[i64], effort: Effort) {
    let Some(first) = bits.first() else { return };
    if bits.iter().all(|b| b == first) {
        out.push(CONST);
        put_signed(out, *first);
        return;
    }
    let plain: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
    let start = out.len();
    out.push(PLAIN);
    put_squeezed(out, &plain, effort.zstd_level());
    if bits.len() >= PCO_ROWS_MIN {
        let floats: Vec<f64> = bits.iter().map(|b| f64::from_bits(*b as u64)).collect();
        let config = ChunkConfig::default().with_compression_level(effort.pco_level());
        if let Ok(small) = simple_compress(&floats, &config)
            && small.len() + 1 < out.len() - start
        {
            out.truncate(start);
            out.push(PCO);
            out.extend_from_slice(&small);
        }
    }
}

/// Reads `count` floats as bits.
pub(crate) fn floats(bytes: &[u8], count: usize) -> Decoded<Vec<i64>> {
    if count == 0 {
        return ints(bytes, count);
    }
    let mut input = Input(bytes);
    match input.u8()? {
        CONST => Ok(vec![input.signed()?; count]),
        PLAIN => {
            let plain = unsqueeze(input.0)?;
            let (bits, rest) = plain.as_chunks();
            if bits.len() != count || !rest.is_empty() {
                return Err(Damage("wrong count of floats in a column"));
            }
            Ok(bits.iter().map(|b| i64::from_le_bytes(*b)).collect())
        }
        PCO => {
            let floats: Vec<f64> = pco_numbers(input.0, count)?;
            Ok(floats.iter().map(|x| x.to_bits() as i64).collect())
        }
        _ => Err(Damage("unknown form of column")),
    }
}

/// Texts and the like: one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blobs {
    /// Where each ends.
    ends: Vec<usize>,
    bytes: Vec<u8>,
}

impl Blobs {
    pub(crate) fn push(&mut self, blob: &[u8]) {
        self.bytes.extend_from_slice(blob);
        self.ends.push(self.bytes.len());
    }

    pub(crate) fn get(&self, at: usize) -> Option<&[u8]> {
        let start = match at.checked_sub(1) {
            Some(before) => *self.ends.get(before)?,
            None => 0,
        };
        self.bytes.get(start..*self.ends.get(at)?)
    }

    pub(crate) const fn len(&self) -> usize {
        self.ends.len()
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|at| self.get(at))
    }

    fn put(&self, out: &mut Vec<u8>, effort: Effort) {
        let Some(first) = self.get(0) else { return };
        if self.iter().all(|blob| blob == first) {
            out.push(CONST);
            out.extend_from_slice(first);
            return;
        }
        let mut plain = Vec::with_capacity(self.bytes.len() + self.len());
        for blob in self.iter() {
            put_varint(&mut plain, blob.len() as u64);
        }
        plain.extend_from_slice(&self.bytes);
        out.push(PLAIN);
        put_squeezed(out, &plain, effort.zstd_level());
    }

    fn take(bytes: &[u8], count: usize) -> Decoded<Self> {
        let mut blobs = Self::default();
        if count == 0 {
            return if bytes.is_empty() {
                Ok(blobs)
            } else {
                Err(Damage("bytes in an empty column"))
            };
        }
        let mut input = Input(bytes);
        match input.u8()? {
            CONST => {
                if input.left().saturating_mul(count) > crate::codec::INFLATED_BYTES_MAX {
                    return Err(Damage("decompresses to more than is allowed"));
                }
                for _ in 0..count {
                    blobs.push(input.0);
                }
            }
            PLAIN => {
                let plain = unsqueeze(input.0)?;
                let mut input = Input(&plain);
                let mut end = 0_usize;
                for _ in 0..count {
                    let length = usize::try_from(input.varint()?).unwrap_or(usize::MAX);
                    end = end.saturating_add(length);
                    blobs.ends.push(end);
                }
                if input.left() != end {
                    return Err(Damage("texts do not fit their lengths"));
                }
                blobs.bytes = input.0.to_vec();
            }
            _ => return Err(Damage("unknown form of column")),
        }
        Ok(blobs)
    }
}

/// The values of one parameter in one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// Bool, Int, Uint (bits) and the mantissas of decimals.
    Ints(Vec<i64>),
    /// Bits of floats.
    Floats(Vec<i64>),
    /// Text, bytes and JSON trees.
    Blobs(Blobs),
}

impl Values {
    pub(crate) const fn new(kind: Kind) -> Self {
        match kind {
            Kind::Bool | Kind::Int | Kind::Uint | Kind::Decimal => Self::Ints(Vec::new()),
            Kind::Float => Self::Floats(Vec::new()),
            Kind::Text | Kind::Bytes | Kind::Json => {
                Self::Blobs(Blobs { ends: Vec::new(), bytes: Vec::new() })
            }
        }
    }

    pub(crate) const fn len(&self) -> usize {
        match self {
            Self::Ints(numbers) | Self::Floats(numbers) => numbers.len(),
            Self::Blobs(blobs) => blobs.len(),
        }
    }

    /// Memory it takes, about.
    pub(crate) const fn heap_bytes(&self) -> usize {
        match self {
            Self::Ints(numbers) | Self::Floats(numbers) => numbers.capacity() * 8,
            Self::Blobs(blobs) => blobs.ends.capacity() * 8 + blobs.bytes.capacity(),
        }
    }

    pub(crate) fn put(&self, out: &mut Vec<u8>, effort: Effort) {
        match self {
            Self::Ints(numbers) => put_ints(out, numbers, effort),
            Self::Floats(bits) => put_floats(out, bits, effort),
            Self::Blobs(blobs) => blobs.put(out, effort),
        }
    }

    pub(crate) fn take(bytes: &[u8], kind: Kind, count: usize) -> Decoded<Self> {
        Ok(match Self::new(kind) {
            Self::Ints(_) => Self::Ints(ints(bytes, count)?),
            Self::Floats(_) => Self::Floats(floats(bytes, count)?),
            Self::Blobs(_) => Self::Blobs(Blobs::take(bytes, count)?),
        })
    }

    /// Takes the next value out of a message's body.
    pub(crate) fn push_from(&mut self, body: &mut Input<'_>, kind: Kind) -> Decoded<()> {
        match self {
            Self::Ints(numbers) => numbers.push(match kind {
                Kind::Bool => i64::from(body.u8()?),
                Kind::Uint => body.varint()? as i64,
                _ => body.signed()?,
            }),
            Self::Floats(bits) => bits.push(body.u64()? as i64),
            Self::Blobs(blobs) => blobs.push(body.bytes()?),
        }
        Ok(())
    }

    /// Appends value `at` to a message's body; false if there is none.
    pub(crate) fn append_to(&self, body: &mut Vec<u8>, kind: Kind, at: usize) -> bool {
        match self {
            Self::Ints(numbers) => {
                let Some(number) = numbers.get(at) else { return false };
                match kind {
                    Kind::Bool => body.push(u8::from(*number != 0)),
                    Kind::Uint => put_varint(body, *number as u64),
                    _ => put_signed(body, *number),
                }
            }
            Self::Floats(bits) => {
                let Some(bits) = bits.get(at) else { return false };
                body.extend_from_slice(&bits.to_le_bytes());
            }
            Self::Blobs(blobs) => {
                let Some(blob) = blobs.get(at) else { return false };
                crate::codec::put_bytes(body, blob);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_ints() -> impl Strategy<Value = Vec<i64>> {
        prop_oneof![
            prop::collection::vec(any::<i64>(), 0..200),
            prop::collection::vec(-3_i64..3, 0..300),
            (any::<i64>(), any::<i64>(), 0_i64..200)
                .prop_map(|(a, b, n)| (0..n).map(|i| a.wrapping_add(b.wrapping_mul(i))).collect()),
        ]
    }

    proptest! {
        #[test]
        fn integers_round_trip(numbers in any_ints(), merge: bool) {
            let effort = if merge { Effort::Merge } else { Effort::Seal };
            let mut out = Vec::new();
            put_ints(&mut out, &numbers, effort);
            prop_assert_eq!(ints(&out, numbers.len()), Ok(numbers));
        }

        #[test]
        fn floats_round_trip_to_the_bit(
            bits in prop_oneof![
                prop::collection::vec(any::<i64>(), 0..200),
                prop::collection::vec((0_i32..1_000).prop_map(|n| (f64::from(n) * 0.1).to_bits() as i64), 0..200),
            ]
        ) {
            let mut out = Vec::new();
            put_floats(&mut out, &bits, Effort::Merge);
            prop_assert_eq!(floats(&out, bits.len()), Ok(bits));
        }

        #[test]
        fn blobs_round_trip(blobs: Vec<Vec<u8>>) {
            let mut built = Blobs::default();
            blobs.iter().for_each(|blob| built.push(blob));
            let mut out = Vec::new();
            built.put(&mut out, Effort::Seal);
            prop_assert_eq!(Blobs::take(&out, blobs.len()), Ok(built));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>, count in 0_usize..500) {
            let _read = (ints(&bytes, count), floats(&bytes, count), Blobs::take(&bytes, count));
        }
    }
}
