//! The podvisor command.
fn main() {}
