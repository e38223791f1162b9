//! One client: bytes in, requests out, responses back, never blocking. A client has one request in work at a time;
//! what it sends beyond that waits in the kernel.

use super::message::{Request, Response};
use super::parser::RequestParser;
use super::sys;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Leave to send a body.
const CONTINUE: &[u8] = b"HTTP/1.1 100 \r\n\r\n";

/// What a connection does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Reads a request.
    Reading,
    /// Its request is in work.
    Busy,
    /// Ends as soon as what is to be written is written.
    Closing,
}

/// What the server waits for on a connection's behalf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    parser: RequestParser,
    files: Vec<OwnedFd>,
    output: Vec<u8>,
    written: usize,
    state: State,
    /// The peer has gone, altogether or from its sending half.
    ended: bool,
    /// What epoll has been told; `None` when it no longer watches this connection.
    pub(super) watched: Option<Interest>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            parser: RequestParser::default(),
            files: Vec::new(),
            output: Vec::new(),
            written: 0,
            state: State::Reading,
            ended: false,
            watched: None,
        }
    }

    pub(super) fn interest(&self) -> Interest {
        let write = self.written < self.output.len();
        Interest {
            read: self.state == State::Reading && !write && !self.ended,
            write,
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.state == State::Busy
    }

    /// Whether the peer has gone, or will at least send nothing more.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether nothing more can come of it.
    pub(super) fn is_done(&self) -> bool {
        let flushed = self.written == self.output.len();
        match self.state {
            State::Busy => false,
            State::Closing => flushed,
            State::Reading => self.ended && flushed,
        }
    }

    pub(super) fn buffered(&self) -> usize {
        self.parser.buffered()
    }

    /// Reads once; `scratch` is where the bytes land first.
    pub(super) fn read(&mut self, scratch: &mut [u8]) {
        if !self.interest().read {
            return;
        }
        match sys::receive(&self.stream, scratch) {
            Ok((0, _)) => self.ended = true,
            Ok((count, files)) => {
                self.parser.feed(scratch.get(..count).unwrap_or_default());
                // What is beyond the room is closed here.
                let room = sys::MAX_FDS.saturating_sub(self.files.len());
                self.files.extend(files.into_iter().take(room));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.fail(),
        }
    }

    /// The next request that has come whole, unless one is in work.
    pub(super) fn take_request(&mut self) -> Option<Request> {
        if self.state != State::Reading || self.interest().write {
            return None;
        }
        match self.parser.next_request() {
            Ok(Some((head, body))) => {
                self.state = State::Busy;
                let files = std::mem::take(&mut self.files);
                Some(Request {
                    method: head.method,
                    path: head.path,
                    body,
                    files,
                })
            }
            Ok(None) => {
                if self.parser.take_expectation() {
                    self.send(CONTINUE);
                }
                None
            }
            Err(refused) => {
                self.refuse(refused.status, &refused.reason);
                None
            }
        }
    }

    /// Answers the request in work.
    pub(super) fn respond(&mut self, response: &Response) {
        if self.state == State::Busy {
            self.state = State::Reading;
            self.send(&response.encode());
        }
    }

    /// Answers with an error and ends.
    pub(super) fn refuse(&mut self, status: u16, reason: &str) {
        self.parser = RequestParser::default();
        self.files.clear();
        self.state = State::Closing;
        self.send(&Response::error(status, &[reason]).encode());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        self.flush();
    }

    /// Writes what the socket takes.
    pub(super) fn flush(&mut self) {
        while let Some(rest) = self.output.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return self.fail(),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.fail(),
            }
        }
        self.output = Vec::new();
        self.written = 0;
    }

    /// The peer has gone: nothing more is read or written. A request in work stays in work until it is answered.
    pub(super) fn fail(&mut self) {
        self.ended = true;
        self.output = Vec::new();
        self.written = 0;
        self.files.clear();
        self.parser = RequestParser::default();
        if self.state == State::Reading {
            self.state = State::Closing;
        }
    }
}
