//! The reader and the writer against each other, against the igvm crate, and against damage.
#![expect(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

mod refusals;
pub(crate) mod samples;

use igvm::{IgvmDirectiveHeader as Directive, IgvmFile, IsolationType};
use igvm_defs::IgvmPlatformType;
use samples::{Effect, Rng, effects, sample_plan, seal};

use super::*;
use crate::plan::*;

fn options(platform: Platform) -> PlanOptions {
    PlanOptions {
        platform: Some(platform),
        ..PlanOptions::default()
    }
}

const KEEP: BuildOptions = BuildOptions {
    version: FormatVersion::Auto,
    preserve_order: true,
};

/// Everything of two plans but how their steps are joined.
fn assert_same(built: &LaunchPlan<'_>, original: &LaunchPlan<'_>, seed: u64) {
    assert_eq!(effects(built), effects(original), "seed {seed}");
    assert_eq!(built.policy, original.policy);
    assert_eq!(built.areas, original.areas);
    assert_eq!(built.vps, original.vps);
    assert_eq!(built.required_memory, original.required_memory);
    assert_eq!(built.error_ranges, original.error_ranges);
    assert_eq!(built.id_block, original.id_block);
}

#[test]
fn what_is_built_reads_back() {
    for seed in 0..300 {
        for platform in [Platform::Native, Platform::SevSnp] {
            let original = sample_plan(seed, platform);
            let file = build(std::slice::from_ref(&original), &KEEP).unwrap();
            let read = plan(&file, &options(platform)).unwrap();
            assert_same(&read, &original, seed);
            // Once normal, always normal: byte for byte.
            let again = build(std::slice::from_ref(&read), &KEEP).unwrap();
            assert_eq!(plan(&again, &options(platform)).unwrap(), read, "seed {seed}");
            assert_eq!(again, file);
        }
    }
}

#[test]
fn two_platforms_share_what_is_the_same() {
    for seed in 0..100 {
        let native = sample_plan(seed, Platform::Native);
        let mut snp = sample_plan(seed + 1000, Platform::SevSnp);
        // Half of the SNP plan's memory is the native plan's.
        let other_id = snp.id_block.take();
        if seed % 2 == 0 {
            snp.areas = native.areas.clone();
            snp.steps = native
                .steps
                .iter()
                .filter(|s| !matches!(s, Step::Vcpu { .. }))
                .cloned()
                .collect();
            snp.steps.extend((0..snp.vps.len()).map(|vp| Step::Vcpu { vp }));
        }
        snp.id_block = other_id;
        for pair in [[native.clone(), snp.clone()], [snp.clone(), native.clone()]] {
            let file = build(&pair, &KEEP).unwrap();
            assert_same(&plan(&file, &options(Platform::Native)).unwrap(), &native, seed);
            assert_same(&plan(&file, &options(Platform::SevSnp)).unwrap(), &snp, seed);
            assert_eq!(plan(&file, &PlanOptions::default()).unwrap().platform, Platform::SevSnp);
            let parsed = IgvmFile::new_from_binary(&file, None).unwrap();
            let shared = parsed
                .directives()
                .iter()
                .filter(|d| d.compatibility_mask() == Some(3))
                .count();
            let pages = effects(&native)
                .iter()
                .filter(|e| matches!(e, Effect::Page(..)))
                .count();
            assert!(seed % 2 == 1 || shared >= pages, "{shared} shared of {pages}");
        }
    }
}

#[test]
fn default_order_is_parameters_pages_vcpus() {
    for seed in 0..50 {
        let original = sample_plan(seed, Platform::SevSnp);
        let file = build(&[original], &BuildOptions::default()).unwrap();
        let read = plan(&file, &PlanOptions::default()).unwrap();
        let ranks: Vec<u8> = read
            .steps
            .iter()
            .map(|step| match step {
                Step::Parameters { .. } => 0,
                Step::Pages { .. } => 1,
                Step::Vcpu { .. } => 2,
            })
            .collect();
        assert!(ranks.is_sorted(), "seed {seed}: {ranks:?}");
    }
}

