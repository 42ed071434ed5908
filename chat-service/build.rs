//! Builds anew when the web chat was.

fn main() {
    println!("cargo:rerun-if-changed=../clients/web/dist");
}
