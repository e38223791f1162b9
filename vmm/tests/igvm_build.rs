//! `podvisor igvm build` as a user runs it, its images held against the igvm crate, `podvisor measure` and the rules of SPDX.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::panic,
    clippy::allow_attributes,
    reason = "a failure here is the test's"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use igvm::{IgvmDirectiveHeader, IgvmFile, IsolationType};
use serde_json::Value;

const PKCS8: &str = include_str!("../../snp/tests/data/p384-pkcs8.pem");
const SEC1: &str = include_str!("../../snp/tests/data/p384-sec1.pem");

/// A bzImage of `len` bytes of code: nothing that boots.
fn bzimage(len: usize) -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[2]);
    put(0x1F4, &u32::try_from(len / 16).unwrap().to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7Fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &u32::try_from(len + (16 << 20)).unwrap().to_le_bytes());
    file.extend((0..len / 8).flat_map(|n| (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()));
    file
}

/// podvisor with `args` in `dir`; the kernel and initrd there are 3 and 2 MiB.
fn podvisor(dir: &Path, args: &[&str]) -> Output {
    let (kernel, initrd) = (dir.join("vmlinuz"), dir.join("initrd"));
    if !kernel.exists() {
        fs::write(kernel, bzimage(3 << 20)).unwrap();
        fs::write(initrd, vec![0x5A; (2 << 20) + 17]).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
    command
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .current_dir(dir)
        .args(args);
    command.output().unwrap()
}

fn said(dir: &Path, args: &[&str]) -> String {
    let output = podvisor(dir, args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn build(dir: &Path, more: &[&str]) -> Value {
    let usual = [
        "igvm",
        "build",
        "--kernel",
        "vmlinuz",
        "--initrd",
        "initrd",
        "--cmdline",
        "console=ttyS0 quiet",
        "--json",
    ];
    let output = if more.contains(&"--output") {
        &[][..]
    } else {
        &["--output", "image"]
    };
    let args: Vec<_> = usual.iter().chain(more).chain(output).copied().collect();
    serde_json::from_str(&said(dir, &args)).unwrap()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&said(dir, args)).unwrap()
}

#[test]
fn the_digest_is_what_others_compute() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for more in [
        &[][..],
        &["--measure-all"],
        &["--platform", "snp"],
        &["--memory-slots", "8", "--vcpus", "3"],
    ] {
        let built = build(dir, more);
        let vcpus = built["vcpus"].to_string();
        let measured = json(dir, &["measure", "image", "--vcpus", &vcpus, "--json"]);
        for field in ["launch_digest", "measured_bytes"] {
            assert_eq!(built[field], measured[field], "{more:?} {field}");
        }
        let image = fs::read(dir.join("image")).unwrap();
        let file = IgvmFile::new_from_binary(&image, Some(IsolationType::Snp)).unwrap();
        if vcpus == "1" {
            let digest =
                igvm::measurement::generate_snp_measurement(file.initializations(), file.directives(), 1).unwrap();
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(built["launch_digest"], digest, "{more:?}");
        }
        // Shared pages hold the payloads, and the crate reads them back as they are.
        let shared: Vec<u8> = file
            .directives()
            .iter()
            .filter_map(|directive| match directive {
                IgvmDirectiveHeader::PageData { flags, data, .. } if flags.shared() => Some(data.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        let kernel = &bzimage(3 << 20)[3 * 512..];
        let at = (shared.len() >= kernel.len()).then_some(4096);
        let found = at.and_then(|at| shared.get(at..at + kernel.len()));
        assert_eq!(
            found.is_some_and(|found| found == kernel),
            !more.contains(&"--measure-all"),
            "{more:?}"
        );
    }
}

#[test]
fn the_same_inputs_make_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    build(dir, &[]);
    let (image, sbom) = (
        fs::read(dir.join("image")).unwrap(),
        fs::read(dir.join("image.spdx.json")).unwrap(),
    );
    build(dir, &[]);
    assert!(fs::read(dir.join("image")).unwrap() == image);
    assert!(fs::read(dir.join("image.spdx.json")).unwrap() == sbom);
    let names = fs::read_dir(dir).unwrap().count();
    assert_eq!(names, 4, "image, SBOM, kernel, initrd and nothing half made");
}

#[test]
fn an_id_block_promises_the_digest() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("id"), PKCS8).unwrap();
    fs::write(dir.join("author"), SEC1).unwrap();
    let keys = [
        "--id-key",
        "id",
        "--author-key",
        "author",
        "--vcpus",
        "2",
        "--policy",
        "0x70000",
    ];
    let built = build(dir, &keys);
    assert_eq!(built["id_block"], true);
    let image = fs::read(dir.join("image")).unwrap();
    let plan = podvisor_firmware::igvm::plan(&image, &podvisor_firmware::igvm::PlanOptions::default()).unwrap();
    let block = plan.id_block.as_ref().unwrap();
    let digest: String = block.ld.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(built["launch_digest"], digest);
    let (id, auth) = (
        podvisor_snp::id_block::block(block, 0x70000),
        podvisor_snp::id_block::auth(block),
    );
    let identity = podvisor_snp::id_block::check(&id, &auth, true, &block.ld, 0x70000).unwrap();
    assert_eq!(identity.id_key_digest, identity.author_key_digest);
    // It is for two vCPUs and no other number.
    let options = podvisor_snp::launch::LaunchOptions::default();
    assert!(podvisor_snp::launch::check(&plan, 2, &options).is_ok());
    assert!(podvisor_snp::launch::check(&plan, 1, &options).is_err());
}

#[test]
fn what_is_wrong_is_said_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("empty"), "").unwrap();
    fs::write(dir.join("text"), "no kernel, no key").unwrap();
    let long = "x".repeat(3000);
    let kernel = ["igvm", "build", "--kernel", "vmlinuz", "--output", "image"];
    let cases: [(&[&str], &str, i32); 9] = [
        (
            &["igvm", "build", "--kernel", "text", "--output", "image"],
            "--kernel text: neither a bzImage",
            1,
        ),
        (
            &["igvm", "build", "--kernel", "empty", "--output", "image"],
            "--kernel empty: empty",
            1,
        ),
        (&["--cmdline", &long], "2047", 1),
        (&["--policy", "0x10000"], "bit 17", 2),
        (&["--id-key", "text"], "--id-key text: P-384 key", 1),
        (
            &["--id-key", "text", "--platform", "native"],
            "--id-key: an ID block",
            2,
        ),
        (&["--author-key", "text"], "--id-key", 2),
        (&["--vcpus", "300"], "251", 2),
        (&["--max-vcpus", "300"], "1 to 251", 1),
    ];
    for (args, reason, code) in cases {
        let args: Vec<_> = if args[0] == "igvm" {
            args.to_vec()
        } else {
            kernel.iter().chain(args).copied().collect()
        };
        let output = podvisor(dir, &args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(reason), "{args:?}: {error}");
        assert_eq!(output.status.code(), Some(code), "{args:?}");
    }
    let output = podvisor(dir, &["igvm", "build", "--kernel", "vmlinuz", "--output", "/dev/null"]);
    assert!(!output.status.success());
    assert!(!dir.join("image").exists());
}

