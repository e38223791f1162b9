//! Any bytes as a kernel to boot directly, ELF or bzImage: refused, or planned into the pod's RAM.
#![no_main]
use libfuzzer_sys::fuzz_target;
use podvisor_firmware::layout;
use podvisor_firmware::linux::place::Given;
use podvisor_firmware::linux::plan;
use podvisor_firmware::machine::MachineDescription;
use podvisor_firmware::memory_map::memory_map;
use podvisor_firmware::plan::{GpaRange, Step};

fuzz_target!(|data: &[u8]| {
    // The first byte makes one of the two magics right, or neither.
    let Some((kind, rest)) = data.split_first() else { return };
    let mut file = rest.to_vec();
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(room) = file.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    };
    match kind % 3 {
        0 => put(0, b"\x7FELF"),
        1 => {
            put(0x1FE, &[0x55, 0xAA]);
            put(0x202, b"HdrS");
        }
        _ => {}
    }
    let Ok(memory) = memory_map(64 << 20, layout::MEM_64BIT_DEVICES_START) else { return };
    let machine = MachineDescription {
        vcpus: 1,
        max_vcpus: 1,
        memory,
        mmio: [GpaRange { start: 0, len: 0 }; 2],
        command_line: String::new(),
        memory_is_shared: false,
    };
    let given = Given { initrd: Some(&[7; 5000]), cmdline: "quiet", machine: &machine, acpi: None };
    let Ok(plan) = plan(&file, &given) else { return };
    for step in &plan.steps {
        let Step::Pages { gpa, len, data, .. } = step else { continue };
        assert!(data.len() as u64 <= *len);
        // A page of ELF headers may lie behind the ACPI tables.
        assert!(machine.is_ram(*gpa, *len) || (*gpa >= layout::EBDA_START && gpa + len <= layout::HIGH_RAM_START));
    }
    assert_eq!(plan.vps.len(), 1);
});
