//! A day of a messenger in some minutes: many users who are mostly idle, write to a few friends in bursts, read what they get, leave,
//! are cut off, and come back.
//!
//! Users stand in a ring and have those beside them as friends. Bursts are heavy-tailed: most are a message or two, few are long. Nobody
//! leaves with a publish unacknowledged, so whatever comes twice was sent twice by the broker.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::crowd;
use crate::measure::{Latencies, Series};
use crate::mqtt::{self, Packet, Session};
use crate::outcome::{Outcome, Output, Work};
use crate::outgoing::Outgoing;
use crate::pacer::Alarm;
use crate::plot::time;
use crate::progress::Progress;
use crate::target::{CONNECTING, Run, Target};
use crate::verify::{Faults, Judged, Message, Payload, Received, Seqs, Stamp, behind};
use crate::wire::Dialer;

/// Where friends stand in the ring; each has its opposite beside it.
const FRIENDS: [i64; 6] = [1, -1, 2, -2, 7, -7];
/// The longest burst, and how heavy its tail is: a burst of k or more messages is one of k to the power of this.
const BURST_MAX: u32 = 50;
const BURST_TAIL: f64 = 1.2;
/// Between two messages of a burst.
const TYPING_US: std::ops::Range<u64> = 300_000..3_000_000;
/// From a message to its read receipt.
const READING_US: u64 = 500_000;
/// Messages of a user that are not acknowledged.
const WINDOW: u16 = 64;
const RETRY: Duration = Duration::from_millis(200);
/// How long what is under way may take at the end.
const DRAIN: Duration = Duration::from_secs(60);

/// A day of a messenger in some minutes: idle users, bursts, receipts, comings and goings.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
    #[arg(long, default_value_t = 1_000)]
    users: u32,
    /// Messages a second of all users together, on the average.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// How long a user is there, on the average, until they leave or are cut off.
    #[arg(long, default_value_t = 60.0)]
    there_s: f64,
    /// How long a user stays away, on the average.
    #[arg(long, default_value_t = 20.0)]
    away_s: f64,
    /// Where a user says up to which seq it has read; empty: nowhere.
    #[arg(long, default_value = "chat/{me}/read/{peer}")]
    read_topic: String,
    /// Where a user hears what others have read; empty: nowhere.
    #[arg(long, default_value = "chat/{me}/event/receipt")]
    receipt_filter: String,
    /// Repeats who does what and when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What a user does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    Write,
    Read { friend: usize },
    Leave,
    Return,
}

struct Shared {
    options: Options,
    dialer: Dialer,
    run: Run,
    began: Instant,
    users: Vec<RefCell<User>>,
    random: RefCell<fastrand::Rng>,
    /// Who does what next, by time in microseconds.
    agenda: RefCell<BinaryHeap<Reverse<(u64, u32, Deed)>>>,
    /// Whether they write, and leave.
    lively: Cell<bool>,
    faults: RefCell<Faults>,
    sent: Cell<u64>,
    delivered: Cell<u64>,
    caught_up: Cell<u64>,
    redelivered: Cell<u64>,
    returns: Cell<u64>,
    reads: Cell<u64>,
    receipts: Cell<u64>,
    to_puback: RefCell<Latencies>,
    to_delivery: RefCell<Latencies>,
    series: RefCell<Series>,
}

struct User {
    nth: u32,
    client: Option<Client>,
    /// Whether it goes, or has gone, by its own will.
    is_leaving: bool,
    there_since_us: u64,
    outgoing: Outgoing,
    /// What is said to each friend, and what each friend says to it; whether it is to be read.
    sent: [u64; FRIENDS.len()],
    received: [Received; FRIENDS.len()],
    is_unread: [bool; FRIENDS.len()],
    /// Up to which seq each friend has read.
    told_read: [u64; FRIENDS.len()],
    burst: Option<(usize, u32)>,
    text: Vec<u8>,
    waker: Option<Waker>,
}

