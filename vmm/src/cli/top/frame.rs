//! How a sample looks: a page of at most 80 columns for people, an object for programs. What comes from the monitor is
//! shown without its control characters.

use serde_json::{Map, Value, json};

use super::{Sample, TICKS, text};
use crate::machine::VCPUS;

const COLUMNS: usize = 80;
/// Width of the bar that shows a vCPU's use.
const BAR: usize = 40;

/// Seconds from `before` to `now`, if there is a sample before of the same process.
fn elapsed(now: &Sample, before: Option<&Sample>) -> Option<f64> {
    let before = before.filter(|before| before.pid == now.pid)?;
    let seconds = now.at.saturating_sub(before.at).as_secs_f64();
    (seconds > 0.0).then_some(seconds)
}

/// Growth a second; a counter that fell was begun anew and has none.
fn rate(now: u64, before: Option<u64>, seconds: Option<f64>) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "shown to three digits")]
    let grown = now.checked_sub(before?)? as f64;
    Some(grown / seconds?)
}

/// Per cent of one host CPU.
fn percent(now: u64, before: Option<u64>, seconds: Option<f64>) -> Option<f64> {
    Some(rate(now, before, seconds)? / TICKS * 100.0)
}

/// A device's counters with their rates.
struct Counter<'s> {
    name: &'s str,
    total: u64,
    rate: Option<f64>,
}

fn counters<'s>(id: &str, now: &'s Sample, before: Option<&Sample>) -> Vec<Counter<'s>> {
    let seconds = elapsed(now, before);
    let earlier = |name: &str| before?.counters.get(id)?.get(name).copied();
    let mine = now.counters.get(id).into_iter().flatten();
    mine.map(|(name, total)| Counter {
        name,
        total: *total,
        rate: rate(*total, earlier(name), seconds),
    })
    .collect()
}

fn devices(sample: &Sample) -> &[Value] {
    let devices = sample.info.pointer("/podvisor/devices").and_then(Value::as_array);
    devices.map(Vec::as_slice).unwrap_or_default()
}

fn vcpus<'s>(now: &'s Sample, before: Option<&'s Sample>) -> impl Iterator<Item = (u32, Option<f64>)> + 's {
    let seconds = elapsed(now, before);
    let earlier = move |index| before?.vcpus.get(index).copied();
    now.vcpus
        .iter()
        .map(move |(index, ticks)| (*index, percent(*ticks, earlier(index), seconds)))
}

fn other(now: &Sample, before: Option<&Sample>) -> Option<f64> {
    percent(now.other, before.map(|before| before.other), elapsed(now, before))
}

fn state(sample: &Sample) -> String {
    match text(&sample.info, "state") {
        none if none.is_empty() => "no pod".to_owned(),
        state => state,
    }
}

/// The sample for programs. Rates are a second's, null where there is no sample before.
pub(super) fn json(now: &Sample, before: Option<&Sample>) -> Value {
    let round = hundredths;
    let device = |device: &Value| {
        let id = text(device, "id");
        let counters = counters_json(&id, now, before);
        json!({
            "id": id,
            "kind": device.get("kind"),
            "bdf": device.get("bdf"),
            "state": device.get("state"),
            "counters": counters,
        })
    };
    let vcpus: Vec<Value> = vcpus(now, before)
        .map(|(index, percent)| json!({"vcpu": index, "cpu_percent": round(percent)}))
        .collect();
    json!({
        "seconds": round(Some(now.at.as_secs_f64())),
        "pid": now.pid,
        "version": now.version,
        "state": now.info.get("state"),
        "vcpus_configured": now.info.pointer("/config/cpus/boot_vcpus"),
        "memory_bytes": now.info.get("memory_actual_size"),
        "isolation": now.info.pointer("/podvisor/isolation"),
        "resident_kib": now.resident,
        "threads": now.threads,
        "monitor_cpu_percent": round(other(now, before)),
        "vcpus": vcpus,
        "exits": counters_json(VCPUS, now, before),
        "devices": devices(now).iter().map(device).collect::<Vec<_>>(),
    })
}

