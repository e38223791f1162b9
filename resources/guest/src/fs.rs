//! What the pod does with the shared file system: walk and checksum a tree, write a file, read one. Opens, reads and
//! releases overlap; hashing goes on while the host fetches the next buffers.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::fuse::{self, BUFFERS, Client, Data, MAX_IO, Node, Op, ROOT, Reply, Ticket};
use crate::pattern::Pattern;
use crate::sha256::Sha256;

const O_WRONLY: u32 = 1;
const O_CREAT: u32 = 0o100;
const O_TRUNC: u32 = 0o1000;
const LIST_SIZE: usize = 64 << 10;
const OPEN_AHEAD: usize = 8;
/// More files than this in one walk are refused: the list lives in the heap.
const MAX_FILES: usize = 100_000;

/// A regular file of a walk.
pub struct File {
    node: u64,
    /// Size in bytes when it was listed.
    pub size: u64,
    /// Path from the root.
    pub path: Vec<u8>,
    /// SHA-256 of the contents, once read.
    pub hash: [u8; 32],
}

fn words(parts: &[u64]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.to_le_bytes()).collect()
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// Checksums every regular file under the root.
///
/// # Errors
/// As the server answers.
pub fn walk(client: &mut Client) -> Result<Vec<File>, &'static str> {
    let mut nodes = Vec::new();
    let outcome = list(client, &mut nodes).and_then(|mut files| {
        Pipeline::new(client, &mut files).run()?;
        Ok(files)
    });
    for node in nodes {
        client.forget(node)?;
    }
    client.flush_forgets()?;
    outcome
}

/// Lists the tree; every node that was looked up is noted in `nodes`.
fn list(client: &mut Client, nodes: &mut Vec<u64>) -> Result<Vec<File>, &'static str> {
    let mut files = Vec::new();
    let mut directories = vec![(ROOT, Vec::new())];
    while let Some((node, path)) = directories.pop() {
        let mut opened = [0; 16];
        client.call(Op::OpenDir, node, &words(&[0]), &mut opened)?;
        let handle = Reply(&opened).u64(0);
        let outcome = list_one(client, node, handle, |entry| {
            if matches!(entry.name, b"." | b"..") {
                return Ok(());
            }
            if entry.node.id > ROOT {
                nodes.push(entry.node.id);
            }
            if entry.name.iter().any(|byte| matches!(byte, b'\n' | b'/')) {
                return Err("a name holds a line feed or a slash");
            }
            let mut full: Vec<u8> = path.clone();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(entry.name);
            if entry.node.is_directory() {
                directories.push((entry.node.id, full));
            } else if entry.node.is_file() {
                files.push(File {
                    node: entry.node.id,
                    size: entry.node.size,
                    path: full,
                    hash: [0; 32],
                });
            }
            if files.len() + directories.len() > MAX_FILES {
                Err("too many files")
            } else {
                Ok(())
            }
        });
        client.call(Op::ReleaseDir, node, &words(&[handle, 0, 0]), &mut [])?;
        outcome?;
    }
    Ok(files)
}

fn list_one(
    client: &mut Client,
    node: u64,
    handle: u64,
    mut each: impl FnMut(fuse::DirEntry<'_>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let buffer = client.buffer(0)?.part(0, LIST_SIZE);
    let mut bytes = vec![0; LIST_SIZE];
    let mut offset = 0;
    // A server may list for ever; a directory of this many replies holds more files than are taken anyway.
    for _ in 0..MAX_FILES {
        let arguments = words(&[handle, offset, pair(LIST_SIZE as u32, 0), 0, 0]);
        let ticket = client.send(Op::ReadDirPlus, node, &[&arguments], Data::Into(buffer))?;
        let done = client.finish(ticket)?;
        if done.error != 0 {
            return Err(fuse::reason(done.error));
        }
        let reply = bytes.get_mut(..done.len).ok_or("a listing is too long")?;
        if reply.is_empty() {
            return Ok(());
        }
        buffer.read(0, reply);
        let mut any = false;
        for entry in fuse::entries(reply) {
            offset = entry.offset;
            any = true;
            each(entry)?;
        }
        if !any {
            return Err("a listing makes no sense");
        }
    }
    Err("a directory has no end")
}

struct Opening {
    file: usize,
    ticket: Ticket,
    handle: Option<u64>,
    issued: u64,
}

struct Reading {
    file: usize,
    ticket: Ticket,
    buffer: usize,
    len: usize,
    /// The handle to release after this, the file's last read.
    last: Option<u64>,
}

/// Reads and hashes files in order, with opens, reads and releases in flight.
struct Pipeline<'c> {
    client: &'c mut Client,
    files: &'c mut [File],
    next: usize,
    opening: VecDeque<Opening>,
    reading: VecDeque<Reading>,
    releasing: Vec<Ticket>,
    free: Vec<usize>,
    hash: Sha256,
}

