//! Quantities against Kubernetes' own rules and an independent big-number computation, and the sizing table.

use super::*;
use podvisor_api::types::Quantity as Text;
use proptest::prelude::*;

fn pod(handler: &str, memory: Option<&str>, cpu: Option<&str>) -> PodConfig {
    let text = |t: &str| Text(t.to_owned());
    PodConfig {
        handler: handler.to_owned(),
        memory_limit: memory.map(text),
        cpu_limit: cpu.map(text),
    }
}

fn mib_and_vcpus(handler: &str, memory: Option<&str>, cpu: Option<&str>) -> (u64, u32) {
    let sizing = size(&pod(handler, memory, cpu)).unwrap();
    assert_eq!(sizing.memory_bytes % MIB, 0);
    (sizing.memory_bytes / MIB, sizing.vcpus)
}

#[test]
fn the_rules_of_both_handlers() {
    let rows = [
        ("kata-cc", None, None, (2048, 1)),
        ("kata-cc", Some("512Mi"), Some("1500m"), (2560, 3)),
        ("kata-cc", Some("512Mi"), Some("1"), (2560, 2)),
        ("kata-cc", Some("1"), Some("1m"), (2049, 2)),
        ("kata-cc", Some("1048577"), None, (2050, 1)),
        ("kata-cc", Some("1G"), None, (2048 + 954, 1)),
        ("kata", None, None, (2048, 1)),
        ("kata", Some("512Mi"), None, (768, 1)),
        ("kata", None, Some("2"), (2048, 3)),
        ("kata", Some("1.5Gi"), Some("0.1"), (1792, 2)),
    ];
    for (handler, memory, cpu, want) in rows {
        assert_eq!(
            mib_and_vcpus(handler, memory, cpu),
            want,
            "{handler} {memory:?} {cpu:?}"
        );
    }
}

#[test]
fn the_largest_limits_are_exact() {
    let most = MAX_MEMORY_LIMIT.to_string();
    assert_eq!(mib_and_vcpus("kata-cc", Some(&most), Some("253")), (64 << 20, 254));
    let above = (MAX_MEMORY_LIMIT + 1).to_string();
    assert!(matches!(
        size(&pod("kata", Some(&above), None)),
        Err(SizingError::TooLarge {
            field: "memory_limit",
            ..
        })
    ));
    assert!(matches!(
        size(&pod("kata", None, Some("253001m"))),
        Err(SizingError::TooLarge { field: "cpu_limit", .. })
    ));
}

#[test]
fn what_cannot_be_is_refused_by_field_value_and_remedy() {
    for bad in ["0", "-1", "-512Mi", "0Ki", "-0.1", "0e9"] {
        let error = size(&pod("kata", Some(bad), None)).unwrap_err();
        assert!(
            matches!(
                error,
                SizingError::NotPositive {
                    field: "memory_limit",
                    ..
                }
            ),
            "{bad}: {error}"
        );
        assert!(error.to_string().contains(bad) && error.to_string().contains("leave it out"));
    }
    for absurd in [
        "1e999",
        "16Ei",
        "9E",
        "99999999999999999999999999999999999999999999999",
        "1e2147483647",
    ] {
        let error = size(&pod("kata-cc", Some(absurd), None)).unwrap_err();
        assert!(matches!(error, SizingError::TooLarge { .. }), "{absurd}: {error}");
    }
    let bad = [
        "",
        " 1",
        "1 ",
        "Mi",
        "1mi",
        "1MI",
        "1KI",
        "1K",
        "1ki",
        "1.2.3",
        "1e",
        "1e+",
        "1e1.5",
        "1Mi1",
        "0x10",
        "1,5",
        ".",
        "+",
        "--1",
        "1e99999999999",
        "one",
        "1\u{661}",
        "1i",
        "1Zi",
    ];
    for bad in bad {
        let error = size(&pod("kata", None, Some(bad))).unwrap_err();
        assert!(
            matches!(error, SizingError::Quantity { field: "cpu_limit", .. }),
            "{bad}: {error}"
        );
    }
    assert!(
        size(&pod("runc", None, None))
            .unwrap_err()
            .to_string()
            .contains("`runc`")
    );
}

#[test]
fn quantities_as_kubernetes_reads_them() {
    let rows: [(&str, u128); 20] = [
        ("1", 1_000_000_000),
        ("+1", 1_000_000_000),
        ("0100", 100_000_000_000),
        (".5", 500_000_000),
        ("5.", 5_000_000_000),
        ("1m", 1_000_000),
        ("1u", 1_000),
        ("1n", 1),
        ("0.1n", 1),
        ("1.0000000001", 1_000_000_001),
        ("1Ki", 1024 * NANO),
        ("0.5Mi", 524_288 * NANO),
        ("1.5Gi", 1_610_612_736 * NANO),
        ("1k", 1000 * NANO),
        ("1E", 1_000_000_000_000_000_000 * NANO),
        ("1E3", 1000 * NANO),
        ("1e3", 1000 * NANO),
        ("1e-3", 1_000_000),
        ("12.5e+1", 125 * NANO),
        ("8Ei", CAP),
    ];
    for (text, nanos) in rows {
        assert_eq!(Quantity::parse(text), Ok(Quantity { negative: false, nanos }), "{text}");
    }
    assert!(Quantity::parse("-1n").unwrap().is_negative() && !Quantity::parse("-0").unwrap().is_negative());
    assert_eq!(Quantity::parse("1e-2147483648").unwrap().nanos, 1);
    assert_eq!(
        Quantity::parse(&format!("0.{}1", "0".repeat(100_000))).unwrap().nanos,
        1
    );
    assert_eq!(Quantity::parse("1500m").unwrap().ceil(3), 1500);
}

proptest! {
    /// Small enough for plain 128-bit arithmetic, computed another way.
    #[test]
    fn exact_values(whole in 0u128..1_000_000, fraction in 0u128..1_000_000, shift in 0usize..7) {
        let suffix = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][shift];
        let value = Quantity::parse(&format!("{whole}.{fraction:06}{suffix}")).unwrap();
        let exact = ((whole * 1_000_000 + fraction) << (10 * shift)) * 1000;
        prop_assert_eq!(value.nanos, exact.min(CAP));
    }

    /// A quantity in exponent form is the same number as with its point moved.
    #[test]
    fn exponents_move_the_point(digits in 1u64..u64::MAX, exponent in -30i32..30) {
        let value = Quantity::parse(&format!("{digits}e{exponent}")).unwrap().nanos;
        let mut exact = u128::from(digits);
        for _ in 0..(exponent + 9).max(0) {
            exact = exact.saturating_mul(10);
        }
        for _ in 0..(-(exponent + 9)).max(0) {
            exact = exact.div_ceil(10);
        }
        prop_assert_eq!(value, exact.min(CAP));
    }

    #[test]
    fn nothing_panics_and_a_size_is_whole_mebibytes(memory in ".{0,24}", cpu in "[-+0-9.eEmkKMGTPinu]{0,12}") {
        if let Ok(sizing) = size(&pod("kata-cc", Some(&memory), Some(&cpu))) {
            prop_assert!(sizing.memory_bytes > 2048 * MIB && sizing.memory_bytes.is_multiple_of(MIB));
            prop_assert!((2..=MAX_VCPUS).contains(&sizing.vcpus));
        }
    }
}
