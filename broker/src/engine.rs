//! One connection's MQTT protocol state: `mqtt-protocol-core` behind packets that know no protocol version.
//!
//! Bytes go in by [`Engine::feed`], packets come out; answers are encoded into [`Engine::out`]. Everything particular to that crate lives
//! in this file: it reports a fault as an event beside the packets; it stores sent packets for sessions (bounded by the window here);
//! it would answer a repeated QoS 2 PUBLISH with PUBREC although the first is not stored yet (suppressed here, because PUBREC means stored).
//! It reserves memory by the length that a packet announces, so a CONNECT is gathered here first. It panics at a CONNECT with a Topic Alias
//! Maximum of 0, and never sees one: what can be read is read here. It cannot begin in the middle of a QoS 2 exchange: see
//! [`Engine::release_again`].
//!
//! A message at QoS 1 would cost it a dozen allocations. So once a client is connected its ordinary PUBLISH and PUBACK packets are read and
//! written by [`crate::plain`], and what is under way at QoS 1 is kept here; it never hears of those. Packets that are no part of an exchange
//! (CONNECT, SUBSCRIBE, PINGREQ, DISCONNECT and the like) change nothing in it, so they pass it by too. What is left to it are PUBLISH packets with
//! properties and QoS 2, and it is there only for clients that have had one of those: see [`Engine::rest`]. Invariant: a packet
//! identifier towards the client is in `awaiting_puback`, in `reserved` or in `Inner::sent`, and in one of them only.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use mqtt_protocol_core::mqtt::common::Cursor;
use mqtt_protocol_core::mqtt::connection::{ConnectionOptions, Event};
use mqtt_protocol_core::mqtt::packet::{
    CorrelationData, GenericPacketTrait, MaximumPacketSize, Packet, Property, Qos, ReasonString, ReceiveMaximum,
    RetainHandling, SessionExpiryInterval, SubscriptionIdentifier, TopicAliasMaximum, UserProperty, v3_1_1, v5_0,
};
use mqtt_protocol_core::mqtt::result_code::{
    AuthReasonCode, ConnectReasonCode, ConnectReturnCode, DisconnectReasonCode, MqttError, PubackReasonCode,
    PubcompReasonCode, PubrecReasonCode, SubackReasonCode, SubackReturnCode, UnsubackReasonCode,
};
use mqtt_protocol_core::mqtt::{self, Version, role};

use crate::completion::Reply;
use crate::escaped::Escaped;
use crate::framing::{Framing, Malformed};
use crate::limits::Limits;
use crate::live::LiveMessage;
use crate::plain::{self, Plain, Told};
use crate::rate::Cost;
use crate::service::{Authentication, BoundPublish, ConnectRefusalCode, Identity, RefusalCode};
use crate::topics::message::MessageProperties;

/// Topic aliases that a client may set up. They save bytes, and each costs the server a topic name of memory.
const TOPIC_ALIASES_MAX: u16 = 16;
/// The user property of CONNACK that tells how often the client may publish. MQTT has no property for it.
const PUBLISHES_PER_S: &str = "publishes_per_s";
/// Topic aliases that we set up, if the client takes as many: the first topics that it is sent keep theirs.
const TOPIC_ALIASES_SENT_MAX: u16 = 16;
/// A shorter topic is not worth an alias, which takes three bytes.
const ALIASED_TOPIC_BYTES_MIN: usize = 4;

/// Packets that are taken at once: they are many times as large here as the smallest are on the wire.
const PACKETS_AT_ONCE: usize = 1_024;

/// A will, as CONNECT carries it.
#[derive(Debug, Clone)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    /// How long after its connection it is published, in seconds.
    pub(crate) delay_s: u32,
    pub(crate) properties: MessageProperties,
}

impl Will {
    /// As a publish to a bound topic, which nobody waits for.
    pub(crate) fn as_publish(&self, identity: &Identity) -> BoundPublish {
        BoundPublish {
            user: Arc::clone(&identity.user),
            roles: identity.roles,
            topic: self.topic.clone(),
            payload: self.payload.clone(),
            id_property: None,
            response_topic: None,
            correlation: Bytes::new(),
            can_answer: false,
            received_at: Instant::now(),
            reply: Reply::nobody(),
        }
    }
}

/// CONNECT.
#[derive(Debug)]
pub(crate) struct Connect {
    pub(crate) client_id: String,
    pub(crate) clean_start: bool,
    pub(crate) keep_alive_s: u16,
    pub(crate) user_name: Option<String>,
    pub(crate) password: Option<Vec<u8>>,
    pub(crate) session_expiry_s: u32,
    /// `None` where the client names no window: MQTT 3.1.1, or the property is absent.
    pub(crate) receive_maximum: Option<u16>,
    pub(crate) request_response_information: bool,
    pub(crate) will: Option<Will>,
    pub(crate) authentication: Option<Authentication>,
}

/// PUBLISH from the client.
#[derive(Debug)]
pub(crate) struct Publish {
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) packet_id: Option<u16>,
    /// Few have any.
    pub(crate) properties: Option<Box<MessageProperties>>,
}

/// One filter of a SUBSCRIBE.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) filter: String,
    pub(crate) qos: u8,
    pub(crate) no_local: bool,
    pub(crate) retain_as_published: bool,
    pub(crate) retain_handling: u8,
}

/// A packet from the client.
#[derive(Debug)]
pub(crate) enum Incoming {
    Connect(Box<Connect>),
    Publish(Publish),
    Puback(u16),
    /// `true`: the receiver goes on with PUBREL.
    Pubrec(u16, bool),
    /// `true`: it releases a publish that was taken.
    Pubrel(u16, bool),
    Pubcomp(u16),
    Subscribe {
        packet_id: u16,
        filters: Vec<Filter>,
        identifier: Option<u32>,
    },
    Unsubscribe {
        packet_id: u16,
        filters: Vec<String>,
    },
    Pingreq,
    Disconnect {
        with_will: bool,
        session_expiry_s: Option<u32>,
    },
    /// The client proves again who it is.
    Auth(Authentication),
    /// It has more user properties than `limits.user_properties`; they were not copied.
    Overfull(Overfull),
    /// A QoS 2 publish that was taken and not released. It was answered again where it had been answered, and is nothing new.
    Repeated {
        bytes: usize,
    },
}

/// What has too many user properties, as far as it takes to refuse it.
#[derive(Debug)]
pub(crate) enum Overfull {
    Connect,
    Publish {
        topic: String,
        qos: u8,
        packet_id: Option<u16>,
        bytes: usize,
    },
    Subscribe {
        packet_id: u16,
        filters: usize,
    },
    /// A packet whose answer cannot refuse it.
    Other,
}

impl Incoming {
    /// What it takes of the rate at which a client may publish; `None` for what only answers the server.
    pub(crate) fn cost(&self) -> Option<Cost> {
        let cost = |publishes: usize, bytes: usize| Some(Cost { publishes: publishes as u64, bytes: bytes as u64 });
        match self {
            Self::Publish(publish) => {
                let properties = publish.properties.as_ref().map_or(0, |properties| properties.bytes());
                cost(1, publish.topic.len() + publish.payload.len() + properties)
            }
            Self::Overfull(Overfull::Publish { bytes, .. }) => cost(1, *bytes),
            Self::Overfull(Overfull::Subscribe { filters, .. }) => cost(*filters, 0),
            Self::Subscribe { filters, .. } => cost(filters.len(), 0),
            Self::Unsubscribe { filters, .. } => cost(filters.len(), 0),
            Self::Pingreq | Self::Auth(_) | Self::Pubrel(_, false) => cost(1, 0),
            Self::Repeated { bytes } => cost(1, *bytes),
            Self::Connect(_)
            | Self::Puback(_)
            | Self::Pubrec(..)
            | Self::Pubrel(_, true)
            | Self::Pubcomp(_)
            | Self::Disconnect { .. }
            | Self::Overfull(Overfull::Connect | Overfull::Other) => None,
        }
    }

    /// Whether its refusal can be told: a publish of MQTT 5.
    pub(crate) fn is_publish(&self) -> bool {
        matches!(self, Self::Publish(_) | Self::Overfull(Overfull::Publish { .. }))
    }
}

/// MQTT 5 user properties of a message of a bound topic.
pub(crate) enum UserProperties<'a> {
    None,
    Live(&'a LiveMessage),
    Stored(&'a [(&'static str, String)]),
}

/// PUBLISH to the client.
pub(crate) struct Outgoing<'a> {
    pub(crate) topic: &'a str,
    pub(crate) payload: &'a [u8],
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) user_properties: UserProperties<'a>,
    pub(crate) properties: Option<&'a MessageProperties>,
    /// What is left of the message's expiry interval, in seconds.
    pub(crate) expiry_s: Option<u32>,
    /// Of the subscriptions that it is for.
    pub(crate) identifiers: &'a [u32],
    /// The packet identifier under which the session's last connection sent it: it is sent again as that, with DUP.
    pub(crate) again: Option<u16>,
}

/// Why a message did not leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// Larger than the client's maximum packet size (MQTT 5); it counts as delivered [MQTT-3.1.2-25].
    TooLarge,
    /// The connection cannot send any more; the message waits for the next one.
    Closed,
}

/// The positive or negative answer to a publish.
#[derive(Debug)]
pub(crate) enum Ack<'a> {
    Stored { subscribers: bool, properties: &'a [(&'static str, String)] },
    Refused { code: RefusalCode, reason: &'a str },
}

/// What CONNACK tells.
pub(crate) struct Accepted<'a> {
    pub(crate) session_present: bool,
    pub(crate) assigned_client_id: Option<&'a str>,
    /// Where it is another than the client asked for.
    pub(crate) session_expiry_s: Option<u32>,
    pub(crate) keep_alive_s: Option<u16>,
    pub(crate) authentication_method: Option<&'a str>,
    pub(crate) response_information: Option<&'a str>,
    /// How often the client may publish, if not as often as it likes.
    pub(crate) publishes_per_s: Option<u32>,
}

/// The answer to one filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Granted {
    Qos(u8),
    Refused(RefusalCode),
}

/// The protocol engine, and what is under way by it.
struct Inner {
    core: mqtt::Connection<role::Server>,
    /// It has had to do with messages of QoS 2, or with properties, a topic alias perhaps: it knows what nobody else does.
    has_messages: bool,
    /// QoS 1 publishes that it read and that are not answered yet, in their order.
    unanswered_qos1: VecDeque<u16>,
    /// QoS 2 publishes that wait for their outcome.
    unanswered_qos2: Vec<u16>,
    /// QoS 2 publishes that were not released, those that wait among them.
    unreleased_qos2: HashSet<u16>,
    /// Packet identifiers of messages sent at QoS 2. At most the window.
    sent: Vec<u16>,
}

impl Inner {
    fn new(packet_bytes_max: u32) -> Box<Self> {
        // The receive maximum is not among the options, which hold for MQTT 3.1.1 too: a client that cannot be told of one must not be
        // closed for it. In MQTT 5 it holds from the CONNACK on that names it.
        let options = ConnectionOptions::new().maximum_packet_size_recv(packet_bytes_max);
        Box::new(Self {
            core: mqtt::Connection::with_options(Version::Undetermined, options),
            has_messages: false,
            unanswered_qos1: VecDeque::new(),
            unanswered_qos2: Vec::new(),
            unreleased_qos2: HashSet::new(),
            sent: Vec::new(),
        })
    }

    /// Publishes of the client that count for its receive maximum.
    fn unanswered(&self) -> usize {
        self.unanswered_qos1.len() + self.unreleased_qos2.len()
    }
}

/// What of a CONNECT and its CONNACK the protocol engine goes on knowing.
struct Agreed {
    is_v5: bool,
    /// The session outlives its connection: the engine keeps what was sent.
    is_kept: bool,
    /// How many messages the client takes at once (MQTT 5).
    sent_max: Option<u16>,
    /// The client's Maximum Packet Size.
    sent_bytes_max: u32,
    receive_maximum: u16,
    packet_bytes_max: u32,
}

