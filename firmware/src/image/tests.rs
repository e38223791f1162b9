//! Images of made-up kernels, taken apart again.

use proptest::prelude::*;
use zerocopy::FromBytes;

use super::kernel::tests::{elf, sample};
use super::read::{Payloads, read};
use super::*;
use crate::acpi::tables;
use crate::igvm::{self, BuildOptions, PlanOptions, build};
use crate::layout;
use crate::stage0::abi::{CHUNK_SIZE, Manifest};

const PLATFORMS: [Platform; 2] = [Platform::Native, Platform::SevSnp];
const SHIM: &[u8] = &[0xF4; 40_000];

/// No SHA-256, but it tells bytes apart.
fn sum(bytes: &[u8]) -> [u8; 32] {
    let (mut a, mut b) = (bytes.len() as u64, 1u64);
    for word in bytes.chunks(8) {
        let mut number = [0; 8];
        number[..word.len()].copy_from_slice(word);
        a = a.rotate_left(5) ^ u64::from_le_bytes(number);
        b = b.wrapping_mul(0x100_0000_01B3).wrapping_add(a);
    }
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&a.to_le_bytes());
    digest[8..16].copy_from_slice(&b.to_le_bytes());
    digest
}

fn options(command_line: &str) -> ImageOptions<'_> {
    ImageOptions {
        shim: Shim {
            image: SHIM,
            entry: abi::STAGE0_START,
            memory_end: abi::STAGE0_START + 0x2_0000,
        },
        command_line,
        machine: ImageMachine {
            max_vcpus: 32,
            segments: 1,
            memory_slots: None,
        },
        policy: 0x3_0000,
        measure_all: false,
    }
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u64).wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed)
        .collect()
}

/// What a plan fills, as ranges: data or not.
fn filled(plan: &LaunchPlan<'_>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<_> = plan
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Pages { gpa, len, .. } => Some((*gpa, gpa + len)),
            Step::Parameters { gpa, area } => Some((*gpa, gpa + plan.areas[*area].len)),
            Step::Vcpu { .. } => None,
        })
        .collect();
    ranges.sort_unstable();
    ranges
}

fn measured(plan: &LaunchPlan<'_>) -> u64 {
    let normal = plan.steps.iter().map(|step| match step {
        Step::Pages {
            len,
            kind: PageKind::Normal,
            ..
        } => *len,
        _ => 0,
    });
    normal.sum::<u64>() + PAGE_SIZE
}

fn manifest_of(plan: &LaunchPlan<'_>) -> Manifest {
    read(plan, &sum).unwrap().unwrap().manifest
}

#[test]
fn an_image_reads_back_as_what_was_put_in() {
    let (code, initrd) = (sample(&bytes(3_000_000, 1)), bytes(2_500_001, 2));
    let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
    for measure_all in [false, true] {
        let options = ImageOptions {
            measure_all,
            ..options("console=ttyS0 quiet")
        };
        let image = LinuxImage::new(&kernel, &initrd, options, &sum).unwrap();
        let plans = PLATFORMS.map(|platform| image.plan(platform).unwrap());
        let file = build(&plans, &BuildOptions::default()).unwrap();
        assert_eq!(file, build(&plans, &BuildOptions::default()).unwrap());
        // Both platforms have the payloads in one place of the file.
        assert!(file.len() < 3_000_000 + 2_500_001 + 400_000, "{}", file.len());
        for (plan, platform) in plans.iter().zip(PLATFORMS) {
            let back = igvm::plan(
                &file,
                &PlanOptions {
                    platform: Some(platform),
                    ..PlanOptions::default()
                },
            )
            .unwrap();
            let found = read(&back, &sum).unwrap().unwrap();
            assert_eq!(found.payloads, Payloads::Match);
            assert_eq!(found.command_line, "console=ttyS0 quiet");
            assert_eq!(found.manifest, manifest_of(plan));
            let Manifest {
                kernel: k, initrd: i, ..
            } = found.manifest;
            assert_eq!(
                (k.dest, k.entry, k.len),
                (0x100_0000, 0x100_0200, kernel.payload.len() as u64)
            );
            assert_eq!((i.len, i.dest), (2_500_001, k.dest + k.memory_len));
            let in_place = measure_all || platform == Platform::Native;
            assert_eq!((k.staged == k.dest, i.staged == i.dest), (in_place, in_place));
            assert_eq!(back.policy, (platform == Platform::SevSnp).then_some(0x3_0000));
        }
    }
}

