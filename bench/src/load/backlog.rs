//! A backlog: messages for users who are away, and then come. How fast they are taken, and how fast they are handed over.
//!
//! Every receiver has a persistent session and was subscribed before, as brokers keep nothing for those whom they have never seen.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::crowd;
use crate::measure::Series;
use crate::mqtt::{self, Packet, Session};
use crate::outcome::{Outcome, Output, Work};
use crate::outgoing::Outgoing;
use crate::plot::rounded;
use crate::progress::Progress;
use crate::target::{CONNECTING, Run, Target};
use crate::verify::{Faults, Judged, Message, Received, Seqs, Stamp};

/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A backlog: storing for users who are away, and handing over when they come.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
    /// Messages in all.
    #[arg(long, default_value_t = 100_000)]
    messages: u64,
    /// Users who are away; each has a sender of its own.
    #[arg(long, default_value_t = 10)]
    users: u32,
    /// Messages that a sender has under way.
    #[arg(long, default_value_t = 16)]
    window: u16,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    options.target.check()?;
    ensure!(options.users > 0 && options.window > 0, "users and window are positive");
    let each = options.messages / u64::from(options.users);
    ensure!(each > 0, "there is a message for every user");
    let messages = each * u64::from(options.users);
    let target = Rc::new(options.target.clone());
    let dialer = Rc::new(target.dialer()?);
    let run = Rc::new(Run::new()?);
    let faults = Rc::new(RefCell::new(Faults::default()));
    let mut outcome = Outcome::new("backlog");
    outcome.set_memory("before", target.memory()?);

    let subscribed = crowd::open("subscribing", options.users, CONNECTING, |nth| {
        let (target, dialer, to) = (Rc::clone(&target), Rc::clone(&dialer), run.name("to", nth));
        async move { Ok(target.receiver(&dialer, nth, &to, Session::Persistent).await?.0) }
    });
    for client in subscribed.await? {
        client.leave_and_wait().await?;
    }

    let work = Work::now(&target)?;
    let sending = Instant::now();
    let progress = Rc::new(Progress::count("storing", messages));
    let sent = Rc::new(std::cell::Cell::new(0));
    let mut senders = JoinSet::new();
    for nth in 0..options.users {
        let (target, dialer, run, faults) = (target.clone(), dialer.clone(), run.clone(), faults.clone());
        let (progress, sent, window) = (progress.clone(), sent.clone(), options.window);
        senders.spawn_local(async move {
            let (from, to) = (run.name("from", nth), run.name("to", nth));
            let client = target.sender(&dialer, options.users + nth, &from).await?;
            let topic = target.topic(&from, &to);
            send(client, &target, nth, &topic, each, window, &faults, || {
                sent.set(sent.get() + 1);
                progress.set(sent.get());
            })
            .await
        });
    }
    while let Some(ended) = senders.join_next().await {
        ended??;
    }
    drop(progress);
    outcome.set("stored_per_s", messages as f64 / sending.elapsed().as_secs_f64());
    work.since(&target, messages, &mut outcome)?;
    let per_message = "server_cpu_us_per_message";
    if let Some(us) = outcome.figures.remove(per_message) {
        outcome.set("storing_server_cpu_us_per_message", us);
    }
    outcome.set_memory("stored", target.memory()?);

    let work = Work::now(&target)?;
    let began = Instant::now();
    let series = Rc::new(RefCell::new(Series::new()));
    let first = Rc::new(std::cell::Cell::new(None));
    let redelivered = Rc::new(std::cell::Cell::new(0));
    let progress = Rc::new(Progress::count("handing over", messages));
    let got = Rc::new(std::cell::Cell::new(0));
    let mut receivers = JoinSet::new();
    for nth in 0..options.users {
        let (target, dialer, run, faults) = (target.clone(), dialer.clone(), run.clone(), faults.clone());
        let (series, first, redelivered) = (series.clone(), first.clone(), redelivered.clone());
        let (progress, got) = (progress.clone(), got.clone());
        receivers.spawn_local(async move {
            let to = run.name("to", nth);
            let (client, remembered) = target.receiver(&dialer, nth, &to, Session::Persistent).await?;
            faults.borrow_mut().sessions_lost += u64::from(!remembered);
            let mut received = Received::new(Seqs::Consecutive);
            received.reconnected();
            let last = receive(client, &target, nth, received, each, &faults, |judged| match judged {
                Judged::New(_) => {
                    first.set(first.get().or_else(|| Some(began.elapsed())));
                    let at_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                    series.borrow_mut().add(at_us);
                    got.set(got.get() + 1);
                    progress.set(got.get());
                }
                Judged::Redelivered => redelivered.set(redelivered.get() + 1),
                Judged::Fault => {}
            })
            .await?;
            faults.borrow_mut().lost += each - last;
            anyhow::Ok(())
        });
    }
    while let Some(ended) = receivers.join_next().await {
        ended??;
    }
    drop(progress);
    outcome.set("handed_over_per_s", got.get() as f64 / began.elapsed().as_secs_f64());
    outcome.set("first_ms", first.get().unwrap_or_default().as_secs_f64() * 1e3);
    work.since(&target, messages, &mut outcome)?;
    outcome.set_memory("after", target.memory()?);
    outcome.set("messages", messages as f64);
    outcome.series.insert("handed_over".to_owned(), series.borrow().clone());
    outcome.redelivered = redelivered.get();
    outcome.faults = *faults.borrow();
    let summary = format!(
        "{} stored/s, {} handed over/s",
        rounded(outcome.figure("stored_per_s").unwrap_or_default()),
        rounded(outcome.figure("handed_over_per_s").unwrap_or_default())
    );
    outcome.write(&options.output, &summary)
}

