//! FUSE as virtio-fs carries it (virtio 1.2, 5.11; Linux include/uapi/linux/fuse.h, protocol 7.31): messages, request
//! slots in the shared window, and a client that keeps several requests in flight. What the host answers is checked
//! for length; sizes, names and handles in it are only believed as far as they cannot hurt.

use alloc::vec;
use alloc::vec::Vec;

use crate::paging::PageTables;
use crate::pci::Function;
use crate::virtio::{Device, Piece, Queue};
use crate::window::{Shared, Window};

/// The root directory's node.
pub const ROOT: u64 = 1;
/// The largest read or write. Twice as much is no faster, and touches twice the memory.
pub const MAX_IO: usize = 512 << 10;
/// Data buffers of [`MAX_IO`] bytes.
pub const BUFFERS: usize = 4;
const SLOTS: usize = 32;
const PAGE: usize = 4096;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Where the reply lies in a slot's page.
const REPLY_AT: usize = 2048;
/// Length of `fuse_entry_out`.
pub const ENTRY_LEN: usize = 128;

/// FUSE operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the protocol's names")]
pub enum Op {
    Lookup = 1,
    GetAttr = 3,
    Open = 14,
    Read = 15,
    Write = 16,
    Release = 18,
    Fsync = 20,
    Init = 26,
    OpenDir = 27,
    ReleaseDir = 29,
    Create = 35,
    BatchForget = 42,
    ReadDirPlus = 44,
}

/// Little-endian integers read from a reply; what lies beyond its end reads as zero.
#[derive(Clone, Copy)]
pub struct Reply<'b>(pub &'b [u8]);

impl Reply<'_> {
    /// A u32.
    #[must_use]
    pub fn u32(&self, at: usize) -> u32 {
        self.0
            .get(at..)
            .and_then(<[u8]>::first_chunk)
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// A u64.
    #[must_use]
    pub fn u64(&self, at: usize) -> u64 {
        self.0
            .get(at..)
            .and_then(<[u8]>::first_chunk)
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// What a directory entry or a lookup says of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Node number; 0 for none.
    pub id: u64,
    /// Size in bytes.
    pub size: u64,
    /// File type and permissions.
    pub mode: u32,
}

impl Node {
    /// From a `fuse_entry_out`.
    #[must_use]
    pub fn parse(entry: &[u8]) -> Self {
        let entry = Reply(entry);
        Self {
            id: entry.u64(0),
            size: entry.u64(48),
            mode: entry.u32(100),
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }
}

/// One entry of a READDIRPLUS reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'b> {
    /// The node, already looked up once more.
    pub node: Node,
    /// Where the next READDIRPLUS goes on.
    pub offset: u64,
    /// Name, without NUL.
    pub name: &'b [u8],
}

/// The entries of a READDIRPLUS reply; ends at the first that does not fit.
pub fn entries(mut reply: &[u8]) -> impl Iterator<Item = DirEntry<'_>> {
    const DIRENT: usize = 24;
    core::iter::from_fn(move || {
        let head = reply.get(..ENTRY_LEN + DIRENT)?;
        let fields = Reply(head);
        let len = fields.u32(ENTRY_LEN + 16) as usize;
        let name = reply
            .get(ENTRY_LEN + DIRENT..)?
            .get(..len)
            .filter(|name| !name.is_empty())?;
        let entry = DirEntry {
            node: Node::parse(head),
            offset: fields.u64(ENTRY_LEN + 8),
            name,
        };
        let next = (ENTRY_LEN + DIRENT + len).next_multiple_of(8);
        reply = reply.get(next..).unwrap_or_default();
        Some(entry)
    })
}

/// A request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(usize);

/// What became of a request.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Bytes after the reply's header.
    pub len: usize,
    /// 0 or an errno.
    pub error: u32,
}

struct Slot {
    page: Shared,
    token: Option<u16>,
    done: Option<Done>,
    busy: bool,
}

/// The FUSE client.
pub struct Client {
    device: Device,
    priority: Queue,
    requests: Queue,
    slots: Vec<Slot>,
    buffers: Vec<Shared>,
    unique: u64,
    max_write: usize,
    forgotten: Vec<u64>,
}

