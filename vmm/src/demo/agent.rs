//! Talks to the pod guest's agent (docs/pod-guest.md) through the monitor's hybrid vsock socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The port on which the pod guest takes commands.
pub const PORT: u32 = 1024;

/// Longest wait for any one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A stream to the pod guest's agent.
pub struct Agent {
    stream: BufReader<UnixStream>,
}

/// An answer: the lines before the last, and the last without its `ok `.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Lines such as `file …`, without line ends.
    pub lines: Vec<String>,
    /// What follows `ok` on the last line.
    pub ok: String,
}

impl Answer {
    /// The value of `key=` on the last line.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.ok
            .split(' ')
            .find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
    }
}

impl Agent {
    /// Opens a stream, trying again until the pod accepts or `deadline` passes.
    ///
    /// # Errors
    /// The last failure, when the deadline passes.
    pub fn connect(socket: &Path, deadline: Instant) -> io::Result<Self> {
        loop {
            match Self::try_connect(socket) {
                Ok(agent) => return Ok(agent),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    fn try_connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        let mut stream = BufReader::with_capacity(64 * 1024, stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        if line.starts_with("OK ") {
            Ok(Self { stream })
        } else {
            Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the pod did not accept the stream",
            ))
        }
    }

    /// Sends a command and takes its answer.
    ///
    /// # Errors
    /// When the stream fails, or the pod answers `err …` (its reason is the error's text).
    pub fn command(&mut self, line: &str) -> io::Result<Answer> {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.answer(line)
    }

    fn answer(&mut self, command: &str) -> io::Result<Answer> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("the pod closed the stream during '{command}'"),
                ));
            }
            let line = line.trim_end_matches('\n');
            if line == "ok" || line.starts_with("ok ") {
                let ok = line.strip_prefix("ok ").unwrap_or("").to_owned();
                return Ok(Answer { lines, ok });
            }
            if let Some(reason) = line.strip_prefix("err ") {
                return Err(io::Error::other(format!("'{command}': the pod answered: {reason}")));
            }
            lines.push(line.to_owned());
        }
    }

    /// Sends `data` through the pod and takes it back.
    ///
    /// # Errors
    /// When the stream fails or the pod refuses.
    pub fn echo(&mut self, data: &[u8]) -> io::Result<Vec<u8>> {
        let command = format!("echo {}\n", data.len());
        let mut writer = self.stream.get_ref().try_clone()?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                writer.write_all(command.as_bytes())?;
                writer.write_all(data)
            });
            self.answer("echo")?;
            let mut back = vec![0; data.len()];
            self.stream.read_exact(&mut back)?;
            sender
                .join()
                .map_err(|_| io::Error::other("the sending thread ended early"))??;
            Ok(back)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn scripted(answer: &'static [u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut s, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(s.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "CONNECT 1024\n");
            s.write_all(b"OK 7\n").unwrap();
            reader.read_line(&mut line).unwrap();
            s.write_all(answer).unwrap();
        });
        (dir, path)
    }

    #[test]
    fn gathers_lines_and_values() {
        let (_dir, path) = scripted(b"file aa 3 x y\nok files=1 bytes=3\n");
        let mut agent = Agent::connect(&path, Instant::now()).unwrap();
        let answer = agent.command("fs-walk").unwrap();
        assert_eq!(answer.lines, ["file aa 3 x y"]);
        assert_eq!(
            (answer.value("files"), answer.value("bytes"), answer.value("file")),
            (Some("1"), Some("3"), None)
        );
    }

    #[test]
    fn tells_refusals_and_closed_streams() {
        let (_dir, path) = scripted(b"err no such device\n");
        let mut agent = Agent::connect(&path, Instant::now()).unwrap();
        assert!(
            agent
                .command("blk-info")
                .unwrap_err()
                .to_string()
                .contains("no such device")
        );
        assert!(agent.command("blk-info").is_err());
    }
}
