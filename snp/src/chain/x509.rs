//! What podvisor reads of AMD's X.509 certificates: names, keys, signatures (RSA-PSS with SHA-384), validity, and the
//! VCEK's extensions (AMD 57230 table 8). Whom to trust is not decided here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{RSA_PSS_2048_8192_SHA384, UnparsedPublicKey};
use x509_cert::Certificate;
use x509_cert::der::asn1::{Ia5StringRef, ObjectIdentifier};
use x509_cert::der::{Decode, Encode};

use crate::report::Tcb;

const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const AUTHORITY_KEY_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.35");
const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");

/// AMD's arc, under which the VCEK's extensions are.
pub(crate) const AMD: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1");
/// structVersion.
pub(crate) const STRUCT_VERSION: &str = "1.3.6.1.4.1.3704.1.1";
/// productName.
pub(crate) const PRODUCT_NAME: &str = "1.3.6.1.4.1.3704.1.2";
/// hwID.
pub(crate) const HW_ID: &str = "1.3.6.1.4.1.3704.1.4";
/// cspID, which a VLEK has instead of hwID.
pub(crate) const CSP_ID: &str = "1.3.6.1.4.1.3704.1.5";
/// Security patch levels: boot loader, TEE, SNP, four reserved ones, microcode.
pub(crate) const SPL: [&str; 8] = [
    "1.3.6.1.4.1.3704.1.3.1",
    "1.3.6.1.4.1.3704.1.3.2",
    "1.3.6.1.4.1.3704.1.3.3",
    "1.3.6.1.4.1.3704.1.3.4",
    "1.3.6.1.4.1.3704.1.3.5",
    "1.3.6.1.4.1.3704.1.3.6",
    "1.3.6.1.4.1.3704.1.3.7",
    "1.3.6.1.4.1.3704.1.3.8",
];
/// Security patch level of the FMC, which processors from Turin on have.
pub(crate) const SPL_FMC: &str = "1.3.6.1.4.1.3704.1.3.9";
/// Largest certificate that is looked at.
const MAX_DER: usize = 16 << 10;

/// Why a certificate cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum X509Error {
    /// Not DER of an X.509 certificate.
    #[error("is not DER of an X.509 v3 certificate")]
    Der,
    /// The subject has no common name, or one that is not text.
    #[error("has no readable common name")]
    Name,
    /// Another kind of key than expected.
    #[error("its key is not {0}")]
    Key(&'static str),
    /// The signature does not verify.
    #[error("its signature is not RSASSA-PSS with SHA-384 by the key of {0}")]
    Signature(String),
    /// Not valid now.
    #[error("is valid from {from} to {to} (seconds since 1970) but it is {now}")]
    Expired {
        /// First second.
        from: u64,
        /// Last second.
        to: u64,
        /// The time asked about.
        now: u64,
    },
    /// An issuing certificate that may not issue.
    #[error("is no certificate authority")]
    NotCa,
    /// An extension that must be there, or must not.
    #[error("extension {0}: {1}")]
    Extension(String, &'static str),
}

/// A parsed certificate.
pub(crate) struct Cert(Certificate);

impl Cert {
    pub(crate) fn parse(der: &[u8]) -> Result<Self, X509Error> {
        if der.len() > MAX_DER {
            return Err(X509Error::Der);
        }
        Certificate::from_der(der).map(Self).map_err(|_| X509Error::Der)
    }

    /// The subject's common name.
    pub(crate) fn common_name(&self) -> Result<String, X509Error> {
        let names = self.0.tbs_certificate.subject.0.iter().flat_map(|set| set.0.iter());
        let value = names
            .into_iter()
            .find(|name| name.oid == COMMON_NAME)
            .ok_or(X509Error::Name)?;
        std::str::from_utf8(value.value.value())
            .map(ToOwned::to_owned)
            .map_err(|_| X509Error::Name)
    }

    /// The public key's bytes, of algorithm `oid`.
    fn key(&self, oid: ObjectIdentifier, what: &'static str) -> Result<&[u8], X509Error> {
        let info = &self.0.tbs_certificate.subject_public_key_info;
        (info.algorithm.oid == oid)
            .then(|| info.subject_public_key.as_bytes())
            .flatten()
            .ok_or(X509Error::Key(what))
    }

    /// Checks that `issuer` is a CA, issued this certificate, and that both are valid at `now`.
    pub(crate) fn issued_by(&self, issuer: &Cert, now: SystemTime) -> Result<(), X509Error> {
        self.valid_at(now)?;
        issuer.valid_at(now)?;
        issuer.is_ca()?;
        let name = issuer.common_name()?;
        let refused = || X509Error::Signature(name.clone());
        let tbs = &self.0.tbs_certificate;
        if tbs.issuer != issuer.0.tbs_certificate.subject
            || self.0.signature_algorithm.oid != RSASSA_PSS
            || tbs.signature != self.0.signature_algorithm
        {
            return Err(refused());
        }
        let message = tbs.to_der().map_err(|_| X509Error::Der)?;
        let signature = self.0.signature.as_bytes().ok_or_else(refused)?;
        UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, issuer.key(RSA_ENCRYPTION, "RSA")?)
            .verify(&message, signature)
            .map_err(|_| refused())
    }

    fn is_ca(&self) -> Result<(), X509Error> {
        let extension = self
            .extensions()
            .find(|extension| extension.extn_id == BASIC_CONSTRAINTS);
        let ca = extension
            .and_then(|found| x509_cert::ext::pkix::BasicConstraints::from_der(found.extn_value.as_bytes()).ok())
            .is_some_and(|constraints| constraints.ca);
        ca.then_some(()).ok_or(X509Error::NotCa)
    }

    fn valid_at(&self, now: SystemTime) -> Result<(), X509Error> {
        let validity = &self.0.tbs_certificate.validity;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (from, to) = (
            validity.not_before.to_unix_duration(),
            validity.not_after.to_unix_duration(),
        );
        if (from..=to).contains(&now) {
            return Ok(());
        }
        Err(X509Error::Expired {
            from: from.as_secs(),
            to: to.as_secs(),
            now: now.as_secs(),
        })
    }

    fn extensions(&self) -> impl Iterator<Item = &x509_cert::ext::Extension> {
        self.0.tbs_certificate.extensions.iter().flatten()
    }

    fn has(&self, oid: &str) -> bool {
        self.extensions().any(|extension| extension.extn_id.to_string() == oid)
    }

    /// The value of the extension `oid`, which must be there exactly once.
    fn extension(&self, oid: &str) -> Result<&[u8], X509Error> {
        let missing = || X509Error::Extension(oid.to_string(), "must be there once");
        let wanted = ObjectIdentifier::new(oid).map_err(|_| missing())?;
        let mut found = self.extensions().filter(|extension| extension.extn_id == wanted);
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one.extn_value.as_bytes()),
            _ => Err(missing()),
        }
    }

    fn small_number(&self, oid: &str) -> Result<u8, X509Error> {
        u8::from_der(self.extension(oid)?)
            .map_err(|_| X509Error::Extension(oid.to_string(), "must be an INTEGER from 0 to 255"))
    }
}