/// A line for each counter of `id` that is not zero.
fn counter_lines<'s>(id: &str, now: &'s Sample, before: Option<&Sample>) -> impl Iterator<Item = String> + use<'s> {
    let counted: Vec<_> = counters(id, now, before).into_iter().filter(|c| c.total > 0).collect();
    counted.into_iter().map(|counter| {
        let rate = counter.rate.map_or_else(|| "-".to_owned(), human);
        #[expect(clippy::cast_precision_loss, reason = "shown to three digits")]
        let total = human(counter.total as f64);
        format!("  {:<56}{rate:>11}{total:>11}", cut(counter.name, 55))
    })
}

/// Counters with their rates, for programs.
fn counters_json(id: &str, now: &Sample, before: Option<&Sample>) -> Map<String, Value> {
    counters(id, now, before)
        .into_iter()
        .map(|c| (c.name.to_owned(), json!({"total": c.total, "rate": hundredths(c.rate)})))
        .collect()
}

fn hundredths(value: Option<f64>) -> Option<f64> {
    value.map(|v| (v * 100.0).round() / 100.0)
}

/// The sample for people, without a line end at its end.
pub(super) fn page(now: &Sample, before: Option<&Sample>) -> String {
    let mut lines = vec![format!("podvisor {} ({})  {}", now.pid, now.version, state(now))];
    lines.extend(pod(now));
    lines.push(monitor(now, before));
    if !now.vcpus.is_empty() {
        lines.push(format!("\n{:<10}{:>7}", "VCPU", "CPU %"));
    }
    for (index, percent) in vcpus(now, before) {
        lines.push(format!(
            "{:<10}{:>7}  {}",
            format!("vcpu{index}"),
            one(percent),
            bar(percent)
        ));
    }
    lines.extend(counter_lines(VCPUS, now, before));
    if !devices(now).is_empty() {
        let heads = ("DEVICE", "KIND", "PLACE", "STATE", "A SECOND", "TOTAL");
        lines.push(format!(
            "\n{:<22}{:<10}{:<14}{:<12}{:>11}{:>11}",
            heads.0, heads.1, heads.2, heads.3, heads.4, heads.5
        ));
    }
    for device in devices(now) {
        let of = |key, width| cut(&text(device, key), width);
        lines.push(format!(
            "{:<22}{:<10}{:<14}{:<12}",
            of("id", 21),
            of("kind", 9),
            of("bdf", 13),
            of("state", 11)
        ));
        lines.extend(counter_lines(&text(device, "id"), now, before));
    }
    let fit = |line: &str| cut(line, COLUMNS).trim_end().to_owned();
    let fitted: Vec<String> = lines.iter().flat_map(|line| line.split('\n')).map(fit).collect();
    fitted.join("\n")
}

fn pod(now: &Sample) -> Option<String> {
    let number = |pointer: &str| now.info.pointer(pointer).and_then(Value::as_u64);
    let (vcpus, memory) = (number("/config/cpus/boot_vcpus")?, number("/memory_actual_size")?);
    let isolation = now.info.pointer("/podvisor/isolation").and_then(Value::as_str);
    Some(format!(
        "pod      vCPUs {vcpus}, memory {} MiB, isolation {}",
        memory >> 20,
        isolation.unwrap_or("-")
    ))
}

fn monitor(now: &Sample, before: Option<&Sample>) -> String {
    let resident = now
        .resident
        .map_or_else(|| "-".to_owned(), |kib| (kib >> 10).to_string());
    format!(
        "monitor  resident {resident} MiB, CPU without vCPUs {} %, threads {}",
        one(other(now, before)),
        now.threads
    )
}

fn one(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
}

/// A vCPU's use as a bar; a vCPU has one host CPU at most.
fn bar(percent: Option<f64>) -> String {
    let share = percent.unwrap_or(0.0).clamp(0.0, 100.0) / 100.0;
    (1..=BAR)
        .map(|mark| {
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let from = (mark as f64 - 0.5) / BAR as f64;
            if share >= from { '#' } else { ' ' }
        })
        .collect()
}

