//! `chat`: a chatd server from a shell, and a chat in the terminal.

fn main() {
    eprintln!("not yet");
}
