//! Both Kata shims, replayed: the bytes that the Go shim and the Rust shim write to a monitor, what they demand of the
//! answers, and what they demand of the process. The clients here are small and as strict as the shims' own; no rule of
//! podvisor's own API crate is used to read an answer. `docs/shims.md` says which test guards which pitfall.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failure here is the test's"
)]

#[path = "../common/mod.rs"]
mod common;

mod bodies;
mod bytes;
mod flows;
mod go;
mod host;
mod monkey;
mod pitfalls;
mod process;
mod rust;
mod sandbox;
mod strict;
