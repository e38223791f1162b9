//! What KVM gives back of the registers it was told: the digest stands on it.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use common::*;
use podvisor_snp::emulated::Options;
use podvisor_snp::vcpu_state::{apply, read};

#[test]
fn registers_read_back_as_they_were_told() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let told = long_mode(0x10_0000);
    apply(&machine.vcpus[0], &told).unwrap();
    let mut got = read(&machine.vcpus[0]).unwrap();
    // What KVM adds under SNP, and SEV_FEATURES, are no registers of an ordinary VM.
    got.efer |= told.efer & 0x1000;
    got.sev_features = told.sev_features;
    assert_eq!(got, told);
}
