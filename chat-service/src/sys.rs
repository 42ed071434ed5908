//! `$SYS/broker/…`: how the server is, as retained messages, under the names that mosquitto has for it.
//!
//! What is told is what the metrics count, every so often; what has not changed is not told again.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker::Broker;
use broker::service::Service;

use crate::metrics::Metrics;

/// How often it is told.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Topics below `$SYS/broker/`, and what they say.
fn values(metrics: &Metrics, uptime: Duration, retained_messages: usize) -> [(&'static str, String); 7] {
    [
        ("version", concat!("chatd ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("uptime", format!("{} seconds", uptime.as_secs())),
        ("clients/connected", metrics.connections.get().to_string()),
        ("messages/received", metrics.mqtt_messages_received.get().to_string()),
        ("messages/sent", metrics.mqtt_messages_sent.get().to_string()),
        ("messages/stored", metrics.messages_accepted.get().to_string()),
        ("retained messages/count", retained_messages.to_string()),
    ]
}

/// Tells it until `stop`.
pub async fn run<S: Service>(broker: Broker<S>, metrics: Arc<Metrics>, stop: impl Future<Output = ()>) {
    tokio::pin!(stop);
    let began = Instant::now();
    let mut interval = tokio::time::interval(TELL_INTERVAL);
    let mut told: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            () = &mut stop => return,
            _ = interval.tick() => {}
        }
        let now = values(&metrics, began.elapsed(), broker.retained_messages());
        for (nth, (name, value)) in now.iter().enumerate() {
            if told.get(nth) == Some(value) {
                continue;
            }
            let topic = Arc::from(format!("$SYS/broker/{name}"));
            if let Err(error) = broker.publish(topic, value.clone().into(), true) {
                tracing::warn!(%error, topic = name, "$SYS is not up to date");
            }
        }
        told = now.map(|(_, value)| value).into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_is_counted() {
        let metrics = Metrics::new();
        metrics.connections.inc();
        metrics.mqtt_messages_received.inc_by(3);
        metrics.mqtt_messages_sent.inc_by(2);
        metrics.messages_accepted.inc();
        let values = values(&metrics, Duration::from_millis(61_500), 7).map(|(name, value)| format!("{name}: {value}"));
        let version = format!("version: chatd {}", env!("CARGO_PKG_VERSION"));
        let rest = [
            "uptime: 61 seconds",
            "clients/connected: 1",
            "messages/received: 3",
            "messages/sent: 2",
            "messages/stored: 1",
            "retained messages/count: 7",
        ];
        assert_eq!(values[0], version);
        assert_eq!(values[1..], rest);
    }
}
