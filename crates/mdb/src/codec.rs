//! Bytes in and out, beyond what all stores share (`fieldline_model::codec`): checksums and compression.

pub(crate) use fieldline_model::codec::{Damage, Input, put_bytes, put_signed, put_varint};

pub(crate) type Decoded<T> = Result<T, Damage>;

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
        fn squeezed_bytes_round_trip(bytes: Vec<u8>, times in 1_usize..20) {
            let bytes = bytes.repeat(times);
            let mut out = Vec::new();
            put_squeezed(&mut out, &bytes, 1);
            prop_assert_eq!(unsqueeze(&out).map(std::borrow::Cow::into_owned), Ok(bytes));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _read = (unsqueeze(&bytes), section(&bytes));
        }
    }
}
