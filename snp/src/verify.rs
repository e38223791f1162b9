//! Whether an attestation report is to be believed: its certificate chain up to a root that the caller names, its signature,
//! its fields, and what the caller expects it to say. AMD's roots are built in; the emulation's is trusted only by name.

use std::time::SystemTime;

use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};

use crate::chain::table::{self, TableError};
use crate::chain::test_root;
use crate::chain::x509::{Cert, Vcek, X509Error};
use crate::report::{Report, ReportLength, Tcb, at};

/// Policy bits: must be one, debugging allowed.
const POLICY_MBO: u64 = 1 << 17;
const POLICY_DEBUG: u64 = 1 << 19;
/// Policy bits that no version of the specification defines.
const POLICY_RESERVED: u64 = !0 << 26;

/// AMD's certificates, ARK and ASK of each product line (`snp/amd-roots/`).
const AMD: [(&[u8], &[u8]); 3] = [
    (
        include_bytes!("../amd-roots/milan-ark.der"),
        include_bytes!("../amd-roots/milan-ask.der"),
    ),
    (
        include_bytes!("../amd-roots/genoa-ark.der"),
        include_bytes!("../amd-roots/genoa-ask.der"),
    ),
    (
        include_bytes!("../amd-roots/turin-ark.der"),
        include_bytes!("../amd-roots/turin-ask.der"),
    ),
];

/// AMD's own intermediate certificates (ASK, DER), for reports that come with a VCEK alone. They are believed only with
/// their root.
pub fn amd_intermediates() -> impl Iterator<Item = &'static [u8]> {
    AMD.iter().map(|(_, ask)| *ask)
}

/// Roots (ARK certificates, DER) that the caller trusts.
#[derive(Clone, Debug, Default)]
pub struct Roots(Vec<Vec<u8>>);

impl Roots {
    /// No root: nothing verifies.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The root of the test chain that podvisor ships. Its keys are public: use it only to check the emulation.
    #[must_use]
    pub fn emulated() -> Self {
        Self(vec![test_root().to_vec()])
    }

    /// AMD's roots, of Milan, Genoa and Turin.
    #[must_use]
    pub fn amd() -> Self {
        Self(AMD.iter().map(|(ark, _)| ark.to_vec()).collect())
    }

    /// Adds those of `other`.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Adds the ARK certificate `der`.
    ///
    /// # Errors
    /// [`X509Error`] when it is no certificate.
    pub fn with(mut self, der: &[u8]) -> Result<Self, X509Error> {
        Cert::parse(der)?;
        self.0.push(der.to_vec());
        Ok(self)
    }
}

/// The certificates that came with a report. A root among them is not trusted for being there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Certificates {
    /// ASK, DER.
    pub ask: Vec<u8>,
    /// VCEK, DER.
    pub vcek: Vec<u8>,
}

impl Certificates {
    /// From the certificate table of an extended request.
    ///
    /// # Errors
    /// [`VerifyError::Table`], or [`VerifyError::Missing`] certificates.
    pub fn from_table(bytes: &[u8]) -> Result<Self, VerifyError> {
        let entries = table::parse(bytes)?;
        let find = |guid, name| {
            let found = entries.iter().find(|(id, _)| *id == guid);
            found.map(|(_, der)| der.to_vec()).ok_or(VerifyError::Missing(name))
        };
        Ok(Self {
            ask: find(table::ASK, "ASK")?,
            vcek: find(table::VCEK, "VCEK")?,
        })
    }
}

/// What the caller expects; None is not checked.
#[derive(Clone, Debug, Default)]
pub struct Expectations {
    /// Launch digest.
    pub digest: Option<[u8; 48]>,
    /// HOST_DATA.
    pub host_data: Option<[u8; 32]>,
    /// REPORT_DATA.
    pub report_data: Option<[u8; 64]>,
    /// POLICY.
    pub policy: Option<u64>,
    /// VMPL.
    pub vmpl: Option<u32>,
    /// ID_KEY_DIGEST.
    pub id_key_digest: Option<[u8; 48]>,
    /// AUTHOR_KEY_DIGEST.
    pub author_key_digest: Option<[u8; 48]>,
    /// The oldest TCB that will do; its components are compared one by one, an FMC only where the processor has one.
    pub min_tcb: Option<Tcb>,
    /// Whether a guest that its host may debug is acceptable.
    pub allow_debug: bool,
    /// The time at which the certificates must be valid; None: now.
    pub at: Option<SystemTime>,
}

/// What a believed report says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The report.
    pub report: Report,
    /// What signed it.
    pub vcek: Vcek,
    /// Common name of the root.
    pub root: String,
    /// Whether the root is the emulation's: then the report proves nothing about hardware.
    pub emulated: bool,
}

