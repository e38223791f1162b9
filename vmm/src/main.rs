//! The podvisor command.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    podvisor::cli::run(Instant::now())
}
