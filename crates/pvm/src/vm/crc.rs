//! Checksums.

/// A reflected 16-bit CRC with its tables, four bytes a step.
pub(crate) struct Crc16 {
    tables: [[u16; 256]; 4],
    init: u16,
    xorout: u16,
}

/// CRC-16/ARC.
pub(crate) static ARC: Crc16 = Crc16::new(0xA001, 0, 0);
/// CRC-16/KERMIT.
pub(crate) static KERMIT: Crc16 = Crc16::new(0x8408, 0, 0);
/// CRC-16/X-25.
pub(crate) static X25: Crc16 = Crc16::new(0x8408, 0xFFFF, 0xFFFF);
/// CRC-16/MODBUS.
pub(crate) static MODBUS: Crc16 = Crc16::new(0xA001, 0xFFFF, 0);

#[allow(
    clippy::indexing_slicing,
    reason = "a byte is below 256; the tables are made at compile time"
)]
impl Crc16 {
    const fn new(polynomial: u16, init: u16, xorout: u16) -> Self {
        let mut tables = [[0_u16; 256]; 4];
        let mut byte = 0_u16;
        while byte < 256 {
            let mut crc = byte;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ polynomial } else { crc >> 1 };
                bit += 1;
            }
            tables[0][byte as usize] = crc;
            byte += 1;
        }
        let mut table = 1;
        while table < 4 {
            let mut byte = 0;
            while byte < 256 {
                let before = tables[table - 1][byte];
                tables[table][byte] = (before >> 8) ^ tables[0][(before & 0xFF) as usize];
                byte += 1;
            }
            table += 1;
        }
        Self { tables, init, xorout }
    }

    /// The checksum of `bytes`.
    pub(crate) fn of(&self, bytes: &[u8]) -> i64 {
        let [t0, t1, t2, t3] = &self.tables;
        let mut crc = self.init;
        let mut chunks = bytes.chunks_exact(4);
        for chunk in &mut chunks {
            let &[a, b, c, d] = chunk else { break };
            let [low, high] = crc.to_le_bytes();
            crc = t3[usize::from(a ^ low)]
                ^ t2[usize::from(b ^ high)]
                ^ t1[usize::from(c)]
                ^ t0[usize::from(d)];
        }
        for byte in chunks.remainder() {
            let [low, _] = crc.to_le_bytes();
            crc = (crc >> 8) ^ t0[usize::from(byte ^ low)];
        }
        i64::from(crc ^ self.xorout)
    }
}

/// A reflected CRC of any width up to 64 bits; `None` for other widths.
pub(crate) fn reflected(
    bytes: &[u8],
    width: u64,
    polynomial: u64,
    init: u64,
    xorout: u64,
) -> Option<u64> {
    if !(1..=64).contains(&width) {
        return None;
    }
    let mask = u64::MAX >> (64 - width);
    let mut crc = init & mask;
    for byte in bytes {
        crc ^= u64::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ polynomial } else { crc >> 1 };
        }
    }
    Some((crc ^ xorout) & mask)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn check_values_are_right() {
        let check = b"123456789";
        assert_eq!(ARC.of(check), 0xBB3D);
        assert_eq!(KERMIT.of(check), 0x2189);
        assert_eq!(X25.of(check), 0x906E);
        assert_eq!(MODBUS.of(check), 0x4B37);
        assert_eq!(reflected(check, 32, 0xEDB8_8320, u64::MAX, u64::MAX), Some(0xCBF4_3926));
    }

    proptest! {
        #[test]
        fn tables_agree_with_the_definition(bytes: Vec<u8>) {
            let slow = reflected(&bytes, 16, 0x8408, 0xFFFF, 0xFFFF);
            prop_assert_eq!(Some(X25.of(&bytes).unsigned_abs()), slow);
        }
    }
}