impl<'c> Pipeline<'c> {
    fn new(client: &'c mut Client, files: &'c mut [File]) -> Self {
        Self {
            client,
            files,
            next: 0,
            opening: VecDeque::new(),
            reading: VecDeque::new(),
            releasing: Vec::new(),
            free: (0..BUFFERS).rev().collect(),
            hash: Sha256::new(),
        }
    }

    fn run(mut self) -> Result<(), &'static str> {
        let outcome = self.steps();
        // Whatever happened: nothing may stay in flight, and no file open.
        while let Some(opening) = self.opening.pop_front() {
            let handle = match opening.handle {
                Some(handle) => Some(handle),
                None => {
                    let done = self.client.finish(opening.ticket)?;
                    (done.error == 0).then(|| self.handle(opening.ticket))
                }
            };
            if let (Some(handle), Some(file)) = (handle, self.files.get(opening.file)) {
                self.client
                    .call(Op::Release, file.node, &words(&[handle, 0, 0]), &mut [])?;
            }
        }
        while let Some(reading) = self.reading.pop_front() {
            self.client.finish(reading.ticket)?;
            if let (Some(handle), Some(file)) = (reading.last, self.files.get(reading.file)) {
                self.client
                    .call(Op::Release, file.node, &words(&[handle, 0, 0]), &mut [])?;
            }
        }
        for ticket in self.releasing {
            self.client.finish(ticket)?;
        }
        outcome
    }

    fn handle(&self, ticket: Ticket) -> u64 {
        let mut reply = [0; 16];
        self.client.reply(ticket, &mut reply);
        Reply(&reply).u64(0)
    }

    fn steps(&mut self) -> Result<(), &'static str> {
        loop {
            self.open_ahead()?;
            self.read_ahead()?;
            self.client.kick();
            let client = &mut *self.client;
            self.releasing.retain(|ticket| client.take(*ticket).is_none());
            if self.reading.is_empty() && self.opening.is_empty() && self.next == self.files.len() {
                return Ok(());
            }
            let progress = self.note_opened()? | self.consume()?;
            if !progress {
                self.client.wait()?;
            }
        }
    }

    fn open_ahead(&mut self) -> Result<(), &'static str> {
        while self.opening.len() < OPEN_AHEAD && self.client.can_send() {
            let Some(file) = self.files.get_mut(self.next) else {
                break;
            };
            if file.size == 0 {
                file.hash = Sha256::digest(&[]);
            } else {
                let ticket = self.client.send(Op::Open, file.node, &[&[0; 8]], Data::None)?;
                self.opening.push_back(Opening {
                    file: self.next,
                    ticket,
                    handle: None,
                    issued: 0,
                });
            }
            self.next += 1;
        }
        Ok(())
    }

    fn note_opened(&mut self) -> Result<bool, &'static str> {
        let mut progress = false;
        for opening in self.opening.iter_mut().filter(|opening| opening.handle.is_none()) {
            if let Some(done) = self.client.take(opening.ticket) {
                let mut reply = [0; 16];
                self.client.reply(opening.ticket, &mut reply);
                // An error is told only after its place in line is known to need no release.
                opening.handle = Some(Reply(&reply).u64(0));
                progress = true;
                if done.error != 0 {
                    let file = opening.file;
                    self.opening.retain(|other| other.file != file);
                    return Err(fuse::reason(done.error));
                }
            }
        }
        Ok(progress)
    }

    fn read_ahead(&mut self) -> Result<(), &'static str> {
        while self.client.can_send() {
            let Some((opening, handle)) = self
                .opening
                .front_mut()
                .and_then(|o| o.handle.map(|handle| (o, handle)))
            else {
                break;
            };
            let (Some(file), Some(index)) = (self.files.get(opening.file), self.free.pop()) else {
                break;
            };
            let len = (file.size - opening.issued).min(MAX_IO as u64) as usize;
            let buffer = self.client.buffer(index)?.part(0, len);
            let arguments = words(&[handle, opening.issued, pair(len as u32, 0), 0, 0]);
            let ticket = self
                .client
                .send(Op::Read, file.node, &[&arguments], Data::Into(buffer))?;
            opening.issued += len as u64;
            let last = (opening.issued == file.size).then_some(handle);
            self.reading.push_back(Reading {
                file: opening.file,
                ticket,
                buffer: index,
                len,
                last,
            });
            if last.is_some() {
                self.opening.pop_front();
            }
        }
        Ok(())
    }

    /// Hashes what has arrived, in order.
    fn consume(&mut self) -> Result<bool, &'static str> {
        let Some(front) = self.reading.front() else {
            return Ok(false);
        };
        let Some(done) = self.client.take(front.ticket) else {
            return Ok(false);
        };
        let Some(reading) = self.reading.pop_front() else {
            return Ok(false);
        };
        let file = self.files.get_mut(reading.file).ok_or("no such file")?;
        let mut outcome = Ok(true);
        if done.error != 0 {
            outcome = Err(fuse::reason(done.error));
        } else if done.len != reading.len {
            outcome = Err("a file became shorter while it was read");
        } else {
            crate::hash_shared(&mut self.hash, self.client.buffer(reading.buffer)?.part(0, reading.len));
        }
        self.free.push(reading.buffer);
        if let Some(handle) = reading.last {
            file.hash = self.hash.finalize_reset();
            let arguments = words(&[handle, 0, 0]);
            self.releasing
                .push(self.client.send(Op::Release, file.node, &[&arguments], Data::None)?);
        }
        outcome
    }
}

