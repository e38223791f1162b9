//! The ATTESTATION_REPORT structure (AMD 56860 table 23): written and signed by the emulation, read by verifiers. Whether
//! a report is to be believed is decided in `verify`.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::EcdsaKeyPair;

use crate::ecdsa;

/// Bytes in a report.
pub const REPORT_LEN: usize = 1184;
/// The signature covers the bytes before it.
pub const SIGNED_LEN: usize = 0x2A0;

/// A TCB_VERSION: its components (AMD 56860 2.2, table 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcb {
    /// FMC, which processors from Turin on have.
    pub fmc: Option<u8>,
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
    /// The u64 form: Turin's where there is an FMC, Milan's and Genoa's otherwise.
    #[must_use]
    pub fn to_raw(self) -> u64 {
        u64::from_le_bytes(match self.fmc {
            None => [self.boot_loader, self.tee, 0, 0, 0, 0, self.snp, self.microcode],
            Some(fmc) => [fmc, self.boot_loader, self.tee, self.snp, 0, 0, 0, self.microcode],
        })
    }

    /// Reads the u64 form of Turin; reserved bytes are not looked at.
    #[must_use]
    pub fn from_turin(raw: u64) -> Self {
        let [fmc, boot_loader, tee, snp, _, _, _, microcode] = raw.to_le_bytes();
        Self {
            fmc: Some(fmc),
            boot_loader,
            tee,
            snp,
            microcode,
        }
    }

    /// Reads the u64 form of Milan and Genoa; reserved bytes are not looked at.
    #[must_use]
    pub fn from_raw(raw: u64) -> Self {
        let [boot_loader, tee, _, _, _, _, snp, microcode] = raw.to_le_bytes();
        Self {
            fmc: None,
            boot_loader,
            tee,
            snp,
            microcode,
        }
    }

    /// Whether no component is newer than `other`'s.
    #[must_use]
    pub fn at_most(self, other: Self) -> bool {
        self.fmc <= other.fmc
            && self.boot_loader <= other.boot_loader
            && self.tee <= other.tee
            && self.snp <= other.snp
            && self.microcode <= other.microcode
    }
}

impl std::fmt::Display for Tcb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(fmc) = self.fmc {
            write!(f, "fmc={fmc},")?;
        }
        let Self {
            boot_loader,
            tee,
            snp,
            microcode,
            ..
        } = self;
        write!(f, "bl={boot_loader},tee={tee},snp={snp},ucode={microcode}")
    }
}

/// Text that is no TCB.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("TCB {0:?}: {1}")]
pub struct TcbError(String, &'static str);

impl std::str::FromStr for Tcb {
    type Err = TcbError;

    /// Reads `bl=N,tee=N,snp=N,ucode=N[,fmc=N]`, in any order; what is left out is 0.
    fn from_str(text: &str) -> Result<Self, TcbError> {
        let bad = |why| TcbError(text.to_owned(), why);
        let mut tcb = Self::default();
        for part in text.split(',') {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| bad("must be bl=N,tee=N,snp=N,ucode=N[,fmc=N]"))?;
            let value = value
                .parse()
                .map_err(|_| bad("a component must be a number from 0 to 255"))?;
            match name {
                "bl" => tcb.boot_loader = value,
                "tee" => tcb.tee = value,
                "snp" => tcb.snp = value,
                "ucode" => tcb.microcode = value,
                "fmc" => tcb.fmc = Some(value),
                _ => return Err(bad("knows bl, tee, snp, ucode and fmc")),
            }
        }
        Ok(tcb)
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

    /// Family, model and stepping of the processor; none before version 3, which does not tell.
    #[must_use]
    pub fn processor(&self) -> Option<[u8; 3]> {
        (self.version() >= 3).then(|| self.field(at::CPUID_FAMILY))
    }

    /// The product line of the processor (AMD 57230 section 3.1: Milan and Genoa are family 0x19, Turin is 0x1A); none
    /// where the report does not tell, or it is another.
    #[must_use]
    pub fn product_line(&self) -> Option<&'static str> {
        match self.processor()? {
            [0x19, 0x00..=0x0F, _] => Some("Milan"),
            // Genoa, and Siena and Bergamo, which have its certificates.
            [0x19, 0x10..=0x1F | 0xA0..=0xAF, _] => Some("Genoa"),
            [0x1A, 0x00..=0x11, _] => Some("Turin"),
            _ => None,
        }
    }

    fn tcb(&self, offset: usize) -> Tcb {
        let raw = u64::from_le_bytes(self.field(offset));
        match self.processor() {
            Some([family, ..]) if family >= 0x1A => Tcb::from_turin(raw),
            _ => Tcb::from_raw(raw),
        }
    }

    /// REPORTED_TCB.
    #[must_use]
    pub fn reported_tcb(&self) -> Tcb {
        self.tcb(at::REPORTED_TCB)
    }

    /// CURRENT_TCB.
    #[must_use]
    pub fn current_tcb(&self) -> Tcb {
        self.tcb(at::CURRENT_TCB)
    }

    /// COMMITTED_TCB.
    #[must_use]
    pub fn committed_tcb(&self) -> Tcb {
        self.tcb(at::COMMITTED_TCB)
    }

    /// LAUNCH_TCB.
    #[must_use]
    pub fn launch_tcb(&self) -> Tcb {
        self.tcb(at::LAUNCH_TCB)
    }

    /// FAMILY_ID and IMAGE_ID of the ID block.
    #[must_use]
    pub fn identity(&self) -> ([u8; 16], [u8; 16]) {
        (self.field(at::FAMILY_ID), self.field(at::IMAGE_ID))
    }

    /// PLATFORM_INFO: bit 0 SMT, bit 1 TSME, bit 2 ECC, bit 3 RAPL off, bit 4 ciphertext hiding, bit 5 alias check done.
    #[must_use]
    pub fn platform_info(&self) -> u64 {
        u64::from_le_bytes(self.field(at::PLATFORM_INFO))
    }

    /// SIGNER_INFO.
    #[must_use]
    pub fn signer_info(&self) -> u32 {
        u32::from_le_bytes(self.field(at::SIGNER_INFO))
    }

    /// AUTHOR_KEY_DIGEST.
    #[must_use]
    pub fn author_key_digest(&self) -> [u8; 48] {
        self.field(at::AUTHOR_KEY_DIGEST)
    }

    /// REPORT_ID, and that of the migration agent.
    #[must_use]
    pub fn report_ids(&self) -> ([u8; 32], [u8; 32]) {
        (self.field(at::REPORT_ID), self.field(at::REPORT_ID_MA))
    }

    /// Build, minor and major number of the firmware: current, committed.
    #[must_use]
    pub fn firmware_versions(&self) -> ([u8; 3], [u8; 3]) {
        (self.field(at::CURRENT_VERSION), self.field(at::COMMITTED_VERSION))
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
