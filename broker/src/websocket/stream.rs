//! A WebSocket as a byte stream, once its handshake is done.
//!
//! Payloads come through in the buffer they were read into; what is written is copied once, behind a frame's header. At most one message, one pong
//! and one Close wait for the socket, whatever the client sends. Whoever breaks the protocol is told why, and is not listened to any longer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::frames::{self, Decoded, Ending, Fault, Frames};
use crate::service::Peer;

/// Largest message that is sent.
const SENT_BYTES_MAX: usize = 64 * 1024;
/// An empty output buffer larger than this is given back.
const OUT_KEPT: usize = 1_024;
/// A socket that is closed with bytes unread takes back what it has sent: so long, and so many bytes, are read on for the client to learn why.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 1024 * 1024;

enum Stage {
    Open,
    /// A Close was sent. Nothing can follow it, so what is still written goes nowhere: what the client sent before its own is worked off first, and
    /// answered, and only then does the connection end, as after a FIN over TCP.
    Closed,
    /// The client has to learn of this.
    Lingering {
        fault: Fault,
        until: Pin<Box<Sleep>>,
        bytes: usize,
    },
}

/// The server's end.
pub(crate) struct WebSocketStream<T> {
    io: T,
    peer: Peer,
    frames: Frames,
    stage: Stage,
    /// Frames that wait for the socket, from `written` on.
    out: Vec<u8>,
    written: usize,
    needs_flush: bool,
    pong: Option<Vec<u8>>,
}

impl<T> WebSocketStream<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    pub(crate) fn new(io: T, message_bytes_max: u64, peer: Peer) -> Self {
        Self {
            io,
            peer,
            frames: Frames::new(message_bytes_max),
            stage: Stage::Open,
            out: Vec::new(),
            written: 0,
            needs_flush: false,
            pong: None,
        }
    }

    /// Writes what waits.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.out.len() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.needs_flush = true;
        }
        self.written = 0;
        self.out.clear();
        self.out.shrink_to(OUT_KEPT);
        Poll::Ready(Ok(()))
    }

    /// Writes what waits, a pong that is due with it, and hands it to the network.
    fn poll_all_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        if let Some(pong) = self.pong.take() {
            frames::put_pong(&mut self.out, &pong);
            ready!(self.poll_out(cx))?;
        }
        if self.needs_flush {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    fn forget_output(&mut self) {
        self.written = 0;
        self.out.clear();
        self.pong = None;
        self.needs_flush = false;
    }

    /// Whatever ends here is told to the client.
    fn end(&mut self, ending: Ending) {
        self.pong = None;
        match ending {
            Ending::Closed(code) => {
                frames::put_close(&mut self.out, code, "");
                self.stage = Stage::Closed;
            }
            Ending::Fault(fault) => {
                tracing::debug!(peer = %self.peer, code = fault.code(), reason = fault.reason(), "websocket closed");
                frames::put_close(&mut self.out, Some(fault.code()), fault.reason());
                let until = Box::pin(tokio::time::sleep(LINGER_TIMEOUT));
                self.stage = Stage::Lingering { fault, until, bytes: 0 };
            }
        }
    }

    /// Reads on without listening, until the client is gone or has had its time.
    fn poll_linger(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(sent) = self.poll_all_out(cx) {
            sent?;
            // The client sees the end behind the Close frame.
            if let Poll::Ready(shut) = Pin::new(&mut self.io).poll_shutdown(cx) {
                shut?;
            }
        }
        let Stage::Lingering { fault, until, bytes } = &mut self.stage else { return Poll::Ready(Ok(())) };
        let fault = io::Error::new(io::ErrorKind::InvalidData, fault.reason());
        while *bytes < LINGER_BYTES_MAX && until.as_mut().poll(cx).is_pending() {
            let mut unheard = ReadBuf::new(buf.initialize_unfilled());
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut unheard))?;
            if unheard.filled().is_empty() {
                break;
            }
            *bytes += unheard.filled().len();
        }
        Poll::Ready(Err(fault))
    }
}

