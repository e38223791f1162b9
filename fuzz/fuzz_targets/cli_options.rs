//! Options of the command line: any text is refused with words or becomes a configuration.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_api::types::{
    ConsoleConfig, CpusConfig, DiskConfig, FsConfig, MemoryConfig, NetConfig, PlatformConfig, PodConfig, VsockConfig,
};
use podvisor_api::{OptionForm, from_options};

fn parse<T: OptionForm>(text: &str) {
    if let Err(error) = from_options::<T>(text) {
        assert!(!error.to_string().is_empty());
    }
}

fuzz_target!(|text: &str| {
    parse::<ConsoleConfig>(text);
    parse::<CpusConfig>(text);
    parse::<DiskConfig>(text);
    parse::<FsConfig>(text);
    parse::<MemoryConfig>(text);
    parse::<NetConfig>(text);
    parse::<PlatformConfig>(text);
    parse::<PodConfig>(text);
    parse::<VsockConfig>(text);
});