impl User {
    fn new(nth: u32, client: Client) -> Self {
        Self {
            nth,
            client: Some(client),
            is_leaving: false,
            there_since_us: 0,
            outgoing: Outgoing::new(WINDOW),
            sent: Default::default(),
            received: std::array::from_fn(|_| Received::new(Seqs::Growing)),
            is_unread: Default::default(),
            told_read: Default::default(),
            burst: None,
            text: Vec::new(),
            waker: None,
        }
    }
}

/// Who stands there in the ring.
fn friend_of(nth: u32, friend: usize, users: u32) -> u32 {
    let at = (i64::from(nth) + FRIENDS[friend]).rem_euclid(i64::from(users));
    u32::try_from(at).unwrap_or_default()
}

fn stream(nth: u32, friend: usize) -> u32 {
    nth * 6 + u32::try_from(friend).unwrap_or_default()
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn name(&self, nth: u32) -> String {
        self.run.name("u", nth)
    }

    fn user(&self, nth: u32) -> &RefCell<User> {
        &self.users[nth as usize]
    }

    fn plan(&self, at_us: u64, nth: u32, deed: Deed) {
        self.agenda.borrow_mut().push(Reverse((at_us, nth, deed)));
    }

    /// A time that is as likely to come in any moment as in any other.
    fn some_us(&self, mean_s: f64) -> u64 {
        let uniform = self.random.borrow_mut().f64().max(1e-9);
        micros(-uniform.ln() * mean_s)
    }

    /// How long a user is silent between bursts, so that all together come to the rate.
    fn silence_s(&self) -> f64 {
        let burst: f64 = (1..=BURST_MAX).map(|length| f64::from(length).powf(-BURST_TAIL)).sum();
        let Options { users, rate, there_s, away_s, .. } = &self.options;
        let there = there_s / (there_s + away_s);
        let typing_s = (TYPING_US.start + TYPING_US.end) as f64 / 2e6;
        (burst * f64::from(*users) * there / rate - (burst - 1.0) * typing_s).max(0.01)
    }

    fn burst_length(&self) -> u32 {
        let uniform = self.random.borrow_mut().f64().max(1e-9);
        let length = uniform.powf(-1.0 / BURST_TAIL).floor();
        (1..=BURST_MAX).rev().find(|most| f64::from(*most) <= length).unwrap_or(1)
    }

    async fn connect(&self, nth: u32) -> Result<(Client, bool)> {
        let Options { target, receipt_filter, .. } = &self.options;
        let me = self.name(nth);
        let login = target.login(&me);
        let (mut client, remembered) =
            Client::connect(&self.dialer, nth, target.version, &login, Session::Persistent).await?;
        if !remembered {
            let (inbox, receipts) = (target.filter(&me), receipt_filter.replace("{me}", &me));
            let mut filters = vec![inbox.as_str()];
            if !receipts.is_empty() {
                filters.push(&receipts);
            }
            client.subscribe(&filters).await?;
        }
        Ok((client, remembered))
    }

    /// What comes to a user. Ready when the connection is gone.
    fn poll(&self, user: &mut User, cx: &mut TaskContext<'_>) -> Poll<()> {
        user.waker = Some(cx.waker().clone());
        let Some(mut client) = user.client.take() else { return Poll::Ready(()) };
        loop {
            let polled = client.poll_receive(cx, |packet, out| {
                match packet {
                    Packet::Puback { packet_id } => self.acknowledged(user, packet_id),
                    Packet::Publish { qos, again, packet_id, topic, payload } => {
                        if qos > 0 {
                            mqtt::puback(out, packet_id);
                        }
                        let receipts = self.options.receipt_filter.rsplit('}').next().unwrap_or_default();
                        if !receipts.is_empty() && topic.ends_with(receipts.as_bytes()) {
                            self.receipt(user, payload);
                        } else {
                            self.message(user, payload, again);
                        }
                    }
                    _ => {}
                }
                Ok(())
            });
            match (polled, client.poll_flush(cx)) {
                (Poll::Ready(Ok(())), Ok(())) => {}
                (Poll::Pending, Ok(())) => {
                    user.client = Some(client);
                    return Poll::Pending;
                }
                _ => {
                    self.faults.borrow_mut().connections_lost += 1;
                    return Poll::Ready(());
                }
            }
        }
    }

    fn acknowledged(&self, user: &mut User, packet_id: u16) {
        match user.outgoing.acknowledged(packet_id) {
            // Read receipts have no time.
            Some(0) => {}
            Some(due_us) => self.to_puback.borrow_mut().record(self.now_us().saturating_sub(due_us)),
            None => self.faults.borrow_mut().stray_acknowledgements += 1,
        }
    }

    fn message(&self, user: &mut User, payload: &[u8], again: bool) {
        let faults = &mut *self.faults.borrow_mut();
        let Ok(message) = Message::read(payload, self.options.target.payload) else {
            faults.unreadable += 1;
            return;
        };
        let stream = message.stamp.stream;
        let (from, friend) = (stream / 6, (stream % 6) as usize);
        if from >= self.options.users || friend_of(from, friend, self.options.users) != user.nth {
            faults.strays += 1;
            return;
        }
        match user.received[friend].take(&message, again, faults) {
            Judged::New(stamp) => {
                let now_us = self.now_us();
                self.delivered.set(self.delivered.get() + 1);
                self.series.borrow_mut().add(now_us);
                if stamp.due_us >= user.there_since_us {
                    self.to_delivery.borrow_mut().record(now_us.saturating_sub(stamp.due_us));
                } else {
                    self.caught_up.set(self.caught_up.get() + 1);
                }
                if !self.options.read_topic.is_empty() && !std::mem::replace(&mut user.is_unread[friend], true) {
                    self.plan(now_us + READING_US, user.nth, Deed::Read { friend });
                }
            }
            Judged::Redelivered => self.redelivered.set(self.redelivered.get() + 1),
            Judged::Fault => {}
        }
    }

    /// What somebody has read of what was written to them.
    fn receipt(&self, user: &mut User, payload: &[u8]) {
        self.receipts.set(self.receipts.get() + 1);
        let is_with = |friend: &usize| {
            let name = self.name(friend_of(user.nth, *friend, self.options.users));
            behind(payload, format!("\"with\":\"{name}\"").as_bytes()).is_ok()
        };
        let friend = (0..FRIENDS.len()).find(is_with);
        let read = behind(payload, b"\"read\":").ok().and_then(|rest| {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            std::str::from_utf8(&rest[..digits]).ok()?.parse::<u64>().ok()
        });
        match friend.zip(read) {
            Some((friend, read)) if read >= user.told_read[friend] => user.told_read[friend] = read,
            _ => self.faults.borrow_mut().receipts += 1,
        }
    }

    /// Whether there was a client and a packet identifier for it.
    fn publish(&self, user: &mut User, topic: &str, due_us: u64, text: &[u8]) -> Result<bool> {
        let Some(client) = &mut user.client else { return Ok(false) };
        let Some(packet_id) = user.outgoing.begin(due_us) else { return Ok(false) };
        mqtt::publish(&mut client.out, self.options.target.version, topic, packet_id, text)?;
        // If it cannot be written the user's task sees why.
        if client.flush().is_err() || !client.is_flushed() {
            user.waker.iter().for_each(Waker::wake_by_ref);
        }
        Ok(true)
    }

    fn write(&self, user: &mut User, friend: usize, due_us: u64) -> Result<bool> {
        let (from, to) = (self.name(user.nth), self.name(friend_of(user.nth, friend, self.options.users)));
        let topic = self.options.target.topic(&from, &to);
        let counter = user.sent[friend] + 1;
        let mut text = std::mem::take(&mut user.text);
        let stream = stream(user.nth, friend);
        Stamp { stream, counter, due_us }.write(&mut text, self.options.target.bytes);
        let is_sent = self.publish(user, &topic, due_us, &text)?;
        user.text = text;
        if is_sent {
            user.sent[friend] = counter;
            self.sent.set(self.sent.get() + 1);
        }
        Ok(is_sent)
    }

    fn read(&self, user: &mut User, friend: usize) -> Result<bool> {
        let (me, peer) = (self.name(user.nth), self.name(friend_of(user.nth, friend ^ 1, self.options.users)));
        let topic = self.options.read_topic.replace("{me}", &me).replace("{peer}", &peer);
        let seq = user.received[friend].last_seq().to_string();
        let is_sent = self.publish(user, &topic, 0, seq.as_bytes())?;
        if is_sent {
            user.is_unread[friend] = false;
            self.reads.set(self.reads.get() + 1);
        }
        Ok(is_sent)
    }

    fn carry_out(&self, at_us: u64, nth: u32, deed: Deed) -> Result<()> {
        let user = &mut *self.user(nth).borrow_mut();
        let soon_us = self.now_us() + 50_000;
        match deed {
            Deed::Write if self.lively.get() && user.client.is_some() => {
                let (friend, rest) = match user.burst {
                    Some(burst) => burst,
                    None => {
                        let friend = self.random.borrow_mut().usize(..FRIENDS.len());
                        (friend, self.burst_length())
                    }
                };
                if !self.write(user, friend, at_us)? {
                    // It counts from when it is sent: the user waits for the broker.
                    self.plan(soon_us, nth, deed);
                    return Ok(());
                }
                user.burst = (rest > 1).then_some((friend, rest - 1));
                let pause_us = match user.burst {
                    Some(_) => self.random.borrow_mut().u64(TYPING_US),
                    None => self.some_us(self.silence_s()),
                };
                self.plan(at_us + pause_us, nth, Deed::Write);
            }
            // Who is away reads when they are back.
            Deed::Read { friend } if user.client.is_some() && !self.read(user, friend)? => {
                self.plan(soon_us, nth, deed);
            }
            Deed::Leave if self.lively.get() => {
                if user.outgoing.under_way() > 0 {
                    self.plan(soon_us, nth, deed);
                } else if let Some(client) = user.client.take() {
                    user.is_leaving = true;
                    user.burst = None;
                    if self.random.borrow_mut().bool() {
                        client.leave()?
                    } else {
                        client.cut()?
                    }
                    user.waker.iter().for_each(Waker::wake_by_ref);
                    self.plan(at_us + self.some_us(self.options.away_s), nth, Deed::Return);
                }
            }
            Deed::Return => {
                user.is_leaving = false;
                user.waker.iter().for_each(Waker::wake_by_ref);
            }
            _ => {}
        }
        Ok(())
    }

    /// Plans what somebody does who has just come.
    fn greet(&self, user: &mut User) {
        let now_us = self.now_us();
        user.there_since_us = now_us;
        self.plan(now_us + self.some_us(self.silence_s()), user.nth, Deed::Write);
        self.plan(now_us + self.some_us(self.options.there_s), user.nth, Deed::Leave);
        for friend in (0..FRIENDS.len()).filter(|friend| user.is_unread[*friend]) {
            self.plan(now_us + READING_US, user.nth, Deed::Read { friend });
        }
    }
}

