//! Closing a connection so that its last answer arrives.
//!
//! A socket that is closed with bytes unread is reset, and the reset overtakes the answer: a client
//! that sent too much would be cut off without a word. So the socket comes back from hyper, and what
//! the client still sends is read and thrown away, for a while.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long the end of what is sent is waited for.
const LINGER_MAX: Duration = Duration::from_secs(2);
/// Most bytes that are thrown away.
const DISCARD_BYTES_MAX: u64 = 32 << 20;

/// A socket that goes back to its owner when it is dropped.
pub(crate) struct Lent {
    /// Absent once it is dropped.
    stream: Option<TcpStream>,
    back: Option<oneshot::Sender<TcpStream>>,
}

/// Where a [`Lent`] socket comes back.
pub(crate) struct Owner(oneshot::Receiver<TcpStream>);

/// Lends `stream` to who drops it in the end.
pub(crate) fn lend(stream: TcpStream) -> (Lent, Owner) {
    let (back, owner) = oneshot::channel();
    (Lent { stream: Some(stream), back: Some(back) }, Owner(owner))
}

impl Owner {
    /// Closes the socket, once what the client sent without being asked is out of the way. One that
    /// was passed on (to a WebSocket) is left to whoever has it.
    pub(crate) async fn close(mut self) {
        let Ok(mut stream) = self.0.try_recv() else { return };
        let mut some = [0; 1_024];
        // Nothing unread, or the other end closed as well: nothing would be reset.
        if !matches!(stream.try_read(&mut some), Ok(1..)) {
            return;
        }
        let discard = async {
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(DISCARD_BYTES_MAX), &mut tokio::io::sink()).await
        };
        // Whoever goes on sending is cut off: he was answered.
        if let Ok(Err(error)) = timeout(LINGER_MAX, discard).await {
            tracing::debug!(%error, "the client did not wait for the end");
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(stream), Some(back)) = (self.stream.take(), self.back.take()) {
            // Where nobody waits for it any more it is closed.
            drop(back.send(stream));
        }
    }
}

impl Lent {
    /// Runs `work` with the socket, which is there until the drop.
    fn with<T>(
        self: Pin<&mut Self>,
        work: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.get_mut().stream {
            Some(stream) => work(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}
