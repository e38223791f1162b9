//! The SNP ID block and ID authentication information (AMD 56860 8.18, tables 75 and 76): built from a plan, signed (for
//! image builders and tests), and checked as the firmware checks it at the finish of a launch.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use podvisor_firmware::plan::{IdBlock, IdPublicKey, IdSignature};
use x509_cert::der::pem;

use crate::digest::sha384;
use crate::ecdsa;
use crate::emulated::fw;

/// Bytes in an ID block.
pub const ID_BLOCK_LEN: usize = 96;
/// Bytes of ID authentication information.
pub const ID_AUTH_LEN: usize = 4096;
/// Bytes in a public key structure: curve, X, Y, reserved.
const KEY_LEN: usize = 0x404;
const ALGORITHM_P384: u32 = 1;
const CURVE_P384: u32 = 2;

const ID_BLOCK_SIG: usize = 0x40;
const ID_KEY: usize = 0x240;
const ID_KEY_SIG: usize = 0x680;
const AUTHOR_KEY: usize = 0x880;

/// What reports say of the image's owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdIdentity {
    /// FAMILY_ID.
    pub family_id: [u8; 16],
    /// IMAGE_ID.
    pub image_id: [u8; 16],
    /// GUEST_SVN.
    pub guest_svn: u32,
    /// SHA-384 of the ID key structure; zero without an ID block.
    pub id_key_digest: IdDigest,
    /// SHA-384 of the author key structure; zero without one.
    pub author_key_digest: IdDigest,
    /// Whether an author key was given.
    pub author_key_enabled: bool,
}

/// A SHA-384 that is zero by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdDigest(pub [u8; 48]);

impl Default for IdDigest {
    fn default() -> Self {
        Self([0; 48])
    }
}

/// Why an ID block is refused, in the order the firmware looks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdBlockError {
    /// A version, algorithm or curve that does not exist.
    #[error("ID block: {field} is {value}, must be {want}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u32,
        /// The only value allowed.
        want: u32,
    },
    /// Signature of the block or of the ID key.
    #[error("ID block: {0} does not verify; sign it again with the key it names")]
    Signature(&'static str),
    /// The digest it expects is not the launch's.
    #[error(
        "ID block: expects another launch digest than this launch has; measure the image again and sign that digest"
    )]
    Digest,
    /// The policy it expects is not the launch's.
    #[error("ID block: policy {block:#x} but the launch has {launch:#x}")]
    Policy {
        /// Policy in the block.
        block: u64,
        /// Policy of the launch.
        launch: u64,
    },
}

impl IdBlockError {
    /// The firmware's status.
    #[must_use]
    pub fn firmware_status(&self) -> u32 {
        match self {
            Self::Unsupported { .. } => fw::INVALID_PARAM,
            Self::Signature(_) => fw::BAD_SIGNATURE,
            Self::Digest => fw::BAD_MEASUREMENT,
            Self::Policy { .. } => fw::POLICY_FAILURE,
        }
    }
}

