//! The bill of materials of an image: SPDX 2.3 JSON (spdx.github.io/spdx-spec/v2.3) with what is measured, directly or by
//! its digest: stage0, kernel, initrd, the command line, and the launch digest for each number of vCPUs.

use std::time::{SystemTime, UNIX_EPOCH};

use podvisor_snp::digest::sha384;
use serde_json::{Value, json};

use super::{BuildArgs, Built, sha256};
use crate::hex;

const IMAGE_ID: &str = "SPDXRef-image";

/// The document for an image that holds `stage0`.
pub(super) fn document(args: &BuildArgs, built: &Built<'_>, stage0: &[u8]) -> String {
    let created = timestamp();
    let name = args
        .output
        .file_name()
        .unwrap_or(args.output.as_os_str())
        .to_string_lossy();
    let note = |text: String| {
        json!({
            "annotationDate": created,
            "annotationType": "OTHER",
            "annotator": format!("Tool: podvisor-{}", env!("CARGO_PKG_VERSION")),
            "comment": text,
        })
    };
    let mut notes = vec![note(format!("kernel command line: {}", args.cmdline))];
    if !built.predictions.is_empty() {
        notes.push(note(format!("SEV-SNP guest policy: {:#x}", args.policy)));
    }
    for (vcpus, prediction) in (1u32..).zip(&built.predictions) {
        let digest = hex::encode(&prediction.digest);
        notes.push(note(format!("SEV-SNP launch digest, vCPUs: {vcpus}: SHA-384 {digest}")));
    }
    let mut image = package(IMAGE_ID, &name, "OPERATING-SYSTEM", Vec::new());
    if let Some(object) = image.as_object_mut() {
        object.insert("annotations".to_owned(), json!(notes));
    }
    let stage0 = package(
        "SPDXRef-stage0",
        "podvisor-stage0",
        "FIRMWARE",
        vec![
            ("SHA256", hex::encode(&sha256(stage0))),
            ("SHA384", hex::encode(&sha384(stage0))),
        ],
    );
    let file = |path: &std::path::Path| {
        path.file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned()
    };
    let kernel = hex::encode(&built.kernel_sha256);
    let mut packages = vec![
        image,
        stage0,
        package(
            "SPDXRef-kernel",
            &file(&args.kernel),
            "OPERATING-SYSTEM",
            vec![("SHA256", kernel.clone())],
        ),
    ];
    if let (Some(path), Some((_, digest))) = (&args.initrd, built.initrd) {
        let digest = vec![("SHA256", hex::encode(&digest))];
        packages.push(package("SPDXRef-initrd", &file(path), "ARCHIVE", digest));
    }
    let relation = |from: &str, relation: &str, to: &str| json!({"spdxElementId": from, "relationshipType": relation, "relatedSpdxElement": to});
    let mut relationships = vec![relation("SPDXRef-DOCUMENT", "DESCRIBES", IMAGE_ID)];
    for part in packages.iter().skip(1) {
        relationships.push(relation(
            IMAGE_ID,
            "CONTAINS",
            part["SPDXID"].as_str().unwrap_or_default(),
        ));
    }
    // Another image has another name, the same one the same.
    let identity = sha256(json!([packages, args.cmdline]).to_string().as_bytes());
    let document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": format!("https://spdx.org/spdxdocs/podvisor-igvm-{}", hex::encode(&identity)),
        "creationInfo": {
            "created": created,
            "creators": [format!("Tool: podvisor-{}", env!("CARGO_PKG_VERSION"))],
        },
        "documentDescribes": [IMAGE_ID],
        "packages": packages,
        "relationships": relationships,
    });
    format!("{document:#}\n")
}

fn package(id: &str, name: &str, purpose: &str, checksums: Vec<(&str, String)>) -> Value {
    let mut package = json!({
        "SPDXID": id,
        "name": name,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": purpose,
    });
    if let (false, Some(object)) = (checksums.is_empty(), package.as_object_mut()) {
        let checksums: Vec<_> = checksums
            .into_iter()
            .map(|(algorithm, value)| json!({"algorithm": algorithm, "checksumValue": value}))
            .collect();
        object.insert("checksums".to_owned(), json!(checksums));
    }
    package
}

/// Now, or what SOURCE_DATE_EPOCH says (reproducible-builds.org), as SPDX writes it.
fn timestamp() -> String {
    let given = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|text| text.parse().ok());
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs())
    };
    utc(given.unwrap_or_else(now))
}

/// Seconds since 1970 as YYYY-MM-DDThh:mm:ssZ (days to civil date: Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms"); years after 9999 count as the last second of that one.
fn utc(seconds: u64) -> String {
    const LAST: u64 = 253_402_300_799;
    let seconds = seconds.min(LAST);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
