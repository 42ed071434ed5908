//! What is measured, and how its clients come and speak: the same options in every mode, so that any broker gets the very same work.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};

use crate::client::Client;
use crate::mqtt::{Login, Session, Version};
use crate::process::{self, Memory};
use crate::verify::{Payload, STAMP_BYTES};
use crate::wire::{Dialer, Transport};

/// Clients that connect at once, where it is not all of them.
pub(crate) const CONNECTING: usize = 50;

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "The broker")]
pub(crate) struct Target {
    /// Address of the broker.
    #[arg(long, default_value = "127.0.0.1:1883")]
    pub(crate) addr: SocketAddr,
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub(crate) transport: Transport,
    /// PEM file of who has signed the broker's certificate; without it any certificate is taken.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// What the broker's certificate is for.
    #[arg(long, default_value = "localhost")]
    server_name: String,
    /// Path of the WebSocket.
    #[arg(long, default_value = "/mqtt")]
    path: String,
    /// MQTT version, 4 (for 3.1.1) or 5.
    #[arg(long, default_value = "4")]
    pub(crate) version: Version,
    /// User name of a client that is {me} in topics; empty for none.
    #[arg(long, default_value = "{me}")]
    user: String,
    #[arg(long)]
    password: Option<String>,
    #[arg(long, default_value = "{me}-device")]
    client_id: String,
    /// What senders publish to.
    #[arg(long, default_value = "chat/{from}/out/{to}")]
    send_topic: String,
    /// What receivers subscribe to.
    #[arg(long, default_value = "chat/{to}/inbox")]
    receive_filter: String,
    /// What receivers are handed.
    #[arg(long, value_enum, default_value_t = Payload::Envelope)]
    pub(crate) payload: Payload,
    /// Bytes of a text.
    #[arg(long, default_value_t = 128)]
    pub(crate) bytes: usize,
    /// The broker's processes, for their processor time and memory.
    #[arg(long)]
    pid: Vec<u32>,
}

/// Which name a client of a run has: of its own in every run, as a store remembers.
#[derive(Clone, Debug)]
pub(crate) struct Run(String);

impl Run {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(format!("{:x}", SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())))
    }

    pub(crate) fn name(&self, role: &str, nth: u32) -> String {
        format!("{role}{nth}-{}", self.0)
    }
}

impl Target {
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.bytes >= STAMP_BYTES, "a text has at least {STAMP_BYTES} bytes: its number and its time");
        Ok(())
    }

    pub(crate) fn dialer(&self) -> Result<Dialer> {
        Dialer::new(self.addr, self.transport, self.ca.as_deref(), &self.server_name, &self.path)
    }

    pub(crate) fn login(&self, me: &str) -> Login {
        let fill = |template: &str| template.replace("{me}", me);
        Login {
            client_id: fill(&self.client_id),
            user: Some(fill(&self.user)).filter(|user| !user.is_empty()),
            password: self.password.as_deref().map(fill),
        }
    }

    pub(crate) fn topic(&self, from: &str, to: &str) -> String {
        self.send_topic.replace("{from}", from).replace("{to}", to)
    }

    pub(crate) fn filter(&self, to: &str) -> String {
        self.receive_filter.replace("{to}", to).replace("{me}", to)
    }

    /// A client that only sends.
    pub(crate) async fn sender(&self, dialer: &Dialer, nth: u32, me: &str) -> Result<Client> {
        let (client, _) = Client::connect(dialer, nth, self.version, &self.login(me), Session::Clean).await?;
        Ok(client)
    }

    /// A client that is subscribed to what is sent to it, and whether the broker remembered it.
    pub(crate) async fn receiver(
        &self,
        dialer: &Dialer,
        nth: u32,
        me: &str,
        session: Session,
    ) -> Result<(Client, bool)> {
        let (mut client, remembered) = Client::connect(dialer, nth, self.version, &self.login(me), session).await?;
        if !remembered {
            client.subscribe(&[&self.filter(me)]).await?;
        }
        Ok((client, remembered))
    }

    /// Processor seconds of the broker; `None` if its processes were not named.
    pub(crate) fn cpu_seconds(&self) -> Result<Option<f64>> {
        let sum = self.pid.iter().map(|pid| process::cpu_seconds(*pid)).sum::<Result<f64>>()?;
        Ok((!self.pid.is_empty()).then_some(sum))
    }

    pub(crate) fn memory(&self) -> Result<Option<Memory>> {
        let sum = self.pid.iter().map(|pid| process::memory(*pid)).sum::<Result<Memory>>()?;
        Ok((!self.pid.is_empty()).then_some(sum))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        target: Target,
    }

    fn target(arguments: &[&str]) -> Target {
        Options::parse_from([&["bench"], arguments].concat()).target
    }

    #[test]
    fn templates_are_filled() {
        let chatd = target(&[]);
        assert_eq!(chatd.topic("a", "b"), "chat/a/out/b");
        assert_eq!(chatd.filter("b"), "chat/b/inbox");
        let login = chatd.login("a");
        assert_eq!((login.client_id.as_str(), login.user.as_deref(), login.password), ("a-device", Some("a"), None));

        let peer = target(&[
            "--send-topic=bench/{to}",
            "--receive-filter=bench/{to}",
            "--user=guest",
            "--password=guest",
            "--client-id=x-{me}",
        ]);
        assert_eq!((peer.topic("a", "b"), peer.filter("b")), ("bench/b".to_owned(), "bench/b".to_owned()));
        let login = peer.login("a");
        assert_eq!((login.client_id.as_str(), login.user.as_deref()), ("x-a", Some("guest")));
        assert_eq!(login.password.as_deref(), Some("guest"));
        assert_eq!(target(&["--user="]).login("a").user, None);
    }

    #[test]
    fn names_of_a_run_are_names_of_chatds() {
        let name = Run::new().unwrap().name("s", 19_999);
        assert!(name.starts_with("s19999-"));
        assert!(chat_protocol::UserId::parse(&name).is_ok(), "{name}");
    }

    #[test]
    fn a_text_has_room_for_its_number() {
        assert!(target(&["--bytes=31"]).check().is_err());
        assert!(target(&["--bytes=32"]).check().is_ok());
    }
}
