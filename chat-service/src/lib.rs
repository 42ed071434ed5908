//! The chat service: conversations, their order, their log, and the server `chatd` around them.
//!
//! The reading order is the way of a message: `service` parses what a client publishes, `sequencer` numbers it (`core` decides, with `beginnings`) and writes it to the
//! `log`, then answers the sender and announces it; receivers read `envelope`s, live or from the log. `requests` are answered with
//! what `views` see in the log; `receipts`, `typing` and `presence` tell what happens, `sys` how the server is. Around it: `settings`, `cli`,
//! `logging`, `metrics`, `http`, `outgoing`, and `server`, which puts the parts together; `admin` and `tools`, for operators.

pub mod acme;
pub mod admin;
pub mod auth;
pub mod beginnings;
pub mod cli;
#[cfg(test)]
mod convergence;
pub mod core;
pub mod docs;
pub mod envelope;
pub mod erasure;
pub mod http;
pub mod log;
pub mod logging;
pub mod metrics;
mod outgoing;
pub mod presence;
pub mod receipts;
mod refusal;
pub mod requests;
pub mod retention;
pub mod sequencer;
pub mod server;
pub mod service;
pub mod sessions;
pub mod settings;
pub mod sys;
pub mod tls;
pub mod tools;
pub mod typing;
pub mod views;
pub mod web;
pub mod webhooks;
