//! A raw MQTT client: it sends what it is told, decent or not, and hands back every packet that comes.
//!
//! It keeps no session and repeats nothing by itself, so a test sees what the server does. Packets that a test is not looking for now
//! are kept in order until it asks for them.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

use crate::chatd::Chatd;
use crate::contract;
use crate::packet::{self, ConnectFields, Packet, Properties, Publish, Value, Version, Will, id};
use crate::wait::PATIENCE;

/// Sends whose acknowledgement may be outstanding: below the server's Receive Maximum.
pub const SEND_WINDOW: usize = 32;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Connect {
    pub version: Version,
    pub user_name: Option<String>,
    pub password: Option<Vec<u8>>,
    pub client_id: String,
    pub clean_start: bool,
    pub keep_alive_s: u16,
    pub will: Option<Will>,
    pub properties: Properties,
    pub web_socket: bool,
    /// The address to come from; `None`: as the system chooses.
    pub from: Option<IpAddr>,
}

impl Connect {
    /// As this user from this device, with a session that ends with the connection.
    pub fn new(version: Version, user: &str, device: &str) -> Self {
        Self {
            version,
            user_name: Some(user.to_owned()),
            password: None,
            client_id: device.to_owned(),
            clean_start: true,
            keep_alive_s: 0,
            will: None,
            properties: Properties::none(),
            web_socket: false,
            from: None,
        }
    }

    /// MQTT 3.1.1.
    pub fn v4(user: &str, device: &str) -> Self {
        Self::new(Version::V4, user, device)
    }

    /// MQTT 5.
    pub fn v5(user: &str, device: &str) -> Self {
        Self::new(Version::V5, user, device)
    }

    /// With a session that outlives the connection, taken up if it is there.
    #[must_use]
    pub fn persistent(mut self) -> Self {
        self.clean_start = false;
        self.session_expiry(u32::MAX)
    }

    /// MQTT 5 only.
    #[must_use]
    pub fn session_expiry(mut self, seconds: u32) -> Self {
        if self.version == Version::V5 {
            self.properties = self.properties.with(id::SESSION_EXPIRY, Value::U32(seconds));
        }
        self
    }

    /// MQTT 5 only.
    #[must_use]
    pub fn receive_maximum(mut self, packets: u16) -> Self {
        self.properties = self.properties.with(id::RECEIVE_MAXIMUM, Value::U16(packets));
        self
    }

    /// MQTT 5 only.
    #[must_use]
    pub fn with(mut self, identifier: u8, value: Value) -> Self {
        self.properties = self.properties.with(identifier, value);
        self
    }

    /// With a session that is begun anew, whether one is there or not.
    #[must_use]
    pub fn clean(mut self) -> Self {
        self.clean_start = true;
        self
    }

    #[must_use]
    pub fn keep_alive(mut self, seconds: u16) -> Self {
        self.keep_alive_s = seconds;
        self
    }

    #[must_use]
    pub fn will(mut self, will: Will) -> Self {
        self.will = Some(will);
        self
    }

    #[must_use]
    pub fn over_web_socket(mut self) -> Self {
        self.web_socket = true;
        self
    }

    /// From this address of the machine's own, such as 127.0.0.2.
    #[must_use]
    pub fn coming_from(mut self, address: &str) -> Self {
        self.from = Some(address.parse().expect("an IP address"));
        self
    }

    /// With a password.
    #[must_use]
    pub fn password(mut self, password: impl Into<Vec<u8>>) -> Self {
        self.password = Some(password.into());
        self
    }

    /// The CONNECT packet.
    pub fn bytes(&self) -> Vec<u8> {
        packet::connect(&ConnectFields {
            version: self.version,
            client_id: &self.client_id,
            user_name: self.user_name.as_deref(),
            password: self.password.as_deref(),
            clean_start: self.clean_start,
            keep_alive_s: self.keep_alive_s,
            will: self.will.as_ref(),
            properties: &self.properties,
        })
    }

    /// Opens the socket, sends CONNECT, and fails unless the server accepts.
    pub async fn to(&self, chatd: &Chatd) -> Result<Client> {
        let mut client = self.open(chatd).await?;
        client.connack().await.with_context(|| format!("{self:?}"))?;
        Ok(client)
    }

    /// Opens the socket and sends CONNECT. The answer is still to be received.
    pub async fn open(&self, chatd: &Chatd) -> Result<Client> {
        let mut client = if self.web_socket {
            Client::web_socket_on(stream(chatd.http_addr(), self.from, None).await?, chatd.http_addr(), self.version)
                .await?
        } else {
            Client::over(Link::Bare(stream(chatd.mqtt_addr(), self.from, None).await?), self.version)
        };
        client.send_bytes(&self.bytes()).await?;
        Ok(client)
    }
}

