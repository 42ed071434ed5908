//! The MQTT edge and its embedded rumqttd: sockets, packets, sessions, windows, topics.
//!
//! It knows nothing of chat. A [`service::Service`] tells it who may connect, which topics are *bound* (given meaning by the service)
//! and what stands in their logs; everything else is ordinary publish and subscribe. The reading order is the way of a message:
//! `listener` and `websocket` accept, `connection` speaks MQTT (`engine`) for its `session`, the service stores, `bus` carries what is
//! announced, `registry` finds who wants it, `mailbox` and `stream` bring it to the receiver.

mod absent;
pub mod admission;
mod broker;
pub mod bus;
pub mod completion;
mod connection;
mod engine;
pub mod escaped;
mod filters;
mod framing;
mod limits;
pub mod listener;
pub mod live;
mod mailbox;
mod ordinary;
mod plain;
mod queues;
mod rate;
mod registry;
pub mod service;
mod session;
pub mod sparing;
mod stream;
pub mod topics;
pub mod turns;
pub mod websocket;

pub use broker::{Announcer, Broker, BusStatus};
pub use limits::Limits;
