//! The bytes of one connection: TCP, TLS, WebSocket, or WebSocket over TLS. Knows nothing of MQTT but where a packet ends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};

use anyhow::{Context, Result, ensure};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

use crate::mqtt;
use crate::websocket::{self, Frames};

/// A source address has fewer ports than a storm has clients.
const CLIENTS_PER_ADDRESS: u32 = 4_000;
/// The head of an answer is not longer.
const ANSWER_BYTES_MAX: usize = 8 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    Tcp,
    Tls,
    Ws,
    Wss,
}

/// Opens connections of one kind to one broker.
pub(crate) struct Dialer {
    addr: SocketAddr,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// The request that opens a WebSocket.
    request: Option<String>,
    /// Before this run's addresses.
    sources: Ipv4Addr,
}

impl Dialer {
    /// Without a file of authorities any certificate is taken: it is speed that is measured.
    pub(crate) fn new(
        addr: SocketAddr,
        transport: Transport,
        ca: Option<&Path>,
        server_name: &str,
        path: &str,
    ) -> Result<Self> {
        let (over_tls, over_web_socket) = match transport {
            Transport::Tcp => (false, false),
            Transport::Tls => (true, false),
            Transport::Ws => (false, true),
            Transport::Wss => (true, true),
        };
        let tls = if over_tls {
            let alpn: &[u8] = if over_web_socket { b"http/1.1" } else { b"mqtt" };
            Some((client_config(ca, alpn)?, ServerName::try_from(server_name.to_owned())?))
        } else {
            None
        };
        let host = websocket::host(addr, server_name)?;
        let request = over_web_socket.then(|| websocket::request(&host, path));
        Ok(Self { addr, tls, request, sources: sources(fastrand::u16(..)) })
    }

    /// The nth client's connection.
    pub(crate) async fn dial(&self, nth: u32) -> Result<Wire> {
        let addr = self.addr;
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = source(addr.ip(), self.sources, nth) {
            socket.bind(SocketAddr::new(source, 0)).with_context(|| format!("a port of {source}"))?;
        }
        let stream = socket.connect(addr).await.with_context(|| format!("connecting to {addr}"))?;
        stream.set_nodelay(true)?;
        let mut wire = Wire { stream, tls: None, frames: None, pending: Vec::new(), written: 0 };
        if let Some((config, name)) = &self.tls {
            wire.tls = Some(Box::new(ClientConnection::new(Arc::clone(config), name.clone())?));
            std::future::poll_fn(|cx| wire.poll_handshake(cx)).await.context("a TLS handshake")?;
        }
        if let Some(request) = &self.request {
            let mut request = request.clone().into_bytes();
            let mut answer = Vec::new();
            let mut byte = [0];
            while !websocket::is_whole(&answer) {
                ensure!(answer.len() < ANSWER_BYTES_MAX, "a long answer to a request for a WebSocket");
                wire.write(&mut request)?;
                // One by one: what comes behind is a frame.
                std::future::poll_fn(|cx| wire.poll_read(cx, &mut byte)).await?;
                answer.push(byte[0]);
            }
            websocket::judge(&answer)?;
            wire.frames = Some(Frames::default());
        }
        Ok(wire)
    }
}

/// Before a run's own addresses of loopback: those of a run before may have many ports in use still, for a minute after their connections'
/// end, and to look for a free one among them takes time.
fn sources(run: u16) -> Ipv4Addr {
    let [high, low] = run.to_be_bytes();
    // 127.0 is everybody's, and what follows the last is no loopback any more.
    Ipv4Addr::new(127, high.clamp(1, 250), low, 0)
}

/// Where the nth client comes from; on loopback there are addresses enough.
fn source(broker: IpAddr, sources: Ipv4Addr, nth: u32) -> Option<IpAddr> {
    let IpAddr::V4(broker) = broker else { return None };
    if !broker.is_loopback() || nth < CLIENTS_PER_ADDRESS {
        return None;
    }
    let block = nth / CLIENTS_PER_ADDRESS;
    Some(IpAddr::V4(Ipv4Addr::from(u32::from(sources) + block)))
}

fn client_config(ca: Option<&Path>, alpn: &[u8]) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let mut config = match ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(path).with_context(|| path.display().to_string())? {
                roots.add(certificate?)?;
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
        None => builder.dangerous().with_custom_certificate_verifier(Arc::new(TakeAny(provider))).with_no_client_auth(),
    };
    // Every handshake is a whole one, as those of different clients are.
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// Takes whatever certificate a broker shows.
#[derive(Debug)]
struct TakeAny(Arc<CryptoProvider>);

impl ServerCertVerifier for TakeAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// One connection.
pub(crate) struct Wire {
    stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
    frames: Option<Frames>,
    /// Frames, and how much of them was written.
    pending: Vec<u8>,
    written: usize,
}

/// The socket as rustls wants it: what is not there yet is `WouldBlock`, and whoever polls is woken when it comes.
struct Polled<'a, 'b, 'c>(&'a mut TcpStream, &'b mut TaskContext<'c>);

