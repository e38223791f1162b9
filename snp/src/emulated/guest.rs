//! The firmware's view of a guest that runs: who it is, the keys and counters of its messages, and the answers to them.

use std::sync::Arc;

use aws_lc_rs::hmac;
use vm_memory::{Bytes, GuestAddress};

use super::error::fw;
use super::psp::GuestContext;
use super::runtime::Runtime;
use crate::chain::SigningChain;
use crate::cpuid;
use crate::digest::{PAGE_LEN, Page};
use crate::guest_message::{Header, MessageError, kind, open, seal};
use crate::report::{REPORT_LEN, Report, ReportWriter, Tcb, at};

/// Status INVALID_KEY inside a report response: the asked key does not exist or may not be used.
const INVALID_KEY: u32 = 0x27;
/// Firmware version that reports name: build, minor, major.
const FIRMWARE_VERSION: [u8; 3] = [21, 55, 1];
/// PLATFORM_INFO: SMT is enabled.
const PLATFORM_SMT: u64 = 1;
const REPORT_VERSION: u32 = 3;
const SIGNATURE_P384: u32 = 1;

/// A launched guest, as the firmware knows it.
pub struct Guest {
    context: GuestContext,
    chain: Arc<SigningChain>,
    /// Family, model, stepping.
    cpuid: [u8; 3],
    /// The last sequence number used with each VMPCK.
    sequence: [u64; 4],
}

