//! Where a server runs: on this machine's loopback, or in a zone that can be cut off.

use std::ffi::{OsStr, OsString};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

/// An address to listen on, and what a program must be started by to have it.
#[derive(Clone, Debug)]
pub struct Place {
    launcher: Vec<OsString>,
    address: Ipv4Addr,
}

impl Place {
    /// 127.0.0.1.
    #[must_use]
    pub const fn here() -> Self {
        Self::at(Ipv4Addr::LOCALHOST)
    }

    /// An address that this process could listen on too, such as another of 127.0.0.0/8.
    #[must_use]
    pub const fn at(address: Ipv4Addr) -> Self {
        Self { launcher: Vec::new(), address }
    }

    /// An address that programs have which `launcher` starts. It must become the program, so that signals reach it.
    #[must_use]
    pub fn within<A: Into<OsString>>(
        launcher: impl IntoIterator<Item = A>,
        address: Ipv4Addr,
    ) -> Self {
        Self { launcher: launcher.into_iter().map(Into::into).collect(), address }
    }

    /// What to listen on.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// `port` of it.
    #[must_use]
    pub const fn socket(&self, port: u16) -> SocketAddr {
        SocketAddr::new(std::net::IpAddr::V4(self.address), port)
    }

    /// Runs `program` there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((first, others)) = self.launcher.split_first() else {
            return Command::new(program);
        };
        let mut command = Command::new(first);
        command.args(others).arg(program);
        command
    }
}
