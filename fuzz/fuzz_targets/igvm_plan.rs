//! Any bytes as an IGVM file: planned for each platform, parameters filled, built again; what was accepted must
//! come back as the same plan.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_firmware::igvm::{BuildOptions, PlanOptions, ZeroPages, build, plan};
use podvisor_firmware::inspect::inspect;
use podvisor_firmware::layout;
use podvisor_firmware::machine::MachineDescription;
use podvisor_firmware::memory_map::memory_map;
use podvisor_firmware::parameters::fill;
use podvisor_firmware::plan::{GpaRange, Platform};

/// The checksum would hide everything behind it: it and the length are made right first.
fn seal(file: &mut [u8]) {
    let word = |file: &[u8], at: usize| {
        file.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    if file.len() < 24 {
        return;
    }
    let len = u32::try_from(file.len()).unwrap_or(u32::MAX);
    file[16..20].copy_from_slice(&len.to_le_bytes());
    let fixed_len = if word(file, 4) == 2 { 32 } else { 24 };
    let start = word(file, 8);
    let Some(headers) = file.get(start..start.saturating_add(word(file, 12))) else { return };
    let Some(fixed) = file.get(..fixed_len) else { return };
    let crc = crc32(&[&fixed[..20], &[0; 4], &fixed[24..], headers]);
    file[20..24].copy_from_slice(&crc.to_le_bytes());
}

fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = !0u32;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

fuzz_target!(|data: &[u8]| {
    let mut file = data.to_vec();
    seal(&mut file);
    let Ok(memory) = memory_map(64 << 20, layout::MEM_64BIT_DEVICES_START) else { return };
    let machine = MachineDescription {
        vcpus: 2,
        max_vcpus: 4,
        memory,
        mmio: [GpaRange { start: 0, len: 0 }; 2],
        command_line: "quiet".into(),
        memory_is_shared: false,
    };
    let _ = inspect(&file, ZeroPages::AsZero, None);
    for platform in [Platform::Native, Platform::SevSnp] {
        for zero_pages in [ZeroPages::AsNormal, ZeroPages::AsZero] {
            let options = PlanOptions { platform: Some(platform), zero_pages };
            let Ok(first) = plan(&file, &options) else { continue };
            for area in &first.areas {
                let _ = fill(area, &machine);
            }
            let keep = BuildOptions { preserve_order: true, ..BuildOptions::default() };
            let Ok(built) = build(std::slice::from_ref(&first), &keep) else { continue };
            let again = plan(&built, &options).expect("what is built is accepted");
            let rebuilt = build(std::slice::from_ref(&again), &keep).expect("what was built can be built");
            assert_eq!(built, rebuilt);
            assert_eq!(first.vps, again.vps);
            assert_eq!(first.areas, again.areas);
        }
    }
});
