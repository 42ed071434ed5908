//! How much a client may take, in one place.

use std::time::Duration;

/// Limits of the edge. Every one has a stated answer when it is reached.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; further ones are closed on arrival.
    pub connections: usize,
    /// From accepting the connection to accepting its CONNECT; then the connection is closed.
    pub connect_timeout: Duration,
    /// Largest packet taken, in bytes (MQTT 5 is told; DISCONNECT 0x95 or close).
    pub packet_bytes: u32,
    /// QoS 1 and 2 publishes that a client may have unacknowledged (MQTT 5 is told; DISCONNECT 0x93 or close).
    pub receive_maximum: u16,
    /// QoS 1 and 2 messages in flight to a client that names no receive maximum, and the most for one that does.
    pub window: u16,
    /// Topic levels in names and filters.
    pub topic_levels: usize,
    /// Subscriptions of one session (SUBACK 0x97 or 0x80).
    pub subscriptions_per_session: usize,
    /// The longest session expiry granted, in seconds; `u32::MAX` for ever.
    pub session_expiry_max_s: u32,
    /// Ordinary messages that may wait for one client; further ones are dropped and counted.
    pub queue_messages: usize,
    /// Bytes of them.
    pub queue_bytes: usize,
    /// Bytes of ordinary messages that may wait for all clients together; further ones are dropped and counted.
    pub queues_bytes: usize,
    /// Retained messages in all (PUBACK 0x97).
    pub retained_messages: usize,
    /// Bytes of them.
    pub retained_bytes: usize,
    /// A client that asked for no keep alive is closed after so long without a packet; zero for never.
    pub idle_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 100_000,
            connect_timeout: Duration::from_secs(10),
            packet_bytes: 1024 * 1024,
            receive_maximum: 64,
            window: 32,
            topic_levels: 128,
            subscriptions_per_session: 1_000,
            session_expiry_max_s: u32::MAX,
            queue_messages: 1_000,
            queue_bytes: 4 * 1024 * 1024,
            queues_bytes: 256 * 1024 * 1024,
            retained_messages: 100_000,
            retained_bytes: 256 * 1024 * 1024,
            idle_timeout: Duration::ZERO,
        }
    }
}
