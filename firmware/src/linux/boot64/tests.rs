//! Boots of bzImages made for the tests.

use proptest::prelude::*;

use super::*;
use crate::acpi::{AcpiMachine, AcpiTables};
use crate::linux::bzimage::tests::bzimage;
use crate::linux::pvh::tests::{machine, memory_of};

fn code() -> Vec<u8> {
    let mut code = vec![0x90; 0x400];
    code[0x200] = 0xF4;
    code
}

fn double(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn a_kernel_is_entered_as_the_protocol_says() {
    let kernel = bzimage(&code());
    let initrd = vec![7; 5000];
    let acpi = AcpiTables::build(&AcpiMachine {
        vcpus: 1,
        max_vcpus: 1,
        segments: 1,
        memory_slots: 0,
        phys_bits: 46,
        serial: true,
    })
    .unwrap();
    let machine = machine(5 << 30);
    let given = Given {
        initrd: Some(&initrd),
        cmdline: "console=ttyS0",
        machine: &machine,
        acpi: Some(&acpi),
    };
    let plan = plan(&kernel, &given).unwrap();
    let state = &plan.vps[0].state;
    assert_eq!((state.rip, state.rsi, state.rflags), (0x100_0200, 0x7000, 2));
    assert_eq!(
        (state.cr0, state.cr3, state.cr4, state.efer),
        (0x8000_0011, 0x9000, 0x20, 0x500)
    );
    assert_eq!(memory_of(&plan, state.rip, 2), [0xF4, 0x90]);
    assert_eq!(memory_of(&plan, 0x100_0400, 1), [0xAA], "nothing behind the kernel");

    let params = memory_of(&plan, state.rsi, 4096);
    assert_eq!(&params[0x1F1..0x210], &kernel[0x1F1..0x210]);
    assert_eq!(&params[0x22C..0x26C], &kernel[0x22C..0x26C]);
    assert_eq!((params[0x210], params[0x1EF]), (0xFF, 0));
    assert_eq!(memory_of(&plan, word(&params, 0x228).into(), 14), b"console=ttyS0\0");
    // Below 2 GiB, where this kernel's initrd_addr_max is, though the pod has more low memory.
    assert_eq!(
        (word(&params, 0x218), word(&params, 0x21C)),
        (0x8000_0000 - 0x2000, 5000)
    );
    assert_eq!(memory_of(&plan, 0x8000_0000 - 0x2000, 5000), initrd);
    assert_eq!(memory_of(&plan, double(&params, 0x70), 8), b"RSD PTR ");
    assert_eq!(params[0x1E8], 4);
    let ram = &params[0x2D0 + 20..];
    assert_eq!(
        (double(ram, 0), double(ram, 8), word(ram, 16)),
        (0x10_0000, 0xBFF0_0000, 1)
    );
    assert_eq!(
        word(&params, 0x2D0 + 2 * 20 + 16),
        2,
        "the configuration window is reserved"
    );
}

/// Walks the page tables in the plan as a processor does.
fn translate(plan: &LaunchPlan<'_>, address: u64) -> Option<u64> {
    let mut table = plan.vps[0].state.cr3;
    for shift in [39, 30, 21] {
        let entry = double(&memory_of(plan, table + ((address >> shift) & 511) * 8, 8), 0);
        if entry & 1 == 0 {
            return None;
        }
        if entry & 0x80 != 0 {
            return Some((entry & !0xFFF) | (address & 0x1F_FFFF));
        }
        table = entry & !0xFFF;
    }
    None
}

#[test]
fn tables_and_descriptors_agree_with_the_registers() {
    let mut kernel = bzimage(&code());
    // One that needs memory across a boundary of 1 GiB.
    kernel[0x258..0x25C].copy_from_slice(&0x3FE0_0000u32.to_le_bytes());
    kernel[0x260..0x264].copy_from_slice(&0x40_0000u32.to_le_bytes());
    let machine = machine(2 << 30);
    let given = Given {
        initrd: None,
        cmdline: "",
        machine: &machine,
        acpi: None,
    };
    let plan = plan(&kernel, &given).unwrap();
    for address in [0, 0x7000, 0x2_0000, 0x3FE0_0200, 0x4000_0000, 0x401F_FFFF] {
        assert_eq!(translate(&plan, address), Some(address));
    }
    assert_eq!(translate(&plan, 0x8000_0000), None);
    let state = &plan.vps[0].state;
    let gdt = memory_of(&plan, state.gdtr.base, usize::try_from(state.gdtr.limit).unwrap() + 1);
    for segment in [state.cs, state.ds, state.ss] {
        let entry = double(&gdt, usize::from(segment.selector));
        let attrib = ((entry >> 40) & 0xFF) | ((entry >> 44) & 0xF00);
        assert_eq!((attrib, segment.limit), (segment.attrib.into(), u32::MAX));
    }
    assert_eq!(
        (state.cs.selector, state.ds.selector),
        (0x10, 0x18),
        "__BOOT_CS and __BOOT_DS"
    );
    assert_eq!(state.cs.attrib & 0x200, 0x200, "64-bit code");
}

#[test]
fn what_does_not_fit_says_why() {
    let kernel = bzimage(&code());
    let machine = machine(64 << 20);
    let error = |kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str| {
        let given = Given {
            initrd,
            cmdline,
            machine: &machine,
            acpi: None,
        };
        plan(kernel, &given).map(|_| ()).map_err(|e| e.to_string())
    };
    let refused = |kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str, words: &str| {
        let error = error(kernel, initrd, cmdline).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    assert_eq!(error(&kernel, None, &"x".repeat(2047)), Ok(()));
    refused(&kernel, None, &"x".repeat(2048), "2048 bytes: at most 2047");
    refused(&kernel, None, "a\0b", "no NUL");
    let big = vec![0; 46 << 20];
    refused(&kernel, Some(&big), "", "the kernel's end 0x1300000 and 0x4000000");
    assert_eq!(error(&kernel, Some(&big[..45 << 20]), ""), Ok(()));
    let mut large = kernel.clone();
    large[0x260..0x264].copy_from_slice(&0x310_0000u32.to_le_bytes());
    refused(&large, None, "", "init_size) needs RAM at 0x1000000+0x3100000");
    let mut unbounded = kernel.clone();
    unbounded[0x238..0x23C].copy_from_slice(&[0xFF; 4]);
    refused(&unbounded, None, &"x".repeat(65536), "at most 65535");
    refused(&kernel[..0x300], None, "", "truncated");
}

proptest! {
    /// Any header: refused, or planned into the pod's RAM with the entry inside the kernel.
    #[test]
    fn any_header_is_refused_or_planned_into_ram(changes in prop::collection::vec((0x1F1usize..0x290, any::<u8>()), 0..8)) {
        let mut kernel = bzimage(&code());
        for (at, value) in changes {
            kernel[at] = value;
        }
        let machine = machine(64 << 20);
        let given = Given { initrd: Some(&[1; 100]), cmdline: "quiet", machine: &machine, acpi: None };
        if let Ok(plan) = plan(&kernel, &given) {
            for step in &plan.steps {
                if let crate::plan::Step::Pages { gpa, len, data, .. } = step {
                    prop_assert!(machine.is_ram(*gpa, *len) && data.len() as u64 <= *len);
                }
            }
            let rip = plan.vps[0].state.rip;
            prop_assert_eq!(memory_of(&plan, rip, 1), [0xF4]);
        }
    }
}