/// The common name of the certificate's subject.
///
/// # Errors
/// [`X509Error`].
pub fn subject(der: &[u8]) -> Result<String, X509Error> {
    Cert::parse(der)?.common_name()
}

/// What a VCEK certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcek {
    /// productName, such as `Milan-B1`.
    pub product: String,
    /// hwID.
    pub chip_id: [u8; 64],
    /// The TCB it is for.
    pub tcb: Tcb,
    /// The uncompressed point of its key.
    pub public_key: Vec<u8>,
}

impl Vcek {
    /// Reads a VCEK certificate and checks its extensions; its signature is another matter.
    ///
    /// # Errors
    /// [`X509Error`].
    pub fn parse(der: &[u8]) -> Result<Self, X509Error> {
        Self::of(&Cert::parse(der)?)
    }

    pub(crate) fn of(cert: &Cert) -> Result<Self, X509Error> {
        let alien = cert
            .extensions()
            .find(|extension| !is_amd(extension.extn_id) && extension.extn_id != AUTHORITY_KEY_ID);
        let known =
            |oid: &str| SPL.contains(&oid) || [STRUCT_VERSION, PRODUCT_NAME, HW_ID, SPL_FMC, CSP_ID].contains(&oid);
        let unknown = cert
            .extensions()
            .map(|extension| extension.extn_id)
            .find(|oid| is_amd(*oid) && !known(&oid.to_string()));
        if let Some(oid) = unknown {
            return Err(X509Error::Extension(
                oid.to_string(),
                "is not known, and may change what the others mean",
            ));
        }
        if let Some(alien) = alien {
            return Err(X509Error::Extension(alien.extn_id.to_string(), "is none of AMD's"));
        }
        if cert.small_number(STRUCT_VERSION)? > 1 {
            return Err(X509Error::Extension(STRUCT_VERSION.to_string(), "must be 0 or 1"));
        }
        let product = Ia5StringRef::from_der(cert.extension(PRODUCT_NAME)?)
            .map_err(|_| X509Error::Extension(PRODUCT_NAME.to_string(), "must be an IA5String"))?;
        let mut levels = [0; 8];
        for (level, oid) in levels.iter_mut().zip(SPL) {
            *level = cert.small_number(oid)?;
        }
        let [boot_loader, tee, snp, .., microcode] = levels;
        let fmc = cert.has(SPL_FMC).then(|| cert.small_number(SPL_FMC)).transpose()?;
        let chip_id = chip_id(cert.extension(HW_ID)?)
            .ok_or_else(|| X509Error::Extension(HW_ID.to_string(), "must have 64 bytes, or 8 from Turin on"))?;
        Ok(Self {
            product: product.as_str().to_owned(),
            chip_id,
            tcb: Tcb {
                fmc,
                boot_loader,
                tee,
                snp,
                microcode,
            },
            public_key: cert.key(EC_PUBLIC_KEY, "an elliptic-curve key")?.to_vec(),
        })
    }
}

/// hwID: the bytes themselves or an OCTET STRING of them; 64, or 8, which the report's CHIP_ID has before zeros.
fn chip_id(raw: &[u8]) -> Option<[u8; 64]> {
    let bytes = match raw {
        [4, len @ (8 | 64), rest @ ..] if rest.len() == usize::from(*len) => rest,
        other => other,
    };
    let mut id = [0; 64];
    match bytes.len() {
        8 => id.first_chunk_mut::<8>()?.copy_from_slice(bytes),
        64 => id.copy_from_slice(bytes),
        _ => return None,
    }
    Some(id)
}

fn is_amd(oid: ObjectIdentifier) -> bool {
    oid.as_bytes().starts_with(AMD.as_bytes())
}
