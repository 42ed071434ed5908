//! What the end-to-end tests stand on: real `chatd` processes, a raw MQTT client of our own, and the programs that people use.
//!
//! The codec here shares nothing with the server's: a mistake that both sides make alike would not be seen. Nothing here sleeps to let
//! something happen; it waits for what has to happen, with a deadline.

pub mod allocated;
pub mod chatd;
pub mod command;
pub mod contract;
pub mod dice;
pub mod packet;
pub mod programs;
pub mod proxy;
pub mod raw;
pub mod receiver;
pub mod terminal;
pub mod tls;
pub mod wait;

pub use chatd::{Chatd, Options};
pub use dice::Dice;
pub use raw::{Client, Connect, Trust};
pub use wait::{PATIENCE, eventually};
