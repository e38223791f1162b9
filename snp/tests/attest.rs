//! Reports and their verification, against a second implementation (the `sev` crate). No KVM.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

#[path = "common/guest.rs"]
mod guest;

use std::time::{Duration, UNIX_EPOCH};

use guest::*;
use podvisor_snp::chain::make::{Identity, make, write};
use podvisor_snp::chain::{SigningChain, test_root};
use podvisor_snp::report::Report;
use podvisor_snp::verify::{Certificates, Expectations, Roots, VerifyError, amd_intermediates, verify};
use sev::certs::snp::{Chain, Verifiable};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;

fn certificates() -> Certificates {
    Certificates::from_table(&SigningChain::test_chain().unwrap().certificate_table()).unwrap()
}

fn sev_accepts(report: &[u8], vcek: &[u8]) -> bool {
    let chain = SigningChain::test_chain().unwrap();
    let Ok(chain) = Chain::from_der(&chain.ark, &chain.ask, vcek) else {
        return false;
    };
    AttestationReport::from_bytes(report).is_ok_and(|report| (&chain, &report).verify().is_ok())
}

#[test]
fn a_report_is_believed_by_us_and_by_the_sev_crate() {
    let report = sandbox().report(1, [0x5A; 64]);
    let expected = Expectations {
        digest: Some([0xD1; 48]),
        host_data: Some([0x4D; 32]),
        report_data: Some([0x5A; 64]),
        policy: Some(0x30000),
        vmpl: Some(0),
        ..Expectations::default()
    };
    let verified = verify(&report, &certificates(), &expected, &Roots::emulated()).unwrap();
    assert!(verified.emulated);
    assert_eq!(verified.root, "ARK-Milan");
    assert!(
        verified
            .report
            .chip_id()
            .starts_with(b"PODVISOR EMULATED SEV-SNP - NOT HARDWARE")
    );
    assert!(sev_accepts(&report, &certificates().vcek));
    let parsed = AttestationReport::from_bytes(&report).unwrap();
    assert_eq!((parsed.version, parsed.guest_svn, parsed.vmpl), (3, 0, 0));
    assert_eq!(parsed.measurement[..], [0xD1; 48]);
    assert_eq!(
        (parsed.cpuid_fam_id, parsed.cpuid_mod_id, parsed.cpuid_step),
        (Some(0x19), Some(1), Some(1))
    );
    assert_eq!(parsed.reported_tcb, parsed.committed_tcb);
}

#[test]
fn a_tampered_report_is_refused_by_both() {
    let report = sandbox().report(1, [1; 64]);
    let certificates = certificates();
    for at in (0..0x330).step_by(7).chain([8, 0x50, 0x90, 0xC0, 0x1A0]) {
        let mut changed = report.clone();
        changed[at] ^= 1;
        let ours = verify(&changed, &certificates, &Expectations::default(), &Roots::emulated());
        assert!(ours.is_err(), "byte {at:#x}");
        // The sev crate does not look at the reserved bytes of a TCB and at those past the 48 of R and S.
        let unread = [
            0x3A..0x3E,
            0x182..0x186,
            0x1E2..0x1E6,
            0x1F2..0x1F6,
            0x2D0..0x2E8,
            0x318..0x330,
        ];
        let unread = unread.iter().any(|range| range.contains(&at));
        assert!(unread || !sev_accepts(&changed, &certificates.vcek), "byte {at:#x}");
    }
    for at in [0x330, 0x49F] {
        let mut changed = report.clone();
        changed[at] = 1;
        let ours = verify(&changed, &certificates, &Expectations::default(), &Roots::emulated());
        assert!(
            matches!(ours, Err(VerifyError::Field { field: "reserved", .. })),
            "byte {at:#x}"
        );
    }
    assert!(
        verify(
            &report[1..],
            &certificates,
            &Expectations::default(),
            &Roots::emulated()
        )
        .is_err()
    );
}

#[test]
fn no_root_but_the_named_one_is_believed() {
    let report = sandbox().report(1, [1; 64]);
    let check = |roots: &Roots| verify(&report, &certificates(), &Expectations::default(), roots);
    assert_eq!(check(&Roots::none()), Err(VerifyError::Root(0)));
    let other = make(&Identity::emulated()).unwrap();
    let others = Roots::none().with(&other[0]).unwrap();
    assert_eq!(check(&others), Err(VerifyError::Root(1)), "the same name, another key");
    assert!(check(&others.with(test_root()).unwrap()).is_ok());
    assert!(Roots::none().with(b"nonsense").is_err());

    let dir = tempfile::tempdir().unwrap();
    write(&other, dir.path()).unwrap();
    let own = SigningChain::from_dir(dir.path()).unwrap();
    assert_eq!(own.vcek, other[2]);
    assert!(write(&other, dir.path()).is_err(), "files are not overwritten");
    use std::os::unix::fs::PermissionsExt;
    let key = dir.path().join("vcek-key.der");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(
        SigningChain::from_dir(dir.path()).is_err(),
        "a private key that others can read"
    );
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::copy(dir.path().join("ask.der"), dir.path().join("vcek.der")).unwrap();
    assert!(SigningChain::from_dir(dir.path()).is_err());
}

