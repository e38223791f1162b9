//! The front end's half of the vhost-user protocol on one connection. The layouts of messages are rust-vmm's `vhost`;
//! sending and receiving are here, for its connection waits for ever for a back end that does not answer, and this
//! process has one thread for all of a pod. All waits of one operation together end after [`ANSWER_LIMIT`].

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserMemory, VhostUserProtocolFeatures, VhostUserU64,
    VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::table::{self, Region, user_address};
use super::{ANSWER_LIMIT, CONNECT_LIMIT, VhostUserError};
use crate::memory::PodMemory;
use crate::unix_socket::sys;

/// Request, flags, size of the body.
const HEADER: usize = 12;
/// Flags of a header: the version, an answer, an answer is wanted.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Memory regions that every back end takes in one table.
const TABLE_REGIONS: usize = 8;
/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(10);
/// The shortest wait: what has come already is taken even if it is late.
const AT_LEAST: Duration = Duration::from_millis(1);

/// Protocol features that are used where the back end has them.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// This end of a connection.
pub(super) struct Frontend {
    socket: UnixStream,
    path: PathBuf,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// The regions that the back end knows.
    regions: Vec<Region>,
    gone: bool,
    limit: Duration,
    /// When the operation that is under way has taken too long.
    deadline: Instant,
}

/// A request's name for people.
fn name(request: FrontendReq) -> &'static str {
    match request {
        FrontendReq::GET_FEATURES => "GET_FEATURES",
        FrontendReq::SET_FEATURES => "SET_FEATURES",
        FrontendReq::SET_OWNER => "SET_OWNER",
        FrontendReq::SET_MEM_TABLE => "SET_MEM_TABLE",
        FrontendReq::SET_VRING_NUM => "SET_VRING_NUM",
        FrontendReq::SET_VRING_ADDR => "SET_VRING_ADDR",
        FrontendReq::SET_VRING_BASE => "SET_VRING_BASE",
        FrontendReq::GET_VRING_BASE => "GET_VRING_BASE",
        FrontendReq::SET_VRING_KICK => "SET_VRING_KICK",
        FrontendReq::SET_VRING_CALL => "SET_VRING_CALL",
        FrontendReq::SET_VRING_ENABLE => "SET_VRING_ENABLE",
        FrontendReq::GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
        FrontendReq::SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
        FrontendReq::GET_QUEUE_NUM => "GET_QUEUE_NUM",
        FrontendReq::NET_SET_MTU => "NET_SET_MTU",
        FrontendReq::GET_CONFIG => "GET_CONFIG",
        FrontendReq::SET_CONFIG => "SET_CONFIG",
        FrontendReq::GET_MAX_MEM_SLOTS => "GET_MAX_MEM_SLOTS",
        FrontendReq::ADD_MEM_REG => "ADD_MEM_REG",
        FrontendReq::REM_MEM_REG => "REM_MEM_REG",
        _ => "a request",
    }
}

fn header(request: FrontendReq, flags: u32, len: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    let parts = [
        u32::from(request),
        VERSION | flags,
        u32::try_from(len).unwrap_or(u32::MAX),
    ];
    let parts = parts.iter().flat_map(|part| part.to_ne_bytes());
    bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
    bytes
}

/// Connects to `path`, which may take a moment to appear, or have a listener that is not quick to accept.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    loop {
        let error = match sys::connect(path) {
            Ok(socket) => return socket.set_nonblocking(false).map(|()| socket),
            Err(error) => error,
        };
        let passing = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
        );
        if !passing || Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(RETRY);
    }
}

/// Listens on `path` for one client, and takes the path away when it is there or does not come.
pub(super) fn accept(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        // What another monitor left there.
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + limit;
    let outcome = loop {
        match listener.accept() {
            Ok((socket, _)) => break socket.set_nonblocking(false).map(|()| socket),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Err(io::ErrorKind::TimedOut.into()),
            Err(e) => break Err(e),
        }
    };
    std::fs::remove_file(path)?;
    outcome
}

