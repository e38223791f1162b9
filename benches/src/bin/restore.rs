//! Restoring a pod: from the start of `podvisor --restore` to the first byte that its guest writes, by the size of its
//! memory, all of which the guest had written to. Beside it, what the same process takes to boot such a guest to its
//! first byte, when it fills no memory.
#![expect(clippy::print_stdout, reason = "a command-line program")]

use std::error::Error;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use podvisor_benches::process::{Memory, cpu_time};
use podvisor_benches::stats::summary;

/// Measures the restore of pods of several sizes.
#[derive(Parser)]
struct Options {
    /// The podvisor to measure.
    #[arg(long, default_value = "target/release/podvisor")]
    podvisor: PathBuf,
    /// Sizes of memory, MiB; at most 3072, which the guest reaches.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,3072")]
    sizes: Vec<u32>,
    /// Further memory above 4 GiB that no guest has touched, MiB, of the last size.
    #[arg(long, default_value_t = 1024)]
    untouched: u32,
    /// Where snapshots are written: as much space as the largest memory.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Counted runs of each, after two that are not counted.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// A child that does not outlive its measurement.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Sample {
    wall_ms: f64,
    cpu_ms: f64,
    rss_kib: f64,
}

/// What is read off a run.
type Figure = fn(&Sample) -> f64;

const FIGURES: [(&str, Figure); 3] = [
    ("wall_ms", |s| s.wall_ms),
    ("cpu_ms", |s| s.cpu_ms),
    ("rss_kib", |s| s.rss_kib),
];

const MIB: u64 = 1 << 20;

fn compile(out: &Path, end: u64) -> Result<(), Box<dyn Error>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/fill.S");
    let status = Command::new("cc")
        .args(["-m64", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none"])
        .arg(format!("-DEND={end:#x}"))
        .arg("-o")
        .arg(out)
        .arg(&source)
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cc could not build {}", source.display()).into())
    }
}

/// Starts podvisor with `args` and waits for the guest's first byte.
fn first_byte(podvisor: &Path, args: &[String]) -> Result<(Monitor, Duration), Box<dyn Error>> {
    let begin = Instant::now();
    let child = Command::new(podvisor)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut monitor = Monitor(child);
    let mut output = monitor.0.stdout.take().ok_or("no standard output")?;
    output.read_exact(&mut [0])?;
    let elapsed = begin.elapsed();
    // Whoever reads on keeps the guest from waiting; nobody does, and the pipe takes enough.
    monitor.0.stdout = Some(output);
    Ok((monitor, elapsed))
}

fn sample(podvisor: &Path, args: &[String]) -> Result<Sample, Box<dyn Error>> {
    let (monitor, elapsed) = first_byte(podvisor, args)?;
    let pid = monitor.0.id();
    Ok(Sample {
        wall_ms: elapsed.as_secs_f64() * 1e3,
        cpu_ms: cpu_time(pid)?.as_secs_f64() * 1e3,
        rss_kib: Memory::of(pid)?.rss_kib as f64,
    })
}

fn ctl(podvisor: &Path, socket: &Path, args: &[&str]) -> Result<(), Box<dyn Error>> {
    let status = Command::new(podvisor)
        .args(["ctl", "--api-socket"])
        .arg(socket)
        .args(args)
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("podvisor ctl {args:?} failed").into())
    }
}

fn pod(kernel: &Path, memory: u64) -> Vec<String> {
    let kernel = kernel.to_string_lossy();
    let memory = format!("size={memory}");
    let args = [
        "--kernel",
        &kernel,
        "--cpus",
        "boot=1",
        "--memory",
        &memory,
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    args.map(str::to_owned).to_vec()
}

/// Boots a guest that fills its memory, and saves it into `dir`; how long that took.
fn save(options: &Options, dir: &Path, filled: u64, memory: u64) -> Result<Duration, Box<dyn Error>> {
    std::fs::create_dir_all(dir)?;
    let (kernel, socket, snapshot) = (dir.join("kernel"), dir.join("api"), dir.join("snapshot"));
    compile(&kernel, filled)?;
    std::fs::create_dir(&snapshot)?;
    let mut args = vec!["--api-socket".to_owned(), socket.to_string_lossy().into_owned()];
    args.extend(pod(&kernel, memory));
    let (_monitor, _) = first_byte(&options.podvisor, &args)?;
    ctl(&options.podvisor, &socket, &["pause"])?;
    let begin = Instant::now();
    ctl(
        &options.podvisor,
        &socket,
        &["snapshot", &format!("file://{}", snapshot.display())],
    )?;
    Ok(begin.elapsed())
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let dir = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = dir.join(format!("podvisor-restore-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = measure(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn measure(options: &Options, dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut json = serde_json::Map::new();
    let small = dir.join("small");
    compile(&small, 5 * MIB)?;
    let mut commands = vec![("boot".to_owned(), pod(&small, 1024 * MIB))];
    for (at, size) in options.sizes.iter().enumerate() {
        let filled = u64::from(*size).min(3072) * MIB;
        let last = at + 1 == options.sizes.len();
        let memory = filled + if last { u64::from(options.untouched) * MIB } else { 0 };
        let dir = dir.join(format!("{size}"));
        let took = save(options, &dir, filled, memory)?;
        let name = format!("restore {} MiB", memory / MIB);
        json.insert(
            format!("save {} MiB, ms", memory / MIB),
            serde_json::json!(took.as_millis()),
        );
        if !options.json {
            println!("saving {} MiB took {} ms", memory / MIB, took.as_millis());
        }
        let source = format!("source_url=file://{}/snapshot,resume=on", dir.display());
        commands.push((name, vec!["--restore".to_owned(), source]));
    }
    let mut samples: Vec<Vec<Sample>> = commands.iter().map(|_| Vec::new()).collect();
    for round in 0..options.runs + 2 {
        for ((_, args), samples) in commands.iter().zip(&mut samples) {
            let one = sample(&options.podvisor, args)?;
            if round >= 2 {
                samples.push(one);
            }
        }
    }
    for (figure, of) in FIGURES {
        for ((name, _), samples) in commands.iter().zip(&samples) {
            let s = summary(&samples.iter().map(of).collect::<Vec<_>>()).ok_or("no runs")?;
            json.insert(
                format!("{name} {figure}"),
                serde_json::json!({"min": s.min, "median": s.median, "p90": s.p90}),
            );
            if !options.json {
                println!(
                    "{figure:<10} {name:<18} {:>10.2} {:>10.2} {:>10.2}",
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
