//! A small blocking client, for the demo, the tests and the benchmarks.

use super::parser::MAX_BODY;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest line of a response's head.
const MAX_LINE: u64 = 8192;

/// What the monitor answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The body; empty for none.
    pub body: Vec<u8>,
}

/// A connection to an API socket, kept for many requests.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self {
            stream: BufReader::new(UnixStream::connect(socket)?),
        })
    }

    /// Bounds how long [`Client::request`] waits for an answer; `None` waits for ever.
    ///
    /// # Errors
    /// A time of zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(timeout)
    }

    /// Sends a request and takes the answer, whatever its status. `endpoint` is a name (`vm.boot`) or a path.
    ///
    /// # Errors
    /// The socket fails or the answer is no HTTP.
    pub fn request(&mut self, method: &str, endpoint: &str, body: Option<&[u8]>) -> io::Result<Reply> {
        self.request_with_files(method, endpoint, body, &[])
    }

    /// As [`Client::request`], with descriptors beside the first bytes.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn request_with_files(
        &mut self,
        method: &str,
        endpoint: &str,
        body: Option<&[u8]>,
        files: &[RawFd],
    ) -> io::Result<Reply> {
        let base = if endpoint.starts_with('/') { "" } else { "/api/v1/" };
        let mut bytes =
            format!("{method} {base}{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n").into_bytes();
        if let Some(body) = body {
            let length = body.len();
            write!(
                bytes,
                "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
            )?;
            bytes.extend_from_slice(body);
        } else {
            bytes.extend_from_slice(b"\r\n");
        }
        let stream = self.stream.get_mut();
        let sent = if files.is_empty() {
            0
        } else {
            let sent = stream.send_with_fds(&[bytes.as_slice()], files);
            sent.map_err(|e| io::Error::from_raw_os_error(e.errno()))?
        };
        stream.write_all(bytes.get(sent..).unwrap_or_default())?;
        self.reply()
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.stream).take(MAX_LINE).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the monitor closed the connection",
            ));
        }
        Ok(line.trim_end().to_owned())
    }

    fn reply(&mut self) -> io::Result<Reply> {
        loop {
            let status_line = self.line()?;
            let status = status_line
                .strip_prefix("HTTP/1.1 ")
                .and_then(|rest| rest.get(..3))
                .and_then(|s| s.parse().ok());
            let status: u16 = status.ok_or_else(|| io::Error::other(format!("`{status_line}` is no status line")))?;
            let mut length = 0usize;
            loop {
                let line = self.line()?;
                if line.is_empty() {
                    break;
                }
                if let Some(value) = line.strip_prefix("Content-Length: ") {
                    length = value
                        .parse()
                        .map_err(|_| io::Error::other(format!("`{line}` is no length")))?;
                }
            }
            if length > 4 * MAX_BODY {
                return Err(io::Error::other(format!("a response of {length} bytes is too long")));
            }
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body)?;
            if status != 100 {
                return Ok(Reply { status, body });
            }
        }
    }
}