#[test]
fn what_is_measured_does_not_depend_on_the_payloads() {
    let sizes = [(20usize << 20, 40usize << 20), (80 << 20, 160 << 20)];
    let mut all = Vec::new();
    for (kernel, initrd) in sizes {
        let (code, initrd) = (sample(&vec![0x90; kernel]), vec![0x5A; initrd]);
        let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
        let image = LinuxImage::new(&kernel, &initrd, options("quiet"), &sum).unwrap();
        all.push(measured(&image.plan(Platform::SevSnp).unwrap()));
    }
    assert_eq!(all[0], all[1]);
    assert!(all[0] <= 64 << 10, "{} bytes", all[0]);
    let code = sample(&vec![0x90; 5 << 20]);
    let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
    let options = ImageOptions {
        measure_all: true,
        ..options("quiet")
    };
    let image = LinuxImage::new(&kernel, &[], options, &sum).unwrap();
    assert!(measured(&image.plan(Platform::SevSnp).unwrap()) > 5 << 20);
}

#[test]
fn a_changed_payload_is_found() {
    let (code, initrd) = (sample(&bytes(1_500_000, 1)), bytes(5000, 2));
    let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
    let image = LinuxImage::new(&kernel, &initrd, options("quiet"), &sum).unwrap();
    let plan = image.plan(Platform::SevSnp).unwrap();
    let manifest = manifest_of(&plan);
    let changed = |gpa: u64, at: usize| {
        let mut plan = plan.clone();
        for step in &mut plan.steps {
            if let Step::Pages { gpa: start, data, .. } = step
                && *start == gpa
            {
                data.to_mut()[at] ^= 1;
            }
        }
        match read(&plan, &sum).unwrap().unwrap().payloads {
            Payloads::Differ(what) => what,
            Payloads::Match => panic!("{gpa:#x}"),
        }
    };
    assert!(changed(manifest.kernel.staged, 1_200_000).contains("chunk 1 of the kernel"));
    assert!(changed(manifest.initrd.staged, 4999).contains("chunk 0 of the initrd"));
    assert!(changed(manifest.chunks, 33).contains("chunk digests"));
    let mut plan = plan.clone();
    plan.steps
        .retain(|step| !matches!(step, Step::Pages { gpa, .. } if *gpa == manifest.initrd.staged));
    let found = read(&plan, &sum).unwrap().unwrap().payloads;
    assert!(matches!(found, Payloads::Differ(what) if what.contains("initrd is not in the image")));
}

#[test]
fn steps_come_in_the_order_that_all_loaders_measure_alike() {
    let code = sample(&bytes(100_000, 1));
    let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
    let image = LinuxImage::new(&kernel, &[1; 10], options("quiet"), &sum).unwrap();
    let plan = image.plan(Platform::SevSnp).unwrap();
    let order: Vec<_> = plan
        .steps
        .iter()
        .map(|step| match step {
            Step::Parameters { .. } => "parameters",
            Step::Vcpu { .. } => "vcpu",
            Step::Pages { kind, .. } => crate::inspect::kind_name(*kind),
        })
        .collect();
    assert_eq!(
        order,
        [
            "parameters",
            "parameters",
            "parameters",
            "cpuid",
            "secrets",
            "normal",
            "normal",
            "shared",
            "shared",
            "shared",
            "vcpu"
        ]
    );
    assert!(crate::vmsa::kvm_reproducible(&plan.vps[0].vmsa).is_ok());
    assert_eq!((plan.vps[0].state.rbx, plan.vps[0].state.rip), (1, abi::STAGE0_START));
    assert_eq!(image.plan(Platform::Native).unwrap().vps[0].state.rbx, 0);
}

#[test]
fn what_does_not_fit_is_named() {
    let code = sample(&bytes(100_000, 1));
    let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
    let error = |initrd: &[u8], options| match LinuxImage::new(&kernel, initrd, options, &sum) {
        Err(error) => error.to_string(),
        Ok(image) => image.plan(Platform::SevSnp).unwrap_err().to_string(),
    };
    let long = "x".repeat(2048);
    assert!(error(&[], options(&long)).contains("2048 bytes, and this kernel takes 2047"));
    assert!(error(&[], options("a\0b")).contains("NUL at byte 1"));
    for max_vcpus in [0, 252] {
        let mut options = options("");
        options.machine.max_vcpus = max_vcpus;
        assert!(error(&[], options).contains("1 to 251"));
    }
    let mut segments = options("");
    segments.machine.segments = 96;
    segments.machine.max_vcpus = 251;
    assert!(error(&[], segments).contains("manifest"));
    let mut shim = options("");
    shim.shim.memory_end = abi::STAGE0_END + PAGE_SIZE;
    assert!(error(&[], shim).contains("stage0"));
    // The MADT of as many vCPUs as an image can have fits into its page.
    assert!(tables::madt(1, MAX_VCPUS).len() as u64 <= PAGE_SIZE);
    assert!(tables::madt(1, MAX_VCPUS + 1).len() as u64 > PAGE_SIZE);
}

