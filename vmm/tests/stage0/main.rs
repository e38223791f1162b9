//! stage0 in a real podvisor: what it boots, what the kernel is told, and what it refuses of a host that lies. The kernel is
//! a few instructions (`kernel`); Linux is booted in the nested rig.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failure here is the test's"
)]

#[path = "../common/mod.rs"]
mod common;
mod image;
mod kernel;

use std::borrow::Cow;

use common::{Process, kvm};
use image::{Parts, file};
use kernel::{Told, long, word};
use podvisor_firmware::acpi::tables;
use podvisor_firmware::plan::{LaunchPlan, PageKind, Platform, Step};
use podvisor_firmware::stage0::{COMPILER, IMAGE, abi, codes};
use podvisor_snp::digest::predict;
use serde_json::json;

const PLATFORMS: [Platform; 2] = [Platform::Native, Platform::SevSnp];

fn isolation(platform: Platform) -> &'static str {
    match platform {
        Platform::Native => "none",
        Platform::SevSnp => "snp-emulated",
    }
}

/// A pod of `vcpus` that boots `plan`, to its end.
struct Run {
    process: Process,
    code: Option<i32>,
}

impl Run {
    fn new(plan: &LaunchPlan<'_>, vcpus: u32, expect_digest: Option<&str>) -> Self {
        let expect = expect_digest.map(|digest| ["--expect-digest", digest]);
        let mut process = Process::start_with(expect.as_ref().map_or(&[], |args| &args[..]));
        std::fs::write(process.path("image"), file(plan)).unwrap();
        let config = json!({
            "cpus": {"boot_vcpus": vcpus, "max_vcpus": vcpus},
            "memory": {"size": 64 << 20},
            "payload": {"igvm": process.path("image")},
            "platform": {"isolation": isolation(plan.platform)},
            "serial": {"mode": "File", "file": process.path("serial")},
            "console": {"mode": "Off"},
        });
        process.put("vm.create", Some(&config));
        process.put("vm.boot", None);
        let code = process.wait().code();
        Self { process, code }
    }

    fn serial(&self) -> Vec<u8> {
        std::fs::read(self.process.path("serial")).unwrap()
    }

    fn told(&self) -> Told {
        assert_eq!(
            self.code,
            Some(0),
            "{}{}",
            String::from_utf8_lossy(&self.serial()),
            self.process.log()
        );
        Told::read(&self.serial())
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn stage0_is_the_recorded_one() {
    let recorded = include_str!("../../../firmware/stage0/stage0.sha384");
    let (digest, compiler) = recorded.trim_end().split_once("  ").unwrap();
    if compiler != COMPILER {
        println!("skipped: stage0.sha384 is for {compiler}, and this is {COMPILER}");
        return;
    }
    let built: String = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA384, IMAGE)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        built, digest,
        "write this into firmware/stage0/stage0.sha384 when stage0 was changed"
    );
}

#[test]
fn the_kernel_is_told_of_its_machine() {
    if !kvm() {
        return;
    }
    for platform in PLATFORMS {
        for vcpus in [1, 2] {
            let command_line = format!(
                "{}{} quiet",
                if platform == Platform::SevSnp { 'S' } else { 'N' },
                vcpus - 1
            );
            let parts = Parts::new(platform, &command_line);
            let told = Run::new(&parts.plan(), vcpus, None).told();
            assert_eq!(told.command_line, command_line);
            assert_eq!(told.initrd, parts.initrd);
            let params = &told.boot_params;
            assert_eq!((&params[0x202..0x206], params[0x210]), (&b"HdrS"[..], 0xFF));
            let rest: &[u8] = if platform == Platform::SevSnp { b"\0." } else { b"." };
            assert_eq!(told.rest, rest, "SEV_STATUS, and all processors woke");

            assert_eq!(long(params, 0x250), 0, "no kernel is told of an emulated SEV-SNP");
            let e820 = told.e820();
            assert!(
                e820.iter().any(|entry| (entry.0, entry.2) == (0x1E_0000, 3)),
                "{e820:x?}"
            );
            let ram: u64 = e820
                .iter()
                .filter(|entry| entry.1 <= 64 << 20)
                .map(|entry| entry.1 - entry.0)
                .sum();
            assert_eq!(ram, (64 << 20) - 0x6_0000, "all but the hole at 640 KiB: {e820:x?}");
            assert!(e820.is_sorted() && e820.windows(2).all(|pair| pair[0].1 <= pair[1].0));

            assert_eq!(&told.rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&told.rsdp), sum(&told.rsdp[..20])), (0, 0));
            let signatures: Vec<_> = told.tables.iter().map(|table| &table[..4]).collect();
            assert_eq!(signatures, [b"XSDT", b"FACP", b"DSDT", b"APIC", b"MCFG"]);
            assert!(told.tables.iter().all(|table| sum(table) == 0));
            assert_eq!(told.tables[3], podvisor_firmware::acpi::tables::madt(vcpus, vcpus));
            // The fixup of the image: the end of the address space, which no width makes less than 36 bits, and 5.
            let fixed = long(&told.tables[2], 36) - 5;
            assert!(fixed.is_power_of_two() && fixed >= 1 << 36, "{fixed:x}");
            assert_eq!(word(params, 0x218) & 0xFFF, 0);
        }
    }
}

