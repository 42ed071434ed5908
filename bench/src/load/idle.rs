//! Connections that are subscribed and do nothing: how fast they are let in, and what memory each takes.
//!
//! Then each is sent one message, so that it is known that they were really there.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::crowd;
use crate::mqtt::{self, Packet, Session};
use crate::outcome::{Outcome, Output};
use crate::outgoing::Outgoing;
use crate::plot::rounded;
use crate::progress::Progress;
use crate::target::{CONNECTING, Run, Target};
use crate::verify::{Faults, Judged, Message, Received, Seqs, Stamp};

/// How long the messages may take.
const DRAIN: Duration = Duration::from_secs(60);
/// Messages under way to those who are there.
const WINDOW: u16 = 32;

/// Idle connections: connections a second, and memory each.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
    #[arg(long, default_value_t = 10_000)]
    connections: u32,
    /// How many connect at once.
    #[arg(long, default_value_t = CONNECTING)]
    at_once: usize,
    /// How long they do nothing, before memory is looked at.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

struct Idle {
    nth: u32,
    client: Client,
    received: Received,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    options.target.check()?;
    ensure!(options.connections > 0, "there are connections");
    let target = Rc::new(options.target.clone());
    let dialer = Rc::new(target.dialer()?);
    let run = Run::new()?;
    let mut outcome = Outcome::new("idle");
    let before = target.memory()?;
    outcome.set_memory("before", before);
    let connecting = Instant::now();
    let idle = crowd::open("connecting", options.connections, options.at_once, |nth| {
        let (target, dialer, me) = (Rc::clone(&target), Rc::clone(&dialer), run.name("i", nth));
        async move {
            let (client, _) = target.receiver(&dialer, nth, &me, Session::Clean).await?;
            Ok(Rc::new(RefCell::new(Idle { nth, client, received: Received::new(Seqs::Consecutive) })))
        }
    })
    .await?;
    let count = f64::from(options.connections);
    outcome.set("connections", count);
    outcome.set("connected_per_s", count / connecting.elapsed().as_secs_f64());
    Progress::wait("doing nothing", Duration::from_secs(options.seconds)).await;
    let after = target.memory()?;
    outcome.set_memory("after", after);
    if let Some((after, before)) = after.zip(before) {
        let each = |after: u64, before: u64| (after as f64 - before as f64) / count;
        outcome.set("pss_bytes_each", each(after.proportional_bytes, before.proportional_bytes));
        outcome.set("anonymous_bytes_each", each(after.anonymous_bytes, before.anonymous_bytes));
    }
    wake(&options, &target, &run, idle, &mut outcome).await?;
    let mut summary = format!("{} connected/s", rounded(outcome.figure("connected_per_s").unwrap_or_default()));
    if let Some(bytes) = outcome.figure("anonymous_bytes_each") {
        summary += &format!(", {} KB each", rounded(bytes / 1e3));
    }
    outcome.write(&options.output, &summary)
}

/// Everybody is sent one message.
async fn wake(
    options: &Options,
    target: &Rc<Target>,
    run: &Run,
    idle: Vec<Rc<RefCell<Idle>>>,
    outcome: &mut Outcome,
) -> Result<()> {
    let faults = Rc::new(RefCell::new(Faults::default()));
    let mut listening = JoinSet::new();
    for one in &idle {
        let (one, faults, payload) = (Rc::clone(one), Rc::clone(&faults), target.payload);
        listening.spawn_local(async move {
            let ended = std::future::poll_fn(|cx| {
                let Idle { nth, client, received } = &mut *one.borrow_mut();
                loop {
                    let polled = client.poll_receive(cx, |packet, out| {
                        let Packet::Publish { qos, again, packet_id, payload: bytes, .. } = packet else {
                            return Ok(());
                        };
                        if qos > 0 {
                            mqtt::puback(out, packet_id);
                        }
                        let faults = &mut *faults.borrow_mut();
                        match Message::read(bytes, payload) {
                            Err(_) => faults.unreadable += 1,
                            Ok(message) if message.stamp.stream != *nth => faults.strays += 1,
                            Ok(message) => {
                                let _: Judged = received.take(&message, again, faults);
                            }
                        }
                        Ok(())
                    });
                    match polled {
                        Poll::Ready(Err(error)) => return Poll::Ready(error),
                        Poll::Ready(Ok(())) => {}
                        Poll::Pending => {
                            return match client.poll_flush(cx) {
                                Ok(()) => Poll::Pending,
                                Err(error) => Poll::Ready(error),
                            };
                        }
                    }
                }
            })
            .await;
            faults.borrow_mut().connections_lost += 1;
            ended
        });
    }
    let waking = Instant::now();
    let from = run.name("waker", 0);
    let mut sender = target.sender(&target.dialer()?, options.connections, &from).await?;
    let mut outgoing = Outgoing::new(WINDOW);
    let (mut next, mut text) = (0, Vec::new());
    let progress = Progress::count("waking", u64::from(options.connections));
    let sending = std::future::poll_fn(|cx| {
        loop {
            while next < options.connections {
                let Some(packet_id) = outgoing.begin(0) else { break };
                Stamp { stream: next, counter: 1, due_us: 0 }.write(&mut text, target.bytes);
                let topic = target.topic(&from, &run.name("i", next));
                mqtt::publish(&mut sender.out, target.version, &topic, packet_id, &text)?;
                next += 1;
                progress.set(u64::from(next));
            }
            sender.poll_flush(cx)?;
            if next == options.connections && outgoing.under_way() == 0 {
                return Poll::Ready(anyhow::Ok(()));
            }
            let polled = sender.poll_receive(cx, |packet, _| {
                if let Packet::Puback { packet_id } = packet
                    && outgoing.acknowledged(packet_id).is_none()
                {
                    faults.borrow_mut().stray_acknowledgements += 1;
                }
                Ok(())
            });
            std::task::ready!(polled)?;
        }
    });
    if let Ok(sent) = tokio::time::timeout(DRAIN, sending).await {
        sent?;
    }
    let missing = || idle.iter().filter(|one| one.borrow().received.last() == 0).count();
    let by = Instant::now() + DRAIN;
    while missing() > 0 && Instant::now() < by {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    outcome.set("woken_per_s", f64::from(options.connections) / waking.elapsed().as_secs_f64());
    let mut faults = faults.borrow_mut();
    faults.lost = missing() as u64;
    faults.unacknowledged = outgoing.under_way() as u64;
    outcome.faults = *faults;
    drop(faults);
    listening.abort_all();
    Ok(())
}
