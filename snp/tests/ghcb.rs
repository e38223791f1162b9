//! The guest's side of the emulation: GHCB MSR protocol, validation, GHCB page. No KVM.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

#[path = "common/guest.rs"]
mod guest;

use guest::*;
use podvisor_snp::emulated::{Guest, MSR_GHCB, MSR_HAND_OVER, MSR_SEV_STATUS, MSR_VALIDATE, Runtime, RuntimeOptions};
use podvisor_snp::guest_message::{Header, seal};
use podvisor_snp::processor::MsrOutcome;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[test]
fn the_msr_protocol_answers_as_specified() {
    let sandbox = sandbox();
    assert_eq!(sandbox.msr(0x002), 2 << 48 | 1 << 32 | 51 << 24 | 1);
    assert_eq!(
        sandbox.runtime.read_msr(1, MSR_GHCB),
        MsrOutcome::Value(2 << 48 | 1 << 32 | 51 << 24 | 1)
    );
    assert_eq!(sandbox.msr(0x010), !0xFFF | 0x011);
    assert_eq!(sandbox.msr(0x080), 1 << 12 | 0x081);
    assert_eq!(sandbox.msr(0x006), 0x007);
    assert_eq!(
        sandbox.msr(1 << 32 | 2 << 30 | 4),
        2 << 30 | 5,
        "an absent leaf reads 0"
    );
    assert_eq!(
        sandbox.msr(PAGES << 12 | 0x12),
        !0xFFF | 0x13,
        "a GHCB outside RAM is not registered"
    );
    assert_eq!(sandbox.runtime.read_msr(0, MSR_SEV_STATUS), MsrOutcome::Value(7));
    let terminate = sandbox.runtime.write_msr(0, MSR_GHCB, 0x100 | 3 << 12 | 0xAB << 16);
    assert_eq!(terminate, MsrOutcome::Terminate { set: 3, code: 0xAB });
    for (msr, value) in [(MSR_GHCB, 0x003), (MSR_GHCB, 0xFFF), (MSR_SEV_STATUS, 0), (0x1234, 0)] {
        assert_eq!(sandbox.runtime.write_msr(0, msr, value), MsrOutcome::Fault);
    }
    assert_eq!(sandbox.runtime.write_msr(9999, MSR_GHCB, 2), MsrOutcome::Fault);
    assert_eq!(sandbox.runtime.read_msr(9999, MSR_GHCB), MsrOutcome::Fault);
}

#[test]
fn a_page_changes_state_and_its_contents_are_gone() {
    let sandbox = sandbox();
    let gpa = 100 * 4096;
    sandbox.put(gpa, b"secret");
    assert_eq!(sandbox.validate(100, 0, true), (0, false));
    assert!(!sandbox.runtime.pages().is_shared(gpa, 1));
    assert_eq!(sandbox.msr(2 << 52 | gpa | 0x14), 0x15);
    assert_eq!(sandbox.get(gpa, 6), [0; 6]);
    assert!(sandbox.runtime.pages().is_shared(gpa, 4096));
    sandbox.put(gpa, b"public");
    assert_eq!(sandbox.msr(1 << 52 | gpa | 0x14), 0x15);
    assert_eq!(sandbox.get(gpa, 6), [0; 6]);
    assert_eq!(
        sandbox.validate(100, 0, true),
        (0, false),
        "a converted page is not validated"
    );
    sandbox.put(gpa, b"secret");
    assert_eq!(sandbox.msr(1 << 52 | gpa | 0x14), 0x15);
    assert_eq!(
        sandbox.get(gpa, 6),
        b"secret",
        "no change of state, no change of contents"
    );
    assert_eq!(sandbox.msr(1 << 52 | PAGES << 12 | 0x14), 1 << 32 | 0x15);
    assert_eq!(sandbox.msr(3 << 52 | gpa | 0x14), 1 << 32 | 0x15);
}

