//! The command line: parses it, dispatches to the subcommands, prints errors as a chain that ends with the remedy.
//! Exit codes: 0 done, 1 it failed, 2 wrong usage or no /dev/kvm.

mod args;
mod attest;
mod ctl;
mod id_block;
mod igvm_build;
mod inspect;
mod measure;
mod refused;
mod run;
mod size;
mod top;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use self::args::{Args, Command, IgvmCommand};

/// Why the command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Wrong usage, or a machine without KVM: exit code 2.
    Usage(Box<dyn Error + Send + Sync>),
    /// Anything else: exit code 1.
    Runtime(Box<dyn Error + Send + Sync>),
}

impl Failure {
    fn usage(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Usage(error.into())
    }

    fn runtime(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Runtime(error.into())
    }
}

/// Runs the command line of this process; `start` is when the process began.
#[must_use]
pub fn run(start: Instant) -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let Some(reason) = refused::reason(&error) else {
                error.exit()
            };
            return report(Failure::usage(reason));
        }
    };
    let outcome = match args.command {
        None => run::run(args.run, start),
        Some(Command::Ctl(args)) => ctl::run(&args),
        Some(Command::Top(args)) => top::run(&args),
        Some(Command::Size(args)) => size::run(&args),
        Some(Command::Measure(args)) => measure::run(&args),
        Some(Command::Attest { command }) => attest::run(&command),
        Some(Command::IdBlock { command }) => id_block::run(&command),
        Some(Command::Demo(args)) => return ExitCode::from(crate::demo::run(&args)),
        Some(Command::Igvm {
            command: IgvmCommand::Inspect(args),
        }) => inspect::run(&args),
        Some(Command::Igvm {
            command: IgvmCommand::Build(args),
        }) => igvm_build::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(failure),
    }
}

fn report(failure: Failure) -> ExitCode {
    let (code, error) = match failure {
        Failure::Usage(error) => (2, error),
        Failure::Runtime(error) => (1, error),
    };
    // Nothing can be done when stderr is gone.
    let _ = writeln!(std::io::stderr(), "podvisor: {}", chain(error.as_ref()));
    ExitCode::from(code)
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Transparent wrappers repeat what they wrap.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Prints `text` and a line end to stdout.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")) {
        // The reader has seen enough (`podvisor igvm inspect F | head`).
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Failure::runtime),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn the_chain_names_every_cause() {
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }
}
