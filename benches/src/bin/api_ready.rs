//! From the start of a monitor's process to its first answered `vmm.ping`: wall time, processor time and memory of the
//! process at that moment. Several monitors, or builds of one, are run in turn.
#![expect(clippy::print_stdout, reason = "a command-line program")]

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use podvisor_benches::process::{Memory, cpu_time};
use podvisor_benches::stats::summary;

/// Measures how soon a monitor answers on its API socket.
#[derive(Parser)]
struct Options {
    /// A monitor to measure; it is started with --api-socket PATH. Give it more than once to compare.
    #[arg(
        long = "monitor",
        value_name = "NAME=PATH",
        default_value = "podvisor=target/release/podvisor"
    )]
    monitors: Vec<String>,
    /// Counted runs of each, after two that are not counted.
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// How long a monitor may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(10);

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";

/// One start.
struct Sample {
    wall_ms: f64,
    cpu_ms: f64,
    memory: Memory,
}

/// What is read off a start.
type Figure = fn(&Sample) -> f64;

const FIGURES: [(&str, Figure); 5] = [
    ("wall_ms", |s| s.wall_ms),
    ("cpu_ms", |s| s.cpu_ms),
    ("rss_kib", |s| s.memory.rss_kib as f64),
    ("private_kib", |s| s.memory.private_kib as f64),
    ("minor_faults", |s| s.memory.minor_faults as f64),
];

/// A child that does not outlive its measurement.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(program: &Path, socket: &Path) -> Result<Sample, Box<dyn Error>> {
    let begin = Instant::now();
    let child = Command::new(program)
        .arg("--api-socket")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut monitor = Monitor(child);
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if begin.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => {}
        }
        if let Some(status) = monitor.0.try_wait()? {
            return Err(format!("{} ended with {status} before it served its socket", program.display()).into());
        }
        std::thread::sleep(Duration::from_micros(20));
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(PING)?;
    let mut reply = [0; 1024];
    let length = stream.read(&mut reply)?;
    let wall_ms = begin.elapsed().as_secs_f64() * 1e3;
    let cpu_ms = cpu_time(monitor.0.id())?.as_secs_f64() * 1e3;
    let memory = Memory::of(monitor.0.id())?;
    if !reply.get(..length).unwrap_or_default().starts_with(b"HTTP/1.1 200") {
        return Err(format!("{} did not answer vmm.ping with 200", program.display()).into());
    }
    Ok(Sample {
        wall_ms,
        cpu_ms,
        memory,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let dir = std::env::temp_dir().join(format!("podvisor-api-ready-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = measure(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn measure(options: &Options, dir: &Path) -> Result<(), Box<dyn Error>> {
    let monitors = options
        .monitors
        .iter()
        .map(|text| match text.split_once('=') {
            Some((name, path)) => Ok((name, PathBuf::from(path))),
            None => Err(format!("--monitor {text}: NAME=PATH is needed")),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut samples: Vec<Vec<Sample>> = monitors.iter().map(|_| Vec::new()).collect();
    for round in 0..options.runs + 2 {
        for (index, ((_, program), kept)) in monitors.iter().zip(&mut samples).enumerate() {
            // A path of its own: what a killed monitor leaves must not slow the next.
            let sample = start(program, &dir.join(format!("{round}-{index}.sock")))?;
            if round >= 2 {
                kept.push(sample);
            }
        }
    }
    let mut json = serde_json::Map::new();
    if !options.json {
        println!(
            "{:<14} {:>16} {:>12} {:>12} {:>12}",
            "figure", "", "min", "median", "p90"
        );
    }
    for (figure, of) in FIGURES {
        for ((name, _), samples) in monitors.iter().zip(&samples) {
            let s = summary(&samples.iter().map(of).collect::<Vec<_>>()).ok_or("no runs")?;
            json.insert(
                format!("{name}_{figure}"),
                serde_json::json!({"min": s.min, "median": s.median, "p90": s.p90}),
            );
            if !options.json {
                println!(
                    "{figure:<14} {name:>16} {:>12.2} {:>12.2} {:>12.2}",
                    s.min, s.median, s.p90
                );
            }
        }
    }
    if options.json {
        println!("{}", serde_json::Value::Object(json));
    }
    Ok(())
}
