//! The monitor that the demo starts as a child, and what the demo tells it over the socket.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podvisor_api::http::Client;
use serde_json::Value;

use crate::sys;

/// The child; killed and reaped on drop if it still runs.
pub(crate) struct Monitor {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    client: Client,
}

impl Monitor {
    /// Starts this same program with an API socket at `socket` and waits until it answers; its stderr goes to `log`.
    ///
    /// # Errors
    /// When it cannot be started or does not answer within ten seconds.
    pub(crate) fn start(socket: &Path, log: &Path) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--api-socket")
            .arg(socket)
            .arg("-v")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(log)?);
        sys::end_with_parent(&mut command);
        let mut child = command.spawn()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Client::connect(socket) {
                Ok(client) => {
                    return Ok(Self {
                        child,
                        socket: socket.to_owned(),
                        log: log.to_owned(),
                        client,
                    });
                }
                Err(_) if Instant::now() < deadline && child.try_wait()?.is_none() => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(error) => {
                    let _ = child.kill();
                    child.wait()?;
                    let said = std::fs::read_to_string(log).unwrap_or_default();
                    return Err(io::Error::other(format!(
                        "the monitor did not come up: {error}\n{said}"
                    )));
                }
            }
        }
    }

    /// Its process.
    #[must_use]
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request of API v1 and takes the answer.
    ///
    /// # Errors
    /// When the socket fails or the answer is not a success; the monitor's own words are in the error.
    pub(crate) fn request(&mut self, method: &str, endpoint: &str, body: Option<&Value>) -> io::Result<Option<Value>> {
        let body = body.map(Value::to_string);
        let response = self
            .client
            .request(method, endpoint, body.as_deref().map(str::as_bytes))?;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        if !matches!(response.status, 200 | 204) {
            return Err(io::Error::other(format!(
                "{method} {endpoint}: {} {text}",
                response.status
            )));
        }
        Ok(serde_json::from_str(&text).ok())
    }

    /// Memory of the monitor in KiB: its resident set less guest RAM (mappings of 256 MiB and more).
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn own_rss_kib(&self) -> io::Result<u64> {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        Ok(own_rss_kib(&smaps))
    }

    /// Waits until the monitor has ended by itself, as it does when its pod powers off.
    ///
    /// # Errors
    /// When it has not ended within `patience`, or ended with a failure; its log is in the error.
    pub(crate) fn wait(&mut self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    return Err(io::Error::other(format!(
                        "the monitor ended with {status}\n{}",
                        self.log()
                    )));
                }
                None if Instant::now() >= deadline => {
                    return Err(io::Error::other(format!("the monitor did not end\n{}", self.log())));
                }
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// What the monitor said on stderr.
    #[must_use]
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether its socket is still there.
    #[must_use]
    pub(crate) fn socket_exists(&self) -> bool {
        self.socket.exists()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One mapping of a `/proc/PID/smaps` text.
#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    rss_kib: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            all.push(Mapping { start, end, rss_kib: 0 });
        } else if let Some(rss) = line.strip_prefix("Rss:")
            && let Some(mapping) = all.last_mut()
        {
            mapping.rss_kib = rss.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        }
    }
    all
}

/// Sums the resident KiB of a `/proc/PID/smaps` text over all mappings but guest RAM: those larger than anything else, and
/// what lies directly below one (the first mebibytes of RAM, which are advised differently).
fn own_rss_kib(smaps: &str) -> u64 {
    const GUEST_RAM: u64 = 256 << 20;
    let all = mappings(smaps);
    let large: Vec<u64> = all
        .iter()
        .filter(|m| m.end - m.start >= GUEST_RAM)
        .map(|m| m.start)
        .collect();
    let own = |m: &&Mapping| m.end - m.start < GUEST_RAM && !large.contains(&m.end);
    all.iter().filter(own).map(|m| m.rss_kib).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_the_monitors_memory() {
        let smaps = "7f0000000000-7f0001000000 rw-p 00000000 00:00 0\nSize: 16384 kB\nRss: 500 kB\n\
                     7f0001000000-7f00a0000000 rw-p 00000000 00:00 0\nSize: 2605056 kB\nRss:   9000 kB\n\
                     7f00b0000000-7f00b0300000 r-xp 00000000 00:00 0 /x\nSize:  3000 kB\nRss:  1200 kB\nPss: 7 kB\n";
        assert_eq!(own_rss_kib(smaps), 1200);
    }
}
