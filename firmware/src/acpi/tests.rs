//! The tables are checked as a guest reads them, and by ACPICA's disassembler where it is installed.
#![expect(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

use super::*;
use crate::memory_map::memory_map;

fn machine() -> AcpiMachine {
    AcpiMachine {
        vcpus: 2,
        max_vcpus: 4,
        segments: 3,
        memory_slots: 8,
        phys_bits: 46,
        serial: true,
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn double(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at `gpa`, checked.
fn table_at(tables: &AcpiTables, gpa: u64) -> &[u8] {
    let rest = &tables.bytes[(gpa - tables.gpa) as usize..];
    let table = &rest[..word(rest, 4) as usize];
    assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    table
}

fn walk(tables: &AcpiTables) -> Vec<(String, &[u8])> {
    let rsdp = &tables.bytes[(tables.rsdp_gpa - tables.gpa) as usize..][..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    let xsdt = table_at(tables, double(rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut found: Vec<_> = xsdt[36..]
        .chunks(8)
        .map(|gpa| table_at(tables, double(gpa, 0)))
        .collect();
    found.push(table_at(tables, double(found[0], 140)));
    found
        .into_iter()
        .map(|table| (String::from_utf8_lossy(&table[..4]).into_owned(), table))
        .collect()
}

#[test]
fn a_guest_finds_every_table() {
    let tables = AcpiTables::build(&machine()).unwrap();
    let found = walk(&tables);
    let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
    let fadt = found[0].1;
    assert_eq!(word(fadt, 112), 1 << 20 | 1 << 10);
    assert_eq!(
        (fadt[109], fadt[110]),
        (1 << 5 | 1 << 2, 0),
        "neither VGA nor CMOS clock"
    );
    assert_eq!((double(fadt, 120), fadt[128]), (0x600, 1));
    assert_eq!(
        (double(fadt, 248), double(fadt, 260), double(fadt, 212)),
        (0x600, 0x600, 0x608)
    );
    let mcfg = found[2].1;
    assert_eq!(
        (double(mcfg, 44), double(mcfg, 60), mcfg.len()),
        (0xE800_0000, 0xE810_0000, 44 + 3 * 16)
    );
}

#[test]
fn every_vcpu_has_an_apic() {
    let madt = tables::madt(2, 4);
    assert_eq!((word(&madt, 36), sum(&madt)), (0xFEE0_0000, 0));
    let entries: Vec<_> = (0..4).map(|i| &madt[44 + 16 * i..60 + 16 * i]).collect();
    let seen: Vec<_> = entries
        .iter()
        .map(|e| (e[0], word(e, 4), word(e, 8), word(e, 12)))
        .collect();
    assert_eq!(seen, [(9, 0, 1, 0), (9, 1, 1, 1), (9, 2, 2, 2), (9, 3, 2, 3)]);
    assert_eq!((madt[108], word(&madt, 112)), (1, 0xFEC0_0000));
    assert_eq!(madt[120..], [2, 10, 0, 4, 4, 0, 0, 0, 0, 0]);
}

#[test]
fn parameter_tables_are_whole() {
    let memory = memory_map(5 << 30, layout::MEM_64BIT_DEVICES_START).unwrap();
    let srat = tables::srat(4, &memory);
    assert_eq!(srat.len(), 48 + 4 * 24 + 3 * 40);
    let slit = tables::slit();
    assert_eq!((double(&slit, 36), slit[44], slit.len()), (1, 10, 45));
    let pptt = tables::pptt(4);
    assert_eq!(
        (
            pptt.len(),
            pptt[36],
            pptt[37],
            word(&pptt, 56 + 8),
            word(&pptt, 56 + 12)
        ),
        (36 + 5 * 20, 0, 20, 36, 0)
    );
    for table in [srat, slit, pptt] {
        assert_eq!((sum(&table), word(&table, 4) as usize), (0, table.len()));
    }
}

#[test]
fn baked_addresses_are_in_the_dsdt() {
    let tables = AcpiTables::build(&AcpiMachine {
        segments: 1,
        ..machine()
    })
    .unwrap();
    let found = walk(&tables);
    let dsdt = found[3].1;
    let holds = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
    for address in [
        layout::GED_START,
        layout::CPU_HOTPLUG_START,
        layout::PCI_HOTPLUG_START,
        0x100_0000_0000,
    ] {
        assert!(holds(&address.to_le_bytes()), "{address:#x}");
    }
    assert!(holds(&0xC000_0000u32.to_le_bytes()) && holds(&0xE7FF_FFFFu32.to_le_bytes()));
    for name in [
        b"PC00", b"S001", b"S031", b"PHPR", b"PRES", b"CPUS", b"C003", b"GEC_", b"GED_", b"PWRB", b"COM1",
    ] {
        assert!(holds(name), "{name:?}");
    }
    assert!(!holds(b"S000") && !holds(b"C004") && !holds(b"PC01"));
}

#[test]
fn narrow_address_spaces_have_their_own_addresses() {
    let narrow = AcpiMachine {
        segments: 1,
        phys_bits: 39,
        ..machine()
    };
    let tables = AcpiTables::build(&narrow).unwrap();
    let ged = narrow.device_area().ged;
    assert!(ged < 1 << 39);
    assert!(tables.bytes.windows(8).any(|window| window == ged.to_le_bytes()));
}

#[test]
fn windows_of_segments_lie_apart() {
    let machine = machine();
    let windows: Vec<_> = (0..3).map(|segment| machine.windows(segment)).collect();
    for pair in windows.windows(2) {
        for (a, b) in pair[0].iter().zip(&pair[1]) {
            assert_eq!(a.start + a.len, b.start);
        }
    }
    assert!(windows[2][0].start + windows[2][0].len <= layout::PCI_MMCONFIG_START);
}

#[test]
fn what_cannot_be_described_is_refused() {
    let build = |change: fn(&mut AcpiMachine)| {
        let mut machine = machine();
        change(&mut machine);
        AcpiTables::build(&machine)
    };
    assert!(matches!(build(|m| m.vcpus = 0), Err(AcpiError::Vcpus { .. })));
    assert!(matches!(build(|m| m.vcpus = 5), Err(AcpiError::Vcpus { .. })));
    assert!(matches!(
        build(|m| m.segments = 0),
        Err(AcpiError::Segments { max: 96, .. })
    ));
    assert!(matches!(build(|m| m.segments = 97), Err(AcpiError::Segments { .. })));
    assert!(matches!(
        build(|m| (m.segments, m.phys_bits) = (9, 36)),
        Err(AcpiError::Segments { max: 7, .. })
    ));
    assert!(matches!(build(|m| m.max_vcpus = 4096), Err(AcpiError::TooLarge { .. })));
    assert!(matches!(
        build(|m| m.memory_slots = 9),
        Err(AcpiError::MemorySlots { slots: 9 })
    ));
    assert!(build(|m| (m.max_vcpus, m.segments) = (254, 96)).is_ok());
}

/// `iasl -d`, where it is installed, must read the tables without complaint and compile its own output again.
#[test]
fn acpica_reads_the_tables() {
    let Ok(version) = std::process::Command::new("iasl").arg("-v").output() else {
        eprintln!("iasl is not installed; skipped");
        return;
    };
    assert!(version.status.success());
    let dir = std::env::temp_dir().join(format!("podvisor-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let tables = AcpiTables::build(&machine()).unwrap();
    for (name, table) in walk(&tables) {
        let file = dir.join(format!("{name}.aml"));
        std::fs::write(&file, table).unwrap();
        let run = |args: &[&str]| {
            let out = std::process::Command::new("iasl")
                .args(args)
                .current_dir(&dir)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{name}: {text}");
            text
        };
        run(&["-d", &format!("{name}.aml")]);
        if name == "DSDT" {
            let text = run(&["-vw", "3150", "-p", "again", "DSDT.dsl"]);
            assert!(text.contains(" 0 Errors"), "{text}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// What ACPICA's interpreter prints when it runs `commands` on the DSDT of `machine`, with every byte of every
/// register `fill`; None where it is not installed.
fn interpret(machine: &AcpiMachine, fill: u8, commands: &str) -> Option<String> {
    if std::process::Command::new("acpiexec").arg("-v").output().is_err() {
        eprintln!("acpiexec is not installed; skipped");
        return None;
    }
    let file = std::env::temp_dir().join(format!("podvisor-aml-{}-{fill}.aml", std::process::id()));
    let tables = AcpiTables::build(machine).unwrap();
    let found = walk(&tables);
    std::fs::write(&file, found.iter().find(|(name, _)| name == "DSDT").unwrap().1).unwrap();
    let out = std::process::Command::new("acpiexec")
        .arg(format!("-fv{fill:#x}"))
        .args(["-b", commands])
        .arg(&file)
        .output()
        .unwrap();
    std::fs::remove_file(&file).unwrap();
    Some(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

/// The integer that evaluating `path` returned.
fn integer(output: &str, path: &str) -> u64 {
    let after = output.split_once(&format!("Evaluation of {path} returned")).unwrap().1;
    let digits = after.split_once("[Integer] = ").unwrap().1;
    u64::from_str_radix(&digits[..16], 16).unwrap()
}

fn notified(output: &str, device: &str, what: &str) -> bool {
    let device = format!("Notify on [{device}]");
    output.lines().any(|line| line.contains(&device) && line.contains(what))
}

#[test]
fn acpica_runs_the_scans() {
    // 0x13 in every register: CPU and memory events; memory and vCPU there and inserting.
    let Some(output) = interpret(&machine(), 0x13, r"execute \_SB_.GEC_.ESCN") else {
        return;
    };
    for device in [
        "C000", "C001", "C002", "C003", "M000", "M001", "M002", "M003", "M004", "M005", "M006", "M007",
    ] {
        assert!(notified(&output, device, "Device Check"), "{device}: {output}");
    }
    assert!(
        !notified(&output, "S001", "") && !output.contains("Eject Request"),
        "{output}"
    );
    // 0x04: a PCI event, and slot 2 of every segment in both bitmaps, so each is notified for all three.
    let output = interpret(&machine(), 4, r"execute \_SB_.GEC_.ESCN").unwrap();
    let count = |what: &str| {
        output
            .lines()
            .filter(|l| l.contains("[S002]") && l.contains(what))
            .count()
    };
    assert_eq!((count("Device Check"), count("Eject Request")), (3, 3), "{output}");
    assert!(
        !notified(&output, "M000", "") && !notified(&output, "C000", ""),
        "{output}"
    );
    // 0x0E: memory and PCI events and the power button; what is there is asked to go, what is not there comes.
    let output = interpret(&machine(), 0x0E, r"execute \_SB_.GEC_.ESCN").unwrap();
    assert!(notified(&output, "PWRB", "0x80"), "{output}");
    assert!(notified(&output, "M007", "Device Check"), "{output}");
    let output = interpret(&machine(), 0, r"execute \_SB_.GEC_.ESCN").unwrap();
    assert!(!output.contains("Notify on"), "{output}");
}

#[test]
fn acpica_asks_the_registers() {
    let commands = r"execute \_SB_.MHPC.M003._CRS; execute \_SB_.MHPC.M003._STA; execute \_SB_.CPUS.C002._STA; execute \_SB_.CPUS.C002._MAT; execute \_SB_.PRES.CSEL";
    let Some(output) = interpret(&machine(), 0x13, commands) else {
        return;
    };
    // The simulated registers keep what is written, so the selected slot is also the low word of the base.
    let bytes: Vec<u8> = output
        .lines()
        .filter_map(|line| line.split_once("  // ")?.0.split_once("0: "))
        .flat_map(|(_, bytes)| bytes.split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    let (base, len) = (0x1313_1313_0000_0003_u64, 0x1313_1313_1313_1313);
    assert_eq!(
        (double(&bytes, 14), double(&bytes, 22), double(&bytes, 38)),
        (base, base + len - 1, len),
        "{output}"
    );
    assert_eq!(bytes[48..], tables::local_x2apic(2, true));
    assert_eq!(integer(&output, r"\_SB_.MHPC.M003._STA"), 0x0F);
    assert_eq!(integer(&output, r"\_SB_.CPUS.C002._STA"), 0x0F);
    assert_eq!(integer(&output, r"\_SB_.PRES.CSEL"), 2);
    let commands = r"execute \_SB_.MHPC.M003._STA; execute \_SB_.CPUS.C002._STA; execute \_SB_.MHPC.M005._EJ0 1; execute \_SB_.MHPC.MEJ0; execute \_SB_.MHPC.MSEL; execute \_SB_.CPUS.C003._EJ0 1; execute \_SB_.PRES.CEJ0; execute \_SB_.PRES.CSEL; execute \_SB_.PC02.S004._EJ0 1; execute \_SB_.PHPR.PSEG; execute \_SB_.PHPR.B0EJ; execute \_SB_.PC02._SEG";
    let output = interpret(&machine(), 0, commands).unwrap();
    for (path, value) in [
        (r"\_SB_.MHPC.M003._STA", 0),
        (r"\_SB_.CPUS.C002._STA", 0),
        (r"\_SB_.MHPC.MEJ0", 1),
        (r"\_SB_.MHPC.MSEL", 5),
        (r"\_SB_.PRES.CEJ0", 1),
        (r"\_SB_.PRES.CSEL", 3),
        (r"\_SB_.PHPR.PSEG", 2),
        (r"\_SB_.PHPR.B0EJ", 1 << 4),
        (r"\_SB_.PC02._SEG", 2),
    ] {
        assert_eq!(integer(&output, path), value, "{path}: {output}");
    }
}

#[test]
fn a_machine_without_memory_slots_has_no_controller_for_them() {
    let bare = AcpiMachine {
        memory_slots: 0,
        ..machine()
    };
    let holds = |machine: &AcpiMachine, bytes: &[u8]| {
        let tables = AcpiTables::build(machine).unwrap();
        tables.bytes.windows(bytes.len()).any(|window| window == bytes)
    };
    for bytes in [
        b"MHPC".as_slice(),
        b"M000",
        b"M007",
        &layout::MEMORY_HOTPLUG_START.to_le_bytes(),
    ] {
        assert!(holds(&machine(), bytes) && !holds(&bare, bytes), "{bytes:?}");
    }
    assert!(!holds(&machine(), b"M008"));
}
