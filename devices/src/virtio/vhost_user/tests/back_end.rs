//! A back end in this process, on rust-vmm's half of the protocol: it answers each chain of each enabled ring with the
//! readable bytes in reverse.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::sync::lock;

/// The features of a back end that has all that a front end may want.
pub(super) const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// What the back end has and what it was told.
#[derive(Default)]
pub(super) struct State {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) slots: u64,
    pub(super) config: Vec<u8>,

    pub(super) owned: bool,
    pub(super) acked: u64,
    pub(super) acked_protocol: u64,
    pub(super) tables: usize,
    pub(super) regions: Vec<(u64, u64, u64)>,
    pub(super) rings: Vec<Ring>,
    /// (offset, bytes)
    pub(super) config_writes: Vec<(u32, Vec<u8>)>,
    pub(super) calls_set: usize,
    pub(super) chains: u64,

    mapped: Vec<Arc<GuestRegionMmap>>,
}

/// One ring.
#[derive(Default)]
pub(super) struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    pub(super) enabled: bool,
    queue: Option<Queue>,
}

impl Ring {
    /// Whether the back end runs it.
    pub(super) fn runs(&self) -> bool {
        self.kick.is_some() && self.enabled
    }
}

/// A running back end.
pub(super) struct BackEnd {
    pub(super) path: PathBuf,
    pub(super) state: Arc<Mutex<State>>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl BackEnd {
    /// Listens for one front end; `features` beside those that every back end has.
    pub(super) fn start(features: u64, queues: u64) -> Self {
        Self::with(features, queues, PROTOCOL, Vec::new())
    }

    pub(super) fn with(features: u64, queues: u64, protocol: VhostUserProtocolFeatures, config: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = move || listener.accept().map(|(socket, _)| socket);
        Self::over(features, queues, protocol, config, dir, path, socket)
    }

    /// Connects to `path`, where a front end will listen.
    pub(super) fn connecting(path: &Path, features: u64, queues: u64) -> Self {
        let connect = {
            let path = path.to_owned();
            move || {
                loop {
                    match UnixStream::connect(&path) {
                        Err(_) => std::thread::yield_now(),
                        connected => return connected,
                    }
                }
            }
        };
        let dir = tempfile::tempdir().unwrap();
        Self::over(features, queues, PROTOCOL, Vec::new(), dir, path.to_owned(), connect)
    }

    fn over(
        features: u64,
        queues: u64,
        protocol: VhostUserProtocolFeatures,
        config: Vec<u8>,
        dir: tempfile::TempDir,
        path: PathBuf,
        socket: impl FnOnce() -> std::io::Result<UnixStream> + Send + 'static,
    ) -> Self {
        let rings = (0..queues).map(|_| Ring::default()).collect();
        let state = Arc::new(Mutex::new(State {
            features: features | 1 << 32 | 1 << 28 | 1 << 29 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            protocol: protocol.bits(),
            queues,
            slots: 32,
            config,
            rings,
            ..State::default()
        }));
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let (theirs, told) = (Arc::clone(&state), stop.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            if let Ok(socket) = socket() {
                run(
                    BackendReqHandler::from_stream(socket, Arc::clone(&theirs)),
                    &theirs,
                    &told,
                );
            }
        });
        Self {
            path,
            state,
            stop,
            thread: Some(thread),
            _dir: dir,
        }
    }

    /// Dies; returns when it is dead.
    pub(super) fn die(&mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }

    /// Looks at what it was told.
    pub(super) fn see<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut lock(&self.state))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop.write(1).unwrap();
            // One that nobody has connected to waits for that.
            let _ = std::os::unix::net::UnixStream::connect(&self.path);
            thread.join().unwrap();
        }
    }
}

const STOP: u64 = u64::MAX;
const SOCKET: u64 = u64::MAX - 1;

fn run(mut handler: BackendReqHandler<Mutex<State>>, state: &Arc<Mutex<State>>, stop: &EventFd) {
    loop {
        // Built anew each time: rings come and go.
        let epoll = Epoll::new().unwrap();
        let watch = |fd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        };
        watch(stop.as_raw_fd(), STOP);
        watch(handler.as_raw_fd(), SOCKET);
        for (index, ring) in (0..).zip(&lock(state).rings) {
            if ring.runs() {
                watch(ring.kick.as_ref().unwrap().as_raw_fd(), index);
            }
        }
        let mut events = [EpollEvent::default()];
        if epoll.wait(-1, &mut events).unwrap_or(0) == 0 {
            continue;
        }
        match events[0].data() {
            STOP => return,
            SOCKET => {
                if handler.handle_request().is_err() {
                    return;
                }
            }
            index => lock(state).serve(usize::try_from(index).unwrap()),
        }
    }
}

