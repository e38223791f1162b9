//! A guest of the emulation without KVM: guest memory, a run-time half, and the guest's side of GHCB and messages.
#![allow(clippy::allow_attributes, dead_code, reason = "each test binary uses a part of this")]

use podvisor_snp::chain::SigningChain;
use podvisor_snp::emulated::{Guest, MSR_GHCB, MSR_VALIDATE, Runtime, RuntimeOptions};
use podvisor_snp::guest_message::{Header, open, seal};
use podvisor_snp::processor::MsrOutcome;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const KEY: [u8; 32] = [0x6B; 32];
pub(crate) const GHCB: u64 = 0x1_0000;
pub(crate) const REQUEST: u64 = 0x1_1000;
pub(crate) const RESPONSE: u64 = 0x1_2000;
pub(crate) const CERTS: u64 = 0x2_0000;
pub(crate) const PAGES: u64 = 2048;

pub(crate) struct Sandbox {
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) runtime: Runtime,
}

/// 8 MiB, all private but the first 64 pages; vCPU 0 has registered its GHCB.
pub(crate) fn sandbox() -> Sandbox {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * 4096) as usize)]).unwrap();
    let runtime = Runtime::new(memory.clone(), &RuntimeOptions::default());
    runtime.convert(64..PAGES, true).unwrap();
    runtime.start(Guest::for_tests(KEY, SigningChain::test_chain().unwrap()), 1);
    let sandbox = Sandbox { memory, runtime };
    assert_eq!(sandbox.msr(GHCB | 0x12), GHCB | 0x13);
    sandbox
}

impl Sandbox {
    /// A GHCB MSR request of vCPU 0 and what it reads back.
    pub(crate) fn msr(&self, value: u64) -> u64 {
        let MsrOutcome::Value(written) = self.runtime.write_msr(0, MSR_GHCB, value) else {
            panic!("{value:#x} was refused");
        };
        let read = self.runtime.read_msr(0, MSR_GHCB);
        assert_eq!(read, MsrOutcome::Value(written));
        written
    }

    /// rc and carry flag of a validation.
    pub(crate) fn validate(&self, gfn: u64, order: u64, on: bool) -> (u64, bool) {
        let value = gfn << 12 | order << 1 | u64::from(on);
        assert_ne!(self.runtime.write_msr(0, MSR_VALIDATE, value), MsrOutcome::Fault);
        let MsrOutcome::Value(outcome) = self.runtime.read_msr(0, MSR_VALIDATE) else {
            panic!("unreadable")
        };
        (outcome & 0xFF, outcome >> 8 & 1 == 1)
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub(crate) fn word(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.get(gpa, 8).try_into().unwrap())
    }

    /// Fills the GHCB with `fields` (offset, value), all marked valid, and leaves the shared buffer alone.
    pub(crate) fn fill_ghcb(&self, fields: &[(u64, u64)]) {
        self.put(GHCB, &[0; 0x800]);
        let mut bitmap = 0u128;
        for (offset, value) in fields {
            self.put(GHCB + offset, &value.to_le_bytes());
            bitmap |= 1 << (offset / 8);
        }
        self.put(GHCB + 0x3F0, &bitmap.to_le_bytes());
        self.put(GHCB + 0xFFA, &2u16.to_le_bytes());
        self.put(GHCB + 0xFFC, &0u32.to_le_bytes());
    }

    /// VMGEXIT; sw_exit_info_1 and sw_exit_info_2.
    pub(crate) fn vmgexit(&self, code: u64, info_1: u64, info_2: u64, more: &[(u64, u64)]) -> (u64, u64) {
        let mut fields = vec![(0x390, code), (0x398, info_1), (0x3A0, info_2)];
        fields.extend_from_slice(more);
        self.fill_ghcb(&fields);
        assert_eq!(self.msr(GHCB), GHCB);
        (self.word(GHCB + 0x398), self.word(GHCB + 0x3A0))
    }

    /// Puts a sealed message into the request page.
    pub(crate) fn request(&self, sequence: u64, kind: u8, payload: &[u8]) {
        let header = Header {
            sequence,
            kind,
            version: 1,
            len: 0,
            vmpck: 0,
        };
        self.put(REQUEST, &seal(&header, payload, &KEY).unwrap()[..]);
    }

    /// The opened response.
    pub(crate) fn response(&self) -> (Header, Vec<u8>) {
        open(&self.get(RESPONSE, 4096).try_into().unwrap(), &KEY).unwrap()
    }

    /// A report over `data`, as the guest's `sequence`th message.
    pub(crate) fn report(&self, sequence: u64, data: [u8; 64]) -> Vec<u8> {
        let mut payload = data.to_vec();
        payload.resize(96, 0);
        self.request(sequence, 5, &payload);
        assert_eq!(self.vmgexit(0x8000_0011, REQUEST, RESPONSE, &[]), (0, 0));
        let (header, body) = self.response();
        assert_eq!((header.sequence, header.kind), (sequence + 1, 6));
        assert_eq!(body[..8], [0, 0, 0, 0, 0xA0, 4, 0, 0]);
        body[32..].to_vec()
    }
}