/// What a hostile host does: another page in place of what the image has the monitor fill in. Under SEV-SNP it is not measured.
fn lie(plan: &mut LaunchPlan<'_>, at: u64, data: &[u8]) {
    let step = plan
        .steps
        .iter_mut()
        .find(|step| matches!(step, Step::Parameters { gpa, .. } if *gpa == at))
        .unwrap();
    *step = Step::Pages {
        gpa: at,
        len: 4096,
        kind: if plan.platform == Platform::SevSnp {
            PageKind::Unmeasured
        } else {
            PageKind::Normal
        },
        data: Cow::Owned(data.to_vec()),
    };
}

/// Changes a byte of what the image puts at `at`.
fn tamper(plan: &mut LaunchPlan<'_>, at: u64, byte: usize) {
    for step in &mut plan.steps {
        if let Step::Pages { gpa, data, .. } = step
            && *gpa == at
        {
            data.to_mut()[byte] ^= 1;
            return;
        }
    }
    panic!("nothing at {at:#x}");
}

fn map(entries: &[(u64, u64, u64)]) -> Vec<u8> {
    entries
        .iter()
        .chain(&[(0, 0, 0)])
        .flat_map(|(start, end, kind)| [start / 4096, (end - start) / 4096, *kind])
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Boots what `change` makes of a plan, on both platforms, and looks for the refusal `line` and its `code`. Under SEV-SNP the
/// digest is that of the image before the change: measuring does not tell.
fn refused(line: &str, code: u8, change: impl Fn(&mut LaunchPlan<'_>)) {
    for platform in PLATFORMS {
        let honest = Parts::new(platform, "N0").plan();
        let mut plan = honest.clone();
        change(&mut plan);
        let expected = (platform == Platform::SevSnp).then(|| digest(&honest));
        let run = Run::new(&plan, 1, expected.as_deref());
        assert_eq!(run.code, Some(1), "{}", run.process.log());
        let serial = String::from_utf8(run.serial()).unwrap();
        assert_eq!(serial.trim_end(), format!("stage0: refused: {line}"), "{platform:?}");
        let told = format!("{} (reason set 2 code {code})", codes::words(code));
        assert!(run.process.log().contains(&told), "{told}: {}", run.process.log());
    }
}

/// The launch digest of a plan for one vCPU.
fn digest(plan: &LaunchPlan<'_>) -> String {
    let prediction = predict(plan, 1).unwrap();
    prediction.digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_tampered_payload_is_refused() {
    if !kvm() {
        return;
    }
    let words = "the kernel is not the measured one: chunk 0 differs";
    refused(words, codes::PAYLOAD, |plan| tamper(plan, image::KERNEL_STAGED, 0x300));
    let words = "the initrd is not the measured one: chunk 0 differs";
    refused(words, codes::PAYLOAD, |plan| tamper(plan, image::INITRD_STAGED, 0));
    let words = "the chunk list is not the measured one";
    refused(words, codes::CHUNK_LIST, |plan| tamper(plan, image::CHUNKS, 40));
}

#[test]
fn a_lying_memory_map_is_refused() {
    if !kvm() {
        return;
    }
    let low = (0, 0xA_0000, 0);
    let cases = [
        (
            map(&[low, (0x10_0000, 0x400_0000, 0), (0x3FF_F000, 0x500_0000, 0)]),
            "memory map: not sorted: entry 2 0x3fff000..0x5000000",
            codes::MEMORY_MAP,
        ),
        (
            map(&[(0, 0x10_0000, 0)]),
            "memory map: RAM where devices are: entry 0 0x0..0x100000",
            codes::MEMORY_MAP,
        ),
        (
            map(&[low, (0x10_0000, 1 << 53, 0)]),
            "memory map: outside the address space: entry 1 0x100000..0x20000000000000",
            codes::MEMORY_MAP,
        ),
        (
            map(&[low, (0x10_0000, 0x100_0000, 0)]),
            "memory map: no RAM for the chunk list: 0x3000000..0x3001000",
            codes::NOT_RAM,
        ),
        (
            map(&[low, (0x20_0000, 0x400_0000, 0)]),
            "memory map: no RAM for the image: 0x100000..0x200000",
            codes::NOT_RAM,
        ),
        (
            vec![0xFF; 4096],
            "memory map: outside the address space: entry 0 0xfffffffffffff000..0xffffffffffffe000",
            codes::MEMORY_MAP,
        ),
    ];
    for (page, line, code) in cases {
        refused(line, code, |plan| lie(plan, abi::MEMORY_MAP_PAGE, &page));
    }
}

#[test]
fn a_lying_vcpu_count_or_madt_is_refused() {
    if !kvm() {
        return;
    }
    let count = |count: u32| move |plan: &mut LaunchPlan<'_>| lie(plan, abi::VP_COUNT_PAGE, &count.to_le_bytes());
    refused("vCPU count: there is none: 0", codes::VCPU_COUNT, count(0));
    refused(
        "vCPU count: more than 1024: 4294967295",
        codes::VCPU_COUNT,
        count(u32::MAX),
    );
    let words = "vCPU count: the MADT enables another number: 2";
    refused(words, codes::VCPU_COUNT, count(2));

    let honest = tables::madt(1, 1);
    let madt = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut table = honest.clone();
        change(&mut table);
        let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        table[9] = table[9].wrapping_sub(sum);
        table
    };
    let cases = [
        (
            [&honest[..60], &[0xEE], &honest[61..]].concat(),
            "MADT: checksum: 0xed at offset 0x9",
        ),
        (
            madt(&|table| table[64..68].copy_from_slice(&0x8000_0000u32.to_le_bytes())),
            "MADT: entry: 0xc01 at offset 0x3c",
        ),
        (madt(&|table| table[45] = 0), "MADT: entry length: 0x9 at offset 0x2c"),
        (
            madt(&|table| table[44] = 0xF),
            "MADT: entry type: 0x100f at offset 0x2c",
        ),
    ];
    for (table, line) in cases {
        refused(line, codes::MADT, |plan| lie(plan, abi::MADT_PAGE, &table));
    }
}

#[test]
fn without_a_madt_one_is_made() {
    if !kvm() {
        return;
    }
    let mut plan = Parts::new(Platform::SevSnp, "S1").plan();
    lie(&mut plan, abi::MADT_PAGE, &[]);
    let told = Run::new(&plan, 2, None).told();
    assert_eq!(told.tables[3], tables::madt(2, 2));
    assert_eq!(told.rest, b"\0.");
}

#[test]
fn what_is_measured_cannot_be_changed_unseen() {
    if !kvm() {
        return;
    }
    let honest = Parts::new(Platform::SevSnp, "N0");
    let other = Parts::new(Platform::SevSnp, "N0 init=/bin/sh");
    let process = Process::start_with(&["--expect-digest", &digest(&honest.plan())]);
    std::fs::write(process.path("image"), file(&other.plan())).unwrap();
    let config = json!({
        "memory": {"size": 64 << 20},
        "payload": {"igvm": process.path("image")},
        "platform": {"isolation": "snp-emulated"},
    });
    process.put("vm.create", Some(&config));
    let (status, said) = process.request("PUT", "vm.boot", None);
    assert_eq!(status, 500, "{said}");
    assert!(said.to_string().contains("digest"), "{said}");
}

#[test]
fn payloads_may_lie_where_they_are_used() {
    if !kvm() {
        return;
    }
    for platform in PLATFORMS {
        let native = platform == Platform::Native;
        let mut parts = Parts::new(platform, if native { "N0" } else { "S0" });
        parts.in_place = true;
        let plan = parts.plan();
        assert_eq!(Run::new(&plan, 1, None).told().initrd, parts.initrd);
        let mut plan = plan;
        tamper(&mut plan, image::KERNEL_DEST, 0x210);
        let run = Run::new(&plan, 1, None);
        let serial = String::from_utf8(run.serial()).unwrap();
        assert!(serial.contains("the kernel is not the measured one"), "{serial}");
    }
}
