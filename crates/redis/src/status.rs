//! How a module's status stands in Redis, and how changes of it are told.
//!
//! ```text
//! field   = version (20 digits) epoch (20 digits) cost (4) value
//! message = version (20 digits) epoch (20 digits) key          the module has ended
//!         | version (20 digits) epoch (20 digits) key name value
//! ```
//!
//! A key and a name have their length, one byte, before them.

use std::sync::Arc;

use fieldline_contracts::{Status, StatusValue};

use crate::encoding::read_value;
use crate::scripts::field;

/// What a message tells.
pub(crate) enum Told {
    Set { key: String, name: String, value: StatusValue },
    End { key: String, epoch: u64, version: u64 },
}

fn number(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Version, epoch and the rest.
fn head(bytes: &[u8]) -> Option<(u64, u64, &[u8])> {
    let (version, rest) = bytes.split_at_checked(20)?;
    let (epoch, rest) = rest.split_at_checked(20)?;
    Some((number(version)?, number(epoch)?, rest))
}

fn text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (count, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*count))?;
    Some((std::str::from_utf8(text).ok()?.to_owned(), rest))
}

pub(crate) fn read_message(payload: &[u8]) -> Option<Told> {
    let (version, epoch, rest) = head(payload)?;
    let (key, rest) = text(rest)?;
    if rest.is_empty() {
        return Some(Told::End { key, epoch, version });
    }
    let (name, rest) = text(rest)?;
    let value = StatusValue { value: read_value(rest)?, version, epoch };
    Some(Told::Set { key, name, value })
}

fn read_field(bytes: &[u8]) -> Option<StatusValue> {
    let (version, epoch, rest) = head(bytes)?;
    Some(StatusValue { value: read_value(rest.get(4..)?)?, version, epoch })
}

/// A whole status from the fields of its hash; what is none of ours is left out.
pub(crate) fn read_status(fields: Vec<(Vec<u8>, Vec<u8>)>) -> Status {
    let mut status = Status::default();
    for (name, content) in fields {
        let Ok(name) = std::str::from_utf8(&name) else { continue };
        if name == field::EPOCH {
            status.epoch = number(&content).unwrap_or(0);
        } else if let Some(value) = read_field(&content) {
            status.values.insert(Arc::from(name), value);
        }
    }
    status
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is published on our channels, reading it ends.
        #[test]
        fn reading_any_message_never_panics(mut bytes: Vec<u8>, with_head: bool) {
            if with_head {
                bytes.splice(0..0, format!("{:020}{:020}", 7, 8).into_bytes());
            }
            let _told = (read_message(&bytes).is_some(), read_field(&bytes));
        }
    }
}
