//! The agent: takes command lines from the streams on port 1024 and answers them in order (docs/pod-guest.md). `echo`
//! and `dial` go on beside other streams; every other command is done at once.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::pattern::Pattern;
use crate::pod::Pod;
use crate::vsock::{Id, State, Stream, Vsock};
use crate::{fs, platform, rng};

/// The longest command line, without its line feed.
const MAX_LINE: usize = 4095;
const SECTOR_LIMIT: u64 = u64::MAX / 512;

/// What a command stream is in the middle of.
enum Task {
    /// Waiting for a line.
    Line,
    /// Dropping a line that was too long.
    Skip,
    /// Echoing.
    Echo(u64),
    /// Sending a pattern over another stream.
    Dial {
        stream: Id,
        total: u64,
        left: u64,
        pattern: Pattern,
    },
}

/// The agent's own view of a command stream.
struct Session {
    id: Id,
    task: Task,
}

/// What follows a command.
enum Next {
    Line,
    Task(Task),
    PowerOff,
    Reset,
}

/// How a command's answer and effect come back: `Err` becomes `err <reason>`.
type Outcome = Result<Next, String>;

/// The agent.
pub struct Agent {
    pod: Pod,
    vsock: Vsock,
    sessions: Vec<Session>,
}

impl Agent {
    /// An agent for `pod`, over `vsock`.
    #[must_use]
    pub fn new(pod: Pod, vsock: Vsock) -> Self {
        Self {
            pod,
            vsock,
            sessions: Vec::new(),
        }
    }

    /// Serves for ever; the pod's end is a command. Returns only when the socket device is broken.
    pub fn serve(&mut self) {
        while !self.vsock.broken() {
            let mut any = self.vsock.poll();
            self.adopt();
            for at in (0..self.sessions.len()).rev() {
                any |= self.step(at);
            }
            if !any {
                self.vsock.wait();
            }
        }
    }

    /// Makes a session of each stream that the host has opened.
    fn adopt(&mut self) {
        for stream in &self.vsock.streams {
            let dialled = self.sessions.iter().any(|session| match &session.task {
                Task::Dial { stream: other, .. } => *other == stream.id,
                _ => false,
            });
            if !dialled && !stream.is_shut() && !self.sessions.iter().any(|session| session.id == stream.id) {
                self.sessions.push(Session {
                    id: stream.id,
                    task: Task::Line,
                });
            }
        }
        // A dialled stream whose caller is gone ends by itself once the host answers the shutdown.
        let known: Vec<Id> = self.sessions.iter().map(|session| session.id).collect();
        let ended = |stream: &&Stream| stream.state == State::Gone && !known.contains(&stream.id);
        let dialled: Vec<Id> = self
            .sessions
            .iter()
            .filter_map(|session| match &session.task {
                Task::Dial { stream, .. } => Some(*stream),
                _ => None,
            })
            .collect();
        let ended: Vec<Id> = self
            .vsock
            .streams
            .iter()
            .filter(ended)
            .map(|stream| stream.id)
            .collect();
        for id in ended.into_iter().filter(|id| !dialled.contains(id)) {
            self.vsock.remove(id);
        }
    }

    /// Advances one session. True when it did something.
    fn step(&mut self, at: usize) -> bool {
        let Some(session) = self.sessions.get_mut(at) else {
            return false;
        };
        let id = session.id;
        let Some(stream) = self.vsock.stream(id) else {
            self.sessions.swap_remove(at);
            return true;
        };
        if stream.state == State::Gone {
            self.end(at);
            return true;
        }
        match &mut session.task {
            Task::Echo(left) => {
                let any = echo(stream, left);
                let done = *left == 0;
                if done {
                    session.task = Task::Line;
                } else if stream.peer_done && stream.received.is_empty() {
                    self.end(at);
                    return true;
                }
                any | done
            }
            Task::Dial { .. } => self.dial(at),
            Task::Skip => {
                let found = stream.received.iter().position(|byte| *byte == b'\n');
                let any = !stream.received.is_empty();
                stream
                    .received
                    .drain(..found.map_or(stream.received.len(), |at| at + 1));
                if found.is_some() {
                    session.task = Task::Line;
                }
                any
            }
            Task::Line => self.line(at),
        }
    }