#[test]
fn places_have_limits() {
    let file = elf(0x100_0000, &[(0x100_0000, &[1; 0x1000], 0x1000)]);
    let kernel = Kernel::read(&file, Unpacking::ByGuest).unwrap();
    let find = |initrd| Places::find(&kernel, initrd, Platform::SevSnp, false);
    assert!(find(900 << 20).is_ok());
    assert!(matches!(
        find(1 << 30),
        Err(PlaceError::Chunks { limit: 0x4000_0000, .. })
    ));
    let low = Kernel {
        initrd_addr_max: 0x200_0FFF,
        ..kernel.clone()
    };
    let fits = 0x200_1000 - 0x100_1000;
    assert!(Places::find(&low, fits, Platform::Native, false).is_ok());
    let refused = Places::find(&low, fits + 1, Platform::Native, false).unwrap_err();
    assert!(
        refused.to_string().contains("the initrd of 16777217 bytes"),
        "{refused}"
    );
    let high = Kernel {
        dest: 0xB000_0000,
        initrd_addr_max: u32::MAX.into(),
        ..kernel.clone()
    };
    let refused = Places::find(&high, 200 << 20, Platform::SevSnp, false).unwrap_err();
    assert!(refused.to_string().contains("shared copy"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn nothing_lies_on_anything_else(code in 600usize..3 << 20, initrd in 0usize..3 << 20, measure_all in any::<bool>(), slots in proptest::option::of(0u8..=8), max_vcpus in 1u32..=200) {
        let (code, initrd) = (sample(&vec![1; code]), vec![2; initrd]);
        let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
        let mut options = ImageOptions { measure_all, ..options("quiet") };
        options.machine.memory_slots = slots;
        options.machine.max_vcpus = max_vcpus;
        let image = LinuxImage::new(&kernel, &initrd, options, &sum).unwrap();
        for platform in PLATFORMS {
            let plan = image.plan(platform).unwrap();
            let ranges = filled(&plan);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].0, "{:x?}", pair);
            }
            prop_assert!(ranges.last().unwrap().1 <= layout::MEM_32BIT_RESERVED_START);
            prop_assert!(ranges.iter().all(|(start, end)| start % PAGE_SIZE == 0 && end % PAGE_SIZE == 0));
            let Manifest { kernel, initrd, chunk_count, chunks, .. } = manifest_of(&plan);
            prop_assert!(initrd.len == 0 || initrd.dest >= kernel.dest + kernel.memory_len);
            prop_assert!(chunks >= kernel.dest + kernel.memory_len && chunks >= initrd.dest + initrd.memory_len);
            prop_assert_eq!(u64::from(chunk_count), kernel.len.div_ceil(CHUNK_SIZE) + initrd.len.div_ceil(CHUNK_SIZE));
            if platform == Platform::SevSnp && !measure_all {
                let shared = plan.steps.iter().filter(|s| matches!(s, Step::Pages { kind: PageKind::Shared, .. }));
                prop_assert_eq!(shared.count(), if initrd.len == 0 { 2 } else { 3 });
            }
        }
    }

    #[test]
    fn any_manifest_is_read_or_refused(changes in proptest::collection::vec((0usize..0xB0, any::<u8>()), 1..8)) {
        let code = sample(&[1; 5000]);
        let kernel = Kernel::read(&code, Unpacking::ByGuest).unwrap();
        let image = LinuxImage::new(&kernel, &[3; 5000], options("quiet"), &sum).unwrap();
        let mut plan = image.plan(Platform::SevSnp).unwrap();
        for step in &mut plan.steps {
            if let Step::Pages { gpa: abi::MANIFEST_START, data, .. } = step {
                for (at, value) in &changes {
                    data.to_mut()[*at] = *value;
                }
                prop_assert!(Manifest::read_from_prefix(data).is_ok());
            }
        }
        // Whatever it holds, this ends.
        let _ = read(&plan, &sum);
    }
}
