//! Request bodies: any bytes are refused or become a request; what is accepted can be shown and read again unchanged.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_api::types::{DiskConfig, NetConfig, RestoreConfig, VmConfig, VmRemoveDevice, VmResize};
use podvisor_api::{Stage, from_json};

fn show(config: &VmConfig) -> Vec<u8> {
    serde_json::to_vec(config).expect("a configuration has no map without string keys")
}

fuzz_target!(|body: &[u8]| {
    let _ = from_json::<VmResize>(body);
    let _ = from_json::<VmRemoveDevice>(body);
    let _ = from_json::<RestoreConfig>(body);
    let _ = from_json::<DiskConfig>(body).map(|disk| disk.validate());
    let _ = from_json::<NetConfig>(body).map(|net| net.validate());
    if let Ok(mut config) = from_json::<VmConfig>(body) {
        for problem in config.problems(Stage::Boot) {
            assert!(!problem.field.is_empty() && !problem.reason.is_empty());
        }
        let shown = show(&config);
        let again: VmConfig = from_json(&shown).unwrap();
        assert_eq!(show(&again), shown);
        let _ = config.apply_sizing(1 << 30, 2);
    }
});