#[test]
fn validation_follows_the_rmp() {
    let sandbox = sandbox();
    assert_eq!(sandbox.validate(200, 0, true), (0, false));
    assert_eq!(sandbox.validate(200, 0, true), (0, true), "twice");
    assert_eq!(sandbox.validate(200, 0, false), (0, false));
    assert_eq!(sandbox.validate(200, 0, false), (0, true));
    assert_eq!(sandbox.validate(1, 0, true), (1, false), "shared");
    assert_eq!(sandbox.validate(PAGES, 0, true), (1, false), "not RAM");
    assert_eq!(sandbox.validate(1024, 10, true), (0, false));
    assert_eq!(sandbox.validate(1100, 3, true), (0, true));
    assert_eq!(sandbox.validate(1025, 10, true), (1, false), "leaves RAM");
    assert_eq!(sandbox.validate(u64::MAX >> 24, 18, true), (1, false));
    for value in [1 << 52, 0x80, 0x800, 19 << 1] {
        assert_eq!(
            sandbox.runtime.write_msr(0, MSR_VALIDATE, value),
            MsrOutcome::Fault,
            "{value:#x}"
        );
    }
}

#[test]
fn a_hand_over_keeps_memory_and_ends_the_emulation() {
    let sandbox = sandbox();
    let gpa = 300 * 4096;
    assert_eq!(sandbox.validate(300, 0, true), (0, false));
    sandbox.put(gpa, b"kernel");
    for value in [0, 2, 1 << 32 | 1] {
        let refused = sandbox.runtime.write_msr(0, MSR_HAND_OVER, value);
        assert_eq!(refused, MsrOutcome::Fault, "{value:#x}");
    }
    assert!(!sandbox.runtime.pages().is_shared(gpa, 1));
    assert_eq!(
        sandbox.runtime.write_msr(1, MSR_HAND_OVER, 1),
        MsrOutcome::Value(1),
        "any vCPU may"
    );
    assert!(sandbox.runtime.pages().is_shared(0, PAGES * 4096));
    assert_eq!(sandbox.get(gpa, 6), b"kernel");
    assert_eq!(sandbox.runtime.read_msr(0, MSR_SEV_STATUS), MsrOutcome::Value(0));
    for (msr, value) in [(MSR_GHCB, 0x002), (MSR_VALIDATE, gpa | 1), (MSR_HAND_OVER, 1)] {
        assert_eq!(sandbox.runtime.write_msr(0, msr, value), MsrOutcome::Fault);
    }
    assert_eq!(sandbox.runtime.read_msr(0, MSR_GHCB), MsrOutcome::Fault);
}

#[test]
fn a_size_mismatch_can_be_asked_for() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    let options = RuntimeOptions {
        size_mismatch: true,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::new(memory, &options);
    runtime.convert(0..1024, true).unwrap();
    assert_eq!(
        runtime.write_msr(0, MSR_VALIDATE, 512 << 12 | 9 << 1 | 1),
        MsrOutcome::Value(6)
    );
    assert_eq!(runtime.write_msr(0, MSR_VALIDATE, 512 << 12 | 1), MsrOutcome::Value(0));
}

const PSC: u64 = 0x8000_0010;

/// Puts a descriptor of `entries` at the start of the shared buffer.
fn descriptor(sandbox: &Sandbox, first: u16, last: u16, entries: &[u64]) {
    let mut bytes = [first.to_le_bytes(), last.to_le_bytes(), [0; 2], [0; 2]].concat();
    for entry in entries {
        bytes.extend(entry.to_le_bytes());
    }
    sandbox.put(GHCB + 0x800, &bytes);
}

fn batch(sandbox: &Sandbox) -> (u64, u64) {
    sandbox.vmgexit(PSC, 0, 0, &[(0x3A8, GHCB + 0x800)])
}