/// What the schema of SPDX 2.3 (spdx-schema.json) requires, and that references lead somewhere.
fn check_spdx(document: &Value) {
    let has = |object: &Value, fields: &[&str]| {
        for field in fields {
            assert!(
                object[field].as_str().is_some_and(|text| !text.is_empty()),
                "{field} in {object}"
            );
        }
    };
    has(
        document,
        &["SPDXID", "spdxVersion", "name", "dataLicense", "documentNamespace"],
    );
    assert_eq!(
        (&document["SPDXID"], &document["spdxVersion"]),
        (&"SPDXRef-DOCUMENT".into(), &"SPDX-2.3".into())
    );
    let creation = &document["creationInfo"];
    assert_eq!(creation["created"], "2023-11-14T22:13:20Z");
    assert!(
        creation["creators"]
            .as_array()
            .unwrap()
            .iter()
            .all(|who| who.as_str().unwrap().starts_with("Tool: "))
    );
    let mut ids = vec!["SPDXRef-DOCUMENT"];
    for package in document["packages"].as_array().unwrap() {
        has(package, &["SPDXID", "name", "downloadLocation"]);
        let id = package["SPDXID"].as_str().unwrap();
        let rest = id.strip_prefix("SPDXRef-").unwrap();
        assert!(
            rest.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte)),
            "{id}"
        );
        assert!(!ids.contains(&id), "{id} twice");
        ids.push(id);
        for checksum in package["checksums"].as_array().into_iter().flatten() {
            has(checksum, &["algorithm", "checksumValue"]);
            let len = match checksum["algorithm"].as_str().unwrap() {
                "SHA256" => 64,
                "SHA384" => 96,
                other => panic!("{other}"),
            };
            assert_eq!(checksum["checksumValue"].as_str().unwrap().len(), len);
        }
        for note in package["annotations"].as_array().into_iter().flatten() {
            has(note, &["annotationDate", "annotationType", "annotator", "comment"]);
            assert_eq!(note["annotationType"], "OTHER");
        }
    }
    for relation in document["relationships"].as_array().unwrap() {
        has(relation, &["spdxElementId", "relatedSpdxElement", "relationshipType"]);
        for end in ["spdxElementId", "relatedSpdxElement"] {
            assert!(ids.contains(&relation[end].as_str().unwrap()), "{relation}");
        }
    }
}

#[test]
fn the_bill_of_materials_names_all_that_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    build(dir, &["--max-vcpus", "4"]);
    let document: Value = serde_json::from_slice(&fs::read(dir.join("image.spdx.json")).unwrap()).unwrap();
    check_spdx(&document);
    let package = |name: &str| {
        let packages = document["packages"].as_array().unwrap();
        packages.iter().find(|package| package["name"] == name).unwrap().clone()
    };
    let sum = |file: &str| {
        let output = Command::new("sha256sum").arg(dir.join(file)).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    for file in ["vmlinuz", "initrd"] {
        assert_eq!(package(file)["checksums"][0]["checksumValue"], sum(file));
    }
    assert_eq!(package("podvisor-stage0")["checksums"].as_array().unwrap().len(), 2);
    let notes = package("image")["annotations"].to_string();
    assert!(notes.contains("kernel command line: console=ttyS0 quiet"));
    for vcpus in ["1", "2", "3", "4"] {
        let digest = said(dir, &["measure", "image", "--vcpus", vcpus]);
        assert!(
            notes.contains(&format!("vCPUs: {vcpus}: SHA-384 {}", digest.trim())),
            "{vcpus}"
        );
    }
    // Elsewhere, or not at all.
    build(dir, &["--output", "other", "--sbom", "none"]);
    build(dir, &["--output", "third", "--sbom", "bill"]);
    assert!(!dir.join("other.spdx.json").exists() && !dir.join("third.spdx.json").exists());
    check_spdx(&serde_json::from_slice(&fs::read(dir.join("bill")).unwrap()).unwrap());
}