/// A socket, in clear text or not.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

#[expect(clippy::large_enum_variant, reason = "one a client")]
enum Link {
    Bare(Box<dyn Stream>),
    WebSocket(WebSocketStream<Box<dyn Stream>>),
}

/// Whom to believe that they are the server, over TLS.
#[derive(Clone)]
pub struct Trust(TlsConnector);

impl Trust {
    /// Certificates that this authority (PEM) has signed.
    pub fn in_authority(pem: &str) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.with_root_certificates(roots).with_no_client_auth();
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    async fn secure(&self, stream: TcpStream) -> Result<Box<dyn Stream>> {
        let name = ServerName::try_from("localhost")?;
        Ok(Box::new(timeout(PATIENCE, self.0.connect(name, stream)).await.context("the TLS handshake")??))
    }
}

/// What the server said to a publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    pub code: u8,
    pub seq: Option<u64>,
    pub at: Option<u64>,
    pub reason: Option<String>,
}

impl Ack {
    fn new(code: u8, properties: &Properties) -> Self {
        let number = |key| properties.user(key).and_then(|value| value.parse().ok());
        Self { code, seq: number("seq"), at: number("at"), reason: properties.reason().map(str::to_owned) }
    }
}

/// A connection to a server.
pub struct Client {
    link: Link,
    version: Version,
    /// Bytes received and not decoded.
    buffer: Vec<u8>,
    decoded: usize,
    /// Packets received and not asked for.
    kept: VecDeque<Packet>,
    next_packet_id: u16,
    patience: Duration,
    session_present: bool,
    connack_properties: Properties,
}

impl Client {
    /// A TCP connection on which nothing was sent yet.
    pub async fn tcp(address: SocketAddr, version: Version) -> Result<Self> {
        Self::tcp_over(address, version, None).await
    }

    /// The same, over TLS if there is somebody to trust.
    pub async fn tcp_over(address: SocketAddr, version: Version, tls: Option<&Trust>) -> Result<Self> {
        Ok(Self::over(Link::Bare(stream(address, None, tls).await?), version))
    }

    /// A connection over a stream that is open.
    pub fn on(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, version: Version) -> Self {
        Self::over(Link::Bare(Box::new(stream)), version)
    }

    /// A WebSocket connection to `/mqtt` with subprotocol `mqtt`, on which no packet was sent yet.
    pub async fn web_socket(address: SocketAddr, version: Version) -> Result<Self> {
        Self::web_socket_over(address, version, None).await
    }

    /// The same, over TLS if there is somebody to trust.
    pub async fn web_socket_over(address: SocketAddr, version: Version, tls: Option<&Trust>) -> Result<Self> {
        Self::web_socket_on(stream(address, None, tls).await?, address, version).await
    }