/// Why a report is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Not a report.
    #[error(transparent)]
    Length(#[from] ReportLength),
    /// The certificate table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A certificate that did not come.
    #[error("the {0} certificate is missing; ask for the extended report, or fetch it from AMD's key server")]
    Missing(&'static str),
    /// A certificate.
    #[error("{which} certificate: {source}")]
    Certificate {
        /// Which.
        which: &'static str,
        /// Why.
        source: X509Error,
    },
    /// A certificate with another name than AMD's form.
    #[error("{which} certificate: its name is {got:?}, must be {want:?}")]
    Name {
        /// Which.
        which: &'static str,
        /// Its name.
        got: String,
        /// The name it must have.
        want: String,
    },
    /// No root of the caller's issued the ASK.
    #[error("no trusted root issued the ASK certificate ({0} roots were given)")]
    Root(usize),
    /// The report's signature.
    #[error("the report's signature is not by the VCEK's key")]
    Signature,
    /// A field that has a value it may not have.
    #[error("report field {field}: {reason}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// A field that is not as expected.
    #[error("report field {field}: is {got} but {want} is expected")]
    Unexpected {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        got: String,
        /// The expected value.
        want: String,
    },
}

/// Verifies `report` with `certificates` against `roots`, and that it says what `expected` has.
///
/// # Errors
/// [`VerifyError`] for the first thing that is wrong.
pub fn verify(
    report: &[u8],
    certificates: &Certificates,
    expected: &Expectations,
    roots: &Roots,
) -> Result<Verified, VerifyError> {
    let report = Report::from_bytes(report)?;
    let now = expected.at.unwrap_or_else(SystemTime::now);
    let (vcek, root, emulated) = verify_chain(certificates, roots, now)?;
    let signature = report.fixed_signature().ok_or(VerifyError::Signature)?;
    UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, &vcek.public_key)
        .verify(report.signed(), &signature)
        .map_err(|_| VerifyError::Signature)?;
    check_fields(&report, expected)?;
    check_against_vcek(&report, &vcek)?;
    check_line(&report, &root)?;
    check_expected(&report, expected)?;
    Ok(Verified {
        report,
        vcek,
        root,
        emulated,
    })
}

fn verify_chain(
    certificates: &Certificates,
    roots: &Roots,
    now: SystemTime,
) -> Result<(Vcek, String, bool), VerifyError> {
    let bad = |which| move |source| VerifyError::Certificate { which, source };
    let ask = Cert::parse(&certificates.ask).map_err(bad("ASK"))?;
    let vcek_cert = Cert::parse(&certificates.vcek).map_err(bad("VCEK"))?;
    let mut refused = VerifyError::Root(roots.0.len());
    for der in &roots.0 {
        let root = Cert::parse(der).map_err(bad("ARK"))?;
        match ask.issued_by(&root, now) {
            Ok(()) => {
                root.issued_by(&root, now).map_err(bad("ARK"))?;
                vcek_cert.issued_by(&ask, now).map_err(bad("VCEK"))?;
                let vcek = Vcek::of(&vcek_cert).map_err(bad("VCEK"))?;
                let root_name = root.common_name().map_err(bad("ARK"))?;
                check_names(&root_name, &ask, &vcek_cert, &vcek)?;
                return Ok((vcek, root_name, der == test_root()));
            }
            Err(source @ X509Error::Expired { .. }) => refused = VerifyError::Certificate { which: "ASK", source },
            Err(_) => {}
        }
    }
    Err(refused)
}

/// Names in AMD's form, all of one product line.
fn check_names(root: &str, ask: &Cert, vcek_cert: &Cert, vcek: &Vcek) -> Result<(), VerifyError> {
    let bad = |which| move |source| VerifyError::Certificate { which, source };
    let line = root.strip_prefix("ARK-").ok_or_else(|| VerifyError::Name {
        which: "ARK",
        got: root.to_owned(),
        want: "ARK-<product line>".to_owned(),
    })?;
    let names = [
        ("ASK", ask.common_name().map_err(bad("ASK"))?, format!("SEV-{line}")),
        (
            "VCEK",
            vcek_cert.common_name().map_err(bad("VCEK"))?,
            "SEV-VCEK".to_owned(),
        ),
        (
            "VCEK (productName)",
            vcek.product.split('-').next().unwrap_or_default().to_owned(),
            line.to_owned(),
        ),
    ];
    for (which, got, want) in names {
        if got != want {
            return Err(VerifyError::Name { which, got, want });
        }
    }
    Ok(())
}