/// What goes with a request beside its arguments.
#[derive(Clone, Copy)]
pub enum Data {
    /// Nothing: the reply fits into the slot's page.
    None,
    /// The reply's payload goes there.
    Into(Shared),
    /// The request's payload is there.
    From(Shared),
}

impl Client {
    /// Brings the device up and opens the session.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window) -> Result<Self, &'static str> {
        let full = "the shared window is used up";
        let device = Device::start(function, tables, 0)?;
        let priority = device.queue(window, 0, 16)?;
        let requests = device.queue(window, 1, 128)?;
        device.go();
        let pages = window.take(SLOTS * PAGE).ok_or(full)?;
        let slots = (0..SLOTS)
            .map(|index| Slot {
                page: pages.part(index * PAGE, PAGE),
                token: None,
                done: None,
                busy: false,
            })
            .collect();
        let mut buffers = Vec::new();
        for _ in 0..BUFFERS {
            buffers.push(window.take(MAX_IO).ok_or(full)?);
        }
        let mut client = Self {
            device,
            priority,
            requests,
            slots,
            buffers,
            unique: 0,
            max_write: 4096,
            forgotten: Vec::new(),
        };
        client.init()?;
        Ok(client)
    }

    fn init(&mut self) -> Result<(), &'static str> {
        const ASYNC_READ: u32 = 1;
        const BIG_WRITES: u32 = 1 << 5;
        const READDIRPLUS: u32 = 1 << 13;
        const MAX_PAGES: u32 = 1 << 22;
        let flags = ASYNC_READ | BIG_WRITES | READDIRPLUS | MAX_PAGES;
        let mut arguments = Vec::new();
        for word in [7, 31, MAX_IO as u32, flags] {
            arguments.extend_from_slice(&word.to_le_bytes());
        }
        let mut reply = [0; 64];
        let len = self.call(Op::Init, 0, &arguments, &mut reply)?;
        let reply = Reply(&reply);
        if len < 24 || reply.u32(0) != 7 || reply.u32(12) & READDIRPLUS == 0 {
            return Err("the file server's protocol is too old");
        }
        self.max_write = (reply.u32(20) as usize).clamp(4096, MAX_IO);
        Ok(())
    }

    /// The largest write that the server takes.
    #[must_use]
    pub fn max_write(&self) -> usize {
        self.max_write
    }

    /// Data buffer `index`.
    ///
    /// # Errors
    /// When there is no such buffer.
    pub fn buffer(&self, index: usize) -> Result<Shared, &'static str> {
        self.buffers.get(index).copied().ok_or("no such buffer")
    }

    /// Whether another request can be sent now.
    #[must_use]
    pub fn can_send(&self) -> bool {
        self.requests.room() >= 4 && self.slots.iter().any(|slot| !slot.busy)
    }

    /// Sends a request. Its answer must be taken with [`Client::take`].
    ///
    /// # Errors
    /// When there is no room; never while [`Client::can_send`], if arguments are short.
    pub fn send(&mut self, op: Op, node: u64, arguments: &[&[u8]], data: Data) -> Result<Ticket, &'static str> {
        let index = self
            .slots
            .iter()
            .position(|slot| !slot.busy)
            .ok_or("too many requests in flight")?;
        let page = self.slots.get(index).ok_or("no such slot")?.page;
        let extra = if let Data::From(data) = data { data.len() } else { 0 };
        let len = self.write_request(page, op, node, arguments, extra)?;
        let request = Piece::In(page.part(0, len));
        let header = Piece::Out(page.part(REPLY_AT, OUT_HEADER));
        let token = match data {
            Data::None => self
                .requests
                .push(&[request, Piece::Out(page.part(REPLY_AT, PAGE - REPLY_AT))]),
            Data::Into(into) => self.requests.push(&[request, header, Piece::Out(into)]),
            Data::From(from) => self.requests.push(&[
                request,
                Piece::In(from),
                Piece::Out(page.part(REPLY_AT, PAGE - REPLY_AT)),
            ]),
        };
        let slot = self.slots.get_mut(index).ok_or("no such slot")?;
        slot.token = Some(token.ok_or("the queue is full")?);
        slot.done = None;
        slot.busy = true;
        Ok(Ticket(index))
    }

    fn write_request(
        &mut self,
        page: Shared,
        op: Op,
        node: u64,
        arguments: &[&[u8]],
        extra: usize,
    ) -> Result<usize, &'static str> {
        self.unique += 1;
        let len = IN_HEADER + arguments.iter().map(|part| part.len()).sum::<usize>();
        if len > REPLY_AT {
            return Err("the request is too long");
        }
        page.part(0, IN_HEADER).clear();
        page.set(0, (len + extra) as u32);
        page.set(4, op as u32);
        page.set(8, self.unique);
        page.set(16, node);
        let mut at = IN_HEADER;
        for part in arguments {
            page.write(at, part);
            at += part.len();
        }
        page.part(REPLY_AT, OUT_HEADER).clear();
        Ok(len)
    }

    /// Tells the device about what was sent.
    pub fn kick(&mut self) {
        self.requests.kick();
    }

    fn reap(&mut self) {
        while let Some(used) = self.requests.pop() {
            if let Some(slot) = self.slots.iter_mut().find(|slot| slot.token == Some(used.token)) {
                let len = slot.page.get::<u32>(REPLY_AT) as usize;
                let error = slot.page.get::<u32>(REPLY_AT + 4).wrapping_neg();
                let plausible = (OUT_HEADER..=OUT_HEADER + MAX_IO).contains(&len) && used.len as usize >= OUT_HEADER;
                const EIO: u32 = 5;
                slot.done = Some(if plausible {
                    Done {
                        len: len - OUT_HEADER,
                        error,
                    }
                } else {
                    Done { len: 0, error: EIO }
                });
                slot.token = None;
            }
        }
    }

    /// Takes the answer of a request that is done.
    pub fn take(&mut self, ticket: Ticket) -> Option<Done> {
        self.reap();
        let slot = self.slots.get_mut(ticket.0)?;
        let done = slot.done.take()?;
        slot.busy = false;
        Some(done)
    }

    /// The reply's payload, which stays until the slot is used again.
    pub fn reply(&self, ticket: Ticket, into: &mut [u8]) {
        if let Some(slot) = self.slots.get(ticket.0) {
            let count = into.len().min(PAGE - REPLY_AT - OUT_HEADER);
            slot.page
                .read(REPLY_AT + OUT_HEADER, into.get_mut(..count).unwrap_or_default());
        }
    }

    /// Waits until something is done.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn wait(&mut self) -> Result<(), &'static str> {
        self.requests.kick();
        crate::idle::wait_for(&[&self.requests]);
        self.reap();
        if self.requests.broken() {
            Err("the device broke its queue")
        } else {
            Ok(())
        }
    }

    /// Waits for a request and takes its answer.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn finish(&mut self, ticket: Ticket) -> Result<Done, &'static str> {
        loop {
            if let Some(done) = self.take(ticket) {
                return Ok(done);
            }
            self.wait()?;
        }
    }

    /// Sends a request and waits; returns the length of the reply's payload, of which `reply` receives the start.
    ///
    /// # Errors
    /// As the server answers.
    pub fn call(&mut self, op: Op, node: u64, arguments: &[u8], reply: &mut [u8]) -> Result<usize, &'static str> {
        let ticket = self.send(op, node, &[arguments], Data::None)?;
        let done = self.finish(ticket)?;
        if done.error != 0 {
            return Err(reason(done.error));
        }
        self.reply(ticket, reply);
        Ok(done.len)
    }

    /// Gives up one lookup of `node`, some time before [`Client::flush_forgets`] returns.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn forget(&mut self, node: u64) -> Result<(), &'static str> {
        const BATCH: usize = 120;
        if node > ROOT {
            self.forgotten.push(node);
        }
        if self.forgotten.len() >= BATCH {
            self.flush_forgets()
        } else {
            Ok(())
        }
    }

    /// Sends the forgets that wait.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn flush_forgets(&mut self) -> Result<(), &'static str> {
        let nodes = core::mem::take(&mut self.forgotten);
        if nodes.is_empty() {
            return Ok(());
        }
        let mut arguments = vec![];
        arguments.extend_from_slice(&(nodes.len() as u64).to_le_bytes());
        for node in nodes {
            arguments.extend_from_slice(&node.to_le_bytes());
            arguments.extend_from_slice(&1_u64.to_le_bytes());
        }
        let index = self
            .slots
            .iter()
            .position(|slot| !slot.busy)
            .ok_or("too many requests in flight")?;
        let page = self.slots.get(index).ok_or("no such slot")?.page;
        let len = self.write_request(page, Op::BatchForget, 0, &[&arguments], 0)?;
        self.priority
            .push(&[Piece::In(page.part(0, len))])
            .ok_or("the queue is full")?;
        self.priority.wait().map(|_| ())
    }

    /// Asks the device to take a request from the private page `page`, then to put a reply there. True when it did the
    /// first; the second shows in the page.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn probe(&mut self, page: Shared) -> Result<bool, &'static str> {
        let index = self
            .slots
            .iter()
            .position(|slot| !slot.busy)
            .ok_or("too many requests in flight")?;
        let own = self.slots.get(index).ok_or("no such slot")?.page;
        let mut kept = [0; PAGE];
        page.read(0, &mut kept);
        let len = self.write_request(page, Op::GetAttr, ROOT, &[&[0; 16]], 0)?;
        own.part(REPLY_AT, OUT_HEADER).clear();
        let reply = own.part(REPLY_AT, PAGE - REPLY_AT);
        self.requests
            .push(&[Piece::In(page.part(0, len)), Piece::Out(reply)])
            .ok_or("the queue is full")?;
        self.requests.wait()?;
        let read = own.get::<u32>(REPLY_AT) as usize > OUT_HEADER && own.get::<u32>(REPLY_AT + 4) == 0;
        page.write(0, &kept);
        let len = self.write_request(own, Op::GetAttr, ROOT, &[&[0; 16]], 0)?;
        self.requests
            .push(&[Piece::In(own.part(0, len)), Piece::Out(page)])
            .ok_or("the queue is full")?;
        self.requests.wait()?;
        let _ = &self.device;
        Ok(read)
    }
}

