//! One connection to the server, over rumqttc.
//!
//! Everything of rumqttc lives in this file. A link is one attempt to connect and what comes of it; it never reconnects, and nothing of it is
//! carried over to the next: what has to be sent again is sent again by those who know its meaning.
//!
//! rumqttc 0.25's oddities and what guards against them here:
//! - Its event loop reconnects by itself and then publishes again what was not acknowledged, or forgets it when the session is new. A loop
//!   is dropped with its first error, so neither happens.
//! - `poll` must not be cancelled: a packet that was taken from the queue would be lost. A task of its own does nothing but poll, and a loop
//!   whose poll took too long is dropped.
//! - It does not say which packet identifier a publish gets. It numbers them in the order of its queue and reports each as it goes out, so the
//!   tokens of what was queued are matched in that order.
//! - A packet that is larger than the server allows is an error to it, which ends the link: whoever publishes asks [`Outgoing::packet_bytes`] before.
//! - It refuses packets above 10 KiB unless told otherwise, and panics if a keep alive is below 5 s.
//! - After a refused publish a packet identifier that collided stays stuck. Identifiers never collide here: at most [`QUEUE`] are under way, and
//!   it has as many more to give.
//! - When the server refuses a CONNECT it keeps the reason string to itself; only the code is known.
//! - It writes `host:port` as it is, so an IPv6 address needs its brackets; for TLS and WebSocket it must not have them. There it is refused.
//! - An acknowledgement that it did not expect is an error to it, which ends the link.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use chat_protocol::topic::Down;
use chat_protocol::{Seq, UserId};
use futures_util::FutureExt;
use parking_lot::Mutex;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnectReturnCode, DisconnectReasonCode, Filter, Packet, PubAckReason, Publish, PublishProperties,
    SubscribeReasonCode,
};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use rumqttc::{Outgoing as Written, TlsConfiguration, Transport as RumqttcTransport};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::answer::Answer;
use crate::options::{Credential, Listen, Options, Session, Transport};
use crate::outbox::Key;

/// Packets that wait to be written, and publishes under way.
const QUEUE: usize = 1_024;
/// Messages that the server has under way to us.
const RECEIVE_MAXIMUM: u16 = 256;
/// An answer is 256 KiB of text at most, and JSON can make six bytes of one.
const PACKET_BYTES_MAX: u32 = 8 * 1024 * 1024;

/// What a publish was, for whoever hears the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Message(Key),
    Read(UserId, Seq),
    Request(u64),
}

/// What a link tells.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the common one")]
pub(crate) enum LinkEvent {
    /// The server accepted the connection.
    Connected { resumed: bool, publishes_per_s: Option<u32>, packet_bytes_max: Option<u32> },
    /// The subscriptions are there; or why one is not.
    Subscribed(Result<(), String>),
    /// Something was published to us.
    Published(Incoming),
    /// A publish was answered.
    Answered(Token, Answer),
    /// There will be nothing more.
    Ended(Ended),
}

/// Something that was published to us.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) waited: bool,
    pub(crate) correlation: Option<Vec<u8>>,
    pub(crate) packet: UnackedPacket,
}

/// What its acknowledgement needs.
#[derive(Clone, Debug)]
pub(crate) struct UnackedPacket(Publish);

/// Why a link ended, as far as it matters for what is done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Try again.
    Lost(String),
    /// The server knows no such user, or no such password or token.
    LoginRefused(String),
    /// It will be refused again.
    Refused(String),
    TakenOver,
}

/// The queue to the server is full: the link is of no use any more.
#[derive(Debug)]
pub(crate) struct QueueFull;

/// What a publish is made of.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    /// Response topic and correlation data.
    pub(crate) answer_to: Option<(&'a str, Vec<u8>)>,
}

impl Outgoing<'_> {
    /// Of its packet, at most.
    pub(crate) fn packet_bytes(&self) -> usize {
        // Fixed header 5, packet identifier 2, length of the properties 4; a string has 2 before it, and a property 1.
        let properties = self.answer_to.as_ref().map_or(0, |(topic, correlation)| 6 + topic.len() + correlation.len());
        13 + self.topic.len() + properties + self.payload.len()
    }
}

