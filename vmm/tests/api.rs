//! The API as a whole, with a real process: what the table of endpoints promises beyond single handlers.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use common::{Process, kvm, pvh_kernel, wait_for};
use serde_json::{Value, json};

/// Says R on COM1 and halts; an NMI has it say N and power off.
fn waits_for_nmi() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    let mut code = vec![0xBC, 0x00, 0x00, 0x09, 0x00]; // mov esp, 0x90000
    let lgdt = code.len();
    code.extend([0x0F, 0x01, 0x15, 0, 0, 0, 0]); // lgdt [gdtr]
    let lidt = code.len();
    code.extend([0x0F, 0x01, 0x1D, 0, 0, 0, 0]); // lidt [idtr]
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xB0, b'R', 0xEE]); // mov dx, 0x3f8; mov al, 'R'; out dx, al
    code.extend([0xF4, 0xEB, 0xFD]); // hlt; jmp
    let handler = ENTRY + u32::try_from(code.len()).unwrap();
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xB0, b'N', 0xEE]);
    code.extend([0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, 0xF4, 0xEB, 0xFD]); // mov dx, 0x600; mov al, 0x34; out; hlt; jmp
    let mut table = |at: usize, bytes: &[u8]| {
        let limit = u16::try_from(bytes.len() - 1).unwrap();
        let base = ENTRY + u32::try_from(code.len()).unwrap();
        code.extend_from_slice(bytes);
        let register = ENTRY + u32::try_from(code.len()).unwrap();
        code.extend(limit.to_le_bytes());
        code.extend(base.to_le_bytes());
        code.splice(at + 3..at + 7, register.to_le_bytes());
    };
    // A null descriptor and flat 32-bit code.
    table(lgdt, &[0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0, 0, 0x9A, 0xCF, 0]);
    let mut gates = [0; 24];
    let [a, b, c, d] = handler.to_le_bytes();
    // Vector 2: an interrupt gate to the handler, selector 8.
    for (place, byte) in gates.iter_mut().skip(16).zip([a, b, 8, 0, 0, 0x8E, c, d]) {
        *place = byte;
    }
    table(lidt, &gates);
    code
}

fn nmi_pod() -> Process {
    let process = Process::start();
    pvh_kernel(&process.path("kernel"), &waits_for_nmi());
    let config: Value = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 128 << 20},
        "payload": {"kernel": process.path("kernel")},
        "serial": {"mode": "File", "file": process.path("serial")},
        "console": {"mode": "Off"},
    });
    process.put("vm.create", Some(&config));
    process.put("vm.boot", None);
    wait_for("the guest", || (serial(&process) == "R").then_some(()));
    process
}

fn serial(process: &Process) -> String {
    std::fs::read_to_string(process.path("serial")).unwrap()
}

#[test]
fn an_nmi_reaches_a_halted_guest() {
    if !kvm() {
        return;
    }
    let mut process = nmi_pod();
    process.put("vm.nmi", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(serial(&process), "RN");
}

#[test]
fn an_nmi_waits_for_a_paused_guest() {
    if !kvm() {
        return;
    }
    let mut process = nmi_pod();
    process.put("vm.pause", None);
    process.put("vm.nmi", None);
    assert_eq!(process.info()["state"], "Paused");
    assert_eq!(serial(&process), "R");
    process.put("vm.resume", None);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(serial(&process), "RN");
}