    /// Ends a session and its stream.
    fn end(&mut self, at: usize) {
        let session = self.sessions.swap_remove(at);
        if let Task::Dial { stream, .. } = session.task {
            self.vsock.remove(stream);
        }
        self.vsock.remove(session.id);
    }

    fn line(&mut self, at: usize) -> bool {
        let Some(session) = self.sessions.get_mut(at) else {
            return false;
        };
        let id = session.id;
        let Some(stream) = self.vsock.stream(id) else {
            return false;
        };
        if stream.send_room() == 0 {
            return false;
        }
        let Some(end) = stream
            .received
            .iter()
            .take(MAX_LINE + 1)
            .position(|byte| *byte == b'\n')
        else {
            if stream.received.len() > MAX_LINE {
                answer(stream, "err the line is too long");
                session.task = Task::Skip;
                return true;
            }
            if stream.peer_gone {
                self.end(at);
                return true;
            }
            let close = stream.peer_done && !stream.closing;
            stream.closing |= stream.peer_done;
            return close;
        };
        let line: Vec<u8> = stream.received.drain(..=end).take(end).collect();
        let mut out = Vec::new();
        let outcome = self.command(&line, &mut out);
        let next = match outcome {
            Ok(next) => next,
            Err(reason) => {
                out.extend_from_slice(format!("err {reason}\n").as_bytes());
                Next::Line
            }
        };
        if let Some(stream) = self.vsock.stream(id) {
            stream.unsent.extend(out);
        }
        match next {
            Next::Line => {}
            Next::Task(task) => {
                if let Some(session) = self.sessions.get_mut(at) {
                    session.task = task;
                }
            }
            Next::PowerOff => self.leave(id, false),
            Next::Reset => self.leave(id, true),
        }
        true
    }

    /// Sends what is unsent of the stream, then powers off or resets.
    fn leave(&mut self, id: Id, reset: bool) {
        loop {
            self.vsock.poll();
            let sent = self
                .vsock
                .stream(id)
                .is_none_or(|stream| stream.state == State::Gone || stream.unsent.is_empty());
            if sent && self.vsock.all_sent() || self.vsock.broken() {
                break;
            }
            self.vsock.wait();
        }
        crate::power(reset);
    }

    fn dial(&mut self, at: usize) -> bool {
        let Some(Session {
            id,
            task:
                Task::Dial {
                    stream,
                    total,
                    left,
                    pattern,
                },
        }) = self.sessions.get_mut(at)
        else {
            return false;
        };
        let Some(dialled) = self.vsock.stream(*stream) else {
            return false;
        };
        let text = match dialled.state {
            State::Connecting => return false,
            State::Gone if !dialled.is_shut() => String::from("err the host refused or reset the stream"),
            State::Open if *left > 0 => {
                let room = (dialled.send_room() as u64).min(*left) as usize;
                let mut bytes = vec![0; room];
                pattern.fill(&mut bytes);
                dialled.unsent.extend(bytes);
                *left -= room as u64;
                return room > 0;
            }
            State::Open if !dialled.is_shut() => {
                let first = !dialled.closing;
                dialled.closing = true;
                return first;
            }
            _ => format!("ok sent={total}"),
        };
        let (id, stream) = (*id, *stream);
        if text.starts_with("err") {
            self.vsock.remove(stream);
        }
        if let Some(stream) = self.vsock.stream(id) {
            answer(stream, &text);
        }
        if let Some(session) = self.sessions.get_mut(at) {
            session.task = Task::Line;
        }
        true
    }