fn field<const N: usize>(from: &[u8], offset: usize) -> [u8; N] {
    from.get(offset..)
        .and_then(|bytes| bytes.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

/// Family, model and stepping of CPUID Fn0000_0001 EAX.
fn family_model_stepping(signature: u32) -> [u8; 3] {
    let nibble = |shift: u32| (signature >> shift & 0xF).to_le_bytes()[0];
    let extended_family = (signature >> 20 & 0xFF).to_le_bytes()[0];
    [
        nibble(8).saturating_add(extended_family),
        nibble(16) << 4 | nibble(4),
        nibble(0),
    ]
}

impl Guest {
    pub(super) fn new(context: GuestContext, chain: Arc<SigningChain>, processor_signature: u32) -> Self {
        Self {
            context,
            chain,
            cpuid: family_model_stepping(processor_signature),
            sequence: [0; 4],
        }
    }

    /// A guest that was not launched but has `vmpck` as all its keys: for tests and fuzzing of the run-time half.
    #[must_use]
    pub fn for_tests(vmpck: [u8; 32], chain: Arc<SigningChain>) -> Self {
        let context = GuestContext {
            policy: 0x30000,
            digest: [0xD1; 48],
            host_data: [0x4D; 32],
            identity: crate::id_block::IdIdentity::default(),
            report_id: [0x1D; 32],
            vmpck: [vmpck; 4],
            vcek_disabled: false,
        };
        Self::new(context, chain, 0x00A0_0F11)
    }

    /// The certificate table for extended requests.
    pub(super) fn certificates(&self) -> Arc<[u8]> {
        self.chain.certificate_table()
    }

    /// `SNP_GUEST_REQUEST`: the response page, or the firmware's status.
    ///
    /// # Errors
    /// INVALID_PARAM for a malformed, unknown, replayed or skipped message, BAD_MEASUREMENT when authentication fails,
    /// AEAD_OFLOW when sequence numbers are used up. The counters stay as they are then.
    pub fn handle(&mut self, request: &Page) -> Result<Box<Page>, u32> {
        let status = |error| match error {
            MessageError::Header(_) => fw::INVALID_PARAM,
            MessageError::Authentication => fw::BAD_MEASUREMENT,
        };
        let header = crate::guest_message::header(request).map_err(status)?;
        let index = usize::from(header.vmpck);
        let key = self.context.vmpck.get(index).copied().ok_or(fw::INVALID_PARAM)?;
        let last = self.sequence.get(index).copied().ok_or(fw::INVALID_PARAM)?;
        let response = last
            .checked_add(2)
            .filter(|next| *next < u64::MAX - 1)
            .ok_or(fw::AEAD_OFLOW)?;
        if header.sequence != last + 1 {
            return Err(fw::INVALID_PARAM);
        }
        let (_, payload) = open(request, &key).map_err(status)?;
        let (kind, answer) = match (header.kind, header.version) {
            (kind::REPORT_REQ, 1) => (kind::REPORT_RSP, self.report(&payload, header.vmpck)?),
            (kind::KEY_REQ, 1) => (kind::KEY_RSP, self.derived_key(&payload, header.vmpck)?),
            (kind::CPUID_REQ, 1) => (kind::CPUID_RSP, cpuid_response(&payload)),
            // Scale, offset and factor are zero: there is no Secure TSC.
            (kind::TSC_INFO_REQ, 1) if payload.len() == 128 => (kind::TSC_INFO_RSP, vec![0; 128]),
            _ => return Err(fw::INVALID_PARAM),
        };
        let reply = Header {
            sequence: response,
            kind,
            version: 1,
            len: 0,
            vmpck: header.vmpck,
        };
        let page = seal(&reply, &answer, &key).map_err(status)?;
        if let Some(counter) = self.sequence.get_mut(index) {
            *counter = response;
        }
        Ok(page)
    }

    /// MSG_REPORT_REQ: report data, VMPL, key selection.
    fn report(&self, request: &[u8], vmpck: u8) -> Result<Vec<u8>, u32> {
        if request.len() != 96 {
            return Err(fw::INVALID_PARAM);
        }
        let vmpl = u32::from_le_bytes(field(request, 0x40));
        let key = u32::from_le_bytes(field(request, 0x44));
        let reserved = request.get(0x48..).unwrap_or(&[]);
        // A VMPCK speaks for its own VMPL and those below it.
        if vmpl > 3 || vmpl < u32::from(vmpck) || key > 2 || reserved.iter().any(|byte| *byte != 0) {
            return Ok(status_only(fw::INVALID_PARAM, 32));
        }
        if key == 2 || self.context.vcek_disabled {
            return Ok(status_only(INVALID_KEY, 32));
        }
        let report = self.attest(&field(request, 0), vmpl).ok_or(fw::RESOURCE_LIMIT)?;
        let size = u32::try_from(REPORT_LEN).unwrap_or(0).to_le_bytes();
        Ok([&[0; 4], &size[..], &[0; 24], report.as_bytes()].concat())
    }

    /// The signed report of this guest.
    fn attest(&self, report_data: &[u8; 64], vmpl: u32) -> Option<Report> {
        let context = &self.context;
        let tcb = self.chain.tcb.to_raw().to_le_bytes();
        let id = &context.identity;
        let mut report = ReportWriter::new();
        report
            .put(at::VERSION, &REPORT_VERSION.to_le_bytes())
            .put(at::GUEST_SVN, &id.guest_svn.to_le_bytes())
            .put(at::POLICY, &context.policy.to_le_bytes())
            .put(at::FAMILY_ID, &id.family_id)
            .put(at::IMAGE_ID, &id.image_id)
            .put(at::VMPL, &vmpl.to_le_bytes())
            .put(at::SIGNATURE_ALGO, &SIGNATURE_P384.to_le_bytes())
            .put(at::CURRENT_TCB, &tcb)
            .put(at::PLATFORM_INFO, &PLATFORM_SMT.to_le_bytes())
            .put(at::SIGNER_INFO, &[u8::from(id.author_key_enabled)])
            .put(at::REPORT_DATA, report_data)
            .put(at::MEASUREMENT, &context.digest)
            .put(at::HOST_DATA, &context.host_data)
            .put(at::ID_KEY_DIGEST, &id.id_key_digest.0)
            .put(at::AUTHOR_KEY_DIGEST, &id.author_key_digest.0)
            .put(at::REPORT_ID, &context.report_id)
            .put(at::REPORT_ID_MA, &[0xFF; 32])
            .put(at::REPORTED_TCB, &tcb)
            .put(at::CPUID_FAMILY, &self.cpuid)
            .put(at::CHIP_ID, &self.chain.chip_id)
            .put(at::COMMITTED_TCB, &tcb)
            .put(at::CURRENT_VERSION, &FIRMWARE_VERSION)
            .put(at::COMMITTED_VERSION, &FIRMWARE_VERSION)
            .put(at::LAUNCH_TCB, &tcb);
        report.sign(&self.chain.key)
    }

    /// MSG_KEY_REQ: a key derived from the chip's (here: from the chain's) secret and what the guest selects.
    fn derived_key(&self, request: &[u8], vmpck: u8) -> Result<Vec<u8>, u32> {
        if request.len() != 32 {
            return Err(fw::INVALID_PARAM);
        }
        let root = u32::from_le_bytes(field(request, 0));
        let selected = u64::from_le_bytes(field(request, 8));
        let vmpl = u32::from_le_bytes(field(request, 16));
        let svn = u32::from_le_bytes(field(request, 20));
        let tcb = u64::from_le_bytes(field(request, 24));
        let id = &self.context.identity;
        // Root 1 is the migration agent's, and there is none.
        let allowed = root == 0
            && selected < 1 << 6
            && (u32::from(vmpck)..4).contains(&vmpl)
            && svn <= id.guest_svn
            && Tcb::from_raw(tcb).at_most(self.chain.tcb);
        if !allowed {
            return Ok(status_only(fw::INVALID_PARAM, 64));
        }
        let mixed: [(u32, &[u8]); 6] = [
            (0, &self.context.policy.to_le_bytes()),
            (1, &id.image_id),
            (2, &id.family_id),
            (3, &self.context.digest),
            (4, &svn.to_le_bytes()),
            (5, &tcb.to_le_bytes()),
        ];
        let mut hmac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA384, &self.chain.root_key));
        hmac.update(&vmpl.to_le_bytes());
        hmac.update(&selected.to_le_bytes());
        for (bit, value) in mixed {
            if selected >> bit & 1 == 1 {
                hmac.update(value);
            }
        }
        let tag = hmac.sign();
        let key = tag.as_ref().first_chunk::<32>().ok_or(fw::RESOURCE_LIMIT)?;
        Ok([&[0; 32][..], key].concat())
    }
}