/// Sends so many in a stream, and returns when all are acknowledged, or after a long silence.
#[expect(clippy::too_many_arguments, reason = "what one sender does in one place")]
async fn send(
    mut client: Client,
    target: &Target,
    stream: u32,
    topic: &str,
    messages: u64,
    window: u16,
    faults: &RefCell<Faults>,
    mut acknowledged: impl FnMut(),
) -> Result<()> {
    let mut outgoing = Outgoing::new(window);
    let (mut sent, mut text) = (0, Vec::new());
    loop {
        let turn = std::future::poll_fn(|cx| {
            while sent < messages {
                let Some(packet_id) = outgoing.begin(0) else { break };
                sent += 1;
                Stamp { stream, counter: sent, due_us: 0 }.write(&mut text, target.bytes);
                mqtt::publish(&mut client.out, target.version, topic, packet_id, &text)?;
            }
            client.poll_flush(cx)?;
            client.poll_receive(cx, |packet, _| {
                if let Packet::Puback { packet_id } = packet {
                    match outgoing.acknowledged(packet_id) {
                        Some(_) => acknowledged(),
                        None => faults.borrow_mut().stray_acknowledgements += 1,
                    }
                }
                Ok(())
            })
        });
        match tokio::time::timeout(PATIENCE, turn).await {
            Ok(received) => received?,
            Err(_) => {
                faults.borrow_mut().unacknowledged += outgoing.under_way() as u64 + (messages - sent);
                return Ok(());
            }
        }
        if sent == messages && outgoing.under_way() == 0 {
            return client.leave();
        }
    }
}

/// Takes what comes until the last message is there, or after a long silence; which was the last.
async fn receive(
    mut client: Client,
    target: &Target,
    stream: u32,
    mut received: Received,
    messages: u64,
    faults: &RefCell<Faults>,
    mut judged: impl FnMut(Judged),
) -> Result<u64> {
    while received.last() < messages {
        let turn = std::future::poll_fn(|cx| {
            client.poll_flush(cx)?;
            let polled = client.poll_receive(cx, |packet, out| {
                let Packet::Publish { qos, again, packet_id, payload, .. } = packet else { return Ok(()) };
                if qos > 0 {
                    mqtt::puback(out, packet_id);
                }
                let faults = &mut *faults.borrow_mut();
                match Message::read(payload, target.payload) {
                    Err(_) => faults.unreadable += 1,
                    Ok(message) if message.stamp.stream != stream => faults.strays += 1,
                    Ok(message) => judged(received.take(&message, again, faults)),
                }
                Ok(())
            });
            ready!(polled)?;
            Poll::Ready(anyhow::Ok(()))
        });
        match tokio::time::timeout(PATIENCE, turn).await {
            Ok(received) => received.context("while a backlog is handed over")?,
            Err(_) => return Ok(received.last()),
        }
    }
    client.flush()?;
    client.leave()?;
    Ok(received.last())
}
