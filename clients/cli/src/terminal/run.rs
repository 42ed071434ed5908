//! Brings keys, events and answers to the model, and does what it says; the only file here that touches the terminal, the network and the clock.
//!
//! Invariants: the terminal is given back as it was, however this ends (end, error, panic, SIGTERM, SIGHUP) and while it is stopped; a delivery is acknowledged
//! after the model has it; messages reach the outbox in the order in which they were written.

use std::collections::HashSet;
use std::io::stdout;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use chat_client::{
    Change, Client, Closed, ConnectionState, Event, Events, MessageId, Options, Outbox, OutboxError, SendError,
    TypingState, Unsent, UserId,
};
use crossterm::cursor::{MoveTo, Show};
use crossterm::event::{
    DisableBracketedPaste, DisableFocusChange, DisableMouseCapture, EnableBracketedPaste, EnableFocusChange,
    Event as TerminalEvent, EventStream, KeyCode, KeyEvent, KeyModifiers,
};
use crossterm::style::Print;
use crossterm::terminal::{
    BeginSynchronizedUpdate, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode,
};
use crossterm::{execute, queue};
use futures_util::StreamExt;
use jiff::tz::TimeZone;
use ratatui::DefaultTerminal;
use ratatui::backend::CrosstermBackend;
use rustix::process::{getpid, getsid, kill_current_process_group};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Now;
use super::drafts::DraftsFile;
use super::model::{App, Effect, Input, OUTGOING_MAX};
use super::repaint::Repaint;
use super::view;

/// Orders to the courier that wait: as many as there can be messages.
const ORDERS_MAX: usize = OUTGOING_MAX + 64;
/// What the courier has to tell.
const NEWS_MAX: usize = 256;
/// How long the outbox may take at the end.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that are taken in before the screen is drawn again.
const BATCH_MAX: usize = 256;
/// How long the terminal is left as it is in the hope for a first word of the server.
const FIRST_WORD_TIMEOUT: Duration = Duration::from_millis(300);
/// How long whoever can stop this may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(300);
/// Tell of buttons and the wheel, by SGR's rules. (Movements would come by the hundred, and nobody wants to know.)
const TELL_OF_BUTTONS: &str = "\x1b[?1000h\x1b[?1006h";

/// Opens the chat, and returns when the user quits. What waits in the outbox is shown from the beginning; drafts are kept in that file.
///
/// # Errors
/// If there is no terminal, it is lost, or there is no connection and will be none for a reason that more tries do not help ([`Closed`]).
pub(crate) async fn run(options: Options, mut outbox: impl Outbox, drafts: &Path) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let waiting = outbox.load()?;
    let drafts = DraftsFile::open(drafts).with_context(|| drafts.display().to_string())?;
    let (left, has_left) = mpsc::channel(waiting.len().max(1));
    let ids = waiting.iter().map(|unsent| unsent.id.clone()).collect();
    let outbox = Loaded { outbox, waiting: waiting.clone(), ids, left };
    let (client, mut events) = Client::start(options.outbox(outbox)).await?;
    let outcome = match tokio::time::timeout(FIRST_WORD_TIMEOUT, events.next()).await {
        Ok(Some(Event::Connection(ConnectionState::Closed(closed)))) => Err(closed.into()),
        first => {
            let restore = Restore::new();
            let mut terminal = enter().context("this needs a terminal")?;
            let size = terminal.size()?;
            let mut app =
                App::new(client.user().clone(), zone(), (size.width, size.height), waiting, drafts.kept(), now());
            let mut work = Work::new(client.clone(), has_left, drafts);
            let first = first.ok().flatten();
            let outcome = chat(&mut terminal, &mut app, first, &mut events, &mut work, &mut signals).await;
            drop(restore);
            let kept = work.drafts.keep(app.drafts()).context("drafts are not kept");
            work.finish().await;
            outcome.and(kept)
        }
    };
    client.close().await;
    // The outbox is free now.
    while events.next().await.is_some() {}
    outcome
}

/// An outbox that was read already: it may be read once. Tells what has left it of what was in it then.
struct Loaded<T> {
    outbox: T,
    waiting: Vec<Unsent>,
    ids: HashSet<MessageId>,
    left: mpsc::Sender<MessageId>,
}

