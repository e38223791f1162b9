//! A sandbox as a shim sets it up: a directory, the paths in it, the monitor's argument vector and its standard streams.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::common::{IDLE, PATIENCE, pvh_kernel, wait_for};
use crate::{go, rust};

/// The shims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shim {
    Go,
    Rust,
}

/// A sandbox's directory and monitor; the monitor is killed on drop.
pub(crate) struct Sandbox {
    pub(crate) shim: Shim,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) child: Child,
    /// The file system daemon, if the sandbox has one; killed on drop.
    pub(crate) virtiofsd: Option<Child>,
    /// What came on the monitor's stdout and stderr; empty for the Go shim, which gives it none.
    pub(crate) output: Vec<Output>,
}

/// One stream of the monitor, read line by line as the Rust shim reads it.
pub(crate) struct Output(Arc<Mutex<Vec<String>>>, std::thread::JoinHandle<()>);

impl Output {
    pub(crate) fn read(stream: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stream).lines() {
                match line {
                    Ok(line) => kept.lock().unwrap().push(line),
                    // The end of a pseudo terminal.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => return,
                    Err(error) => panic!("a line that the shim loses: {error}"),
                }
            }
        });
        Self(lines, reader)
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// Whether the stream has ended, which the Rust shim takes for the sandbox's end.
    pub(crate) fn ended(&self) -> bool {
        self.1.is_finished()
    }

    /// Waits for the end of the stream; every line was text.
    pub(crate) fn finish(self) -> Vec<String> {
        wait_for("the end of a stream", || self.1.is_finished().then_some(()));
        self.1.join().unwrap();
        self.0.lock().unwrap().clone()
    }
}

/// The command line of `shim` in the sandbox directory `dir`, with debugging enabled or not.
pub(crate) fn command(shim: Shim, dir: &Path, debug: bool) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_podvisor")).canonicalize().unwrap());
    command.arg("--api-socket").arg(dir.join(api_name(shim)));
    if debug {
        command.arg("-v");
    }
    if debug || shim == Shim::Rust {
        command.env("RUST_BACKTRACE", "full");
    }
    command.stdin(Stdio::null());
    match shim {
        // The bundle's directory.
        Shim::Go => command.current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null()),
        Shim::Rust => command.current_dir("/").stdout(Stdio::piped()).stderr(Stdio::piped()),
    };
    command
}

fn api_name(shim: Shim) -> &'static str {
    match shim {
        Shim::Go => "clh-api.sock",
        Shim::Rust => "ch-api.sock",
    }
}

