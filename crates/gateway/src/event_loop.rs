//! Event loops: one current-thread runtime on a thread of its own for each
//! core, each with a listener of its own for every channel.

use std::net::TcpListener as StdTcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use fieldline_model::CloseCode;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::channel::ChannelLive;
use crate::connection::Connection;
use crate::listen::Listeners;
use crate::shared::Shared;
use crate::{tcp, udp};

/// Wait after accepting failed: mostly there are no file handles left, and
/// others must close some first.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Listeners on their way to one event loop. Full: the supervisor waits.
const QUEUE_MAX: usize = 64;

enum Open {
    Tcp(Arc<ChannelLive>, StdTcpListener),
    Udp(Arc<ChannelLive>, std::net::UdpSocket),
}

pub(crate) struct EventLoops {
    loops: Vec<mpsc::Sender<Open>>,
    stop: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

impl EventLoops {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// If a thread or its runtime cannot be made.
    pub(crate) fn start(shared: &Arc<Shared>) -> std::io::Result<Self> {
        let stop = CancellationToken::new();
        let (mut loops, mut threads) = (Vec::new(), Vec::new());
        for number in 0..shared.config.loops() {
            let (sender, opens) = mpsc::channel(QUEUE_MAX);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (shared, stop) = (Arc::clone(shared), stop.clone());
            let thread = std::thread::Builder::new().name(format!("gateway-{number}"));
            // Dropping the runtime at the end cuts what is left.
            threads.push(thread.spawn(move || runtime.block_on(run(shared, opens, stop)))?);
            loops.push(sender);
        }
        Ok(Self { loops, stop, threads })
    }

    pub(crate) fn count(&self) -> usize {
        self.loops.len()
    }

    /// Gives each event loop its listener.
    pub(crate) async fn open(&self, channel: &Arc<ChannelLive>, listeners: Listeners) {
        let opens: Vec<Open> = match listeners {
            Listeners::Tcp(sockets) => {
                sockets.into_iter().map(|s| Open::Tcp(Arc::clone(channel), s)).collect()
            }
            Listeners::Udp(sockets) => {
                sockets.into_iter().map(|s| Open::Udp(Arc::clone(channel), s)).collect()
            }
        };
        for (event_loop, open) in self.loops.iter().zip(opens) {
            if event_loop.send(open).await.is_err() {
                error!(channel = %channel.id, "an event loop has ended");
            }
        }
    }

    /// Ends the threads; connections that are left are cut.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        let join = move || {
            for thread in self.threads {
                if thread.join().is_err() {
                    error!("an event loop panicked");
                }
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(join).await {
            error!(%error, "event loops were not waited for");
        }
    }
}

async fn run(shared: Arc<Shared>, mut opens: mpsc::Receiver<Open>, stop: CancellationToken) {
    loop {
        let open = tokio::select! {
            () = stop.cancelled() => return,
            open = opens.recv() => open,
        };
        let Some(open) = open else { return };
        match open {
            Open::Tcp(channel, listener) => {
                let listening = channel.listening.clone();
                listening.spawn(accept(Arc::clone(&shared), channel, listener));
            }
            Open::Udp(channel, socket) => {
                let listening = channel.listening.clone();
                listening.spawn(udp::serve(Arc::clone(&shared), channel, socket));
            }
        }
    }
}

async fn accept(shared: Arc<Shared>, channel: Arc<ChannelLive>, listener: StdTcpListener) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            warn!(%error, channel = %channel.id, "the event loop cannot take the listener");
            return;
        }
    };
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = channel.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                failing = false;
                admit(&shared, &channel, stream, peer);
            }
            Err(error) => {
                if !failing {
                    warn!(%error, channel = %channel.id, "connections cannot be accepted now");
                }
                failing = true;
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

fn admit(
    shared: &Arc<Shared>,
    channel: &Arc<ChannelLive>,
    stream: TcpStream,
    peer: std::net::SocketAddr,
) {
    // Answers are small and awaited: never held back to be joined. A socket that
    // refuses is gone already, and reading from it will tell.
    stream.set_nodelay(true).unwrap_or_default();
    let now = shared.now();
    let id = shared.fresh_id(now);
    let connection = Arc::new(Connection::new(id, channel.settings(), peer, now));
    match shared.admit(channel, &connection) {
        Ok(place) => {
            let (shared, channel) = (Arc::clone(shared), Arc::clone(channel));
            let tasks = shared.tasks.clone();
            tasks.spawn(tcp::run(shared, channel, stream, connection, place));
        }
        Err(end) => {
            debug_assert_eq!(end.code, CloseCode::TooManyConnections);
            shared.metrics.closed(end.code);
            shared.refused(channel, &connection, None, &end);
        }
    }
}