#[test]
fn a_batch_changes_pages_in_order_and_tells_how_far_it_came() {
    let sandbox = sandbox();
    let entry = |gfn: u64, operation: u64, large: u64| gfn << 12 | operation << 52 | large << 56;
    descriptor(
        &sandbox,
        0,
        3,
        &[entry(100, 2, 0), entry(512, 2, 1), entry(5000, 2, 0), entry(101, 2, 0)],
    );
    assert_eq!(batch(&sandbox), (0, 1 << 32 | 2));
    assert_eq!(sandbox.word(GHCB + 0x800) & 0xFFFF, 2, "the entry that failed");
    assert_eq!(sandbox.word(GHCB + 0x808) & 0xFFF, 1);
    assert_eq!(sandbox.word(GHCB + 0x810) & 0xFFF, 512);
    let shared = |gfn: u64, pages: u64| sandbox.runtime.pages().is_shared(gfn * 4096, pages * 4096);
    assert!(shared(100, 1) && shared(512, 512) && !shared(101, 1));

    descriptor(&sandbox, 2, 3, &[0, 0, entry(102, 2, 0), entry(101, 2, 0)]);
    assert_eq!(batch(&sandbox), (0, 0));
    assert_eq!(sandbox.word(GHCB + 0x800) & 0xFFFF, 4);
    assert!(shared(101, 2));
    assert_eq!(batch(&sandbox), (0, 0), "nothing is left to do");

    descriptor(&sandbox, 0, 0, &[entry(1024, 2, 1) | 510]);
    assert_eq!(batch(&sandbox), (0, 0));
    assert!(!shared(1024, 1) && shared(1024 + 510, 2), "a large entry is resumed");
    for bad in [entry(513, 2, 1), entry(100, 2, 0) | 2, entry(1 << 39, 1, 1)] {
        descriptor(&sandbox, 0, 0, &[bad]);
        assert_eq!(batch(&sandbox), (0, 1 << 32 | 2), "{bad:#x}");
    }
    descriptor(&sandbox, 0, 253, &[]);
    assert_eq!(batch(&sandbox), (0, 1 << 32 | 1));
    descriptor(&sandbox, 0, 0, &[entry(300, 7, 0)]);
    assert_eq!(batch(&sandbox), (0, 0), "other operations are done without effect");
}

#[test]
fn a_full_batch_and_one_that_takes_its_own_page() {
    let sandbox = sandbox();
    let entries: Vec<u64> = (0..253).map(|i| (300 + i) << 12 | 2 << 52).collect();
    descriptor(&sandbox, 0, 252, &entries);
    assert_eq!(batch(&sandbox), (0, 0));
    assert!(sandbox.runtime.pages().is_shared(300 * 4096, 253 * 4096));
    descriptor(&sandbox, 0, 1, &[GHCB | 1 << 52, 400 << 12 | 1 << 52]);
    sandbox.fill_ghcb(&[(0x390, PSC), (0x398, 0), (0x3A0, 0), (0x3A8, GHCB + 0x800)]);
    assert_eq!(sandbox.runtime.write_msr(0, MSR_GHCB, GHCB), MsrOutcome::Value(GHCB));
    assert_eq!(
        sandbox.get(GHCB, 4096),
        [0; 4096],
        "nothing is written to a private page"
    );
    assert_eq!(sandbox.runtime.write_msr(0, MSR_GHCB, GHCB), MsrOutcome::Fault);
}

