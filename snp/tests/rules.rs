//! Every rule of KVM's SNP calls and of the firmware's launch commands: a breach is refused with the error KVM gives.
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
use podvisor_snp::cpuid::{self, Leaf};
use podvisor_snp::emulated::{Injection, Options};
use podvisor_snp::id_block::{Signer, auth, block, unsigned};
use podvisor_snp::processor::{LaunchFinish, LaunchUpdate, MemoryRegion, Processor, ProcessorError};
use podvisor_snp::vcpu_state::apply;

const EINVAL: i32 = 22;
const EIO: i32 = 5;
const EEXIST: i32 = 17;
const ENOTTY: i32 = 25;
const POLICY: u64 = 0x30000;

#[repr(align(4096))]
struct Source([u8; 0x8000]);

static SOURCE: Source = Source([0x5C; 0x8000]);

fn refused<T: std::fmt::Debug>(result: Result<T, ProcessorError>, errno: i32, fw_error: u32) {
    let error = result.unwrap_err();
    assert_eq!((error.errno, error.fw_error), (errno, fw_error), "{error}");
}

/// A machine with all RAM private, up to and with LAUNCH_START.
fn started(options: Options) -> Option<Machine> {
    let machine = machine(1, options)?;
    apply(&machine.vcpus[0], &long_mode(0)).unwrap();
    machine
        .emulated
        .set_private(&machine.vm, 0, RAM[0].1 as u64, true)
        .unwrap();
    machine.emulated.launch_start(&machine.vm, POLICY).unwrap();
    Some(machine)
}

fn update<'s>(gfn: u64, len: u64, kind: PageKind) -> LaunchUpdate<'s> {
    LaunchUpdate {
        gfn,
        source: &SOURCE.0,
        len,
        kind,
    }
}

impl Machine {
    fn update(&self, mut update: LaunchUpdate<'_>) -> Result<(u64, u64, usize), ProcessorError> {
        self.emulated.launch_update(&self.vm, &mut update, None)?;
        Ok((update.gfn, update.len, update.source.len()))
    }

    fn finish(&self, finish: &LaunchFinish) -> Result<(), ProcessorError> {
        self.emulated.launch_finish(&self.vm, &self.vcpus, finish)
    }
}

#[test]
fn init2_comes_once_and_before_vcpus_with_known_features() {
    let Some(mut machine) = bare(Options::default()) else {
        return;
    };
    refused(machine.emulated.launch_start(&machine.vm, POLICY), ENOTTY, 0);
    refused(machine.emulated.init(&machine.vm, 1), EINVAL, 0);
    refused(machine.emulated.init(&machine.vm, 1 << 9), EINVAL, 0);
    machine.emulated.init(&machine.vm, 1 << 5).unwrap();
    refused(machine.emulated.init(&machine.vm, 0), EINVAL, 0);
    machine.add_vcpus(1);

    let Some(mut late) = bare(Options::default()) else {
        return;
    };
    late.add_vcpus(1);
    refused(late.emulated.init(&late.vm, 0), EINVAL, 0);
}

#[test]
fn slots_are_whole_pages_of_the_ram_bound_once() {
    let Some(machine) = bare(Options::default()) else {
        return;
    };
    machine.emulated.init(&machine.vm, 0).unwrap();
    machine.map();
    let host = SOURCE.0.as_ptr() as u64;
    let map = |slot, gpa, len, host_addr| {
        machine.emulated.map_region(
            &machine.vm,
            &MemoryRegion {
                slot,
                gpa,
                len,
                host_addr,
            },
        )
    };
    refused(map(0, 0x9000_0000, 0x1000, host), EINVAL, 0);
    refused(map(7, 0, 0x1000, host), EEXIST, 0);
    refused(map(7, 0x9000_0000, 0x1000, host), EINVAL, 0);
    refused(map(7, 0x9000_0001, 0x1000, host), EINVAL, 0);
    refused(map(7, 0x9000_0000, 0, host), EINVAL, 0);
    refused(map(7, !0xFFF, 0x2000, host), EINVAL, 0);
}