    fn command(&mut self, line: &[u8], out: &mut Vec<u8>) -> Outcome {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut words = line.split(|byte| *byte == b' ');
        let name = words.next().unwrap_or_default();
        let words: Vec<&[u8]> = words.collect();
        let say = |out: &mut Vec<u8>, text: String| {
            out.extend_from_slice(text.as_bytes());
            out.push(b'\n');
            Ok(Next::Line)
        };
        match (name, &*words) {
            (b"hello", []) => say(out, self.pod.hello()),
            (b"cmdline", []) => say(out, format!("ok {}", self.pod.parameters.command_line)),
            (b"echo", [count]) => {
                let count = number(count)?;
                say(out, format!("ok {count}"))?;
                Ok(Next::Task(Task::Echo(count)))
            }
            (b"dial", [port, count, seed]) => {
                let port = u32::try_from(number(port)?).map_err(|_| "the port is too large")?;
                let (total, pattern) = (number(count)?, Pattern::new(number(seed)?));
                let stream = self.vsock.connect(port)?;
                Ok(Next::Task(Task::Dial {
                    stream,
                    total,
                    left: total,
                    pattern,
                }))
            }
            (b"fs-walk", []) => {
                let files = fs::walk(self.pod.fs()?)?;
                let mut bytes = 0_u64;
                for file in &files {
                    out.extend_from_slice(format!("file {} {} ", hex(&file.hash), file.size).as_bytes());
                    out.extend_from_slice(&file.path);
                    out.push(b'\n');
                    bytes = bytes.wrapping_add(file.size);
                }
                say(out, format!("ok files={} bytes={bytes}", files.len()))
            }
            (b"fs-write", [path, count, seed]) => {
                let (count, seed) = (number(count)?, number(seed)?);
                fs::write(self.pod.fs()?, path, count, seed)?;
                say(out, format!("ok bytes={count}"))
            }
            (b"fs-read", [path]) => {
                let file = fs::read(self.pod.fs()?, path)?;
                say(out, format!("ok bytes={} sha256={}", file.size, hex(&file.hash)))
            }
            (b"rng", [count]) => {
                let count = number(count)? as usize;
                if count > rng::MAX {
                    return Err(format!("at most {} bytes", rng::MAX));
                }
                let bytes = self.pod.rng()?.bytes(count)?;
                say(out, format!("ok {}", hex(&bytes)))
            }
            (b"report", [data]) => {
                let report = self.pod.report(&unhex(data)?)?;
                say(
                    out,
                    format!("ok report={} certs={}", hex(&report.report), hex(&report.certificates)),
                )
            }
            (b"probe-private", [seed, device]) => {
                let accessed = self.probe(number(seed)?, device)?;
                say(out, String::from(if accessed { "err accessed" } else { "ok refused" }))
            }
            (b"convert", [pages, rounds]) => {
                self.pod.convert(number(pages)?, number(rounds)?)?;
                say(out, String::from("ok"))
            }
            (b"poweroff", []) => say(out, String::from("ok")).map(|_: Next| Next::PowerOff),
            (b"reset", []) => say(out, String::from("ok")).map(|_: Next| Next::Reset),
            (
                b"port" | b"console" | b"watchdog" | b"panic" | b"serial-read" | b"console-read" | b"console-size",
                words,
            ) => self.platform_command(name, words).and_then(|text| say(out, text)),
            (name, words) if name.starts_with(b"blk-") => self.blk_command(name, words).and_then(|text| say(out, text)),
            _ => Err(String::from("unknown command or wrong number of arguments")),
        }
    }

    fn blk_command(&mut self, name: &[u8], words: &[&[u8]]) -> Result<String, String> {
        let blk = self.pod.blk()?;
        match (name, words) {
            (b"blk-info", []) => {
                blk.look();
                let id = blk.id()?;
                Ok(format!(
                    "ok sectors={} readonly={} id={id}",
                    blk.sectors(),
                    u8::from(blk.read_only())
                ))
            }
            (b"blk-write", [sector, count, seed]) => {
                let count = sectors(count)?;
                blk.write(number(sector)?, count, number(seed)?)?;
                Ok(format!("ok bytes={}", count * 512))
            }
            (b"blk-read", [sector, count]) => {
                let count = sectors(count)?;
                let hash = blk.read(number(sector)?, count)?;
                Ok(format!("ok bytes={} sha256={}", count * 512, hex(&hash)))
            }
            (b"blk-discard" | b"blk-zero", [sector, count]) => {
                blk.clear(number(sector)?, sectors(count)?, name == b"blk-discard")?;
                Ok(String::from("ok"))
            }
            _ => Err(String::from("unknown command or wrong number of arguments")),
        }
    }