#[derive(Debug)]
pub(crate) struct Link {
    client: AsyncClient,
    /// Tokens of publishes that have no packet identifier yet. Held while one is queued, so that both are in the same order.
    queued: Arc<Mutex<VecDeque<Token>>>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Begins to connect. Events carry `number`.
    pub(crate) fn open(
        options: &Options,
        tls: Option<&Arc<rustls::ClientConfig>>,
        number: u64,
        events: mpsc::Sender<(u64, LinkEvent)>,
    ) -> Self {
        let mut mqtt = mqtt_options(options, tls);
        let credential = options.credential.clone();
        let user = options.user.clone();
        let queued = Arc::new(Mutex::new(VecDeque::new()));
        // The loop is made before the token is there, so that packets can be queued; only its options change until it is polled.
        let (client, mut event_loop) = AsyncClient::new(mqtt.clone(), QUEUE);
        let open_by = Instant::now() + options.connect_timeout;
        let pump = Pump {
            number,
            events,
            queued: Arc::clone(&queued),
            under_way: HashMap::new(),
            patience: options.connect_timeout,
            open_by: Some(open_by),
        };
        let farewell = pump.events.clone();
        let connected = async move {
            let password = match credential {
                Credential::None => None,
                Credential::Password(password) => Some(password),
                Credential::Token(callback) => {
                    let token = timeout_at(open_by, callback()).await;
                    match token.unwrap_or_else(|_| Err("none in time".into())) {
                        Ok(token) => Some(token),
                        Err(error) => {
                            pump.tell(LinkEvent::Ended(Ended::Lost(format!("no token: {error}")))).await;
                            return;
                        }
                    }
                }
            };
            // Without a password the user name goes alone, as in development mode.
            mqtt.set_credentials(user.as_str(), password.unwrap_or_default());
            event_loop.options = mqtt;
            pump.run(event_loop).await;
        };
        let task = tokio::spawn(async move {
            // A callback for tokens is not ours, nor is what it may do.
            if AssertUnwindSafe(connected).catch_unwind().await.is_err() {
                tracing::error!("a connection's task panicked");
                // Nobody listening any more is the end of it, too.
                farewell
                    .send((number, LinkEvent::Ended(Ended::Lost("the connection's task panicked".to_owned()))))
                    .await
                    .ok();
            }
        });
        Self { client, queued, task }
    }

    /// Messages at QoS 1; answers and events, which are told once, at QoS 0.
    pub(crate) fn subscribe(&self, user: &UserId, listen: Listen, response_topic: &str) -> Result<(), QueueFull> {
        let stored = |down: Down| Filter::new(down.topic(user), QoS::AtLeastOnce);
        let mut filters = vec![Filter::new(response_topic, QoS::AtMostOnce)];
        match listen {
            Listen::Own => filters.extend([
                stored(Down::Inbox),
                stored(Down::Sent),
                Filter::new(format!("chat/{user}/event/+"), QoS::AtMostOnce),
            ]),
            Listen::Nothing => {}
            Listen::Observe => filters.push(Filter::new(format!("chat/+/{}", Down::Sent.suffix()), QoS::AtLeastOnce)),
        }
        self.client.try_subscribe_many(filters).map_err(|_| QueueFull)
    }

    /// At QoS 1: it is answered.
    pub(crate) fn publish(&self, token: Token, outgoing: Outgoing<'_>) -> Result<(), QueueFull> {
        let Outgoing { topic, payload, answer_to } = outgoing;
        let properties = answer_to.map(|(topic, correlation)| PublishProperties {
            response_topic: Some(topic.to_owned()),
            correlation_data: Some(correlation.into()),
            ..PublishProperties::default()
        });
        let mut queued = self.queued.lock();
        match properties {
            Some(properties) => {
                self.client.try_publish_with_properties(topic, QoS::AtLeastOnce, false, payload, properties)
            }
            None => self.client.try_publish(topic, QoS::AtLeastOnce, false, payload),
        }
        .map_err(|_| QueueFull)?;
        queued.push_back(token);
        Ok(())
    }