impl Frontend {
    /// Connects to `path`, takes ownership of the back end and negotiates the protocol's features.
    pub(super) fn open(path: &Path) -> Result<Self, VhostUserError> {
        let socket = connect(path).map_err(|source| VhostUserError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::on(socket, path, ANSWER_LIMIT)
    }

    /// As [`Frontend::open`], but it is the back end that connects.
    pub(super) fn listen(path: &Path) -> Result<Self, VhostUserError> {
        let socket = accept(path, ANSWER_LIMIT).map_err(|source| VhostUserError::Accept {
            path: path.to_owned(),
            source,
        })?;
        Self::on(socket, path, ANSWER_LIMIT)
    }

    /// As [`Frontend::open`], on a connected socket.
    pub(super) fn on(socket: UnixStream, path: &Path, limit: Duration) -> Result<Self, VhostUserError> {
        let mut this = Self {
            socket,
            path: path.to_owned(),
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            regions: Vec::new(),
            gone: false,
            limit,
            deadline: Instant::now() + limit,
        };
        this.features = this.get(FrontendReq::GET_FEATURES)?;
        if this.features & PROTOCOL_FEATURES != 0 {
            let theirs = this.get(FrontendReq::GET_PROTOCOL_FEATURES)?;
            let both = VhostUserProtocolFeatures::from_bits_truncate(theirs).intersection(WANTED);
            // Sent before `protocol` holds REPLY_ACK: this one is not answered.
            this.set(FrontendReq::SET_PROTOCOL_FEATURES, &VhostUserU64::new(both.bits()), &[])?;
            this.protocol = both;
        }
        this.tell(FrontendReq::SET_OWNER, &[], &[])?;
        Ok(this)
    }

    /// An operation begins: its messages together have [`ANSWER_LIMIT`].
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.limit;
    }