impl Agreed {
    /// What we tell every client of MQTT 5 that it may do.
    fn told(&self) -> Vec<Property> {
        let mut properties = Vec::new();
        push(&mut properties, ReceiveMaximum::new(self.receive_maximum).map(Property::from));
        push(&mut properties, MaximumPacketSize::new(self.packet_bytes_max).map(Property::from));
        push(&mut properties, TopicAliasMaximum::new(TOPIC_ALIASES_MAX).map(Property::from));
        properties
    }

    /// A protocol engine as it is after CONNECT and CONNACK. It comes to be by such packets, which cross no socket.
    fn inner(&self) -> Result<Box<Inner>, MqttError> {
        let mut inner = Inner::new(self.packet_bytes_max);
        let (connect, connack): (Packet, Packet) = if self.is_v5 {
            let mut properties = Vec::new();
            if self.is_kept {
                push(&mut properties, SessionExpiryInterval::new(1).map(Property::from));
            }
            if let Some(most) = self.sent_max {
                push(&mut properties, ReceiveMaximum::new(most).map(Property::from));
            }
            if self.sent_bytes_max != u32::MAX {
                push(&mut properties, MaximumPacketSize::new(self.sent_bytes_max).map(Property::from));
            }
            let connect = v5_0::Connect::builder().client_id("-")?.clean_start(true).props(properties).build()?;
            let connack = v5_0::Connack::builder().session_present(false).reason_code(ConnectReasonCode::Success);
            (connect.into(), connack.props(self.told()).build()?.into())
        } else {
            let connect = v3_1_1::Connect::builder().client_id("-")?.clean_session(!self.is_kept).build()?;
            let connack = v3_1_1::Connack::builder().session_present(false).return_code(ConnectReturnCode::Accepted);
            (connect.into(), connack.build()?.into())
        };
        let bytes: Vec<u8> = connect.to_buffers().iter().flat_map(|buffer| buffer.iter().copied()).collect();
        let mut events = inner.core.recv(&mut Cursor::new(&bytes[..]));
        events.extend(inner.core.send(connack));
        let fault = events.iter().find_map(|event| match event {
            Event::NotifyError(error) => Some(*error),
            _ => None,
        });
        fault.map_or(Ok(inner), Err)
    }
}

pub(crate) struct Engine {
    /// There from the first message on that needs it.
    inner: Option<Box<Inner>>,
    agreed: Agreed,
    framing: Framing,
    /// Bytes for the client.
    pub(crate) out: Vec<u8>,
    /// What the client did wrong; nothing more is read from it.
    pub(crate) fault: Option<MqttError>,
    /// The connection ends once `out` is written.
    pub(crate) closing: bool,
    /// PUBLISH packets sent that nobody has counted yet.
    pub(crate) messages_sent: u32,
    /// The limit that the client has just overstepped.
    pub(crate) overstepped: Option<Overstepped>,
    user_properties_max: u32,
    /// Bytes of the packet that is being read.
    packet_bytes: u32,
    problem_information: bool,
    connected: bool,
    /// CONNECT is not there yet.
    connecting: bool,
    /// What came of the CONNECT, until it is whole: the engine reserves memory by the announced length. Later, what came of a PUBACK.
    gathered: Vec<u8>,
    /// QoS 1 publishes that `plain` read and that are not answered yet.
    unanswered_plain: usize,
    /// Of messages sent at QoS 1, in their order.
    awaiting_puback: VecDeque<u16>,
    /// Kept for messages that the session's last connection sent. At most the window of it.
    reserved: Vec<u16>,
    /// The packet identifier that was given away last.
    last_packet_id: u16,
    /// Few clients take any.
    aliases: Option<Box<Aliases>>,
}

/// A limit, by the name of its setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overstepped {
    ConnectBytes,
    PacketBytes,
    ReceiveMaximum,
}

impl Overstepped {
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::ConnectBytes => "connect_bytes",
            Self::PacketBytes => "packet_bytes",
            Self::ReceiveMaximum => "receive_maximum",
        }
    }
}

/// Topic aliases towards the client.
struct Aliases {
    /// The first has 1, the next 2, and so on.
    topics: Vec<Box<str>>,
    max: usize,
}

/// The types of packets that are told apart here.
const CONNECT: u8 = 1;
const PUBACK: u8 = 4;
const SUBSCRIBE: u8 = 8;
const UNSUBSCRIBE: u8 = 10;
const PINGREQ: u8 = 12;
const DISCONNECT: u8 = 14;
const AUTH: u8 = 15;

/// What of a PUBACK matters here.
struct Puback {
    packet_id: u16,
    user_properties: usize,
}

