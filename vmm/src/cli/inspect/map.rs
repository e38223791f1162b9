//! The memory map of an image, for a person: what the launch puts where, lowest address first, and for stage0's images what
//! goes where later.

use std::fmt::Write as _;

use podvisor_firmware::image::read::Stage0Image;
use podvisor_firmware::plan::{LaunchPlan, PageKind, ParameterKind, Platform, Step};
use podvisor_firmware::stage0::abi;
use serde_json::{Value, json};

/// Most ranges that are drawn.
const MOST: usize = 200;

/// A range of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    start: u64,
    end: u64,
    what: String,
    state: &'static str,
}

/// The ranges that `plan` fills, sorted, with the names that `stage0` gives them.
pub(super) fn rows(plan: &LaunchPlan<'_>, stage0: Option<&Stage0Image>) -> Vec<Row> {
    let mut rows: Vec<Row> = plan.steps.iter().flat_map(|step| of_step(plan, step, stage0)).collect();
    rows.sort_by_key(|row| row.start);
    if let Some(image) = stage0 {
        for (what, start, len) in reserved(image) {
            let end = start.saturating_add(len);
            let at = rows.partition_point(|row| row.end <= start);
            if start < end && rows.get(at).is_none_or(|row| row.start >= end) {
                let state = "empty";
                let what = what.to_owned();
                rows.insert(
                    at,
                    Row {
                        start,
                        end,
                        what,
                        state,
                    },
                );
            }
        }
    }
    let mut joined: Vec<Row> = Vec::with_capacity(rows.len());
    for row in rows {
        match joined.last_mut() {
            Some(last) if last.end == row.start && (&last.what, last.state) == (&row.what, row.state) => {
                last.end = row.end;
            }
            _ => joined.push(row),
        }
    }
    joined
}

/// The ranges of one step. Neighbours in an image are one step: it is cut where stage0 has another thing.
fn of_step(plan: &LaunchPlan<'_>, step: &Step<'_>, stage0: Option<&Stage0Image>) -> Vec<Row> {
    let (gpa, len, state, what) = match step {
        Step::Pages { gpa, len, kind, data } => {
            let plain = match kind {
                PageKind::Cpuid => "CPUID table",
                PageKind::Secrets => "secrets",
                _ if data.is_empty() => "zeros",
                _ => "data",
            };
            (*gpa, *len, state(plan.platform, *kind), plain.to_owned())
        }
        Step::Parameters { gpa, area } => {
            let Some(area) = plan.areas.get(*area) else {
                return Vec::new();
            };
            let kinds = area.parameters.iter().map(|parameter| parameter_name(parameter.kind));
            (*gpa, area.len, "host", kinds.collect::<Vec<_>>().join(", "))
        }
        Step::Vcpu { .. } => return Vec::new(),
    };
    let end = gpa.saturating_add(len);
    let mut things: Vec<_> = stage0
        .map(names)
        .into_iter()
        .flatten()
        .filter(|(at, _)| *at > 0 && (gpa..end).contains(at))
        .collect();
    things.sort_by_key(|(at, _)| *at);
    things.dedup_by_key(|(at, _)| *at);
    let mut rows = vec![Row {
        start: gpa,
        end,
        what,
        state,
    }];
    for (start, name) in things {
        let what = name.to_owned();
        match rows.last_mut() {
            Some(last) if last.start == start => last.what = what,
            Some(last) => {
                last.end = start;
                rows.push(Row {
                    start,
                    end,
                    what,
                    state,
                });
            }
            None => {}
        }
    }
    rows
}

/// What becomes of pages of `kind`, in a word.
fn state(platform: Platform, kind: PageKind) -> &'static str {
    match (platform, kind) {
        (_, PageKind::Shared) => "shared",
        (Platform::Native, _) => "loaded",
        (_, PageKind::Normal | PageKind::Zero) => "measured",
        (_, PageKind::Unmeasured) => "unmeasured",
        (_, PageKind::Cpuid | PageKind::Secrets) => "firmware",
    }
}

/// What `state` means.
const STATES: [(&str, &str); 7] = [
    ("measured", "in the launch digest"),
    ("unmeasured", "private, not in the digest"),
    ("shared", "the host can change it; not in the digest"),
    ("firmware", "filled and checked by the processor's firmware"),
    ("host", "filled by the host; not in the digest"),
    ("loaded", "copied to memory"),
    ("empty", "filled by stage0 after it has checked what it copies"),
];

