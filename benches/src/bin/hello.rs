//! The whole life of the smallest pod, podvisor beside the bare-KVM floor: a PVH guest with 2 GiB of RAM that prints
//! OK and powers off. Runs are interleaved; printed are medians and the ratio of the medians.
#![expect(clippy::print_stdout, reason = "a command-line program")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use podvisor_benches::process::{Run, run};
use podvisor_benches::stats::summary;

/// Compares podvisor with the least that KVM itself costs.
#[derive(Parser)]
struct Options {
    /// The podvisor to measure.
    #[arg(long, default_value = "target/release/podvisor")]
    podvisor: PathBuf,
    /// Counted runs of each, after two that are not counted.
    #[arg(long, default_value_t = 40)]
    runs: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

fn compile(out: &Path, source: &str, flags: &[&str]) -> Result<String, Box<dyn Error>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest").join(source);
    let status = Command::new("cc")
        .args(flags)
        .arg("-o")
        .arg(out)
        .arg(&source)
        .status()?;
    if !status.success() {
        return Err(format!("cc could not build {}", source.display()).into());
    }
    Ok(out.to_string_lossy().into_owned())
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let dir = std::env::temp_dir().join(format!("podvisor-hello-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = measure(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn measure(options: &Options, dir: &Path) -> Result<(), Box<dyn Error>> {
    let hello = compile(
        &dir.join("hello"),
        "hello.S",
        &["-m64", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none"],
    )?;
    let floor = compile(&dir.join("floor"), "floor.c", &["-O2"])?;
    let podvisor = options.podvisor.to_string_lossy().into_owned();
    let pod = [
        "--kernel",
        &hello,
        "--cpus",
        "boot=1",
        "--memory",
        "size=2G",
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    let commands = [
        ("floor", vec![floor, hello.clone()]),
        (
            "podvisor",
            std::iter::once(podvisor)
                .chain(pod.iter().map(ToString::to_string))
                .collect(),
        ),
    ];
    let mut samples: [Vec<Run>; 2] = [Vec::new(), Vec::new()];
    for round in 0..options.runs + 2 {
        for ((name, argv), runs) in commands.iter().zip(&mut samples) {
            let one = run(argv)?;
            if one.exit_code != Some(0) {
                return Err(format!("{name} ended with {:?}: {argv:?}", one.exit_code).into());
            }
            if round >= 2 {
                runs.push(one);
            }
        }
    }
    report(options, &commands.map(|(name, _)| name), &samples)
}

/// What is read off a run.
type Figure = fn(&Run) -> f64;

const FIGURES: [(&str, Figure); 4] = [
    ("wall_ms", |r| r.wall_ms),
    ("cpu_ms", |r| r.cpu_ms),
    ("peak_rss_kib", |r| r.peak_rss_kib as f64),
    ("minor_faults", |r| r.minor_faults as f64),
];

fn report(options: &Options, names: &[&str; 2], samples: &[Vec<Run>; 2]) -> Result<(), Box<dyn Error>> {
    let mut json = serde_json::Map::new();
    if !options.json {
        println!(
            "{:<14} {:>10} {:>12} {:>12} {:>12}",
            "figure", "", "min", "median", "p90"
        );
    }
    for (figure, of) in FIGURES {
        let mut medians = Vec::new();
        for (name, runs) in names.iter().zip(samples) {
            let s = summary(&runs.iter().map(of).collect::<Vec<_>>()).ok_or("no runs")?;
            medians.push(s.median);
            json.insert(
                format!("{name}_{figure}"),
                serde_json::json!({"min": s.min, "median": s.median, "p90": s.p90}),
            );
            if !options.json {
                println!(
                    "{figure:<14} {name:>10} {:>12.2} {:>12.2} {:>12.2}",
                    s.min, s.median, s.p90
                );
            }
        }
        if let [floor, podvisor] = medians.as_slice() {
            json.insert(format!("ratio_{figure}"), serde_json::json!(podvisor / floor));
            if !options.json {
                println!("{figure:<14} {:>10} {:>25.2}", "ratio", podvisor / floor);
            }
        }
    }
    if options.json {
        println!("{}", serde_json::Value::Object(json));
    }
    Ok(())
}
