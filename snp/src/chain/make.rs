//! Makes chains of the form of AMD's: ARK and ASK with RSA-4096 (RSASSA-PSS, SHA-384), VCEK with P-384 and AMD's extensions.
//! The DER is written here, in the few shapes that are needed. The private keys of ARK and ASK are not kept.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{self, KeySize};
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PSS_SHA384};
use x509_cert::der::Encode;
use x509_cert::der::asn1::ObjectIdentifier;

use super::FILES;
use super::x509::{HW_ID, PRODUCT_NAME, SPL, STRUCT_VERSION};
use crate::report::Tcb;

/// What a chain is for.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Product line: `Milan` or `Genoa`.
    pub line: &'static str,
    /// productName.
    pub product: &'static str,
    /// hwID.
    pub chip_id: [u8; 64],
    /// TCB of the VCEK.
    pub tcb: Tcb,
}

impl Identity {
    /// The identity of the emulation: a Milan whose chip id says what it is.
    #[must_use]
    pub fn emulated() -> Self {
        Self {
            line: "Milan",
            product: "Milan-B1",
            chip_id: *b"PODVISOR EMULATED SEV-SNP - NOT HARDWARE - IT PROTECTS NOTHING!!",
            tcb: Tcb {
                fmc: None,
                boot_loader: 4,
                tee: 0,
                snp: 24,
                microcode: 219,
            },
        }
    }
}

/// A chain as files: the contents of [`FILES`], in that order.
pub type Made = [Vec<u8>; 4];

/// The crypto library failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("making a certificate chain: {0} failed")]
pub struct MakeError(&'static str);

/// Makes a chain for `identity`. Takes seconds: two RSA-4096 keys.
///
/// # Errors
/// [`MakeError`].
pub fn make(identity: &Identity) -> Result<Made, MakeError> {
    let new_rsa = || rsa::KeyPair::generate(KeySize::Rsa4096).map_err(|_| MakeError("generating an RSA key"));
    let (ark_key, ask_key) = (new_rsa()?, new_rsa()?);
    let vcek_key =
        EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).map_err(|_| MakeError("generating a P-384 key"))?;
    let (ark, ask) = (format!("ARK-{}", identity.line), format!("SEV-{}", identity.line));
    let crl = format!("https://kdsintf.amd.com/vcek/v1/{}/crl", identity.line);
    let ca = |serial, issuer: &str, subject: &str, key: &rsa::KeyPair| ToSign {
        serial,
        issuer: name(issuer),
        subject: name(subject),
        key: rsa_spki(key),
        extensions: authority_extensions(&crl),
    };
    let vcek = ToSign {
        serial: 0,
        issuer: name(&ask),
        subject: name("SEV-VCEK"),
        key: p384_spki(&vcek_key),
        extensions: vcek_extensions(identity),
    };
    let pkcs8 = vcek_key
        .to_pkcs8v1()
        .map_err(|_| MakeError("encoding the VCEK's key"))?;
    Ok([
        ca(1, &ark, &ark, &ark_key).sign(&ark_key)?,
        ca(2, &ark, &ask, &ask_key).sign(&ark_key)?,
        vcek.sign(&ask_key)?,
        pkcs8.as_ref().to_vec(),
    ])
}

/// Writes a chain to `dir`, for its owner's eyes only. Files that exist are not overwritten.
///
/// # Errors
/// As the file system.
pub fn write(chain: &Made, dir: &Path) -> std::io::Result<()> {
    for (name, bytes) in FILES.iter().zip(chain) {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options.open(dir.join(name))?.write_all(bytes)?;
    }
    Ok(())
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 2;
const BIT_STRING: u8 = 3;
const OCTET_STRING: u8 = 4;
const NULL: &[u8] = &[5, 0];
const PRINTABLE: u8 = 0x13;
const UTF8: u8 = 0x0C;
const IA5: u8 = 0x16;
const UTC_TIME: u8 = 0x17;

/// Tag, length, contents.
fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let len = body.len().to_be_bytes();
    let short: Vec<u8> = len.iter().copied().skip_while(|byte| *byte == 0).collect();
    let mut out = vec![tag];
    match (u8::try_from(body.len()), u8::try_from(short.len())) {
        (Ok(len), _) if len < 0x80 => out.push(len),
        (_, Ok(bytes)) => {
            out.push(0x80 | bytes);
            out.extend(short);
        }
        (_, Err(_)) => {}
    }
    out.extend(body);
    out
}

fn oid(text: &str) -> Vec<u8> {
    // Every text is a constant of this crate.
    ObjectIdentifier::new(text)
        .ok()
        .and_then(|oid| oid.to_der().ok())
        .unwrap_or_default()
}

fn integer(value: u8) -> Vec<u8> {
    if value < 0x80 {
        vec![INTEGER, 1, value]
    } else {
        vec![INTEGER, 2, 0, value]
    }
}

