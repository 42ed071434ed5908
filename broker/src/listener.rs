//! MQTT over TCP: accepts, and hands each socket to a task of its own at once.
//!
//! Nothing here waits for a client: handshakes run in the connection's task, under its deadline.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::broker::Broker;
use crate::service::{Peer, Service, ShownCertificate};

/// Connections that wait to be accepted, as many as the operating system allows: a client that finds no room tries again only after a second.
const BACKLOG: u32 = 4_096;
/// Connections that are accepted before others have their turn.
const ACCEPTED_IN_TURN: usize = 128;
/// How long to wait when the process has no more file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Listens there, with room for very many who come at once.
///
/// # Errors
/// The address cannot be had.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that starts again finds its port, whatever is left of its last connections.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts until `shutdown`. Connections go on: [`Broker::stop`] ends them.
pub async fn run<S: Service>(listener: TcpListener, broker: Broker<S>, shutdown: impl Future<Output = ()> + Send) {
    let serve = |socket, peer| {
        if let Some(place) = broker.admit(peer) {
            broker.serve(place.hold(socket), Peer { address: Some(peer), certificate: None });
        }
    };
    accept(&listener, serve, shutdown).await;
}

/// The same for sockets that have to be opened first, as by a TLS handshake, which gives the client's certificate too.
pub async fn run_opened<S, O, F, T>(
    listener: TcpListener,
    broker: Broker<S>,
    open: O,
    shutdown: impl Future<Output = ()> + Send,
) where
    S: Service,
    O: Fn(TcpStream) -> F + Send + Sync,
    F: Future<Output = io::Result<(T, Option<ShownCertificate>)>> + Send + 'static,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    accept(&listener, |socket, peer| broker.serve_opened(peer, open(socket)), shutdown).await;
}

async fn accept(
    listener: &TcpListener,
    serve: impl Fn(TcpStream, SocketAddr) + Send,
    shutdown: impl Future<Output = ()> + Send,
) {
    let mut shutdown = std::pin::pin!(shutdown);
    let mut accepted_in_turn = 0;
    loop {
        if accepted_in_turn == ACCEPTED_IN_TURN {
            // Those who are there already, and what was accepted.
            accepted_in_turn = 0;
            tokio::task::yield_now().await;
        }
        let accepted = tokio::select! {
            () = &mut shutdown => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                if let Err(error) = socket.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "no TCP_NODELAY");
                }
                serve(socket, peer);
                accepted_in_turn += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
