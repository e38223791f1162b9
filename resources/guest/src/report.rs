//! Attestation reports: SNP guest messages (AMD 56860 chapter 8) sealed with the guest's key from the secrets page.

use alloc::vec;
use alloc::vec::Vec;

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, Key, KeyInit, Nonce, Tag};

use crate::window::{Shared, Window};
use crate::{ghcb, layout};

const HEADER: usize = 0x60;
/// What is authenticated but not encrypted: the header from here on.
const AUTHENTICATED: usize = 0x30;
const PAGE: usize = 4096;
const REPORT_REQUEST: u8 = 5;
const REPORT_RESPONSE: u8 = 6;
/// Length of an attestation report.
pub const REPORT_LEN: usize = 1184;
/// Where the report starts in a report response.
const REPORT_AT: usize = 0x20;
const CERTIFICATE_PAGES: usize = 8;

mod secrets {
    //! Fields of the secrets page.
    pub(super) const VMPCK0: usize = 0x20;
    pub(super) const SEQUENCE0: usize = 0xA0;
}

/// The pages of guest requests.
pub struct Reporter {
    request: Shared,
    response: Shared,
    certificates: Shared,
}

/// A report and the certificate table that came with it.
pub struct Report {
    /// The report.
    pub report: [u8; REPORT_LEN],
    /// The table; empty when the host has none.
    pub certificates: Vec<u8>,
}

impl Reporter {
    /// Takes its pages from the shared window.
    #[must_use]
    pub fn new(window: &Window) -> Option<Self> {
        Some(Self {
            request: window.take(PAGE)?,
            response: window.take(PAGE)?,
            certificates: window.take(CERTIFICATE_PAGES * PAGE)?,
        })
    }

    /// Fetches a report over `data`, with the certificates.
    ///
    /// # Errors
    /// Says what failed. After a failure that may have used up a sequence number the key is destroyed, because a
    /// repeated nonce would give it away.
    pub fn report(&self, data: &[u8; 64]) -> Result<Report, &'static str> {
        let page = Shared::parameter_page(layout::SECRETS_PAGE);
        let mut key = [0; 32];
        page.read(secrets::VMPCK0, &mut key);
        if key == [0; 32] {
            return Err("the message key is gone after an earlier failure");
        }
        let cipher = Aes256Gcm::new(Key::<Aes256Gcm>::from_slice(&key));
        let used: u32 = page.get(secrets::SEQUENCE0);
        let Some(sequence) = used.checked_add(1).filter(|next| next.checked_add(1).is_some()) else {
            return Err("message sequence numbers are used up");
        };
        let outcome = self.exchange(&cipher, sequence.into(), data);
        if outcome.is_ok() {
            page.set(secrets::SEQUENCE0, sequence + 1);
        } else {
            page.write(secrets::VMPCK0, &[0; 32]);
        }
        outcome
    }

    fn exchange(&self, cipher: &Aes256Gcm, sequence: u64, data: &[u8; 64]) -> Result<Report, &'static str> {
        let message = seal(cipher, sequence, data)?;
        self.request.clear();
        self.response.clear();
        self.request.write(0, &message);
        self.certificates.part(0, 24).clear();
        let answer = ghcb::guest_request(self.request, self.response, Some(self.certificates));
        let with_certificates = answer.info_2 == 0;
        if answer.info_2 == 1 << 32 {
            // More certificates than there is room for: the message was not consumed. The same one, without them.
            let answer = ghcb::guest_request(self.request, self.response, None);
            if answer.info_1 != 0 || answer.info_2 != 0 {
                return Err("the guest request was refused");
            }
        } else if answer.info_1 != 0 || answer.info_2 != 0 {
            return Err("the guest request was refused");
        }
        let mut response = vec![0; PAGE];
        self.response.read(0, &mut response);
        let payload = open(cipher, sequence + 1, &mut response)?;
        let status = payload
            .first_chunk()
            .map_or(u32::MAX, |bytes| u32::from_le_bytes(*bytes));
        if status != 0 {
            return Err("the firmware gave no report");
        }
        let report = payload
            .get(REPORT_AT..)
            .and_then(<[u8]>::first_chunk)
            .ok_or("the report is cut short")?;
        let certificates = if with_certificates {
            table(self.certificates)
        } else {
            Vec::new()
        };
        Ok(Report {
            report: *report,
            certificates,
        })
    }
}

fn nonce(sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    for (to, from) in nonce.iter_mut().zip(sequence.to_le_bytes()) {
        *to = from;
    }
    nonce
}