/// RSASSA-PSS with SHA-384, MGF1 with SHA-384, salt of 48 bytes.
fn pss() -> Vec<u8> {
    let sha384 = tlv(SEQUENCE, &[&oid("2.16.840.1.101.3.4.2.2"), NULL]);
    let mgf1 = tlv(SEQUENCE, &[&oid("1.2.840.113549.1.1.8"), &sha384]);
    let parameters = tlv(
        SEQUENCE,
        &[
            &tlv(0xA0, &[&sha384]),
            &tlv(0xA1, &[&mgf1]),
            &tlv(0xA2, &[&integer(48)]),
        ],
    );
    tlv(SEQUENCE, &[&oid("1.2.840.113549.1.1.10"), &parameters])
}

/// AMD's name with `common_name`.
fn name(common_name: &str) -> Vec<u8> {
    let part = |attribute: &str, tag, text: &str| {
        let pair = tlv(SEQUENCE, &[&oid(attribute), &tlv(tag, &[text.as_bytes()])]);
        tlv(SET, &[&pair])
    };
    tlv(
        SEQUENCE,
        &[
            &part("2.5.4.11", UTF8, "Engineering"),
            &part("2.5.4.6", PRINTABLE, "US"),
            &part("2.5.4.7", UTF8, "Santa Clara"),
            &part("2.5.4.8", UTF8, "CA"),
            &part("2.5.4.10", UTF8, "Advanced Micro Devices"),
            &part("2.5.4.3", UTF8, common_name),
        ],
    )
}

fn bits(bytes: &[u8]) -> Vec<u8> {
    tlv(BIT_STRING, &[&[0], bytes])
}

fn rsa_spki(key: &rsa::KeyPair) -> Vec<u8> {
    let algorithm = tlv(SEQUENCE, &[&oid("1.2.840.113549.1.1.1"), NULL]);
    tlv(SEQUENCE, &[&algorithm, &bits(key.public_key().as_ref())])
}

fn p384_spki(key: &EcdsaKeyPair) -> Vec<u8> {
    let algorithm = tlv(SEQUENCE, &[&oid("1.2.840.10045.2.1"), &oid("1.3.132.0.34")]);
    tlv(SEQUENCE, &[&algorithm, &bits(key.public_key().as_ref())])
}

fn extension(id: &str, critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if critical { &[1, 1, 0xFF] } else { &[] };
    tlv(SEQUENCE, &[&oid(id), critical, &tlv(OCTET_STRING, &[value])])
}

/// CA:TRUE, keyCertSign and cRLSign, where the CRL is.
fn authority_extensions(crl: &str) -> Vec<u8> {
    let full_name = tlv(0xA0, &[&tlv(0xA0, &[&tlv(0x86, &[crl.as_bytes()])])]);
    let points = tlv(SEQUENCE, &[&tlv(SEQUENCE, &[&full_name])]);
    [
        extension("2.5.29.15", true, &[BIT_STRING, 2, 1, 0x06]),
        extension("2.5.29.19", true, &tlv(SEQUENCE, &[&[1, 1, 0xFF]])),
        extension("2.5.29.31", false, &points),
    ]
    .concat()
}

fn vcek_extensions(identity: &Identity) -> Vec<u8> {
    let tcb = identity.tcb;
    let levels = [tcb.boot_loader, tcb.tee, tcb.snp, 0, 0, 0, 0, tcb.microcode];
    let mut all = extension(STRUCT_VERSION, false, &integer(0));
    all.extend(extension(
        PRODUCT_NAME,
        false,
        &tlv(IA5, &[identity.product.as_bytes()]),
    ));
    for (id, level) in SPL.iter().zip(levels) {
        all.extend(extension(id, false, &integer(level)));
    }
    all.extend(extension(HW_ID, false, &identity.chip_id));
    all
}

/// A certificate before its signature.
struct ToSign {
    serial: u8,
    issuer: Vec<u8>,
    subject: Vec<u8>,
    key: Vec<u8>,
    /// The extensions, one after the other.
    extensions: Vec<u8>,
}

impl ToSign {
    fn sign(&self, issuer: &rsa::KeyPair) -> Result<Vec<u8>, MakeError> {
        let time = |text: &str| tlv(UTC_TIME, &[text.as_bytes()]);
        let body = tlv(
            SEQUENCE,
            &[
                &tlv(0xA0, &[&integer(2)]),
                &integer(self.serial),
                &pss(),
                &self.issuer,
                &tlv(SEQUENCE, &[&time("250101000000Z"), &time("491231235959Z")]),
                &self.subject,
                &self.key,
                &tlv(0xA3, &[&tlv(SEQUENCE, &[&self.extensions])]),
            ],
        );
        let mut signature = vec![0; issuer.public_modulus_len()];
        issuer
            .sign(&RSA_PSS_SHA384, &SystemRandom::new(), &body, &mut signature)
            .map_err(|_| MakeError("signing"))?;
        Ok(tlv(SEQUENCE, &[&body, &pss(), &bits(&signature)]))
    }
}
