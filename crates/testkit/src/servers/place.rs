//! Where a server runs: on this machine's loopback, or in a zone that can be cut off.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Longest that one question to a server may take.
const ASK_MAX: Duration = Duration::from_secs(3);

/// An address to listen on, and what a program must be started by to have it.
#[derive(Clone, Debug)]
pub struct Place {
    launcher: Vec<OsString>,
    address: Ipv4Addr,
    tied: bool,
    logs: Option<PathBuf>,
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
        Self { launcher: Vec::new(), address, tied: false, logs: None }
    }

    /// An address that programs have which `launcher` starts. It must become the program, so that signals reach it.
    #[must_use]
    pub fn within<A: Into<OsString>>(
        launcher: impl IntoIterator<Item = A>,
        address: Ipv4Addr,
    ) -> Self {
        Self { launcher: launcher.into_iter().map(Into::into).collect(), ..Self::at(address) }
    }

    /// The same, but a server gets SIGTERM when the thread that started it is gone, even by SIGKILL.
    #[must_use]
    pub fn tied(self) -> Self {
        Self { tied: true, ..self }
    }

    /// The same, but what a server prints goes to `NAME.log` in `folder`, and not to its own folder, which goes with it.
    #[must_use]
    pub fn logging_to(self, folder: impl Into<PathBuf>) -> Self {
        Self { logs: Some(folder.into()), ..self }
    }

    pub(super) const fn is_tied(&self) -> bool {
        self.tied
    }

    pub(super) const fn logs(&self) -> Option<&PathBuf> {
        self.logs.as_ref()
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

    /// Asks whoever listens on `port` there in HTTP; a body is sent as JSON. Status and body of the answer, `None` if there
    /// is none in three seconds.
    #[must_use]
    pub fn ask(&self, port: u16, path: &str, body: Option<&str>) -> Option<(u16, String)> {
        let method = if body.is_some() { "POST" } else { "GET" };
        let body = body.unwrap_or_default();
        let socket = self.socket(port);
        let mut stream = TcpStream::connect_timeout(&socket, ASK_MAX).ok()?;
        stream.set_read_timeout(Some(ASK_MAX)).ok()?;
        stream.set_write_timeout(Some(ASK_MAX)).ok()?;
        // HTTP/1.0: the answer ends with the connection, and comes in one piece.
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: {socket}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }
}
