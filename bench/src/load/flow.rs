//! A flow of messages from senders to receivers, for a time: what [`crate::pairs`] and [`crate::fan_in`] have in common.
//!
//! Closed: each sender keeps so many messages under way, and sends the next when one was acknowledged and delivered. Open: messages are due
//! at fixed times, whatever the broker does, and a latency counts from when its message was due.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::crowd;
use crate::measure::{Latencies, Series};
use crate::mqtt::{self, Packet, Session};
use crate::outcome::{Outcome, Output, Work};
use crate::outgoing::Outgoing;
use crate::pacer::Pacer;
use crate::plot::{rounded, time};
use crate::progress::Progress;
use crate::target::{CONNECTING, Run, Target};
use crate::verify::{Faults, Judged, Message, Received, Seqs, Stamp};

/// How long what is under way may take to arrive once nothing more is sent.
const DRAIN: Duration = Duration::from_secs(30);
/// Under way of one sender at an open rate: what is due beyond that waits in the generator.
const OPEN_WINDOW: u16 = 4_096;

/// How much flows, for how long.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Flow {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
    /// Messages that a sender has under way.
    #[arg(long, default_value_t = 16)]
    window: u16,
    /// Messages a second over all senders, due at fixed times; without it as many as the window allows.
    #[arg(long)]
    rate: Option<f64>,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    #[arg(long, default_value_t = 2)]
    warmup_seconds: u64,
}

/// Of the nth sender everything goes to one receiver, in turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) senders: u32,
    pub(crate) receivers: u32,
}

/// What all clients share.
struct Shared {
    target: Target,
    ends: Ends,
    /// Times count from here.
    began: Instant,
    /// Messages that a sender has under way; `None`: an open rate.
    window: Option<usize>,
    sending: Cell<bool>,
    /// When measuring began, in microseconds, while it goes on.
    measuring_since_us: Cell<Option<u64>>,
    faults: RefCell<Faults>,
    acknowledged: Tally,
    delivered: Tally,
    /// How much later than due messages of an open rate were sent.
    late: RefCell<Latencies>,
    senders: Vec<RefCell<Sender>>,
    receivers: Vec<RefCell<Receiver>>,
}

struct Tally {
    count: Cell<u64>,
    latencies: RefCell<Latencies>,
    series: RefCell<Series>,
}

impl Tally {
    fn new() -> Result<Self> {
        Ok(Self {
            count: Cell::new(0),
            latencies: RefCell::new(Latencies::new()?),
            series: RefCell::new(Series::new()),
        })
    }
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn count(&self, tally: &Tally, due_us: u64, now_us: u64) {
        if let Some(since_us) = self.measuring_since_us.get() {
            tally.count.set(tally.count.get() + 1);
            tally.latencies.borrow_mut().record(now_us.saturating_sub(due_us));
            tally.series.borrow_mut().add(now_us.saturating_sub(since_us));
        }
    }

    fn sender(&self, stream: u32) -> Option<&RefCell<Sender>> {
        self.senders.get(usize::try_from(stream).ok()?)
    }
}

pub(crate) async fn run(mode: &str, flow: Flow, ends: Ends) -> Result<()> {
    flow.target.check()?;
    ensure!(ends.senders > 0 && ends.receivers > 0 && flow.window > 0, "senders, receivers and window are positive");
    let mut outcome = Outcome::new(mode);
    outcome.set_memory("before", flow.target.memory()?);
    let connecting = Instant::now();
    let (senders, receivers) = connect(&flow, ends).await?;
    let connections = f64::from(ends.senders) + f64::from(ends.receivers);
    outcome.set("connected_per_s", connections / connecting.elapsed().as_secs_f64());
    let shared = Rc::new(Shared {
        target: flow.target.clone(),
        ends,
        began: Instant::now(),
        window: flow.rate.is_none().then_some(usize::from(flow.window)),
        sending: Cell::new(true),
        measuring_since_us: Cell::new(None),
        faults: RefCell::default(),
        acknowledged: Tally::new()?,
        delivered: Tally::new()?,
        late: RefCell::new(Latencies::new()?),
        senders,
        receivers,
    });

    let mut running = JoinSet::new();
    for nth in 0..shared.receivers.len() {
        let shared = Rc::clone(&shared);
        running.spawn_local(async move {
            std::future::poll_fn(|cx| shared.receivers[nth].borrow_mut().poll(cx, &shared)).await
        });
    }
    for nth in 0..shared.senders.len() {
        let shared = Rc::clone(&shared);
        running.spawn_local(async move {
            std::future::poll_fn(|cx| shared.senders[nth].borrow_mut().poll(cx, &shared)).await
        });
    }
    if let Some(rate) = flow.rate {
        running.spawn_local(send_when_due(Rc::clone(&shared), rate));
    }
    tokio::select! {
        measured = measure(&flow, &shared, &mut outcome) => measured?,
        // None ends by itself: one has failed.
        Some(ended) = running.join_next() => ended??,
    }
    drain(&shared, &mut running).await?;
    running.abort_all();
    report(&flow, &shared, outcome)
}

