//! A storm: everybody loses the connection at once and comes back at once, while messages for them keep being sent, and two who have
//! nothing to do with it keep talking.
//!
//! How long until all are back, what it costs the two, and whether anything was lost.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::crowd;
use crate::innocent::Innocent;
use crate::measure::{Latencies, Series};
use crate::mqtt::{self, Packet, Session};
use crate::outcome::{Outcome, Output};
use crate::outgoing::Outgoing;
use crate::pacer::Pacer;
use crate::plot::{rounded, time};
use crate::progress::Progress;
use crate::target::{CONNECTING, Run, Target};
use crate::verify::{Faults, Judged, Message, Received, Seqs, Stamp};
use crate::wire::Dialer;

/// How long a client tries again before it tries once more.
const RETRY: Duration = Duration::from_millis(200);
/// How long a connection may take before it counts as failed and is tried again.
const TRY: Duration = Duration::from_secs(30);
/// Messages that a sender has under way; those beyond wait in the generator.
const WINDOW: u16 = 4_096;

/// Everybody reconnects at once: how long it takes, what it costs others, what is lost.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
    /// Clients with a persistent session that are thrown out.
    #[arg(long, default_value_t = 20_000)]
    clients: u32,
    /// How many connect at once before the storm; in it it is all of them.
    #[arg(long, default_value_t = CONNECTING)]
    at_once: usize,
    /// Messages a second to all of them together.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Who sends to them.
    #[arg(long, default_value_t = 10)]
    senders: u32,
    /// Messages a second between the two who have nothing to do with it.
    #[arg(long, default_value_t = 100.0)]
    innocent_rate: f64,
    /// How long it is calm before the storm, and at least how long everything goes on after its beginning.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// How long they may take to come back, and messages to arrive.
    #[arg(long, default_value_t = 120)]
    patience_s: u64,
}

struct Shared {
    target: Target,
    dialer: Dialer,
    run: Run,
    began: Instant,
    sending: Cell<bool>,
    /// When the storm began, in microseconds.
    cut_at_us: Cell<Option<u64>>,
    /// How long each took to come back.
    back: RefCell<Latencies>,
    back_count: Cell<u32>,
    back_series: RefCell<Series>,
    retries: Cell<u64>,
    redelivered: Cell<u64>,
    delivered: RefCell<Series>,
    faults: RefCell<Faults>,
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// One who is thrown out. Streams are numbered as the clients.
struct Listener {
    nth: u32,
    /// Only ever away between a cut and the return.
    client: Option<Client>,
    received: Received,
    sent: u64,
    /// Whether it was cut and has not come back yet.
    is_thrown_out: bool,
    waker: Option<Waker>,
}

impl Listener {
    fn new(nth: u32, client: Client) -> Rc<RefCell<Self>> {
        let received = Received::new(Seqs::Consecutive);
        Rc::new(RefCell::new(Self { nth, client: Some(client), received, sent: 0, is_thrown_out: false, waker: None }))
    }

    /// Takes what comes; ready when the connection is gone.
    fn poll(&mut self, cx: &mut TaskContext<'_>, shared: &Shared) -> Poll<()> {
        self.waker = Some(cx.waker().clone());
        let Some(client) = &mut self.client else { return Poll::Ready(()) };
        let (nth, received) = (self.nth, &mut self.received);
        loop {
            let polled = client.poll_receive(cx, |packet, out| {
                let Packet::Publish { qos, again, packet_id, payload, .. } = packet else { return Ok(()) };
                if qos > 0 {
                    mqtt::puback(out, packet_id);
                }
                let faults = &mut *shared.faults.borrow_mut();
                match Message::read(payload, shared.target.payload) {
                    Err(_) => faults.unreadable += 1,
                    Ok(message) if message.stamp.stream != nth => faults.strays += 1,
                    Ok(message) => match received.take(&message, again, faults) {
                        Judged::New(_) => shared.delivered.borrow_mut().add(shared.now_us()),
                        Judged::Redelivered => shared.redelivered.set(shared.redelivered.get() + 1),
                        Judged::Fault => {}
                    },
                }
                Ok(())
            });
            let flushed = client.poll_flush(cx);
            match (polled, flushed) {
                (Poll::Ready(Ok(())), Ok(())) => {}
                (Poll::Pending, Ok(())) => return Poll::Pending,
                _ => {
                    // Nobody has cut it: the broker has.
                    shared.faults.borrow_mut().connections_lost += 1;
                    self.client = None;
                    return Poll::Ready(());
                }
            }
        }
    }