#[test]
fn attributes_are_for_whole_pages() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let set = |gpa, len| machine.emulated.set_private(&machine.vm, gpa, len, true);
    for (gpa, len) in [(1, 0x1000), (0, 0x1001), (0, 0), (!0xFFF, 0x2000)] {
        refused(set(gpa, len), EINVAL, 0);
    }
    set(0, 0x1000).unwrap();
    refused(machine.emulated.page_state_change(0x9000_0000, 0x1000, true), EINVAL, 0);
    refused(machine.emulated.page_state_change(0, 1, true), EINVAL, 0);
    machine.emulated.page_state_change(0, 0x1000, false).unwrap();
    assert!(machine.emulated.is_shared(0, 0x1000));
}

#[test]
fn launch_start_comes_once_with_a_policy_that_is_supported() {
    let Some(machine) = machine(1, Options::default()) else {
        return;
    };
    let start = |policy| machine.emulated.launch_start(&machine.vm, policy);
    refused(machine.update(update(0, 0x1000, PageKind::Normal)), EINVAL, 0);
    refused(machine.finish(&LaunchFinish::default()), EINVAL, 0);
    refused(start(0x10000), EINVAL, 0);
    refused(start(POLICY | 1 << 18), EINVAL, 0);
    refused(start(POLICY | 1 << 40), EINVAL, 0);
    refused(start(POLICY | 0x0200), EIO, 7);
    refused(start(POLICY | 0x0138), EIO, 7);
    start(POLICY | 0x0137).unwrap();
    refused(start(POLICY), EINVAL, 0);
}

#[test]
fn updates_take_whole_aligned_pages_of_private_memory_once() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    let normal = PageKind::Normal;
    refused(machine.update(update(1, 0, normal)), EINVAL, 0);
    refused(machine.update(update(1, 0x800, normal)), EINVAL, 0);
    refused(machine.update(update(1, 0x1000, PageKind::Shared)), EINVAL, 0);
    refused(machine.update(update(0x9_0000, 0x1000, normal)), EINVAL, 0);
    let unaligned = LaunchUpdate {
        source: &SOURCE.0[1..],
        ..update(1, 0x1000, normal)
    };
    refused(machine.update(unaligned), EINVAL, 0);
    let unaligned_zero = LaunchUpdate {
        kind: PageKind::Zero,
        ..unaligned
    };
    assert_eq!(
        machine.update(unaligned_zero).unwrap(),
        (2, 0, SOURCE.0.len() - 1),
        "ZERO has no source"
    );
    let short = LaunchUpdate {
        source: &SOURCE.0[..0x800],
        ..update(8, 0x1000, normal)
    };
    refused(machine.update(short), EIO, 0);
    // The second region is not private: every cause is EIO for the first page.
    refused(machine.update(update(0x4_0000, 0x1000, normal)), EIO, 0);
    assert_eq!(machine.update(update(16, 0x2000, normal)).unwrap(), (18, 0, 0x6000));
    refused(machine.update(update(16, 0x1000, normal)), EIO, 0);
    refused(machine.update(update(17, 0x1000, PageKind::Unmeasured)), EIO, 0);
}

#[test]
fn a_later_page_that_fails_leaves_partial_success_and_then_eio() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    machine.update(update(22, 0x1000, PageKind::Normal)).unwrap();
    let (gfn, len, left) = machine.update(update(20, 0x4000, PageKind::Normal)).unwrap();
    assert_eq!((gfn, len, left), (22, 0x2000, 0x6000));
    refused(machine.update(update(22, 0x2000, PageKind::Normal)), EIO, 0);
}

#[test]
fn updates_are_clipped_to_the_slot_and_to_what_an_injection_allows() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    let last = RAM[0].1 as u64 / 4096 - 2;
    assert_eq!(
        machine.update(update(last, 0x5000, PageKind::Normal)).unwrap(),
        (last + 2, 0x3000, 0x6000)
    );
    refused(machine.update(update(last + 2, 0x3000, PageKind::Normal)), EINVAL, 0);

    let injection = Injection {
        most_pages_per_update: Some(2),
        ..Injection::default()
    };
    let Some(slow) = started(Options {
        injection,
        ..Options::default()
    }) else {
        return;
    };
    assert_eq!(
        slow.update(update(30, 0x5000, PageKind::Normal)).unwrap(),
        (32, 0x3000, 0x6000)
    );
    assert_eq!(
        slow.update(update(32, 0x3000, PageKind::Zero)).unwrap(),
        (34, 0x1000, 0x8000)
    );
}

