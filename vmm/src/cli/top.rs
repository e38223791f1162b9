//! `podvisor top`: a pod and its monitor, watched live: over the API what any client may ask, from `/proc` what the host
//! knows of the process. Nothing is changed. How a sample looks is in `frame`.

mod frame;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podvisor_api::http::Client;
use serde_json::Value;

use super::{Failure, print};

const EXAMPLES: &str = "\
Examples:
  podvisor top --api-socket /run/pod/api.sock
  podvisor top --api-socket /run/pod/api.sock -n 1
  podvisor top --api-socket /run/pod/api.sock --json --interval 5 | jq .vcpus
On a terminal the view is redrawn in place; into a pipe it is written one below the other. Rates are those of the last
interval, and - where there is none yet.";

/// `podvisor top`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TopArgs {
    /// The monitor's API socket: PATH or path=PATH.
    #[arg(long, value_name = "PATH")]
    api_socket: String,
    /// Seconds between two looks, from 0.05 on.
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// How often to look; for ever if it is not given.
    #[arg(short = 'n', value_name = "COUNT")]
    count: Option<u64>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.05..=86400.0).contains(&seconds) {
        return Err("give 0.05 to 86400 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Ticks of `/proc` a second: USER_HZ, 100 in the x86 ABI whatever the kernel's own (Linux `asm-generic/param.h`).
const TICKS: f64 = 100.0;
/// Longest wait for an answer: a step of the pod's may hold vm.info up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What there is to see at one moment.
#[derive(Debug, Default)]
struct Sample {
    at: Duration,
    pid: i64,
    version: String,
    /// vm.info; null while there is no pod.
    info: Value,
    /// By device and name.
    counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// CPU ticks of each vCPU thread, in the order of their numbers.
    vcpus: BTreeMap<u32, u64>,
    /// CPU ticks of the monitor's other threads.
    other: u64,
    threads: usize,
    /// KiB; none where `/proc` does not show the process.
    resident: Option<u64>,
}

/// Looks at the monitor behind `client`.
fn look(client: &mut Client, start: Instant) -> io::Result<Sample> {
    let mut ask = |endpoint| -> io::Result<Value> {
        let reply = client.request("GET", endpoint, None)?;
        Ok(match reply.status {
            200 => serde_json::from_slice(&reply.body)?,
            _ => Value::Null,
        })
    };
    let ping = ask("vmm.ping")?;
    let info = ask("vm.info")?;
    let counters = serde_json::from_value(ask("vm.counters")?).unwrap_or_default();
    let pid = ping.get("pid").and_then(Value::as_i64).unwrap_or_default();
    let mut sample = Sample {
        at: start.elapsed(),
        pid,
        version: text(&ping, "version"),
        info,
        counters,
        resident: resident(pid),
        ..Sample::default()
    };
    for (name, ticks) in threads(pid) {
        sample.threads += 1;
        match name.strip_prefix("vcpu").and_then(|n| n.parse().ok()) {
            Some(index) => drop(sample.vcpus.insert(index, ticks)),
            None => sample.other += ticks,
        }
    }
    Ok(sample)
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// VmRSS of a process, in KiB.
fn resident(pid: i64) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// Name and CPU ticks of the threads of a process. A thread that ends meanwhile is left out.
fn threads(pid: i64) -> Vec<(String, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let stats = tasks.into_iter().flatten().flatten();
    stats
        .filter_map(|task| thread(&std::fs::read_to_string(task.path().join("stat")).ok()?))
        .collect()
}

/// Name and CPU ticks from a line of `stat` (proc_pid_stat(5): utime and stime are fields 14 and 15).
fn thread(stat: &str) -> Option<(String, u64)> {
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    // The first of `rest` is field 3.
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((name.to_owned(), ticks()?.saturating_add(ticks()?)))
}

/// Watches the monitor until it ends, or as often as was asked.
pub(super) fn run(args: &TopArgs) -> Result<(), Failure> {
    let path = PathBuf::from(args.api_socket.strip_prefix("path=").unwrap_or(&args.api_socket));
    let failed = |error: io::Error| Failure::runtime(format!("--api-socket {}: {error}", path.display()));
    let mut client = Client::connect(&path).map_err(failed)?;
    client.set_timeout(Some(PATIENCE)).map_err(failed)?;
    let redraw = io::stdout().is_terminal() && !args.json;
    let start = Instant::now();
    let mut before: Option<Sample> = None;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let now = match (look(&mut client, start), &before) {
            (Ok(now), _) => now,
            (Err(error), None) => return Err(failed(error)),
            (Err(_), Some(last)) => return print(&format!("podvisor {} has ended", last.pid)),
        };
        let shown = if args.json {
            frame::json(&now, before.as_ref()).to_string()
        } else {
            frame::page(&now, before.as_ref())
        };
        print(&match (redraw, args.json || before.is_none()) {
            // From the upper left corner on, and what was below is gone.
            (true, _) => format!("\x1b[H\x1b[J{shown}"),
            (false, true) => shown,
            // Pages below each other have a line between them.
            (false, false) => format!("\n{shown}"),
        })?;
        before = Some(now);
        left -= 1;
        if left > 0 {
            std::thread::sleep(args.interval);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_line_is_read_whatever_its_name() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4194304 200 0 0 0 12 30 0 0 20 0 3 0 100 1 2";
        assert_eq!(thread(line), Some(("a) b (c".to_owned(), 42)));
        assert_eq!(thread("7 (vcpu0) S 1"), None);
        assert_eq!(thread(""), None);
    }

    #[test]
    fn this_process_is_seen() {
        let pid = i64::from(std::process::id());
        assert!(!threads(pid).is_empty());
        assert!(resident(pid).unwrap() > 0);
        assert_eq!((threads(-1).len(), resident(-1)), (0, None));
    }

    #[test]
    fn intervals_are_bounded() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "NaN", "inf", "1e9", "soon"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