/// Three digits or so, with K, M, G, T for powers of 1000.
fn human(value: f64) -> String {
    let mut value = value;
    for unit in ["", " K", " M", " G", " T"] {
        if value < 999.5 {
            let places = usize::from(!unit.is_empty() && value < 99.95);
            return format!("{value:.places$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.0} P")
}

/// At most `width` characters, none of them a control character.
fn cut(text: &str, width: usize) -> String {
    let shown = text.chars().map(|c| if c.is_control() { '?' } else { c });
    shown.take(width).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    fn sample(seconds: u64, ticks: u64, bytes: u64) -> Sample {
        let counters = BTreeMap::from([("read_bytes".to_owned(), bytes), ("errors".to_owned(), 0)]);
        Sample {
            at: Duration::from_secs(seconds),
            pid: 7,
            version: "1.2.3".to_owned(),
            info: json!({
                "state": "Running",
                "memory_actual_size": 512u64 << 20,
                "config": {"cpus": {"boot_vcpus": 2}},
                "podvisor": {"isolation": "none", "devices": [
                    {"id": "_disk0", "kind": "disk", "bdf": "0000:00:01.0", "state": "active"},
                    {"id": format!("\x1b[2J{}", "x".repeat(200)), "kind": "net", "bdf": "0000:00:02.0", "state": "active"},
                ]},
            }),
            counters: BTreeMap::from([
                ("_disk0".to_owned(), counters),
                (
                    VCPUS.to_owned(),
                    BTreeMap::from([("exits_msr".to_owned(), bytes / 1000)]),
                ),
            ]),
            vcpus: BTreeMap::from([(0, ticks), (1, 5)]),
            other: ticks / 10,
            threads: 3,
            resident: Some(9 << 10),
        }
    }

    #[test]
    fn rates_are_those_of_the_interval() {
        let (before, now) = (sample(1, 100, 1_000), sample(3, 200, 5_001_000));
        let told = json(&now, Some(&before));
        assert_eq!(told["vcpus"][0], json!({"vcpu": 0, "cpu_percent": 50.0}));
        assert_eq!(told["vcpus"][1]["cpu_percent"], 0.0);
        assert_eq!(told["monitor_cpu_percent"], 5.0);
        assert_eq!(
            told["devices"][0]["counters"]["read_bytes"],
            json!({"total": 5_001_000, "rate": 2_500_000.0})
        );
        assert_eq!(told["exits"]["exits_msr"], json!({"total": 5_001, "rate": 2_500.0}));
        let first = json(&now, None);
        assert_eq!(first["vcpus"][0]["cpu_percent"], Value::Null);
        assert_eq!(first["devices"][0]["counters"]["read_bytes"]["rate"], Value::Null);
        // Counters begin anew with a reboot: there is no rate then.
        let again = json(&before, Some(&sample(0, 50, 5_001_000)));
        assert_eq!(again["devices"][0]["counters"]["read_bytes"]["rate"], Value::Null);
    }

    #[test]
    fn the_page_fits_a_terminal_and_cannot_write_to_it() {
        let page = page(&sample(3, 200, 5_001_000), Some(&sample(1, 100, 1_000)));
        for line in page.lines() {
            assert!(line.chars().count() <= COLUMNS && !line.contains('\x1b'), "{line}");
        }
        let expected = [
            "podvisor 7 (1.2.3)  Running",
            "pod      vCPUs 2, memory 512 MiB, isolation none",
            "monitor  resident 9 MiB, CPU without vCPUs 5.0 %, threads 3",
            "vcpu0        50.0  ####################",
            "  read_bytes                                                    2.5 M      5.0 M",
            "  exits_msr                                                     2.5 K      5.0 K",
        ];
        for line in expected {
            assert!(page.lines().any(|shown| shown == line), "{line}\n{page}");
        }
        assert!(!page.contains("errors"), "what is zero is not shown:\n{page}");
    }

    #[test]
    fn a_monitor_without_a_pod_has_a_page_too() {
        let told = page(&Sample::default(), None);
        assert_eq!(
            told,
            "podvisor 0 ()  no pod\nmonitor  resident - MiB, CPU without vCPUs - %, threads 0"
        );
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (999.0, "999"),
            (1000.0, "1.0 K"),
            (99_960.0, "100 K"),
            (999_600.0, "1.0 M"),
            (2.5e12, "2.5 T"),
        ];
        for (value, expected) in cases {
            assert_eq!(human(value), expected);
        }
        assert_eq!(human(2e15), "2 P");
    }
}
