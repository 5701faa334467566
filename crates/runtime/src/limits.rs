//! The system's limit on open files, and how it is shared.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Files kept for the store, the registry and whatever else is not a connection.
pub const RESERVED: u64 = 512;

/// How many connections each kind may hold, so that none takes the last file:
/// a store that cannot open its next file acknowledges nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Devices.
    pub gateway: usize,
    /// MQTT clients.
    pub mqtt: usize,
    /// HTTP connections.
    pub http: usize,
}

/// Raises the soft limit on open files to the hard one, and returns what it is
/// then. `None` if there is no limit.
pub fn raise_open_files() -> Option<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    let soft = limit.current;
    limit.current = limit.maximum;
    if soft != limit.maximum && setrlimit(Resource::Nofile, limit).is_err() {
        return soft;
    }
    limit.maximum
}

/// Shares `open_files` out: of what is not reserved, six tenths to devices,
/// three to MQTT and one to HTTP.
#[must_use]
pub fn shares(open_files: Option<u64>) -> Shares {
    let Some(files) = open_files else {
        return Shares { gateway: usize::MAX, mqtt: usize::MAX, http: usize::MAX };
    };
    let tenth = usize::try_from(files.saturating_sub(RESERVED) / 10).unwrap_or(usize::MAX).max(8);
    let times = |count: usize| tenth.saturating_mul(count);
    Shares { gateway: times(6), mqtt: times(3), http: tenth }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_left_for_the_store() {
        for files in [1_024, 20_000, 1 << 20] {
            let Shares { gateway, mqtt, http } = shares(Some(files));
            assert!((gateway + mqtt + http) as u64 + RESERVED <= files, "{files}");
        }
        assert!(shares(Some(20_000)).gateway > 11_000);
    }
}
