//! Ten thousand clients connect, subscribe and vanish, five times over: nothing of them stays.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use end_to_end::allocated::Allocated;
use end_to_end::packet::{self, Properties, Publish, Version, Will};
use end_to_end::{Chatd, Connect, Options, PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::chat::assert_well;

const CLIENTS: usize = 10_000;
const ROUNDS: usize = 5;
/// Several at a time, each with so many connections.
const TASKS: usize = 4;
const AT_ONCE: usize = 100;

/// What is allocated rises and falls in steps: the buses empty their logs when they are quiet, and threads that read for somebody end after 10 s without
/// work. So long without a step, and it is what it is.
const SETTLED_AFTER: Duration = Duration::from_secs(12);

/// Everything that one client sends first; each number does something else.
fn opening(number: usize) -> Vec<u8> {
    let version = if number.is_multiple_of(2) { Version::V4 } else { Version::V5 };
    let user = format!("user-{number}");
    let mut connect = Connect::new(version, &user, &format!("device-{number}"));
    if number % 10 == 3 {
        let will = Will { topic: format!("wills/{user}"), payload: b"gone".to_vec(), ..Will::default() };
        connect = connect.will(will);
    }
    let mut bytes = connect.bytes();
    let own = format!("chat/{user}/#");
    let (room, all) = (format!("rooms/{number}/+"), format!("rooms/{}/#", number % 100));
    let shared = format!("$share/group-{}/jobs/{number}", number % 50);
    bytes.extend(packet::subscribe(version, 1, &Properties::none(), &[(&own, 1), (&room, 1), (&all, 0), (&shared, 1)]));
    if number % 20 == 5 {
        let retained = Publish { retain: true, ..Publish::new(format!("rooms/{}/topic", number % 100), "x", 0) };
        bytes.extend(packet::publish(version, &retained));
    }
    if number % 4 == 1 {
        bytes.extend(packet::unsubscribe(version, 2, &[&room]));
    }
    bytes.extend(packet::pingreq());
    bytes
}

async fn connected(address: SocketAddr, number: usize) -> Result<TcpStream> {
    // Closed ports rest for a minute: from several addresses there are enough.
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 1, u8::try_from(1 + number % 200)?], 0)))?;
    let mut stream = socket.connect(address).await?;
    stream.write_all(&opening(number)).await?;
    let mut answers = Vec::new();
    while !answers.windows(2).any(|two| two == [0xd0, 0]) {
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut answers)).await.context("PINGRESP")??;
        ensure!(read > 0, "client {number} was closed after {answers:02x?}");
    }
    Ok(stream)
}

/// Says goodbye, or vanishes.
async fn vanish(mut stream: TcpStream, number: usize) -> Result<()> {
    if number.is_multiple_of(2) {
        stream.set_zero_linger()?;
    } else {
        stream.write_all(&packet::disconnect(Version::V5, 0, &Properties::none())).await?;
    }
    Ok(())
}

async fn round(chatd: &Chatd) {
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let address = chatd.mqtt_addr();
        tasks.spawn(async move {
            let numbers: Vec<usize> = (0..CLIENTS).filter(|number| number % TASKS == task).collect();
            for some in numbers.chunks(AT_ONCE) {
                let mut streams = Vec::with_capacity(AT_ONCE);
                for number in some {
                    streams.push((connected(address, *number).await?, *number));
                }
                for (stream, number) in streams {
                    // Half of them, not by the number that decides what they do.
                    vanish(stream, number / TASKS).await?;
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap().unwrap();
    }
}

/// Not more than 5 % above.
fn is_back(now: &BTreeMap<String, f64>, first: &BTreeMap<String, f64>) -> bool {
    now.iter().all(|(name, entries)| first.get(name).is_some_and(|first| *entries <= first * 1.05))
}

/// What stays allocated when nothing happens any more.
async fn settled(allocated: &Allocated) -> u64 {
    let settling = Cell::new((0, Instant::now()));
    eventually("what is allocated does not change any more", PATIENCE * 4, async || {
        let bytes = allocated.bytes().unwrap();
        let (before, since) = settling.get();
        if bytes.abs_diff(before) > before / 200 {
            settling.set((bytes, Instant::now()));
        }
        since.elapsed() > SETTLED_AFTER
    })
    .await;
    settling.get().0
}

/// Connections, descriptors, every counted map, and every byte that is allocated. What it has in RAM is more, and the allocator's: what is in use
/// lies between what is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_clients_that_vanish_five_times() {
    let allocated = Allocated::new().await.unwrap();
    // So long users count as being there, and are kept in mind.
    let options = Options::default().set("limits.presence_grace_ms", 500);
    let chatd = Chatd::start_with(allocated.of(options)).await.unwrap();
    let before = chatd.traces().await.unwrap();
    let mut first: Option<(BTreeMap<String, f64>, u64, usize)> = None;
    for number in 1..=ROUNDS {
        round(&chatd).await;
        eventually("everybody is gone", PATIENCE, async || {
            chatd.metric("chatd_connections").await.unwrap() == before["chatd_connections"]
        })
        .await;
        let Some((traces_first, _, descriptors_first)) = &first else {
            let leaves_nothing =
                |now: &BTreeMap<String, f64>| now.iter().all(|(name, entries)| *entries <= before[name]);
            eventually(&format!("the edge is as it was: {before:#?}"), PATIENCE, async || {
                leaves_nothing(&chatd.traces().await.unwrap())
            })
            .await;
            let traces = chatd.traces().await.unwrap();
            first = Some((traces, settled(&allocated).await, chatd.descriptors().unwrap()));
            println!("round {number}: {first:?}");
            continue;
        };
        eventually(&format!("the edge is as it was: {traces_first:#?}"), PATIENCE, async || {
            is_back(&chatd.traces().await.unwrap(), traces_first)
        })
        .await;
        let descriptors_max = descriptors_first + descriptors_first / 20;
        eventually("descriptors are closed", PATIENCE, async || chatd.descriptors().unwrap() <= descriptors_max).await;
    }
    let bytes_first = first.map(|(_, bytes, _)| bytes).unwrap();
    let bytes_last = settled(&allocated).await;
    println!("allocated: {bytes_first} bytes, then {bytes_last}; {} KB in RAM", chatd.memory_kb().unwrap());
    assert!(
        bytes_last <= bytes_first + bytes_first / 20,
        "{bytes_first} bytes after one round, {bytes_last} after {ROUNDS}"
    );
    assert_well(&chatd).await;
}