    async fn web_socket_on(stream: Box<dyn Stream>, address: SocketAddr, version: Version) -> Result<Self> {
        let mut request = format!("ws://{address}/mqtt").into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("mqtt"));
        let (socket, response) =
            timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await.context("upgrading")??;
        let chosen = response.headers().get("sec-websocket-protocol").and_then(|value| value.to_str().ok());
        ensure!(chosen == Some("mqtt"), "the server chose the subprotocol {chosen:?}");
        Ok(Self::over(Link::WebSocket(socket), version))
    }

    fn over(link: Link, version: Version) -> Self {
        Self {
            link,
            version,
            buffer: Vec::new(),
            decoded: 0,
            kept: VecDeque::new(),
            next_packet_id: 1,
            patience: PATIENCE,
            session_present: false,
            connack_properties: Properties::none(),
        }
    }

    /// How long it waits for anything.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// From the CONNACK.
    pub fn session_present(&self) -> bool {
        self.session_present
    }

    /// From the CONNACK.
    pub fn connack_properties(&self) -> &Properties {
        &self.connack_properties
    }

    /// A packet identifier that was not used lately.
    pub fn packet_id(&mut self) -> u16 {
        let packet_id = self.next_packet_id;
        self.next_packet_id = if packet_id == u16::MAX { 1 } else { packet_id + 1 };
        packet_id
    }

    // ---- bytes and packets ---------------------------------------------------------------------------------------------

    /// Sends any bytes; over WebSocket as one binary message.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let sending = async {
            match &mut self.link {
                Link::Bare(stream) => stream.write_all(bytes).await?,
                Link::WebSocket(socket) => socket.send(Message::binary(bytes.to_vec())).await?,
            }
            anyhow::Ok(())
        };
        timeout(self.patience, sending).await.context("the server does not read")??;
        Ok(())
    }

    /// The next packet; `None` when the server has closed the connection.
    pub async fn receive(&mut self) -> Result<Option<Packet>> {
        match self.kept.pop_front() {
            Some(packet) => Ok(Some(packet)),
            None => self.receive_new().await,
        }
    }

    async fn receive_new(&mut self) -> Result<Option<Packet>> {
        match timeout(self.patience, self.read_packet()).await {
            Ok(packet) => packet,
            Err(_) => bail!("nothing came within {:?}", self.patience),
        }
    }

    /// Can be given up and called again without losing anything.
    async fn read_packet(&mut self) -> Result<Option<Packet>> {
        loop {
            if let Some((packet, length)) = packet::decode(self.version, &self.buffer[self.decoded..])? {
                if let Packet::Publish(publish) = &packet {
                    contract::check_published(&publish.topic, &publish.payload)?;
                }
                self.decoded += length;
                if self.decoded == self.buffer.len() {
                    self.buffer.clear();
                    self.decoded = 0;
                }
                return Ok(Some(packet));
            }
            if self.decoded > 0 {
                self.buffer.drain(..self.decoded);
                self.decoded = 0;
            }
            match &mut self.link {
                Link::Bare(stream) => match stream.read_buf(&mut self.buffer).await {
                    Ok(0) => return Ok(None),
                    Ok(_) => {}
                    Err(error) if is_closed(error.kind()) => return Ok(None),
                    Err(error) => return Err(error.into()),
                },
                Link::WebSocket(socket) => match socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => self.buffer.extend(&bytes),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(Message::Close(_))) | Some(Err(_)) | None => return Ok(None),
                    Some(Ok(other)) => bail!("the server sent {other:?}"),
                },
            }
        }
    }

    /// The first packet, kept or to come, that `wanted` finds; the others are kept.
    pub async fn take<T>(&mut self, what: &str, mut wanted: impl FnMut(&Packet) -> Option<T>) -> Result<T> {
        let found = self.kept.iter().enumerate().find_map(|(at, packet)| Some((at, wanted(packet)?)));
        if let Some((at, value)) = found {
            self.kept.remove(at);
            return Ok(value);
        }
        loop {
            let packet = self.receive_new().await.with_context(|| format!("waiting for {what}"))?;
            let Some(packet) = packet else {
                bail!("closed while waiting for {what}; kept: {:?}", self.kept.iter().take(5).collect::<Vec<_>>());
            };
            match wanted(&packet) {
                Some(value) => return Ok(value),
                None => self.kept.push_back(packet),
            }
        }
    }

    /// Waits until the server closes; returns what came before, including what was kept.
    pub async fn until_closed(&mut self) -> Result<Vec<Packet>> {
        let mut packets: Vec<Packet> = self.kept.drain(..).collect();
        while let Some(packet) = self.receive_new().await.context("waiting for the connection to be closed")? {
            packets.push(packet);
        }
        Ok(packets)
    }

    /// Waits for the CONNACK; fails unless it accepts.
    pub async fn connack(&mut self) -> Result<()> {
        match self.receive().await.context("waiting for CONNACK")? {
            Some(Packet::Connack { session_present, code: 0, properties }) => {
                self.session_present = session_present;
                self.connack_properties = properties;
                Ok(())
            }
            other => bail!("instead of an accepting CONNACK: {other:?}"),
        }
    }

    // ---- subscribing ---------------------------------------------------------------------------------------------------

    /// Subscribes; the reason codes are still to be judged.
    pub async fn subscribe_codes(&mut self, filters: &[(&str, u8)]) -> Result<(Vec<u8>, Properties)> {
        self.subscribe_with(&Properties::none(), filters).await
    }

    /// Subscribes with a subscription identifier; fails unless it is granted. MQTT 5 only.
    pub async fn subscribe_identified(&mut self, filter: &str, options: u8, identifier: u32) -> Result<()> {
        let properties = Properties::none().with(id::SUBSCRIPTION_IDENTIFIER, Value::Variable(identifier));
        let (codes, properties) = self.subscribe_with(&properties, &[(filter, options)]).await?;
        ensure!(codes.len() == 1 && codes[0] <= 2, "{filter}: {codes:02x?} {properties:?}");
        Ok(())
    }

    /// Subscribes with properties; the reason codes are still to be judged.
    pub async fn subscribe_with(
        &mut self,
        properties: &Properties,
        filters: &[(&str, u8)],
    ) -> Result<(Vec<u8>, Properties)> {
        let packet_id = self.packet_id();
        let bytes = packet::subscribe(self.version, packet_id, properties, filters);
        self.send_bytes(&bytes).await?;
        self.take("SUBACK", |packet| match packet {
            Packet::Suback { packet_id: found, codes, properties } if *found == packet_id => {
                Some((codes.clone(), properties.clone()))
            }
            _ => None,
        })
        .await
    }

    /// Subscribes to one filter; fails unless it is granted.
    pub async fn subscribe(&mut self, filter: &str, qos: u8) -> Result<()> {
        let (codes, properties) = self.subscribe_codes(&[(filter, qos)]).await?;
        ensure!(codes.len() == 1 && codes[0] <= 2, "{filter}: {codes:02x?} {properties:?}");
        Ok(())
    }

    /// Unsubscribes from one filter; returns the reason code, 0 for MQTT 3.1.1.
    pub async fn unsubscribe(&mut self, filter: &str) -> Result<u8> {
        let packet_id = self.packet_id();
        let bytes = packet::unsubscribe(self.version, packet_id, &[filter]);
        self.send_bytes(&bytes).await?;
        self.take("UNSUBACK", |packet| match packet {
            Packet::Unsuback { packet_id: found, codes, .. } if *found == packet_id => {
                Some(codes.first().copied().unwrap_or(0))
            }
            _ => None,
        })
        .await
    }

    // ---- publishing ----------------------------------------------------------------------------------------------------

    /// Sends a PUBLISH and no more; returns the packet identifier, 0 for QoS 0. A packet identifier that is set already is used.
    pub async fn start_publish(&mut self, mut publish: Publish) -> Result<u16> {
        if publish.qos > 0 && publish.packet_id == 0 {
            publish.packet_id = self.packet_id();
        }
        self.send_bytes(&packet::publish(self.version, &publish)).await?;
        Ok(publish.packet_id)
    }

    /// Publishes and waits until the server has taken responsibility: PUBACK, or PUBREC and PUBCOMP.
    pub async fn publish(&mut self, publish: Publish) -> Result<Ack> {
        let qos = publish.qos;
        let packet_id = self.start_publish(publish).await?;
        match qos {
            0 => Ok(Ack { code: 0, seq: None, at: None, reason: None }),
            1 => self.puback(packet_id).await,
            _ => {
                let ack = self.pubrec(packet_id).await?;
                if ack.code < 0x80 {
                    self.send_bytes(&packet::pubrel(packet_id)).await?;
                    self.pubcomp(packet_id).await?;
                }
                Ok(ack)
            }
        }
    }

    pub async fn puback(&mut self, packet_id: u16) -> Result<Ack> {
        self.take("PUBACK", |packet| match packet {
            Packet::Puback { packet_id: found, code, properties } if *found == packet_id => {
                Some(Ack::new(*code, properties))
            }
            _ => None,
        })
        .await
    }

    pub async fn pubrec(&mut self, packet_id: u16) -> Result<Ack> {
        self.take("PUBREC", |packet| match packet {
            Packet::Pubrec { packet_id: found, code, properties } if *found == packet_id => {
                Some(Ack::new(*code, properties))
            }
            _ => None,
        })
        .await
    }

    /// The PUBREL for a message that was received.
    pub async fn pubrel(&mut self, packet_id: u16) -> Result<u8> {
        self.take("PUBREL", |packet| match packet {
            Packet::Pubrel { packet_id: found, code } if *found == packet_id => Some(*code),
            _ => None,
        })
        .await
    }

    pub async fn pubcomp(&mut self, packet_id: u16) -> Result<u8> {
        self.take("PUBCOMP", |packet| match packet {
            Packet::Pubcomp { packet_id: found, code } if *found == packet_id => Some(*code),
            _ => None,
        })
        .await
    }

    /// Sends a text at QoS 1 and waits for the PUBACK.
    pub async fn say(&mut self, me: &str, peer: &str, text: &str) -> Result<Ack> {
        self.publish(Publish::new(format!("chat/{me}/out/{peer}"), text, 1)).await
    }

    /// The same with an id.
    pub async fn say_as(&mut self, me: &str, peer: &str, id: &str, text: &str) -> Result<Ack> {
        self.publish(Publish::new(format!("chat/{me}/out/{peer}/{id}"), text, 1)).await
    }

    /// Publishes everything at QoS 1 with up to [`SEND_WINDOW`] unacknowledged; the acknowledgements have to come in order.
    pub async fn publish_all(&mut self, publishes: impl IntoIterator<Item = Publish>) -> Result<Vec<Ack>> {
        let mut acks = Vec::new();
        let mut under_way: VecDeque<u16> = VecDeque::new();
        let mut publishes = publishes.into_iter();
        loop {
            let mut bytes = Vec::new();
            while under_way.len() < SEND_WINDOW
                && let Some(mut publish) = publishes.next()
            {
                publish.packet_id = self.packet_id();
                bytes.extend(packet::publish(self.version, &publish));
                under_way.push_back(publish.packet_id);
            }
            if !bytes.is_empty() {
                self.send_bytes(&bytes).await?;
            }
            let Some(expected) = under_way.pop_front() else { return Ok(acks) };
            let (found, ack) = self
                .take("PUBACK", |packet| match packet {
                    Packet::Puback { packet_id, code, properties } => Some((*packet_id, Ack::new(*code, properties))),
                    _ => None,
                })
                .await?;
            ensure!(found == expected, "PUBACK {found} came before PUBACK {expected}");
            acks.push(ack);
        }
    }

    // ---- receiving -----------------------------------------------------------------------------------------------------

    /// The next PUBLISH, not acknowledged.
    pub async fn message(&mut self) -> Result<Publish> {
        self.take("a message", |packet| match packet {
            Packet::Publish(publish) => Some(publish.clone()),
            _ => None,
        })
        .await
    }

    /// The next PUBLISH, acknowledged as its QoS wants it.
    pub async fn acked_message(&mut self) -> Result<Publish> {
        let publish = self.message().await?;
        self.acknowledge(&publish).await?;
        Ok(publish)
    }

    /// The next `n`, acknowledged.
    pub async fn acked_messages(&mut self, n: usize) -> Result<Vec<Publish>> {
        let mut messages = Vec::with_capacity(n);
        while messages.len() < n {
            let at = messages.len();
            messages.push(self.acked_message().await.with_context(|| format!("after {at} of {n} messages"))?);
        }
        Ok(messages)
    }

    /// The next PUBLISH to this topic, acknowledged; others are kept.
    pub async fn acked_message_on(&mut self, topic: &str) -> Result<Publish> {
        let publish = self
            .take(topic, |packet| match packet {
                Packet::Publish(publish) if publish.topic == topic => Some(publish.clone()),
                _ => None,
            })
            .await?;
        self.acknowledge(&publish).await?;
        Ok(publish)
    }

    /// PUBACK, or the whole handshake of QoS 2.
    pub async fn acknowledge(&mut self, publish: &Publish) -> Result<()> {
        let packet_id = publish.packet_id;
        match publish.qos {
            0 => Ok(()),
            1 => self.send_bytes(&packet::puback(packet_id)).await,
            _ => {
                self.send_bytes(&packet::pubrec(packet_id)).await?;
                self.pubrel(packet_id).await?;
                self.send_bytes(&packet::pubcomp(packet_id)).await
            }
        }
    }

    /// Everything that had come, or that the server sent, before it answered a PINGREQ: a later packet is none of its answers.
    pub async fn ping(&mut self) -> Result<Vec<Packet>> {
        self.send_bytes(&packet::pingreq()).await?;
        self.take("PINGRESP", |packet| (*packet == Packet::Pingresp).then_some(())).await?;
        Ok(self.kept.drain(..).collect())
    }

    // ---- leaving -------------------------------------------------------------------------------------------------------

    /// Says DISCONNECT, and waits until the server has closed: its session is free for the next connection.
    pub async fn leave(mut self) -> Result<()> {
        self.disconnect(0, &Properties::none()).await
    }

    /// The same with a reason code and properties, which are MQTT 5's.
    pub async fn disconnect(&mut self, code: u8, properties: &Properties) -> Result<()> {
        self.send_bytes(&packet::disconnect(self.version, code, properties)).await?;
        self.until_closed().await?;
        Ok(())
    }
}

async fn stream(to: SocketAddr, from: Option<IpAddr>, tls: Option<&Trust>) -> Result<Box<dyn Stream>> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    let stream = timeout(PATIENCE, socket.connect(to)).await.context("connecting")??;
    stream.set_nodelay(true)?;
    match tls {
        Some(trust) => trust.secure(stream).await,
        None => Ok(Box::new(stream)),
    }
}

fn is_closed(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind;
    matches!(
        kind,
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            // TLS that ends without having said so.
            | ErrorKind::UnexpectedEof
    )
}
