//! The launch path against the emulated processor on a real KVM VM.
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
use podvisor_firmware::plan::PageKind;
use podvisor_snp::digest::predict;
use podvisor_snp::emulated::{Injection, Options};
use podvisor_snp::id_block::{Signer, unsigned};
use podvisor_snp::launch::{LaunchError, launch};
use podvisor_snp::processor::Processor;
use vm_memory::{Bytes, GuestAddress};

fn read(machine: &Machine, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

#[test]
fn the_launched_digest_is_the_predicted_one() {
    for vcpus in [1, 3] {
        let Some(machine) = machine(vcpus, Options::default()) else {
            return;
        };
        let mut plan = plan();
        plan.vps.push(context(2, 0x10_0040));
        machine
            .memory
            .write_slice(&[0xEE; 64], GuestAddress(0x50_0000))
            .unwrap();
        let report = launch(
            &machine.emulated,
            &machine.vm,
            &machine.vcpus,
            &machine.memory,
            &plan,
            &options(),
        )
        .unwrap();
        assert_eq!(report.launched, Some(report.predicted.digest));
        assert_eq!(report.predicted, predict(&plan, vcpus as u32).unwrap());
        assert_eq!(machine.emulated.launch_digest(), report.launched);
        assert!(!report.cpuid_corrected);

        assert_eq!(read(&machine, 0x10_0000, 3), [1, 8, 15]);
        assert_eq!(read(&machine, 0x14_F122, 2)[1], 0, "past the data");
        assert_eq!(read(&machine, 0x24_0000, 101), [vec![0x77; 100], vec![0]].concat());
        assert_eq!(
            read(&machine, 0x50_0000, 64),
            [0; 64],
            "what was shared before is not private contents"
        );
        assert_eq!(read(&machine, 0x23_0000, 4), [3, 0, 0, 0]);
        assert_ne!(read(&machine, 0x23_0020, 32), [0; 32]);
        assert_eq!(read(&machine, 0x30_0000, 2), [3, 10]);
        let pages = machine.emulated.runtime().pages();
        assert!(machine.emulated.is_shared(0x30_0000, 0x2000));
        assert!(!machine.emulated.is_shared(0x10_0000, 1) && !machine.emulated.is_shared(0x50_0000, 1));
        assert!(pages.is_validated(0x100..0x150) && !pages.is_validated(0x500..0x501));
    }
}

#[test]
fn partial_updates_and_a_corrected_cpuid_page_change_nothing() {
    let injection = Injection {
        most_pages_per_update: Some(3),
        reject_cpuid_once: true,
    };
    let Some(machine) = machine(
        1,
        Options {
            injection,
            ..Options::default()
        },
    ) else {
        return;
    };
    let report = launch(
        &machine.emulated,
        &machine.vm,
        &machine.vcpus,
        &machine.memory,
        &plan(),
        &options(),
    )
    .unwrap();
    assert!(report.cpuid_corrected);
    assert_eq!(report.launched, Some(predict(&plan(), 1).unwrap().digest));
}

#[test]
fn an_id_block_for_this_digest_launches_and_for_another_does_not() {
    let mut plan = plan();
    let digest = predict(&plan, 1).unwrap().digest;
    let mut id = unsigned(digest);
    Signer::generate().unwrap().sign_block(&mut id, 0x30000, None).unwrap();
    plan.id_block = Some(id.clone());
    let Some(first) = machine(1, Options::default()) else {
        return;
    };
    launch(
        &first.emulated,
        &first.vm,
        &first.vcpus,
        &first.memory,
        &plan,
        &options(),
    )
    .unwrap();

    id.ld[0] ^= 1;
    plan.id_block = Some(id.clone());
    let Some(second) = machine(1, Options::default()) else {
        return;
    };
    let error = launch(
        &second.emulated,
        &second.vm,
        &second.vcpus,
        &second.memory,
        &plan,
        &options(),
    )
    .unwrap_err();
    assert!(
        matches!(
            error,
            LaunchError::Digest {
                what: "the ID block's",
                ..
            }
        ),
        "{error}"
    );

    id.ld[0] ^= 1;
    id.guest_svn ^= 1;
    plan.id_block = Some(id);
    let error = launch(
        &second.emulated,
        &second.vm,
        &second.vcpus,
        &second.memory,
        &plan,
        &options(),
    )
    .unwrap_err();
    assert!(
        matches!(&error, LaunchError::Processor(refused) if refused.fw_error == 0xA),
        "{error}"
    );
    assert_eq!(second.emulated.launch_digest(), None);
}

#[test]
fn an_expected_digest_that_is_not_the_plans_is_refused_before_anything_is_done() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let mut wanted = options();
    wanted.expect_digest = Some([1; 48]);
    let run = |options: &_| {
        launch(
            &machine.emulated,
            &machine.vm,
            &machine.vcpus,
            &machine.memory,
            &plan(),
            options,
        )
    };
    assert!(matches!(
        run(&wanted),
        Err(LaunchError::Digest {
            what: "--expect-digest",
            ..
        })
    ));
    wanted.expect_digest = Some(predict(&plan(), 1).unwrap().digest);
    run(&wanted).unwrap();
}

#[test]
fn plans_that_kvm_could_not_seal_are_refused() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let run = |plan: &_, options: &_| {
        launch(
            &machine.emulated,
            &machine.vm,
            &machine.vcpus,
            &machine.memory,
            plan,
            options,
        )
        .unwrap_err()
    };
    let mut vmsa = plan();
    vmsa.vps[0].vmsa.to_mut()[0xD1] ^= 0x10;
    assert!(matches!(run(&vmsa, &options()), LaunchError::Vmsa { index: 0, .. }));
    let mut features = plan();
    let mut other = context(1, 0);
    other.state.sev_features = 0x21;
    other.vmsa = podvisor_firmware::vmsa::vmsa_page(&other.state).to_vec().into();
    features.vps.push(other);
    assert!(matches!(
        run(&features, &options()),
        LaunchError::Features { index: 1, .. }
    ));
    let mut unfilled = options();
    unfilled.areas.clear();
    assert!(matches!(
        run(&plan(), &unfilled),
        LaunchError::Area { area: 0, got: 0, .. }
    ));
}

#[test]
fn shared_pages_outside_ram_are_refused() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let mut plan = plan();
    plan.steps
        .insert(0, pages(0x9000_0000, 0x1000, PageKind::Shared, vec![1]));
    let run = launch(
        &machine.emulated,
        &machine.vm,
        &machine.vcpus,
        &machine.memory,
        &plan,
        &options(),
    );
    assert!(matches!(run, Err(LaunchError::Shared { gpa: 0x9000_0000, .. })));
}
