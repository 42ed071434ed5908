//! MQTT over TCP: accepts, and hands each socket to a task of its own at once.
//!
//! Nothing here waits for a client: handshakes run in the connection's task, under its deadline.

use std::future::Future;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::broker::Broker;
use crate::service::{Peer, Service};

/// How long to wait when the process has no more file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Accepts until `shutdown`. Connections go on: [`Broker::stop`] ends them.
pub async fn run<S: Service>(listener: TcpListener, broker: Broker<S>, shutdown: impl Future<Output = ()> + Send) {
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                if let Err(error) = socket.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "no TCP_NODELAY");
                }
                broker.serve(socket, Peer { address: Some(peer), certificate_name: None });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
