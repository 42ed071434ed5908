//! MQTT over WebSocket: the route `/mqtt`, and a byte stream over binary messages.
//!
//! MQTT packets need not align with WebSocket messages [MQTT-6.0.0-2]; text messages are a protocol error [MQTT-6.0.0-1]. The handshake runs in the
//! HTTP connection's task; sizes are bounded before a byte is kept.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::broker::Broker;
use crate::service::{Peer, Service};

const SUBPROTOCOL: &str = "mqtt";
/// First buffers of a WebSocket, in bytes; a busy one grows.
const BUFFER_BYTES: usize = 4 * 1024;
/// Largest WebSocket message that is sent.
const SENT_BYTES_MAX: usize = 64 * 1024;

/// The route `/mqtt` for an HTTP server. Where a connection comes from is its request's extension [`Peer`].
pub fn router<S: Service>(broker: Broker<S>, packet_bytes_max: u32) -> Router {
    let message_bytes_max = usize::try_from(packet_bytes_max).unwrap_or(usize::MAX).saturating_mul(2);
    Router::new().route(
        "/mqtt",
        get(move |headers: HeaderMap, peer: Option<Extension<Peer>>, upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>| {
            let broker = broker.clone();
            async move { accept(&broker, &headers, upgrade, peer.map_or_else(Peer::default, |Extension(peer)| peer), message_bytes_max) }
        }),
    )
}

fn accept<S: Service>(
    broker: &Broker<S>,
    headers: &HeaderMap,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
    peer: Peer,
    message_bytes_max: usize,
) -> Response {
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(rejection) => return rejection.into_response(),
    };
    let offered = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|protocol| protocol.trim() == SUBPROTOCOL);
    if !offered {
        return (StatusCode::BAD_REQUEST, "MQTT over WebSocket needs the subprotocol mqtt\n").into_response();
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !may_connect(origin, headers.get(header::HOST))
    {
        let sentence = "this page's origin may not connect: serve it from this host, or from localhost\n";
        return (StatusCode::FORBIDDEN, sentence).into_response();
    }
    let broker = broker.clone();
    upgrade
        .protocols([SUBPROTOCOL])
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(0)
        .max_message_size(message_bytes_max)
        .max_frame_size(message_bytes_max)
        .on_failed_upgrade(|error| tracing::debug!(%error, "websocket upgrade failed"))
        .on_upgrade(move |socket| async move {
            broker.serve(WebSocketIo { socket, unread: Bytes::new() }, peer);
        })
}

/// Whether a page of this origin may connect: a page from this very host, or from the same machine. Browsers send an origin with every WebSocket;
/// without this check any site that a user visits could chat in their name with a server on their machine.
fn may_connect(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let Some((_, authority)) = origin.split_once("://") else { return false };
    if host.is_some_and(|host| host.as_bytes().eq_ignore_ascii_case(authority.as_bytes())) {
        return true;
    }
    let name = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A WebSocket as a byte stream.
struct WebSocketIo {
    socket: WebSocket,
    unread: Bytes,
}

impl AsyncRead for WebSocketIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.unread = bytes,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "MQTT over WebSocket uses binary messages [MQTT-6.0.0-1]",
                    )));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let take = self.unread.len().min(buf.remaining());
        let bytes = self.unread.split_to(take);
        buf.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WebSocketIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let socket = Pin::new(&mut self.socket);
        ready!(socket.poll_ready(cx)).map_err(io::Error::other)?;
        let take = buf.len().min(SENT_BYTES_MAX);
        Pin::new(&mut self.socket)
            .start_send(Message::Binary(Bytes::copy_from_slice(&buf[..take])))
            .map_err(io::Error::other)?;
        Poll::Ready(Ok(take))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(origin: &str, host: &str) -> bool {
        let value = |text: &str| HeaderValue::from_str(text).expect("a header value");
        may_connect(&value(origin), Some(&value(host)))
    }

    #[test]
    fn only_pages_of_this_host_or_machine_connect() {
        for origin in [
            "http://localhost:5173",
            "https://localhost",
            "http://127.0.0.1:3000",
            "http://[::1]:3000",
            "https://chat.example.org",
        ] {
            assert!(may(origin, "chat.example.org"), "{origin}");
        }
        for origin in [
            "https://evil.example.org",
            "null",
            "http://localhost.evil.example.org",
            "http://127.0.0.1.evil.example.org",
            "file://",
            "https://chat.example.org.evil",
        ] {
            assert!(!may(origin, "chat.example.org"), "{origin}");
        }
    }
}