#[test]
fn certificates_that_do_not_belong_together_are_refused() {
    let report = sandbox().report(1, [1; 64]);
    let other = make(&Identity::emulated()).unwrap();
    let check = |ask: &[u8], vcek: &[u8]| {
        let certificates = Certificates {
            ask: ask.to_vec(),
            vcek: vcek.to_vec(),
        };
        verify(&report, &certificates, &Expectations::default(), &Roots::emulated())
    };
    let ours = certificates();
    assert!(check(&ours.ask, &ours.vcek).is_ok());
    assert!(matches!(
        check(&ours.ask, &other[2]),
        Err(VerifyError::Certificate { which: "VCEK", .. })
    ));
    assert_eq!(check(&other[1], &other[2]), Err(VerifyError::Root(1)));
    assert!(check(&ours.vcek, &ours.vcek).is_err());
    assert!(check(&ours.ask, &ours.ask).is_err());
    assert!(matches!(
        check(&[], &ours.vcek),
        Err(VerifyError::Certificate { which: "ASK", .. })
    ));
    for at in (0..ours.vcek.len()).step_by(11) {
        let mut changed = ours.vcek.clone();
        changed[at] ^= 1;
        assert!(check(&ours.ask, &changed).is_err(), "byte {at} of the VCEK certificate");
    }
}

#[test]
fn certificates_are_valid_for_their_time_only() {
    let report = sandbox().report(1, [1; 64]);
    let check = |seconds| {
        let expected = Expectations {
            at: Some(UNIX_EPOCH + Duration::from_secs(seconds)),
            ..Expectations::default()
        };
        verify(&report, &certificates(), &expected, &Roots::emulated())
    };
    assert!(check(1_800_000_000).is_ok());
    for seconds in [0, 1_700_000_000, 4_000_000_000] {
        assert!(
            matches!(check(seconds), Err(VerifyError::Certificate { .. })),
            "{seconds}"
        );
    }
}

#[test]
fn what_is_not_as_expected_is_named() {
    let report = sandbox().report(1, [1; 64]);
    let refused = |expected: &Expectations| match verify(&report, &certificates(), expected, &Roots::emulated()) {
        Err(VerifyError::Unexpected { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let none = Expectations::default;
    assert_eq!(
        refused(&Expectations {
            digest: Some([0; 48]),
            ..none()
        }),
        "MEASUREMENT"
    );
    assert_eq!(
        refused(&Expectations {
            host_data: Some([0; 32]),
            ..none()
        }),
        "HOST_DATA"
    );
    assert_eq!(
        refused(&Expectations {
            report_data: Some([0; 64]),
            ..none()
        }),
        "REPORT_DATA"
    );
    assert_eq!(
        refused(&Expectations {
            policy: Some(0x20000),
            ..none()
        }),
        "POLICY"
    );
    assert_eq!(
        refused(&Expectations {
            vmpl: Some(1),
            ..none()
        }),
        "VMPL"
    );
    assert_eq!(
        refused(&Expectations {
            id_key_digest: Some([1; 48]),
            ..none()
        }),
        "ID_KEY_DIGEST"
    );
    assert!(Report::from_bytes(&report).is_ok());
}

#[test]
fn amds_roots_are_those_that_the_sev_crate_publishes_and_believe_no_emulated_report() {
    use sev::certs::snp::builtin::{genoa, milan, turin};
    let intermediates: Vec<&[u8]> = amd_intermediates().collect();
    let published = [milan::ask(), genoa::ask(), turin::ask()].map(|ask| ask.unwrap().to_der().unwrap());
    assert_eq!(intermediates, published);
    let report = sandbox().report(1, [1; 64]);
    let all = Expectations::default();
    assert_eq!(
        verify(&report, &certificates(), &all, &Roots::amd()),
        Err(VerifyError::Root(3))
    );
    for (ark, ask) in [milan::ark(), genoa::ark(), turin::ark()].into_iter().zip(published) {
        let ark = ark.unwrap().to_der().unwrap();
        // The ASK is believed with the published root and with the built-in ones alike; then the VCEK is not by it.
        let certificates = Certificates {
            ask,
            vcek: certificates().vcek,
        };
        for roots in [Roots::none().with(&ark).unwrap(), Roots::amd()] {
            let refused = verify(&report, &certificates, &all, &roots);
            assert!(
                matches!(refused, Err(VerifyError::Certificate { which: "VCEK", .. })),
                "{refused:?}"
            );
        }
    }
}

#[test]
fn a_chain_of_another_root_with_the_same_names_is_refused() {
    let report = sandbox().report(1, [1; 64]);
    let forged = make(&Identity::emulated()).unwrap();
    let check = |ask: &[u8], vcek: &[u8], roots: &Roots| {
        let certificates = Certificates {
            ask: ask.to_vec(),
            vcek: vcek.to_vec(),
        };
        verify(&report, &certificates, &Expectations::default(), roots)
    };
    let [ark, ask, vcek, _] = &forged;
    // go-sev-guest before 0.15 took the ASK and ARK that came with the report for roots.
    assert_eq!(check(ask, vcek, &Roots::amd()), Err(VerifyError::Root(3)));
    assert_eq!(check(ask, vcek, &Roots::emulated()), Err(VerifyError::Root(1)));
    assert_eq!(check(ark, vcek, &Roots::emulated()), Err(VerifyError::Root(1)));
    // All its own: the report is not by its VCEK.
    let own = Roots::none().with(ark).unwrap();
    assert_eq!(check(ask, vcek, &own), Err(VerifyError::Signature));
    // A self-signed certificate in the ASK's place issued nothing.
    assert!(matches!(
        check(ark, vcek, &own),
        Err(VerifyError::Certificate { which: "VCEK", .. })
    ));
}
