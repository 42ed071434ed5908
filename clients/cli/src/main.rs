//! `chat`: a chatd server from a shell, and a chat in the terminal.

#[allow(dead_code, reason = "used by what comes next")]
mod safe;

fn main() {
    eprintln!("not yet");
}
