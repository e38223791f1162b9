//! Requests and responses, and the bytes of a response.

use std::borrow::Cow;
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
        let body = if matches!(self.status, 100..=199 | 204) {
            Cow::Borrowed(&[][..])
        } else {
            ascii(&self.body)
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
        bytes.extend_from_slice(&body);
        bytes
    }
}

/// A JSON text in ASCII: other characters, which JSON has in strings only, are written as `\u` escapes (RFC 8259,
/// section 7). The Rust shim takes each 256 bytes that it reads for text of their own, so that a character which
/// crosses their border would be an error there.
fn ascii(json: &[u8]) -> Cow<'_, [u8]> {
    let Some(text) = std::str::from_utf8(json).ok().filter(|text| !text.is_ascii()) else {
        return Cow::Borrowed(json);
    };
    let mut escaped = String::with_capacity(json.len() * 2);
    for c in text.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        }
    }
    Cow::Owned(escaped.into_bytes())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_ascii_and_means_the_same() {
        let value = serde_json::json!({"pfäd": ["\u{1F600}\n\"", "plain"]});
        let bytes = Response::new(200, value.to_string()).encode();
        assert!(bytes.is_ascii());
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap(), value);
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())), "{head}");
        assert!(text.contains("pf\\u00e4d") && text.contains("\\ud83d\\ude00"), "{text}");
    }
}