    /// At QoS 0.
    pub(crate) fn publish_unanswered(&self, topic: String, payload: &'static str) -> Result<(), QueueFull> {
        self.client.try_publish(topic, QoS::AtMostOnce, false, payload).map_err(|_| QueueFull)
    }

    pub(crate) fn acknowledge(&self, packet: &UnackedPacket) -> Result<(), QueueFull> {
        self.client.try_ack(&packet.0).map_err(|_| QueueFull)
    }

    /// Says DISCONNECT behind all that is queued; the server closes then.
    pub(crate) fn disconnect(&self) -> Result<(), QueueFull> {
        self.client.try_disconnect().map_err(|_| QueueFull)
    }
}

fn mqtt_options(options: &Options, tls: Option<&Arc<rustls::ClientConfig>>) -> MqttOptions {
    let is_web_socket = matches!(options.transport, Transport::WebSocket | Transport::WebSocketTls);
    // For WebSocket rumqttc takes the whole address in place of the host.
    let host = if is_web_socket { options.address.clone() } else { options.host.clone() };
    let mut mqtt = MqttOptions::new(options.device.clone(), host, options.port);
    let tls = || TlsConfiguration::Rustls(tls.map(Arc::clone).expect("made for a transport that has TLS"));
    mqtt.set_transport(match options.transport {
        Transport::Tcp => RumqttcTransport::Tcp,
        Transport::Tls => RumqttcTransport::Tls(tls()),
        Transport::WebSocket => RumqttcTransport::Ws,
        Transport::WebSocketTls => RumqttcTransport::Wss(tls()),
    });
    mqtt.set_keep_alive(options.keep_alive);
    // The pump is more exact, and waits for the subscriptions too.
    mqtt.set_connection_timeout(options.connect_timeout.as_secs() + 1);
    mqtt.set_clean_start(options.session == Session::Temporary);
    mqtt.set_session_expiry_interval(Some(match options.session {
        Session::Durable => u32::MAX,
        Session::Temporary => 0,
    }));
    mqtt.set_receive_maximum(Some(RECEIVE_MAXIMUM));
    mqtt.set_max_packet_size(Some(PACKET_BYTES_MAX));
    mqtt.set_manual_acks(true);
    mqtt.set_outgoing_inflight_upper_limit(u16::try_from(2 * QUEUE).unwrap_or(u16::MAX));
    mqtt
}

/// Polls the event loop and tells what comes.
struct Pump {
    number: u64,
    events: mpsc::Sender<(u64, LinkEvent)>,
    queued: Arc<Mutex<VecDeque<Token>>>,
    under_way: HashMap<u16, Token>,
    /// How long a connection that is not open yet may be silent.
    patience: Duration,
    /// `None`: it is open.
    open_by: Option<Instant>,
}

impl Pump {
    /// Nobody listening any more is the end of this task too.
    async fn tell(&self, event: LinkEvent) -> bool {
        self.events.send((self.number, event)).await.is_ok()
    }

    async fn run(mut self, mut event_loop: EventLoop) {
        loop {
            let polled = tokio::select! {
                biased;
                polled = event_loop.poll() => polled.map_err(|error| ended(&error)),
                () = passed(self.open_by) => Err(Ended::Lost("the server does not answer".to_owned())),
            };
            let told = match polled {
                Ok(Event::Outgoing(written)) => {
                    self.on_written(&written);
                    true
                }
                Ok(Event::Incoming(packet)) => self.on_incoming(packet).await,
                Err(why) => {
                    self.tell(LinkEvent::Ended(why)).await;
                    false
                }
            };
            if !told {
                return;
            }
        }
    }

    fn on_written(&mut self, written: &Written) {
        if let Written::Publish(packet_id) = written
            && *packet_id != 0
            && let Some(token) = self.queued.lock().pop_front()
        {
            self.under_way.insert(*packet_id, token);
        }
    }

