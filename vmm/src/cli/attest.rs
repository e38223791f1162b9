//! `podvisor attest`: prints a SEV-SNP attestation report, or says whether it is to be believed. What is checked is
//! `podvisor_snp::verify`'s; here are the files, the expectations and the words.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use podvisor_firmware::igvm::{self, PlanOptions};
use podvisor_firmware::plan::Platform;
use podvisor_snp::chain::table;
use podvisor_snp::chain::x509;
use podvisor_snp::digest::{initdata_host_data, predict, sha256};
use podvisor_snp::report::{REPORT_LEN, Report, Tcb};
use podvisor_snp::verify::{Certificates, Expectations, Roots, Verified, amd_intermediates, verify};
use serde_json::{Value, json};

use super::{Failure, chain, print};
use crate::hex;

/// `podvisor attest`.
#[derive(Debug, Subcommand)]
pub(crate) enum AttestCommand {
    /// Say whether a report is to be believed: its certificates, its signature, its fields, and what is expected of it.
    Verify(Box<VerifyArgs>),
    /// Print what a report says, believed or not.
    Show(ShowArgs),
}

/// `podvisor attest show`.
#[derive(Debug, Args)]
#[command(after_help = "Example: podvisor attest show report.bin")]
pub(crate) struct ShowArgs {
    /// The report: 1184 bytes, with or without the certificate table of an extended request behind it.
    report: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `podvisor attest verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: 0 the report is to be believed, 1 it is not (or a file cannot be read), 2 wrong usage.

Example, with a certificate from AMD's key server:
  podvisor attest verify report.bin --cert vcek.der --image pod.igvm --vcpus 2 --policy-file policy.rego --nonce 00ff…"
)]
pub(crate) struct VerifyArgs {
    /// The report: 1184 bytes, with or without the certificate table of an extended request behind it.
    report: PathBuf,
    /// A certificate, DER or PEM (a file may hold several): VCEK or ASK. AMD's own ASKs are built in.
    #[arg(long, value_name = "FILE")]
    cert: Vec<PathBuf>,
    /// A root to trust instead of AMD's: a file (DER or PEM), `amd`, or `emulated` for the root of podvisor's emulated
    /// processor, whose reports prove nothing.
    #[arg(long, value_name = "FILE|amd|emulated")]
    root: Vec<String>,
    /// Launch digest that is expected.
    #[arg(long, value_name = "HEX", conflicts_with = "image")]
    digest: Option<String>,
    /// IGVM image whose launch digest is expected.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// vCPUs that --image was started with.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "image")]
    vcpus: u32,
    /// HOST_DATA that is expected.
    #[arg(long, value_name = "HEX", conflicts_with = "policy_file")]
    host_data: Option<String>,
    /// File whose SHA-256 is expected as HOST_DATA: the pod's policy.
    #[arg(long, value_name = "FILE")]
    policy_file: Option<PathBuf>,
    /// File whose hash is expected as HOST_DATA: initdata of Confidential Containers (TOML, or the disk with it).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["host_data", "policy_file"])]
    initdata: Option<PathBuf>,
    /// REPORT_DATA that is expected: up to 64 bytes, zeros follow.
    #[arg(long, value_name = "HEX")]
    nonce: Option<String>,
    /// The oldest TCB that will do.
    #[arg(long, value_name = "bl=N,tee=N,snp=N,ucode=N")]
    min_tcb: Option<Tcb>,
    /// SNP guest policy that is expected.
    #[arg(long, value_name = "BITS", value_parser = super::args::number)]
    policy: Option<u64>,
    /// VMPL that is expected.
    #[arg(long, value_name = "N")]
    vmpl: Option<u32>,
    /// Digest of the ID key that is expected (SHA-384, as ID_KEY_DIGEST).
    #[arg(long, value_name = "HEX")]
    id_key_digest: Option<String>,
    /// Digest of the author key that is expected.
    #[arg(long, value_name = "HEX")]
    author_key_digest: Option<String>,
    /// Accept a guest that its host may debug.
    #[arg(long)]
    allow_debug: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(command: &AttestCommand) -> Result<(), Failure> {
    match command {
        AttestCommand::Show(args) => {
            let (report, table) = read_report(&args.report)?;
            let said = describe(&report, &table);
            print(&if args.json { said.to_string() } else { text(&said) })
        }
        AttestCommand::Verify(args) => verify_command(args),
    }
}

fn verify_command(args: &VerifyArgs) -> Result<(), Failure> {
    let (report, table) = read_report(&args.report)?;
    let certificates = certificates(&table, &args.cert, &report)?;
    let roots = roots(&args.root)?;
    let expected = expectations(args)?;
    match verify(report.as_bytes(), &certificates, &expected, &roots) {
        Ok(verified) => print(&outcome(&verified, args.json)),
        Err(error) if args.json => {
            print(&json!({"verified": false, "error": error.to_string()}).to_string())?;
            Err(Failure::runtime(format!(
                "{}: {}",
                args.report.display(),
                chain(&error)
            )))
        }
        Err(error) => Err(Failure::runtime(format!(
            "{}: {}",
            args.report.display(),
            chain(&error)
        ))),
    }
}

fn outcome(verified: &Verified, as_json: bool) -> String {
    let report = &verified.report;
    let note = verified
        .emulated
        .then_some("this report is of podvisor's EMULATED processor: its keys are public, and it proves nothing");
    if as_json {
        return json!({
            "verified": true,
            "emulated": verified.emulated,
            "root": verified.root,
            "product": verified.vcek.product,
            "report": describe(report, &[]),
        })
        .to_string();
    }
    let mut out = format!(
        "verified: signed by a {} of {}\nmeasurement {}\nhost data   {}\nreport data {}\nTCB         {}",
        verified.vcek.product,
        verified.root,
        hex::encode(&report.measurement()),
        hex::encode(&report.host_data()),
        hex::encode(&report.report_data()),
        report.reported_tcb(),
    );
    if let Some(note) = note {
        let _ = write!(out, "\nnote: {note}");
    }
    out
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    /// More than any report with its certificates, or any certificate, has.
    const MOST: u64 = 1 << 20;
    let fail = |e: &dyn std::fmt::Display| Failure::runtime(format!("{}: {e}", path.display()));
    let file = std::fs::File::open(path).map_err(|e| fail(&e))?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, MOST + 1), &mut bytes).map_err(|e| fail(&e))?;
    if bytes.len() as u64 > MOST {
        return Err(fail(&"longer than 1 MiB: not a report or a certificate"));
    }
    Ok(bytes)
}

/// The report, and what is behind it.
fn read_report(path: &Path) -> Result<(Report, Vec<u8>), Failure> {
    let mut bytes = read(path)?;
    let table = bytes.split_off(bytes.len().min(REPORT_LEN));
    let report = Report::from_bytes(&bytes).map_err(|e| Failure::runtime(format!("{}: {e}", path.display())))?;
    Ok((report, table))
}

/// VCEK and ASK, from files, else from the report's table, else AMD's own.
fn certificates(table: &[u8], files: &[PathBuf], report: &Report) -> Result<Certificates, Failure> {
    let entries = table::parse(table).map_err(|e| Failure::runtime(format!("behind the report: {e}")))?;
    let of_table = |guid| entries.iter().find(|(id, _)| *id == guid).map(|(_, der)| der.to_vec());
    let mut found = Certificates {
        vcek: of_table(table::VCEK).unwrap_or_default(),
        ask: of_table(table::ASK).unwrap_or_default(),
    };
    for path in files {
        for der in ders(path)? {
            let name = x509::subject(&der).map_err(|e| Failure::runtime(format!("{}: {e}", path.display())))?;
            match name.as_str() {
                "SEV-VCEK" => found.vcek = der,
                name if name.starts_with("SEV-") => found.ask = der,
                // A chain file of AMD's key server has the root behind the ASK; it is not trusted for being there.
                name if name.starts_with("ARK-") => {}
                name => {
                    return Err(Failure::runtime(format!(
                        "{}: a certificate of {name:?}; wanted: SEV-VCEK, or SEV-Milan, SEV-Genoa, SEV-Turin",
                        path.display()
                    )));
                }
            }
        }
    }
    if found.vcek.is_empty() {
        return Err(Failure::runtime(format!(
            "no VCEK certificate behind the report: give it with --cert; AMD's key server has it for chip {}",
            hex::encode(&report.chip_id())
        )));
    }
    if found.ask.is_empty() {
        let line = x509::Vcek::parse(&found.vcek)
            .ok()
            .and_then(|vcek| Some(format!("SEV-{}", vcek.product.split('-').next()?)));
        let own = amd_intermediates().find(|der| x509::subject(der).ok() == line);
        found.ask = own.map(<[u8]>::to_vec).unwrap_or_default();
    }
    Ok(found)
}

/// The certificates of a DER or PEM file.
fn ders(path: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let bytes = read(path)?;
    if !bytes.starts_with(b"-----BEGIN") {
        return Ok(vec![bytes]);
    }
    let bad = || Failure::runtime(format!("{}: not PEM of certificates", path.display()));
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    let mut found = Vec::new();
    let mut rest = text.as_str();
    while let Some((_, after)) = rest.split_once("-----BEGIN CERTIFICATE-----") {
        let (body, behind) = after.split_once("-----END CERTIFICATE-----").ok_or_else(bad)?;
        found.push(base64(body).ok_or_else(bad)?);
        rest = behind;
    }
    if found.is_empty() {
        return Err(bad());
    }
    Ok(found)
}

/// The bytes of `text` in base 64 (RFC 4648), white space left out.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut buffer, mut bits) = (0u32, 0);
    for c in text.bytes().filter(|c| !c.is_ascii_whitespace()) {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => continue,
            _ => return None,
        };
        buffer = (buffer << 6 | u32::from(value)) & 0xFFFF;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(buffer >> bits & 0xFF).ok()?);
        }
    }
    Some(bytes)
}

fn roots(given: &[String]) -> Result<Roots, Failure> {
    if given.is_empty() {
        return Ok(Roots::amd());
    }
    let mut roots = Roots::none();
    for root in given {
        roots = match root.as_str() {
            "amd" => roots.and(Roots::amd()),
            "emulated" => roots.and(Roots::emulated()),
            path => ders(Path::new(path))?.iter().try_fold(roots, |roots, der| {
                roots
                    .with(der)
                    .map_err(|e| Failure::runtime(format!("--root {path}: {e}")))
            })?,
        };
    }
    Ok(roots)
}

fn expectations(args: &VerifyArgs) -> Result<Expectations, Failure> {
    let digest = match (&args.digest, &args.image) {
        (Some(digest), _) => Some(exactly("--digest", digest)?),
        (None, Some(image)) => Some(digest_of(image, args.vcpus)?),
        (None, None) => None,
    };
    let host_data = match (&args.host_data, &args.policy_file, &args.initdata) {
        (Some(host_data), ..) => Some(exactly("--host-data", host_data)?),
        (None, Some(policy), _) => Some(sha256(&read(policy)?)),
        (None, None, Some(path)) => Some(
            initdata_host_data(&read(path)?)
                .map_err(|e| Failure::runtime(format!("--initdata {}: {e}", path.display())))?,
        ),
        (None, None, None) => None,
    };
    let key = |option, text: &Option<String>| text.as_deref().map(|text| exactly(option, text)).transpose();
    Ok(Expectations {
        digest,
        host_data,
        report_data: args.nonce.as_deref().map(nonce).transpose()?,
        policy: args.policy,
        vmpl: args.vmpl,
        id_key_digest: key("--id-key-digest", &args.id_key_digest)?,
        author_key_digest: key("--author-key-digest", &args.author_key_digest)?,
        min_tcb: args.min_tcb,
        allow_debug: args.allow_debug,
        at: None,
    })
}

/// The `N` bytes that `text` has in hex.
pub(super) fn exactly<const N: usize>(option: &str, text: &str) -> Result<[u8; N], Failure> {
    let bytes = hex::decode(text).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| Failure::usage(format!("{option} {text}: must be {N} bytes, {} hex digits", 2 * N)))
}

fn nonce(text: &str) -> Result<[u8; 64], Failure> {
    let bytes = hex::decode(text).filter(|bytes| bytes.len() <= 64);
    let mut bytes = bytes.ok_or_else(|| Failure::usage(format!("--nonce {text}: must be at most 64 bytes of hex")))?;
    bytes.resize(64, 0);
    exactly("--nonce", &hex::encode(&bytes))
}

/// The launch digest of the IGVM image that `--image` names.
pub(super) fn digest_of(image: &Path, vcpus: u32) -> Result<[u8; 48], Failure> {
    let fail = |e: &dyn std::fmt::Display| Failure::runtime(format!("--image {}: {e}", image.display()));
    let file = std::fs::File::open(image)
        .and_then(|file| crate::sys::map_file(&file))
        .map_err(|e| fail(&e))?;
    let options = PlanOptions {
        platform: Some(Platform::SevSnp),
        ..PlanOptions::default()
    };
    let plan = igvm::plan(&file, &options).map_err(|e| fail(&chain(&e)))?;
    Ok(predict(&plan, vcpus).map_err(|e| fail(&chain(&e)))?.digest)
}

/// Everything that a report says.
fn describe(report: &Report, table: &[u8]) -> Value {
    let h = hex::encode;
    let (family_id, image_id) = report.identity();
    let (report_id, report_id_ma) = report.report_ids();
    let version = |[build, minor, major]: [u8; 3]| format!("{major}.{minor}.{build}");
    let (current, committed) = report.firmware_versions();
    let policy = report.policy();
    let signer = report.signer_info();
    let certificates: Vec<String> = table::parse(table)
        .unwrap_or_default()
        .iter()
        .map(|(_, der)| x509::subject(der).unwrap_or_else(|e| format!("unreadable: {e}")))
        .collect();
    json!({
        "version": report.version(),
        "guest_svn": report.guest_svn(),
        "policy": {
            "bits": format!("{policy:#x}"),
            "abi": format!("{}.{}", policy >> 8 & 0xFF, policy & 0xFF),
            "smt": policy >> 16 & 1 == 1,
            "migration_agent": policy >> 18 & 1 == 1,
            "debug": policy >> 19 & 1 == 1,
            "single_socket": policy >> 20 & 1 == 1,
        },
        "family_id": h(&family_id),
        "image_id": h(&image_id),
        "vmpl": report.vmpl(),
        "platform_info": format!("{:#x}", report.platform_info()),
        "signing_key": match signer >> 2 & 7 { 0 => "VCEK", 1 => "VLEK", 7 => "none", _ => "unknown" },
        "author_key": signer & 1 == 1,
        "report_data": h(&report.report_data()),
        "measurement": h(&report.measurement()),
        "host_data": h(&report.host_data()),
        "id_key_digest": h(&report.id_key_digest()),
        "author_key_digest": h(&report.author_key_digest()),
        "report_id": h(&report_id),
        "report_id_ma": h(&report_id_ma),
        "tcb": {
            "reported": report.reported_tcb().to_string(),
            "current": report.current_tcb().to_string(),
            "committed": report.committed_tcb().to_string(),
            "launch": report.launch_tcb().to_string(),
        },
        "firmware": {"current": version(current), "committed": version(committed)},
        "processor": report.processor().map(|[family, model, stepping]| json!({
            "family": family, "model": model, "stepping": stepping, "line": report.product_line(),
        })),
        "chip_id": h(&report.chip_id()),
        "chip_id_text": readable(&report.chip_id()),
        "certificates": certificates,
    })
}

/// The text that the emulation's CHIP_ID is.
fn readable(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let printable = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    printable.then(|| text.to_owned())
}

/// One field a line.
fn text(said: &Value) -> String {
    fn lines(out: &mut String, name: &str, value: &Value) {
        match value {
            Value::Object(fields) => {
                for (field, value) in fields {
                    let name = if name.is_empty() {
                        field.clone()
                    } else {
                        format!("{name}.{field}")
                    };
                    lines(out, &name, value);
                }
            }
            Value::Null => {}
            Value::String(text) => {
                let _ = writeln!(out, "{name:<20} {text}");
            }
            Value::Array(items) => {
                let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                let _ = writeln!(
                    out,
                    "{name:<20} {}",
                    if items.is_empty() {
                        "none".to_owned()
                    } else {
                        items.join(", ")
                    }
                );
            }
            other => {
                let _ = writeln!(out, "{name:<20} {other}");
            }
        }
    }
    let mut out = String::new();
    lines(&mut out, "", said);
    out.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_64_is_read() {
        assert_eq!(base64("aGVs\nbG8=").unwrap(), b"hello");
        assert_eq!(base64("").unwrap(), b"");
        assert_eq!(base64("a*"), None);
    }

    #[test]
    fn a_short_nonce_is_followed_by_zeros() {
        let read = nonce("00ff").unwrap();
        assert_eq!(read[..2], [0, 0xFF]);
        assert_eq!(read[2..], [0; 62]);
        assert!(nonce("0").is_err());
        assert!(nonce(&"00".repeat(65)).is_err());
    }
}