impl State {
    fn memory(&self) -> GuestMemoryMmap {
        GuestMemoryMmap::from_arc_regions(self.mapped.clone()).unwrap()
    }

    fn gpa(&self, user: u64) -> Result<u64> {
        let inside = |(_, len, base): &&(u64, u64, u64)| (*base..*base + *len).contains(&user);
        let region = self.regions.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(user - region.2 + region.0)
    }

    fn map(&mut self, region: &VhostUserMemoryRegion, file: File) {
        let (gpa, len, user, offset) = (
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            region.mmap_offset,
        );
        self.regions.push((gpa, len, user));
        let file = FileOffset::new(file, offset);
        let mapped = GuestRegionMmap::from_range(GuestAddress(gpa), usize::try_from(len).unwrap(), Some(file)).unwrap();
        self.mapped.push(Arc::new(mapped));
    }

    fn serve(&mut self, index: usize) {
        let memory = self.memory();
        let ring = &mut self.rings[index];
        // Non-blocking: this end's epoll may have seen what another ring's turn took.
        let _ = ring.kick.as_ref().unwrap().read(&mut [0; 8]);
        let queue = ring.queue.as_mut().unwrap();
        while let Some(chain) = queue.pop_descriptor_chain(&memory) {
            let head = chain.head_index();
            let mut bytes = Vec::new();
            let mut written = 0;
            for descriptor in chain {
                let mut part = vec![0; descriptor.len() as usize];
                if descriptor.is_write_only() {
                    bytes.reverse();
                    let len = part.len().min(bytes.len());
                    memory.write_slice(&bytes[..len], descriptor.addr()).unwrap();
                    written += u32::try_from(len).unwrap();
                } else {
                    memory.read_slice(&mut part, descriptor.addr()).unwrap();
                    bytes.extend(part);
                }
            }
            queue.add_used(&memory, head, written).unwrap();
            self.chains += 1;
        }
        ring.call.as_ref().unwrap().write_all(&1u64.to_ne_bytes()).unwrap();
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for State {
    fn set_owner(&mut self) -> Result<()> {
        self.owned = true;
        Ok(())
    }
    fn reset_owner(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok(self.features)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.acked = features;
        match features & !self.features {
            0 => Ok(()),
            _ => Err(Error::InvalidParam),
        }
    }
    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        self.tables += 1;
        self.regions.clear();
        self.mapped.clear();
        regions
            .iter()
            .zip(files)
            .for_each(|(region, file)| self.map(region, file));
        Ok(())
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.size = u16::try_from(num).unwrap();
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (desc, avail, used) = (self.gpa(descriptor)?, self.gpa(available)?, self.gpa(used)?);
        let ring = self.ring(index)?;
        (ring.desc, ring.avail, ring.used) = (desc, avail, used);
        Ok(())
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.base = u16::try_from(base).unwrap();
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        let base = ring.queue.as_ref().map_or(0, |queue| queue.next_avail());
        *ring = Ring::default();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let event_idx = self.acked & 1 << 29 != 0;
        let negotiated = self.acked & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        let ring = self.ring(u32::from(index))?;
        let mut queue = Queue::new(ring.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(ring.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(ring.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(ring.used)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_next_avail(ring.base);
        queue.set_ready(true);
        ring.queue = Some(queue);
        ring.kick = fd;
        ring.enabled |= !negotiated;
        Ok(())
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.calls_set += 1;
        self.ring(u32::from(index))?.call = fd;
        Ok(())
    }
    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(self.protocol))
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.acked_protocol = features;
        Ok(())
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let range = offset as usize..(offset + size) as usize;
        self.config.get(range).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }
    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.config_writes.push((offset, bytes.to_vec()));
        Ok(())
    }
    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }
    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidParam)
    }
    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(self.slots)
    }
    fn add_mem_region(&mut self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        self.map(region, file);
        Ok(())
    }
    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let gpa = region.guest_phys_addr;
        let at = self
            .regions
            .iter()
            .position(|r| r.0 == gpa)
            .ok_or(Error::InvalidParam)?;
        self.regions.remove(at);
        self.mapped.remove(at);
        Ok(())
    }
    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }
    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }
    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidParam)
    }
}
