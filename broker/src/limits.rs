//! How much a client may take, in one place.
//!
//! Each is a setting below `[limits]`, and `docs/limits.md` says what a client is told that reaches it. When one bites, the edge observes
//! [`crate::service::Observation::Limited`] with the setting's name. Where nothing else is said, zero is no limit.

use std::time::Duration;

use crate::admission::Network;

/// So many filters of one packet are looked at, even if a session may have fewer: each is told what is wrong with it.
const FILTERS_LOOKED_AT: usize = 1_000;

/// Limits of the edge. Every one has a stated answer when it is reached.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; further ones are closed on arrival.
    pub connections: usize,
    /// Of those, from one address; of IPv6 from one /64. Further ones are closed on arrival.
    pub connections_per_address: usize,
    /// Networks whose addresses are not counted: proxies.
    pub uncounted_addresses: Vec<Network>,
    /// Of those, of one user (CONNACK 0x97, or 3). A session that is taken over is not one more.
    pub connections_per_user: usize,
    /// From accepting the connection to accepting its CONNECT; then the connection is closed.
    pub connect_timeout: Duration,
    /// Bytes that are read before a CONNECT was accepted, so its largest size too; then the connection is closed. At least one.
    pub connect_bytes: u32,
    /// Largest packet taken, in bytes (MQTT 5 is told; DISCONNECT 0x95 or close).
    pub packet_bytes: u32,
    /// QoS 1 and 2 publishes that a client may have unacknowledged (MQTT 5 is told; DISCONNECT 0x93 or close).
    pub receive_maximum: u16,
    /// QoS 1 and 2 messages in flight to a client that names no receive maximum, and the most for one that does.
    pub window: u16,
    /// User properties of one packet (PUBACK, SUBACK, CONNACK or DISCONNECT 0x97).
    pub user_properties: usize,
    /// Bytes of topic names and filters (0x90, or 0x8F).
    pub topic_bytes: usize,
    /// Topic levels in names and filters, at least one (0x90, or 0x8F).
    pub topic_levels: usize,
    /// Subscriptions of one session (SUBACK 0x97 or 0x80). A packet has as many filters at most, or 1,000 if that is more (UNSUBSCRIBE:
    /// DISCONNECT 0x97).
    pub subscriptions_per_session: usize,
    /// Distinct filters on ordinary topics of all a user's sessions together (SUBACK 0x97 or 0x80).
    pub filters_per_user: usize,
    /// Subscriptions to ordinary topics of all a user's sessions together (SUBACK 0x97 or 0x80).
    pub subscriptions_per_user: usize,
    /// The longest session expiry granted, in seconds; `u32::MAX` for ever.
    pub session_expiry_max_s: u32,
    /// Longest keep alive, in seconds: MQTT 5 is told it where it asked for more or for none.
    pub keep_alive_max_s: u16,
    /// Publishes a second of a connection (PUBACK 0x97; MQTT 3.1.1 waits). A second's worth may come at once.
    pub publishes_per_s: u32,
    /// Bytes of them: topics, payloads, properties.
    pub publish_bytes_per_s: u32,
    /// The same of all a user's connections together.
    pub user_publishes_per_s: u32,
    /// Bytes of them.
    pub user_publish_bytes_per_s: u32,
    /// Ordinary messages that may wait for one client; further ones are dropped and counted.
    pub queue_messages: usize,
    /// Bytes of them.
    pub queue_bytes: usize,
    /// Bytes of ordinary messages that may wait for all sessions of one user; further ones are dropped and counted.
    pub user_queues_bytes: usize,
    /// Bytes of ordinary messages that may wait for all clients together; further ones are dropped and counted.
    pub queues_bytes: usize,
    /// Retained messages in all (PUBACK 0x97).
    pub retained_messages: usize,
    /// Bytes of them.
    pub retained_bytes: usize,
    /// Of those, published by one user (PUBACK 0x97).
    pub user_retained_messages: usize,
    /// Bytes of them.
    pub user_retained_bytes: usize,
    /// A client that asked for no keep alive is closed after so long without a packet; zero for never.
    pub idle_timeout: Duration,
}

impl Limits {
    /// Filters that one SUBSCRIBE or UNSUBSCRIBE may have.
    pub(crate) fn filters_per_packet(&self) -> usize {
        self.subscriptions_per_session.max(FILTERS_LOOKED_AT)
    }

    /// How often a client may publish, which is what CONNACK tells it.
    pub(crate) fn publishes_told(&self) -> Option<u32> {
        [self.publishes_per_s, self.user_publishes_per_s].into_iter().filter(|rate| *rate > 0).min()
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 100_000,
            connections_per_address: 1_000,
            uncounted_addresses: Network::loopback(),
            connections_per_user: 100,
            connect_timeout: Duration::from_secs(10),
            connect_bytes: 64 * 1024,
            packet_bytes: 1024 * 1024,
            receive_maximum: 64,
            window: 32,
            user_properties: 64,
            topic_bytes: 1_024,
            topic_levels: 128,
            subscriptions_per_session: 1_000,
            filters_per_user: 5_000,
            subscriptions_per_user: 10_000,
            session_expiry_max_s: u32::MAX,
            keep_alive_max_s: 3_600,
            publishes_per_s: 5_000,
            publish_bytes_per_s: 8 * 1024 * 1024,
            user_publishes_per_s: 10_000,
            user_publish_bytes_per_s: 16 * 1024 * 1024,
            queue_messages: 1_000,
            queue_bytes: 4 * 1024 * 1024,
            user_queues_bytes: 32 * 1024 * 1024,
            queues_bytes: 256 * 1024 * 1024,
            retained_messages: 100_000,
            retained_bytes: 256 * 1024 * 1024,
            user_retained_messages: 25_000,
            user_retained_bytes: 64 * 1024 * 1024,
            idle_timeout: Duration::from_secs(86_400),
        }
    }
}
