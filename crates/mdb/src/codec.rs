//! Bytes in and out: varints, checked reading, checksums. Nothing here trusts a length.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "varint and zigzag coding takes numbers apart bit by bit"
)]

/// The bytes are not what a writer of this format makes; says what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Damage(pub(crate) &'static str);

pub(crate) type Decoded<T> = Result<T, Damage>;

pub(crate) fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub(crate) const fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

pub(crate) const fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

pub(crate) fn put_signed(out: &mut Vec<u8>, n: i64) {
    put_varint(out, zigzag(n));
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes that are read from the front.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) const fn left(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn u8(&mut self) -> Decoded<u8> {
        let (first, rest) = self.0.split_first().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Decoded<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn u32(&mut self) -> Decoded<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Decoded<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn take(&mut self, count: usize) -> Decoded<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(count).ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(first)
    }

    pub(crate) fn varint(&mut self) -> Decoded<u64> {
        let mut n = 0_u64;
        let mut bytes = self.0.iter();
        for shift in (0..64).step_by(7) {
            let byte = *bytes.next().ok_or(Damage("ends within a number"))?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(Damage("a number has more than 64 bits"));
            }
            n |= part << shift;
            if byte & 0x80 == 0 {
                self.0 = bytes.as_slice();
                return Ok(n);
            }
        }
        Err(Damage("a number has more than 64 bits"))
    }

    pub(crate) fn signed(&mut self) -> Decoded<i64> {
        self.varint().map(unzigzag)
    }

    pub(crate) fn id(&mut self) -> Decoded<u32> {
        u32::try_from(self.varint()?).map_err(|_| Damage("a number is out of range"))
    }

    /// A count of things of which each takes at least one of the bytes left.
    pub(crate) fn count(&mut self) -> Decoded<usize> {
        let count = self.varint()?;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= self.left())
            .ok_or(Damage("a count is larger than its contents"))
    }

    pub(crate) fn bytes(&mut self) -> Decoded<&'a [u8]> {
        let count = self.count()?;
        self.take(count)
    }

    pub(crate) fn text(&mut self) -> Decoded<&'a str> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Damage("text is not UTF-8"))
    }
}

/// The checksum of several pieces as of one.
pub(crate) fn checksum(pieces: &[&[u8]]) -> u32 {
    pieces.iter().fold(0, |crc, piece| crc32c::crc32c_append(crc, piece))
}

/// Appends a section: checksum, then content.
pub(crate) fn put_section(out: &mut Vec<u8>, content: &[u8]) {
    out.extend_from_slice(&checksum(&[content]).to_le_bytes());
    out.extend_from_slice(content);
}

/// The content of a section whose checksum fits.
pub(crate) fn section(bytes: &[u8]) -> Decoded<&[u8]> {
    let mut input = Input(bytes);
    let crc = input.u32()?;
    if checksum(&[input.0]) == crc { Ok(input.0) } else { Err(Damage("checksum does not fit")) }
}

/// Most bytes that one piece may have when decompressed.
pub(crate) const INFLATED_BYTES_MAX: usize = 64 << 20;

/// `[0][bytes]` or, where that is shorter, `[1][length][zstd]`.
pub(crate) fn put_squeezed(out: &mut Vec<u8>, bytes: &[u8], level: i32) {
    if bytes.len() >= 24
        && bytes.len() <= INFLATED_BYTES_MAX
        && let Ok(small) = zstd::bulk::compress(bytes, level)
        && small.len() + 4 < bytes.len()
    {
        out.push(1);
        put_varint(out, bytes.len() as u64);
        out.extend_from_slice(&small);
        return;
    }
    out.push(0);
    out.extend_from_slice(bytes);
}

/// The reverse of [`put_squeezed`], with a limit on what comes out.
pub(crate) fn unsqueeze(bytes: &[u8]) -> Decoded<std::borrow::Cow<'_, [u8]>> {
    let mut input = Input(bytes);
    match input.u8()? {
        0 => Ok(input.0.into()),
        1 => {
            let length = usize::try_from(input.varint()?).unwrap_or(usize::MAX);
            if length > INFLATED_BYTES_MAX {
                return Err(Damage("decompresses to more than is allowed"));
            }
            let out = zstd::bulk::decompress(input.0, length)
                .map_err(|_| Damage("cannot be decompressed"))?;
            if out.len() == length { Ok(out.into()) } else { Err(Damage("wrong length")) }
        }
        _ => Err(Damage("unknown compression")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_round_trip(n: u64, m: i64) {
            let mut out = Vec::new();
            put_varint(&mut out, n);
            put_signed(&mut out, m);
            let mut input = Input(&out);
            prop_assert_eq!((input.varint(), input.signed(), input.is_empty()), (Ok(n), Ok(m), true));
        }

        #[test]
        fn squeezed_bytes_round_trip(bytes: Vec<u8>, times in 1_usize..20) {
            let bytes = bytes.repeat(times);
            let mut out = Vec::new();
            put_squeezed(&mut out, &bytes, 1);
            prop_assert_eq!(unsqueeze(&out).map(std::borrow::Cow::into_owned), Ok(bytes));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let mut input = Input(&bytes);
            let _read = (input.varint(), input.count(), input.text(), unsqueeze(&bytes), section(&bytes));
        }
    }
}
