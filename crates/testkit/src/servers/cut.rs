//! A wire that can be cut: a TCP relay before a server, for tests of partitions.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What a [`Cut`] lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// All.
    Open,
    /// Bytes of clients are held back; the server's arrive.
    ToServerHeld,
    /// Bytes of the server are held back; clients' arrive.
    ToClientHeld,
    /// Nothing either way; connections stay open, as behind a dead link.
    Held,
    /// Connections are refused, and those there are end.
    Refused,
}

impl Flow {
    const fn holds(self, to_server: bool) -> bool {
        match self {
            Self::Open | Self::Refused => false,
            Self::ToServerHeld => to_server,
            Self::ToClientHeld => !to_server,
            Self::Held => true,
        }
    }
}

/// A relay to a server of this machine. What is held back is delivered when the flow opens again.
pub struct Cut {
    address: SocketAddr,
    flow: watch::Sender<Flow>,
    task: JoinHandle<()>,
}

impl Cut {
    /// Relays to `port` of 127.0.0.1.
    ///
    /// # Panics
    ///
    /// When no port is free.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let flow = watch::Sender::new(Flow::Open);
        let task = tokio::spawn(relay(listener, port, flow.subscribe()));
        Self { address, flow, task }
    }

    /// Where clients connect.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.address.port()
    }

    /// Lets through as told from now on.
    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.flow.send_replace(Flow::Refused);
        self.task.abort();
    }
}

async fn relay(listener: TcpListener, port: u16, flow: watch::Receiver<Flow>) {
    while let Ok((client, _)) = listener.accept().await {
        if *flow.borrow() == Flow::Refused {
            continue;
        }
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { continue };
        let ((from_client, to_client), (from_server, to_server)) =
            (client.into_split(), server.into_split());
        tokio::spawn(pump(from_client, to_server, true, flow.clone()));
        tokio::spawn(pump(from_server, to_client, false, flow.clone()));
    }
}

/// Copies one direction until it ends or connections are refused.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    to_server: bool,
    mut flow: watch::Receiver<Flow>,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut ended = flow.clone();
    let refused = async {
        // An error says that the relay is gone, and the connection with it.
        ended.wait_for(|flow| *flow == Flow::Refused).await.map(|_| ()).unwrap_or_default();
    };
    let copy = async {
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if flow.wait_for(|flow| !flow.holds(to_server)).await.is_err() {
                return;
            }
            let Some(bytes) = buffer.get(..read) else { return };
            if to.write_all(bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = copy => {}
        () = refused => {}
    }
}
