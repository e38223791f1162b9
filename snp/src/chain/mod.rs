//! The chain ARK, ASK, VCEK that signs the emulation's reports: the test chain that podvisor ships, or one's own from a
//! directory. `make` builds chains; `table` is how certificates travel to a guest; verification is elsewhere.

pub mod make;
pub mod table;
pub mod x509;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair};

use crate::digest::sha384;
use crate::report::Tcb;
use x509::{Vcek, X509Error};

/// Names of the files of a chain in its directory: certificates in DER, the VCEK's private key in PKCS #8 DER.
pub const FILES: [&str; 4] = ["ark.der", "ask.der", "vcek.der", "vcek-key.der"];

const TEST_ARK: &[u8] = include_bytes!("../../test-chain/ark.der");
const TEST_ASK: &[u8] = include_bytes!("../../test-chain/ask.der");
const TEST_VCEK: &[u8] = include_bytes!("../../test-chain/vcek.der");
const TEST_KEY: &[u8] = include_bytes!("../../test-chain/vcek-key.der");

/// The root of the test chain. Its keys are public: who accepts it accepts anything.
#[must_use]
pub fn test_root() -> &'static [u8] {
    TEST_ARK
}

/// A chain with the private key that signs.
pub struct SigningChain {
    /// ARK certificate, DER.
    pub ark: Vec<u8>,
    /// ASK certificate, DER.
    pub ask: Vec<u8>,
    /// VCEK certificate, DER.
    pub vcek: Vec<u8>,
    pub(crate) key: EcdsaKeyPair,
    pub(crate) chip_id: [u8; 64],
    pub(crate) tcb: Tcb,
    /// Root of derived keys.
    pub(crate) root_key: [u8; 48],
    table: Arc<[u8]>,
}

/// Why a chain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A file that cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A private key that others can read.
    #[error("{path}: mode {mode:o}; others can read this private key: chmod 600 it")]
    Mode {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate that is none, or lacks what AMD's have.
    #[error("{file}: {source}")]
    Certificate {
        /// Which of [`FILES`].
        file: &'static str,
        /// What is wrong.
        source: X509Error,
    },
    /// The private key.
    #[error("vcek-key.der: {0}")]
    Key(&'static str),
}

impl SigningChain {
    /// The test chain that podvisor ships; its private key is public.
    ///
    /// # Errors
    /// [`ChainError`] never happens for the files as they are shipped.
    pub fn test_chain() -> Result<Arc<Self>, ChainError> {
        Self::new(TEST_ARK, TEST_ASK, TEST_VCEK, TEST_KEY).map(Arc::new)
    }

    /// A chain of one's own: [`FILES`] in `dir`. The private key may be readable by its owner only.
    ///
    /// # Errors
    /// [`ChainError`] names the file.
    pub fn from_dir(dir: &Path) -> Result<Arc<Self>, ChainError> {
        let [ark, ask, vcek, key] = FILES.map(|name| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| ChainError::Read {
                path: path.display().to_string(),
                source,
            })
        });
        let path = dir.join("vcek-key.der");
        let mode = std::fs::metadata(&path).map_or(0, |data| data.permissions().mode() & 0o777);
        if mode & 0o077 != 0 {
            return Err(ChainError::Mode {
                path: path.display().to_string(),
                mode,
            });
        }
        Self::new(&ark?, &ask?, &vcek?, &key?).map(Arc::new)
    }

    fn new(ark: &[u8], ask: &[u8], vcek: &[u8], key: &[u8]) -> Result<Self, ChainError> {
        let bad = |file| move |source| ChainError::Certificate { file, source };
        x509::subject(ark).map_err(bad("ark.der"))?;
        x509::subject(ask).map_err(bad("ask.der"))?;
        let parsed = Vcek::parse(vcek).map_err(bad("vcek.der"))?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, key)
            .map_err(|_| ChainError::Key("is not PKCS #8 DER of a P-384 key"))?;
        if parsed.public_key != pair.public_key().as_ref() {
            return Err(ChainError::Key("is not the key of vcek.der"));
        }
        Ok(Self {
            ark: ark.to_vec(),
            ask: ask.to_vec(),
            vcek: vcek.to_vec(),
            chip_id: parsed.chip_id,
            tcb: parsed.tcb,
            root_key: sha384(key),
            table: table::build(&[(table::VCEK, vcek), (table::ASK, ask), (table::ARK, ark)]).into(),
            key: pair,
        })
    }

    /// The certificate table that extended guest requests hand out.
    #[must_use]
    pub fn certificate_table(&self) -> Arc<[u8]> {
        Arc::clone(&self.table)
    }
}