impl io::Read for Polled<'_, '_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        match Pin::new(&mut *self.0).poll_read(self.1, &mut buffer) {
            Poll::Ready(read) => read.map(|()| buffer.filled().len()),
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

struct Written<'a>(&'a TcpStream);

impl io::Write for Written<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire {
    /// Reads what a socket has for MQTT; it may be nothing but what belongs to the layers between. 0 bytes are no end: that is an error.
    pub(crate) fn poll_read(&mut self, cx: &mut TaskContext<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = match &mut self.tls {
            None => {
                let mut buffer = ReadBuf::new(buffer);
                ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
                buffer.filled().len()
            }
            Some(tls) => loop {
                match io::Read::read(&mut tls.reader(), buffer) {
                    Ok(bytes) => break bytes,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
                match tls.read_tls(&mut Polled(&mut self.stream, cx)) {
                    Ok(0) => break 0,
                    Ok(_) => {
                        tls.process_new_packets().map_err(io::Error::other)?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                    Err(error) => return Poll::Ready(Err(error)),
                }
            },
        };
        if read == 0 {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the broker closed a connection")));
        }
        let Some(frames) = &mut self.frames else { return Poll::Ready(Ok(read)) };
        Poll::Ready(frames.unwrap(&mut buffer[..read], &mut self.pending))
    }

    /// Writes MQTT packets, as much as the socket takes. Bytes that no longer have to be kept are taken out of `out`.
    pub(crate) fn write(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        if self.frames.is_some() {
            let mut at = 0;
            while at < out.len() {
                let bytes = mqtt::first_packet_bytes(&out[at..]).map_err(io::Error::other)?;
                websocket::wrap(&mut self.pending, &out[at..at + bytes]);
                at += bytes;
            }
            out.clear();
            self.written += write(&self.stream, self.tls.as_deref_mut(), &self.pending[self.written..])?;
            if self.written == self.pending.len() {
                self.pending.clear();
                self.written = 0;
            }
        } else {
            let written = write(&self.stream, self.tls.as_deref_mut(), out)?;
            out.drain(..written);
        }
        Ok(())
    }

    /// Whether everything was written that [`Wire::write`] was given.
    pub(crate) fn is_flushed(&self) -> bool {
        self.pending.is_empty() && self.tls.as_ref().is_none_or(|tls| !tls.wants_write())
    }

    /// Until there is room to write.
    pub(crate) fn poll_write_ready(&self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.stream.poll_write_ready(cx)
    }

    fn poll_handshake(&mut self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        loop {
            write(&self.stream, self.tls.as_deref_mut(), &[])?;
            let Some(tls) = &mut self.tls else { return Poll::Ready(Ok(())) };
            if !tls.is_handshaking() && !tls.wants_write() {
                return Poll::Ready(Ok(()));
            }
            if tls.wants_write() {
                ready!(self.stream.poll_write_ready(cx))?;
                continue;
            }
            match tls.read_tls(&mut Polled(&mut self.stream, cx)) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {
                    tls.process_new_packets().map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Ends it as a broken network does: without a word, and without leaving a port in use.
    pub(crate) fn cut(self) -> io::Result<()> {
        self.stream.set_zero_linger()
    }
}

/// How many bytes were taken: by the socket, or by the layer above it.
fn write(stream: &TcpStream, tls: Option<&mut ClientConnection>, bytes: &[u8]) -> io::Result<usize> {
    let mut taken = 0;
    match tls {
        None => {
            while taken < bytes.len() {
                match stream.try_write(&bytes[taken..]) {
                    Ok(written) => taken += written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Some(tls) => loop {
            let more = if taken < bytes.len() { io::Write::write(&mut tls.writer(), &bytes[taken..])? } else { 0 };
            taken += more;
            let mut blocked = false;
            while tls.wants_write() && !blocked {
                match tls.write_tls(&mut Written(stream)) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => blocked = true,
                    Err(error) => return Err(error),
                }
            }
            if blocked || more == 0 {
                break;
            }
        },
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_clients_come_from_several_addresses_of_loopback() {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let nth = |broker, run, nth| source(broker, sources(run), nth).map(|source| source.to_string());
        assert_eq!(nth(loopback, 0x0203, 3_999), None);
        assert_eq!(nth(loopback, 0x0203, 4_000).as_deref(), Some("127.2.3.1"));
        assert_eq!(nth(loopback, 0x0203, 19_999).as_deref(), Some("127.2.3.4"));
        assert_eq!(nth(loopback, 0x0009, 4_000).as_deref(), Some("127.1.9.1"));
        assert_eq!(nth(loopback, u16::MAX, 4_000_000).as_deref(), Some("127.251.2.232"));
        assert_eq!(nth("192.0.2.1".parse().unwrap(), 0x0203, 19_999), None);
        assert_eq!(nth("::1".parse().unwrap(), 0x0203, 19_999), None);
    }
}
