//! Options of Cloud Hypervisor's that podvisor does not take: each is refused with the reason, where an unknown option
//! would only be called unknown. They cost a start nothing: the table is looked at when the command line has been refused.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use podvisor_api::not_done::NOT_DONE;

/// Options that are no part of a configuration.
const OPTIONS: &[(&str, &str)] = &[
    ("--gdb", "the guest's memory is not read out; debug it inside the guest"),
    ("--firmware", "firmware images are not booted; give --igvm or --kernel"),
    (
        "--rtc",
        "the guest has its clock from the CMOS and the processor; leave it out",
    ),
    (
        "--log-format",
        "the log has one format, which Kata's parser of it knows; leave it out",
    ),
];

/// The reason, if `error` is about an option of Cloud Hypervisor's that is known here.
pub(super) fn reason(error: &clap::Error) -> Option<String> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let fields = NOT_DONE.iter().filter_map(|row| Some((row.option?, row.why)));
    let (name, why) = OPTIONS.iter().copied().chain(fields).find(|(name, _)| name == option)?;
    Some(format!("{name}: {why}"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::super::args::Args;
    use super::*;

    fn refused(words: &[&str]) -> Option<String> {
        let words = std::iter::once("podvisor").chain(words.iter().copied());
        reason(&Args::try_parse_from(words).unwrap_err())
    }

    #[test]
    fn each_option_is_refused_with_its_reason() {
        let options = NOT_DONE.iter().filter_map(|row| row.option);
        let all: Vec<_> = options.chain(OPTIONS.iter().map(|(name, _)| *name)).collect();
        assert!(all.len() > 10);
        for name in all {
            for words in [&[name, "x=y"][..], &["--api-socket", "/s", name]] {
                let said = refused(words).unwrap();
                assert!(said.starts_with(&format!("{name}: ")), "{said}");
            }
            let joined = format!("{name}=x");
            assert!(refused(&[&joined]).is_some(), "{joined}");
        }
    }

    #[test]
    fn what_nobody_knows_is_unknown_and_what_is_taken_is_not_here() {
        assert_eq!(refused(&["--frobnicate"]), None);
        assert_eq!(refused(&["--api-socket"]), None);
        let command = Args::command();
        for argument in command.get_arguments() {
            let name = format!("--{}", argument.get_long().unwrap_or_default());
            assert!(OPTIONS.iter().all(|(option, _)| *option != name), "{name}");
        }
    }
}
