//! One MQTT client: a connection with a buffer either way.
//!
//! Its buffers are as large as what is under way, so that a generator of 20,000 clients stays small.

use std::cell::RefCell;
use std::task::{Context as TaskContext, Poll, ready};

use anyhow::{Result, bail};

use crate::mqtt::{self, Login, Packet, Session, Version};
use crate::wire::{Dialer, Wire};

/// Bytes read at once.
const READ_BYTES: usize = 64 * 1024;

thread_local! {
    /// All clients read into one buffer: only what is no whole packet yet is kept for each.
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

pub(crate) struct Client {
    wire: Wire,
    version: Version,
    /// What is still to be written.
    pub(crate) out: Vec<u8>,
    /// What was read and not taken yet; whole packets are in it only after [`Client::wait_for`].
    kept: Vec<u8>,
    has_kept_packets: bool,
}

impl Client {
    /// Connects; returns when the broker has agreed, and whether it remembers the client. `nth` tells connections of a run apart.
    pub(crate) async fn connect(
        dialer: &Dialer,
        nth: u32,
        version: Version,
        login: &Login,
        session: Session,
    ) -> Result<(Self, bool)> {
        let wire = dialer.dial(nth).await?;
        let mut client = Self { wire, version, out: Vec::new(), kept: Vec::new(), has_kept_packets: false };
        mqtt::connect(&mut client.out, version, login, session)?;
        let mut remembered = false;
        client
            .wait_for(|packet| match packet {
                Packet::Connack { session_present } => {
                    remembered = *session_present;
                    true
                }
                _ => false,
            })
            .await?;
        Ok((client, remembered))
    }

    /// Returns when the broker has agreed.
    pub(crate) async fn subscribe(&mut self, filters: &[&str]) -> Result<()> {
        mqtt::subscribe(&mut self.out, self.version, filters)?;
        self.wait_for(|packet| matches!(packet, Packet::Suback)).await
    }

    /// Until this packet comes; what comes before and behind it is kept for [`Client::poll_receive`].
    async fn wait_for(&mut self, mut is_it: impl FnMut(&Packet<'_>) -> bool) -> Result<()> {
        std::future::poll_fn(|cx| self.poll_wait_for(cx, &mut is_it)).await
    }

    fn poll_wait_for(
        &mut self,
        cx: &mut TaskContext<'_>,
        is_it: &mut impl FnMut(&Packet<'_>) -> bool,
    ) -> Poll<Result<()>> {
        loop {
            let mut at = 0;
            while let Some((packet, bytes)) = mqtt::read(&self.kept[at..], self.version)? {
                if is_it(&packet) {
                    self.kept.drain(at..at + bytes);
                    self.has_kept_packets = !self.kept.is_empty();
                    return Poll::Ready(Ok(()));
                }
                at += bytes;
            }
            self.poll_flush(cx)?;
            let kept = &mut self.kept;
            ready!(READ.with_borrow_mut(|buffer| match self.wire.poll_read(cx, buffer) {
                Poll::Ready(Ok(bytes)) => {
                    kept.extend_from_slice(&buffer[..bytes]);
                    Poll::Ready(anyhow::Ok(()))
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                Poll::Pending => Poll::Pending,
            }))?;
        }
    }

    /// Hands over every packet that is there, with the buffer for answers; ready if there was any. The answers are not written yet.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut TaskContext<'_>,
        mut take: impl FnMut(Packet<'_>, &mut Vec<u8>) -> Result<()>,
    ) -> Poll<Result<()>> {
        let mut some = false;
        if self.has_kept_packets {
            self.has_kept_packets = false;
            let taken = take_packets(&self.kept, self.version, &mut self.out, &mut take)?;
            self.kept.drain(..taken);
            some = taken > 0;
        }
        loop {
            let bytes = READ.with_borrow_mut(|buffer| match self.wire.poll_read(cx, buffer) {
                Poll::Ready(Ok(bytes)) => {
                    let read = &buffer[..bytes];
                    if self.kept.is_empty() {
                        let taken = take_packets(read, self.version, &mut self.out, &mut take)?;
                        self.kept.extend_from_slice(&read[taken..]);
                        some |= taken > 0;
                    } else {
                        self.kept.extend_from_slice(read);
                        let taken = take_packets(&self.kept, self.version, &mut self.out, &mut take)?;
                        self.kept.drain(..taken);
                        some |= taken > 0;
                    }
                    anyhow::Ok(Some(bytes))
                }
                Poll::Ready(Err(error)) => Err(error.into()),
                Poll::Pending => Ok(None),
            })?;
            if bytes.is_none() {
                return if some { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
        }
    }

    /// Writes as much as the socket takes.
    pub(crate) fn flush(&mut self) -> Result<()> {
        Ok(self.wire.write(&mut self.out)?)
    }

    /// The same, and has the task woken when it takes more.
    pub(crate) fn poll_flush(&mut self, cx: &mut TaskContext<'_>) -> Result<()> {
        self.flush()?;
        while !self.is_flushed() {
            match self.wire.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => break,
            }
            self.flush()?;
        }
        Ok(())
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.out.is_empty() && self.wire.is_flushed()
    }

    /// Says goodbye, as far as the socket takes it.
    pub(crate) fn leave(mut self) -> Result<()> {
        mqtt::disconnect(&mut self.out);
        self.flush()
    }

    /// Says goodbye and waits until the broker has closed.
    pub(crate) async fn leave_and_wait(mut self) -> Result<()> {
        mqtt::disconnect(&mut self.out);
        let closed = std::future::poll_fn(|cx| {
            if let Err(error) = self.poll_flush(cx) {
                return Poll::Ready(error);
            }
            loop {
                match self.poll_receive(cx, |_, _| Ok(())) {
                    Poll::Ready(Err(error)) => return Poll::Ready(error),
                    Poll::Ready(Ok(())) => {}
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
        if closed.downcast_ref::<std::io::Error>().is_none() {
            bail!(closed);
        }
        Ok(())
    }

    /// Ends as with a broken network.
    pub(crate) fn cut(self) -> Result<()> {
        Ok(self.wire.cut()?)
    }
}

/// How many bytes of a buffer were whole packets; each was taken.
fn take_packets(
    buffer: &[u8],
    version: Version,
    out: &mut Vec<u8>,
    take: &mut impl FnMut(Packet<'_>, &mut Vec<u8>) -> Result<()>,
) -> Result<usize> {
    let mut at = 0;
    while let Some((packet, bytes)) = mqtt::read(&buffer[at..], version)? {
        take(packet, out)?;
        at += bytes;
    }
    Ok(at)
}
