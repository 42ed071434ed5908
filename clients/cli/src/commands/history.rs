//! `chat history`: a conversation, in the order of its numbers.
//!
//! However long it is, what is kept in memory is a page, or as much as `--limit` says.

use std::collections::VecDeque;

use chat_client::{AnsweredEntry, Client, Range, RequestError, Seq, Timestamp, UserId};

use super::connect_once;
use crate::arguments::History;
use crate::failure::Failure;
use crate::moment;
use crate::output::{Output, Printed};
use crate::settings::Settings;

const PAGE: usize = 200;
const LIMIT_DEFAULT: usize = 50;

pub(super) async fn run(settings: &mut Settings, history: History) -> Result<(), Failure> {
    let History { peer, since, before, limit, all, form } = history;
    let since = match since {
        Some(since) => Some(since.at(&moment::now()).map_err(|why| Failure::usage(format!("--since: {why}")))?),
        None => None,
    };
    let (client, _events) = connect_once(settings).await?;
    let reader = Reader { client: &client, peer, output: Output::new(form) };
    match (limit, since) {
        (Some(limit), since) => reader.last(limit, since, before).await?,
        (None, None) if !all => reader.last(LIMIT_DEFAULT, None, before).await?,
        (None, since) => {
            let after = match since {
                Some(since) => reader.last_before(since).await?,
                None => None,
            };
            reader.all(after, before).await?;
        }
    }
    client.close().await;
    Ok(())
}

struct Reader<'a> {
    client: &'a Client,
    peer: UserId,
    output: Output,
}

impl Reader<'_> {
    /// The last so many of those that are not older.
    async fn last(&self, limit: usize, since: Option<Timestamp>, mut before: Option<Seq>) -> Result<(), Failure> {
        let mut found = VecDeque::new();
        loop {
            let page = self.page(Range::Before(before), PAGE.min(limit - found.len())).await?;
            let first = page.entries.first().map(|entry| entry.seq);
            let mut is_old = false;
            for entry in page.entries.into_iter().rev() {
                is_old = since.is_some_and(|since| entry.at < since);
                if is_old {
                    break;
                }
                found.push_front(entry);
            }
            if is_old || !page.more || found.len() >= limit || first.is_none() {
                break;
            }
            before = first;
        }
        self.print(found).await.map(drop)
    }

    /// Everything after this and before that.
    async fn all(&self, mut after: Option<Seq>, before: Option<Seq>) -> Result<(), Failure> {
        loop {
            let mut page = self.page(Range::After(after), PAGE).await?;
            let last = page.entries.last().map(|entry| entry.seq);
            page.entries.retain(|entry| before.is_none_or(|before| entry.seq < before));
            let is_done = !page.more || last.is_none() || before.is_some_and(|before| last >= Some(before));
            if self.print(page.entries).await? == Printed::Closed || is_done {
                return Ok(());
            }
            after = last;
        }
    }

    /// A number before which everything is older, and after which nothing is. Times never run backwards in a conversation: it is found by halves.
    async fn last_before(&self, since: Timestamp) -> Result<Option<Seq>, Failure> {
        let newest = self.page(Range::Before(None), 1).await?.entries.pop().map_or(0, |entry| entry.seq.get());
        // All up to `older` are older; all after `newer` are not.
        let (mut older, mut newer) = (0, newest);
        while older < newer {
            let middle = older + (newer - older) / 2;
            let next = self.page(Range::After(Seq::new(middle)), 1).await?.entries.pop();
            match next {
                Some(entry) if entry.at < since => older = entry.seq.get(),
                _ => newer = middle,
            }
        }
        Ok(Seq::new(older))
    }

    async fn page(&self, range: Range, limit: usize) -> Result<chat_client::HistoryOk, RequestError> {
        self.client.history(&self.peer, range, limit).await
    }

    async fn print(&self, entries: impl IntoIterator<Item = AnsweredEntry>) -> Result<Printed, Failure> {
        let now = moment::now();
        let line = |entry| {
            if self.output.json { Output::object(&entry) } else { self.output.entry(&entry, &now) }
        };
        let lines: Vec<String> = entries.into_iter().map(line).collect();
        if lines.is_empty() { Ok(Printed::Yes) } else { self.output.print(lines.join("\n")).await }
    }
}
