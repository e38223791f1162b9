//! Runs a command to its end and reports what the kernel accounted for it; reads the accounts of a process that runs.
#![expect(
    unsafe_code,
    reason = "a process's own resource usage and processor clock have no safe names"
)]

use std::io;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What one run of a command took.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// From before the spawn until the process was reaped, milliseconds.
    pub wall_ms: f64,
    /// User and system time of the process and its threads, milliseconds.
    pub cpu_ms: f64,
    /// Largest resident set, KiB. Guest memory that the guest touched counts.
    pub peak_rss_kib: u64,
    /// Minor page faults.
    pub minor_faults: u64,
    /// Exit code; None when a signal ended it.
    pub exit_code: Option<i32>,
}

/// Runs `argv` with its output thrown away.
///
/// # Errors
/// When the command cannot be started or waited for, or `argv` is empty.
pub fn run(argv: &[String]) -> io::Result<Run> {
    let (program, args) = argv
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let start = Instant::now();
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: rusage is plain data for which all zeros is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right types; `pid` is our child, not yet waited for.
    if unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } != pid {
        return Err(io::Error::last_os_error());
    }
    let ms = |t: libc::timeval| t.tv_sec as f64 * 1e3 + t.tv_usec as f64 / 1e3;
    Ok(Run {
        wall_ms: start.elapsed().as_secs_f64() * 1e3,
        cpu_ms: ms(usage.ru_utime) + ms(usage.ru_stime),
        peak_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        minor_faults: u64::try_from(usage.ru_minflt).unwrap_or(0),
        exit_code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
    })
}

/// The processor time that process `pid` and its threads have taken so far.
///
/// # Errors
/// When there is no such process.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the pointer is to a live local of the right type; any pid may be asked about.
    let rc = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if rc != 0 {
        return Err(io::Error::from_raw_os_error(rc));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanos = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(Duration::from_secs(seconds) + Duration::from_nanos(nanos))
}

/// The memory of a process that runs.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Resident, KiB.
    pub rss_kib: u64,
    /// Resident and mapped by no other process, KiB.
    pub private_kib: u64,
    /// Minor page faults so far.
    pub minor_faults: u64,
}

impl Memory {
    /// Of process `pid`.
    ///
    /// # Errors
    /// When there is no such process, or it may not be looked into.
    pub fn of(pid: u32) -> io::Result<Self> {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&rollup, &stat).ok_or_else(|| io::Error::other("/proc: not in the form that proc(5) describes"))
    }

    fn parse(rollup: &str, stat: &str) -> Option<Self> {
        let kib = |name: &str| -> Option<u64> {
            let line = rollup.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        // The fields after the name, which may hold anything but ends at the last parenthesis: state is the third.
        let (_, fields) = stat.rsplit_once(')')?;
        Some(Self {
            rss_kib: kib("Rss:")?,
            private_kib: kib("Private_Clean:")? + kib("Private_Dirty:")?,
            minor_faults: fields.split_whitespace().nth(7)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_prints() {
        let rollup = "5581-7ffd ---p 00000000 00:00 0 [rollup]\nRss:     900 kB\nPrivate_Clean:     8 kB\nPrivate_Dirty:   100 kB\n";
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 123 0 0 0 1 2";
        let memory = Memory::parse(rollup, stat).unwrap();
        assert_eq!(
            (memory.rss_kib, memory.private_kib, memory.minor_faults),
            (900, 108, 123)
        );
        assert!(Memory::parse(rollup, "7 (x").is_none());
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let pid = std::process::id();
        assert!(cpu_time(pid).unwrap() > Duration::ZERO);
        let memory = Memory::of(pid).unwrap();
        assert!(
            memory.rss_kib >= memory.private_kib && memory.private_kib > 0,
            "{memory:?}"
        );
    }
}
