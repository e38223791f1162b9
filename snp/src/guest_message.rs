//! SNP guest messages (AMD 56860 chapter 7.3): the header, and sealing and opening with AES-256-GCM under a VMPCK. What the
//! messages ask for is answered in `emulated::guest`; a guest's side (tests, tools) uses the same functions.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::digest::{PAGE_LEN, Page};

/// Bytes in a header.
pub const HEADER_LEN: usize = 0x60;
/// Most bytes of payload.
pub const MAX_PAYLOAD: usize = 4000;
/// The part of the header that is authenticated.
const AAD_START: usize = 0x30;
const TAG_LEN: usize = 16;
const ALGORITHM_AES_256_GCM: u8 = 1;
const HEADER_VERSION: u8 = 1;

/// Message types.
#[expect(missing_docs, reason = "the specification's names")]
pub mod kind {
    pub const CPUID_REQ: u8 = 1;
    pub const CPUID_RSP: u8 = 2;
    pub const KEY_REQ: u8 = 3;
    pub const KEY_RSP: u8 = 4;
    pub const REPORT_REQ: u8 = 5;
    pub const REPORT_RSP: u8 = 6;
    pub const TSC_INFO_REQ: u8 = 17;
    pub const TSC_INFO_RSP: u8 = 18;
}

/// The header's fields that vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sequence number, from 1.
    pub sequence: u64,
    /// Type: one of [`kind`].
    pub kind: u8,
    /// Version of the message.
    pub version: u8,
    /// Bytes of payload.
    pub len: u16,
    /// Which VMPCK: 0 to 3.
    pub vmpck: u8,
}

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A header field that is reserved, unknown or out of range.
    #[error("guest message: {0} is not allowed")]
    Header(&'static str),
    /// It was not made with this key, or was changed.
    #[error("guest message: authentication failed")]
    Authentication,
}

/// Reads the header of the message in `page`.
///
/// # Errors
/// [`MessageError::Header`] names the field.
pub fn header(page: &Page) -> Result<Header, MessageError> {
    let byte = |at: usize| page.get(at).copied().unwrap_or(0);
    let zero = |from: usize, to: usize| {
        page.get(from..to)
            .is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    };
    let check = |ok: bool, field| if ok { Ok(()) } else { Err(MessageError::Header(field)) };
    check(zero(TAG_LEN, 0x20), "AUTHTAG beyond 16 bytes")?;
    check(
        zero(0x28, AAD_START) && zero(0x38, 0x3C) && zero(0x3D, HEADER_LEN),
        "a reserved field",
    )?;
    check(byte(0x30) == ALGORITHM_AES_256_GCM, "ALGO")?;
    check(byte(0x31) == HEADER_VERSION, "HDR_VERSION")?;
    check(
        usize::from(u16::from_le_bytes([byte(0x32), byte(0x33)])) == HEADER_LEN,
        "HDR_SIZE",
    )?;
    let len = u16::from_le_bytes([byte(0x36), byte(0x37)]);
    check(usize::from(len) <= MAX_PAYLOAD, "MSG_SIZE")?;
    let vmpck = byte(0x3C);
    check(vmpck < 4, "MSG_VMPCK")?;
    let sequence = page
        .get(0x20..)
        .and_then(|bytes| bytes.first_chunk())
        .copied()
        .unwrap_or([0; 8]);
    Ok(Header {
        sequence: u64::from_le_bytes(sequence),
        kind: byte(0x34),
        version: byte(0x35),
        len,
        vmpck,
    })
}

fn cipher(key: &[u8; 32], sequence: u64) -> Result<(LessSafeKey, Nonce), MessageError> {
    let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| MessageError::Authentication)?;
    let mut iv = [0; 12];
    let (low, _) = iv.split_at_mut(8);
    low.copy_from_slice(&sequence.to_le_bytes());
    Ok((LessSafeKey::new(key), Nonce::assume_unique_for_key(iv)))
}