    fn cut(&mut self) -> Result<()> {
        if let Some(client) = self.client.take() {
            client.cut()?;
        }
        self.is_thrown_out = true;
        self.waker.iter().for_each(Waker::wake_by_ref);
        Ok(())
    }
}

async fn listen(listener: Rc<RefCell<Listener>>, shared: Rc<Shared>) -> Result<()> {
    let nth = listener.borrow().nth;
    let me = shared.run.name("n", nth);
    loop {
        std::future::poll_fn(|cx| listener.borrow_mut().poll(cx, &shared)).await;
        let (client, remembered) = come_back(&shared, nth, &me).await;
        shared.faults.borrow_mut().sessions_lost += u64::from(!remembered);
        let mut listener = listener.borrow_mut();
        listener.client = Some(client);
        listener.received.reconnected();
        if let Some(cut_at_us) = shared.cut_at_us.get()
            && std::mem::take(&mut listener.is_thrown_out)
        {
            let took_us = shared.now_us().saturating_sub(cut_at_us);
            shared.back.borrow_mut().record(took_us);
            shared.back_series.borrow_mut().add(took_us);
            shared.back_count.set(shared.back_count.get() + 1);
        }
    }
}

async fn come_back(shared: &Shared, nth: u32, me: &str) -> (Client, bool) {
    loop {
        let coming = shared.target.receiver(&shared.dialer, nth, me, Session::Persistent);
        if let Ok(Ok(back)) = tokio::time::timeout(TRY, coming).await {
            return back;
        }
        shared.retries.set(shared.retries.get() + 1);
        tokio::time::sleep(RETRY).await;
    }
}

/// Sends to its share of the listeners, in turn, at fixed times.
struct Sender {
    client: Client,
    me: String,
    outgoing: Outgoing,
    to: Vec<(String, Rc<RefCell<Listener>>)>,
    next: usize,
    text: Vec<u8>,
    waker: Option<Waker>,
}

impl Sender {
    async fn new(shared: &Shared, nth: u32, me: String, to: Vec<Rc<RefCell<Listener>>>) -> Result<Rc<RefCell<Self>>> {
        let client = shared.target.sender(&shared.dialer, nth, &me).await?;
        let with_name = |listener: Rc<RefCell<Listener>>| {
            let name = shared.run.name("n", listener.borrow().nth);
            (shared.target.topic(&me, &name), listener)
        };
        let to = to.into_iter().map(with_name).collect();
        let outgoing = Outgoing::new(WINDOW);
        Ok(Rc::new(RefCell::new(Self { client, me, outgoing, to, next: 0, text: Vec::new(), waker: None })))
    }

    /// Ready only if something fails.
    fn poll(&mut self, cx: &mut TaskContext<'_>, shared: &Shared) -> Poll<Result<()>> {
        self.waker = Some(cx.waker().clone());
        loop {
            self.client.poll_flush(cx)?;
            let outgoing = &mut self.outgoing;
            let polled = self.client.poll_receive(cx, |packet, _| {
                if let Packet::Puback { packet_id } = packet
                    && outgoing.acknowledged(packet_id).is_none()
                {
                    shared.faults.borrow_mut().stray_acknowledgements += 1;
                }
                Ok(())
            });
            std::task::ready!(polled).with_context(|| format!("the connection of {}", self.me))?;
        }
    }