#[test]
fn a_malformed_ghcb_is_told_why() {
    let sandbox = sandbox();
    assert_eq!(sandbox.vmgexit(0x8000_FFFD, 0, 0, &[]), (0, 1));
    assert_eq!(sandbox.vmgexit(0x8000_0099, 0, 0, &[]), (2, 6));
    assert_eq!(sandbox.vmgexit(PSC, 0, 0, &[]), (2, 4), "no scratch");
    for scratch in [0, GHCB, GHCB + 0x7FF, GHCB + 0xFF0, GHCB + 0x1000, u64::MAX] {
        assert_eq!(sandbox.vmgexit(PSC, 0, 0, &[(0x3A8, scratch)]), (2, 3), "{scratch:#x}");
    }
    sandbox.fill_ghcb(&[(0x390, 0x8000_FFFD), (0x398, 0)]);
    sandbox.msr(GHCB);
    assert_eq!(sandbox.word(GHCB + 0x3A0), 4);
    for (offset, bytes) in [(0xFFA, 3u32), (0xFFA, 0), (0xFFC, 1)] {
        sandbox.fill_ghcb(&[(0x390, 0x8000_FFFD), (0x398, 0), (0x3A0, 0)]);
        sandbox.put(GHCB + offset, &bytes.to_le_bytes()[..2]);
        sandbox.msr(GHCB);
        assert_eq!((sandbox.word(GHCB + 0x398), sandbox.word(GHCB + 0x3A0)), (2, 2));
    }
    sandbox.fill_ghcb(&[(0x390, 0x8000_FFFE), (0x398, 0x12 << 4 | 5), (0x3A0, 0)]);
    let end = sandbox.runtime.write_msr(0, MSR_GHCB, GHCB);
    assert_eq!(end, MsrOutcome::Terminate { set: 5, code: 0x12 });
}

#[test]
fn a_ghcb_that_is_not_registered_or_not_shared_faults() {
    let sandbox = sandbox();
    assert_eq!(sandbox.runtime.write_msr(0, MSR_GHCB, GHCB + 0x1000), MsrOutcome::Fault);
    assert_eq!(
        sandbox.runtime.write_msr(1, MSR_GHCB, GHCB),
        MsrOutcome::Fault,
        "registered by another vCPU"
    );
    let private = 100 << 12;
    sandbox.msr(private | 0x12);
    assert_eq!(sandbox.runtime.write_msr(0, MSR_GHCB, private), MsrOutcome::Fault);
    assert_eq!(sandbox.runtime.write_msr(0, MSR_GHCB, 0), MsrOutcome::Fault);
}

#[test]
fn messages_are_refused_as_the_firmware_does() {
    let sandbox = sandbox();
    let ask = |info_1, info_2| sandbox.vmgexit(0x8000_0011, info_1, info_2, &[]);
    assert_eq!(ask(REQUEST, REQUEST), (2, 5));
    assert_eq!(ask(REQUEST + 8, RESPONSE), (2, 5));
    assert_eq!(ask(REQUEST, 100 << 12), (2, 5), "a private page");
    assert_eq!(ask(REQUEST, PAGES << 12), (2, 5));
    let payload = [0; 96];
    sandbox.request(2, 5, &payload);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x16), "the first is number 1");
    sandbox.request(1, 5, &payload);
    let sealed = sandbox.get(REQUEST, 4096);
    sandbox.put(REQUEST + 0x70, &[sealed[0x70] ^ 1]);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x0B), "changed on the way");
    sandbox.put(REQUEST, &sealed);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0));
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x16), "replayed");
    sandbox.request(5, 5, &payload);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x16), "skipped");
    sandbox.request(3, 99, &payload);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x16), "unknown type");
    sandbox.request(3, 5, &payload[1..]);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0x16), "wrong length");
    let mut bad_vmpl = payload;
    bad_vmpl[0x40] = 4;
    sandbox.request(3, 5, &bad_vmpl);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0));
    assert_eq!(sandbox.response().1, [&[0x16][..], &[0; 31]].concat());
    let mut vlek = payload;
    vlek[0x44] = 2;
    sandbox.request(5, 5, &vlek);
    assert_eq!(ask(REQUEST, RESPONSE), (0, 0));
    assert_eq!(sandbox.response().1[0], 0x27);
}

