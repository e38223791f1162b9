//! Kernels made for the tests, one ELF header at a time.
#![expect(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

use super::*;
use crate::acpi::{AcpiMachine, AcpiTables};
use crate::memory_map::memory_map;
use crate::plan::{GpaRange, Step};

struct Program {
    typ: u32,
    paddr: u64,
    memsz: u64,
    data: Vec<u8>,
}

fn note(name: &[u8], typ: u32, desc: &[u8]) -> Vec<u8> {
    let mut bytes = [name.len() as u32, desc.len() as u32, typ]
        .map(u32::to_le_bytes)
        .concat();
    for part in [name, desc] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn load(paddr: u64, memsz: u64, data: &[u8]) -> Program {
    Program {
        typ: 1,
        paddr,
        memsz,
        data: data.to_vec(),
    }
}

fn entry_note(entry: u32) -> Program {
    let mut data = note(b"GNU\0", 3, &[1; 20]);
    data.extend_from_slice(&note(b"Xen\0", 18, &entry.to_le_bytes()));
    Program {
        typ: 4,
        paddr: 0,
        memsz: data.len() as u64,
        data,
    }
}

fn elf(is_64: bool, programs: &[Program]) -> Vec<u8> {
    let (header, entry) = if is_64 { (64, 56) } else { (52, 32) };
    let mut file = b"\x7FELF".to_vec();
    file.extend_from_slice(&[if is_64 { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend_from_slice(&[2, 0, if is_64 { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    if is_64 {
        file.extend_from_slice(&[0u64, header, 0].map(u64::to_le_bytes).concat());
    } else {
        file.extend_from_slice(&[0u32, header as u32, 0].map(u32::to_le_bytes).concat());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [header as u16, entry, programs.len() as u16, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = header + u64::from(entry) * programs.len() as u64;
    for p in programs {
        let filesz = p.data.len() as u64;
        if is_64 {
            file.extend_from_slice(&p.typ.to_le_bytes());
            file.extend_from_slice(&[0; 4]);
            file.extend_from_slice(
                &[offset, p.paddr, p.paddr, filesz, p.memsz, 4]
                    .map(u64::to_le_bytes)
                    .concat(),
            );
        } else {
            let words = [u64::from(p.typ), offset, p.paddr, p.paddr, filesz, p.memsz, 0, 4];
            file.extend_from_slice(&words.map(|word| (word as u32).to_le_bytes()).concat());
        }
        offset += filesz;
    }
    for p in programs {
        file.extend_from_slice(&p.data);
    }
    file
}

pub(crate) fn machine(memory: u64) -> MachineDescription {
    MachineDescription {
        vcpus: 1,
        max_vcpus: 1,
        memory: memory_map(memory, layout::MEM_64BIT_DEVICES_START).unwrap(),
        mmio: [GpaRange { start: 0, len: 0 }; 2],
        command_line: String::new(),
        memory_is_shared: false,
    }
}

/// As [`super::plan`].
fn plan<'a>(
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    cmdline: &str,
    machine: &MachineDescription,
    acpi: Option<&AcpiTables>,
) -> Result<LaunchPlan<'a>, PvhError> {
    let given = Given {
        initrd,
        cmdline,
        machine,
        acpi,
    };
    super::plan(kernel, &given)
}

pub(crate) fn memory_of(plan: &LaunchPlan<'_>, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; len];
    for step in &plan.steps {
        let Step::Pages {
            gpa, len: filled, data, ..
        } = step
        else {
            continue;
        };
        for (i, byte) in bytes.iter_mut().enumerate() {
            let address = at + i as u64;
            if address >= *gpa && address < gpa + filled {
                *byte = data.get((address - gpa) as usize).copied().unwrap_or(0);
            }
        }
    }
    bytes
}

#[test]
fn a_kernel_is_entered_as_pvh_says() {
    for is_64 in [true, false] {
        let kernel = elf(
            is_64,
            &[
                load(0x100_0000, 0x3000, b"code"),
                entry_note(0x100_0010),
                load(0x200_0000, 8, b"data"),
            ],
        );
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
        let plan = plan(
            &kernel,
            Some(&initrd),
            "console=ttyS0",
            &machine(512 << 20),
            Some(&acpi),
        )
        .unwrap();
        let state = &plan.vps[0].state;
        assert_eq!(
            (state.rip, state.rbx, state.cr0, state.efer),
            (0x100_0010, 0x6000, 0x11, 0)
        );
        assert_eq!(memory_of(&plan, 0x100_0000, 6), b"code\0\0");
        assert_eq!(memory_of(&plan, 0x100_2FFF, 2), [0, 0xAA]);
        assert_eq!(memory_of(&plan, 0x200_0000, 8), b"data\0\0\0\0");

        let info = memory_of(&plan, 0x6000, 56);
        let word = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
        let double = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(4), word(12), word(48)), (0x336E_C578, 1, 1, 3));
        assert_eq!(memory_of(&plan, double(&info, 24), 14), b"console=ttyS0\0");
        assert_eq!(double(&info, 32), 0xA_0000);
        assert_eq!(memory_of(&plan, 0xA_0000, 8), b"RSD PTR ");
        let module = memory_of(&plan, double(&info, 16), 32);
        assert_eq!((double(&module, 0), double(&module, 8)), (0x2000_0000 - 0x2000, 5000));
        assert_eq!(memory_of(&plan, double(&module, 0), 5000), initrd);
        let map = memory_of(&plan, double(&info, 40), 48);
        assert_eq!(
            (double(&map, 24), double(&map, 32), double(&map, 40)),
            (0x10_0000, 0x1FF0_0000, 1)
        );
        // The descriptors in memory are those in the registers.
        let gdt = memory_of(&plan, state.gdtr.base, 32);
        assert_eq!(state.gdtr.limit, 31);
        for segment in [state.cs, state.ds, state.tr] {
            let entry = double(&gdt, usize::from(segment.selector));
            let attrib = (entry >> 40 & 0xFF | entry >> 44 & 0xF00) as u16;
            let limit = (entry & 0xFFFF | entry >> 32 & 0xF_0000) as u32;
            let limit = if entry >> 55 & 1 == 1 {
                limit << 12 | 0xFFF
            } else {
                limit
            };
            assert_eq!((attrib, limit), (segment.attrib, segment.limit));
        }
    }
}

#[test]
fn kernels_that_cannot_boot_say_why() {
    let machine = machine(64 << 20);
    let refuse = |programs: &[Program]| plan(&elf(true, programs), None, "", &machine, None).unwrap_err();
    let good = || load(0x100_0000, 0x1000, b"x");
    assert_eq!(refuse(&[good()]), PvhError::NoEntry);
    assert_eq!(refuse(&[good(), entry_note(0x100_1000)]), PvhError::Entry(0x100_1000));
    let segment = |programs: &[Program]| match refuse(programs) {
        PvhError::Segment { start, rule, .. } => (start, rule),
        other => panic!("{other}"),
    };
    let headers = [load(0xF_F000, 0x120, b"h"), good(), entry_note(0x100_0000)];
    assert!(
        plan(&elf(true, &headers), None, "", &machine, None).is_ok(),
        "a page of ELF headers below 1 MiB"
    );
    let across = [load(0xF_F000, 0x1001, b"h"), good(), entry_note(0x100_0000)];
    assert!(segment(&across).1.contains("1 MiB"));
    assert!(
        segment(&[load(0x8_0000, 1, b""), good(), entry_note(0x100_0000)])
            .1
            .contains("1 MiB")
    );
    assert!(
        segment(&[good(), load(0x100_0FFF, 1, b"y"), entry_note(0x100_0000)])
            .1
            .contains("overlaps")
    );
    assert!(
        segment(&[load(0x400_0000, 1, b""), entry_note(0x400_0000)])
            .1
            .contains("RAM")
    );
    assert!(
        segment(&[load(u64::MAX, 2, b""), entry_note(0x400_0000)])
            .1
            .contains("RAM")
    );
    let grown = refuse(&[load(0x100_0000, 1, b"xy"), entry_note(0x100_0000)]);
    assert_eq!(
        grown,
        PvhError::Elf(ElfError::FileSize {
            index: 0,
            filesz: 2,
            memsz: 1
        })
    );

    let kernel = elf(true, &[good(), entry_note(0x100_0000)]);
    let big = vec![0; 49 << 20];
    assert!(matches!(
        plan(&kernel, Some(&big), "", &machine, None),
        Err(PvhError::Place(PlaceError::Initrd { .. }))
    ));
    assert!(plan(&kernel, Some(&big[..(47 << 20) - 0x1000]), "", &machine, None).is_ok());
    let long = "x".repeat(65536);
    assert_eq!(
        plan(&kernel, None, &long, &machine, None),
        Err(PvhError::Place(PlaceError::CommandLine { len: 65536, max: 65535 }))
    );
    assert!(plan(&kernel, None, &long[1..], &machine, None).is_ok());
    assert_eq!(
        plan(&kernel, None, "a\0b", &machine, None),
        Err(PvhError::Place(PlaceError::CommandLine { len: 3, max: 65535 }))
    );
}

/// Every byte of the headers, set to every one of some hard values: refused or planned, never a panic.
#[test]
fn damaged_headers_never_panic() {
    let machine = machine(64 << 20);
    for is_64 in [true, false] {
        let kernel = elf(is_64, &[load(0x100_0000, 0x1000, b"x"), entry_note(0x100_0000)]);
        let mut refused = 0;
        for at in 0..kernel.len() {
            for value in [0, 1, 2, 4, 0x7F, 0x80, 0xFF] {
                let mut damaged = kernel.clone();
                damaged[at] = value;
                refused += u32::from(plan(&damaged, None, "", &machine, None).is_err());
                damaged.truncate(at);
                assert!(plan(&damaged, None, "", &machine, None).is_err());
            }
        }
        assert!(refused > 100);
    }
}
