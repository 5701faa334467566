//! Networks: what a token may be used from, which peers are balancers.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::Deserialize;

/// A network: an address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// The text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a network: expected an address such as 192.0.2.7, or 10.0.0.0/8, 2001:db8::/32"
)]
pub struct NetworkError {
    text: String,
}

impl Network {
    /// Whether `peer` is in it. IPv4 addresses written as IPv6 ones count as IPv4.
    #[must_use]
    pub fn contains(&self, peer: IpAddr) -> bool {
        match (self.address, peer.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(peer)) => {
                let shift = 32 - u32::from(self.bits);
                let differ = own.to_bits() ^ peer.to_bits();
                // A shift by the whole width leaves nothing that could differ.
                differ.checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(peer)) => {
                let shift = 128 - u32::from(self.bits);
                let differ = own.to_bits() ^ peer.to_bits();
                differ.checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl TryFrom<String> for Network {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let wrong = || NetworkError { text: text.chars().take(64).collect() };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            // Digits only: `+8` is no prefix length.
            Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse::<u8>().ok().filter(|bits| *bits <= width).ok_or_else(wrong)?
            }
            Some(_) => return Err(wrong()),
        };
        Ok(Self { address, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC{0,60}") {
            let _read = text.parse::<Network>();
        }

        #[test]
        fn text_round_trips(address: [u8; 16], bits in 0_u8..=128, v4: bool) {
            let address = if v4 {
                IpAddr::V4(Ipv4Addr::new(address[0], address[1], address[2], address[3]))
            } else {
                IpAddr::V6(Ipv6Addr::from(address))
            };
            let network = Network { address, bits: if v4 { bits % 33 } else { bits } };
            prop_assert_eq!(network.to_string().parse(), Ok(network));
            prop_assert!(network.contains(address) || address.to_canonical() != address);
        }

        #[test]
        fn a_network_holds_what_shares_its_leading_bits(own: u32, peer: u32, bits in 0_u8..=32) {
            let network = Network { address: IpAddr::V4(own.into()), bits };
            let share = (0..u32::from(bits)).all(|bit| (own ^ peer) >> (31 - bit) & 1 == 0);
            prop_assert_eq!(network.contains(IpAddr::V4(peer.into())), share);
        }
    }

    #[test]
    fn networks_are_read_and_compared() {
        let inside = |network: &str, peer: &str| {
            network.parse::<Network>().unwrap().contains(peer.parse().unwrap())
        };
        assert!(inside("10.0.0.0/8", "10.200.3.4") && !inside("10.0.0.0/8", "11.0.0.1"));
        assert!(inside("10.0.0.0/8", "::ffff:10.1.1.1"));
        assert!(inside("192.0.2.7", "192.0.2.7") && !inside("192.0.2.7", "192.0.2.8"));
        assert!(
            inside("2001:db8::/32", "2001:db8:ffff::1") && !inside("2001:db8::/32", "10.0.0.1")
        );
        assert!(inside("0.0.0.0/0", "255.255.255.255") && inside("::/0", "::1"));
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/", "10.0.0.0/+8", "host"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
