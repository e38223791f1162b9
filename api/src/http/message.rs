//! Requests and responses, and the bytes of a response.

use std::error::Error;
use std::fmt::Write;
use std::os::fd::OwnedFd;

/// A request, complete.
#[derive(Debug)]
pub struct Request {
    /// The method as it was sent (`GET`, `PUT`).
    pub method: String,
    /// The path from its first slash, `/api/v1/vmm.ping`.
    pub path: String,
    /// The body; empty for none, as `Content-Length: 0` counts as none.
    pub body: Vec<u8>,
    /// Descriptors that came with it (SCM_RIGHTS), in the order sent; close-on-exec.
    pub files: Vec<OwnedFd>,
}

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// The body, JSON. With status 204 there is none.
    pub body: Vec<u8>,
}

impl Response {
    /// A response with a JSON text as body (empty for none).
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            body: body.into(),
        }
    }

    /// 204.
    pub fn no_content() -> Self {
        Self::new(204, Vec::new())
    }

    /// A refusal: a JSON array of strings, from what could not be done to the root cause.
    pub fn error<S: AsRef<str>>(status: u16, causes: &[S]) -> Self {
        let causes: Vec<serde_json::Value> = causes.iter().map(|cause| cause.as_ref().into()).collect();
        Self::new(status, serde_json::Value::Array(causes).to_string())
    }

    /// The bytes on the wire.
    ///
    /// The status line has no reason phrase (the Rust shim reads a number up to the line's end), 204 has no
    /// `Content-Length` (with one, that shim takes the empty body for JSON), every other status has one.
    pub fn encode(&self) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n",
            self.status
        );
        let body: &[u8] = if matches!(self.status, 100..=199 | 204) {
            &[]
        } else {
            &self.body
        };
        if !matches!(self.status, 100..=199 | 204) {
            // Writing to a String cannot fail.
            let _ = write!(
                head,
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            );
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        bytes
    }
}

/// An error and what caused it, outermost first.
pub fn causes(error: &dyn Error) -> Vec<String> {
    let mut chain = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if chain.last() != Some(&text) {
            chain.push(text);
        }
        cause = error.source();
    }
    chain
}
