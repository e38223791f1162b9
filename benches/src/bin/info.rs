//! How long `vm.info` and `vm.add-disk` take: a pod with 20 devices whose guest halts; several clients that ask at once for
//! `vm.info`, each on a connection of its own that it keeps; then one that adds disks until the bus is full. Printed are the
//! percentiles of all answers.
#![expect(clippy::print_stdout, reason = "a command-line program")]

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use podvisor_benches::process::cpu_time;

/// Measures `vm.info` and `vm.add-disk`.
#[derive(Parser)]
struct Options {
    /// The podvisor to measure.
    #[arg(long, default_value = "target/release/podvisor")]
    podvisor: PathBuf,
    /// Clients at once.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Counted requests of each, after 100 that are not counted.
    #[arg(long, default_value_t = 5000)]
    requests: usize,
    /// What a client waits between an answer and its next request, microseconds.
    #[arg(long, default_value_t = 1000)]
    pause: u64,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// How long a monitor may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of a client that are not counted.
const WARM_UP: usize = 100;
/// The pod's disks; entropy source, balloon, persistent memory and vsock make 20 devices of them.
const DISKS: usize = 16;
/// What is left of the 31 slots of its bus.
const FREE_SLOTS: usize = 11;

/// A child that does not outlive its measurement.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks for `endpoint`; the length of the answer's body.
fn ask(stream: &mut UnixStream, endpoint: &str, buffer: &mut Vec<u8>) -> io::Result<usize> {
    write!(
        stream,
        "GET /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"
    )?;
    answer(stream, endpoint, buffer)
}

/// Adds the disk at `path`.
fn add_disk(stream: &mut UnixStream, path: &Path, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let body = serde_json::json!({"path": path, "image_type": "Raw"}).to_string();
    let length = body.len();
    let request =
        format!("PUT /api/v1/vm.add-disk HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes())?;
    answer(stream, "vm.add-disk", buffer)
}

/// Waits for the answer to a request; the length of its body.
fn answer(stream: &mut UnixStream, endpoint: &str, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let broken = || io::Error::other(format!("{endpoint} was not answered with 200"));
    buffer.resize(1 << 16, 0);
    let mut len = 0;
    loop {
        let n = stream.read(buffer.get_mut(len..).unwrap_or_default())?;
        len += n;
        let text = buffer.get(..len).unwrap_or_default();
        if n == 0 || !text.starts_with(b"HTTP/1.1 200") {
            return Err(broken());
        }
        let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(text.get(..end).unwrap_or_default());
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.and_then(|n| n.parse().ok()).ok_or_else(broken)?;
        if len >= end + 4 + length {
            return Ok(length);
        }
    }
}

fn kernel(dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/idle.S");
    let out = dir.join("idle");
    let status = Command::new("cc")
        .args([
            "-m64",
            "-nostdlib",
            "-static",
            "-Wl,-Ttext=0x100000,--build-id=none",
            "-o",
        ])
        .arg(&out)
        .arg(&source)
        .status()?;
    if status.success() {
        Ok(out)
    } else {
        Err(format!("cc could not build {}", source.display()).into())
    }
}

/// Starts the pod; it answers when this returns.
fn start(options: &Options, dir: &Path) -> Result<(Monitor, PathBuf), Box<dyn Error>> {
    let mut disks = Vec::new();
    for index in 0..DISKS {
        let path = dir.join(format!("disk{index}"));
        File::create(&path)?.set_len(1 << 20)?;
        disks.push(format!("path={}", path.display()));
    }
    let pmem = dir.join("pmem");
    File::create(&pmem)?.set_len(2 << 20)?;
    let socket = dir.join("api");
    let child = Command::new(&options.podvisor)
        .arg("--api-socket")
        .arg(&socket)
        .arg("--kernel")
        .arg(kernel(dir)?)
        .args([
            "--memory",
            "size=512M",
            "--serial",
            "null",
            "--console",
            "off",
            "--balloon",
            "size=0",
        ])
        .args(["--pmem", &format!("file={}", pmem.display())])
        .args(["--vsock", &format!("cid=3,socket={}", dir.join("vsock").display())])
        .arg("--disk")
        .args(&disks)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let mut monitor = Monitor(child);
    let begin = Instant::now();
    let mut buffer = Vec::new();
    loop {
        let answered = UnixStream::connect(&socket).and_then(|mut stream| ask(&mut stream, "vm.info", &mut buffer));
        match answered {
            Ok(_) => return Ok((monitor, socket)),
            Err(error) if begin.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        if let Some(status) = monitor.0.try_wait()? {
            return Err(format!("{} ended with {status}", options.podvisor.display()).into());
        }
    }
}

/// One client's answers, microseconds.
fn client(socket: &Path, options: &Options) -> io::Result<(Vec<f64>, usize)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut times, mut buffer, mut length) = (Vec::with_capacity(options.requests), Vec::new(), 0);
    for round in 0..WARM_UP + options.requests {
        let begin = Instant::now();
        length = ask(&mut stream, "vm.info", &mut buffer)?;
        if round >= WARM_UP {
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        if options.pause > 0 {
            std::thread::sleep(Duration::from_micros(options.pause));
        }
    }
    Ok((times, length))
}

/// The answers to disks that are added until the bus is full, microseconds.
fn hotplug(socket: &Path, dir: &Path) -> io::Result<Vec<f64>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut times, mut buffer) = (Vec::new(), Vec::new());
    for index in DISKS..DISKS + FREE_SLOTS {
        let path = dir.join(format!("disk{index}"));
        File::create(&path)?.set_len(1 << 20)?;
        let begin = Instant::now();
        add_disk(&mut stream, &path, &mut buffer)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let dir = std::env::temp_dir().join(format!("podvisor-info-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = measure(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn measure(options: &Options, dir: &Path) -> Result<(), Box<dyn Error>> {
    let (monitor, socket) = start(options, dir)?;
    let before = cpu_time(monitor.0.id())?;
    let results: Vec<io::Result<_>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..options.clients)
            .map(|_| scope.spawn(|| client(&socket, options)))
            .collect();
        let ended = clients.into_iter().map(|client| client.join());
        ended
            .map(|result| result.unwrap_or_else(|_| Err(io::Error::other("a client ended early"))))
            .collect()
    });
    let cpu = cpu_time(monitor.0.id())?.saturating_sub(before);
    let (mut times, mut length) = (Vec::new(), 0);
    for result in results {
        let (one, bytes) = result?;
        times.extend(one);
        length = bytes;
    }
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(f64::NAN);
    let asked = times.len() + options.clients * WARM_UP;
    let cpu_us = cpu.as_secs_f64() * 1e6 / asked as f64;
    let figures = [
        ("min", at(0)),
        ("p50", at(50)),
        ("p95", at(95)),
        ("p99", at(99)),
        ("cpu", cpu_us),
    ];
    let added = hotplug(&socket, dir)?;
    let of = |index: usize| added.get(index).copied().unwrap_or(f64::NAN);
    let added = [
        ("add-disk min", of(0)),
        ("add-disk p50", of(FREE_SLOTS / 2)),
        ("add-disk max", of(FREE_SLOTS - 1)),
    ];
    if options.json {
        let mut json: serde_json::Map<_, _> = (figures.iter().chain(&added))
            .map(|(name, us)| (format!("{}_us", name.replace([' ', '-'], "_")), serde_json::json!(us)))
            .collect();
        json.insert("body_bytes".to_owned(), serde_json::json!(length));
        println!("{}", serde_json::Value::Object(json));
        return Ok(());
    }
    println!(
        "vm.info, {} clients, {} answers of {length} bytes, microseconds",
        options.clients,
        times.len()
    );
    for (name, us) in figures.iter().chain(&added) {
        println!("{name:<12} {us:>10.1}");
    }
    Ok(())
}
