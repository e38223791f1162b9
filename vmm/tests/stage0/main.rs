//! stage0 in a real podvisor: what it boots, what the kernel is told, and what it refuses of a host that lies. The kernel is
//! a few instructions (`kernel`); Linux is booted in the nested rig.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failure here is the test's"
)]

#[path = "../common/mod.rs"]
mod common;
mod image;
mod kernel;

use common::{Process, kvm};
use image::{Parts, file};
use kernel::{Told, long, word};
use podvisor_firmware::plan::{LaunchPlan, Platform};
use serde_json::{Value, json};

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
    fn new(plan: &LaunchPlan<'_>, vcpus: u32, more: Value) -> Self {
        let mut process = Process::start();
        std::fs::write(process.path("image"), file(plan)).unwrap();
        let mut config = json!({
            "cpus": {"boot_vcpus": vcpus, "max_vcpus": vcpus},
            "memory": {"size": 64 << 20},
            "payload": {"igvm": process.path("image")},
            "platform": {"isolation": isolation(plan.platform)},
            "serial": {"mode": "File", "file": process.path("serial")},
            "console": {"mode": "Off"},
        });
        config
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
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
            let told = Run::new(&parts.plan(), vcpus, json!({})).told();
            assert_eq!(told.command_line, command_line);
            assert_eq!(told.initrd, parts.initrd);
            let params = &told.boot_params;
            assert_eq!((&params[0x202..0x206], params[0x210]), (&b"HdrS"[..], 0xFF));
            let rest: &[u8] = if platform == Platform::SevSnp { b"\0." } else { b"." };
            assert_eq!(told.rest, rest, "SEV_STATUS, and all processors woke");

            let mut reserved = vec![(0x1E_0000, 3)];
            if platform == Platform::SevSnp {
                reserved.extend([(0x10_0000, 2), (0x1D_F000, 2)]);
                let blob = long(params, 0x250);
                assert_eq!(blob, 0x1D_F000);
            }
            let e820 = told.e820();
            for (start, kind) in reserved {
                assert!(
                    e820.iter().any(|entry| (entry.0, entry.2) == (start, kind)),
                    "{e820:x?}"
                );
            }
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