impl<T> AsyncRead for WebSocketStream<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            match &this.stage {
                Stage::Open => {}
                Stage::Lingering { .. } => return this.poll_linger(cx, buf),
                Stage::Closed => {
                    // If the socket has no room for the answer, its client does not read.
                    return match this.poll_all_out(cx) {
                        Poll::Ready(sent) => Poll::Ready(sent),
                        Poll::Pending => Poll::Ready(Ok(())),
                    };
                }
            }
            // A pong does not wait for something else to be said. If there is no room, this is asked again when there is.
            if let Poll::Ready(Err(_)) = this.poll_all_out(cx) {
                // The client takes nothing any more. What it sent before is still read.
                this.forget_output();
            }
            let mut piece = ReadBuf::new(buf.initialize_unfilled());
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            let Decoded { bytes, ping, ending } = this.frames.decode(piece.filled_mut(), Instant::now());
            if ping.is_some() {
                this.pong = ping;
            }
            if let Some(ending) = ending {
                this.end(ending);
            }
            if bytes > 0 {
                buf.advance(bytes);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<T> AsyncWrite for WebSocketStream<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match &this.stage {
            Stage::Open => {}
            Stage::Closed => return Poll::Ready(Ok(buf.len())),
            Stage::Lingering { .. } => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
        ready!(this.poll_out(cx))?;
        if let Some(pong) = this.pong.take() {
            frames::put_pong(&mut this.out, &pong);
        }
        let take = buf.len().min(SENT_BYTES_MAX);
        frames::put_message(&mut this.out, &buf[..take]);
        // The message is taken, whether or not the socket has room for it now.
        if let Poll::Ready(sent) = this.poll_out(cx) {
            sent?;
        }
        Poll::Ready(Ok(take))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_all_out(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if matches!(this.stage, Stage::Open) {
            this.pong = None;
            frames::put_close(&mut this.out, Some(frames::NORMAL_CLOSURE), "");
            this.stage = Stage::Closed;
        }
        ready!(this.poll_all_out(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    const MASK: [u8; 4] = [1, 2, 3, 4];

    fn pair(room: usize) -> (DuplexStream, WebSocketStream<DuplexStream>) {
        let (client, server) = tokio::io::duplex(room);
        (client, WebSocketStream::new(server, 100_000, Peer::default()))
    }

    /// A client's short frame.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![first, 0x80 | u8::try_from(payload.len()).unwrap()];
        bytes.extend(MASK);
        bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    #[tokio::test]
    async fn bytes_come_through_whatever_messages_they_are_in() {
        let (mut client, mut server) = pair(1 << 20);
        let bytes = [frame(0x02, b"he"), frame(0x00, b""), frame(0x80, b"llo "), frame(0x82, b"world")].concat();
        client.write_all(&bytes).await.unwrap();
        let mut read = [0; 11];
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello world");
        server.write_all(b"answer").await.unwrap();
        server.flush().await.unwrap();
        let mut answer = [0; 8];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"\x82\x06answer");
    }

    #[tokio::test]
    async fn a_ping_is_answered_while_nothing_else_is_said() {
        let (mut client, mut server) = pair(1 << 20);
        client.write_all(&frame(0x89, b"there?")).await.unwrap();
        let mut pong = [0; 8];
        tokio::select! {
            read = server.read_u8() => panic!("a ping is no payload: {read:?}"),
            answered = client.read_exact(&mut pong) => drop(answered.unwrap()),
        }
        assert_eq!(&pong, b"\x8a\x06there?");
    }

    #[tokio::test]
    async fn a_client_that_closes_is_answered_and_is_gone() {
        let (mut client, mut server) = pair(1 << 20);
        client.write_all(&[frame(0x82, b"bye"), frame(0x88, &[0x03, 0xe9])].concat()).await.unwrap();
        let mut read = Vec::new();
        server.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"bye");
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [0x88, 2, 0x03, 0xe9]);
    }

    /// What came before a Close is answered when nothing can be said any more: that must not keep it from being worked off.
    #[tokio::test]
    async fn answers_after_a_close_go_nowhere_and_the_close_is_answered() {
        let (mut client, mut server) = pair(1 << 20);
        client.write_all(&[frame(0x82, b"bye"), frame(0x88, &[0x03, 0xe9])].concat()).await.unwrap();
        let mut read = [0; 64];
        assert_eq!(server.read(&mut read).await.unwrap(), 3);
        server.write_all(&[7; 100_000]).await.unwrap();
        server.flush().await.unwrap();
        assert_eq!(server.read(&mut read).await.unwrap(), 0);
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [0x88, 2, 0x03, 0xe9]);
    }

    #[tokio::test]
    async fn a_fault_is_told_though_the_client_goes_on_sending() {
        let (mut client, mut server) = pair(1 << 16);
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            (server.read_to_end(&mut read).await, read)
        });
        client.write_all(&[frame(0x82, b"good"), frame(0x81, b"text")].concat()).await.unwrap();
        client.write_all(&vec![0; 500_000]).await.unwrap();
        let mut told = Vec::new();
        client.read_to_end(&mut told).await.unwrap();
        assert_eq!(told[..4], [0x88, told[1], 0x03, 0xeb], "{told:02x?}");
        drop(client);
        let (end, read) = reading.await.unwrap();
        assert_eq!((end.unwrap_err().kind(), read.as_slice()), (io::ErrorKind::InvalidData, &b"good"[..]));
    }

    #[tokio::test]
    async fn a_client_that_stays_after_a_fault_is_not_waited_for() {
        let (mut client, mut server) = pair(16);
        // It reads nothing either: there is no room for all of the Close frame.
        client.write_all(&frame(0x81, b"text")).await.unwrap();
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn the_servers_end_is_a_close_frame() {
        let (mut client, mut server) = pair(1 << 20);
        server.write_all(&[7; 70_000]).await.unwrap();
        server.shutdown().await.unwrap();
        let mut told = Vec::new();
        client.read_to_end(&mut told).await.unwrap();
        assert!(told.ends_with(&[0x88, 2, 0x03, 0xe8]), "{:02x?}", &told[told.len() - 10..]);
        // Two messages, of which none is longer than is sent at once.
        assert_eq!(told.len(), 70_000 + 10 + 4 + 4);
    }

    /// Whatever a client sends, and reads or not, no more than a message, a pong and a Close wait for it.
    #[tokio::test]
    async fn pings_to_a_client_that_does_not_read_take_no_memory() {
        let (mut client, mut server) = pair(64);
        for _ in 0..90 {
            client.write_all(&frame(0x89, &[7; 50])).await.unwrap();
            let read = std::future::poll_fn(|cx| {
                let mut bytes = [0; 64];
                let mut buf = ReadBuf::new(&mut bytes);
                Poll::Ready(Pin::new(&mut server).poll_read(cx, &mut buf).map_ok(|()| buf.filled().len()))
            });
            assert!(read.await.is_pending());
            assert!(server.out.capacity() <= OUT_KEPT, "{}", server.out.capacity());
        }
    }
}
