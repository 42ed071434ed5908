//! Bytes into a connection of a real broker, over a pipe in memory: it answers in MQTT, and ends when its client does.

use std::sync::Arc;
use std::time::Duration;

use broker::service::Peer;
use broker::{Announcer, Broker, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::service::Toy;

const PIPE_BYTES: usize = 64 * 1024;
/// Far more than any connection takes: what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

struct Edge {
    runtime: Runtime,
    broker: Broker<Toy>,
}

thread_local! {
    static EDGE: Edge = edge();
}

fn edge() -> Edge {
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let announcer = Announcer::default();
    let service = Arc::new(Toy::new(announcer.clone()));
    // Small, so that what happens at a limit happens; and nothing that counts what earlier inputs did.
    let limits = Limits {
        connections_per_user: 0,
        filters_per_user: 0,
        publishes_per_s: 0,
        publish_bytes_per_s: 0,
        user_publishes_per_s: 0,
        user_publish_bytes_per_s: 0,
        user_properties: 3,
        topic_bytes: 100,
        connect_bytes: 1_000,
        packet_bytes: 8 * 1024,
        receive_maximum: 4,
        window: 3,
        topic_levels: 8,
        subscriptions_per_session: 5,
        session_expiry_max_s: 5,
        queue_messages: 8,
        queue_bytes: 4 * 1024,
        retained_messages: 8,
        retained_bytes: 16 * 1024,
        ..Limits::default()
    };
    let _inside = runtime.enter();
    let broker = Broker::start(service, &announcer, limits).expect("the buses start");
    Edge { runtime, broker }
}

/// The first byte says how the others are cut, and whether they come on one connection or, half and half, on two.
pub(crate) fn connection(data: &[u8]) {
    for answers in answers_to(data) {
        check_answers(&answers);
    }
}

/// What each connection was sent.
fn answers_to(data: &[u8]) -> Vec<Vec<u8>> {
    let Some((how, bytes)) = data.split_first() else { return Vec::new() };
    let piece = [usize::MAX, 1, 5, 64][usize::from(how & 3)];
    let half = if how & 4 == 0 { bytes.len() } else { bytes.len() / 2 };
    EDGE.with(|edge| {
        let both = async {
            let mut first = Client::of(edge, piece);
            first.write(&bytes[..half]).await;
            let mut second = (half < bytes.len()).then(|| Client::of(edge, piece));
            if let Some(second) = &mut second {
                second.write(&bytes[half..]).await;
            }
            let mut answers = vec![first.end().await];
            if let Some(second) = second {
                answers.push(second.end().await);
            }
            answers
        };
        edge.runtime.block_on(async { timeout(PATIENCE, both).await }).expect("the connection ends")
    })
}

struct Client {
    pipe: DuplexStream,
    piece: usize,
    answers: Vec<u8>,
}

impl Client {
    fn of(edge: &Edge, piece: usize) -> Self {
        let (pipe, server) = duplex(PIPE_BYTES);
        edge.broker.serve(server, Peer::default());
        Self { pipe, piece, answers: Vec::new() }
    }

    /// Writes all of it, unless the server closes before, and reads what comes meanwhile.
    async fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(self.piece) {
            let (mut reader, mut writer) = tokio::io::split(&mut self.pipe);
            let writing = async {
                let written = writer.write_all(piece).await;
                // The server's turn.
                tokio::task::yield_now().await;
                written
            };
            let mut writing = std::pin::pin!(writing);
            loop {
                tokio::select! {
                    biased;
                    written = &mut writing => match written {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    read = reader.read_buf(&mut self.answers) => {
                        if !read.is_ok_and(|read| read > 0) {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Closes its half, and reads until the server has closed.
    async fn end(mut self) -> Vec<u8> {
        drop(self.pipe.shutdown().await);
        drop(self.pipe.read_to_end(&mut self.answers).await);
        self.answers
    }
}

/// Packets that only a server, or either side, sends; whole but for the last, and a CONNACK first.
fn check_answers(mut answers: &[u8]) {
    let mut is_first = true;
    while let Some((header, rest)) = answers.split_first() {
        let kind = header >> 4;
        assert!(!matches!(kind, 0 | 1 | 8 | 10 | 12), "a server sent packet {header:#x}");
        assert!(kind == 2 || !is_first, "the first packet is {header:#x}");
        is_first = false;
        let mut length = 0;
        let mut used = 0;
        let whole = loop {
            let Some(byte) = rest.get(used) else { break false };
            length |= usize::from(byte & 0x7f) << (7 * used);
            used += 1;
            if byte & 0x80 == 0 {
                break true;
            }
            assert!(used < 4, "a length of more than four bytes");
        };
        if !whole || rest.len() < used + length {
            return;
        }
        let body = &rest[used..used + length];
        if kind == 3 {
            let topic = body.split_first_chunk().and_then(|(n, rest)| rest.get(..usize::from(u16::from_be_bytes(*n))));
            let topic = std::str::from_utf8(topic.expect("a PUBLISH has a topic")).expect("which is UTF-8");
            assert!(!topic.contains(['+', '#', '\0']), "published to {topic:?}");
        }
        answers = &rest[used + length..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decent_client_is_answered() {
        for (version, how) in [(4, 0), (5, 0), (4, 1), (5, 1)] {
            let name = format!("{}/../fuzz/corpus/connection/v{version}-pubsub-{how}", env!("CARGO_MANIFEST_DIR"));
            let answers = answers_to(&std::fs::read(name).expect("a file of the corpus")).concat();
            check_answers(&answers);
            assert!(answers.starts_with(&[0x20]), "CONNACK: {answers:02x?}");
            assert!(answers.windows(2).any(|two| two == [0xd0, 0]), "PINGRESP: {answers:02x?}");
            assert!(answers.contains(&0x90) && answers.len() > 20, "SUBACK: {answers:02x?}");
        }
    }

    #[test]
    #[should_panic(expected = "a server sent packet 0xc0")]
    fn what_a_server_does_not_send_is_found() {
        check_answers(&[0x20, 2, 0, 0, 0xc0, 0]);
    }
}