/// Looks a path up, from the root. Every node on the way is forgotten again except the last.
fn lookup(client: &mut Client, path: &[u8]) -> Result<Node, &'static str> {
    let mut node = Node {
        id: ROOT,
        size: 0,
        mode: 0o040_755,
    };
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        if matches!(name, b"." | b"..") {
            return Err("a path may not hold . or ..");
        }
        let mut entry = [0; fuse::ENTRY_LEN];
        let name = [name, b"\0"].concat();
        let outcome = client.call(Op::Lookup, node.id, &name, &mut entry);
        client.forget(node.id)?;
        outcome?;
        node = Node::parse(&entry);
        if node.id == 0 {
            return Err(fuse::reason(2));
        }
    }
    Ok(node)
}

/// Size and SHA-256 of a file.
///
/// # Errors
/// As the server answers.
pub fn read(client: &mut Client, path: &[u8]) -> Result<File, &'static str> {
    let node = lookup(client, path)?;
    let mut files = [File {
        node: node.id,
        size: node.size,
        path: path.to_vec(),
        hash: [0; 32],
    }];
    let outcome = if node.is_file() {
        Pipeline::new(client, &mut files).run()
    } else {
        Err("not a regular file")
    };
    client.forget(node.id)?;
    client.flush_forgets()?;
    outcome?;
    let [file] = files;
    Ok(file)
}

/// Creates a file with `len` bytes of a pattern and makes it durable.
///
/// # Errors
/// As the server answers.
pub fn write(client: &mut Client, path: &[u8], len: u64, seed: u64) -> Result<(), &'static str> {
    let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            path.get(at + 1..).unwrap_or_default(),
        ),
        None => (&[][..], path),
    };
    if matches!(name, b"" | b"." | b"..") {
        return Err("the path names no file");
    }
    let directory = lookup(client, parent)?;
    let outcome = create(client, directory.id, name).and_then(|(node, handle)| {
        let outcome = fill(client, node, handle, len, seed);
        let fsync = outcome.and_then(|()| client.call(Op::Fsync, node, &words(&[handle, 0]), &mut []).map(|_| ()));
        client.call(Op::Release, node, &words(&[handle, 0, 0]), &mut [])?;
        client.forget(node)?;
        fsync
    });
    client.forget(directory.id)?;
    client.flush_forgets()?;
    outcome
}

fn create(client: &mut Client, directory: u64, name: &[u8]) -> Result<(u64, u64), &'static str> {
    let mut arguments = words(&[pair(O_WRONLY | O_CREAT | O_TRUNC, 0o100_644), 0]);
    arguments.extend_from_slice(name);
    arguments.push(0);
    let mut reply = [0; fuse::ENTRY_LEN + 16];
    client.call(Op::Create, directory, &arguments, &mut reply)?;
    Ok((Node::parse(&reply).id, Reply(&reply).u64(fuse::ENTRY_LEN)))
}

/// Writes the pattern, with several writes in flight.
fn fill(client: &mut Client, node: u64, handle: u64, len: u64, seed: u64) -> Result<(), &'static str> {
    let mut pattern = Pattern::new(seed);
    let mut bytes = vec![0; 16 << 10];
    let mut flying: VecDeque<(Ticket, usize)> = VecDeque::new();
    let (mut offset, mut turn, mut outcome) = (0, 0, Ok(()));
    while (offset < len && outcome.is_ok()) || !flying.is_empty() {
        if offset < len && outcome.is_ok() && flying.len() < BUFFERS {
            let count = (len - offset).min(client.max_write() as u64) as usize;
            let buffer = client.buffer(turn % BUFFERS)?.part(0, count);
            turn += 1;
            for at in (0..count).step_by(bytes.len()) {
                let end = bytes.len().min(count - at);
                let piece = bytes.get_mut(..end).unwrap_or_default();
                pattern.fill(piece);
                buffer.write(at, piece);
            }
            let arguments = words(&[handle, offset, pair(count as u32, 0), 0, 0]);
            flying.push_back((client.send(Op::Write, node, &[&arguments], Data::From(buffer))?, count));
            client.kick();
            offset += count as u64;
            continue;
        }
        let Some((ticket, count)) = flying.pop_front() else {
            break;
        };
        let done = client.finish(ticket)?;
        let mut reply = [0; 8];
        client.reply(ticket, &mut reply);
        if done.error != 0 {
            outcome = outcome.and(Err(fuse::reason(done.error)));
        } else if Reply(&reply).u32(0) as usize != count {
            outcome = outcome.and(Err("a write was cut short"));
        }
    }
    outcome
}
