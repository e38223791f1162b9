//! Runs a command to its end and reports what the kernel accounted for it.
#![expect(
    unsafe_code,
    reason = "wait4 is the only call that returns a child's own resource usage"
)]

use std::io;
use std::process::{Command, Stdio};
use std::time::Instant;

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