impl<T: Outbox> Outbox for Loaded<T> {
    fn load(&mut self) -> Result<Vec<Unsent>, OutboxError> {
        Ok(std::mem::take(&mut self.waiting))
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), OutboxError> {
        self.outbox.apply(changes)?;
        for change in changes {
            if let Change::Remove { id, .. } = change
                && self.ids.remove(id)
            {
                // There is room for all of them; whoever has quit does not care.
                drop(self.left.try_send(id.clone()));
            }
        }
        Ok(())
    }
}

/// Takes the terminal.
fn enter() -> std::io::Result<DefaultTerminal> {
    enable_raw_mode()?;
    let tell = Print(TELL_OF_BUTTONS);
    execute!(stdout(), EnterAlternateScreen, EnableBracketedPaste, tell, EnableFocusChange)?;
    DefaultTerminal::new(CrosstermBackend::new(stdout()))
}

/// Gives the terminal back. If it is gone, there is nobody left to tell.
fn leave() {
    drop(execute!(
        stdout(),
        EndSynchronizedUpdate,
        DisableFocusChange,
        DisableMouseCapture,
        DisableBracketedPaste,
        LeaveAlternateScreen,
        Show
    ));
    drop(disable_raw_mode());
}

/// Gives the terminal back when it is dropped; a panic does so before it prints.
struct Restore;

impl Restore {
    fn new() -> Self {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            leave();
            hook(panic);
        }));
        Self
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        // Twice would put the cursor onto what the panic says.
        if !std::thread::panicking() {
            leave();
        }
    }
}

/// Whether it is the key that stops a program in every shell.
fn is_stop(event: &TerminalEvent) -> bool {
    matches!(event, TerminalEvent::Key(KeyEvent { code: KeyCode::Char('z'), modifiers: KeyModifiers::CONTROL, .. }))
}

/// Stops, as every program does that leaves Ctrl-Z to the terminal, and takes the terminal anew when it goes on.
async fn stop(terminal: &mut DefaultTerminal, signals: &mut Signals) -> anyhow::Result<()> {
    if getsid(None) == Ok(getpid()) {
        // It was begun by the terminal itself: there is no shell that could let it go on.
        return Ok(());
    }
    leave();
    kill_current_process_group(rustix::process::Signal::TSTP)?;
    // Where there is no such shell otherwise, the system does not stop it.
    drop(tokio::time::timeout(STOP_TIMEOUT, signals.go_on.recv()).await);
    go_on(terminal)
}

/// Takes the terminal anew: whoever had it meanwhile may have left it in any state.
fn go_on(terminal: &mut DefaultTerminal) -> anyhow::Result<()> {
    // To go to the other screen and back once more would put the cursor where it was long ago.
    drop(disable_raw_mode());
    *terminal = enter().context("the terminal")?;
    terminal.clear().context("the terminal")
}

/// What asks for the end from outside, and what says that the terminal has another size or may be another's.
struct Signals {
    terminate: Signal,
    hang_up: Signal,
    interrupt: Signal,
    window_change: Signal,
    go_on: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            window_change: signal(SignalKind::window_change())?,
            go_on: signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?,
        })
    }
}

async fn any(one: &mut Signal, two: &mut Signal, three: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = two.recv() => {}
        _ = three.recv() => {}
    }
}