    /// Whether there was a packet identifier for it.
    fn send(&mut self, due_us: u64, shared: &Shared) -> Result<bool> {
        let Some(packet_id) = self.outgoing.begin(due_us) else { return Ok(false) };
        let (topic, listener) = &self.to[self.next];
        self.next = (self.next + 1) % self.to.len();
        let mut listener = listener.borrow_mut();
        listener.sent += 1;
        Stamp { stream: listener.nth, counter: listener.sent, due_us }.write(&mut self.text, shared.target.bytes);
        mqtt::publish(&mut self.client.out, shared.target.version, topic, packet_id, &self.text)?;
        self.client.flush()?;
        if !self.client.is_flushed() {
            self.waker.iter().for_each(Waker::wake_by_ref);
        }
        Ok(true)
    }
}

/// Messages that are due in turn, of these senders.
async fn send_when_due(senders: Vec<Rc<RefCell<Sender>>>, shared: Rc<Shared>, rate: f64) -> Result<()> {
    let mut pacer = Pacer::new(shared.began, rate)?;
    for sender in senders.iter().cycle() {
        let due_us = pacer.due_us().await?;
        if !shared.sending.get() {
            break;
        }
        // A late one is sent late: its time counts from when it was due.
        while !sender.borrow_mut().send(due_us, &shared)? {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    std::future::pending().await
}

pub(crate) async fn run(options: Options) -> Result<()> {
    options.target.check()?;
    ensure!(options.clients > 0 && options.senders > 0, "clients and senders are positive");
    ensure!(options.senders <= options.clients, "no more senders than clients");
    let mut outcome = Outcome::new("storm");
    outcome.set_memory("before", options.target.memory()?);
    let shared = Rc::new(Shared {
        dialer: options.target.dialer()?,
        target: options.target.clone(),
        run: Run::new()?,
        began: Instant::now(),
        sending: Cell::new(true),
        cut_at_us: Cell::new(None),
        back: RefCell::new(Latencies::new()?),
        back_count: Cell::new(0),
        back_series: RefCell::new(Series::new()),
        retries: Cell::new(0),
        redelivered: Cell::new(0),
        delivered: RefCell::new(Series::new()),
        faults: RefCell::default(),
    });
    let connecting = Instant::now();
    let listeners = crowd::open("connecting", options.clients, options.at_once, |nth| {
        let shared = Rc::clone(&shared);
        async move {
            let me = shared.run.name("n", nth);
            let (client, _) = shared.target.receiver(&shared.dialer, nth, &me, Session::Persistent).await?;
            Ok(Listener::new(nth, client))
        }
    })
    .await?;
    outcome.set("connected_per_s", f64::from(options.clients) / connecting.elapsed().as_secs_f64());

    let mut running: JoinSet<Result<()>> = JoinSet::new();
    let mut senders = Vec::new();
    for nth in 0..options.senders {
        let mine = |listener: &&Rc<RefCell<Listener>>| listener.borrow().nth % options.senders == nth;
        let to = listeners.iter().filter(mine).cloned().collect();
        senders.push(Sender::new(&shared, options.clients + nth, shared.run.name("s", nth), to).await?);
    }
    for sender in &senders {
        let (sender, shared) = (Rc::clone(sender), Rc::clone(&shared));
        running.spawn_local(async move { std::future::poll_fn(|cx| sender.borrow_mut().poll(cx, &shared)).await });
    }
    running.spawn_local(send_when_due(senders.clone(), Rc::clone(&shared), options.rate));
    for listener in &listeners {
        running.spawn_local(listen(Rc::clone(listener), Rc::clone(&shared)));
    }
    let nth = options.clients + options.senders;
    let innocent = Innocent::start(&options.target, &shared.run, nth, shared.began, options.innocent_rate)?;
    tokio::select! {
        ended = storm(&options, &shared, &listeners, &senders, &innocent, &mut outcome) => ended?,
        // None ends by itself: one has failed.
        Some(ended) = running.join_next() => ended??,
    }
    running.abort_all();
    let seen = innocent.end().await?;
    outcome.set_latencies("innocent_calm", seen.calm.distribution());
    outcome.set_latencies("innocent_storm", seen.stormy.distribution());
    let mut faults = shared.faults.borrow_mut();
    faults.add(&seen.faults);
    for listener in &listeners {
        let listener = listener.borrow();
        faults.lost += listener.sent - listener.received.last();
    }
    faults.unacknowledged += senders.iter().map(|sender| sender.borrow().outgoing.under_way() as u64).sum::<u64>();
    outcome.faults = *faults;
    drop(faults);
    report(&options, &shared, outcome)
}

async fn storm(
    options: &Options,
    shared: &Shared,
    listeners: &[Rc<RefCell<Listener>>],
    senders: &[Rc<RefCell<Sender>>],
    innocent: &Innocent,
    outcome: &mut Outcome,
) -> Result<()> {
    let seconds = Duration::from_secs(options.seconds);
    Progress::wait("calm", seconds).await;
    outcome.set_memory("calm", options.target.memory()?);
    let began = Instant::now();
    shared.cut_at_us.set(Some(shared.now_us()));
    innocent.storm_begins(shared.now_us());
    for listener in listeners {
        listener.borrow_mut().cut()?;
    }
    outcome.set("cut_ms", began.elapsed().as_secs_f64() * 1e3);
    let patience = Duration::from_secs(options.patience_s);
    let progress = Progress::count("coming back", u64::from(options.clients));
    while shared.back_count.get() < options.clients && began.elapsed() < patience {
        tokio::time::sleep(Duration::from_millis(10)).await;
        progress.set(u64::from(shared.back_count.get()));
    }
    drop(progress);
    outcome.set("all_back_s", began.elapsed().as_secs_f64());
    outcome.set_memory("back", options.target.memory()?);
    let missing = options.clients.saturating_sub(shared.back_count.get());
    shared.faults.borrow_mut().connections_lost += u64::from(missing);
    Progress::wait("afterwards", seconds.saturating_sub(began.elapsed())).await;
    shared.sending.set(false);
    let by = Instant::now() + patience;
    let is_drained = |listener: &Rc<RefCell<Listener>>| {
        let listener = listener.borrow();
        listener.received.last() == listener.sent
    };
    let is_acknowledged = |sender: &Rc<RefCell<Sender>>| sender.borrow().outgoing.under_way() == 0;
    while Instant::now() < by && !(listeners.iter().all(is_drained) && senders.iter().all(is_acknowledged)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn report(options: &Options, shared: &Shared, mut outcome: Outcome) -> Result<()> {
    outcome.set("clients", f64::from(options.clients));
    outcome.set("retries", shared.retries.get() as f64);
    outcome.redelivered = shared.redelivered.get();
    outcome.set_latencies("back", shared.back.borrow().distribution());
    outcome.series.insert("back".to_owned(), shared.back_series.borrow().clone());
    outcome.series.insert("delivered".to_owned(), shared.delivered.borrow().clone());
    let p99 = |name: &str| time(outcome.latencies[name].p99_us as f64);
    let summary = format!(
        "{} back after {} s, the innocent pair's p99 {} (before: {})",
        shared.back_count.get(),
        rounded(outcome.figure("all_back_s").unwrap_or_default()),
        p99("innocent_storm"),
        p99("innocent_calm")
    );
    outcome.write(&options.output, &summary)
}