fn parameter_name(kind: ParameterKind) -> &'static str {
    match kind {
        ParameterKind::VpCount => "vCPU count",
        ParameterKind::MemoryMap => "memory map",
        ParameterKind::CommandLine => "command line",
        ParameterKind::Madt => "MADT",
        ParameterKind::Srat => "SRAT",
        ParameterKind::Slit => "SLIT",
        ParameterKind::Pptt => "PPTT",
        ParameterKind::MmioRanges => "MMIO ranges",
        ParameterKind::EnvironmentInfo => "environment",
    }
}

/// Where stage0's image has what.
fn names(image: &Stage0Image) -> [(u64, &'static str); 7] {
    let manifest = &image.manifest;
    [
        (
            abi::MANIFEST_START,
            "manifest: command line, ACPI tables, digests' digest",
        ),
        (abi::STAGE0_START, "stage0"),
        (manifest.chunks, "digests of the chunks"),
        (manifest.kernel.dest, "kernel"),
        (manifest.initrd.dest, "initrd"),
        (manifest.kernel.staged, "kernel, to be copied"),
        (manifest.initrd.staged, "initrd, to be copied"),
    ]
}

/// Where it needs memory that the launch leaves empty.
fn reserved(image: &Stage0Image) -> Vec<(&'static str, u64, u64)> {
    let pages = |len: u64| len.checked_next_multiple_of(4096).unwrap_or(len);
    let mut rows = Vec::new();
    for (name, rest, payload) in [
        ("kernel", "kernel's working memory", image.manifest.kernel),
        ("initrd", "", image.manifest.initrd),
    ] {
        let len = pages(payload.len);
        if payload.staged != payload.dest {
            rows.push((name, payload.dest, len));
        }
        rows.push((
            rest,
            payload.dest.saturating_add(len),
            pages(payload.memory_len).saturating_sub(len),
        ));
    }
    rows
}

/// The ranges as JSON.
pub(super) fn json(rows: &[Row]) -> Value {
    let row = |row: &Row| json!({"gpa": format!("{:#x}", row.start), "bytes": row.end - row.start, "what": row.what, "state": row.state});
    rows.iter().map(row).collect()
}

/// The ranges as a drawing.
pub(super) fn draw(rows: &[Row]) -> String {
    let width = rows
        .iter()
        .take(MOST)
        .map(|row| row.what.len())
        .max()
        .unwrap_or(0)
        .max(20);
    let mut out = String::new();
    let line = format!("{:>12}  +{}+\n", "", "-".repeat(width + 28));
    // Writing to a String does not fail.
    let mut end = None;
    for row in rows.iter().take(MOST) {
        if end.is_some_and(|end| end < row.start) {
            out.push_str(&line);
            let gap = size(row.start - end.unwrap_or(0));
            let _ = writeln!(out, "{:>12}  :{:^2$}:", "", format!("{gap} not touched"), width + 28);
        }
        out.push_str(&line);
        let bytes = size(row.end - row.start);
        let _ = writeln!(
            out,
            "{:>#12x}  | {:<width$} {bytes:>12}  {:<11} |",
            row.start, row.what, row.state
        );
        end = Some(row.end);
    }
    if let Some(end) = end {
        out.push_str(&line);
        let _ = writeln!(out, "{end:>#12x}");
    }
    if let Some(more) = rows.len().checked_sub(MOST).filter(|more| *more > 0) {
        let _ = writeln!(out, "{:>12}  and {more} more ranges; --json has all of them", "");
    }
    for (state, meaning) in STATES {
        if rows.iter().take(MOST).any(|row| row.state == state) {
            let _ = writeln!(out, "{:>12}  {state}: {meaning}", "");
        }
    }
    out
}

/// A number of bytes, rounded.
fn size(bytes: u64) -> String {
    let (whole, unit) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => (10, "KiB"),
        0x10_0000..0x4000_0000 => (20, "MiB"),
        _ => (30, "GiB"),
    };
    let tenths = bytes.saturating_mul(10) >> whole;
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {unit}"),
        (whole, tenth) => format!("{whole}.{tenth} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use podvisor_firmware::image::read::Payloads;
    use podvisor_firmware::stage0::abi::{Manifest, Payload};

    use super::*;

    fn plan() -> LaunchPlan<'static> {
        let mut plan = LaunchPlan::new(Platform::SevSnp);
        for (gpa, len, kind) in [
            (0x1FF_F000, 0x4000, PageKind::Shared),
            (abi::STAGE0_START, 0x2000, PageKind::Normal),
            (abi::STAGE0_START + 0x2000, 0x1000, PageKind::Unmeasured),
            (abi::STAGE0_START + 0x3000, 0x1000, PageKind::Unmeasured),
        ] {
            plan.steps.push(Step::Pages {
                gpa,
                len,
                kind,
                data: Vec::new().into(),
            });
        }
        plan
    }

    #[test]
    fn a_map_is_drawn_by_address() {
        let image = Stage0Image {
            manifest: Manifest {
                kernel: Payload {
                    staged: 0x200_0000,
                    dest: 0x100_0000,
                    len: 0x2800,
                    memory_len: 0x5000,
                    entry: 0,
                },
                chunks: 0x1FF_F000,
                ..Manifest::default()
            },
            command_line: String::new(),
            payloads: Payloads::Match,
        };
        let rows = rows(&plan(), Some(&image));
        let told: Vec<_> = rows
            .iter()
            .map(|row| (row.start, row.end - row.start, &*row.what, row.state))
            .collect();
        assert_eq!(
            told,
            [
                (0x12_0000, 0x2000, "stage0", "measured"),
                (0x12_2000, 0x2000, "zeros", "unmeasured"),
                (0x100_0000, 0x3000, "kernel", "empty"),
                (0x100_3000, 0x2000, "kernel's working memory", "empty"),
                (0x1FF_F000, 0x1000, "digests of the chunks", "shared"),
                (0x200_0000, 0x3000, "kernel, to be copied", "shared"),
            ]
        );
        let drawn = draw(&rows);
        let lines: Vec<_> = drawn.lines().collect();
        assert!(
            lines[1].starts_with("    0x120000  | stage0") && lines[1].ends_with("8 KiB  measured    |"),
            "{drawn}"
        );
        assert!(drawn.contains("14.8 MiB not touched"), "{drawn}");
        assert!(drawn.contains("shared: the host can change it"), "{drawn}");
        let widths: Vec<_> = lines
            .iter()
            .filter(|line| line.ends_with(['|', '+', ':']))
            .map(|line| line.len())
            .collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{drawn}");
    }

    #[test]
    fn a_manifest_that_lies_disturbs_nothing() {
        let odd = |dest, len, memory_len| Payload {
            staged: 0,
            dest,
            len,
            memory_len,
            entry: 0,
        };
        for (dest, len, memory_len) in [
            (abi::STAGE0_START, 0x1000, 0x1000),
            (u64::MAX, u64::MAX, 0),
            (!0xFFF, 0x1000, u64::MAX),
            (0, 0, 0),
        ] {
            let image = Stage0Image {
                manifest: Manifest {
                    kernel: odd(dest, len, memory_len),
                    initrd: odd(dest, len, memory_len),
                    ..Manifest::default()
                },
                command_line: String::new(),
                payloads: Payloads::Match,
            };
            let rows = rows(&plan(), Some(&image));
            assert!(rows.windows(2).all(|pair| pair[0].end <= pair[1].start), "{rows:x?}");
            assert!(!draw(&rows).is_empty());
        }
    }

    #[test]
    fn long_maps_are_cut() {
        let mut plan = LaunchPlan::new(Platform::Native);
        for number in 0..300 {
            plan.steps.push(Step::Pages {
                gpa: number * 0x2000,
                len: 0x1000,
                kind: PageKind::Normal,
                data: vec![1].into(),
            });
        }
        assert!(draw(&rows(&plan, None)).contains("and 100 more ranges"));
    }

    #[test]
    fn sizes_are_rounded() {
        for (bytes, text) in [
            (5, "5 B"),
            (4096, "4 KiB"),
            (1536, "1.5 KiB"),
            (11_592_192, "11 MiB"),
            (u64::MAX, "1717986918.3 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
