//! The ATTESTATION_REPORT structure (AMD 56860 table 23): written and signed by the emulation, read by verifiers. Whether
//! a report is to be believed is decided in `verify`.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::EcdsaKeyPair;

use crate::ecdsa;

/// Bytes in a report.
pub const REPORT_LEN: usize = 1184;
/// The signature covers the bytes before it.
pub const SIGNED_LEN: usize = 0x2A0;

/// A TCB_VERSION of the Milan and Genoa families: its four components.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcb {
    /// Boot loader.
    pub boot_loader: u8,
    /// PSP operating system.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Microcode.
    pub microcode: u8,
}

impl Tcb {
    /// The u64 form.
    #[must_use]
    pub fn to_raw(self) -> u64 {
        u64::from_le_bytes([self.boot_loader, self.tee, 0, 0, 0, 0, self.snp, self.microcode])
    }

    /// Reads the u64 form; reserved bytes are not looked at.
    #[must_use]
    pub fn from_raw(raw: u64) -> Self {
        let [boot_loader, tee, _, _, _, _, snp, microcode] = raw.to_le_bytes();
        Self {
            boot_loader,
            tee,
            snp,
            microcode,
        }
    }

    /// Whether no component is newer than `other`'s.
    #[must_use]
    pub fn at_most(self, other: Self) -> bool {
        self.boot_loader <= other.boot_loader
            && self.tee <= other.tee
            && self.snp <= other.snp
            && self.microcode <= other.microcode
    }
}

/// Offsets of the fields.
pub(crate) mod at {
    pub(crate) const VERSION: usize = 0x00;
    pub(crate) const GUEST_SVN: usize = 0x04;
    pub(crate) const POLICY: usize = 0x08;
    pub(crate) const FAMILY_ID: usize = 0x10;
    pub(crate) const IMAGE_ID: usize = 0x20;
    pub(crate) const VMPL: usize = 0x30;
    pub(crate) const SIGNATURE_ALGO: usize = 0x34;
    pub(crate) const CURRENT_TCB: usize = 0x38;
    pub(crate) const PLATFORM_INFO: usize = 0x40;
    pub(crate) const SIGNER_INFO: usize = 0x48;
    pub(crate) const REPORT_DATA: usize = 0x50;
    pub(crate) const MEASUREMENT: usize = 0x90;
    pub(crate) const HOST_DATA: usize = 0xC0;
    pub(crate) const ID_KEY_DIGEST: usize = 0xE0;
    pub(crate) const AUTHOR_KEY_DIGEST: usize = 0x110;
    pub(crate) const REPORT_ID: usize = 0x140;
    pub(crate) const REPORT_ID_MA: usize = 0x160;
    pub(crate) const REPORTED_TCB: usize = 0x180;
    pub(crate) const CPUID_FAMILY: usize = 0x188;
    pub(crate) const CHIP_ID: usize = 0x1A0;
    pub(crate) const COMMITTED_TCB: usize = 0x1E0;
    pub(crate) const CURRENT_VERSION: usize = 0x1E8;
    pub(crate) const COMMITTED_VERSION: usize = 0x1EC;
    pub(crate) const LAUNCH_TCB: usize = 0x1F0;
    pub(crate) const SIGNATURE: usize = 0x2A0;
}

/// A report: its bytes, with readers for the fields.
#[derive(Clone, PartialEq, Eq)]
pub struct Report(Box<[u8; REPORT_LEN]>);

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Report")
            .field("version", &self.version())
            .field("policy", &self.policy())
            .field("measurement", &self.measurement())
            .finish_non_exhaustive()
    }
}

/// Bytes that are no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("report: {0} bytes; an attestation report has {REPORT_LEN}")]
pub struct ReportLength(pub usize);

impl Report {
    /// Takes `bytes` for a report. Only their number is checked.
    ///
    /// # Errors
    /// [`ReportLength`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ReportLength> {
        let bytes = bytes.try_into().map_err(|_| ReportLength(bytes.len()))?;
        Ok(Self(Box::new(bytes)))
    }

    /// All bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; REPORT_LEN] {
        &self.0
    }

    /// The `N` bytes of the field at `offset`.
    pub(crate) fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0
            .get(offset..)
            .and_then(|bytes| bytes.first_chunk())
            .copied()
            .unwrap_or([0; N])
    }

    /// The bytes that the signature covers.
    pub(crate) fn signed(&self) -> &[u8] {
        self.0.split_at(SIGNED_LEN).0
    }

    /// VERSION.
    #[must_use]
    pub fn version(&self) -> u32 {
        u32::from_le_bytes(self.field(at::VERSION))
    }

    /// GUEST_SVN.
    #[must_use]
    pub fn guest_svn(&self) -> u32 {
        u32::from_le_bytes(self.field(at::GUEST_SVN))
    }

    /// POLICY.
    #[must_use]
    pub fn policy(&self) -> u64 {
        u64::from_le_bytes(self.field(at::POLICY))
    }

    /// VMPL.
    #[must_use]
    pub fn vmpl(&self) -> u32 {
        u32::from_le_bytes(self.field(at::VMPL))
    }

    /// REPORT_DATA.
    #[must_use]
    pub fn report_data(&self) -> [u8; 64] {
        self.field(at::REPORT_DATA)
    }

    /// MEASUREMENT: the launch digest.
    #[must_use]
    pub fn measurement(&self) -> [u8; 48] {
        self.field(at::MEASUREMENT)
    }

    /// HOST_DATA.
    #[must_use]
    pub fn host_data(&self) -> [u8; 32] {
        self.field(at::HOST_DATA)
    }

    /// ID_KEY_DIGEST.
    #[must_use]
    pub fn id_key_digest(&self) -> [u8; 48] {
        self.field(at::ID_KEY_DIGEST)
    }

    /// CHIP_ID.
    #[must_use]
    pub fn chip_id(&self) -> [u8; 64] {
        self.field(at::CHIP_ID)
    }

    /// REPORTED_TCB.
    #[must_use]
    pub fn reported_tcb(&self) -> Tcb {
        Tcb::from_raw(u64::from_le_bytes(self.field(at::REPORTED_TCB)))
    }

    /// CURRENT_TCB.
    #[must_use]
    pub fn current_tcb(&self) -> Tcb {
        Tcb::from_raw(u64::from_le_bytes(self.field(at::CURRENT_TCB)))
    }

    /// `r || s` big-endian of the signature; None when a number is too large.
    pub(crate) fn fixed_signature(&self) -> Option<[u8; 96]> {
        ecdsa::fixed_signature(&self.field(at::SIGNATURE))
    }
}

/// Writes a report field by field.
pub(crate) struct ReportWriter(Box<[u8; REPORT_LEN]>);

impl ReportWriter {
    pub(crate) fn new() -> Self {
        Self(Box::new([0; REPORT_LEN]))
    }

    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        if let Some(to) = self.0.get_mut(offset..offset + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        self
    }

    /// Signs what was written with the VCEK; None when the library fails.
    pub(crate) fn sign(mut self, key: &EcdsaKeyPair) -> Option<Report> {
        let signature = key.sign(&SystemRandom::new(), self.0.split_at(SIGNED_LEN).0).ok()?;
        let (r, s) = ecdsa::amd_signature(signature.as_ref());
        self.put(at::SIGNATURE, &r).put(at::SIGNATURE + 72, &s);
        Some(Report(self.0))
    }
}