/// Opens the message in `page` under `key`; header and payload.
///
/// # Errors
/// [`MessageError`].
pub fn open(page: &Page, key: &[u8; 32]) -> Result<(Header, Vec<u8>), MessageError> {
    let header = header(page)?;
    let (cipher, nonce) = cipher(key, header.sequence)?;
    let (head, body) = page.split_at(HEADER_LEN);
    let (tag, aad) = (head.split_at(TAG_LEN).0, head.split_at(AAD_START).1);
    let mut payload = body.get(..usize::from(header.len)).unwrap_or(&[]).to_vec();
    payload.extend_from_slice(tag);
    let len = cipher
        .open_in_place(nonce, Aad::from(aad), &mut payload)
        .map_err(|_| MessageError::Authentication)?
        .len();
    payload.truncate(len);
    Ok((header, payload))
}

/// Seals `payload` under `key` into a page. `header.len` is set from the payload. The caller must never use a sequence
/// number twice with one key.
///
/// # Errors
/// [`MessageError`] for a payload that is too long.
pub fn seal(header: &Header, payload: &[u8], key: &[u8; 32]) -> Result<Box<Page>, MessageError> {
    if payload.len() > MAX_PAYLOAD {
        return Err(MessageError::Header("MSG_SIZE"));
    }
    let len = u16::try_from(payload.len()).map_err(|_| MessageError::Header("MSG_SIZE"))?;
    let mut page = Box::new([0; PAGE_LEN]);
    let (head, body) = page.split_at_mut(HEADER_LEN);
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(to) = head.get_mut(offset..offset + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(0x20, &header.sequence.to_le_bytes());
    put(0x30, &[ALGORITHM_AES_256_GCM, HEADER_VERSION]);
    put(0x32, &0x60u16.to_le_bytes());
    put(0x34, &[header.kind, header.version]);
    put(0x36, &len.to_le_bytes());
    put(0x3C, &[header.vmpck]);
    let (cipher, nonce) = cipher(key, header.sequence)?;
    let text = body.split_at_mut(payload.len()).0;
    text.copy_from_slice(payload);
    let tag = cipher
        .seal_in_place_separate_tag(nonce, Aad::from(head.split_at(AAD_START).1), text)
        .map_err(|_| MessageError::Authentication)?;
    head.split_at_mut(TAG_LEN).0.copy_from_slice(tag.as_ref());
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        sequence: 1,
        kind: kind::REPORT_REQ,
        version: 1,
        len: 5,
        vmpck: 0,
    };

    #[test]
    fn a_sealed_message_opens_with_its_key_only() {
        let page = seal(&HEADER, b"hello", &[7; 32]).unwrap();
        assert_eq!(open(&page, &[7; 32]).unwrap(), (HEADER, b"hello".to_vec()));
        assert_eq!(open(&page, &[8; 32]), Err(MessageError::Authentication));
        assert!(!page.windows(5).any(|bytes| bytes == b"hello"));
        for at in [0, 0x20, 0x34, 0x35, 0x36, 0x60] {
            let mut changed = page.clone();
            changed[at] ^= 1;
            assert_eq!(
                open(&changed, &[7; 32]),
                Err(MessageError::Authentication),
                "byte {at:#x}"
            );
        }
    }

    #[test]
    fn headers_that_the_firmware_refuses() {
        let page = seal(&HEADER, b"hello", &[7; 32]).unwrap();
        for (at, value) in [
            (0x10, 1),
            (0x28, 1),
            (0x30, 0),
            (0x31, 2),
            (0x32, 0),
            (0x37, 16),
            (0x38, 1),
            (0x3C, 4),
            (0x3D, 1),
        ] {
            let mut changed = page.clone();
            changed[at] = value;
            assert!(matches!(header(&changed), Err(MessageError::Header(_))), "byte {at:#x}");
        }
        assert!(seal(&HEADER, &[0; 4001], &[7; 32]).is_err());
    }
}
