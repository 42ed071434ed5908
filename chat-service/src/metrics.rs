//! What chatd counts, and how Prometheus reads it.
//!
//! Counters and gauges are atomics; a histogram takes a short lock, so on hot paths observe once per batch where that says the same.
//! Labels take values from the code only, never from a client: the number of series is bounded.

use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// The type of what [`Metrics::encode`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything that is counted. One for the process, shared in an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    /// `chatd_connections`: MQTT connections, now.
    pub connections: Gauge,
    /// `chatd_connects_total`: accepted CONNECTs.
    pub connects: Counter,
    /// `chatd_mqtt_messages_received_total`: PUBLISH packets from clients, of every kind, refused ones too.
    pub mqtt_messages_received: Counter,
    /// `chatd_mqtt_messages_sent_total`: PUBLISH packets to clients, of every kind.
    pub mqtt_messages_sent: Counter,
    /// `chatd_messages_accepted_total`: chat messages stored.
    pub messages_accepted: Counter,
    /// `chatd_messages_delivered_total`: chat messages that devices have acknowledged (QoS 0: that were written), each device counting.
    pub messages_delivered: Counter,
    /// `chatd_messages_duplicate_total`: resends answered with the first seq.
    pub messages_duplicate: Counter,
    /// `chatd_messages_removed_total`: chat messages removed because of their age.
    pub messages_removed: Counter,
    /// `chatd_commit_seconds`: writing a batch to the log, fsync included.
    pub commit_seconds: Histogram,
    /// `chatd_commit_messages`: messages in a batch.
    pub commit_messages: Histogram,
    /// `chatd_publish_to_puback_seconds`: from reading a PUBLISH to sending its PUBACK or PUBREC.
    pub publish_to_puback_seconds: Histogram,
    /// `chatd_publish_to_delivery_seconds`: from reading a PUBLISH to sending the message to a device that was there.
    pub publish_to_delivery_seconds: Histogram,
    /// `chatd_jwt_key_fetches_total`: attempts to fetch keys from `auth.jwt_key_url`.
    pub jwt_key_fetches: Counter,
    /// `chatd_jwt_key_fetch_failures_total`: those that failed.
    pub jwt_key_fetch_failures: Counter,
    refused: Family<Reason, Counter>,
    limited: Family<Limit, Counter>,
    edge_entries: Family<Map, Gauge>,
    bus_gaps: Family<Bus, Counter>,
    bus_restarts: Family<Bus, Counter>,
    webhook_posts: Family<Event, Counter>,
    webhook_failures: Family<Event, Counter>,
    webhook_lag: Family<Event, Gauge>,
    registry: Registry,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Limit {
    limit: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Event {
    event: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Map {
    map: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Bus {
    bus: Name,
}

/// A label's value, from the code.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name(&'static str);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

impl Metrics {
    /// Nothing counted yet. The process's start is now.
    pub fn new() -> Self {
        let metrics = Self {
            connections: Gauge::default(),
            connects: Counter::default(),
            mqtt_messages_received: Counter::default(),
            mqtt_messages_sent: Counter::default(),
            messages_accepted: Counter::default(),
            messages_delivered: Counter::default(),
            messages_duplicate: Counter::default(),
            messages_removed: Counter::default(),
            commit_seconds: Histogram::new(latency_buckets()),
            commit_messages: Histogram::new(exponential_buckets(1.0, 2.0, 16)),
            publish_to_puback_seconds: Histogram::new(latency_buckets()),
            publish_to_delivery_seconds: Histogram::new(latency_buckets()),
            jwt_key_fetches: Counter::default(),
            jwt_key_fetch_failures: Counter::default(),
            refused: Family::default(),
            limited: Family::default(),
            edge_entries: Family::default(),
            bus_gaps: Family::default(),
            bus_restarts: Family::default(),
            webhook_posts: Family::default(),
            webhook_failures: Family::default(),
            webhook_lag: Family::default(),
            registry: Registry::with_prefix("chatd"),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let started = Gauge::<f64, AtomicU64>::default();
        started.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);

        let r = &mut self.registry;
        r.register("build", "The version that runs", build);
        r.register_with_unit("start_time", "When the process began, since the Unix epoch", Unit::Seconds, started);
        r.register("connections", "MQTT connections, now", self.connections.clone());
        r.register("connects", "Accepted CONNECTs", self.connects.clone());
        r.register("mqtt_messages_received", "PUBLISH packets from clients", self.mqtt_messages_received.clone());
        r.register("mqtt_messages_sent", "PUBLISH packets to clients", self.mqtt_messages_sent.clone());
        r.register("messages_accepted", "Chat messages stored", self.messages_accepted.clone());
        r.register("messages_delivered", "Chat messages acknowledged by devices", self.messages_delivered.clone());
        r.register("messages_duplicate", "Resends answered with the first seq", self.messages_duplicate.clone());
        r.register("messages_removed", "Chat messages removed because of their age", self.messages_removed.clone());
        r.register("refused", "Refused connects, publishes and subscriptions", self.refused.clone());
        r.register("limited", "Times that a limit bit, by its name in the settings", self.limited.clone());
        r.register_with_unit("commit", "Writing a batch to the log", Unit::Seconds, self.commit_seconds.clone());
        r.register("commit_messages", "Messages in a batch", self.commit_messages.clone());
        r.register_with_unit(
            "publish_to_puback",
            "From reading a PUBLISH to sending its PUBACK or PUBREC",
            Unit::Seconds,
            self.publish_to_puback_seconds.clone(),
        );
        r.register_with_unit(
            "publish_to_delivery",
            "From reading a PUBLISH to sending the message to a device that was there",
            Unit::Seconds,
            self.publish_to_delivery_seconds.clone(),
        );
        r.register("jwt_key_fetches", "Attempts to fetch keys that sign tokens", self.jwt_key_fetches.clone());
        r.register(
            "jwt_key_fetch_failures",
            "Attempts to fetch keys that sign tokens that failed",
            self.jwt_key_fetch_failures.clone(),
        );
        r.register("edge_entries", "Entries of the edge's maps, now", self.edge_entries.clone());
        r.register("bus_gaps", "Times that live messages were lost on a bus and read again", self.bus_gaps.clone());
        r.register("bus_restarts", "Times that a bus had ended and was replaced", self.bus_restarts.clone());
        r.register("webhook_posts", "Webhook events that the receiver took", self.webhook_posts.clone());
        r.register("webhook_failures", "Attempts to post a webhook that failed", self.webhook_failures.clone());
        r.register("webhook_lag_messages", "Stored messages not posted as webhooks yet", self.webhook_lag.clone());
        self
    }

    /// `chatd_webhook_posts_total{event}`: the receiver took one.
    pub fn webhook_posted(&self, event: &'static str) {
        self.webhook_posts.get_or_create(&Event { event: Name(event) }).inc();
    }

    /// `chatd_webhook_failures_total{event}`: an attempt failed.
    pub fn webhook_failed(&self, event: &'static str) {
        self.webhook_failures.get_or_create(&Event { event: Name(event) }).inc();
    }

    /// `chatd_webhook_lag_messages{event}`: so many entries of the log are not done.
    pub fn webhook_lag(&self, event: &'static str, messages: u64) {
        let messages = i64::try_from(messages).unwrap_or(i64::MAX);
        self.webhook_lag.get_or_create(&Event { event: Name(event) }).set(messages);
    }

    /// `chatd_refused_total{reason}`: a connect, publish or subscription was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason: Name(reason) }).inc();
    }

    /// `chatd_limited_total{limit}`: this setting below `[limits]` did what it is there for.
    pub fn limited(&self, limit: &'static str) {
        self.limited.get_or_create(&Limit { limit: Name(limit) }).inc();
    }

    /// `chatd_edge_entries{map}`: so many entries are in one of the edge's maps.
    pub fn edge_entries(&self, map: &'static str, entries: usize) {
        self.edge_entries.get_or_create(&Map { map: Name(map) }).set(i64::try_from(entries).unwrap_or(i64::MAX));
    }

    /// `chatd_bus_gaps_total{bus}`: live messages were lost there and have to be read from the log.
    pub fn bus_gap(&self, bus: &'static str) {
        self.bus_gaps.get_or_create(&Bus { bus: Name(bus) }).inc();
    }

    /// `chatd_bus_restarts_total{bus}`: it had ended and was replaced.
    pub fn bus_restart(&self, bus: &'static str) {
        self.bus_restarts.get_or_create(&Bus { bus: Name(bus) }).inc();
    }

    /// Everything, in OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// From 50 µs to 26 s, each twice the one before.
fn latency_buckets() -> impl Iterator<Item = f64> {
    exponential_buckets(0.000_05, 2.0, 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_promised_name_is_there() {
        let metrics = Metrics::new();
        metrics.connections.inc();
        metrics.connects.inc();
        metrics.mqtt_messages_received.inc_by(5);
        metrics.mqtt_messages_sent.inc_by(4);
        metrics.messages_accepted.inc_by(3);
        metrics.messages_delivered.inc();
        metrics.messages_duplicate.inc();
        metrics.messages_removed.inc();
        metrics.refused("bad_topic");
        metrics.limited("topic_bytes");
        metrics.commit_seconds.observe(0.001);
        metrics.commit_messages.observe(100.0);
        metrics.publish_to_puback_seconds.observe(0.002);
        metrics.publish_to_delivery_seconds.observe(0.002);
        metrics.jwt_key_fetches.inc_by(2);
        metrics.jwt_key_fetch_failures.inc();
        metrics.edge_entries("sessions", 5);
        metrics.bus_gap("chat");
        metrics.bus_restart("ordinary");
        metrics.webhook_posted("message.stored");
        metrics.webhook_failed("message.stored");
        metrics.webhook_lag("message.stored", 7);
        let text = metrics.encode();
        for line in [
            "chatd_connections 1",
            "chatd_connects_total 1",
            "chatd_mqtt_messages_received_total 5",
            "chatd_mqtt_messages_sent_total 4",
            "chatd_messages_accepted_total 3",
            "chatd_messages_delivered_total 1",
            "chatd_messages_duplicate_total 1",
            "chatd_messages_removed_total 1",
            "chatd_refused_total{reason=\"bad_topic\"} 1",
            "chatd_limited_total{limit=\"topic_bytes\"} 1",
            "chatd_commit_seconds_count 1",
            "chatd_commit_seconds_bucket{le=\"0.00005\"} 0",
            "chatd_commit_messages_bucket{le=\"128.0\"} 1",
            "chatd_publish_to_puback_seconds_sum 0.002",
            "chatd_publish_to_delivery_seconds_count 1",
            "chatd_jwt_key_fetches_total 2",
            "chatd_jwt_key_fetch_failures_total 1",
            "chatd_edge_entries{map=\"sessions\"} 5",
            "chatd_bus_gaps_total{bus=\"chat\"} 1",
            "chatd_bus_restarts_total{bus=\"ordinary\"} 1",
            concat!("chatd_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "chatd_webhook_posts_total{event=\"message.stored\"} 1",
            "chatd_webhook_failures_total{event=\"message.stored\"} 1",
            "chatd_webhook_lag_messages{event=\"message.stored\"} 7",
            "# UNIT chatd_start_time_seconds seconds",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }
}
