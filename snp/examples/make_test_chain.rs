//! Makes a certificate chain for the emulated processor: `make_test_chain DIR`. The chain in `snp/test-chain` was made so.
#![allow(
    clippy::allow_attributes,
    clippy::print_stderr,
    clippy::expect_used,
    reason = "a command-line example"
)]

use std::path::Path;

use podvisor_snp::chain::make::{Identity, make, write};

fn main() -> std::process::ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: make_test_chain DIR");
        return std::process::ExitCode::from(2);
    };
    let chain = make(&Identity::emulated()).expect("the crypto library works");
    if let Err(error) = write(&chain, Path::new(&dir)) {
        eprintln!("{}: {error}", Path::new(&dir).display());
        return std::process::ExitCode::FAILURE;
    }
    std::process::ExitCode::SUCCESS
}