    fn platform_command(&mut self, name: &[u8], words: &[&[u8]]) -> Result<String, String> {
        match (name, words) {
            (b"port", [port, text]) => {
                let port = u16::try_from(number(port)?).map_err(|_| "the port is too large")?;
                platform::print_to_port(port, text);
                Ok(String::from("ok"))
            }
            (b"console", [text]) => {
                self.pod.console()?.print(text)?;
                Ok(String::from("ok"))
            }
            (b"console-read", [count]) => {
                let count = number(count)? as usize;
                Ok(format!("ok {}", hex(&self.pod.console()?.typed(count)?)))
            }
            (b"console-size", []) => {
                let (columns, rows) = self.pod.console()?.size()?;
                Ok(format!("ok columns={columns} rows={rows}"))
            }
            (b"serial-read", [count]) => {
                let count = number(count)? as usize;
                Ok(format!("ok {}", hex(&platform::serial_typed(count)?)))
            }
            (b"watchdog", []) => {
                self.pod.watchdog()?.ping()?;
                Ok(String::from("ok"))
            }
            (b"panic", [events]) => {
                let events = u8::try_from(number(events)?).map_err(|_| "more than a byte of events")?;
                Ok(format!("ok known={}", self.pod.panic(events)?))
            }
            _ => Err(String::from("unknown command or wrong number of arguments")),
        }
    }

    fn probe(&mut self, seed: u64, device: &[u8]) -> Result<bool, String> {
        let page = self.pod.probe_page(seed);
        let done = match device {
            b"blk" => self.pod.blk()?.probe(page)?,
            b"fs" => self.pod.fs()?.probe(page)?,
            b"rng" => {
                self.pod.rng()?.probe(page)?;
                false
            }
            b"vsock" => self.vsock.probe(page)?,
            _ => return Err(String::from("no such device")),
        };
        // What the host would have written shows in the page; the vsock probe wrote its header there itself.
        let skip = if device == b"vsock" { 64 } else { 0 };
        Ok(done || !self.pod.probe_page_holds(seed, skip))
    }
}

fn echo(stream: &mut Stream, left: &mut u64) -> bool {
    let count = stream.received.len().min(stream.send_room());
    let count = count.min(usize::try_from(*left).unwrap_or(usize::MAX));
    if count > 0 {
        let (front, back) = stream.received.as_slices();
        let first = front.len().min(count);
        stream.unsent.extend(front.get(..first).unwrap_or_default());
        stream.unsent.extend(back.get(..count - first).unwrap_or_default());
        stream.received.drain(..count);
        *left -= count as u64;
    }
    count > 0
}

fn answer(stream: &mut Stream, text: &str) {
    stream.unsent.extend(text.as_bytes());
    stream.unsent.push_back(b'\n');
}

fn number(word: &[u8]) -> Result<u64, String> {
    let digits = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
    let text = core::str::from_utf8(word).ok().filter(|_| digits);
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| String::from("not a decimal number of 64 bits"))
}

fn sectors(word: &[u8]) -> Result<u64, String> {
    number(word).and_then(|count| {
        if count < SECTOR_LIMIT {
            Ok(count)
        } else {
            Err(String::from("too many sectors"))
        }
    })
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| DIGITS.get(usize::from(value)).copied().map_or('?', char::from);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn unhex(text: &[u8]) -> Result<[u8; 64], String> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let mut bytes = [0; 64];
    for (at, byte) in bytes.iter_mut().enumerate() {
        match (digit(text.get(at * 2)), digit(text.get(at * 2 + 1))) {
            (Some(high), Some(low)) if text.len() == 128 => *byte = (high << 4 | low) as u8,
            _ => return Err(String::from("report data is not 128 hex digits")),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_and_bounded() {
        assert_eq!(number(b"0"), Ok(0));
        assert_eq!(number(b"18446744073709551615"), Ok(u64::MAX));
        for bad in [&b""[..], b"-1", b"+1", b"0x1", b"18446744073709551616", b" 1", b"\xff"] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
        assert!(sectors(b"18446744073709551615").is_err());
    }

    #[test]
    fn hex_both_ways() {
        let bytes: [u8; 64] = core::array::from_fn(|at| at as u8 * 3);
        assert_eq!(unhex(hex(&bytes).as_bytes()), Ok(bytes));
        assert_eq!(hex(&[0x0f, 0xa0]), "0fa0");
        assert!(unhex(&[b'0'; 127]).is_err() && unhex(&[b'0'; 129]).is_err() && unhex(&[b'g'; 128]).is_err());
    }
}