#[test]
fn a_cpuid_page_that_claims_too_much_comes_back_corrected() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    let leaf = Leaf {
        eax_in: 1,
        ecx: 1 << 24 | 1,
        ..Leaf::default()
    };
    let mut source = Source([0; 0x8000]);
    source.0[..4096].copy_from_slice(&cpuid::page(&[leaf]));
    let mut correction = [0xFF; 4096];
    let mut bad = LaunchUpdate {
        source: &source.0[..4096],
        ..update(40, 0x1000, PageKind::Cpuid)
    };
    refused(
        machine
            .emulated
            .launch_update(&machine.vm, &mut bad, Some(&mut correction)),
        EIO,
        0x16,
    );
    assert_eq!(cpuid::parse(&correction).unwrap(), [Leaf { ecx: 1, ..leaf }]);
    assert_eq!((bad.gfn, bad.len), (40, 0x1000));
    let mut fixed = Source([0; 0x8000]);
    fixed.0[..4096].copy_from_slice(&correction);
    let good = LaunchUpdate {
        source: &fixed.0[..4096],
        ..update(40, 0x1000, PageKind::Cpuid)
    };
    assert_eq!(machine.update(good).unwrap(), (41, 0, 0));
    fixed.0[0] = 65;
    let long = LaunchUpdate {
        source: &fixed.0[..4096],
        ..update(41, 0x1000, PageKind::Cpuid)
    };
    refused(machine.update(long), EIO, 0x16);
}

#[test]
fn finish_seals_once() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    assert_eq!(machine.emulated.launch_digest(), None);
    machine.finish(&LaunchFinish::default()).unwrap();
    assert!(machine.emulated.launch_digest().is_some());
    refused(machine.finish(&LaunchFinish::default()), EINVAL, 0);
    refused(machine.update(update(50, 0x1000, PageKind::Normal)), EIO, 2);
    refused(machine.emulated.launch_start(&machine.vm, POLICY), EINVAL, 0);
}

#[test]
fn finish_wants_dr7_at_reset() {
    let Some(machine) = started(Options::default()) else {
        return;
    };
    let mut debugged = long_mode(0);
    debugged.dr7 = 0x401;
    apply(&machine.vcpus[0], &debugged).unwrap();
    refused(machine.finish(&LaunchFinish::default()), EINVAL, 0);
}

#[test]
fn the_id_block_is_checked_against_the_launch() {
    let digest = {
        let Some(machine) = started(Options::default()) else {
            return;
        };
        machine.update(update(60, 0x3000, PageKind::Normal)).unwrap();
        machine.finish(&LaunchFinish::default()).unwrap();
        machine.emulated.launch_digest().unwrap()
    };
    let attempt = |digest: [u8; 48], policy, author: bool, spoil: &dyn Fn(&mut [u8; 96], &mut [u8; 4096])| {
        let machine = started(Options::default()).unwrap();
        machine.update(update(60, 0x3000, PageKind::Normal)).unwrap();
        let mut id = unsigned(digest);
        let author_key = author.then(|| Signer::generate().unwrap());
        Signer::generate()
            .unwrap()
            .sign_block(&mut id, policy, author_key.as_ref())
            .unwrap();
        let (mut id_block, mut id_auth) = (block(&id, policy), auth(&id));
        spoil(&mut id_block, &mut id_auth);
        let result = machine.finish(&LaunchFinish {
            id_block: Some((id_block, id_auth)),
            author_key_enabled: author,
            ..LaunchFinish::default()
        });
        if result.is_err() {
            assert_eq!(machine.emulated.launch_digest(), None);
            refused(machine.finish(&LaunchFinish::default()), EINVAL, 0);
        }
        result
    };
    attempt(digest, POLICY, false, &|_, _| {}).unwrap();
    attempt(digest, POLICY, true, &|_, _| {}).unwrap();
    refused(attempt([0; 48], POLICY, false, &|_, _| {}), EIO, 0xB);
    refused(attempt(digest, 0x20000, false, &|_, _| {}), EIO, 7);
    refused(attempt(digest, POLICY, false, &|block, _| block[0x54] ^= 1), EIO, 0xA);
    refused(attempt(digest, POLICY, true, &|_, auth| auth[0x680] ^= 1), EIO, 0xA);
    refused(attempt(digest, POLICY, false, &|_, auth| auth[0] = 9), EIO, 0x16);
}
