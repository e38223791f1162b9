//! Tests of the OVMF plan on a made-up volume; the real one is compared with another implementation elsewhere.

use proptest::prelude::*;

use super::*;

const SECTIONS: [(u32, u32, u32); 6] = [
    (0x80_0000, 0x9000, SEC_MEM),
    (0x80_A000, 0x3000, SEC_MEM),
    (0x80_D000, 0x1000, SECRETS),
    (0x80_E000, 0x1000, CPUID),
    (0x80_F000, 0x1000, SVSM_CAA),
    (0x81_0000, 0x1000, KERNEL_HASHES),
];

fn entry(table: &mut Vec<u8>, data: &[u8], guid: &[u8; 16]) {
    table.extend_from_slice(data);
    table.extend_from_slice(&u16::try_from(data.len() + ENTRY_TAIL).unwrap().to_le_bytes());
    table.extend_from_slice(guid);
}

/// A volume of 16 KiB: pages of a pattern, then metadata and table as OVMF has them.
pub(crate) fn volume(sections: &[(u32, u32, u32)]) -> Vec<u8> {
    let mut metadata = b"ASEV".to_vec();
    let count = u32::try_from(sections.len()).unwrap();
    let words = [16 + 12 * count, 1, count];
    metadata.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    metadata.extend(
        sections
            .iter()
            .flat_map(|(a, b, c)| [*a, *b, *c])
            .flat_map(u32::to_le_bytes),
    );
    let mut table = Vec::new();
    entry(&mut table, &0x80_B004u32.to_le_bytes(), &ES_RESET_BLOCK);
    entry(
        &mut table,
        &[0x81_0C00u32, 0x400].map(u32::to_le_bytes).concat(),
        &HASH_TABLE_AREA,
    );
    entry(&mut table, &0x800u32.to_le_bytes(), &SEV_METADATA);
    let len = table.len();
    entry(&mut table, &[], &TABLE_FOOTER);
    let at = table.len() - ENTRY_TAIL;
    table[at..at + 2].copy_from_slice(&u16::try_from(len + ENTRY_TAIL).unwrap().to_le_bytes());
    let mut file: Vec<u8> = (0..0x4000u32)
        .map(|i| ((i * 7 + i / 4096) & 0xFF).try_into().unwrap())
        .collect();
    let end = file.len() - TABLE_END;
    file[end - table.len()..end].copy_from_slice(&table);
    let start = file.len() - 0x800;
    file[start..start + metadata.len()].copy_from_slice(&metadata);
    file
}

fn options() -> OvmfOptions {
    OvmfOptions {
        vcpus: 2,
        signature: 0x80_0F12,
        sev_features: 1,
        ..OvmfOptions::default()
    }
}

fn kinds(plan: &LaunchPlan<'_>) -> Vec<(u64, u64, PageKind)> {
    let pages = plan.steps.iter().filter_map(|step| match step {
        Step::Pages { gpa, len, kind, .. } => Some((*gpa, *len, *kind)),
        _ => None,
    });
    pages.collect()
}

#[test]
fn sections_follow_the_volume_in_their_order() {
    let file = volume(&SECTIONS);
    assert!(is_ovmf(&file));
    let plan = plan(&file, &options()).unwrap();
    assert_eq!(
        kinds(&plan),
        [
            (0xFFFF_C000, 0x4000, PageKind::Normal),
            (0x80_0000, 0x9000, PageKind::Zero),
            (0x80_A000, 0x3000, PageKind::Zero),
            (0x80_D000, 0x1000, PageKind::Secrets),
            (0x80_E000, 0x1000, PageKind::Cpuid),
            (0x80_F000, 0x1000, PageKind::Zero),
            (0x81_0000, 0x1000, PageKind::Zero),
        ]
    );
    assert_eq!(plan.vps[0].state.rip, 0xFFF0);
    assert_eq!(plan.vps[0].state.cs.base, 0xFFFF_0000);
    assert_eq!((plan.vps[1].state.rip, plan.vps[1].state.cs.base), (0xB004, 0x80_0000));
}

#[test]
fn other_hypervisors_do_it_otherwise() {
    let file = volume(&SECTIONS);
    let of = |hypervisor| {
        plan(
            &file,
            &OvmfOptions {
                hypervisor,
                ..options()
            },
        )
        .unwrap()
    };
    assert_eq!(kinds(&of(Hypervisor::Gce))[1].2, PageKind::Unmeasured);
    assert_eq!(kinds(&of(Hypervisor::Ec2)).last().unwrap().2, PageKind::Cpuid);
    assert_eq!(of(Hypervisor::Ec2).vps[0].state.cs.attrib, 0x9A);
    assert_eq!(of(Hypervisor::Ec2).vps[1].state.cs.attrib, 0x9B);
}

#[test]
fn hashes_need_a_table() {
    let hashes = Some(BootHashes {
        kernel: [1; 32],
        initrd: [2; 32],
        command_line: [3; 32],
    });
    let with = OvmfOptions { hashes, ..options() };
    let file = volume(&SECTIONS);
    let planned = plan(&file, &with).unwrap();
    let Step::Pages { data, kind, .. } = &planned.steps[6] else {
        panic!("no page of hashes");
    };
    assert_eq!(*kind, PageKind::Normal);
    assert!(data[..0xC00].iter().all(|byte| *byte == 0));
    assert_eq!(data[0xC00..0xC10], HASH_TABLE);
    assert_eq!(data[0xC00 + 18 + 18..][..32], [3; 32]);
    let file = volume(&SECTIONS[..5]);
    assert_eq!(plan(&file, &with), Err(OvmfError::NoHashTable));
    assert!(plan(&file, &options()).is_ok());
}

#[test]
fn what_is_no_ovmf_is_refused_by_name() {
    let refused = |file: &[u8]| plan(file, &options()).unwrap_err().to_string();
    assert!(refused(&[]).contains("0 bytes"));
    assert!(refused(&[0; 100]).contains("100 bytes"));
    assert!(refused(&[0; 4096]).contains("GUIDed"));
    let text = refused(&volume(&[(0x80_0000, 0x1000, 9)]));
    assert!(text.contains("type 0x9") && text.contains("unknown"), "{text}");
    assert!(refused(&volume(&[(0x80_0001, 0x1000, SEC_MEM)])).contains("whole pages"));
    assert!(refused(&volume(&[(0x80_0000, 0x2000, CPUID)])).contains("one page"));
    assert!(refused(&volume(&[(0xFFFF_C000, 0x1000, SEC_MEM)])).contains("below the firmware"));
}

#[test]
fn processors_have_their_signatures() {
    let known = [
        ("EPYC-v4", 0x80_0F12),
        ("EPYC-Rome", 0x83_0F10),
        ("EPYC-Milan", 0xA0_0F11),
        ("EPYC-Genoa", 0xA1_0F10),
        ("EPYC-Turin", 0xB0_0F00),
    ];
    for (name, signature) in known {
        assert_eq!(cpu_signature(name), Some(signature), "{name}");
    }
    assert_eq!(cpu_signature("Opteron"), None);
}

proptest! {
    #[test]
    fn no_volume_panics(at in 0usize..0x900, byte: u8, cut in 0usize..4) {
        let mut file = volume(&SECTIONS);
        let from = file.len() - 1 - at;
        file[from] = byte;
        file.truncate(file.len() - cut * 4096);
        let _ = plan(&file, &options());
        let _ = is_ovmf(&file);
    }
}