thread_local! {
    /// Where the properties of a message are gathered before their length is known.
    static PROPERTIES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where the protocol's level stands in the body of a CONNECT, behind its name.
const CONNECT_LEVEL_AT: usize = 6;

/// CONNACK's return code in MQTT 3.1.1.
const UNACCEPTABLE_PROTOCOL_VERSION: u8 = 1;

impl Engine {
    pub(crate) fn new(limits: &Limits) -> Self {
        let mut framing = Framing::new();
        framing.bound(limits.connect_bytes);
        Self {
            inner: None,
            agreed: Agreed {
                is_v5: false,
                is_kept: false,
                sent_max: None,
                sent_bytes_max: u32::MAX,
                receive_maximum: limits.receive_maximum,
                packet_bytes_max: limits.packet_bytes,
            },
            framing,
            out: Vec::new(),
            fault: None,
            closing: false,
            messages_sent: 0,
            overstepped: None,
            user_properties_max: match limits.user_properties {
                0 => u32::MAX,
                most => u32::try_from(most).unwrap_or(u32::MAX),
            },
            packet_bytes: 0,
            problem_information: true,
            connected: false,
            connecting: true,
            gathered: Vec::new(),
            unanswered_plain: 0,
            awaiting_puback: VecDeque::new(),
            reserved: Vec::new(),
            last_packet_id: 0,
            aliases: None,
        }
    }

    pub(crate) fn is_v5(&self) -> bool {
        self.agreed.is_v5
    }

    /// The client has nothing to say now: without messages under way the protocol engine need not be there until it is needed again. Who has
    /// published something that needs it, or was sent something at QoS 2, will again: there it stays.
    pub(crate) fn rest(&mut self) {
        let is_resting = self.connected && self.framing.is_between_packets() && self.fault.is_none() && !self.closing;
        self.inner.take_if(|inner| is_resting && !inner.has_messages && inner.unanswered() == 0);
    }

    fn inner(&mut self) -> Result<&mut Inner, MqttError> {
        if self.inner.is_none() {
            self.inner =
                Some(if self.connecting { Inner::new(self.agreed.packet_bytes_max) } else { self.agreed.inner()? });
        }
        self.inner.as_deref_mut().ok_or(MqttError::PacketNotAllowedToSend)
    }

    /// The same for a message.
    fn inner_for_messages(&mut self) -> Result<&mut Inner, MqttError> {
        let inner = self.inner()?;
        inner.has_messages = true;
        Ok(inner)
    }

    /// Takes bytes from the socket; gives the packets in them. Stops after a CONNECT, which has to be answered first, and after
    /// [`PACKETS_AT_ONCE`]: the number of
    /// bytes taken is returned.
    pub(crate) fn feed(&mut self, bytes: &[u8], packets: &mut VecDeque<Incoming>) -> usize {
        let mut taken = 0;
        while taken < bytes.len() && packets.len() < PACKETS_AT_ONCE && self.fault.is_none() && !self.closing {
            let begins = self.framing.is_between_packets();
            let len = match self.framing.advance(&bytes[taken..]) {
                Ok(len) => len,
                Err(Malformed::ProtocolLevel) if !self.connected => {
                    // In the form that every version understands [MQTT-3.1.2-2].
                    self.out.extend_from_slice(&[0x20, 2, 0, UNACCEPTABLE_PROTOCOL_VERSION]);
                    self.closing = true;
                    break;
                }
                Err(Malformed::TooLong) => {
                    // Nobody is connected who could be told.
                    self.overstepped = Some(Overstepped::ConnectBytes);
                    self.closing = true;
                    break;
                }
                Err(_) => {
                    self.fault = Some(MqttError::MalformedPacket);
                    break;
                }
            };
            let received = &bytes[taken..taken + len];
            taken += len;
            self.packet_bytes = self.packet_bytes.saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
            let packet_bytes = usize::try_from(self.packet_bytes).unwrap_or(usize::MAX);
            let is_whole = self.framing.is_between_packets();
            if is_whole {
                self.packet_bytes = 0;
            }
            if self.connected
                && (self.take_plain(received, begins, is_whole, packets)
                    || (begins && is_whole && self.take_alone(received, packets)))
            {
                continue;
            }
            let gathered = if self.connecting {
                self.gathered.extend_from_slice(received);
                if !self.framing.is_between_packets() {
                    break;
                }
                let whole = std::mem::take(&mut self.gathered);
                if let Some(packet) = read_connect(&whole) {
                    self.agreed.is_v5 = matches!(packet, Packet::V5_0Connect(_));
                    if self.take_packet(packet, packets) {
                        self.connecting = false;
                        self.framing.bound(u32::MAX);
                        break;
                    }
                    continue;
                }
                Some(whole)
            } else {
                None
            };
            let events = match self.inner() {
                Ok(inner) => inner.core.recv(&mut Cursor::new(gathered.as_deref().unwrap_or(received))),
                Err(error) => vec![Event::NotifyError(error)],
            };
            if let Some(inner) = &self.inner {
                self.agreed.is_v5 = inner.core.get_protocol_version() == Version::V5_0;
            }
            for event in events {
                match event {
                    Event::NotifyPacketReceived(packet) => {
                        self.note_unanswered(&packet);
                        self.take_packet(packet, packets);
                    }
                    Event::RequestSendPacket { packet: Packet::V3_1_1Pubrec(_) | Packet::V5_0Pubrec(_), .. } => {
                        packets.push_back(Incoming::Repeated { bytes: packet_bytes });
                        self.on_event(event);
                    }
                    // To what is no CONNECT there is no answer in MQTT 3.1.1 [MQTT-3.1.4-1].
                    Event::RequestSendPacket { packet: Packet::V3_1_1Connack(_), .. } => {}
                    other => self.on_event(other),
                }
            }
        }
        taken
    }

    /// Takes what the protocol engine has read; `true` if it was a CONNECT.
    fn take_packet(&mut self, packet: Packet, packets: &mut VecDeque<Incoming>) -> bool {
        let packet = if user_properties(&packet) > usize::try_from(self.user_properties_max).unwrap_or(usize::MAX) {
            Some(Incoming::Overfull(self.overfull(&packet)))
        } else {
            self.incoming(packet)
        };
        if packet.as_ref().is_some_and(has_malformed_topic) {
            // [MQTT-1.5.4-2], [MQTT-4.7.3-1], [MQTT-4.7.3-2]: no NUL, and never empty.
            self.fault.get_or_insert(MqttError::MalformedPacket);
        } else if packet.as_ref().is_some_and(has_packet_id_0) {
            // [MQTT-2.2.1-3]: identifiers are not 0.
            self.fault.get_or_insert(MqttError::ProtocolError);
        } else if let Some(packet) = packet {
            let is_connect = matches!(packet, Incoming::Connect(_) | Incoming::Overfull(Overfull::Connect));
            packets.push_back(packet);
            return is_connect;
        }
        false
    }

    /// Takes a whole packet that is no part of an exchange. `false`: it is the protocol engine's, which judges what is not as it should be.
    fn take_alone(&mut self, received: &[u8], packets: &mut VecDeque<Incoming>) -> bool {
        if received.len() > usize::try_from(self.agreed.packet_bytes_max).unwrap_or(usize::MAX) {
            return false;
        }
        let Some(packet) = read_alone(received, self.is_v5()) else { return false };
        self.take_packet(packet, packets);
        true
    }

    /// Takes an ordinary PUBLISH, and every PUBACK. `false`: the packet, or this part of one, is the protocol engine's.
    fn take_plain(&mut self, received: &[u8], begins: bool, is_whole: bool, packets: &mut VecDeque<Incoming>) -> bool {
        let is_puback = received.first().is_some_and(|first| first >> 4 == PUBACK);
        if !self.gathered.is_empty() || (begins && is_puback) {
            if is_whole && self.gathered.is_empty() {
                self.take_puback(received, packets);
                return true;
            }
            self.gathered.extend_from_slice(received);
            if self.gathered.len() > usize::try_from(self.agreed.packet_bytes_max).unwrap_or(usize::MAX) {
                self.overstepped = Some(Overstepped::PacketBytes);
                self.fault = Some(MqttError::PacketTooLarge);
            } else if is_whole {
                let puback = std::mem::take(&mut self.gathered);
                self.take_puback(&puback, packets);
            }
            return true;
        }
        if !begins || !is_whole || received.len() > usize::try_from(self.agreed.packet_bytes_max).unwrap_or(usize::MAX)
        {
            return false;
        }
        let Some(Plain::Publish { topic, payload, retain, packet_id }) = plain::read(received, self.is_v5()) else {
            return false;
        };
        if packet_id.is_some() {
            self.unanswered_plain += 1;
            self.judge_receive_maximum();
            if self.fault.is_some() {
                return true;
            }
        }
        packets.push_back(Incoming::Publish(Publish {
            topic: topic.to_owned(),
            payload: Bytes::copy_from_slice(payload),
            qos: u8::from(packet_id.is_some()),
            retain,
            packet_id,
            properties: None,
        }));
        true
    }

    fn take_puback(&mut self, packet: &[u8], packets: &mut VecDeque<Incoming>) {
        let read = match plain::read(packet, self.is_v5()) {
            Some(Plain::Puback(packet_id)) => Ok(Puback { packet_id, user_properties: 0 }),
            _ => self.long_puback(plain::body(packet)),
        };
        let packet_id = match read {
            Ok(Puback { user_properties, .. })
                if user_properties > usize::try_from(self.user_properties_max).unwrap_or(usize::MAX) =>
            {
                packets.push_back(Incoming::Overfull(Overfull::Other));
                return;
            }
            Ok(Puback { packet_id, .. }) => packet_id,
            Err(error) => {
                self.fault.get_or_insert(error);
                return;
            }
        };
        match self.awaiting_puback.iter().position(|sent| *sent == packet_id) {
            Some(at) => {
                self.awaiting_puback.remove(at);
                if self.awaiting_puback.is_empty() {
                    self.awaiting_puback.shrink_to(0);
                }
                packets.push_back(Incoming::Puback(packet_id));
            }
            // [MQTT-4.3.2-2]: it acknowledges nothing that was sent.
            None => drop(self.fault.get_or_insert(MqttError::ProtocolError)),
        }
    }

    /// With a reason or properties.
    fn long_puback(&self, body: &[u8]) -> Result<Puback, MqttError> {
        let (puback, bytes) = if self.is_v5() {
            let (puback, bytes) = v5_0::Puback::parse(body)?;
            let packet_id = puback.packet_id();
            (Puback { packet_id, user_properties: user_properties(&puback.into()) }, bytes)
        } else {
            let (puback, bytes) = v3_1_1::Puback::parse(body)?;
            (Puback { packet_id: puback.packet_id(), user_properties: 0 }, bytes)
        };
        if bytes == body.len() { Ok(puback) } else { Err(MqttError::MalformedPacket) }
    }

    /// Counts what the protocol engine has read.
    fn note_unanswered(&mut self, packet: &Packet) {
        let (qos, packet_id, has_properties) = match packet {
            Packet::V3_1_1Publish(publish) => (publish.qos(), publish.packet_id(), false),
            Packet::V5_0Publish(publish) => (publish.qos(), publish.packet_id(), !publish.props().is_empty()),
            _ => return,
        };
        let Some(inner) = &mut self.inner else { return };
        // One without them is here only because it came in pieces.
        inner.has_messages |= has_properties || qos == Qos::ExactlyOnce;
        if let (Qos::AtLeastOnce, Some(packet_id)) = (qos, packet_id) {
            inner.unanswered_qos1.push_back(packet_id);
            // Those of QoS 2 are counted when they are noted.
            self.judge_receive_maximum();
        }
    }

    /// [MQTT-3.3.4-9]: what we told an MQTT 5 client that it may have under way.
    fn judge_receive_maximum(&mut self) {
        let under_way = self.unanswered_plain + self.inner.as_ref().map_or(0, |inner| inner.unanswered());
        if under_way > usize::from(self.agreed.receive_maximum) && self.is_v5() {
            self.overstepped = Some(Overstepped::ReceiveMaximum);
            self.fault.get_or_insert(MqttError::ReceiveMaximumExceeded);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::RequestSendPacket { packet, .. } => {
                let of_pubrec = match &packet {
                    Packet::V3_1_1Pubrec(pubrec) => Some(pubrec.packet_id()),
                    Packet::V5_0Pubrec(pubrec) => Some(pubrec.packet_id()),
                    _ => None,
                };
                let is_unanswered = |packet_id: u16| {
                    self.inner.as_ref().is_some_and(|inner| inner.unanswered_qos2.contains(&packet_id))
                };
                if !of_pubrec.is_some_and(is_unanswered) {
                    self.put(&packet);
                }
            }
            Event::NotifyError(error) => {
                self.overstepped = match error {
                    MqttError::PacketTooLarge => Some(Overstepped::PacketBytes),
                    MqttError::ReceiveMaximumExceeded => Some(Overstepped::ReceiveMaximum),
                    _ => self.overstepped,
                };
                self.fault.get_or_insert(error);
            }
            Event::RequestClose => self.closing = true,
            Event::NotifyPacketIdReleased(packet_id) => {
                if let Some(inner) = &mut self.inner {
                    take(&mut inner.sent, packet_id);
                }
            }
            Event::NotifyPacketReceived(_) | Event::RequestTimerReset { .. } | Event::RequestTimerCancel(_) => {}
        }
    }

    /// Sends a packet of ours. `Err` if the engine refused it; a refusal of ours is never the client's fault.
    fn send(&mut self, packet: Packet) -> Result<(), MqttError> {
        let needs_inner = matches!(
            packet,
            Packet::V3_1_1Pubrec(_)
                | Packet::V5_0Pubrec(_)
                | Packet::V3_1_1Pubrel(_)
                | Packet::V5_0Pubrel(_)
                | Packet::V3_1_1Pubcomp(_)
                | Packet::V5_0Pubcomp(_)
        );
        if self.inner.is_none() && !needs_inner {
            return self.send_alone(&packet);
        }
        let mut result = Ok(());
        for event in self.inner()?.core.send(packet) {
            if let Event::NotifyError(error) = event {
                result = Err(error);
            } else {
                self.on_event(event);
            }
        }
        result
    }

    /// The same while the protocol engine is not there, for what is no part of an exchange.
    fn send_alone(&mut self, packet: &Packet) -> Result<(), MqttError> {
        if self.is_v5() {
            if packet.size() > self.sent_bytes_max() {
                return Err(MqttError::PacketTooLarge);
            }
            if self.closing {
                // Nothing comes behind a DISCONNECT.
                return Err(MqttError::PacketNotAllowedToSend);
            }
        }
        self.put(packet);
        Ok(())
    }

    fn put(&mut self, packet: &Packet) {
        self.closing |= matches!(packet, Packet::V5_0Disconnect(_));
        for buffer in packet.to_buffers() {
            self.out.extend_from_slice(&buffer);
        }
    }

    /// The client's Maximum Packet Size.
    fn sent_bytes_max(&self) -> usize {
        usize::try_from(self.agreed.sent_bytes_max).unwrap_or(usize::MAX)
    }

    fn incoming(&mut self, packet: Packet) -> Option<Incoming> {
        Some(match packet {
            Packet::V3_1_1Connect(p) => {
                self.agreed.is_kept = !p.clean_session();
                Incoming::Connect(Box::new(Connect {
                    client_id: p.client_id().to_owned(),
                    clean_start: p.clean_session(),
                    keep_alive_s: p.keep_alive(),
                    user_name: p.user_name().map(str::to_owned),
                    password: p.password().map(<[u8]>::to_vec),
                    session_expiry_s: if p.clean_session() { 0 } else { u32::MAX },
                    receive_maximum: None,
                    request_response_information: false,
                    will: p.will_topic().map(|topic| Will {
                        topic: topic.to_owned(),
                        payload: Bytes::copy_from_slice(p.will_payload().unwrap_or_default()),
                        qos: qos_number(p.will_qos()),
                        retain: p.will_retain(),
                        delay_s: 0,
                        properties: MessageProperties::default(),
                    }),
                    authentication: None,
                }))
            }
            Packet::V5_0Connect(p) => {
                let mut session_expiry_s = 0;
                let mut receive_maximum = None;
                let mut request_response_information = false;
                let mut authentication = Authentication::default();
                let (mut has_method, mut has_data) = (false, false);
                for property in p.props() {
                    match property {
                        Property::SessionExpiryInterval(value) => session_expiry_s = value.val(),
                        Property::ReceiveMaximum(value) => receive_maximum = Some(value.val()),
                        Property::RequestProblemInformation(value) => self.problem_information = value.val() != 0,
                        Property::RequestResponseInformation(value) => request_response_information = value.val() != 0,
                        Property::TopicAliasMaximum(value) if value.val() > 0 => {
                            let max = usize::from(value.val().min(TOPIC_ALIASES_SENT_MAX));
                            self.aliases = Some(Box::new(Aliases { topics: Vec::new(), max }));
                        }
                        Property::MaximumPacketSize(bytes) => {
                            self.agreed.sent_bytes_max = bytes.val();
                        }
                        Property::AuthenticationMethod(method) => {
                            has_method = true;
                            authentication.method = method.val().to_owned();
                        }
                        Property::AuthenticationData(data) => {
                            has_data = true;
                            authentication.data = data.val().to_vec();
                        }
                        _ => {}
                    }
                }
                self.agreed.is_kept = session_expiry_s > 0;
                self.agreed.sent_max = receive_maximum;
                if has_data && !has_method {
                    // [MQTT-3.1.2.11.10]: no authentication data without a method.
                    self.fault.get_or_insert(MqttError::ProtocolError);
                    return None;
                }
                Incoming::Connect(Box::new(Connect {
                    client_id: p.client_id().to_owned(),
                    clean_start: p.clean_start(),
                    keep_alive_s: p.keep_alive(),
                    user_name: p.user_name().map(str::to_owned),
                    password: p.password().map(<[u8]>::to_vec),
                    session_expiry_s,
                    receive_maximum,
                    request_response_information,
                    will: p.will_topic().map(|topic| Will {
                        topic: topic.to_owned(),
                        payload: Bytes::copy_from_slice(p.will_payload().unwrap_or_default()),
                        qos: qos_number(p.will_qos()),
                        retain: p.will_retain(),
                        delay_s: will_delay_s(p.will_props()),
                        properties: message_properties(p.will_props()),
                    }),
                    authentication: has_method.then_some(authentication),
                }))
            }
            Packet::V3_1_1Publish(p) => {
                let qos = qos_number(p.qos());
                self.note_qos2(qos, p.packet_id());
                Incoming::Publish(Publish {
                    topic: p.topic_name().to_owned(),
                    payload: Bytes::copy_from_slice(p.payload().as_slice()),
                    qos,
                    retain: p.retain(),
                    packet_id: p.packet_id(),
                    properties: None,
                })
            }
            Packet::V5_0Publish(p) => {
                let qos = qos_number(p.qos());
                self.note_qos2(qos, p.packet_id());
                if p.props().iter().any(|property| matches!(property, Property::SubscriptionIdentifier(_))) {
                    // [MQTT-3.3.4-6]: a client's PUBLISH must not contain a subscription identifier.
                    self.fault.get_or_insert(MqttError::ProtocolError);
                    return None;
                }
                Incoming::Publish(Publish {
                    topic: p.topic_name().to_owned(),
                    payload: Bytes::copy_from_slice(p.payload().as_slice()),
                    qos,
                    retain: p.retain(),
                    packet_id: p.packet_id(),
                    properties: (!p.props().is_empty()).then(|| Box::new(message_properties(p.props()))),
                })
            }
            Packet::V3_1_1Puback(p) => Incoming::Puback(p.packet_id()),
            Packet::V5_0Puback(p) => Incoming::Puback(p.packet_id()),
            Packet::V3_1_1Pubrec(p) => Incoming::Pubrec(p.packet_id(), true),
            Packet::V5_0Pubrec(p) => {
                Incoming::Pubrec(p.packet_id(), p.reason_code().is_none_or(|code| code.is_success()))
            }
            Packet::V3_1_1Pubrel(p) => Incoming::Pubrel(p.packet_id(), self.released(p.packet_id())),
            Packet::V5_0Pubrel(p) => Incoming::Pubrel(p.packet_id(), self.released(p.packet_id())),
            Packet::V3_1_1Pubcomp(p) => Incoming::Pubcomp(p.packet_id()),
            Packet::V5_0Pubcomp(p) => Incoming::Pubcomp(p.packet_id()),
            Packet::V3_1_1Subscribe(p) => Incoming::Subscribe {
                packet_id: p.packet_id(),
                filters: p
                    .entries()
                    .iter()
                    .map(|entry| Filter {
                        filter: entry.topic_filter().to_owned(),
                        qos: qos_number(entry.sub_opts().qos()),
                        no_local: false,
                        retain_as_published: false,
                        retain_handling: 0,
                    })
                    .collect(),
                identifier: None,
            },
            // [MQTT-3.8.2.1.2]: at most one.
            Packet::V5_0Subscribe(p) if subscription_identifiers(p.props()) > 1 => {
                self.fault.get_or_insert(MqttError::ProtocolError);
                return None;
            }
            Packet::V5_0Subscribe(p) => Incoming::Subscribe {
                packet_id: p.packet_id(),
                filters: p
                    .entries()
                    .iter()
                    .map(|entry| {
                        let options = entry.sub_opts();
                        Filter {
                            filter: entry.topic_filter().to_owned(),
                            qos: qos_number(options.qos()),
                            no_local: options.nl(),
                            retain_as_published: options.rap(),
                            retain_handling: match options.rh() {
                                RetainHandling::SendRetained => 0,
                                RetainHandling::SendRetainedIfNotExists => 1,
                                RetainHandling::DoNotSendRetained => 2,
                            },
                        }
                    })
                    .collect(),
                identifier: p.props().iter().find_map(|property| match property {
                    Property::SubscriptionIdentifier(identifier) => Some(identifier.val()),
                    _ => None,
                }),
            },
            Packet::V3_1_1Unsubscribe(p) => Incoming::Unsubscribe {
                packet_id: p.packet_id(),
                filters: p.entries().iter().map(|filter| filter.as_str().to_owned()).collect(),
            },
            Packet::V5_0Unsubscribe(p) => Incoming::Unsubscribe {
                packet_id: p.packet_id(),
                filters: p.entries().iter().map(|filter| filter.as_str().to_owned()).collect(),
            },
            Packet::V3_1_1Pingreq(_) | Packet::V5_0Pingreq(_) => Incoming::Pingreq,
            Packet::V3_1_1Disconnect(_) => Incoming::Disconnect { with_will: false, session_expiry_s: None },
            Packet::V5_0Disconnect(p) => Incoming::Disconnect {
                with_will: p.reason_code().is_some_and(|code| code != DisconnectReasonCode::NormalDisconnection),
                session_expiry_s: p.props().as_ref().and_then(|properties| {
                    properties.iter().find_map(|property| match property {
                        Property::SessionExpiryInterval(value) => Some(value.val()),
                        _ => None,
                    })
                }),
            },
            // Nothing that we begin takes more than one packet, so there is nothing to continue; and only the server says that it is done.
            Packet::V5_0Auth(p) if p.reason_code() != Some(AuthReasonCode::ReAuthenticate) => {
                self.fault.get_or_insert(MqttError::ProtocolError);
                return None;
            }
            Packet::V5_0Auth(p) => {
                let mut authentication = Authentication::default();
                for property in p.props().iter().flatten() {
                    match property {
                        Property::AuthenticationMethod(method) => method.val().clone_into(&mut authentication.method),
                        Property::AuthenticationData(data) => authentication.data = data.val().to_vec(),
                        _ => {}
                    }
                }
                Incoming::Auth(authentication)
            }
            // Server-only packets: the engine refuses them before they get here.
            Packet::V3_1_1Connack(_)
            | Packet::V3_1_1Suback(_)
            | Packet::V3_1_1Unsuback(_)
            | Packet::V3_1_1Pingresp(_)
            | Packet::V5_0Connack(_)
            | Packet::V5_0Suback(_)
            | Packet::V5_0Unsuback(_)
            | Packet::V5_0Pingresp(_) => {
                self.fault.get_or_insert(MqttError::ProtocolError);
                return None;
            }
        })
    }

    fn overfull(&mut self, packet: &Packet) -> Overfull {
        match packet {
            Packet::V5_0Connect(_) => Overfull::Connect,
            Packet::V5_0Publish(p) => {
                let qos = qos_number(p.qos());
                self.note_qos2(qos, p.packet_id());
                let topic = p.topic_name().to_owned();
                Overfull::Publish { topic, qos, packet_id: p.packet_id(), bytes: p.size() }
            }
            Packet::V5_0Subscribe(p) => Overfull::Subscribe { packet_id: p.packet_id(), filters: p.entries().len() },
            _ => Overfull::Other,
        }
    }

    fn note_qos2(&mut self, qos: u8, packet_id: Option<u16>) {
        if qos == 2
            && let Some(packet_id) = packet_id
            && let Some(inner) = &mut self.inner
        {
            inner.unanswered_qos2.push(packet_id);
            inner.unreleased_qos2.insert(packet_id);
            self.judge_receive_maximum();
        }
    }

    /// A QoS 2 publish is released; `false` if there is none.
    fn released(&mut self, packet_id: u16) -> bool {
        self.inner.as_mut().is_some_and(|inner| inner.unreleased_qos2.remove(&packet_id))
    }

    /// Accepts the CONNECT.
    pub(crate) fn accept(&mut self, accepted: &Accepted<'_>) {
        self.connected = true;
        let sent = if self.is_v5() {
            let mut properties = self.agreed.told();
            if let Some(client_id) = accepted.assigned_client_id {
                push(&mut properties, mqtt::packet::AssignedClientIdentifier::new(client_id).map(Property::from));
            }
            if let Some(expiry) = accepted.session_expiry_s {
                push(&mut properties, SessionExpiryInterval::new(expiry).map(Property::from));
            }
            if let Some(keep_alive) = accepted.keep_alive_s {
                push(&mut properties, mqtt::packet::ServerKeepAlive::new(keep_alive).map(Property::from));
            }
            if let Some(method) = accepted.authentication_method {
                push(&mut properties, mqtt::packet::AuthenticationMethod::new(method).map(Property::from));
            }
            if let Some(information) = accepted.response_information {
                push(&mut properties, mqtt::packet::ResponseInformation::new(information).map(Property::from));
            }
            if let Some(rate) = accepted.publishes_per_s {
                let property = mqtt::packet::UserProperty::new(PUBLISHES_PER_S, rate.to_string());
                push(&mut properties, property.map(Property::from));
            }
            v5_0::Connack::builder()
                .session_present(accepted.session_present)
                .reason_code(ConnectReasonCode::Success)
                .props(properties)
                .build()
                .and_then(|packet| self.send_alone(&packet.into()))
        } else {
            v3_1_1::Connack::builder()
                .session_present(accepted.session_present)
                .return_code(ConnectReturnCode::Accepted)
                .build()
                .and_then(|packet| self.send_alone(&packet.into()))
        };
        // The protocol engine is there already if the session had something under way, and takes this as said.
        self.must(sent);
    }

    /// Tells the client that it has proved again who it is.
    pub(crate) fn authenticated_again(&mut self, method: &str) {
        let mut properties = Vec::new();
        push(&mut properties, mqtt::packet::AuthenticationMethod::new(method).map(Property::from));
        let sent = v5_0::Auth::builder()
            .reason_code(AuthReasonCode::Success)
            .props(properties)
            .build()
            .and_then(|packet| self.send(packet.into()));
        self.must(sent);
    }

    /// Refuses the CONNECT and ends the connection.
    pub(crate) fn refuse(&mut self, code: ConnectRefusalCode, reason: &str) {
        let sent = if self.is_v5() {
            let code = match code {
                ConnectRefusalCode::ClientIdentifierNotValid => ConnectReasonCode::ClientIdentifierNotValid,
                ConnectRefusalCode::BadUserNameOrPassword => ConnectReasonCode::BadUserNameOrPassword,
                ConnectRefusalCode::NotAuthorized => ConnectReasonCode::NotAuthorized,
                ConnectRefusalCode::ServerUnavailable => ConnectReasonCode::ServerUnavailable,
                ConnectRefusalCode::BadAuthenticationMethod => ConnectReasonCode::BadAuthenticationMethod,
                ConnectRefusalCode::ConnectionRateExceeded => ConnectReasonCode::ConnectionRateExceeded,
                ConnectRefusalCode::QuotaExceeded => ConnectReasonCode::QuotaExceeded,
            };
            let mut properties = Vec::new();
            push(&mut properties, ReasonString::new(reason).map(Property::from));
            v5_0::Connack::builder()
                .session_present(false)
                .reason_code(code)
                .props(properties)
                .build()
                .and_then(|packet| self.send(packet.into()))
        } else {
            let code = match code {
                ConnectRefusalCode::ClientIdentifierNotValid => ConnectReturnCode::IdentifierRejected,
                ConnectRefusalCode::BadUserNameOrPassword => ConnectReturnCode::BadUserNameOrPassword,
                ConnectRefusalCode::NotAuthorized | ConnectRefusalCode::BadAuthenticationMethod => {
                    ConnectReturnCode::NotAuthorized
                }
                ConnectRefusalCode::ServerUnavailable
                | ConnectRefusalCode::ConnectionRateExceeded
                | ConnectRefusalCode::QuotaExceeded => ConnectReturnCode::ServerUnavailable,
            };
            v3_1_1::Connack::builder()
                .session_present(false)
                .return_code(code)
                .build()
                .and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
        self.closing = true;
    }

    /// Keeps a packet identifier for a message that the session's last connection sent.
    pub(crate) fn reserve(&mut self, packet_id: u16) -> bool {
        let is_free = packet_id != 0 && !self.is_used(packet_id);
        if is_free {
            self.reserved.push(packet_id);
        }
        is_free
    }

    /// Lets a reserved packet identifier go.
    pub(crate) fn release(&mut self, packet_id: u16) {
        take(&mut self.reserved, packet_id);
    }

    fn is_used(&self, packet_id: u16) -> bool {
        self.awaiting_puback.contains(&packet_id)
            || self.reserved.contains(&packet_id)
            || self.inner.as_ref().is_some_and(|inner| inner.sent.contains(&packet_id))
    }

    /// One after the other, so that one that was released is not used again soon. `None` if all are under way.
    fn next_packet_id(&mut self) -> Option<u16> {
        for _ in 0..u16::MAX {
            self.last_packet_id = self.last_packet_id.checked_add(1).unwrap_or(1);
            if !self.is_used(self.last_packet_id) {
                return Some(self.last_packet_id);
            }
        }
        None
    }

    /// Sends a message; `Some` is the packet identifier of a QoS 1 or 2 message.
    pub(crate) fn publish(&mut self, message: Outgoing<'_>) -> Result<Option<u16>, NotSent> {
        if self.closing || !self.connected {
            return Err(NotSent::Closed);
        }
        let packet_id = match (message.qos, message.again) {
            (0, _) => None,
            (_, Some(again)) => Some(again),
            (_, None) => {
                let Some(packet_id) = self.next_packet_id() else {
                    tracing::debug!("no packet identifier is free");
                    self.closing = true;
                    return Err(NotSent::Closed);
                };
                Some(packet_id)
            }
        };
        let sent = match packet_id {
            Some(packet_id) if message.qos == 2 => self.publish_qos2(&message, packet_id),
            _ => self.publish_plain(&message, packet_id),
        };
        if let Err(error) = sent {
            tracing::debug!(?error, topic = %Escaped(message.topic), "message not sent");
            if let Some(packet_id) = packet_id {
                self.release(packet_id);
            }
            self.closing |= error == NotSent::Closed;
            return Err(error);
        }
        self.messages_sent += 1;
        Ok(packet_id)
    }

    fn publish_plain(&mut self, message: &Outgoing<'_>, packet_id: Option<u16>) -> Result<(), NotSent> {
        let bytes_max = self.sent_bytes_max();
        let too_long = |bytes: usize| if bytes > bytes_max { NotSent::TooLarge } else { NotSent::Closed };
        if self.is_v5() {
            let alias = self.alias(message.topic);
            let topic = if alias.is_some_and(|(_, is_known)| is_known) { "" } else { message.topic };
            let put = PROPERTIES.with_borrow_mut(|properties| {
                properties.clear();
                plain::put_publish_properties(properties, message, alias.map(|(alias, _)| alias));
                plain::put_publish(&mut self.out, topic, message, packet_id, Some(properties), bytes_max)
            });
            if put.is_err()
                && alias.is_some_and(|(_, is_known)| !is_known)
                && let Some(aliases) = &mut self.aliases
            {
                aliases.topics.pop();
            }
            put.map_err(too_long)?;
        } else {
            plain::put_publish(&mut self.out, message.topic, message, packet_id, None, bytes_max).map_err(too_long)?;
        }
        if let Some(packet_id) = packet_id {
            take(&mut self.reserved, packet_id);
            self.awaiting_puback.push_back(packet_id);
        }
        Ok(())
    }

    /// Without a topic alias: the protocol engine does not know those that are in use.
    fn publish_qos2(&mut self, message: &Outgoing<'_>, packet_id: u16) -> Result<(), NotSent> {
        take(&mut self.reserved, packet_id);
        let inner = self.inner_for_messages().map_err(|_| NotSent::Closed)?;
        if inner.core.register_packet_id(packet_id).is_err() {
            return Err(NotSent::Closed);
        }
        inner.sent.push(packet_id);
        let dup = message.again.is_some();
        let built: Result<Packet, MqttError> = if self.is_v5() {
            let mut properties: Vec<Property> = Vec::with_capacity(4);
            match message.user_properties {
                UserProperties::None => {}
                UserProperties::Live(live) => {
                    for (key, value) in live.properties() {
                        push(&mut properties, UserProperty::new(key, value).map(Property::from));
                    }
                    if !live.correlation().is_empty() {
                        push(&mut properties, CorrelationData::new(live.correlation().to_vec()).map(Property::from));
                    }
                }
                UserProperties::Stored(stored) => {
                    for (key, value) in stored {
                        push(&mut properties, UserProperty::new(*key, value.as_str()).map(Property::from));
                    }
                }
            }
            if let Some(own) = message.properties {
                push_message_properties(&mut properties, own, message.expiry_s);
            }
            for identifier in message.identifiers {
                push(&mut properties, SubscriptionIdentifier::new(*identifier).map(Property::from));
            }
            v5_0::Publish::builder()
                .topic_name(message.topic)
                .and_then(|builder| {
                    let builder = builder.qos(Qos::ExactlyOnce).dup(dup).retain(message.retain);
                    let builder = builder.payload(message.payload).packet_id(packet_id);
                    if properties.is_empty() { builder } else { builder.props(properties) }.build()
                })
                .map(Into::into)
        } else {
            v3_1_1::Publish::builder()
                .topic_name(message.topic)
                .and_then(|builder| {
                    let builder = builder.qos(Qos::ExactlyOnce).dup(dup).retain(message.retain);
                    builder.payload(message.payload).packet_id(packet_id).build()
                })
                .map(Into::into)
        };
        built.and_then(|packet| self.send(packet)).map_err(|error| {
            if let Some(inner) = &mut self.inner {
                let events = inner.core.release_packet_id(packet_id);
                take(&mut inner.sent, packet_id);
                events.into_iter().for_each(|event| self.on_event(event));
            }
            if error == MqttError::PacketTooLarge { NotSent::TooLarge } else { NotSent::Closed }
        })
    }

    /// The alias of a topic, and whether the client knows it already; a new one if there is room.
    fn alias(&mut self, topic: &str) -> Option<(u16, bool)> {
        let Aliases { topics, max } = self.aliases.as_deref_mut()?;
        if topic.len() < ALIASED_TOPIC_BYTES_MIN {
            return None;
        }
        let found = topics.iter().position(|known| **known == *topic);
        let at = match found {
            Some(at) => at,
            None if topics.len() < *max => {
                topics.push(topic.into());
                topics.len() - 1
            }
            None => return None,
        };
        Some((u16::try_from(at + 1).ok()?, found.is_some()))
    }

    /// Takes up a QoS 2 message that the session's last connection had sent and the client has (PUBREC): PUBREL is what it hears next.
    /// The engine knows of no such beginning, so it is led there by a message and a PUBREC that cross no socket. `false` if the client's
    /// receive maximum leaves no room now, or a packet of its own is under way. The packet identifier has to be reserved.
    pub(crate) fn release_again(&mut self, packet_id: u16) -> bool {
        if !self.framing.is_between_packets() || !take(&mut self.reserved, packet_id) {
            return false;
        }
        let is_v5 = self.is_v5();
        let Ok(inner) = self.inner_for_messages() else { return false };
        if inner.core.register_packet_id(packet_id).is_err() {
            return false;
        }
        inner.sent.push(packet_id);
        let sent: Result<Packet, MqttError> = if is_v5 {
            let builder =
                v5_0::Publish::builder().topic_name("-").map(|b| b.qos(Qos::ExactlyOnce).packet_id(packet_id));
            builder.and_then(|builder| builder.build()).map(Into::into)
        } else {
            let builder =
                v3_1_1::Publish::builder().topic_name("-").map(|b| b.qos(Qos::ExactlyOnce).packet_id(packet_id));
            builder.and_then(|builder| builder.build()).map(Into::into)
        };
        let Ok(packet) = sent else { return false };
        let events = inner.core.send(packet);
        if events.iter().any(|event| matches!(event, Event::NotifyError(_))) {
            // It has let go of the packet identifier: keep it for the next try.
            take(&mut inner.sent, packet_id);
            self.reserved.push(packet_id);
            return false;
        }
        let [high, low] = packet_id.to_be_bytes();
        drop(inner.core.recv(&mut Cursor::new(&[0x50, 2, high, low][..])));
        self.pubrel(packet_id);
        true
    }

    /// PUBACK or PUBREC.
    pub(crate) fn acknowledge(&mut self, packet_id: u16, qos: u8, ack: &Ack<'_>) {
        if qos == 2 { self.put_pubrec(packet_id, ack) } else { self.put_puback(packet_id, ack) }
    }

    fn put_puback(&mut self, packet_id: u16, ack: &Ack<'_>) {
        if self.closing && self.is_v5() {
            // Nothing comes behind a DISCONNECT.
            return;
        }
        if !self.tell_inner_of_puback(packet_id) {
            self.unanswered_plain = self.unanswered_plain.saturating_sub(1);
        }
        let (reason, told) = match ack {
            Ack::Stored { subscribers: true, properties } => (PubackReasonCode::Success, Told::Properties(properties)),
            Ack::Stored { subscribers: false, properties } => {
                (PubackReasonCode::NoMatchingSubscribers, Told::Properties(properties))
            }
            Ack::Refused { code, reason } => (puback_code(*code), Told::Reason(reason)),
        };
        let told = if self.problem_information { told } else { Told::Nothing };
        let is_plain = reason == PubackReasonCode::Success && matches!(told, Told::Nothing | Told::Properties([]));
        let reason = (self.is_v5() && !is_plain).then_some(reason as u8);
        let bytes_max = self.sent_bytes_max();
        if !plain::put_puback(&mut self.out, packet_id, reason, told, bytes_max) {
            self.closing = true;
        }
    }

    /// It counts what it has read until it is answered; its answer stays here. `false` if it has not read that.
    fn tell_inner_of_puback(&mut self, packet_id: u16) -> bool {
        let is_v5 = self.is_v5();
        let Some(inner) = &mut self.inner else { return false };
        let Some(at) = inner.unanswered_qos1.iter().position(|read| *read == packet_id) else { return false };
        inner.unanswered_qos1.remove(at);
        let told = if is_v5 {
            v5_0::Puback::builder().packet_id(packet_id).build().map(|packet| inner.core.send(packet.into()))
        } else {
            v3_1_1::Puback::builder().packet_id(packet_id).build().map(|packet| inner.core.send(packet.into()))
        };
        if let Err(error) = told {
            tracing::debug!(?error, "an answer could not be counted");
        }
        true
    }

    fn put_pubrec(&mut self, packet_id: u16, ack: &Ack<'_>) {
        self.on_qos2_taken(packet_id);
        let sent = if self.is_v5() {
            if matches!(ack, Ack::Refused { .. }) {
                // [MQTT-4.3.3-9]: the packet identifier is free.
                self.released(packet_id);
            }
            let mut properties = Vec::new();
            if self.problem_information {
                match ack {
                    Ack::Stored { properties: own, .. } => {
                        for (key, value) in *own {
                            push(&mut properties, UserProperty::new(*key, value.as_str()).map(Property::from));
                        }
                    }
                    Ack::Refused { reason, .. } => {
                        push(&mut properties, ReasonString::new(*reason).map(Property::from));
                    }
                }
            }
            match self.send_v5_pubrec(packet_id, ack, properties) {
                // [MQTT-3.5.2-2] and [MQTT-3.5.2-3]: what does not fit the client's maximum packet size is left out.
                Err(MqttError::PacketTooLarge) => self.send_v5_pubrec(packet_id, ack, Vec::new()),
                sent => sent,
            }
        } else {
            v3_1_1::Pubrec::builder().packet_id(packet_id).build().and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    fn send_v5_pubrec(&mut self, packet_id: u16, ack: &Ack<'_>, properties: Vec<Property>) -> Result<(), MqttError> {
        let mut builder = v5_0::Pubrec::builder().packet_id(packet_id);
        if !properties.is_empty() || !matches!(ack, Ack::Stored { subscribers: true, .. }) {
            builder = builder.reason_code(match ack {
                Ack::Stored { subscribers: true, .. } => PubrecReasonCode::Success,
                Ack::Stored { subscribers: false, .. } => PubrecReasonCode::NoMatchingSubscribers,
                Ack::Refused { code, .. } => pubrec_code(*code),
            });
        }
        if !properties.is_empty() {
            builder = builder.props(properties);
        }
        builder.build().and_then(|packet| self.send(packet.into()))
    }

    /// QoS 2 publishes that were answered with PUBREC and not released yet.
    pub(crate) fn qos2_received(&self) -> HashSet<u16> {
        let Some(inner) = &self.inner else { return HashSet::new() };
        let mut received = inner.unreleased_qos2.clone();
        for unanswered in &inner.unanswered_qos2 {
            received.remove(unanswered);
        }
        received
    }

    /// The outcome of a QoS 2 publish is known.
    pub(crate) fn on_qos2_taken(&mut self, packet_id: u16) {
        if let Some(inner) = &mut self.inner {
            inner.unanswered_qos2.retain(|waiting| *waiting != packet_id);
        }
    }

    /// Takes up what [`Engine::qos2_received`] gave in the session's last connection.
    pub(crate) fn restore_qos2_received(&mut self, received: HashSet<u16>) {
        if received.is_empty() {
            return;
        }
        match self.inner_for_messages() {
            Ok(inner) => {
                inner.unreleased_qos2.extend(&received);
                inner.core.restore_qos2_publish_handled(received.into_iter().collect());
            }
            // Without it nothing can be known as sent before.
            Err(error) => self.must(Err(error)),
        }
    }

    pub(crate) fn pubrel(&mut self, packet_id: u16) {
        let sent = if self.is_v5() {
            v5_0::Pubrel::builder().packet_id(packet_id).build().and_then(|packet| self.send(packet.into()))
        } else {
            v3_1_1::Pubrel::builder().packet_id(packet_id).build().and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    pub(crate) fn pubcomp(&mut self, packet_id: u16, found: bool) {
        let sent = if self.is_v5() {
            let mut builder = v5_0::Pubcomp::builder().packet_id(packet_id);
            if !found {
                builder = builder.reason_code(PubcompReasonCode::PacketIdentifierNotFound);
            }
            builder.build().and_then(|packet| self.send(packet.into()))
        } else {
            v3_1_1::Pubcomp::builder().packet_id(packet_id).build().and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    pub(crate) fn suback(&mut self, packet_id: u16, granted: &[Granted], reason: Option<&str>) {
        let sent = if self.is_v5() {
            let codes: Vec<SubackReasonCode> = granted
                .iter()
                .map(|granted| match granted {
                    Granted::Qos(0) => SubackReasonCode::GrantedQos0,
                    Granted::Qos(1) => SubackReasonCode::GrantedQos1,
                    Granted::Qos(_) => SubackReasonCode::GrantedQos2,
                    Granted::Refused(code) => suback_code(*code),
                })
                .collect();
            let reason = reason.filter(|_| self.problem_information);
            let properties = reason.and_then(|reason| ReasonString::new(reason).ok()).map(Property::from);
            let builder = || v5_0::Suback::builder().packet_id(packet_id).reason_codes(codes.clone());
            // [MQTT-3.9.2-1]: what does not fit the client's maximum packet size is left out.
            let told = builder().props(properties.into_iter().collect::<Vec<Property>>()).build();
            match told.and_then(|packet| self.send(packet.into())) {
                Err(MqttError::PacketTooLarge) => builder().build().and_then(|packet| self.send(packet.into())),
                sent => sent,
            }
        } else {
            let codes = granted
                .iter()
                .map(|granted| match granted {
                    Granted::Qos(0) => SubackReturnCode::SuccessMaximumQos0,
                    Granted::Qos(1) => SubackReturnCode::SuccessMaximumQos1,
                    Granted::Qos(_) => SubackReturnCode::SuccessMaximumQos2,
                    Granted::Refused(_) => SubackReturnCode::Failure,
                })
                .collect();
            v3_1_1::Suback::builder()
                .packet_id(packet_id)
                .return_codes(codes)
                .build()
                .and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    pub(crate) fn unsuback(&mut self, packet_id: u16, existed: &[bool]) {
        let sent = if self.is_v5() {
            let codes = existed
                .iter()
                .map(
                    |existed| {
                        if *existed { UnsubackReasonCode::Success } else { UnsubackReasonCode::NoSubscriptionExisted }
                    },
                )
                .collect();
            v5_0::Unsuback::builder()
                .packet_id(packet_id)
                .reason_codes(codes)
                .build()
                .and_then(|packet| self.send(packet.into()))
        } else {
            v3_1_1::Unsuback::builder().packet_id(packet_id).build().and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    pub(crate) fn pingresp(&mut self) {
        let sent = if self.is_v5() {
            v5_0::Pingresp::builder().build().and_then(|packet| self.send(packet.into()))
        } else {
            v3_1_1::Pingresp::builder().build().and_then(|packet| self.send(packet.into()))
        };
        self.must(sent);
    }

    /// Ends the connection: MQTT 5 clients are told why, MQTT 3.1.1 has no packet for it.
    pub(crate) fn disconnect(&mut self, code: DisconnectReasonCode, reason: &str) {
        if self.connected && self.is_v5() && !self.closing {
            let builder = || v5_0::Disconnect::builder().reason_code(code);
            let properties: Vec<Property> = ReasonString::new(reason).map(Property::from).into_iter().collect();
            let told = builder().props(properties).build();
            // [MQTT-3.14.2-3]
            let sent = match told.and_then(|packet| self.send(packet.into())) {
                Err(MqttError::PacketTooLarge) => builder().build().and_then(|packet| self.send(packet.into())),
                sent => sent,
            };
            if let Err(error) = sent {
                tracing::debug!(?error, "disconnect not sent");
            }
        }
        self.closing = true;
    }

    /// The DISCONNECT for what the client did wrong, unless the engine sent one.
    pub(crate) fn disconnect_for_fault(&mut self) {
        let code = match self.fault {
            Some(MqttError::PacketTooLarge) => DisconnectReasonCode::PacketTooLarge,
            Some(MqttError::ProtocolError) => DisconnectReasonCode::ProtocolError,
            Some(MqttError::ReceiveMaximumExceeded) => DisconnectReasonCode::ReceiveMaximumExceeded,
            Some(MqttError::TopicAliasInvalid) => DisconnectReasonCode::TopicAliasInvalid,
            Some(MqttError::TopicNameInvalid) => DisconnectReasonCode::TopicNameInvalid,
            _ => DisconnectReasonCode::MalformedPacket,
        };
        let sentence = "the packet is not valid MQTT here";
        if !self.connected && self.is_v5() && !self.closing {
            let code = match self.fault {
                Some(MqttError::ProtocolError) => ConnectReasonCode::ProtocolError,
                _ => ConnectReasonCode::MalformedPacket,
            };
            let properties: Vec<Property> = ReasonString::new(sentence).map(Property::from).into_iter().collect();
            let connack = v5_0::Connack::builder().session_present(false).reason_code(code).props(properties).build();
            if let Err(error) = connack.and_then(|packet| self.send(packet.into())) {
                tracing::debug!(?error, "there is nothing to answer to");
            }
        }
        self.disconnect(code, sentence);
    }

    /// A packet of ours that the engine would not send: the connection cannot go on as if it had been sent.
    fn must(&mut self, sent: Result<(), MqttError>) {
        if let Err(error) = sent {
            if !self.closing {
                tracing::debug!(?error, "answer not sent, connection ends");
            }
            self.closing = true;
        }
    }
}

fn whole<T: Into<Packet>>(parsed: Result<(T, usize), MqttError>, body: &[u8]) -> Option<Packet> {
    parsed.ok().filter(|(_, bytes)| *bytes == body.len()).map(|(packet, _)| packet.into())
}

/// Reads a whole CONNECT; `None` if it is something else, or not as it should be.
fn read_connect(packet: &[u8]) -> Option<Packet> {
    let body = plain::body(packet);
    match (packet.first()? >> 4, body.get(CONNECT_LEVEL_AT)?) {
        (CONNECT, 4) => whole(v3_1_1::Connect::parse(body), body),
        (CONNECT, 5) => whole(v5_0::Connect::parse(body), body),
        _ => None,
    }
}

/// Reads one whole packet that is no part of an exchange; `None` if it is another, or not as it should be.
fn read_alone(packet: &[u8], is_v5: bool) -> Option<Packet> {
    let body = plain::body(packet);
    match (packet.first()? >> 4, is_v5) {
        (SUBSCRIBE, false) => whole(v3_1_1::Subscribe::parse(body), body),
        (SUBSCRIBE, true) => whole(v5_0::Subscribe::parse(body), body),
        (UNSUBSCRIBE, false) => whole(v3_1_1::Unsubscribe::parse(body), body),
        (UNSUBSCRIBE, true) => whole(v5_0::Unsubscribe::parse(body), body),
        (PINGREQ, false) => whole(v3_1_1::Pingreq::parse(body), body),
        (PINGREQ, true) => whole(v5_0::Pingreq::parse(body), body),
        (DISCONNECT, false) => whole(v3_1_1::Disconnect::parse(body), body),
        (DISCONNECT, true) => whole(v5_0::Disconnect::parse(body), body),
        (AUTH, true) => whole(v5_0::Auth::parse(body), body),
        _ => None,
    }
}

/// `true` if it was there.
fn take(packet_ids: &mut Vec<u16>, packet_id: u16) -> bool {
    let found = packet_ids.iter().position(|one| *one == packet_id);
    if let Some(at) = found {
        packet_ids.swap_remove(at);
    }
    found.is_some()
}

/// Topic names and filters that are none in any version. One that is only not taken here is refused, and the connection stays.
fn has_malformed_topic(packet: &Incoming) -> bool {
    let malformed = |topic: &str| topic.is_empty() || topic.contains('\0');
    match packet {
        Incoming::Connect(connect) => connect.will.as_ref().is_some_and(|will| malformed(&will.topic)),
        Incoming::Publish(publish) => malformed(&publish.topic),
        Incoming::Subscribe { filters, .. } => filters.iter().any(|filter| malformed(&filter.filter)),
        Incoming::Unsubscribe { filters, .. } => filters.iter().any(|filter| malformed(filter)),
        _ => false,
    }
}

fn has_packet_id_0(packet: &Incoming) -> bool {
    match packet {
        Incoming::Publish(publish) => publish.packet_id == Some(0),
        Incoming::Overfull(Overfull::Publish { packet_id, .. }) => *packet_id == Some(0),
        Incoming::Subscribe { packet_id, .. }
        | Incoming::Unsubscribe { packet_id, .. }
        | Incoming::Overfull(Overfull::Subscribe { packet_id, .. }) => *packet_id == 0,
        _ => false,
    }
}

/// How many a packet has; of MQTT 3.1.1 none.
fn user_properties(packet: &Packet) -> usize {
    let (properties, will): (&[Property], &[Property]) = match packet {
        Packet::V5_0Connect(p) => (p.props(), p.will_props()),
        Packet::V5_0Publish(p) => (p.props(), &[]),
        Packet::V5_0Subscribe(p) => (p.props(), &[]),
        Packet::V5_0Unsubscribe(p) => (p.props(), &[]),
        Packet::V5_0Puback(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        Packet::V5_0Pubrec(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        Packet::V5_0Pubrel(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        Packet::V5_0Pubcomp(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        Packet::V5_0Disconnect(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        Packet::V5_0Auth(p) => (p.props().as_deref().unwrap_or_default(), &[]),
        _ => return 0,
    };
    let is_user_property = |property: &&Property| matches!(property, Property::UserProperty(_));
    properties.iter().chain(will).filter(is_user_property).count()
}

fn push(properties: &mut Vec<Property>, property: Result<Property, MqttError>) {
    // A string that MQTT cannot carry (NUL, too long) is left out rather than failing the packet.
    properties.extend(property);
}

fn message_properties(properties: &[Property]) -> MessageProperties {
    let mut message = MessageProperties::default();
    for property in properties {
        match property {
            Property::PayloadFormatIndicator(value) => {
                message.payload_format_utf8 = Some(value.val() == 1);
            }
            Property::MessageExpiryInterval(value) => message.message_expiry_interval_s = Some(value.val()),
            Property::ContentType(value) => message.content_type = Some(value.val().to_owned()),
            Property::ResponseTopic(value) => message.response_topic = Some(value.val().to_owned()),
            Property::CorrelationData(value) => {
                message.correlation_data = Some(Bytes::copy_from_slice(value.val()));
            }
            Property::UserProperty(value) => {
                message.user_properties.push((value.key().to_owned(), value.val().to_owned()));
            }
            _ => {}
        }
    }
    message
}

fn subscription_identifiers(properties: &[Property]) -> usize {
    properties.iter().filter(|property| matches!(property, Property::SubscriptionIdentifier(_))).count()
}

fn will_delay_s(properties: &[Property]) -> u32 {
    let delay_s = properties.iter().find_map(|property| match property {
        Property::WillDelayInterval(delay) => Some(delay.val()),
        _ => None,
    });
    delay_s.unwrap_or(0)
}

fn push_message_properties(properties: &mut Vec<Property>, message: &MessageProperties, expiry_s: Option<u32>) {
    use mqtt_protocol_core::mqtt::packet::{
        ContentType, CorrelationData, MessageExpiryInterval, PayloadFormat, PayloadFormatIndicator, ResponseTopic,
    };
    if message.payload_format_utf8 == Some(true) {
        push(properties, PayloadFormatIndicator::new(PayloadFormat::String).map(Property::from));
    }
    if let Some(expiry) = expiry_s {
        push(properties, MessageExpiryInterval::new(expiry).map(Property::from));
    }
    if let Some(content_type) = &message.content_type {
        push(properties, ContentType::new(content_type.as_str()).map(Property::from));
    }
    if let Some(topic) = &message.response_topic {
        push(properties, ResponseTopic::new(topic.as_str()).map(Property::from));
    }
    if let Some(correlation) = &message.correlation_data {
        push(properties, CorrelationData::new(correlation.to_vec()).map(Property::from));
    }
    for (key, value) in &message.user_properties {
        push(properties, UserProperty::new(key.as_str(), value.as_str()).map(Property::from));
    }
}

fn qos_number(qos: Qos) -> u8 {
    match qos {
        Qos::AtMostOnce => 0,
        Qos::AtLeastOnce => 1,
        Qos::ExactlyOnce => 2,
    }
}

fn puback_code(code: RefusalCode) -> PubackReasonCode {
    match code {
        RefusalCode::ImplementationSpecific => PubackReasonCode::ImplementationSpecificError,
        RefusalCode::NotAuthorized => PubackReasonCode::NotAuthorized,
        RefusalCode::TopicNameInvalid => PubackReasonCode::TopicNameInvalid,
        RefusalCode::QuotaExceeded | RefusalCode::TooFast => PubackReasonCode::QuotaExceeded,
        RefusalCode::PayloadFormatInvalid => PubackReasonCode::PayloadFormatInvalid,
        RefusalCode::Unspecified | RefusalCode::TopicFilterInvalid | RefusalCode::SharedSubscriptionsNotSupported => {
            PubackReasonCode::UnspecifiedError
        }
    }
}

fn pubrec_code(code: RefusalCode) -> PubrecReasonCode {
    match code {
        RefusalCode::ImplementationSpecific => PubrecReasonCode::ImplementationSpecificError,
        RefusalCode::NotAuthorized => PubrecReasonCode::NotAuthorized,
        RefusalCode::TopicNameInvalid => PubrecReasonCode::TopicNameInvalid,
        RefusalCode::QuotaExceeded | RefusalCode::TooFast => PubrecReasonCode::QuotaExceeded,
        RefusalCode::PayloadFormatInvalid => PubrecReasonCode::PayloadFormatInvalid,
        RefusalCode::Unspecified | RefusalCode::TopicFilterInvalid | RefusalCode::SharedSubscriptionsNotSupported => {
            PubrecReasonCode::UnspecifiedError
        }
    }
}

fn suback_code(code: RefusalCode) -> SubackReasonCode {
    match code {
        RefusalCode::ImplementationSpecific => SubackReasonCode::ImplementationSpecificError,
        RefusalCode::NotAuthorized => SubackReasonCode::NotAuthorized,
        RefusalCode::TopicFilterInvalid | RefusalCode::TopicNameInvalid => SubackReasonCode::TopicFilterInvalid,
        RefusalCode::QuotaExceeded | RefusalCode::TooFast => SubackReasonCode::QuotaExceeded,
        RefusalCode::SharedSubscriptionsNotSupported => SubackReasonCode::SharedSubscriptionsNotSupported,
        RefusalCode::Unspecified | RefusalCode::PayloadFormatInvalid => SubackReasonCode::UnspecifiedError,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accepted() -> Accepted<'static> {
        Accepted {
            session_present: false,
            assigned_client_id: None,
            session_expiry_s: None,
            keep_alive_s: None,
            authentication_method: None,
            response_information: None,
            publishes_per_s: None,
        }
    }

    /// Properties of the CONNECT: `None` for MQTT 3.1.1.
    fn connected(properties: Option<&[u8]>, receive_maximum: u16) -> Engine {
        let mut engine = connecting(properties, receive_maximum);
        engine.accept(&accepted());
        engine.out.clear();
        engine
    }

    /// The CONNECT is not answered yet.
    fn connecting(properties: Option<&[u8]>, receive_maximum: u16) -> Engine {
        let limits = Limits { receive_maximum, ..Limits::default() };
        let mut engine = Engine::new(&limits);
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', if properties.is_some() { 5 } else { 4 }, 2, 0, 60];
        if let Some(properties) = properties {
            body.push(u8::try_from(properties.len()).expect("few"));
            body.extend_from_slice(properties);
        }
        body.extend_from_slice(&[0, 1, b'c']);
        let mut packet = vec![0x10, u8::try_from(body.len()).expect("short")];
        packet.append(&mut body);
        let packets = fed(&mut engine, &packet);
        assert!(matches!(packets[..], [Incoming::Connect(_)]), "{packets:?}");
        engine
    }

    fn fed(engine: &mut Engine, bytes: &[u8]) -> Vec<Incoming> {
        let mut packets = VecDeque::new();
        let taken = engine.feed(bytes, &mut packets);
        assert!(taken == bytes.len() || engine.fault.is_some());
        packets.into()
    }

    fn message(qos: u8) -> Outgoing<'static> {
        Outgoing {
            topic: "chat/bob/inbox",
            payload: b"hello",
            qos,
            retain: false,
            user_properties: UserProperties::None,
            properties: None,
            expiry_s: None,
            identifiers: &[],
            again: None,
        }
    }

    fn sent(engine: &mut Engine, qos: u8) -> u16 {
        engine.publish(message(qos)).expect("it is sent").expect("it has a packet identifier")
    }

    /// PUBLISH, with the user property a=b or without.
    fn publish(packet_id: u16, qos: u8, with_property: bool) -> Vec<u8> {
        let [high, low] = packet_id.to_be_bytes();
        let properties: &[u8] = if with_property { &[7, 0x26, 0, 1, b'a', 0, 1, b'b'] } else { &[0] };
        let mut body = vec![0, 1, b't', high, low];
        body.extend_from_slice(properties);
        body.push(b'x');
        let mut packet = vec![0x30 | qos << 1, u8::try_from(body.len()).expect("short")];
        packet.append(&mut body);
        packet
    }

    const STORED: Ack<'static> = Ack::Stored { subscribers: true, properties: &[] };

    #[test]
    fn a_puback_may_come_byte_by_byte() {
        for properties in [None, Some(&[][..])] {
            let mut engine = connected(properties, 10);
            let (first, second) = (sent(&mut engine, 1), sent(&mut engine, 1));
            for packet_id in [second, first] {
                let [high, low] = packet_id.to_be_bytes();
                for byte in [0x40, 2, high] {
                    assert!(fed(&mut engine, &[byte]).is_empty());
                }
                // What follows it is another packet.
                let packets = fed(&mut engine, &[low, 0xc0, 0]);
                assert!(
                    matches!(packets[..], [Incoming::Puback(id), Incoming::Pingreq] if id == packet_id),
                    "{packets:?}"
                );
            }
            assert!(engine.awaiting_puback.is_empty() && engine.gathered.is_empty() && engine.fault.is_none());
        }
    }

    #[test]
    fn a_puback_may_have_a_reason_and_properties() {
        let mut engine = connected(Some(&[]), 10);
        let property = [0x26, 0, 1, b'a', 0, 1, b'b'];
        let bodies: [&[u8]; 3] = [&[0x10], &[0, 0], &[0, 7, 0x26, 0, 1, b'a', 0, 1, b'b']];
        for body in bodies {
            let [high, low] = sent(&mut engine, 1).to_be_bytes();
            let mut packet = vec![0x40, u8::try_from(2 + body.len()).expect("short"), high, low];
            packet.extend_from_slice(body);
            let packets = fed(&mut engine, &packet);
            assert!(matches!(packets[..], [Incoming::Puback(_)]), "{packets:?}");
        }
        let many = property.repeat(Limits::default().user_properties + 1);
        let [high, low] = sent(&mut engine, 1).to_be_bytes();
        let mut packet = vec![0x40];
        let length = u16::try_from(many.len()).expect("short");
        let number = |number: u16| [(number % 128 + 128).to_le_bytes()[0], (number / 128).to_le_bytes()[0]];
        packet.extend_from_slice(&number(5 + length));
        packet.extend_from_slice(&[high, low, 0]);
        packet.extend_from_slice(&number(length));
        packet.extend_from_slice(&many);
        let packets = fed(&mut engine, &packet);
        assert!(matches!(packets[..], [Incoming::Overfull(Overfull::Other)]), "{packets:?}");
        for (body, fault) in [
            (&[0, 99][..], MqttError::ProtocolError),
            (&[0, 0], MqttError::MalformedPacket),
            (&[0], MqttError::MalformedPacket),
            (&[0, 1, 0x77], MqttError::MalformedPacket),
            (&[0, 1, 0, 0, 9], MqttError::MalformedPacket),
        ] {
            let mut engine = connected(Some(&[]), 10);
            sent(&mut engine, 1);
            let mut packet = vec![0x40, u8::try_from(body.len()).expect("short")];
            packet.extend_from_slice(body);
            assert!(fed(&mut engine, &packet).is_empty());
            assert_eq!(engine.fault, Some(fault), "{body:?}");
        }
    }

    #[test]
    fn a_long_puback_is_not_gathered_for_ever() {
        let mut engine = connected(None, 10);
        // 256 MiB are announced.
        assert!(fed(&mut engine, &[0x40, 0xff, 0xff, 0xff, 0x7f]).is_empty());
        let bytes = vec![0; 64 * 1024];
        let most = usize::try_from(Limits::default().packet_bytes).expect("it fits");
        while engine.fault.is_none() {
            assert!(engine.gathered.len() <= most);
            fed(&mut engine, &bytes);
        }
        assert_eq!(
            (engine.fault, engine.overstepped),
            (Some(MqttError::PacketTooLarge), Some(Overstepped::PacketBytes))
        );
    }

    #[test]
    fn the_receive_maximum_is_one_for_all_that_is_published() {
        for (qos, with_property) in [(1, false), (1, true), (2, false)] {
            let mut engine = connected(Some(&[]), 3);
            for (packet_id, qos, with_property) in [(1, 1, false), (2, 1, true), (3, 2, false)] {
                assert_eq!(fed(&mut engine, &publish(packet_id, qos, with_property)).len(), 1);
            }
            assert_eq!(engine.fault, None);
            fed(&mut engine, &publish(4, qos, with_property));
            assert_eq!(engine.fault, Some(MqttError::ReceiveMaximumExceeded));
            assert_eq!(engine.overstepped, Some(Overstepped::ReceiveMaximum));
        }
        // What is answered makes room.
        let mut engine = connected(Some(&[]), 2);
        for packet_id in 1..100 {
            let qos = if packet_id % 3 == 0 { 2 } else { 1 };
            assert_eq!(fed(&mut engine, &publish(packet_id, qos, packet_id % 2 == 0)).len(), 1);
            engine.acknowledge(packet_id, qos, &STORED);
            if qos == 2 {
                let [high, low] = packet_id.to_be_bytes();
                assert!(matches!(fed(&mut engine, &[0x62, 2, high, low])[..], [Incoming::Pubrel(_, true)]));
                engine.pubcomp(packet_id, true);
            }
            assert_eq!(engine.fault, None);
        }
        // MQTT 3.1.1 has none.
        let mut engine = connected(None, 2);
        for packet_id in 1..10 {
            assert_eq!(fed(&mut engine, &publish(packet_id, 1, false)).len(), 1);
        }
        assert_eq!(engine.fault, None);
    }

    #[test]
    fn an_answer_is_the_same_whoever_read_the_publish() {
        for properties in [None, Some(&[][..])] {
            let answer = |in_pieces: bool| {
                let mut engine = connected(properties, 10);
                let packet = publish(7, 1, false);
                let (begin, end) = packet.split_at(if in_pieces { 4 } else { 0 });
                assert!(fed(&mut engine, begin).is_empty());
                let packets = fed(&mut engine, end);
                assert!(matches!(&packets[..], [Incoming::Publish(publish)] if publish.packet_id == Some(7)));
                engine.acknowledge(7, 1, &STORED);
                engine.out
            };
            assert_eq!(answer(true), [0x40, 2, 0, 7]);
            assert_eq!(answer(false), [0x40, 2, 0, 7]);
        }
    }

    #[test]
    fn no_packet_identifier_is_given_away_twice() {
        let mut engine = connected(Some(&[]), 10);
        assert!(!engine.reserve(0));
        assert!(engine.reserve(1) && engine.reserve(3) && !engine.reserve(3));
        assert_eq!((sent(&mut engine, 1), sent(&mut engine, 2), sent(&mut engine, 1)), (2, 4, 5));
        assert!(!engine.reserve(2) && !engine.reserve(4));
        // What was reserved goes out again under its own.
        let again = |packet_id, qos| Outgoing { again: Some(packet_id), ..message(qos) };
        assert_eq!(engine.publish(again(1, 1)), Ok(Some(1)));
        assert_eq!(engine.publish(again(3, 2)), Ok(Some(3)));
        assert!(!engine.reserve(1) && !engine.reserve(3));
        engine.last_packet_id = u16::MAX;
        assert_eq!(sent(&mut engine, 1), 6);
        for packet_id in [1_u16, 2, 5, 6] {
            let [high, low] = packet_id.to_be_bytes();
            assert_eq!(fed(&mut engine, &[0x40, 2, high, low]).len(), 1);
        }
        for packet_id in [3_u16, 4] {
            let [high, low] = packet_id.to_be_bytes();
            fed(&mut engine, &[0x50, 2, high, low]);
            engine.pubrel(packet_id);
            fed(&mut engine, &[0x70, 2, high, low]);
        }
        assert_eq!(engine.fault, None);
        assert!((1..=6).all(|packet_id| !engine.is_used(packet_id)));
    }

    #[test]
    fn what_is_too_large_for_the_client_is_not_under_way() {
        // Maximum Packet Size 30.
        let mut engine = connected(Some(&[0x27, 0, 0, 0, 30]), 10);
        let large = Outgoing { payload: &[b'x'; 100], ..message(1) };
        assert_eq!(engine.publish(large), Err(NotSent::TooLarge));
        let large = Outgoing { payload: &[b'x'; 100], ..message(2) };
        assert_eq!(engine.publish(large), Err(NotSent::TooLarge));
        assert!(engine.out.is_empty() && !engine.closing);
        assert!((1..=2).all(|packet_id| !engine.is_used(packet_id)));
        sent(&mut engine, 1);
        assert_eq!(engine.out.len(), 26);
    }

    /// What happens to a connection, at its client's or ours.
    #[derive(Clone, Debug)]
    enum Step {
        Subscribe(Vec<u8>),
        Unsubscribe,
        Pingreq,
        Authenticate,
        /// As it is, or with the user property a=b.
        Publish(u8, bool),
        /// With a topic alias, and with the topic or without.
        Aliased(bool),
        Acknowledge,
        Pubrel,
        Send(u8),
        /// PUBACK, PUBREC or PUBCOMP, for this packet identifier.
        Answer(u8, u16),
        Disconnect,
        /// DISCONNECT with this reason.
        Leave(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let filters = prop_oneof![
            9 => Just(vec![0, 1, b't', 1]),
            1 => prop::collection::vec(any::<u8>(), 0..9),
        ];
        prop_oneof![
            4 => filters.prop_map(Step::Subscribe),
            2 => Just(Step::Unsubscribe),
            3 => Just(Step::Pingreq),
            1 => Just(Step::Authenticate),
            3 => (0_u8..3, any::<bool>()).prop_map(|(qos, with_property)| Step::Publish(qos, with_property)),
            1 => any::<bool>().prop_map(Step::Aliased),
            3 => Just(Step::Acknowledge),
            1 => Just(Step::Pubrel),
            3 => (0_u8..3).prop_map(Step::Send),
            3 => (prop_oneof![Just(0x40), Just(0x50), Just(0x70)], 1_u16..9).prop_map(|(kind, id)| Step::Answer(kind, id)),
            1 => Just(Step::Disconnect),
            1 => (0_u8..5).prop_map(Step::Leave),
        ]
    }

    fn packet(first: u8, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        [&[first, u8::try_from(body.len()).expect("short")], &body[..]].concat()
    }

    /// Takes the step, with bytes in pieces or not; what came of it.
    fn take_step(engine: &mut Engine, step: &Step, number: u16, in_pieces: bool) -> Vec<Incoming> {
        let none: &[u8] = if engine.is_v5() { &[0] } else { &[] };
        let id = &number.to_be_bytes()[..];
        let bytes = match step {
            Step::Subscribe(filters) => packet(0x82, &[id, none, filters]),
            Step::Unsubscribe => packet(0xa2, &[id, none, &[0, 1, b't']]),
            Step::Pingreq => vec![0xc0, 0],
            Step::Authenticate => packet(0xf0, &[&[0x19, 4, 0x15, 0, 1, b'm']]),
            Step::Publish(qos, with_property) => {
                let property = [7, 0x26, 0, 1, b'a', 0, 1, b'b'];
                let properties = if engine.is_v5() && *with_property { &property } else { none };
                let id = if *qos == 0 { &[] } else { id };
                packet(0x30 | qos << 1, &[&[0, 1, b't'], id, properties, b"x"])
            }
            Step::Aliased(with_topic) => {
                let topic: &[u8] = if *with_topic { &[0, 1, b't'] } else { &[0, 0] };
                packet(0x30, &[topic, &[3, 0x23, 0, 5], b"x"])
            }
            Step::Pubrel => packet(0x62, &[id]),
            Step::Answer(kind, id) => packet(*kind, &[&id.to_be_bytes()]),
            Step::Leave(reason) => match reason {
                0 => vec![0xe0, 0],
                reason => packet(0xe0, &[&[*reason]]),
            },
            Step::Acknowledge | Step::Send(_) | Step::Disconnect => Vec::new(),
        };
        match step {
            Step::Acknowledge => {
                let is_qos2 = engine.inner.as_ref().is_some_and(|inner| inner.unanswered_qos2.contains(&(number - 1)));
                engine.acknowledge(number - 1, if is_qos2 { 2 } else { 1 }, &STORED);
            }
            Step::Send(qos) => drop(engine.publish(message(*qos))),
            Step::Disconnect => engine.disconnect(DisconnectReasonCode::ServerBusy, "busy"),
            _ => {}
        }
        let mut packets = VecDeque::new();
        let (begin, end) = bytes.split_at(if in_pieces { bytes.len().min(1) } else { 0 });
        for bytes in [begin, end] {
            engine.feed(bytes, &mut packets);
        }
        for packet in &packets {
            match packet {
                Incoming::Subscribe { packet_id, filters, .. } => {
                    engine.suback(*packet_id, &vec![Granted::Qos(1); filters.len()], Some("a reason"));
                }
                Incoming::Unsubscribe { packet_id, .. } => engine.unsuback(*packet_id, &[true]),
                Incoming::Pingreq => engine.pingresp(),
                Incoming::Auth(authentication) => engine.authenticated_again(&authentication.method),
                Incoming::Pubrec(packet_id, true) => engine.pubrel(*packet_id),
                Incoming::Pubrel(packet_id, found) => engine.pubcomp(*packet_id, *found),
                _ => {}
            }
        }
        if engine.fault.is_some() && !engine.closing {
            engine.disconnect_for_fault();
        }
        packets.into()
    }

    proptest! {
        /// One that is never without the protocol engine, and reads everything by it, says the same.
        #[test]
        fn an_engine_may_rest_at_any_time(steps in prop::collection::vec(step(), 1..30), of in 0_usize..4) {
            // Of MQTT 5: a session that is kept, a receive maximum of 2, a maximum packet size of 30.
            let properties: Option<&[u8]> = [
                None,
                Some(&[][..]),
                Some(&[0x11, 0, 0, 0, 9, 0x21, 0, 2]),
                Some(&[0x27, 0, 0, 0, 30]),
            ][of];
            let (mut resting, mut other) = (connected(properties, 5), connected(properties, 5));
            for (number, step) in (2..).zip(&steps) {
                resting.rest();
                let packets = take_step(&mut resting, step, number, false);
                let expected = take_step(&mut other, step, number, true);
                prop_assert_eq!(format!("{packets:?}"), format!("{expected:?}"), "{:?}", step);
                prop_assert_eq!(&resting.out, &other.out, "{:?}", step);
                prop_assert_eq!((resting.fault, resting.closing), (other.fault, other.closing), "{:?}", step);
                if other.closing {
                    break;
                }
            }
        }
    }

    #[test]
    fn the_protocol_engine_is_there_for_those_who_need_it() {
        for properties in [None, Some(&[][..])] {
            let none: &[u8] = if properties.is_some() { &[0] } else { &[] };
            let is_there = |packets: &[&[u8]]| {
                let mut engine = connected(properties, 10);
                for packet in packets {
                    engine.rest();
                    fed(&mut engine, packet);
                }
                let was_there = engine.inner.is_some();
                engine.rest();
                (was_there, engine.inner.is_some())
            };
            let subscribe = packet(0x82, &[&[0, 1], none, &[0, 1, b't', 1]]);
            assert_eq!(is_there(&[&subscribe, &[0xc0, 0], &packet(0x30, &[&[0, 1, b't'], none])]), (false, false));
            assert_eq!(is_there(&[&[0x82]]), (true, true), "half a packet");
            assert_eq!(is_there(&[&subscribe[..1], &subscribe[1..]]), (true, false));
            assert_eq!(is_there(&[&packet(0x34, &[&[0, 1, b't', 0, 7], none])]), (true, true), "QoS 2");
        }
    }

    #[test]
    fn what_was_taken_before_the_connection_is_not_taken_again() {
        for properties in [None, Some(&[][..])] {
            let mut engine = connecting(properties, 10);
            engine.restore_qos2_received(HashSet::from([7]));
            engine.accept(&accepted());
            assert!(!engine.closing && engine.out.starts_with(&[0x20]));
            engine.out.clear();
            engine.rest();
            let publish = |id| packet(0x3c, &[&[0, 1, b't', 0, id], if properties.is_some() { &[0] } else { &[] }]);
            assert!(matches!(fed(&mut engine, &publish(7))[..], [Incoming::Repeated { .. }]));
            assert_eq!(engine.out, [0x50, 2, 0, 7]);
            assert!(matches!(fed(&mut engine, &[0x62, 2, 0, 7])[..], [Incoming::Pubrel(7, true)]));
            engine.pubcomp(7, true);
            assert!(matches!(fed(&mut engine, &publish(7))[..], [Incoming::Publish(_)]));
            assert_eq!((engine.fault, engine.closing), (None, false));
        }
    }

    /// The protocol engine would panic at it.
    #[test]
    fn a_topic_alias_maximum_of_0_is_none() {
        for maximum in [0, 1] {
            let mut engine = connected(Some(&[0x22, 0, maximum]), 10);
            let mut lengths = Vec::new();
            for _ in 0..2 {
                engine.out.clear();
                engine.publish(message(0)).expect("it is sent");
                lengths.push(engine.out.len());
            }
            let has_alias = lengths[1] < lengths[0];
            assert_eq!(has_alias, maximum > 0, "{lengths:?}");
            sent(&mut engine, 2);
            assert!(engine.inner.is_some() && !engine.closing);
        }
    }

    #[test]
    fn what_is_wrong_with_a_connect_is_answered() {
        let connect = |level: u8, properties: &[u8], end: &[u8]| {
            let mut engine = Engine::new(&Limits::default());
            let body = [&[0, 4, b'M', b'Q', b'T', b'T', level, 2, 0, 60], properties, &[0, 1, b'c'], end].concat();
            let packets = fed(&mut engine, &packet(0x10, &[&body]));
            engine.disconnect_for_fault();
            (packets.len(), engine.out.first().copied(), engine.closing)
        };
        assert_eq!(connect(4, &[], &[]), (1, None, true));
        assert_eq!(connect(5, &[0], &[]), (1, Some(0x20), true));
        // More than belongs to it, authentication data without a method, and a property that is none.
        assert_eq!(connect(4, &[], &[0]), (0, None, true));
        assert_eq!(connect(5, &[0], &[0]), (0, Some(0x20), true));
        assert_eq!(connect(5, &[4, 0x16, 0, 1, b'x'], &[]), (0, Some(0x20), true));
        assert_eq!(connect(5, &[1, 0xff], &[]), (0, Some(0x20), true));
    }
}
