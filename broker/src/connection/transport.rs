//! Waiting for anything that can happen, and the bytes in and out.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::{Connection, End, OUT_READING_MAX, PACKETS, PENDING_READING_MAX, READ_BUFFER};
use crate::service::{Observation, Service};
use crate::turns::Turn;

/// A larger output buffer is not kept for the next connection.
const OUT_KEPT: usize = 256 * 1024;
/// How long a connection that ends may take to send its last bytes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long, and how many bytes, a connection that was closed for a reason is still read from.
const HEARD_OUT_TIMEOUT: Duration = Duration::from_millis(500);
const HEARD_OUT_BYTES_MAX: usize = 1024 * 1024;

thread_local! {
    /// An output buffer that has grown: a connection has it as long as it has something to write, which is nearly always until its turn ends.
    static OUT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A buffer to write to, perhaps one that others have written to before.
fn lend() -> Vec<u8> {
    OUT.take()
}

fn give_back(out: Vec<u8>) {
    if out.capacity() <= OUT_KEPT {
        OUT.set(out);
    }
}

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// Waits for anything, and takes in whatever is there.
    pub(super) fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(waiting) = &mut self.waiting
            && let Poll::Ready(place) = waiting.as_mut().poll(cx)
        {
            // At once, whoever's turn it is: others wait for that place.
            self.waiting = None;
            self.submit(place);
            self.busy = true;
        }
        if let Some(coming) = self.coming.as_deref_mut() {
            ready!(coming.turn.poll(&self.shared.turns, cx));
        }
        let mut progress = std::mem::take(&mut self.busy);
        let take_ordinary = self.session.as_ref().is_some_and(|session| session.queue.is_empty());
        if let Poll::Ready(mail) = self.mailbox.poll(cx, take_ordinary) {
            self.on_mail(mail);
            progress = true;
        }
        if let Some(reading) = &mut self.reading
            && let Poll::Ready(page) = reading.as_mut().poll(cx)
        {
            self.page = Some(Box::new(page));
            self.reading = None;
            progress = true;
        }
        if self.cut {
            self.forget_output();
        } else {
            match self.poll_write(cx) {
                Poll::Ready(Ok(true)) => progress = true,
                Poll::Ready(Ok(false)) | Poll::Pending => {}
                Poll::Ready(Err(())) => {
                    self.cut = true;
                    self.forget_output();
                    progress = true;
                }
            }
        }
        self.dry = false;
        if self.may_read() {
            match self.poll_read(cx) {
                Poll::Ready(Ok(())) => progress = true,
                Poll::Ready(Err(())) => {
                    self.end = Some(End::Socket);
                    return Poll::Ready(());
                }
                Poll::Pending if self.cut => {
                    self.end = Some(End::Socket);
                    return Poll::Ready(());
                }
                Poll::Pending => {
                    self.dry = true;
                    self.read_in_turn = 0;
                }
            }
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            progress = true;
        }
        if progress {
            if self.engine.out.capacity() == 0 {
                self.engine.out = lend();
            }
            Poll::Ready(())
        } else {
            // Whoever has a session and nothing to read from the log is there.
            let is_coming = self.session.is_none() || self.reading.is_some();
            if let Some(coming) = self.coming.as_deref_mut() {
                coming.turn = Turn::None;
            }
            self.coming.take_if(|_| !is_coming);
            self.engine.rest();
            Poll::Pending
        }
    }

    fn may_read(&self) -> bool {
        self.unsent.is_empty()
            && self.held.is_empty()
            && self.packets.is_empty()
            && self.pending.len() < PENDING_READING_MAX
            && self.end.is_none()
            && !self.stopping
            && self.engine.fault.is_none()
            && self.engine.out.len() - self.out_at < OUT_READING_MAX
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        if !self.early.is_empty() {
            let bytes = std::mem::take(&mut self.early);
            self.feed(&bytes);
            return Poll::Ready(Ok(()));
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            let connecting = self.coming.as_deref_mut().filter(|_| self.session.is_none());
            let left = connecting.as_ref().map_or(u32::MAX, |coming| coming.bytes_left);
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            let most = buffer.len().min(left);
            if most == 0 {
                self.shared.service.observe(Observation::Limited("connect_bytes"));
                return Poll::Ready(Err(()));
            }
            let mut read = ReadBuf::new(&mut buffer[..most]);
            if ready!(Pin::new(&mut self.io).poll_read(cx, &mut read)).is_err() || read.filled().is_empty() {
                return Poll::Ready(Err(()));
            }
            let bytes = u32::try_from(read.filled().len()).unwrap_or(u32::MAX);
            self.read_in_turn = self.read_in_turn.saturating_add(bytes);
            if let Some(coming) = connecting {
                coming.bytes_left = coming.bytes_left.saturating_sub(bytes);
            }
            self.feed(read.filled());
            Poll::Ready(Ok(()))
        })
    }

    fn feed(&mut self, bytes: &[u8]) {
        if self.packets.capacity() == 0 {
            self.packets = PACKETS.take();
        }
        let taken = self.engine.feed(bytes, &mut self.packets);
        if let Some(limit) = self.engine.overstepped.take() {
            self.limited(limit.limit());
        }
        if taken < bytes.len() && self.engine.fault.is_none() {
            self.early.extend_from_slice(&bytes[taken..]);
        }
        // Only whole packets show that a client is there; a byte now and then does not.
        if !self.packets.is_empty() {
            self.heard_at = Instant::now();
        }
    }

    /// `true` if anything was written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, ()>> {
        let mut written = false;
        while self.out_at < self.engine.out.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.engine.out[self.out_at..]) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.out_at += n;
                    self.wrote_at = Instant::now();
                    self.needs_flush = true;
                    written = true;
                }
                Poll::Ready(_) => return Poll::Ready(Err(())),
                Poll::Pending => return Poll::Ready(Ok(written)),
            }
        }
        if self.out_at > 0 {
            self.out_at = 0;
            self.engine.out.clear();
            self.on_all_written();
        }
        if self.engine.out.is_empty() && self.engine.out.capacity() > 0 {
            give_back(std::mem::take(&mut self.engine.out));
        }
        if self.needs_flush {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.needs_flush = false,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(())),
                Poll::Pending => {}
            }
        }
        Poll::Ready(Ok(written))
    }

    /// Nobody takes it any more: it stays unacknowledged.
    fn forget_output(&mut self) {
        self.out_at = 0;
        self.engine.out.clear();
        self.unwritten.clear();
    }

    pub(super) async fn write_last_bytes(&mut self) {
        let last = async {
            self.io.write_all(&self.engine.out[self.out_at..]).await?;
            self.io.flush().await?;
            self.io.shutdown().await
        };
        match tokio::time::timeout(CLOSE_TIMEOUT, last).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(peer = %self.peer, %error, "closing failed"),
            Err(_) => tracing::debug!(peer = %self.peer, "the client did not take its last bytes"),
        }
    }

    /// Reads what the client has still sent, and forgets it: with unread bytes a closed socket is reset, and a reset takes the DISCONNECT that
    /// says why with it.
    pub(super) async fn hear_out(&mut self) {
        let ended = async {
            // On the heap: as part of the future every connection would carry it all along.
            let mut bytes = vec![0; 4 * 1024];
            let mut left = HEARD_OUT_BYTES_MAX;
            while left > 0 {
                match self.io.read(&mut bytes).await {
                    Ok(read) if read > 0 => left = left.saturating_sub(read),
                    _ => return,
                }
            }
        };
        if tokio::time::timeout(HEARD_OUT_TIMEOUT, ended).await.is_err() {
            tracing::trace!(peer = %self.peer, "the client does not close its side");
        }
    }
}