async fn chat(
    terminal: &mut DefaultTerminal,
    app: &mut App,
    mut first: Option<Event>,
    events: &mut Events,
    work: &mut Work,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let mut keys = EventStream::new();
    let (mut was_connected, mut has_events) = (false, true);
    let mut repaint = Repaint::default();
    loop {
        let size = terminal.size()?;
        if app.size != (size.width, size.height) {
            take(app, work, Input::Terminal(crossterm::event::Event::Resize(size.width, size.height)));
        }
        draw(terminal, app, &mut repaint)?;
        let wake_at = app.wake_at();
        let timer = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let next_event = async {
            match first.take() {
                Some(first) => Some(first),
                None => events.next().await,
            }
        };
        let input = tokio::select! {
            key = keys.next() => match key {
                Some(Ok(key)) if is_stop(&key) => {
                    stop(terminal, signals).await?;
                    continue;
                }
                Some(key) => Input::Terminal(key.context("the terminal")?),
                None => return Ok(()),
            },
            event = next_event, if has_events => match event {
                Some(event) => {
                    match &event {
                        Event::Connection(ConnectionState::Connected { .. }) => was_connected = true,
                        // The caller may know another password.
                        Event::Connection(ConnectionState::Closed(closed @ Closed::LoginRefused(_))) if !was_connected => {
                            return Err(closed.clone().into());
                        }
                        _ => {}
                    }
                    if !take_event(app, work, event) {
                        return Ok(());
                    }
                    for _ in 1..BATCH_MAX {
                        let Some(event) = events.try_next() else { break };
                        if !take_event(app, work, event) {
                            return Ok(());
                        }
                    }
                    continue;
                }
                // Why is on the screen; the user leaves when it was read.
                None if app.is_closed() => {
                    has_events = false;
                    continue;
                }
                None => bail!("the client has ended without saying why"),
            },
            news = work.news.recv() => news.context("the task that sends has ended")?,
            Some(id) = work.has_left.recv() => Input::Left(id),
            Some(answer) = work.requests.join_next() => match answer {
                Ok(Some(answer)) => answer,
                Ok(None) => continue,
                Err(error) => return Err(error).context("a request"),
            },
            () = timer => Input::Tick,
            // The stream of events may miss it when a key is pressed at the same time; the size is looked at above.
            _ = signals.window_change.recv() => continue,
            _ = signals.go_on.recv() => {
                go_on(terminal)?;
                continue;
            }
            () = any(&mut signals.terminate, &mut signals.hang_up, &mut signals.interrupt) => return Ok(()),
        };
        if !take(app, work, input) {
            return Ok(());
        }
    }
}

fn draw(terminal: &mut DefaultTerminal, app: &App, repaint: &mut Repaint) -> anyhow::Result<()> {
    queue!(stdout(), BeginSynchronizedUpdate)?;
    let mut emptied = Ok(());
    terminal.draw(|frame| {
        view::draw(frame, app);
        // It reaches the terminal before what is drawn: both go the same way.
        let mut cells = repaint.cells(frame.buffer_mut()).into_iter();
        emptied = cells.try_for_each(|(column, row)| queue!(stdout(), MoveTo(column, row), Print(' ')));
    })?;
    emptied?;
    execute!(stdout(), EndSynchronizedUpdate)?;
    Ok(())
}

/// Whether it goes on.
fn take(app: &mut App, work: &mut Work, input: Input) -> bool {
    app.handle(input, now()).into_iter().all(|effect| work.begin(effect))
}

fn take_event(app: &mut App, work: &mut Work, event: Event) -> bool {
    match event {
        Event::Message(delivery) => {
            let goes_on = take(app, work, Input::Message(delivery.message.clone()));
            delivery.acknowledge();
            goes_on
        }
        event => take(app, work, Input::Client(event)),
    }
}

fn now() -> Now {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Now { instant: Instant::now(), wall_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX) }
}

fn zone() -> TimeZone {
    TimeZone::try_system().unwrap_or(TimeZone::UTC)
}

/// An order to the courier.
enum Order {
    Send { to: UserId, key: u64, text: String },
    Typing { to: UserId, state: TypingState },
}

/// What is under way.
struct Work {
    client: Client,
    /// Requests, each answered by itself.
    requests: JoinSet<Option<Input>>,
    /// To the task that sends, one after the other.
    orders: mpsc::Sender<Order>,
    news: mpsc::Receiver<Input>,
    /// Of what waited since an earlier run, what waits no longer.
    has_left: mpsc::Receiver<MessageId>,
    drafts: DraftsFile,
    /// One task; it ends with this.
    _courier: JoinSet<()>,
}

impl Work {
    fn new(client: Client, has_left: mpsc::Receiver<MessageId>, drafts: DraftsFile) -> Self {
        let (orders, received) = mpsc::channel(ORDERS_MAX);
        let (told, news) = mpsc::channel(NEWS_MAX);
        let mut task = JoinSet::new();
        task.spawn(courier(client.clone(), received, told));
        Self { client, requests: JoinSet::new(), orders, news, has_left, drafts, _courier: task }
    }

