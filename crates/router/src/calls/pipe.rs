//! Bytes of streams on their way between a service and HTTP/2, which makes whoever writes too fast wait.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use futures_util::Stream as _;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{
    AsyncRead, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf, WriteHalf,
};
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What is sent: some bytes, then what a stream says until it ends.
pub(super) struct Outgoing {
    first: Option<Bytes>,
    then: Option<ReaderStream<ReadHalf<DuplexStream>>>,
}

impl Outgoing {
    pub(super) fn bytes(bytes: Bytes) -> Self {
        Self { first: Some(bytes).filter(|bytes| !bytes.is_empty()), then: None }
    }

    pub(super) fn stream(first: Bytes, then: ReadHalf<DuplexStream>) -> Self {
        Self { then: Some(ReaderStream::new(then)), ..Self::bytes(first) }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(then) = &mut self.then else { return Poll::Ready(None) };
        Pin::new(then).poll_next(cx).map(|next| next.map(|bytes| bytes.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.then.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.then {
            Some(_) => SizeHint::default(),
            None => SizeHint::with_exact(self.first.as_ref().map_or(0, Bytes::len) as u64),
        }
    }
}

/// Takes what comes to `to` until either ends, then says that it has ended.
pub(super) async fn pump(left: Bytes, mut from: Incoming, mut to: WriteHalf<DuplexStream>) {
    let work = async {
        to.write_all(&left).await?;
        while let Some(Ok(frame)) = from.frame().await {
            if let Ok(data) = frame.into_data() {
                to.write_all(&data).await?;
            }
        }
        Ok::<(), std::io::Error>(())
    };
    // Whoever reads there may be gone: then nobody misses the rest.
    work.await.unwrap_or_default();
    to.shutdown().await.unwrap_or_default();
}

/// Why a body could not be read.
pub(super) enum ReadError {
    /// It is longer.
    TooLong,
    /// The connection broke, as this says.
    Broken(hyper::Error),
}

/// Reads all, `most` bytes at most.
pub(super) async fn read_all(mut from: Incoming, most: usize) -> Result<Bytes, ReadError> {
    let mut all: Vec<Bytes> = Vec::new();
    let mut bytes = 0_usize;
    while let Some(frame) = from.frame().await {
        let Ok(data) = frame.map_err(ReadError::Broken)?.into_data() else { continue };
        bytes = bytes.saturating_add(data.len());
        if bytes > most {
            return Err(ReadError::TooLong);
        }
        all.push(data);
    }
    Ok(joined(all))
}

/// Reads the first `count` bytes; what came with them is left over. `None` where they do not come.
pub(super) async fn read_first(from: &mut Incoming, count: usize) -> Option<(Bytes, Bytes)> {
    let mut all: Vec<Bytes> = Vec::new();
    let mut missing = count;
    while missing > 0 {
        let Ok(mut data) = from.frame().await?.ok()?.into_data() else { continue };
        let first = data.split_to(missing.min(data.len()));
        missing -= first.len();
        all.push(first);
        if data.has_remaining() {
            return Some((joined(all), data));
        }
    }
    Some((joined(all), Bytes::new()))
}

fn joined(mut all: Vec<Bytes>) -> Bytes {
    match all.len() {
        0 | 1 => all.pop().unwrap_or_default(),
        _ => all.concat().into(),
    }
}

/// A stream as its opener has it: what comes for it is not waited for any more when it is dropped.
pub(super) struct Opened {
    stream: DuplexStream,
    _wanted: DropGuard,
}

impl Opened {
    /// Also gives what is cancelled when it is dropped.
    pub(super) fn new(stream: DuplexStream) -> (Self, CancellationToken) {
        let token = CancellationToken::new();
        (Self { stream, _wanted: token.clone().drop_guard() }, token)
    }
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl AsyncWrite for Opened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A task that ends when nobody waits for it; `None` where its runtime has ended.
pub(super) struct Aborting<T>(pub(super) JoinHandle<T>);

impl<T> Future for Aborting<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(cx).map(Result::ok)
    }
}

impl<T> Drop for Aborting<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