/// What the igvm crate reads must be what ours reads.
#[test]
fn agrees_with_the_igvm_crate() {
    let mut compared = 0;
    for seed in 0..60 {
        let original = sample_plan(seed, Platform::SevSnp);
        for version in [FormatVersion::V1, FormatVersion::V2] {
            let file = build(
                std::slice::from_ref(&original),
                &BuildOptions {
                    version,
                    preserve_order: true,
                },
            )
            .unwrap();
            let ours = plan(&file, &PlanOptions::default()).unwrap();
            let theirs = IgvmFile::new_from_binary(&file, Some(IsolationType::Snp)).unwrap();
            let mut areas = std::collections::HashMap::new();
            let mut expected = effects(&ours).into_iter();
            for directive in theirs.directives() {
                match directive {
                    Directive::PageData { gpa, flags, data, .. } => {
                        let Some(Effect::Page(our_gpa, kind, bytes)) = expected.next() else {
                            panic!("no page")
                        };
                        let mut data = data.clone();
                        data.resize(4096, 0);
                        assert_eq!((our_gpa, bytes), (*gpa, data));
                        assert_eq!(kind == PageKind::Shared, flags.shared());
                        compared += 1;
                    }
                    Directive::ParameterArea {
                        number_of_bytes,
                        parameter_area_index,
                        ..
                    } => {
                        areas.insert(*parameter_area_index, *number_of_bytes);
                    }
                    Directive::ParameterInsert(insert) => {
                        let Some(Effect::Area(gpa, area)) = expected.next() else {
                            panic!("no insert")
                        };
                        assert_eq!((gpa, area.len), (insert.gpa, areas[&insert.parameter_area_index]));
                    }
                    Directive::SnpVpContext {
                        gpa, vp_index, vmsa, ..
                    } => {
                        use zerocopy::IntoBytes;
                        let Some(Effect::Vcpu(vp)) = expected.next() else {
                            panic!("no vCPU")
                        };
                        assert_eq!((vp.gpa, vp.index, &*vp.vmsa), (*gpa, *vp_index, vmsa.as_bytes()));
                    }
                    _ => {}
                }
            }
            assert_eq!(expected.next(), None);
        }
    }
    assert!(compared > 1000, "{compared} pages");
}

/// Files that the igvm crate writes, with its own layout, read alike.
#[test]
fn reads_what_the_igvm_crate_writes() {
    for seed in 0..20 {
        for platform in [Platform::Native, Platform::SevSnp] {
            let original = sample_plan(seed, platform);
            let file = build(std::slice::from_ref(&original), &KEEP).unwrap();
            let mut theirs = Vec::new();
            IgvmFile::new_from_binary(&file, None)
                .unwrap()
                .serialize(&mut theirs)
                .unwrap();
            assert_ne!(file, theirs);
            assert_same(&plan(&theirs, &options(platform)).unwrap(), &original, seed);
        }
    }
}

#[test]
fn neighbours_in_memory_and_file_are_one_step() {
    let data = Rng(1).bytes(64 * 4096);
    let mut original = LaunchPlan::new(Platform::SevSnp);
    original.steps.push(Step::Pages {
        gpa: 0x20_0000,
        len: 64 * 4096,
        kind: PageKind::Normal,
        data: (&data).into(),
    });
    let file = build(std::slice::from_ref(&original), &KEEP).unwrap();
    let read = plan(&file, &PlanOptions::default()).unwrap();
    assert_eq!(read, original);
    let Step::Pages {
        data: std::borrow::Cow::Borrowed(bytes),
        ..
    } = &read.steps[0]
    else {
        panic!("copied")
    };
    assert_eq!((bytes.as_ptr() as usize - file.as_ptr() as usize) % 4096, 0);
}

#[test]
fn zero_pages_are_what_was_asked_for() {
    let mut original = LaunchPlan::new(Platform::SevSnp);
    original.steps.push(Step::Pages {
        gpa: 0,
        len: 0x2000,
        kind: PageKind::Zero,
        data: (&[][..]).into(),
    });
    original.steps.push(Step::Pages {
        gpa: 0x2000,
        len: 0x1000,
        kind: PageKind::Normal,
        data: (&[][..]).into(),
    });
    let file = build(std::slice::from_ref(&original), &KEEP).unwrap();
    let kinds = |zero_pages| {
        let plan = plan(
            &file,
            &PlanOptions {
                platform: None,
                zero_pages,
            },
        )
        .unwrap();
        effects(&plan)
            .iter()
            .map(|e| if let Effect::Page(_, k, _) = e { *k } else { panic!() })
            .collect::<Vec<_>>()
    };
    use PageKind::{Normal, Zero};
    assert_eq!(kinds(ZeroPages::AsNormal), [Normal, Normal, Normal]);
    // The page of zeros that the plan wants measured was written out, and stays.
    assert_eq!(kinds(ZeroPages::AsZero), [Zero, Zero, Normal]);
}