    /// Waits until what was written is in the outbox.
    async fn finish(self) {
        let Self { orders, mut news, _courier, .. } = self;
        drop(orders);
        let told = async { while news.recv().await.is_some() {} };
        if tokio::time::timeout(FINISH_TIMEOUT, told).await.is_err() {
            tracing::warn!("the outbox did not take everything in time");
        }
    }

    /// Begins to do what the model wants. Whether the chat goes on.
    fn begin(&mut self, effect: Effect) -> bool {
        let client = self.client.clone();
        match effect {
            Effect::Quit => return false,
            Effect::KeepDrafts(drafts) => {
                if let Err(error) = self.drafts.keep(drafts) {
                    let reason = error.to_string();
                    self.requests.spawn(async move { Some(Input::NotKept(reason)) });
                }
            }
            Effect::Send { to, key, text } => {
                if let Err(error) = self.orders.try_send(Order::Send { to: to.clone(), key, text }) {
                    let reason = format!("not sent: {error}");
                    self.requests.spawn(async move { Some(Input::NotStored { to, key, reason }) });
                }
            }
            Effect::Typing { to, state } => {
                // Typing that is not told does no harm.
                drop(self.orders.try_send(Order::Typing { to, state }));
            }
            Effect::MarkRead { with, seq } => {
                self.requests.spawn(async move {
                    if let Err(error) = client.mark_read(&with, seq).await {
                        tracing::debug!(%error, %with, %seq, "not marked as read");
                    }
                    None
                });
            }
            Effect::History { with, ticket, range, limit } => {
                self.requests.spawn(async move {
                    let outcome = client.history(&with, range, limit).await;
                    Some(Input::History { with, ticket, outcome })
                });
            }
            Effect::Conversations { ticket, before, limit } => {
                self.requests.spawn(async move {
                    let outcome = client.conversations(before.as_deref(), limit).await;
                    Some(Input::Conversations { ticket, outcome })
                });
            }
            Effect::Whoami => {
                self.requests.spawn(async move { Some(Input::Whoami(client.whoami().await)) });
            }
            Effect::Edit { with, seq, text } => {
                self.requests.spawn(async move {
                    let outcome = client.edit(&with, seq, &text).await.map(|changed| changed.at);
                    Some(Input::Edited { with, seq, text, outcome })
                });
            }
            Effect::Unsend { with, seq } => {
                self.requests.spawn(async move {
                    let outcome = client.unsend(&with, seq).await.map(drop);
                    Some(Input::Unsent { with, seq, outcome })
                });
            }
            Effect::Delete { with, seq } => {
                self.requests.spawn(async move {
                    let outcome = client.delete(&with, seq).await;
                    Some(Input::Deleted { with, seq, outcome })
                });
            }
        }
        true
    }
}

/// Puts messages into the outbox one after the other, and tells what becomes of each.
async fn courier(client: Client, mut orders: mpsc::Receiver<Order>, news: mpsc::Sender<Input>) {
    let mut outcomes = JoinSet::new();
    loop {
        let input = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Typing { to, state }) => {
                    client.typing(&to, state).await;
                    continue;
                }
                Some(Order::Send { to, key, text }) => match client.queue(&to, text).await {
                    Ok(queued) => {
                        let id = queued.id().clone();
                        let peer = to.clone();
                        outcomes.spawn(async move {
                            match queued.await {
                                Ok(stored) => Some(Input::Stored { to: peer, key, stored }),
                                // It is in the outbox still, for the next run.
                                Err(SendError::Closed(_)) => None,
                                Err(error) => Some(Input::NotStored { to: peer, key, reason: error.to_string() }),
                            }
                        });
                        Input::Queued { to, key, id }
                    }
                    Err(error) => Input::NotStored { to, key, reason: error.to_string() },
                },
                None => return,
            },
            Some(outcome) = outcomes.join_next() => match outcome {
                Ok(Some(outcome)) => outcome,
                _ => continue,
            },
        };
        if news.send(input).await.is_err() {
            return;
        }
    }
}
