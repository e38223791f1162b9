//! The text by which a host process asks for a guest port on the hybrid socket (`CONNECT <port>\n`, `OK <port>\n`), as
//! Firecracker defines it and Cloud Hypervisor and the Kata shims use it. No sockets here but the reading of one line.

use std::io;
use std::os::unix::net::UnixStream;

use super::sys;

/// Longest command line, its `\n` included: `CONNECT 4294967295\n` with room for a few spaces.
const MAX_LINE: usize = 32;

/// Where the reading of a command stands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The rest has not come yet.
    Waiting,
    /// The guest port that was asked for.
    Port(u32),
    /// The peer left, or said something else.
    Refused,
}

/// Reads one command line and never a byte beyond it.
#[derive(Debug, Default)]
pub(super) struct CommandReader {
    line: [u8; MAX_LINE],
    len: usize,
}

impl CommandReader {
    /// Takes what `stream` has of the command.
    pub(super) fn read(&mut self, stream: &mut UnixStream) -> Progress {
        loop {
            let Some(free) = self.line.get_mut(self.len..).filter(|free| !free.is_empty()) else {
                return Progress::Refused;
            };
            let seen = match sys::peek(stream, free) {
                Ok(0) => return Progress::Refused,
                Ok(seen) => seen,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Progress::Refused,
            };
            let end = free.iter().take(seen).position(|&byte| byte == b'\n');
            let wanted = end.map_or(seen, |at| at.saturating_add(1));
            // The bytes are there: this takes exactly what was looked at.
            let Some(target) = free.get_mut(..wanted) else {
                return Progress::Refused;
            };
            if io::Read::read_exact(stream, target).is_err() {
                return Progress::Refused;
            }
            self.len = self.len.saturating_add(wanted);
            if end.is_some() {
                return parse(self.line.get(..self.len).unwrap_or_default()).map_or(Progress::Refused, Progress::Port);
            }
        }
    }
}

/// The port of a whole line, `\n` included: the word CONNECT in any case, white space, a decimal number.
pub(super) fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let mut words = text.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    if !text.starts_with(command) || !command.eq_ignore_ascii_case("connect") || words.next().is_some() {
        return None;
    }
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

/// What is answered when the guest accepted.
pub(super) fn accepted(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn commands() {
        for (line, port) in [
            ("CONNECT 1024\n", Some(1024)),
            ("connect 1024\n", Some(1024)),
            ("CoNNect 0\n", Some(0)),
            ("CONNECT 4294967295\n", Some(u32::MAX)),
            ("CONNECT 1024\r\n", Some(1024)),
            ("CONNECT  7\n", Some(7)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +5\n", None),
            ("CONNECT -5\n", None),
            ("CONNECT 5 6\n", None),
            ("CONNECT\n", None),
            ("CONNECT5\n", None),
            (" CONNECT 5\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
            ("CONNECT 5", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn bytes_behind_the_line_stay_in_the_stream() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut reader = CommandReader::default();
        assert_eq!(reader.read(&mut server), Progress::Waiting);
        for part in ["CON", "NECT 10", "2"] {
            client.write_all(part.as_bytes()).unwrap();
            assert_eq!(reader.read(&mut server), Progress::Waiting);
        }
        client.write_all(b"4\nCONNECT 9\npayload").unwrap();
        assert_eq!(reader.read(&mut server), Progress::Port(1024));
        let mut rest = [0; 17];
        server.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"CONNECT 9\npayload");
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.write_all(&[b'C'; 200]).unwrap();
        assert_eq!(CommandReader::default().read(&mut server), Progress::Refused);
        drop(client);
        let (client, mut server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(CommandReader::default().read(&mut server), Progress::Refused);
    }

    proptest! {
        #[test]
        fn every_port_is_understood(port: u32) {
            prop_assert_eq!(parse(format!("connect {port}\n").as_bytes()), Some(port));
        }

        #[test]
        fn any_bytes_are_survived(line in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(port) = parse(&line) {
                prop_assert!(line.to_ascii_lowercase().starts_with(b"connect "), "{}", port);
            }
        }
    }
}