    /// The virtio features of the back end, and those of the protocol among them.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Whether the back end is given up.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// How many queues the back end has, if it says so.
    pub(super) fn queue_count(&mut self) -> Result<Option<u64>, VhostUserError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            return Ok(None);
        }
        self.get(FrontendReq::GET_QUEUE_NUM).map(Some)
    }

    /// Tells the driver's choice of features.
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), VhostUserError> {
        let features = features | self.features & PROTOCOL_FEATURES;
        self.set(FrontendReq::SET_FEATURES, &VhostUserU64::new(features), &[])
    }

    /// Tells the largest packet, if the back end wants to know.
    pub(super) fn set_mtu(&mut self, mtu: u16) -> Result<(), VhostUserError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::MTU) {
            return Ok(());
        }
        self.set(FrontendReq::NET_SET_MTU, &VhostUserU64::new(u64::from(mtu)), &[])
    }

    /// Reads the first bytes of the configuration space.
    pub(super) fn config(&mut self, config: &mut [u8]) -> Result<(), VhostUserError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.lacks("a configuration (protocol feature CONFIG)"));
        }
        let request = FrontendReq::GET_CONFIG;
        let len = u32::try_from(config.len()).unwrap_or(u32::MAX);
        let body = VhostUserConfig::new(0, len, VhostUserConfigFlags::empty());
        self.send(request, 0, &[body.as_slice(), config], &[])?;
        let mut answer = vec![0; body.as_slice().len().saturating_add(config.len())];
        self.receive(request, &mut answer)?;
        for (to, from) in config.iter_mut().zip(answer.iter().skip(body.as_slice().len())) {
            *to = *from;
        }
        Ok(())
    }

    /// Passes a write of the driver to configuration space on.
    pub(super) fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), VhostUserError> {
        self.begin();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        // Type 0: the driver writes a writable field.
        let body = VhostUserConfig::new(offset, len, VhostUserConfigFlags::empty());
        self.tell(FrontendReq::SET_CONFIG, &[body.as_slice(), bytes], &[])
    }

    /// Whether the back end knows of memory.
    pub(super) fn has_memory(&self) -> bool {
        !self.regions.is_empty()
    }

    /// Tells the pod's memory: as a whole, or, where rings are `running`, what came and went if the back end can do that.
    pub(super) fn set_memory(&mut self, memory: &PodMemory, running: bool) -> Result<(), VhostUserError> {
        let new = table::regions(memory)?;
        if new == self.regions {
            return Ok(());
        }
        let slots = self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        // Of a stopped ring, QEMU's back ends still want each table to hold the old addresses: one region at a time does not.
        if new.len() <= TABLE_REGIONS && (!running || self.regions.is_empty() || !slots) {
            return self.set_table(new);
        }
        let max = match slots {
            true => self.get(FrontendReq::GET_MAX_MEM_SLOTS)?,
            false => TABLE_REGIONS as u64,
        };
        if new.len() as u64 > max {
            return Err(VhostUserError::Regions {
                path: self.path.clone(),
                count: new.len(),
                max: usize::try_from(max).unwrap_or(usize::MAX),
            });
        }
        let old = std::mem::take(&mut self.regions);
        for region in old.iter().filter(|region| !new.contains(region)) {
            self.set(FrontendReq::REM_MEM_REG, &region.single(), &[])?;
        }
        for region in new.iter().filter(|region| !old.contains(region)) {
            self.set(FrontendReq::ADD_MEM_REG, &region.single(), &[region.fd()])?;
        }
        self.regions = new;
        Ok(())
    }

    fn set_table(&mut self, regions: Vec<Region>) -> Result<(), VhostUserError> {
        let count = VhostUserMemory::new(u32::try_from(regions.len()).unwrap_or(0));
        let entries: Vec<_> = regions.iter().map(Region::entry).collect();
        let fds: Vec<RawFd> = regions.iter().map(Region::fd).collect();
        let mut body = vec![count.as_slice()];
        body.extend(entries.iter().map(ByteValued::as_slice));
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)?;
        self.regions = regions;
        Ok(())
    }

    /// Gives the back end ring `index`; it runs once it is enabled.
    pub(super) fn start_ring(
        &mut self,
        index: u32,
        queue: &Queue,
        doorbell: &EventFd,
        call: &EventFd,
    ) -> Result<(), VhostUserError> {
        let size = VhostUserVringState::new(index, u32::from(queue.size()));
        self.set(FrontendReq::SET_VRING_NUM, &size, &[])?;
        let base = VhostUserVringState::new(index, u32::from(queue.next_avail()));
        self.set(FrontendReq::SET_VRING_BASE, &base, &[])?;
        let rings = VhostUserVringAddr::new(
            index,
            VhostUserVringAddrFlags::empty(),
            user_address(queue.desc_table()),
            user_address(queue.used_ring()),
            user_address(queue.avail_ring()),
            0,
        );
        self.set(FrontendReq::SET_VRING_ADDR, &rings, &[])?;
        self.set_call(index, call)?;
        let body = VhostUserU64::new(u64::from(index));
        self.set(FrontendReq::SET_VRING_KICK, &body, &[doorbell.as_raw_fd()])
    }

    /// Tells the back end how ring `index` interrupts.
    pub(super) fn set_call(&mut self, index: u32, call: &EventFd) -> Result<(), VhostUserError> {
        let body = VhostUserU64::new(u64::from(index));
        self.set(FrontendReq::SET_VRING_CALL, &body, &[call.as_raw_fd()])
    }

    /// Enables or disables ring `index`; without the protocol's features a ring is enabled when it starts.
    pub(super) fn enable_ring(&mut self, index: u32, on: bool) -> Result<(), VhostUserError> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let body = VhostUserVringState::new(index, u32::from(on));
        self.set(FrontendReq::SET_VRING_ENABLE, &body, &[])
    }

    /// Takes ring `index` back; the back end has let go of it when this returns.
    pub(super) fn stop_ring(&mut self, index: u32) -> Result<(), VhostUserError> {
        self.enable_ring(index, false)?;
        let request = FrontendReq::GET_VRING_BASE;
        self.send(request, 0, &[VhostUserVringState::new(index, 0).as_slice()], &[])?;
        self.receive(request, VhostUserVringState::default().as_mut_slice())
    }

    /// The socket is readable, and nothing was asked.
    ///
    /// # Errors
    /// When the back end is gone or speaks unasked; it is given up then.
    pub(super) fn check(&mut self) -> Result<(), VhostUserError> {
        if self.gone {
            return Err(self.is_away());
        }
        let mut byte = [0];
        let read = self
            .socket
            .set_nonblocking(true)
            .and_then(|()| (&self.socket).read(&mut byte));
        let restored = self.socket.set_nonblocking(false);
        match read {
            // An answer that was taken since the loop saw it, or a signal.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                restored.map_err(|e| self.broken("waiting", e))
            }
            Ok(0) => {
                self.give_up();
                Err(self.is_away())
            }
            Ok(_) => Err(self.wrong("waiting", "speaks unasked")),
            Err(e) => Err(self.broken("waiting", e)),
        }
    }

    /// Ends the connection.
    pub(super) fn give_up(&mut self) {
        self.gone = true;
        self.regions.clear();
        // The other end may have done so.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn is_away(&self) -> VhostUserError {
        VhostUserError::Gone {
            path: self.path.clone(),
        }
    }

    /// The back end lacks `what`.
    pub(super) fn lacks(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Lacks {
            path: self.path.clone(),
            what,
        }
    }

    fn broken(&mut self, during: &'static str, source: io::Error) -> VhostUserError {
        self.give_up();
        let path = self.path.clone();
        VhostUserError::Io { path, during, source }
    }

    fn wrong(&mut self, during: &'static str, what: &'static str) -> VhostUserError {
        self.give_up();
        let path = self.path.clone();
        VhostUserError::Protocol { path, during, what }
    }

    /// Asks for a number.
    fn get(&mut self, request: FrontendReq) -> Result<u64, VhostUserError> {
        self.send(request, 0, &[], &[])?;
        let mut answer = VhostUserU64::default();
        self.receive(request, answer.as_mut_slice())?;
        Ok(answer.value)
    }

    fn set<T: ByteValued>(&mut self, request: FrontendReq, body: &T, fds: &[RawFd]) -> Result<(), VhostUserError> {
        self.tell(request, &[body.as_slice()], fds)
    }

    /// Sends a request that has no answer of its own, and waits until it is acknowledged, if the back end does that.
    fn tell(&mut self, request: FrontendReq, body: &[&[u8]], fds: &[RawFd]) -> Result<(), VhostUserError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            return self.send(request, 0, body, fds);
        }
        self.send(request, NEED_REPLY, body, fds)?;
        let mut answer = VhostUserU64::default();
        self.receive(request, answer.as_mut_slice())?;
        match answer.value {
            0 => Ok(()),
            code => Err(VhostUserError::Refused {
                path: self.path.clone(),
                during: name(request),
                code,
            }),
        }
    }

    fn send(&mut self, request: FrontendReq, flags: u32, body: &[&[u8]], fds: &[RawFd]) -> Result<(), VhostUserError> {
        if self.gone {
            return Err(self.is_away());
        }
        let len = body.iter().map(|part| part.len()).sum();
        let mut bytes = header(request, flags, len).to_vec();
        body.iter().for_each(|part| bytes.extend_from_slice(part));
        if let Err(e) = self.socket.set_write_timeout(Some(self.left())) {
            return Err(self.broken(name(request), e));
        }
        let mut sent = self.socket.send_with_fds(&[bytes.as_slice()], fds);
        while sent.as_ref().is_err_and(|e| e.errno() == libc::EINTR) {
            sent = self.socket.send_with_fds(&[bytes.as_slice()], fds);
        }
        let rest = sent.map_err(io::Error::from);
        let outcome = rest.and_then(|sent| (&self.socket).write_all(bytes.get(sent..).unwrap_or_default()));
        outcome.map_err(|e| self.broken(name(request), e))
    }

    /// Receives the answer to `request`, which has exactly the length of `body`. Descriptors that come with it are
    /// dropped by the kernel.
    fn receive(&mut self, request: FrontendReq, body: &mut [u8]) -> Result<(), VhostUserError> {
        let during = name(request);
        let mut got = [0; HEADER];
        self.fill(&mut got).map_err(|e| self.broken(during, e))?;
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = got;
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        if u32::from_ne_bytes([r0, r1, r2, r3]) != u32::from(request)
            || flags & (VERSION_MASK | REPLY) != VERSION | REPLY
        {
            return Err(self.wrong(during, "answers something else"));
        }
        let size = usize::try_from(u32::from_ne_bytes([s0, s1, s2, s3])).ok();
        if size != Some(body.len()) {
            return Err(self.wrong(during, "answers with another length"));
        }
        self.fill(body).map_err(|e| self.broken(during, e))
    }

    /// How long the operation may still wait.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(AT_LEAST)
    }

    fn fill(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.socket.set_read_timeout(Some(self.left()))?;
            match (&self.socket).read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => bytes = bytes.get_mut(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl AsRawFd for Frontend {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
