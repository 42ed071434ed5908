//! A bad network: a proxy between clients and chatd that delays, duplicates, half-closes and cuts, as dice tell.
//!
//! It forwards whole MQTT packets, so that a duplicate is a packet sent twice and not a broken stream. Each connection gets its own dice,
//! thrown from the seed and the connection's number: what happens to it does not depend on others.
//!
//! Or a lie: it leaves everything as it is, but for one message on its way to a client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::Dice;

/// So many packets pass in one direction, on average, before the connection is cut or half-closed.
const PACKETS_UNTIL_CUT: usize = 120;
/// One packet in so many is sent twice.
const PACKETS_UNTIL_TWICE: usize = 40;
/// One packet in so many comes late.
const PACKETS_UNTIL_LATE: usize = 10;
const LATE_MS_MAX: usize = 60;

/// What it did, for the test to see that it did something.
#[derive(Debug, Default)]
pub struct Deeds {
    pub connections: AtomicU64,
    pub cuts: AtomicUsize,
    pub half_closes: AtomicUsize,
    pub twice: AtomicUsize,
    pub late: AtomicUsize,
}

/// What happens to one message on its way to a client, and nobody is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    Lost,
    Twice,
}

struct Shared {
    target: Mutex<SocketAddr>,
    calm: AtomicBool,
    seed: u64,
    deeds: Deeds,
    lie: Option<Lie>,
    /// Messages until then.
    lie_in: AtomicUsize,
}

/// A running proxy. Ends when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Proxy {
    /// In front of this address.
    pub async fn start(target: SocketAddr, seed: u64) -> Result<Self> {
        Self::start_as(target, seed, None).await
    }

    /// It only forwards, but for the tenth message to clients.
    pub async fn start_lying(target: SocketAddr, lie: Lie) -> Result<Self> {
        let proxy = Self::start_as(target, 0, Some(lie)).await?;
        proxy.calm_down();
        Ok(proxy)
    }

    async fn start_as(target: SocketAddr, seed: u64, lie: Option<Lie>) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("a port for the proxy")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            calm: AtomicBool::new(false),
            seed,
            deeds: Deeds::default(),
            lie,
            lie_in: AtomicUsize::new(10),
        });
        let accepting = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(connection(client, Arc::clone(&shared)));
                }
            }
        });
        Ok(Self { address, shared, accepting })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads those who connect from now on somewhere else: to a chatd that was started again on ports of its own choice, as the old ones may be taken.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.shared.target.lock() = target;
    }

    /// From now on it only forwards.
    pub fn calm_down(&self) {
        self.shared.calm.store(true, Ordering::Relaxed);
    }

    /// What it did.
    pub fn deeds(&self) -> &Deeds {
        &self.shared.deeds
    }
}

async fn connection(client: TcpStream, shared: Arc<Shared>) {
    let number = shared.deeds.connections.fetch_add(1, Ordering::Relaxed);
    // Dropped: the client sees that nobody is there.
    let target = *shared.target.lock();
    let Ok(server) = TcpStream::connect(target).await else { return };
    for socket in [&client, &server] {
        if socket.set_nodelay(true).is_err() {
            return;
        }
    }
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let dice = |direction: u64| Dice::new(shared.seed ^ (number * 2 + direction).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let up = forward(client_in, server_out, dice(0), &shared, None);
    let down = forward(server_in, client_out, dice(1), &shared, shared.lie);
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    // A cut drops both directions; after a half-close the other one goes on until its sender has enough.
    tokio::select! {
        end = &mut up => if end == End::HalfClosed { down.await; },
        end = &mut down => if end == End::HalfClosed { up.await; },
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Cut,
    HalfClosed,
}

async fn forward(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut dice: Dice,
    shared: &Shared,
    lie: Option<Lie>,
) -> End {
    let deeds = &shared.deeds;
    let one_in = |dice: &mut Dice, many: usize, deed: &AtomicUsize| {
        let happens = dice.below(many) == 0 && !shared.calm.load(Ordering::Relaxed);
        if happens {
            deed.fetch_add(1, Ordering::Relaxed);
        }
        happens
    };
    loop {
        let Ok(packet) = packet(&mut from).await else { return End::Cut };
        if one_in(&mut dice, PACKETS_UNTIL_LATE, &deeds.late) {
            let late_ms = dice.below(LATE_MS_MAX) as u64;
            tokio::time::sleep(Duration::from_millis(late_ms)).await;
        }
        if one_in(&mut dice, 2 * PACKETS_UNTIL_CUT, &deeds.cuts) {
            // Perhaps in the middle of a packet.
            let part = &packet[..dice.below(packet.len() + 1)];
            // The other side may be gone already: it is cut all the same.
            drop(to.write_all(part).await);
            return End::Cut;
        }
        if one_in(&mut dice, 2 * PACKETS_UNTIL_CUT, &deeds.half_closes) {
            return if to.shutdown().await.is_ok() { End::HalfClosed } else { End::Cut };
        }
        let is_publish = packet[0] >> 4 == 3;
        let lie = lie.filter(|_| is_publish && shared.lie_in.fetch_sub(1, Ordering::Relaxed) == 1);
        let times = match lie {
            None => 1,
            Some(Lie::Lost) => 0,
            Some(Lie::Twice) => 2,
        };
        for _ in 0..times {
            if to.write_all(&packet).await.is_err() {
                return End::Cut;
            }
        }
        if is_publish && one_in(&mut dice, PACKETS_UNTIL_TWICE, &deeds.twice) && to.write_all(&packet).await.is_err() {
            return End::Cut;
        }
    }
}

/// A whole MQTT packet.
async fn packet(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut packet = vec![from.read_u8().await?];
    let mut remaining = 0;
    for shift in [0, 7, 14, 21] {
        let byte = from.read_u8().await?;
        packet.push(byte);
        remaining |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    let header = packet.len();
    packet.resize(header + remaining, 0);
    from.read_exact(&mut packet[header..]).await?;
    Ok(packet)
}
