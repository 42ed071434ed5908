//! Every place that takes bytes from strangers, as a function of bytes that panics if something is wrong.
//!
//! `fuzz/` runs them under libFuzzer; the tests here run them over its corpus, over bent copies of that, and over random bytes.

mod connection;
mod names;
mod proofs;
mod service;
mod texts;

/// A surface: its name, which is also that of its corpus in `fuzz/corpus`, and its function.
pub type Surface = (&'static str, fn(&[u8]));

/// All of them.
pub const SURFACES: [Surface; 7] = [
    ("connection", connection::connection),
    ("topics", names::topics),
    ("filters", names::filters),
    ("envelopes", texts::envelopes),
    ("passwords", proofs::passwords),
    ("tokens", proofs::tokens),
    ("rules", proofs::rules),
];

/// Runs one by its name.
///
/// # Panics
/// If there is none of that name, or if it finds something.
pub fn run(name: &str, data: &[u8]) {
    let surface = SURFACES.iter().find(|(found, _)| *found == name).expect("the name of a surface");
    (surface.1)(data);
}