/// A report request message, sealed.
fn seal(cipher: &Aes256Gcm, sequence: u64, data: &[u8; 64]) -> Result<Vec<u8>, &'static str> {
    let mut payload = [0; 96];
    for (to, from) in payload.iter_mut().zip(data) {
        *to = *from;
    }
    let mut header = [0; HEADER];
    let fields: [(usize, &[u8]); 8] = [
        (0x20, &sequence.to_le_bytes()),
        (0x30, &[1]), // AES-256-GCM
        (0x31, &[1]), // header version
        (0x32, &(HEADER as u16).to_le_bytes()),
        (0x34, &[REPORT_REQUEST]),
        (0x35, &[1]), // message version
        (0x36, &(payload.len() as u16).to_le_bytes()),
        (0x3C, &[0]), // VMPCK 0
    ];
    for (at, bytes) in fields {
        for (to, from) in header.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
    let authenticated = header.get(AUTHENTICATED..).unwrap_or_default();
    let tag = cipher
        .encrypt_in_place_detached(Nonce::from_slice(&nonce(sequence)), authenticated, &mut payload)
        .map_err(|_| "the request could not be sealed")?;
    for (to, from) in header.iter_mut().zip(tag) {
        *to = from;
    }
    let mut message = header.to_vec();
    message.extend_from_slice(&payload);
    Ok(message)
}

/// Opens a report response and returns its payload.
fn open<'m>(cipher: &Aes256Gcm, sequence: u64, message: &'m mut [u8]) -> Result<&'m [u8], &'static str> {
    let (header, rest) = message
        .split_at_mut_checked(HEADER)
        .ok_or("the response is cut short")?;
    let byte = |at: usize| header.get(at).copied().unwrap_or_default();
    let len = usize::from(u16::from_le_bytes([byte(0x36), byte(0x37)]));
    let answers = header.get(0x20..0x28) == Some(&sequence.to_le_bytes())
        && byte(0x30) == 1
        && byte(0x32) == HEADER as u8
        && byte(0x34) == REPORT_RESPONSE;
    if !answers {
        return Err("the response does not answer the request");
    }
    let tag = Tag::from_slice(header.get(..16).unwrap_or_default());
    let authenticated = header.get(AUTHENTICATED..).unwrap_or_default();
    let payload = rest.get_mut(..len).ok_or("the response is cut short")?;
    cipher
        .decrypt_in_place_detached(Nonce::from_slice(&nonce(sequence)), authenticated, payload, tag)
        .map_err(|_| "the response is not authentic")?;
    Ok(payload)
}

/// The certificate table: as long as its own entries say, at most what there is room for.
fn table(area: Shared) -> Vec<u8> {
    const ENTRY: usize = 24;
    let mut bytes = vec![0; area.len()];
    area.read(0, &mut bytes);
    let mut end = 0;
    for entry in bytes.chunks_exact(ENTRY) {
        let word = |at: usize| {
            entry
                .get(at..)
                .and_then(<[u8]>::first_chunk)
                .map_or(0, |b| u32::from_le_bytes(*b) as usize)
        };
        if entry.iter().all(|byte| *byte == 0) {
            break;
        }
        end = end.max(word(16).saturating_add(word(20)));
    }
    bytes.truncate(end);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_request_opens_with_the_same_key_and_number_only() {
        let cipher = Aes256Gcm::new(Key::<Aes256Gcm>::from_slice(&[7; 32]));
        let mut message = seal(&cipher, 5, &[9; 64]).unwrap();
        assert_eq!(message.len(), HEADER + 96);
        message[0x34] = REPORT_RESPONSE;
        assert!(
            open(&cipher, 5, &mut message.clone()).is_err(),
            "the type is authenticated"
        );
        message[0x34] = REPORT_REQUEST;
        assert!(
            open(&cipher, 5, &mut message.clone()).is_err(),
            "a request is not a response"
        );
        assert!(
            open(&cipher, 6, &mut message.clone()).is_err(),
            "another sequence number"
        );
        assert!(open(&cipher, 5, &mut message[..0x40].to_vec()).is_err(), "short");
    }

    #[test]
    fn the_table_ends_where_its_entries_do() {
        let mut memory = vec![0_u64; 512];
        let bytes = 48_usize;
        memory[2] = 48 | 100 << 32;
        memory[0] = 1;
        let area = unsafe_area(&mut memory);
        assert_eq!(table(area).len(), bytes + 100);
    }

    #[expect(unsafe_code, reason = "a test's own memory")]
    fn unsafe_area(memory: &mut [u64]) -> Shared {
        // SAFETY: the vector outlives its use and is not touched meanwhile.
        unsafe { Shared::at(memory.as_mut_ptr().addr() as u64, memory.len() as u64 * 8) }
    }
}
