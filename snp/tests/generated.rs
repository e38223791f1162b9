//! Generated images: the prediction from the image equals the igvm crate's measurement, and the digest of a launch.
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

use std::borrow::Cow;

use common::*;
use igvm::{IgvmFile, IsolationType};
use podvisor_firmware::igvm::build::{BuildOptions, build};
use podvisor_firmware::igvm::{PlanOptions, plan as read_plan};
use podvisor_firmware::plan::{LaunchPlan, PageKind, ParameterArea, Platform, Step};
use podvisor_snp::digest::{Prediction, predict};
use podvisor_snp::emulated::Options;
use podvisor_snp::launch::{LaunchOptions, launch};

/// A small generator, so that every run sees the same images.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A plan of pages of all kinds, parameter areas and vCPU contexts, in a random order.
fn generated(seed: u64) -> LaunchPlan<'static> {
    let mut random = Random(seed);
    let mut plan = LaunchPlan::new(Platform::SevSnp);
    plan.policy = Some(0x30000);
    let mut gpa = 0x10_0000;
    for _ in 0..3 + random.below(10) {
        let count = 1 + random.below(6);
        let kind = match random.below(7) {
            0 => PageKind::Unmeasured,
            1 => PageKind::Secrets,
            2 => PageKind::Cpuid,
            3 => PageKind::Shared,
            _ => PageKind::Normal,
        };
        let data = match kind {
            PageKind::Secrets | PageKind::Cpuid => Vec::new(),
            _ if random.below(4) == 0 => Vec::new(),
            _ => (0..count * 4096).map(|_| random.below(256) as u8).collect(),
        };
        let len = if data.is_empty() { 0x1000 } else { count * 0x1000 };
        plan.steps.push(pages(gpa, len, kind, data));
        gpa += len + 0x1000 * random.below(3);
        if random.below(3) == 0 {
            let len = 0x1000 * (1 + random.below(3));
            plan.areas.push(ParameterArea {
                len,
                initial: Cow::Borrowed(&[]),
                parameters: Vec::new(),
            });
            plan.steps.push(Step::Parameters {
                gpa,
                area: plan.areas.len() - 1,
            });
            gpa += len;
        }
    }
    plan.vps.push(context(0, 0x1000 * random.below(1000)));
    plan.steps.push(Step::Vcpu { vp: 0 });
    plan
}

fn crate_measurement(image: &[u8]) -> [u8; 48] {
    let file = IgvmFile::new_from_binary(image, Some(IsolationType::Snp)).unwrap();
    igvm::measurement::generate_snp_measurement(file.initializations(), file.directives(), 1).unwrap()
}

#[test]
fn forty_images_measure_as_the_igvm_crate_does() {
    for seed in 0..40 {
        for preserve_order in [false, true] {
            let options = BuildOptions {
                preserve_order,
                ..BuildOptions::default()
            };
            let image = build(&[generated(seed)], &options).unwrap();
            let plan = read_plan(&image, &PlanOptions::default()).unwrap();
            let ours = predict(&plan, 1).unwrap();
            assert_eq!(
                ours.digest,
                crate_measurement(&image),
                "seed {seed}, order kept: {preserve_order}"
            );
        }
    }
}

fn launched(plan: &LaunchPlan<'_>, vcpus: u64) -> Option<Prediction> {
    let machine = machine(vcpus, Options::default())?;
    let options = LaunchOptions {
        private_ram: all_ram(),
        areas: plan
            .areas
            .iter()
            .map(|area| vec![0xA5; area.len as usize / 2])
            .collect(),
        ..LaunchOptions::default()
    };
    let report = launch(
        &machine.emulated,
        &machine.vm,
        &machine.vcpus,
        &machine.memory,
        plan,
        &options,
    )
    .unwrap();
    assert_eq!(report.launched, Some(report.predicted.digest));
    Some(report.predicted)
}

#[test]
fn a_launch_has_the_digest_of_its_plan() {
    for seed in 0..12 {
        let image = build(&[generated(seed)], &BuildOptions::default()).unwrap();
        let plan = read_plan(&image, &PlanOptions::default()).unwrap();
        for vcpus in [1, 2] {
            let Some(predicted) = launched(&plan, vcpus) else {
                return;
            };
            assert_eq!(predicted, predict(&plan, vcpus as u32).unwrap(), "seed {seed}");
        }
    }
}