/// A user's connections, one after the other.
async fn live(shared: Rc<Shared>, nth: u32) -> Result<()> {
    loop {
        std::future::poll_fn(|cx| shared.poll(&mut shared.user(nth).borrow_mut(), cx)).await;
        // Until its return.
        std::future::poll_fn(|cx| {
            let user = &mut *shared.user(nth).borrow_mut();
            user.waker = Some(cx.waker().clone());
            if user.is_leaving { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        let (client, remembered) = loop {
            match shared.connect(nth).await {
                Ok(back) => break back,
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        shared.faults.borrow_mut().sessions_lost += u64::from(!remembered);
        shared.returns.set(shared.returns.get() + 1);
        let user = &mut *shared.user(nth).borrow_mut();
        user.client = Some(client);
        user.received.iter_mut().for_each(Received::reconnected);
        shared.greet(user);
    }
}

async fn follow_agenda(shared: Rc<Shared>) -> Result<()> {
    // What is planned meanwhile is at least so far away.
    const LOOK_US: u64 = 1_000;
    let alarm = Alarm::new(shared.began)?;
    loop {
        let next = shared.agenda.borrow().peek().map(|Reverse(next)| *next);
        let now_us = shared.now_us();
        match next {
            Some((at_us, nth, deed)) if at_us <= now_us => {
                shared.agenda.borrow_mut().pop();
                shared.carry_out(at_us, nth, deed)?;
            }
            Some((at_us, ..)) => alarm.at_us(at_us.min(now_us + LOOK_US)).await?,
            None => alarm.at_us(now_us + LOOK_US).await?,
        }
    }
}

pub(crate) async fn run(options: Options) -> Result<()> {
    options.target.check()?;
    ensure!(options.users > 14, "15 users or more: each has six friends");
    ensure!(options.rate > 0.0 && options.there_s > 0.0 && options.away_s >= 0.0, "rate and times are positive");
    let has_receipts = !options.read_topic.is_empty() && !options.receipt_filter.is_empty();
    ensure!(!has_receipts || options.target.payload == Payload::Envelope, "a seq to read is in envelopes only");
    let mut outcome = Outcome::new("mixed");
    outcome.set_memory("before", options.target.memory()?);
    let count = options.users;
    let mut shared = Shared {
        dialer: options.target.dialer()?,
        run: Run::new()?,
        began: Instant::now(),
        users: Vec::new(),
        random: RefCell::new(fastrand::Rng::with_seed(options.seed)),
        agenda: RefCell::default(),
        lively: Cell::new(true),
        faults: RefCell::default(),
        sent: Cell::new(0),
        delivered: Cell::new(0),
        caught_up: Cell::new(0),
        redelivered: Cell::new(0),
        returns: Cell::new(0),
        reads: Cell::new(0),
        receipts: Cell::new(0),
        to_puback: RefCell::new(Latencies::new()?),
        to_delivery: RefCell::new(Latencies::new()?),
        series: RefCell::new(Series::new()),
        options,
    };
    let connector = Rc::new(shared);
    let clients = crowd::open("connecting", count, CONNECTING, |nth| {
        let connector = Rc::clone(&connector);
        async move { Ok(connector.connect(nth).await?.0) }
    })
    .await?;
    shared = Rc::into_inner(connector).context("somebody still connects")?;
    shared.users = (0..).zip(clients).map(|(nth, client)| RefCell::new(User::new(nth, client))).collect();
    shared.began = Instant::now();
    let shared = Rc::new(shared);
    let mut running: JoinSet<Result<()>> = JoinSet::new();
    for nth in 0..count {
        shared.greet(&mut shared.user(nth).borrow_mut());
        running.spawn_local(live(Rc::clone(&shared), nth));
    }
    running.spawn_local(follow_agenda(Rc::clone(&shared)));
    tokio::select! {
        ended = day(&shared, has_receipts, &mut outcome) => ended?,
        // None ends by itself: one has failed.
        Some(ended) = running.join_next() => ended??,
    }
    running.abort_all();
    judge(&shared, &mut outcome);
    report(&shared, outcome)
}

async fn day(shared: &Shared, has_receipts: bool, outcome: &mut Outcome) -> Result<()> {
    let work = Work::now(&shared.options.target)?;
    Progress::wait("a day", Duration::from_secs(shared.options.seconds)).await;
    let delivered = shared.delivered.get();
    work.since(&shared.options.target, delivered.max(1), outcome)?;
    outcome.set("delivered_per_s", delivered as f64 / shared.began.elapsed().as_secs_f64());
    outcome.set_memory("after", shared.options.target.memory()?);

    // Everybody comes home, and says one more thing that has to be read: all that was ever said has to be there.
    shared.lively.set(false);
    for user in &shared.users {
        let nth = user.borrow().nth;
        if user.borrow().is_leaving {
            shared.plan(shared.now_us(), nth, Deed::Return);
        }
    }
    let by = Instant::now() + DRAIN;
    let until = async |is_so: &dyn Fn(&User) -> bool| {
        while Instant::now() < by && !shared.users.iter().all(|user| is_so(&user.borrow())) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let is_heard = |user: &User| {
        (0..FRIENDS.len()).all(|friend| {
            let to = friend_of(user.nth, friend, shared.options.users);
            // What somebody writes to themselves is not: they have no such friend.
            shared.users[to as usize].try_borrow().is_ok_and(|to| to.received[friend].last() == user.sent[friend])
        })
    };
    until(&|user| user.client.is_some()).await;
    until(&is_heard).await;
    for user in &shared.users {
        let user = &mut *user.borrow_mut();
        let now_us = shared.now_us();
        shared.write(user, 0, now_us)?;
    }
    until(&|user| is_heard(user) && user.outgoing.under_way() == 0).await;
    if has_receipts {
        until(&|user| is_read(shared, user)).await;
    }
    Ok(())
}

/// Whether the user knows that the last thing it said was read.
fn is_read(shared: &Shared, user: &User) -> bool {
    let to = friend_of(user.nth, 0, shared.options.users);
    user.told_read[0] >= shared.users[to as usize].borrow().received[0].last_seq()
}

fn judge(shared: &Shared, outcome: &mut Outcome) {
    let mut faults = *shared.faults.borrow();
    let has_receipts = !shared.options.read_topic.is_empty() && !shared.options.receipt_filter.is_empty();
    for user in &shared.users {
        let user = user.borrow();
        for friend in 0..FRIENDS.len() {
            let to = shared.user(friend_of(user.nth, friend, shared.options.users)).borrow();
            faults.lost += user.sent[friend] - to.received[friend].last();
        }
        faults.unacknowledged += user.outgoing.under_way() as u64;
        faults.receipts += u64::from(has_receipts && !is_read(shared, &user));
    }
    outcome.faults = faults;
}

fn report(shared: &Shared, mut outcome: Outcome) -> Result<()> {
    outcome.set("users", f64::from(shared.options.users));
    outcome.set("sent", shared.sent.get() as f64);
    outcome.set("caught_up", shared.caught_up.get() as f64);
    outcome.set("returns", shared.returns.get() as f64);
    outcome.set("reads", shared.reads.get() as f64);
    outcome.set("receipts", shared.receipts.get() as f64);
    outcome.redelivered = shared.redelivered.get();
    outcome.set_latencies("puback", shared.to_puback.borrow().distribution());
    outcome.set_latencies("delivery", shared.to_delivery.borrow().distribution());
    outcome.series.insert("delivered".to_owned(), shared.series.borrow().clone());
    let delivery = &outcome.latencies["delivery"];
    let summary = format!(
        "{} sent, {} of them to those who were away, {} returns, {} receipts, p50 {}, p99 {}",
        shared.sent.get(),
        shared.caught_up.get(),
        shared.returns.get(),
        shared.receipts.get(),
        time(delivery.p50_us as f64),
        time(delivery.p99_us as f64)
    );
    outcome.write(&shared.options.output, &summary)
}

/// Microseconds, without their fraction.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time in a run is far from the limits")]
fn micros(seconds: f64) -> u64 {
    (seconds * 1e6) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn friendship_is_mutual() {
        for nth in 0..20 {
            for friend in 0..FRIENDS.len() {
                let to = friend_of(nth, friend, 20);
                assert_ne!(to, nth);
                assert_eq!(friend_of(to, friend ^ 1, 20), nth);
            }
        }
    }

    #[test]
    fn streams_are_told_apart() {
        let all: std::collections::BTreeSet<u32> =
            (0..50).flat_map(|nth| (0..FRIENDS.len()).map(move |friend| stream(nth, friend))).collect();
        assert_eq!(all.len(), 300);
    }
}
