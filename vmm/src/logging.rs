//! The log: one line an event, to stderr or to a file, in the form that the shims' log parsers know
//! (`podvisor: <seconds> <thread> INFO:  …`). A log reader that stops reading costs lines, never time: a line that
//! cannot be written at once is dropped and counted.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber, span};

/// The level for `verbosity` occurrences of `-v`: warnings, then info, debug and trace.
#[must_use]
pub fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// Starts logging at `level`, to `file` (appended to) or to stderr. `start` is the zero of the time stamps.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(level: LevelFilter, file: Option<&Path>, start: Instant) -> io::Result<()> {
    let (fd, out): (RawFd, Box<dyn io::Write + Send>) = match file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            (file.as_raw_fd(), Box::new(file))
        }
        None => (libc::STDERR_FILENO, Box::new(io::stderr())),
    };
    let log = Log {
        level,
        start,
        fd,
        out: Mutex::new(out),
        dropped: AtomicU64::new(0),
    };
    // A second start in one process (tests) keeps the first log.
    let _ = tracing::subscriber::set_global_default(log);
    Ok(())
}

struct Log {
    level: LevelFilter,
    start: Instant,
    fd: RawFd,
    out: Mutex<Box<dyn io::Write + Send>>,
    dropped: AtomicU64,
}

/// The tag of `level`, as Kata's parser of monitor output spells it.
fn tag(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERRO:",
        Level::WARN => "WARN:",
        Level::INFO => "INFO:",
        Level::DEBUG => "DEBG:",
        Level::TRACE => "TRCE:",
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let thread = std::thread::current();
        let mut line = Line(format!(
            "podvisor: {:.6}s <{}> {} ",
            self.start.elapsed().as_secs_f64(),
            thread.name().unwrap_or("?"),
            tag(*event.metadata().level())
        ));
        event.record(&mut line);
        line.0.push('\n');
        if !crate::sys::writable(self.fd) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Ok(mut out) = self.out.lock() else { return };
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let _ = writeln!(
                out,
                "podvisor: WARN: {dropped} log lines were dropped: the log was not being read"
            );
        }
        let _ = out.write_all(line.0.as_bytes());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// A line being written: the message first, then `name=value` for each field. Control characters are escaped, so
/// that what a guest or a client sends cannot forge a line.
struct Line(String);

impl Line {
    fn push(&mut self, field: &Field, value: &str) {
        if field.name() != "message" {
            let _ = write!(self.0, " {}=", field.name());
        }
        for c in value.chars() {
            if c.is_control() {
                let _ = write!(self.0, "{}", c.escape_default());
            } else {
                self.0.push(c);
            }
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.push(field, &value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_tag_and_no_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let log = Log {
            level: level(1),
            start: Instant::now(),
            fd: file.as_raw_fd(),
            out: Mutex::new(Box::new(file)),
            dropped: AtomicU64::new(2),
        };
        tracing::subscriber::with_default(log, || {
            tracing::info!(who = "a\nERRO: forged", "booted {}", 1);
            tracing::debug!("not shown");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains("2 log lines were dropped"));
        assert!(lines[1].starts_with("podvisor: "));
        assert!(lines[1].ends_with("INFO: booted 1 who=a\\nERRO: forged"), "{text}");
    }

    #[test]
    fn verbosity_maps_to_levels() {
        assert_eq!(level(0), LevelFilter::WARN);
        assert_eq!(level(1), LevelFilter::INFO);
        assert_eq!(level(2), LevelFilter::DEBUG);
        assert_eq!(level(9), LevelFilter::TRACE);
    }
}