#[test]
fn keys_cpuid_and_tsc() {
    let sandbox = sandbox();
    let mut sequence = 1;
    let mut ask = |kind, payload: &[u8]| {
        sandbox.request(sequence, kind, payload);
        assert_eq!(sandbox.vmgexit(0x8000_0011, REQUEST, RESPONSE, &[]), (0, 0));
        sequence += 2;
        let (header, body) = sandbox.response();
        assert_eq!(header.kind, kind + 1);
        body
    };
    let select = |bits: u8| {
        let mut payload = [0; 32];
        payload[8] = bits;
        payload
    };
    let plain = ask(3, &select(0));
    assert_eq!((plain.len(), &plain[..4]), (64, &[0; 4][..]));
    assert_eq!(ask(3, &select(0)), plain, "the same selection, the same key");
    assert_ne!(ask(3, &select(8)), plain);
    let mut migration = select(0);
    migration[0] = 1;
    assert_eq!(ask(3, &migration)[0], 0x16);
    assert_eq!(ask(3, &select(0x40))[0], 0x16);
    assert_eq!(ask(17, &[0; 128]), [0; 128]);
    let mut table = vec![0; 64];
    table[0] = 1;
    table[16] = 1;
    table[16 + 32 + 3] = 1;
    let body = ask(1, &table);
    assert_eq!((body[0], body[4]), (0x16, 1), "TSC-deadline is corrected");
    assert_eq!(body[16 + 32 + 3], 0);
    assert_eq!(ask(1, &body_as_request(&body))[0], 0);
    assert_eq!(ask(1, &table[..63])[0], 0x16);
}

fn body_as_request(body: &[u8]) -> Vec<u8> {
    let mut request = body.to_vec();
    request[..16].fill(0);
    request[0] = 1;
    request
}

#[test]
fn the_certificate_table_needs_room() {
    let sandbox = sandbox();
    let extended = |rax, rbx| sandbox.vmgexit(0x8000_0012, REQUEST, RESPONSE, &[(0x1F8, rax), (0x318, rbx)]);
    sandbox.request(1, 5, &[0; 96]);
    assert_eq!(extended(CERTS, 0), (0, 1 << 32));
    let needed = sandbox.word(GHCB + 0x318);
    assert!(needed > 0);
    assert_eq!(extended(CERTS, needed - 1), (0, 1 << 32));
    assert_eq!(extended(CERTS + 1, needed), (2, 5));
    assert_eq!(extended(100 << 12, needed), (2, 5), "private pages");
    assert_eq!(extended(REQUEST - 4096, needed), (2, 5), "over the request");
    assert_eq!(extended(u64::MAX << 12, needed), (2, 5));
    assert_eq!(extended(CERTS, needed), (0, 0), "the message was not consumed before");
    let table = sandbox.get(CERTS, needed as usize * 4096);
    let certificates = podvisor_snp::verify::Certificates::from_table(&table).unwrap();
    assert!(certificates.ask.len() > 1000 && certificates.vcek.len() > 1000);
    assert_eq!(
        sandbox.vmgexit(0x8000_0012, REQUEST, RESPONSE, &[(0x1F8, CERTS)]),
        (2, 4),
        "RBX is missing"
    );
}

#[test]
fn sequence_numbers_run_per_key_and_a_guest_is_needed() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 * 4096)]).unwrap();
    let runtime = Runtime::new(memory.clone(), &RuntimeOptions::default());
    let sandbox = Sandbox { memory, runtime };
    sandbox.msr(GHCB | 0x12);
    sandbox.request(1, 5, &[0; 96]);
    assert_eq!(
        sandbox.vmgexit(0x8000_0011, REQUEST, RESPONSE, &[]),
        (0, 2),
        "not launched"
    );
    let chain = podvisor_snp::chain::SigningChain::test_chain().unwrap();
    let mut guest = Guest::for_tests(KEY, chain);
    let mut accepted = |vmpck, sequence| {
        let header = Header {
            sequence,
            kind: 17,
            version: 1,
            len: 0,
            vmpck,
        };
        guest.handle(&seal(&header, &[0; 128], &KEY).unwrap()).is_ok()
    };
    assert!(accepted(0, 1));
    assert!(accepted(3, 1));
    assert!(!accepted(0, 1));
    assert!(accepted(0, 3));
    assert!(!accepted(3, 5));
    assert!(accepted(3, 3));
}