fn report(flow: &Flow, shared: &Shared, mut outcome: Outcome) -> Result<()> {
    outcome.set("senders", f64::from(shared.ends.senders));
    outcome.set("receivers", f64::from(shared.ends.receivers));
    outcome.set_latencies("puback", shared.acknowledged.latencies.borrow().distribution());
    outcome.set_latencies("delivery", shared.delivered.latencies.borrow().distribution());
    outcome.series.insert("delivered".to_owned(), shared.delivered.series.borrow().clone());
    if flow.rate.is_some() {
        outcome.set_latencies("sent_late", shared.late.borrow().distribution());
    }
    outcome.faults = *shared.faults.borrow();
    let delivery = &outcome.latencies["delivery"];
    let mut summary = format!(
        "{} delivered/s, p50 {}, p99 {}",
        rounded(outcome.figure("delivered_per_s").unwrap_or_default()),
        time(delivery.p50_us as f64),
        time(delivery.p99_us as f64),
    );
    for who in ["server", "generator"] {
        if let Some(us) = outcome.figure(&format!("{who}_cpu_us_per_message")) {
            summary += &format!(", {who} {} µs/message", rounded(us));
        }
    }
    outcome.write(&flow.output, &summary)
}

async fn measure(flow: &Flow, shared: &Shared, outcome: &mut Outcome) -> Result<()> {
    Progress::wait("warming up", Duration::from_secs(flow.warmup_seconds)).await;
    let work = Work::now(&flow.target)?;
    let began = Instant::now();
    shared.measuring_since_us.set(Some(shared.now_us()));
    Progress::wait("measuring", Duration::from_secs(flow.seconds)).await;
    shared.measuring_since_us.set(None);
    let seconds = began.elapsed().as_secs_f64();
    let delivered = shared.delivered.count.get();
    work.since(&flow.target, delivered, outcome)?;
    outcome.set_memory("after", flow.target.memory()?);
    outcome.set("acknowledged_per_s", shared.acknowledged.count.get() as f64 / seconds);
    outcome.set("delivered_per_s", delivered as f64 / seconds);
    outcome.set("seconds", seconds);
    Ok(())
}