/// Rules that every report follows.
fn check_fields(report: &Report, expected: &Expectations) -> Result<(), VerifyError> {
    let rule = |ok: bool, field, reason| {
        if ok {
            Ok(())
        } else {
            Err(VerifyError::Field { field, reason })
        }
    };
    let bytes = report.as_bytes();
    let zero = |from: usize, to: usize| {
        bytes
            .get(from..to)
            .is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    };
    let version = report.version();
    rule(matches!(version, 2 | 3 | 5), "VERSION", "must be 2, 3 or 5")?;
    let algorithm = u32::from_le_bytes(report.field(at::SIGNATURE_ALGO));
    rule(algorithm == 1, "SIGNATURE_ALGO", "must be 1 (ECDSA P-384 with SHA-384)")?;
    let signer = u32::from_le_bytes(report.field(at::SIGNER_INFO));
    rule(
        signer & !1 == 0,
        "SIGNER_INFO",
        "must say that the VCEK signed and the chip key is not masked",
    )?;
    let policy = report.policy();
    rule(policy & POLICY_MBO != 0, "POLICY", "bit 17 must be one")?;
    rule(policy & POLICY_RESERVED == 0, "POLICY", "a reserved bit is set")?;
    let debug_ok = expected.allow_debug || policy & POLICY_DEBUG == 0;
    rule(debug_ok, "POLICY", "lets the host debug the guest (bit 19)")?;
    rule(report.vmpl() <= 3, "VMPL", "must be 0 to 3")?;
    let mitigations = if version >= 5 { 0x208 } else { 0x1F8 };
    let cpuid = if version >= 3 { 0x18B } else { 0x188 };
    let reserved = zero(0x4C, 0x50)
        && zero(cpuid, at::CHIP_ID)
        && zero(0x1EB, 0x1EC)
        && zero(0x1EF, 0x1F0)
        && zero(mitigations, at::SIGNATURE)
        && zero(at::SIGNATURE + 144, bytes.len());
    rule(reserved, "reserved", "must be zero")
}

/// The VCEK is this chip's at the TCB that the report names.
fn check_against_vcek(report: &Report, vcek: &Vcek) -> Result<(), VerifyError> {
    let rule = |ok: bool, field, reason| {
        if ok {
            Ok(())
        } else {
            Err(VerifyError::Field { field, reason })
        }
    };
    rule(
        report.chip_id() == vcek.chip_id,
        "CHIP_ID",
        "is not the hwID of the VCEK certificate",
    )?;
    let reported = report.reported_tcb();
    rule(
        reported == vcek.tcb,
        "REPORTED_TCB",
        "is not the TCB of the VCEK certificate",
    )?;
    rule(
        reported.at_most(report.current_tcb()),
        "REPORTED_TCB",
        "is newer than CURRENT_TCB",
    )
}

/// The processor that the report names is of the root's product line.
fn check_line(report: &Report, root: &str) -> Result<(), VerifyError> {
    match report.product_line() {
        Some(line) if root.strip_prefix("ARK-") != Some(line) => Err(VerifyError::Unexpected {
            field: "CPUID_FAM_ID, CPUID_MOD_ID",
            got: line.to_owned(),
            want: root.strip_prefix("ARK-").unwrap_or(root).to_owned(),
        }),
        _ => Ok(()),
    }
}

fn check_expected(report: &Report, expected: &Expectations) -> Result<(), VerifyError> {
    expect("MEASUREMENT", &report.measurement(), expected.digest.as_ref())?;
    expect("HOST_DATA", &report.host_data(), expected.host_data.as_ref())?;
    expect("REPORT_DATA", &report.report_data(), expected.report_data.as_ref())?;
    expect(
        "ID_KEY_DIGEST",
        &report.id_key_digest(),
        expected.id_key_digest.as_ref(),
    )?;
    expect(
        "AUTHOR_KEY_DIGEST",
        &report.author_key_digest(),
        expected.author_key_digest.as_ref(),
    )?;
    if let Some(min) = expected.min_tcb {
        let reported = report.reported_tcb();
        let min = Tcb {
            fmc: min.fmc.filter(|_| reported.fmc.is_some()),
            ..min
        };
        if !min.at_most(reported) {
            return Err(VerifyError::Unexpected {
                field: "REPORTED_TCB",
                got: reported.to_string(),
                want: format!("{min} or newer"),
            });
        }
    }
    let policy = expected.policy.map(u64::to_be_bytes);
    expect("POLICY", &report.policy().to_be_bytes(), policy.as_ref())?;
    let vmpl = expected.vmpl.map(u32::to_be_bytes);
    expect("VMPL", &report.vmpl().to_be_bytes(), vmpl.as_ref())
}

fn expect<const N: usize>(field: &'static str, got: &[u8; N], want: Option<&[u8; N]>) -> Result<(), VerifyError> {
    let hex = crate::launch::hex;
    match want {
        Some(want) if want != got => Err(VerifyError::Unexpected {
            field,
            got: hex(got),
            want: hex(want),
        }),
        _ => Ok(()),
    }
}
