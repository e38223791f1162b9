//! Bytes on the wire, seen by neither shim: one answer as it came, its frame checked against what both shims can read.

use std::io::Read;
use std::os::unix::net::UnixStream;

/// One answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The head, with its empty line.
    pub(crate) head: String,
    /// What follows it.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The status code.
    pub(crate) fn status(&self) -> u16 {
        let digits = self.head.strip_prefix("HTTP/1.1 ").unwrap().get(..3).unwrap();
        digits.parse().unwrap()
    }

    /// The value of a header whose name is spelled exactly so.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.split("\r\n").skip(1);
        lines
            .filter_map(|line| line.split_once(": "))
            .find(|(n, _)| *n == name)
            .map(|(_, v)| v)
    }
}

/// Reads one answer: the head, then as many bytes as it announces.
///
/// # Panics
/// When the connection ends first.
pub(crate) fn answer(stream: &mut UnixStream) -> Answer {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let mut answer = Answer {
        head: String::from_utf8(head).unwrap(),
        body: Vec::new(),
    };
    let length = answer.header("Content-Length").map_or(0, |n| n.parse().unwrap());
    answer.body.resize(length, 0);
    stream.read_exact(&mut answer.body).unwrap();
    answer
}

/// Checks the frame of `answer`: the status line ends in a space, no other HTTP version, no chunks, a length exactly
/// where there is something to measure.
pub(crate) fn check_frame(answer: &Answer) {
    let Answer { head, body } = answer;
    let status = head.split("\r\n").next().unwrap();
    assert_eq!(status, format!("HTTP/1.1 {} ", answer.status()), "{head}");
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
    assert!(!head.to_ascii_lowercase().contains("content-encoding"), "{head}");
    assert_ne!(answer.header("Connection"), Some("close"), "{head}");
    let lengths = head.to_ascii_lowercase().matches("content-length").count();
    if answer.status() == 204 {
        assert_eq!((lengths, body.len()), (0, 0), "{head}");
    } else {
        assert_eq!(lengths, 1, "{head}");
        assert_eq!(
            answer.header("Content-Length"),
            Some(body.len().to_string().as_str()),
            "{head}"
        );
    }
    if !body.is_empty() {
        assert_eq!(answer.header("Content-Type"), Some("application/json"), "{head}");
        serde_json::from_slice::<serde_json::Value>(body).unwrap();
    }
}
