//! Guest messages: raw pages, and pages sealed with the right key around any type, version, sequence and payload.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use podvisor_snp::chain::SigningChain;
use podvisor_snp::emulated::Guest;
use podvisor_snp::guest_message::{Header, open, seal};

const KEY: [u8; 32] = [7; 32];

fn chain() -> Arc<SigningChain> {
    static CHAIN: OnceLock<Arc<SigningChain>> = OnceLock::new();
    Arc::clone(CHAIN.get_or_init(|| SigningChain::test_chain().expect("the shipped chain")))
}

fuzz_target!(|data: &[u8]| {
    let mut guest = Guest::for_tests(KEY, chain());
    let Some((&[mode, kind, version, sequence], payload)) = data.split_first_chunk() else { return };
    if mode & 1 == 0 {
        let mut page = [0; 4096];
        let len = payload.len().min(4096);
        page[..len].copy_from_slice(&payload[..len]);
        let _ = open(&page, &KEY);
        let _ = guest.handle(&page);
        return;
    }
    let header = Header { sequence: u64::from(sequence), kind, version, len: 0, vmpck: mode >> 1 & 3 };
    let Ok(page) = seal(&header, payload, &KEY) else { return };
    if let Ok(answer) = guest.handle(&page) {
        let (reply, _) = open(&answer, &KEY).expect("an answer opens with the same key");
        assert_eq!((reply.sequence, reply.kind), (2, kind + 1));
        assert!(guest.handle(&page).is_err(), "a replay is refused");
    }
});
