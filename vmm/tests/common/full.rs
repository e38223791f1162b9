//! A podvisor that sees a small file system which nobody else sees, so that it can be filled.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a failure here is the test's")]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use podvisor_api::http::Client;

use super::{Process, podvisor, wait_for};

/// Mounts `$2`, of `$1` bytes, and becomes the rest.
const SCRIPT: &str = r#"mount -t tmpfs -o "size=$1" small "$2" && shift 2 && exec "$@""#;

/// A command in a mount namespace of its own.
fn apart() -> Command {
    let mut command = Command::new("unshare");
    // Somebody else than root needs a user namespace for it.
    let root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0;
    command
        .arg(if root { "-m" } else { "-rm" })
        .args(["sh", "-c", SCRIPT, "sh"]);
    command
}

impl Process {
    /// As [`Process::start_with`], with a file system of `bytes` bytes at `small` in its directory. None, and it is said
    /// why, where that cannot be had.
    pub(crate) fn start_small(bytes: u64, args: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (socket, small) = (dir.path().join("api"), dir.path().join("small"));
        std::fs::create_dir(&small).unwrap();
        let mounting = || {
            let mut command = apart();
            command.arg(bytes.to_string()).arg(&small);
            command
        };
        let tried = mounting().arg("true").stderr(Stdio::null()).status();
        if !tried.is_ok_and(|status| status.success()) {
            println!("skipped: no mount namespace with a tmpfs can be had (unshare -m, mount)");
            return None;
        }
        let monitor = podvisor(&socket, &dir.path().join("log"));
        let mut command = mounting();
        let child = command
            .arg(monitor.get_program())
            .args(monitor.get_args())
            .args(args)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let process = Self { dir, child, socket };
        wait_for("the API socket", || Client::connect(&process.socket).ok());
        Some(process)
    }

    /// The way from here to `name` in the small file system.
    pub(crate) fn small(&self, name: &str) -> PathBuf {
        let inside = self.path("small").join(name);
        let root = format!("/proc/{}/root", self.child.id());
        PathBuf::from(root).join(inside.strip_prefix("/").unwrap())
    }
}