fn put(to: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(to) = to.get_mut(offset..offset + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

fn word(from: &[u8], offset: usize) -> u32 {
    from.get(offset..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn field<const N: usize>(from: &[u8], offset: usize) -> [u8; N] {
    from.get(offset..)
        .and_then(|bytes| bytes.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

/// The 96-byte block that `id` describes, for a launch with `policy`.
#[must_use]
pub fn block(id: &IdBlock, policy: u64) -> Box<[u8; ID_BLOCK_LEN]> {
    let mut block = Box::new([0; ID_BLOCK_LEN]);
    put(&mut block[..], 0, &id.ld);
    put(&mut block[..], 0x30, &id.family_id);
    put(&mut block[..], 0x40, &id.image_id);
    put(&mut block[..], 0x50, &id.version.to_le_bytes());
    put(&mut block[..], 0x54, &id.guest_svn.to_le_bytes());
    put(&mut block[..], 0x58, &policy.to_le_bytes());
    block
}

/// The authentication information that `id` carries.
#[must_use]
pub fn auth(id: &IdBlock) -> Box<[u8; ID_AUTH_LEN]> {
    let mut auth = Box::new([0; ID_AUTH_LEN]);
    put(&mut auth[..], 0, &id.id_key_algorithm.to_le_bytes());
    put(&mut auth[..], 4, &id.author_key_algorithm.to_le_bytes());
    put(&mut auth[..], ID_BLOCK_SIG, &signature(&id.id_block_signature));
    put(&mut auth[..], ID_KEY, &key(&id.id_key));
    if id.author_key_enabled {
        put(&mut auth[..], ID_KEY_SIG, &signature(&id.id_key_signature));
        put(&mut auth[..], AUTHOR_KEY, &key(&id.author_key));
    }
    auth
}

fn signature(from: &IdSignature) -> [u8; 144] {
    let mut bytes = [0; 144];
    put(&mut bytes, 0, &from.r);
    put(&mut bytes, 72, &from.s);
    bytes
}

fn key(from: &IdPublicKey) -> [u8; KEY_LEN] {
    let mut bytes = [0; KEY_LEN];
    put(&mut bytes, 0, &from.curve.to_le_bytes());
    put(&mut bytes, 4, &from.qx);
    put(&mut bytes, 76, &from.qy);
    bytes
}

/// The firmware's check of an ID block against the launch, and what reports will say.
///
/// # Errors
/// [`IdBlockError`], with [`IdBlockError::firmware_status`].
pub fn check(
    block: &[u8; ID_BLOCK_LEN],
    auth: &[u8; ID_AUTH_LEN],
    author_key_enabled: bool,
    digest: &[u8; 48],
    policy: u64,
) -> Result<IdIdentity, IdBlockError> {
    let must_be = |field, value, want| {
        if value == want {
            Ok(())
        } else {
            Err(IdBlockError::Unsupported { field, value, want })
        }
    };
    must_be("version", word(block, 0x50), 1)?;
    must_be("id_key_algorithm", word(auth, 0), ALGORITHM_P384)?;
    let id_key: [u8; KEY_LEN] = field(auth, ID_KEY);
    verify("id_key", &id_key, block, &field(auth, ID_BLOCK_SIG), "its signature")?;
    let mut identity = IdIdentity {
        family_id: field(block, 0x30),
        image_id: field(block, 0x40),
        guest_svn: word(block, 0x54),
        id_key_digest: IdDigest(sha384(&id_key)),
        author_key_enabled,
        ..IdIdentity::default()
    };
    if author_key_enabled {
        must_be("author_key_algorithm", word(auth, 4), ALGORITHM_P384)?;
        let author_key: [u8; KEY_LEN] = field(auth, AUTHOR_KEY);
        verify(
            "author_key",
            &author_key,
            &id_key,
            &field(auth, ID_KEY_SIG),
            "the signature of its ID key",
        )?;
        identity.author_key_digest = IdDigest(sha384(&author_key));
    }
    if field::<48>(block, 0) != *digest {
        return Err(IdBlockError::Digest);
    }
    let asked = u64::from_le_bytes(field(block, 0x58));
    if asked != policy {
        return Err(IdBlockError::Policy {
            block: asked,
            launch: policy,
        });
    }
    Ok(identity)
}

/// Verifies `signature` (R and S, 72 bytes little-endian each) over `message` by the key structure `key`.
fn verify(
    name: &'static str,
    key: &[u8; KEY_LEN],
    message: &[u8],
    signature: &[u8; 144],
    what: &'static str,
) -> Result<(), IdBlockError> {
    let curve = word(key, 0);
    if curve != CURVE_P384 {
        return Err(IdBlockError::Unsupported {
            field: if name == "id_key" {
                "id_key.curve"
            } else {
                "author_key.curve"
            },
            value: curve,
            want: CURVE_P384,
        });
    }
    let refused = || IdBlockError::Signature(what);
    let point = ecdsa::point(&field(key, 4), &field(key, 76)).ok_or_else(refused)?;
    let fixed = ecdsa::fixed_signature(signature).ok_or_else(refused)?;
    UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point)
        .verify(message, &fixed)
        .map_err(|_| refused())
}

/// A P-384 key that signs ID blocks.
pub struct Signer(EcdsaKeyPair);

/// A key that could not be made, read or used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("P-384 key: {0}")]
pub struct SignerError(&'static str);

impl Signer {
    /// A new random key.
    ///
    /// # Errors
    /// Without randomness.
    pub fn generate() -> Result<Self, SignerError> {
        EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING)
            .map(Self)
            .map_err(|_| SignerError("cannot be generated"))
    }

    /// A key in PKCS #8 DER.
    ///
    /// # Errors
    /// When it is no P-384 key.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, SignerError> {
        EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, der)
            .map(Self)
            .map_err(|_| SignerError("is not PKCS #8 DER of a P-384 key"))
    }

    /// A private key in PEM: SEC 1 (`EC PRIVATE KEY`, RFC 5915) or PKCS #8 (`PRIVATE KEY`), not encrypted. Other sections
    /// and text around it are skipped.
    ///
    /// # Errors
    /// When there is none, or it is no P-384 key.
    pub fn from_pem(text: &[u8]) -> Result<Self, SignerError> {
        const REFUSED: &str = "is not the PEM of an unencrypted P-384 private key (EC PRIVATE KEY or PRIVATE KEY)";
        let find = |what: &str| text.windows(what.len()).position(|part| part == what.as_bytes());
        for label in ["EC PRIVATE KEY", "PRIVATE KEY"] {
            let (head, tail) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
            let Some((start, end)) = find(&head).zip(find(&tail)) else {
                continue;
            };
            let Some(section) = text.get(start..end + tail.len()) else {
                continue;
            };
            let Ok((_, der)) = pem::decode_vec(section) else {
                continue;
            };
            return EcdsaKeyPair::from_private_key_der(&ECDSA_P384_SHA384_FIXED_SIGNING, &der)
                .map(Self)
                .map_err(|_| SignerError(REFUSED));
        }
        Err(SignerError(REFUSED))
    }

    fn public(&self) -> IdPublicKey {
        let (qx, qy) = ecdsa::coordinates(self.0.public_key().as_ref());
        IdPublicKey {
            curve: CURVE_P384,
            qx,
            qy,
        }
    }

    fn sign(&self, message: &[u8]) -> Result<IdSignature, SignerError> {
        let signature = self
            .0
            .sign(&SystemRandom::new(), message)
            .map_err(|_| SignerError("cannot sign"))?;
        let (r, s) = ecdsa::amd_signature(signature.as_ref());
        Ok(IdSignature { r, s })
    }

    /// Signs `id` (its digest, family, image, SVN) for a launch with `policy`: fills in keys, algorithms and signatures.
    ///
    /// # Errors
    /// When signing fails.
    pub fn sign_block(&self, id: &mut IdBlock, policy: u64, author: Option<&Signer>) -> Result<(), SignerError> {
        id.version = 1;
        id.id_key_algorithm = ALGORITHM_P384;
        id.id_key = self.public();
        id.id_block_signature = self.sign(&block(id, policy)[..])?;
        id.author_key_enabled = author.is_some();
        if let Some(author) = author {
            id.author_key_algorithm = ALGORITHM_P384;
            id.author_key = author.public();
            id.id_key_signature = author.sign(&key(&id.id_key))?;
        }
        Ok(())
    }
}

/// An ID block with nothing filled in but the digest.
#[must_use]
pub fn unsigned(ld: [u8; 48]) -> IdBlock {
    let no_key = IdPublicKey {
        curve: 0,
        qx: [0; 72],
        qy: [0; 72],
    };
    let no_signature = IdSignature { r: [0; 72], s: [0; 72] };
    IdBlock {
        ld,
        family_id: [0; 16],
        image_id: [0; 16],
        version: 1,
        guest_svn: 0,
        id_key_algorithm: 0,
        author_key_algorithm: 0,
        id_block_signature: no_signature,
        id_key: no_key,
        author_key_enabled: false,
        id_key_signature: no_signature,
        author_key: no_key,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(author: bool) -> IdBlock {
        let mut id = unsigned([7; 48]);
        id.family_id = [1; 16];
        id.guest_svn = 9;
        let author = author.then(|| Signer::generate().unwrap());
        Signer::generate()
            .unwrap()
            .sign_block(&mut id, 0x30000, author.as_ref())
            .unwrap();
        id
    }

    #[test]
    fn a_signed_block_is_accepted_and_named_in_reports() {
        for author in [false, true] {
            let id = signed(author);
            let identity = check(&block(&id, 0x30000), &auth(&id), author, &[7; 48], 0x30000).unwrap();
            assert_eq!((identity.family_id, identity.guest_svn), ([1; 16], 9));
            assert_ne!(identity.id_key_digest, IdDigest::default());
            assert_eq!(identity.author_key_digest != IdDigest::default(), author);
        }
    }

    #[test]
    fn each_breach_has_the_firmwares_status() {
        let id = signed(true);
        let (good, proof) = (block(&id, 0x30000), auth(&id));
        let status = |block: &[u8; 96], auth: &[u8; 4096], digest: &[u8; 48], policy| {
            check(block, auth, true, digest, policy).unwrap_err().firmware_status()
        };
        assert_eq!(status(&good, &proof, &[8; 48], 0x30000), 0xB);
        assert_eq!(status(&good, &proof, &[7; 48], 0x20000), 7);
        let flip = |offset: usize| {
            let mut auth = proof.clone();
            auth[offset] ^= 1;
            auth
        };
        for offset in [ID_BLOCK_SIG, ID_BLOCK_SIG + 72, ID_KEY + 4, ID_KEY_SIG, AUTHOR_KEY + 76] {
            assert_eq!(
                status(&good, &flip(offset), &[7; 48], 0x30000),
                0xA,
                "offset {offset:#x}"
            );
        }
        for offset in [0, 4, ID_KEY, AUTHOR_KEY] {
            let got = status(&good, &flip(offset), &[7; 48], 0x30000);
            assert_eq!(got, 0x16, "offset {offset:#x}");
        }
        let mut other = good.clone();
        other[0x54] ^= 1;
        assert_eq!(status(&other, &proof, &[7; 48], 0x30000), 0xA);
        other[0x50] = 2;
        assert_eq!(status(&other, &proof, &[7; 48], 0x30000), 0x16);
    }

    /// Made by openssl; PKCS #8 and SEC 1 of one key, and a P-256 key.
    const PKCS8: &str = include_str!("../tests/data/p384-pkcs8.pem");
    const SEC1: &str = include_str!("../tests/data/p384-sec1.pem");
    const P256: &str = include_str!("../tests/data/p256-pkcs8.pem");

    #[test]
    fn keys_come_in_both_forms_of_pem() {
        let public = |text: &str| Signer::from_pem(text.as_bytes()).map(|signer| signer.public());
        let key = public(PKCS8).unwrap();
        assert_eq!(public(SEC1).unwrap(), key);
        let with_parameters =
            format!("-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n{SEC1}");
        assert_eq!(public(&with_parameters).unwrap(), key);
        for wrong in [
            P256,
            "",
            "-----BEGIN PRIVATE KEY-----\n!\n-----END PRIVATE KEY-----\n",
            "-----END PRIVATE KEY----------BEGIN PRIVATE KEY-----",
        ] {
            assert!(public(wrong).is_err(), "{wrong}");
        }
    }
}
