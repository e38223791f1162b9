//! The guest's request to change pages over, as KVM hands it out: `KVM_HC_MAP_GPA_RANGE` (Linux
//! `Documentation/virt/kvm/x86/hypercalls.rst`). Arguments are a guest's, so anything may be in them.

use crate::processor::ProcessorError;

/// The hypercall's number, and its bit in `KVM_CAP_EXIT_HYPERCALL`.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENC_STAT`: encrypted, which is private.
const ENCRYPTED: u64 = 1 << 4;
/// Page size hint (0: 4 KiB, 1: 2 MiB, 2: 1 GiB) and the bit above it.
const KNOWN: u64 = 0b1_1111;
const PAGE: u64 = 4096;

/// Does what the guest asks through `change` (first byte, bytes, private), if it can be meant. Returns what goes into
/// `hypercall.ret`: 0, EAGAIN or EINVAL, for KVM ends a vCPU that is given something else.
pub fn answer(
    number: u64,
    arguments: &[u64; 6],
    change: impl FnOnce(u64, u64, bool) -> Result<(), ProcessorError>,
) -> u64 {
    const AGAIN: u64 = libc::EAGAIN.unsigned_abs() as u64;
    const INVALID: u64 = libc::EINVAL.unsigned_abs() as u64;
    let [gpa, pages, attributes, ..] = *arguments;
    let len = pages.checked_mul(PAGE);
    let end = len.and_then(|len| gpa.checked_add(len));
    let (Some(len @ 1..), Some(_)) = (len, end) else {
        return INVALID;
    };
    if number != KVM_HC_MAP_GPA_RANGE || attributes & !KNOWN != 0 || attributes & 0b1111 > 2 || gpa % PAGE != 0 {
        return INVALID;
    }
    match change(gpa, len, attributes & ENCRYPTED != 0) {
        Ok(()) => 0,
        Err(error) if matches!(error.errno, libc::EAGAIN | libc::EINTR | libc::ENOMEM) => AGAIN,
        Err(_) => INVALID,
    }
}

/// Words for `KVM_EXIT_MEMORY_FAULT`: the guest touched `size` bytes at `gpa` as private memory or as shared, and KVM has
/// no such page to show it. Pages change over by request only, so this is the end of the guest.
#[must_use]
pub fn memory_fault(flags: u64, gpa: u64, size: u64, is_shared: Option<bool>) -> String {
    let wanted = if flags & u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE) == 0 {
        "shared"
    } else {
        "private"
    };
    let is = match is_shared {
        Some(true) => "it is shared",
        Some(false) => "it is private or not RAM",
        None => "the pod has no private memory",
    };
    format!(
        "the guest touched {size:#x} bytes at {gpa:#x} as {wanted} memory, which KVM cannot give it (KVM_EXIT_MEMORY_FAULT; {is}): \
         a guest must ask for a page's change before it uses it in its new state"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(errno: i32) -> ProcessorError {
        ProcessorError {
            op: "test",
            errno,
            fw_error: 0,
            reason: String::new(),
        }
    }

    fn ask(number: u64, gpa: u64, pages: u64, attributes: u64) -> (u64, Option<(u64, u64, bool)>) {
        let mut told = None;
        let answer = answer(number, &[gpa, pages, attributes, 9, 9, 9], |gpa, len, private| {
            told = Some((gpa, len, private));
            Ok(())
        });
        (answer, told)
    }

    #[test]
    fn what_can_be_meant_is_done() {
        assert_eq!(ask(12, 0x1000, 2, 0x10), (0, Some((0x1000, 0x2000, true))));
        assert_eq!(ask(12, 0x20_0000, 512, 0x01), (0, Some((0x20_0000, 0x20_0000, false))));
        assert_eq!(
            ask(12, 0, u64::MAX / 4096, 0),
            (0, Some((0, u64::MAX / 4096 * 4096, false)))
        );
    }

    #[test]
    fn what_cannot_be_meant_is_einval() {
        for (number, gpa, pages, attributes) in [
            (11, 0, 1, 0),
            (12, 1, 1, 0),
            (12, 0, 0, 0),
            (12, 0, 1, 0x20),
            (12, 0, 1, 3),
            (12, 0, 1 << 52, 0),
            (12, 0x1000, u64::MAX / 4096, 0),
        ] {
            assert_eq!(
                ask(number, gpa, pages, attributes),
                (22, None),
                "{number} {gpa:#x} {pages:#x} {attributes:#x}"
            );
        }
    }

    #[test]
    fn a_fault_is_told_with_its_address_and_the_state_it_wanted() {
        let told = memory_fault(8, 0x5000, 0x1000, Some(true));
        assert!(
            told.contains("0x1000 bytes at 0x5000 as private") && told.contains("it is shared"),
            "{told}"
        );
        assert!(memory_fault(0, 0x5000, 0x1000, Some(false)).contains("as shared"));
    }

    proptest! {
        #[test]
        fn the_answer_is_never_another_value(
            number in 0u64..20, gpa: u64, pages: u64, attributes in 0u64..64, errno in 0i32..140
        ) {
            let got = answer(number, &[gpa, pages, attributes, 0, 0, 0], |_, _, _| match errno {
                0 => Ok(()),
                errno => Err(error(errno)),
            });
            prop_assert!([0, 11, 22].contains(&got));
        }
    }
}
