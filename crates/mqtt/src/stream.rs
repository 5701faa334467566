//! A connection's bytes, plain or through TLS, without a buffer while idle.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// Most bytes that one read takes.
const READ_BYTES: usize = 16 * 1024;
/// How long the client's end of a connection is waited for.
const LINGER: Duration = Duration::from_millis(500);
/// Most bytes that are passed over while a connection ends.
const LINGER_BYTES_MAX: usize = 1 << 20;

thread_local! {
    /// What every connection of this thread reads into, so that an idle one holds nothing.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// A client's connection.
pub(crate) enum Stream {
    /// As it is.
    Plain(TcpStream),
    /// Through TLS; boxed, because its state is large.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Reads what is there onto the end of `input`; 0 bytes at the end of the stream.
    pub(crate) fn poll_read_into(
        &mut self,
        context: &mut Context<'_>,
        input: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            let read = match self {
                Self::Plain(stream) => Pin::new(stream).poll_read(context, &mut buffer),
                Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(context, &mut buffer),
            };
            read.map_ok(|()| {
                input.extend_from_slice(buffer.filled());
                buffer.filled().len()
            })
        })
    }

    /// Writes some of `output`.
    pub(crate) fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        output: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, output),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(context, output),
        }
    }

    /// Sends on what was written; only TLS holds anything back.
    pub(crate) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(context),
        }
    }

    /// Writes all of `output` and ends our side, both within `limit`, then waits
    /// for the client's end: closing while bytes of the client wait would reset
    /// the connection, and with it what we have just said. Whether the client
    /// was there to hear it is all the same to the caller.
    pub(crate) async fn finish(&mut self, output: &mut BytesMut, limit: Duration) {
        let written = tokio::time::timeout(limit, self.write_all(output)).await;
        if matches!(written, Ok(Ok(()))) {
            let lingered = tokio::time::timeout(LINGER, self.linger(output)).await;
            drop(lingered);
        }
    }

    async fn write_all(&mut self, output: &mut BytesMut) -> io::Result<()> {
        while !output.is_empty() {
            let written = std::future::poll_fn(|cx| self.poll_write(cx, output)).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            output.advance(written);
        }
        std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
        std::future::poll_fn(|cx| match self {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        })
        .await
    }

    async fn linger(&mut self, scrap: &mut BytesMut) -> io::Result<()> {
        let mut passed_over = 0;
        while passed_over < LINGER_BYTES_MAX {
            scrap.clear();
            match std::future::poll_fn(|cx| self.poll_read_into(cx, scrap)).await? {
                0 => break,
                bytes => passed_over += bytes,
            }
        }
        Ok(())
    }
}
