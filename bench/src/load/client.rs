//! One MQTT client: a socket with a buffer either way.

use std::io;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use tokio::net::TcpStream;

use crate::mqtt::{self, Packet, Version};

/// Bytes read at once.
const READ_BYTES: usize = 16 * 1024;

pub(crate) struct Client {
    stream: TcpStream,
    pub(crate) version: Version,
    pub(crate) out: Vec<u8>,
    read: Vec<u8>,
}

impl Client {
    /// Connects, and subscribes if there is a filter; returns when the broker has agreed.
    pub(crate) async fn open(addr: SocketAddr, version: Version, user: &str, filter: Option<&str>) -> Result<Self> {
        let stream = TcpStream::connect(addr).await.with_context(|| format!("connecting to {addr}"))?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream, version, out: Vec::new(), read: Vec::new() };
        mqtt::connect(&mut client.out, version, &format!("{user}-device"), user)?;
        client.expect(&Packet::Connack).await?;
        if let Some(filter) = filter {
            mqtt::subscribe(&mut client.out, version, filter)?;
            client.expect(&Packet::Suback).await?;
        }
        Ok(client)
    }

    async fn expect(&mut self, expected: &Packet<'_>) -> Result<()> {
        let mut found = false;
        loop {
            self.flush()?;
            self.ready().await?;
            self.receive(|packet, _| {
                found |= packet == *expected;
                Ok(())
            })?;
            if found {
                return Ok(());
            }
        }
    }

    /// Waits until there is something to read, or room for what is still to be written.
    pub(crate) async fn ready(&self) -> Result<()> {
        let interest = if self.out.is_empty() {
            tokio::io::Interest::READABLE
        } else {
            tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE
        };
        self.stream.ready(interest).await?;
        Ok(())
    }

    /// Writes as much as the socket takes.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let mut written = 0;
        while written < self.out.len() {
            match self.stream.try_write(&self.out[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.out.drain(..written);
        Ok(())
    }

    /// Hands over every packet that is there, with the buffer for answers.
    pub(crate) fn receive(&mut self, mut take: impl FnMut(Packet<'_>, &mut Vec<u8>) -> Result<()>) -> Result<()> {
        loop {
            let before = self.read.len();
            self.read.resize(before + READ_BYTES, 0);
            let read = self.stream.try_read(&mut self.read[before..]);
            self.read.truncate(before + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(bytes) => ensure!(bytes > 0, "the broker closed a connection"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            let full = self.read.len() == before + READ_BYTES;
            let mut at = 0;
            while let Some((packet, bytes)) = mqtt::read(&self.read[at..], self.version)? {
                take(packet, &mut self.out)?;
                at += bytes;
            }
            self.read.drain(..at);
            // Less than there was room for: there is no more for now.
            if !full {
                return Ok(());
            }
        }
    }

    pub(crate) fn close(mut self) -> Result<()> {
        mqtt::disconnect(&mut self.out);
        self.flush()
    }
}