/// An errno in words.
#[must_use]
pub fn reason(errno: u32) -> &'static str {
    match errno {
        1 => "operation not permitted",
        2 => "no such file or directory",
        5 => "input/output error",
        13 => "permission denied",
        17 => "file exists",
        20 => "not a directory",
        21 => "is a directory",
        22 => "invalid argument",
        24 => "too many open files",
        27 => "file too large",
        28 => "no space left",
        30 => "read-only file system",
        36 => "name too long",
        38 => "not implemented by the file server",
        _ => "the file server refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u64, mode: u32, size: u64, offset: u64, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; ENTRY_LEN + 24];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[48..56].copy_from_slice(&size.to_le_bytes());
        bytes[100..104].copy_from_slice(&mode.to_le_bytes());
        bytes[ENTRY_LEN + 8..ENTRY_LEN + 16].copy_from_slice(&offset.to_le_bytes());
        bytes[ENTRY_LEN + 16..ENTRY_LEN + 20].copy_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn directory_entries_are_read() {
        let reply = [
            entry(5, 0o100_644, 77, 1, b"a"),
            entry(6, 0o040_755, 0, 2, b"directory"),
        ]
        .concat();
        let found: Vec<_> = entries(&reply).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].node.id, found[0].node.size, found[0].name, found[0].offset),
            (5, 77, &b"a"[..], 1)
        );
        assert!(found[0].node.is_file() && !found[0].node.is_directory());
        assert!(found[1].node.is_directory() && found[1].name == b"directory");
    }

    #[test]
    fn a_cut_or_lying_reply_ends_the_listing() {
        let reply = [
            entry(5, 0o100_644, 77, 1, b"a"),
            entry(6, 0o100_644, 0, 2, b"bcdefghij"),
        ]
        .concat();
        for len in 0..reply.len() - 7 {
            assert!(entries(&reply[..len]).count() < 2);
        }
        let mut lying = reply.clone();
        lying[ENTRY_LEN + 16..ENTRY_LEN + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(entries(&lying).count(), 0);
        lying[ENTRY_LEN + 16..ENTRY_LEN + 20].copy_from_slice(&0_u32.to_le_bytes());
        assert_eq!(entries(&lying).count(), 0, "a name of no bytes would loop");
    }
}
