//! The Rust shim's side of the wire: one connection for the sandbox's whole life, a request in several writes with the
//! descriptors beside the first, and a reader of answers that searches text.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::common::{PATIENCE, wait_for};

/// The shim's client.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
}

/// The value of the first `name: ` anywhere in the text.
fn header<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let start = text.find(&format!("{name}: "))? + name.len() + 2;
    text.get(start..)?.split('\r').next()
}

/// What stands between `HTTP/1.1` and the end of the line, as a number.
fn status(text: &str) -> Result<u16, String> {
    let start = text.find("HTTP/1.1").ok_or("MissingProtocol")?;
    let line = text[start + "HTTP/1.1 ".len()..].split('\r').next().unwrap_or_default();
    line.trim()
        .parse()
        .map_err(|e| format!("StatusCodeParsing {line:?}: {e}"))
}

/// Reads an answer: 256 bytes at a time, each read text by itself; no length means no body, not even an empty one.
fn read_response(socket: &mut impl Read) -> Result<Option<String>, String> {
    let mut text = String::new();
    let mut body = None;
    loop {
        let mut bytes = [0; 256];
        let count = socket.read(&mut bytes).map_err(|e| e.to_string())?;
        if count == 0 {
            break;
        }
        text += std::str::from_utf8(&bytes[..count]).map_err(|e| e.to_string())?;
        if let Some(end) = text.find("\r\n\r\n") {
            let Some(length) = header(&text, "Content-Length") else {
                break;
            };
            let length: usize = length
                .trim()
                .parse()
                .map_err(|e| format!("ContentLengthParsing: {e}"))?;
            body = Some(end + 4);
            if text.len() >= end + 4 + length {
                break;
            }
        }
    }
    let status = status(&text)?;
    let body = body.map(|start| text[start..].to_owned());
    match status {
        100 | 200 | 204 => Ok(body),
        _ => Err(format!("ServerResponse({status}, {body:?})")),
    }
}

impl Client {
    /// Connects as soon as the monitor listens.
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = wait_for("the API socket", || UnixStream::connect(path).ok());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket }
    }

    /// The segments of a request, in the order of their writes.
    pub(crate) fn segments(method: &str, endpoint: &str, body: Option<&str>) -> Vec<String> {
        let first = format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        let mut segments = vec![first];
        if let Some(body) = body {
            segments.push(format!("Content-Length: {}\r\n", body.len()));
        }
        segments.push("\r\n".to_owned());
        segments.extend(body.map(str::to_owned));
        segments
    }

    /// Writes a request, the descriptors beside its first segment.
    pub(crate) fn write(&mut self, method: &str, endpoint: &str, body: Option<&str>, fds: &[BorrowedFd<'_>]) {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let segments = Self::segments(method, endpoint, body);
        let sent = self.socket.send_with_fds(&[segments[0].as_bytes()], &fds).unwrap();
        assert_eq!(sent, segments[0].len());
        for segment in &segments[1..] {
            self.socket.write_all(segment.as_bytes()).unwrap();
        }
    }

    /// A request and its answer; the body is `None` only where the answer has no length.
    pub(crate) fn call(
        &mut self,
        method: &str,
        endpoint: &str,
        body: Option<&str>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<String>, String> {
        self.write(method, endpoint, body, fds);
        read_response(&mut self.socket)
    }

    /// A PUT whose body, if any, is JSON over several lines.
    pub(crate) fn put(&mut self, endpoint: &str, body: Option<&Value>) -> Result<Option<String>, String> {
        let body = body.map(|body| serde_json::to_string_pretty(body).unwrap());
        self.call("PUT", endpoint, body.as_deref(), &[])
    }

    /// `vm.add-net` with its queues.
    pub(crate) fn add_net(&mut self, body: &Value, taps: &[BorrowedFd<'_>]) -> Result<Option<String>, String> {
        self.call("PUT", "vm.add-net", Some(&body.to_string()), taps)
    }

    /// A request whose answer must have a body of JSON.
    pub(crate) fn get(&mut self, endpoint: &str) -> Result<Value, String> {
        let body = self.call("GET", endpoint, None, &[])?.ok_or("no body")?;
        serde_json::from_str(&body).map_err(|e| e.to_string())
    }
}

/// An identifier and a BDF, which the shim records for a later removal.
pub(crate) fn pci_device_info(body: Option<String>) -> Result<(String, String), String> {
    #[derive(serde::Deserialize)]
    struct PciDeviceInfo {
        id: String,
        bdf: String,
    }
    let body = body.ok_or("no body: the device could not be removed again")?;
    let info: PciDeviceInfo = serde_json::from_str(&body).map_err(|e| e.to_string())?;
    Ok((info.id, info.bdf))
}

#[test]
fn the_reader_is_as_strict_as_the_shims() {
    let read = |text: &str| read_response(&mut text.as_bytes());
    assert_eq!(read("HTTP/1.1 204 \r\n\r\n"), Ok(None));
    assert_eq!(
        read("HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"),
        Ok(Some(String::new()))
    );
    assert_eq!(read("HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\n{}"), Ok(None));
    assert!(read("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").is_err());
    assert!(read("HTTP/1.0 200 \r\nContent-Length: 0\r\n\r\n").is_err());
    assert!(read("HTTP/1.1 201 \r\nContent-Length: 0\r\n\r\n").is_err());
}
