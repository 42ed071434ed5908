//! The end-to-end tests: real `chatd` processes on free ports, driven by raw packets and by real programs. A module per topic.
//!
//! `CHATD_BIN` names another chatd, `CHATD_TEST_SEED` repeats a random test, `CHATD_TEST_LONG=1` takes the long way where there is one.

#[cfg(test)]
mod acl;
#[cfg(test)]
mod acme;
#[cfg(test)]
mod auth;
#[cfg(test)]
mod bad_network;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod chat;
#[cfg(test)]
mod chat_command;
#[cfg(test)]
mod churn;
#[cfg(test)]
mod classes;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod crowd;
#[cfg(test)]
mod first_message;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod idle;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod messenger;
#[cfg(test)]
mod mutants;
#[cfg(test)]
mod observer;
#[cfg(test)]
mod offline;
#[cfg(test)]
mod ordinary;
#[cfg(test)]
mod ordinary5;
#[cfg(test)]
mod queues;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod sdk;
#[cfg(test)]
mod seams;
#[cfg(test)]
mod sessions;
#[cfg(test)]
mod sharing;
#[cfg(test)]
mod slow;
#[cfg(test)]
mod storage;
#[cfg(test)]
mod terminal;
#[cfg(test)]
mod tls;
#[cfg(test)]
mod web_chat;
#[cfg(test)]
mod webhooks;
#[cfg(test)]
mod websocket;
