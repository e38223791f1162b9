//! A guest's MSR writes and GHCB page contents against the emulated processor's run-time half, over plain memory.
//! Input: operations of a byte and its operands. Nothing may panic, and page states must stay coherent.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use podvisor_snp::chain::SigningChain;
use podvisor_snp::emulated::{Guest, MSR_GHCB, MSR_VALIDATE, MSRS, Runtime, RuntimeOptions};
use podvisor_snp::processor::MsrOutcome;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 1024;
const GHCB: u64 = 0x1000;

fn chain() -> Arc<SigningChain> {
    static CHAIN: OnceLock<Arc<SigningChain>> = OnceLock::new();
    Arc::clone(CHAIN.get_or_init(|| SigningChain::test_chain().expect("the shipped chain")))
}

fn take<'d, const N: usize>(data: &mut &'d [u8]) -> Option<[u8; N]> {
    let (head, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*head)
}

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), PAGES as usize / 2 * 4096),
        (GuestAddress(PAGES * 4096), PAGES as usize / 2 * 4096),
    ])
    .expect("memory");
    let runtime = Runtime::new(memory.clone(), &RuntimeOptions { max_vcpus: 2, size_mismatch: false });
    runtime.convert(64..PAGES / 2, true).expect("RAM");
    runtime.start(Guest::for_tests([7; 32], chain()), 1);
    runtime.write_msr(0, MSR_GHCB, GHCB | 0x12);
    let mut data = data;
    for _ in 0..64 {
        let Some([operation]) = take(&mut data) else { break };
        let outcome = match operation % 5 {
            0 => {
                let Some(value) = take(&mut data) else { break };
                runtime.write_msr(u32::from(operation >> 6), MSR_GHCB, u64::from_le_bytes(value))
            }
            1 => {
                let Some(value) = take(&mut data) else { break };
                runtime.write_msr(0, MSR_VALIDATE, u64::from_le_bytes(value))
            }
            2 => {
                // Bytes somewhere into the GHCB page.
                let Some([low, high, len]) = take(&mut data) else { break };
                let offset = u64::from(u16::from_le_bytes([low, high]) & 0xFFF);
                let bytes = data.get(..usize::from(len)).unwrap_or(data);
                data = data.get(bytes.len()..).unwrap_or(&[]);
                let room = bytes.len().min((4096 - offset) as usize);
                let _ = memory.write_slice(&bytes[..room], GuestAddress(GHCB + offset));
                continue;
            }
            3 => {
                // A well-formed event with any operands.
                let Some(words) = take::<34>(&mut data) else { break };
                let codes = [0x8000_0010u64, 0x8000_0011, 0x8000_0012, 0x8000_FFFD, 0x8000_FFFE];
                let word = |at: usize| u64::from_le_bytes(words[2 + at * 8..10 + at * 8].try_into().expect("8 bytes"));
                let scratch = GHCB + 0x800 + u64::from(words[1]);
                let fields = [
                    (0x390, codes[usize::from(words[0]) % codes.len()]),
                    (0x398, word(0)),
                    (0x3A0, word(1)),
                    (0x3A8, scratch),
                    (0x1F8, word(2)),
                    (0x318, word(3)),
                ];
                let mut bitmap = 0u128;
                for (offset, value) in fields {
                    let _ = memory.write_slice(&value.to_le_bytes(), GuestAddress(GHCB + offset));
                    bitmap |= 1 << (offset / 8);
                }
                let _ = memory.write_slice(&bitmap.to_le_bytes(), GuestAddress(GHCB + 0x3F0));
                let _ = memory.write_slice(&[2, 0, 0, 0, 0, 0], GuestAddress(GHCB + 0xFFA));
                runtime.write_msr(0, MSR_GHCB, GHCB)
            }
            _ => runtime.read_msr(u32::from(operation >> 4), MSRS[usize::from(operation >> 4) % MSRS.len()]),
        };
        if matches!(outcome, MsrOutcome::Terminate { .. }) {
            break;
        }
    }
    for gfn in [0, 63, 64, 511, 1024, 1535] {
        let shared = runtime.pages().is_shared(gfn * 4096, 4096);
        assert_ne!(shared, runtime.pages().is_private(gfn..gfn + 1));
        assert!(!shared || !runtime.pages().is_validated(gfn..gfn + 1), "a shared page is never validated");
    }
});