    async fn on_incoming(&mut self, packet: Packet) -> bool {
        let event = match packet {
            Packet::ConnAck(accepted) => {
                let packet_bytes_max = accepted.properties.as_ref().and_then(|properties| properties.max_packet_size);
                let properties = accepted.properties.map(|properties| properties.user_properties).unwrap_or_default();
                let rate = properties.iter().find_map(|(key, value)| (key == "publishes_per_s").then_some(value));
                let publishes_per_s = rate.and_then(|rate| rate.parse().ok());
                LinkEvent::Connected { resumed: accepted.session_present, publishes_per_s, packet_bytes_max }
            }
            Packet::SubAck(answer) => {
                self.open_by = None;
                let refused = answer.return_codes.iter().any(|code| !matches!(code, SubscribeReasonCode::Success(_)));
                let reason = answer.properties.and_then(|properties| properties.reason_string);
                LinkEvent::Subscribed(if refused {
                    Err(reason.unwrap_or_else(|| "without a reason".to_owned()))
                } else {
                    Ok(())
                })
            }
            Packet::PubAck(answer) => {
                let Some(token) = self.under_way.remove(&answer.pkid) else { return true };
                let (reason, properties) = match &answer.properties {
                    Some(properties) => (properties.reason_string.as_deref(), properties.user_properties.as_slice()),
                    None => (None, [].as_slice()),
                };
                LinkEvent::Answered(token, Answer::read(reason_code(answer.reason), reason, properties))
            }
            Packet::Publish(publish) => {
                // What waited comes before the subscriptions are answered.
                self.open_by = self.open_by.map(|_| Instant::now() + self.patience);
                LinkEvent::Published(Incoming {
                    topic: String::from_utf8_lossy(&publish.topic).into_owned(),
                    payload: publish.payload.to_vec(),
                    waited: publish.retain,
                    correlation: publish
                        .properties
                        .as_ref()
                        .and_then(|properties| properties.correlation_data.as_ref().map(|bytes| bytes.to_vec())),
                    packet: UnackedPacket(publish),
                })
            }
            _ => return true,
        };
        self.tell(event).await
    }
}

impl Incoming {
    /// QoS 0 needs none.
    pub(crate) fn wants_acknowledgement(&self) -> bool {
        self.packet.0.qos != QoS::AtMostOnce
    }
}

/// Never, if there is no such moment.
async fn passed(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn reason_code(reason: PubAckReason) -> u8 {
    match reason {
        PubAckReason::Success => 0,
        PubAckReason::NoMatchingSubscribers => 0x10,
        PubAckReason::UnspecifiedError => 0x80,
        PubAckReason::ImplementationSpecificError => 0x83,
        PubAckReason::NotAuthorized => 0x87,
        PubAckReason::TopicNameInvalid => 0x90,
        PubAckReason::PacketIdentifierInUse => 0x91,
        PubAckReason::QuotaExceeded => 0x97,
        PubAckReason::PayloadFormatInvalid => 0x99,
    }
}

fn ended(error: &ConnectionError) -> Ended {
    match error {
        ConnectionError::ConnectionRefused(code) => match code {
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
                Ended::LoginRefused("no such user, or not this password or token".to_owned())
            }
            ConnectReturnCode::Banned => Ended::LoginRefused("this user is banned".to_owned()),
            ConnectReturnCode::ClientIdentifierNotValid => {
                Ended::Refused("it does not take this device name".to_owned())
            }
            ConnectReturnCode::UnsupportedProtocolVersion => Ended::Refused("it does not speak MQTT 5".to_owned()),
            other => Ended::Lost(format!("the server refused the connection: {other:?}")),
        },
        ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string }) => match reason_code {
            DisconnectReasonCode::SessionTakenOver => Ended::TakenOver,
            other => Ended::Lost(reason_string.clone().unwrap_or_else(|| format!("the server said {other:?}"))),
        },
        ConnectionError::MqttState(StateError::ConnectionAborted) => Ended::Lost("the connection broke".to_owned()),
        ConnectionError::MqttState(StateError::AwaitPingResp) => Ended::Lost("the server does not answer".to_owned()),
        ConnectionError::Timeout(_) => Ended::Lost("the server does not answer".to_owned()),
        ConnectionError::Io(error) => Ended::Lost(error.to_string()),
        other => Ended::Lost(other.to_string()),
    }
}