/// Sends no more, and waits for what is under way.
async fn drain(shared: &Shared, running: &mut JoinSet<Result<()>>) -> Result<()> {
    shared.sending.set(false);
    let by = Instant::now() + DRAIN;
    while Instant::now() < by && !shared.senders.iter().all(|sender| sender.borrow().is_drained()) {
        tokio::select! {
            Some(ended) = running.join_next() => ended??,
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    let mut faults = shared.faults.borrow_mut();
    for sender in &shared.senders {
        let sender = sender.borrow();
        faults.lost += sender.sent - sender.received.last();
        faults.unacknowledged += sender.outgoing.under_way() as u64;
    }
    Ok(())
}

async fn connect(flow: &Flow, ends: Ends) -> Result<(Vec<RefCell<Sender>>, Vec<RefCell<Receiver>>)> {
    let run = Run::new()?;
    let target = Rc::new(flow.target.clone());
    let dialer = Rc::new(target.dialer()?);
    let receivers = crowd::open("connecting receivers", ends.receivers, CONNECTING, |nth| {
        let (target, dialer, to) = (Rc::clone(&target), Rc::clone(&dialer), run.name("r", nth));
        async move {
            let (client, _) = target.receiver(&dialer, nth, &to, Session::Clean).await?;
            Ok(RefCell::new(Receiver { nth, client, touched: Vec::new() }))
        }
    })
    .await?;
    let slots = if flow.rate.is_some() { OPEN_WINDOW } else { flow.window.saturating_mul(2) };
    let senders = crowd::open("connecting senders", ends.senders, CONNECTING, |nth| {
        let (from, to) = (run.name("s", nth), run.name("r", nth % ends.receivers));
        let (target, dialer) = (Rc::clone(&target), Rc::clone(&dialer));
        async move {
            Ok(RefCell::new(Sender {
                nth,
                topic: target.topic(&from, &to),
                client: target.sender(&dialer, ends.receivers + nth, &from).await?,
                sent: 0,
                outgoing: Outgoing::new(slots),
                received: Received::new(Seqs::Consecutive),
                waiting_us: VecDeque::new(),
                text: Vec::new(),
                waker: None,
            }))
        }
    })
    .await?;
    Ok((senders, receivers))
}

/// Messages that are due in turn, of all senders.
async fn send_when_due(shared: Rc<Shared>, rate: f64) -> Result<()> {
    let mut pacer = Pacer::new(shared.began, rate)?;
    for sender in shared.senders.iter().cycle() {
        let due_us = pacer.due_us().await?;
        if !shared.sending.get() {
            break;
        }
        let mut sender = sender.borrow_mut();
        sender.waiting_us.push_back(due_us);
        sender.go_on(&shared)?;
    }
    std::future::pending().await
}

struct Sender {
    nth: u32,
    topic: String,
    client: Client,
    sent: u64,
    outgoing: Outgoing,
    /// What its receiver has had of it.
    received: Received,
    /// When those were due that could not be sent yet: too many are under way.
    waiting_us: VecDeque<u64>,
    text: Vec<u8>,
    /// Of the task that polls it.
    waker: Option<Waker>,
}

impl Sender {
    fn is_drained(&self) -> bool {
        self.outgoing.under_way() == 0 && self.received.last() == self.sent
    }

    /// Ready only if something fails.
    fn poll(&mut self, cx: &mut TaskContext<'_>, shared: &Shared) -> Poll<Result<()>> {
        if self.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        loop {
            self.fill(shared)?;
            self.client.poll_flush(cx)?;
            let mut now_us = None;
            let outgoing = &mut self.outgoing;
            let polled = self.client.poll_receive(cx, |packet, _| {
                if let Packet::Puback { packet_id } = packet {
                    match outgoing.acknowledged(packet_id) {
                        Some(due_us) => {
                            let now_us = *now_us.get_or_insert_with(|| shared.now_us());
                            shared.count(&shared.acknowledged, due_us, now_us);
                        }
                        None => shared.faults.borrow_mut().stray_acknowledgements += 1,
                    }
                }
                Ok(())
            });
            std::task::ready!(polled)?;
        }
    }

    /// Sends what may be sent now, from outside its task.
    fn go_on(&mut self, shared: &Shared) -> Result<()> {
        self.fill(shared)?;
        self.client.flush()?;
        if !self.client.is_flushed() {
            self.waker.iter().for_each(Waker::wake_by_ref);
        }
        Ok(())
    }

    fn fill(&mut self, shared: &Shared) -> Result<()> {
        match shared.window {
            Some(window) => {
                while shared.sending.get() {
                    let undelivered = self.sent - self.received.last();
                    let is_full = self.outgoing.under_way() >= window || undelivered >= window as u64;
                    if is_full || !self.send(shared.now_us(), shared)? {
                        break;
                    }
                }
            }
            None => {
                while let Some(due_us) = self.waiting_us.front().copied() {
                    if !self.send(due_us, shared)? {
                        break;
                    }
                    if shared.measuring_since_us.get().is_some() {
                        shared.late.borrow_mut().record(shared.now_us().saturating_sub(due_us));
                    }
                    self.waiting_us.pop_front();
                }
            }
        }
        Ok(())
    }

    /// Whether there was a packet identifier for it.
    fn send(&mut self, due_us: u64, shared: &Shared) -> Result<bool> {
        let Some(packet_id) = self.outgoing.begin(due_us) else { return Ok(false) };
        self.sent += 1;
        let Target { bytes, version, .. } = shared.target;
        Stamp { stream: self.nth, counter: self.sent, due_us }.write(&mut self.text, bytes);
        mqtt::publish(&mut self.client.out, version, &self.topic, packet_id, &self.text)?;
        Ok(true)
    }
}

struct Receiver {
    nth: u32,
    client: Client,
    /// Senders that may send more, as something of theirs came.
    touched: Vec<u32>,
}

impl Receiver {
    /// Ready only if something fails.
    fn poll(&mut self, cx: &mut TaskContext<'_>, shared: &Shared) -> Poll<Result<()>> {
        let Self { nth, client, touched } = self;
        let receivers = shared.ends.receivers;
        loop {
            let mut now_us = None;
            let polled = client.poll_receive(cx, |packet, out| {
                let Packet::Publish { qos, again, packet_id, payload, .. } = packet else { return Ok(()) };
                let acknowledge = |out: &mut Vec<u8>| {
                    if qos > 0 {
                        mqtt::puback(out, packet_id);
                    }
                };
                let faults = &mut *shared.faults.borrow_mut();
                let Ok(message) = Message::read(payload, shared.target.payload) else {
                    faults.unreadable += 1;
                    acknowledge(out);
                    return Ok(());
                };
                let stream = message.stamp.stream;
                let is_mine = stream % receivers == *nth;
                let Some(sender) = shared.sender(stream).filter(|_| is_mine) else {
                    faults.strays += 1;
                    acknowledge(out);
                    return Ok(());
                };
                let judged = sender.borrow_mut().received.take(&message, again, faults);
                // What came twice was acknowledged: once more, and it would be an acknowledgement of nothing, which may end the connection.
                if !matches!(judged, Judged::Fault) {
                    acknowledge(out);
                }
                if let Judged::New(stamp) = judged {
                    let now_us = *now_us.get_or_insert_with(|| shared.now_us());
                    shared.count(&shared.delivered, stamp.due_us, now_us);
                    if shared.window.is_some() && touched.last() != Some(&stream) {
                        touched.push(stream);
                    }
                }
                Ok(())
            });
            client.poll_flush(cx)?;
            for stream in touched.drain(..) {
                if let Some(sender) = shared.sender(stream) {
                    sender.borrow_mut().go_on(shared)?;
                }
            }
            std::task::ready!(polled)?;
        }
    }
}