impl Sandbox {
    /// The monitor as `shim` starts it.
    pub(crate) fn start(shim: Shim) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let command = command(shim, dir.path(), shim == Shim::Rust);
        Self::spawn(shim, dir, command)
    }

    /// A monitor in `dir` from a command of the test's own.
    pub(crate) fn spawn(shim: Shim, dir: tempfile::TempDir, mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        let mut sandbox = Self {
            shim,
            dir,
            child,
            virtiofsd: None,
            output: Vec::new(),
        };
        sandbox.read_output();
        sandbox
    }

    fn read_output(&mut self) {
        let (out, err) = (self.child.stdout.take(), self.child.stderr.take());
        self.output = Vec::new();
        self.output.extend(out.map(Output::read));
        self.output.extend(err.map(Output::read));
    }

    /// Starts the next monitor with the same paths, as a restarted sandbox does.
    pub(crate) fn start_again(&mut self) {
        self.child = command(self.shim, self.dir.path(), self.shim == Shim::Rust)
            .spawn()
            .unwrap();
        self.read_output();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn api(&self) -> PathBuf {
        self.path(api_name(self.shim))
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.path(match self.shim {
            Shim::Go => "clh.sock",
            Shim::Rust => "ch-vm.sock",
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The Go shim's client, once vmm.ping is answered.
    pub(crate) fn go(&self) -> go::Client {
        let mut client = go::Client::new(&self.api());
        wait_for("vmm.ping", || client.get("vmm.ping").ok());
        client
    }

    /// The Rust shim's client, once vmm.ping is answered.
    pub(crate) fn rust(&self) -> rust::Client {
        let mut client = rust::Client::connect(&self.api());
        client.get("vmm.ping").unwrap();
        client
    }

    /// A connection for bytes of the test's own.
    pub(crate) fn raw(&self) -> UnixStream {
        let stream = wait_for("the API socket", || UnixStream::connect(self.api()).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Writes what boots: a kernel that halts, a root image, a disk.
    pub(crate) fn idle_guest(&self) {
        self.guest(IDLE);
    }

    /// As [`Self::idle_guest`], with code of the test's own.
    pub(crate) fn guest(&self, code: &[u8]) {
        pvh_kernel(&self.path("kernel"), code);
        self.images();
    }

    /// Writes what boots: the pod guest, a root image, a disk.
    pub(crate) fn pod_guest(&self) {
        std::fs::write(self.path("kernel"), podvisor::pod_image::POD_IMAGE).unwrap();
        self.images();
    }

    /// Starts virtiofsd on the sandbox's socket, as a shim does before it starts the monitor: it is the shim's child, and
    /// ends when the monitor leaves it. Debian has two of them, the newer in its own package. False where there is none.
    pub(crate) fn start_virtiofsd(&mut self) -> bool {
        let shared = self.path("shared");
        std::fs::create_dir(&shared).unwrap();
        std::fs::write(shared.join("file"), "contents of the shared file").unwrap();
        let shared = shared.display();
        let new = Path::new("/usr/libexec/virtiofsd");
        let mut command = Command::new(if new.exists() {
            new
        } else {
            Path::new("/usr/lib/qemu/virtiofsd")
        });
        if new.exists() {
            command.args(["--sandbox=chroot", &format!("--shared-dir={shared}")]);
        } else {
            command.args(["-f", "-o", "sandbox=chroot", "-o", &format!("source={shared}")]);
        }
        command.arg(format!("--socket-path={}", self.virtiofs_socket().display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(mut child) = command.spawn() else {
            println!("without a file system: there is no virtiofsd here");
            return false;
        };
        let socket = self.virtiofs_socket();
        let listens = wait_for("virtiofsd", || match child.try_wait().unwrap() {
            Some(_) => Some(false),
            None => socket.exists().then_some(true),
        });
        if listens {
            self.virtiofsd = Some(child);
        } else {
            println!("without a file system: virtiofsd does not run here");
        }
        listens
    }

    pub(crate) fn virtiofs_socket(&self) -> PathBuf {
        self.path("virtiofsd.sock")
    }

    fn images(&self) {
        std::fs::write(self.path("image"), podvisor::demo::pattern::pattern(21, 1 << 20)).unwrap();
        std::fs::write(self.path("volume"), vec![0; 1 << 20]).unwrap();
    }

    /// Waits for the monitor's own end.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        wait_for("the monitor's end", || self.child.try_wait().unwrap())
    }

    /// SIGKILL, and the wait for the child.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(virtiofsd) = &mut self.virtiofsd {
            let _ = virtiofsd.kill();
            let _ = virtiofsd.wait();
        }
        if std::thread::panicking() {
            for output in &self.output {
                println!("{}", output.lines().join("\n"));
            }
        }
    }
}

/// One attempt of a shim to reach the agent: `Ok(None)` when the monitor closes without a word, which means again.
///
/// # Panics
/// When the attempt is left without an answer, or answered with anything but one line that has OK in it.
pub(crate) fn dial(shim: Shim, vsock: &Path, port: u32) -> Option<BufReader<UnixStream>> {
    let word = match shim {
        Shim::Go => "CONNECT",
        Shim::Rust => "connect",
    };
    let mut stream = UnixStream::connect(vsock).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("{word} {port}\n").as_bytes()).ok()?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(0) => None,
        Ok(_) => {
            let host_port = line.strip_prefix("OK ").unwrap().strip_suffix('\n').unwrap();
            host_port.parse::<u32>().unwrap();
            assert!(stream.buffer().is_empty(), "bytes that the agent did not send");
            Some(stream)
        }
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
        Err(error) => panic!("neither answered nor closed: {error}"),
    }
}

/// The agent's stream, dialled as often as it takes.
pub(crate) fn agent(shim: Shim, vsock: &Path) -> BufReader<UnixStream> {
    wait_for("the agent", || dial(shim, vsock, 1024))
}

/// One command to the agent and its one-line answer.
pub(crate) fn say(stream: &mut BufReader<UnixStream>, command: &str) -> String {
    stream.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}