#[test]
fn platforms_are_listed() {
    let file = build(
        &[sample_plan(1, Platform::Native), sample_plan(2, Platform::SevSnp)],
        &BuildOptions::default(),
    )
    .unwrap();
    let found = platforms(&file).unwrap();
    let named: Vec<_> = found
        .iter()
        .map(|p| (p.name(), p.compatibility_mask, p.platform()))
        .collect();
    assert_eq!(
        named,
        [
            ("NATIVE", 1, Some(Platform::Native)),
            ("SEV_SNP", 2, Some(Platform::SevSnp))
        ]
    );
    assert_eq!(found[1].platform_type, IgvmPlatformType::SEV_SNP.0);
}

#[test]
fn plans_that_no_file_can_hold_are_refused() {
    let one = sample_plan(1, Platform::SevSnp);
    let refuse = |change: &dyn Fn(&mut LaunchPlan<'static>)| {
        let mut plan = one.clone();
        change(&mut plan);
        build(&[plan], &KEEP).unwrap_err()
    };
    assert_eq!(
        build(&[one.clone(), one.clone()], &KEEP).unwrap_err(),
        BuildError::Platforms(vec![Platform::SevSnp, Platform::SevSnp])
    );
    let page = |gpa, len| Step::Pages {
        gpa,
        len,
        kind: PageKind::Normal,
        data: (&[][..]).into(),
    };
    assert_eq!(
        refuse(&|p| p.steps.push(page(0x123, 4096))),
        BuildError::Unaligned { gpa: 0x123, len: 4096 }
    );
    assert_eq!(
        refuse(&|p| p.steps.push(Step::Vcpu { vp: 9 })),
        BuildError::Dangling { what: "vCPU", index: 9 }
    );
    assert_eq!(
        refuse(&|p| p.steps.push(Step::Parameters { gpa: 0, area: 99 })),
        BuildError::Dangling {
            what: "parameter area",
            index: 99
        }
    );
    let range = GpaRange { start: 0, len: 1 << 32 };
    assert_eq!(refuse(&|p| p.required_memory.push(range)), BuildError::Range(range));
    let overlap = refuse(&|p| p.steps.extend([page(0x5000_0000, 4096), page(0x5000_0000, 4096)]));
    assert!(
        matches!(
            overlap,
            BuildError::Invalid(IgvmError {
                reason: Reason::Overlap { .. },
                ..
            })
        ),
        "{overlap}"
    );
}

/// Damage of every kind: a flipped bit, a byte, a word, a cut, with and without the checksum made right again.
/// The count is 100,000, or `PODVISOR_IGVM_MUTATIONS`.
#[test]
fn damage_is_refused_and_never_more() {
    let wanted: u64 = std::env::var("PODVISOR_IGVM_MUTATIONS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100_000);
    let images: Vec<Vec<u8>> = (0..8)
        .map(|seed| {
            let plans = [
                sample_plan(seed, Platform::SevSnp),
                sample_plan(seed + 8, Platform::Native),
            ];
            build(if seed % 2 == 0 { &plans } else { &plans[..1] }, &KEEP).unwrap()
        })
        .collect();
    let mut rng = Rng(0xDA3A6E);
    let (mut accepted, mut refused) = (0u64, 0u64);
    for round in 0..wanted {
        let mut file = images[(round % 8) as usize].clone();
        let header_bytes = u64::from(u32::from_le_bytes(file[12..16].try_into().unwrap())) + 32;
        for _ in 0..=rng.below(3) {
            let at = rng.below(header_bytes.min(file.len() as u64)) as usize;
            match rng.below(5) {
                0 => file[at] ^= 1 << rng.below(8),
                1 => file[at] = rng.next() as u8,
                2 => file[at..].iter_mut().take(4).for_each(|byte| *byte = 0xFF),
                3 => file[at..].iter_mut().take(8).for_each(|byte| *byte = rng.next() as u8),
                _ if rng.below(20) == 0 => file.truncate(at + 1),
                _ => file[at] = 0,
            }
        }
        if file.len() < 24 {
            continue;
        }
        if rng.below(50) != 0 {
            let len = (file.len() as u32).to_le_bytes();
            file[16..20].copy_from_slice(&len);
            seal(&mut file);
        }
        let outcome = [Platform::SevSnp, Platform::Native].map(|platform| match plan(&file, &options(platform)) {
            Ok(plan) => {
                assert!(plan.steps.len() <= file.len() / 8);
                true
            }
            Err(e) => {
                assert!(!e.to_string().is_empty());
                false
            }
        });
        if outcome.contains(&true) {
            accepted += 1;
        } else {
            refused += 1;
        }
    }
    // Both sides of the parser were reached.
    assert!(
        accepted > wanted / 100 && refused > wanted / 10,
        "{accepted} accepted, {refused} refused"
    );
}
