//! `podvisor attest` and `id-block` as a user runs it, on a report of the emulated processor, and OpenSSL's word on the same report: its
//! chain, and its signature taken apart by hand. What is verified in which order is tested in `snp/`.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::allow_attributes,
    reason = "a failure here is the test's"
)]

#[path = "../../snp/tests/common/guest.rs"]
mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use podvisor_snp::chain::SigningChain;
use podvisor_snp::digest::sha256;
use serde_json::Value;

const SIGNED: usize = 0x2A0;

/// A report of the emulated processor, with its certificates behind it.
fn report() -> Vec<u8> {
    let mut report = guest::sandbox().report(1, [0x5A; 64]);
    report.extend_from_slice(&SigningChain::test_chain().unwrap().certificate_table());
    report
}

fn file(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn attest(verb: &str, report: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
    command.args(["attest", verb]).arg(report).args(options);
    command.output().unwrap()
}

fn accepted(report: &Path, options: &[&str]) -> String {
    let out = attest("verify", report, &[&["--root", "emulated"], options].concat());
    assert!(out.status.success(), "{options:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Standard error of a refusal: exit code 1 for a report, 2 for wrong usage.
fn refused(code: i32, report: &Path, options: &[&str]) -> String {
    let out = attest("verify", report, &[&["--root", "emulated"], options].concat());
    assert_eq!(out.status.code(), Some(code), "{options:?}: {}", text(&out.stdout));
    text(&out.stderr)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn each_expectation_is_held_against_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let report = file(dir.path(), "report", &report());
    let (nonce, data, digest) = ("5a".repeat(64), "4d".repeat(32), "d1".repeat(48));
    let believed = accepted(&report, &["--nonce", &nonce, "--host-data", &data, "--digest", &digest]);
    assert!(
        believed.contains("EMULATED") && believed.contains(&digest),
        "{believed}"
    );
    accepted(&report, &["--policy", "0x30000", "--vmpl", "0"]);
    accepted(&report, &["--min-tcb", "bl=4,tee=0,snp=24,ucode=219"]);
    let policy = file(dir.path(), "policy", b"package agent_policy");
    let policy = policy.to_str().unwrap();
    let said = refused(1, &report, &["--policy-file", policy]);
    let hash: String = sha256(b"package agent_policy")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(said.contains("HOST_DATA") && said.contains(&hash), "{said}");
    // The digest is that of the command line's `sha512sum`, its first 32 bytes.
    let toml = "version = \"0.1.0\"\nalgorithm = \"sha512\"\n[data]\n";
    let initdata = file(dir.path(), "initdata", toml.as_bytes());
    let said = refused(1, &report, &["--initdata", initdata.to_str().unwrap()]);
    let sum = Command::new("sha512sum").arg(&initdata).output().unwrap();
    let want = format!("but {} is expected", &text(&sum.stdout)[..64]);
    assert!(said.contains("HOST_DATA") && said.contains(&want), "{said}");
    assert!(refused(1, &report, &["--initdata", policy]).contains("line 1"));
    let zeros = "00".repeat(48);
    for (option, value, field) in [
        ("--nonce", "5a", "REPORT_DATA"),
        ("--host-data", &zeros[..64], "HOST_DATA"),
        ("--digest", &zeros, "MEASUREMENT"),
        ("--policy", "0x20000", "POLICY"),
        ("--vmpl", "1", "VMPL"),
        ("--min-tcb", "bl=4,tee=0,snp=25,ucode=219", "REPORTED_TCB"),
        ("--id-key-digest", &digest, "ID_KEY_DIGEST"),
        ("--author-key-digest", &digest, "AUTHOR_KEY_DIGEST"),
    ] {
        let said = refused(1, &report, &[option, value]);
        assert!(said.contains(&format!("report field {field}: is ")), "{option}: {said}");
    }
    for (option, value) in [
        ("--nonce", "5"),
        ("--host-data", "00"),
        ("--digest", "xy"),
        ("--min-tcb", "bl=999"),
    ] {
        let said = refused(2, &report, &[option, value]);
        assert!(said.contains(option) && said.contains(value), "{said}");
    }
}

#[test]
fn amds_roots_are_the_ones_trusted_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    let report = file(dir.path(), "report", &report());
    for options in [&[][..], &["--root", "amd"], &["--json"]] {
        let out = attest("verify", &report, options);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stdout));
        assert!(text(&out.stderr).contains("no trusted root"), "{}", text(&out.stderr));
    }
    let json: Value = serde_json::from_str(&accepted(&report, &["--json"])).unwrap();
    assert_eq!((&json["verified"], &json["emulated"]), (&true.into(), &true.into()));
    let shown = attest("show", &report, &["--json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["report_data"], "5a".repeat(64));
    assert_eq!(
        shown["certificates"],
        serde_json::json!(["SEV-VCEK", "SEV-Milan", "ARK-Milan"])
    );
    assert!(text(&attest("show", &report, &[]).stdout).contains("PODVISOR EMULATED SEV-SNP - NOT HARDWARE"));
    // The report alone, and certificates as files.
    let bytes = fs::read(&report).unwrap();
    let alone = file(dir.path(), "alone", &bytes[..1184]);
    assert!(refused(1, &alone, &[]).contains("no VCEK certificate"));
    let chain = SigningChain::test_chain().unwrap();
    let (vcek, ask) = (
        file(dir.path(), "vcek", &chain.vcek),
        file(dir.path(), "ask", &chain.ask),
    );
    accepted(
        &alone,
        &["--cert", vcek.to_str().unwrap(), "--cert", ask.to_str().unwrap()],
    );
    // AMD's own ASK of that line is taken where none is given: it is not by the emulated root.
    assert!(refused(1, &alone, &["--cert", vcek.to_str().unwrap()]).contains("no trusted root"));
    assert!(refused(1, &file(dir.path(), "short", &bytes[..1183]), &[]).contains("1183"));
}

/// `INTEGER` of little-endian `number`, in DER.
fn der_integer(number: &[u8]) -> Vec<u8> {
    let mut big: Vec<u8> = number.iter().rev().copied().skip_while(|byte| *byte == 0).collect();
    if big.first().is_none_or(|byte| *byte >= 0x80) {
        big.insert(0, 0);
    }
    [&[2, big.len() as u8], &big[..]].concat()
}

fn openssl(dir: &Path, args: &[&str]) -> bool {
    let out = Command::new("openssl").current_dir(dir).args(args).output().unwrap();
    out.status.success()
}

/// Whether OpenSSL believes the chain in `dir`, and the signature of `report` by its VCEK.
fn openssl_believes(dir: &Path, report: &[u8]) -> bool {
    let (r, s) = (
        der_integer(&report[SIGNED..SIGNED + 72]),
        der_integer(&report[SIGNED + 72..SIGNED + 144]),
    );
    let signature = [&[0x30, (r.len() + s.len()) as u8], &r[..], &s[..]].concat();
    file(dir, "signature", &signature);
    file(dir, "signed", &report[..SIGNED]);
    openssl(
        dir,
        &["verify", "-CAfile", "ark.pem", "-untrusted", "ask.pem", "vcek.pem"],
    ) && openssl(
        dir,
        &[
            "dgst",
            "-sha384",
            "-verify",
            "key.pem",
            "-signature",
            "signature",
            "signed",
        ],
    )
}

#[test]
fn openssl_and_podvisor_believe_and_refuse_the_same_reports() {
    if Command::new("openssl").arg("version").output().is_err() {
        println!("skipped: no openssl command; install the package openssl");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let chain = SigningChain::test_chain().unwrap();
    for (name, der) in [("ark", &chain.ark), ("ask", &chain.ask), ("vcek", &chain.vcek)] {
        file(dir, "der", der);
        let pem = format!("{name}.pem");
        assert!(openssl(dir, &["x509", "-inform", "DER", "-in", "der", "-out", &pem]));
    }
    assert!(openssl(
        dir,
        &["x509", "-in", "vcek.pem", "-pubkey", "-noout", "-out", "key.pem"]
    ));
    let whole = report();
    assert!(openssl_believes(dir, &whole));
    // Version, SVN, policy, IDs, VMPL, TCBs, platform, signer, data, digest, host data, key digests, report IDs, chip, R, S.
    let fields = [
        0x00, 0x04, 0x08, 0x10, 0x20, 0x30, 0x34, 0x38, 0x40, 0x48, 0x50, 0x90, 0xC0, 0xE0, 0x110, 0x140, 0x160, 0x180,
        0x188, 0x1A0, 0x1E0, 0x1E8, 0x1EC, 0x1F0, 0x1F8, 0x200, 0x208, 0x29F, 0x2A0, 0x2CF, 0x2E8, 0x317,
    ];
    for at in fields {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        assert!(!openssl_believes(dir, &changed), "byte {at:#x}");
        let said = refused(1, &file(dir, "changed", &changed), &[]);
        assert!(said.contains("the report's signature"), "byte {at:#x}: {said}");
    }
}

const PKCS8: &str = include_str!("../../snp/tests/data/p384-pkcs8.pem");
const SEC1: &str = include_str!("../../snp/tests/data/p384-sec1.pem");

#[test]
fn a_signed_id_block_is_what_the_firmware_accepts_for_its_launch_alone() {
    use podvisor_snp::id_block::check;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (id, author) = (
        file(dir, "id.pem", PKCS8.as_bytes()),
        file(dir, "author.pem", SEC1.as_bytes()),
    );
    let sign = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
        command
            .current_dir(dir)
            .args(["id-block", "sign", "--block", "block", "--auth", "auth"]);
        command.arg("--id-key").arg(&id).args(options).output().unwrap()
    };
    let digest = "d1".repeat(48);
    let author = author.to_str().unwrap();
    let family = "0f".repeat(16);
    let options = [
        "--digest",
        &digest,
        "--guest-svn",
        "7",
        "--family-id",
        &family,
        "--author-key",
        author,
    ];
    let out = sign(&options);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    let block: [u8; 96] = fs::read(dir.join("block")).unwrap().try_into().unwrap();
    let auth: [u8; 4096] = fs::read(dir.join("auth")).unwrap().try_into().unwrap();
    let identity = check(&block, &auth, true, &[0xD1; 48], 0x30000).unwrap();
    assert_eq!((identity.guest_svn, identity.family_id), (7, [0x0F; 16]));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(said["id_key_digest"], hex(&identity.id_key_digest.0));
    assert_eq!(said["author_key_digest"], hex(&identity.author_key_digest.0));
    assert!(
        check(&block, &auth, true, &[0xD2; 48], 0x30000).is_err(),
        "another digest"
    );
    assert!(
        check(&block, &auth, true, &[0xD1; 48], 0xB0000).is_err(),
        "another policy"
    );
    for at in [0, 0x30, 0x40, 0x54] {
        let mut changed = block;
        changed[at] ^= 1;
        assert!(
            check(&changed, &auth, true, &[0xD1; 48], 0x30000).is_err(),
            "byte {at:#x} of the block"
        );
    }
    for at in [0, 4, 0x40, 0x88, 0x240, 0x244, 0x28C, 0x680, 0x880, 0x884] {
        let mut changed = auth;
        changed[at] ^= 1;
        assert!(
            check(&block, &changed, true, &[0xD1; 48], 0x30000).is_err(),
            "byte {at:#x} of the authentication"
        );
    }
    for (options, word) in [
        (&["--digest", "d1"][..], "--digest"),
        (&[], "--digest"),
        (&["--digest", &digest, "--image-id", "00"], "--image-id"),
        (&["--digest", &digest, "--policy", "0x10000"], "bit 17"),
    ] {
        let out = sign(options);
        assert_eq!(out.status.code(), Some(2), "{options:?}");
        assert!(text(&out.stderr).contains(word), "{options:?}: {}", text(&out.stderr));
    }
}