/// A response of `len` bytes that holds a status and nothing else.
fn status_only(status: u32, len: usize) -> Vec<u8> {
    let mut response = status.to_le_bytes().to_vec();
    response.resize(len, 0);
    response
}

/// MSG_CPUID_REQ: a CPUID table is checked; it comes back, corrected where it has to be.
fn cpuid_response(request: &[u8]) -> Vec<u8> {
    const HEADER: usize = 16;
    let mut page: Page = [0; PAGE_LEN];
    if let Some(to) = page.get_mut(..request.len()) {
        to.copy_from_slice(request);
    }
    let complete = |leaves: &Vec<cpuid::Leaf>| request.len() == HEADER + 48 * leaves.len();
    let Some(leaves) = cpuid::parse(&page).filter(complete) else {
        return status_only(fw::INVALID_PARAM, HEADER);
    };
    let (status, table) = match cpuid::firmware_check(&page) {
        Ok(()) => (0, Box::new(page)),
        Err(corrected) => (fw::INVALID_PARAM, corrected),
    };
    let count = u32::try_from(leaves.len()).unwrap_or(0);
    let body = table.get(HEADER..request.len()).unwrap_or(&[]);
    [&status.to_le_bytes()[..], &count.to_le_bytes(), &[0; 8], body].concat()
}

impl Runtime {
    /// A guest request with its two pages, which the caller knows to be shared; the firmware's status.
    pub(super) fn guest_message(&self, request: u64, response: u64) -> u32 {
        let mut page = Box::new([0; PAGE_LEN]);
        if self.memory().read_slice(&mut page[..], GuestAddress(request)).is_err() {
            return fw::INVALID_PARAM;
        }
        let mut guest = self.guest();
        let Some(guest) = guest.as_mut() else {
            return fw::INVALID_GUEST_STATE;
        };
        match guest.handle(&page) {
            Ok(answer) => match self.memory().write_slice(&answer[..], GuestAddress(response)) {
                Ok(()) => 0,
                Err(_) => fw::INVALID_PARAM,
            },
            Err(status) => status,
        }
    }
}
