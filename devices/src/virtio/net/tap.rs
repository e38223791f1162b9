//! The host's end of a network device: TAP queues (`/dev/net/tun`, Linux `Documentation/networking/tuntap.rst`), the
//! interface behind them, and the movement of frames between a queue and guest memory. What frames mean is not known
//! here.
#![expect(
    unsafe_code,
    reason = "TAP and interface ioctls and vectored I/O on guest memory have no safe wrapper"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libc::{c_int, c_uint};
use vm_memory::{GuestAddress, GuestMemory};

use super::HEADER_LEN;
use crate::memory::PodMemory;

/// Where TAP queues are made.
const TUN: &str = "/dev/net/tun";
/// The most pieces of guest memory of one frame; one more is left for the overflow (`IOV_MAX` is 1024).
pub(super) const MAX_VECTORS: usize = 1023;

/// `struct ifreq` of linux/if.h: a name and a union, here as bytes.
#[repr(C, align(8))]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    data: [u8; 24],
}

const _: () = assert!(size_of::<IfReq>() == size_of::<libc::ifreq>());
const _: () = assert!(align_of::<IfReq>() >= align_of::<libc::ifreq>());

/// A request number whose argument is a `struct ifreq` ([`Tap`]s and sockets) and nothing else.
#[derive(Clone, Copy)]
struct IfReqCall(libc::Ioctl);

const GET_FLAGS: IfReqCall = IfReqCall(libc::SIOCGIFFLAGS);
const SET_FLAGS: IfReqCall = IfReqCall(libc::SIOCSIFFLAGS);
const GET_MTU: IfReqCall = IfReqCall(libc::SIOCGIFMTU);
const SET_MTU: IfReqCall = IfReqCall(libc::SIOCSIFMTU);
const GET_INDEX: IfReqCall = IfReqCall(libc::SIOCGIFINDEX);
const SET_MAC: IfReqCall = IfReqCall(libc::SIOCSIFHWADDR);
const SET_ADDRESS: IfReqCall = IfReqCall(libc::SIOCSIFADDR);
const SET_NETMASK: IfReqCall = IfReqCall(libc::SIOCSIFNETMASK);
const TAP_SET_IFF: IfReqCall = IfReqCall(libc::TUNSETIFF);
const TAP_GET_IFF: IfReqCall = IfReqCall(libc::TUNGETIFF);
const TAP_SET_QUEUE: IfReqCall = IfReqCall(libc::TUNSETQUEUE);

impl IfReq {
    fn new(name: &str) -> io::Result<Self> {
        let mut this = Self {
            name: [0; libc::IFNAMSIZ],
            data: [0; 24],
        };
        // One byte stays for the final NUL.
        if name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/']) {
            let reason = format!("an interface name has at most {} bytes", libc::IFNAMSIZ - 1);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        for (place, byte) in this.name.iter_mut().zip(name.bytes()) {
            *place = byte;
        }
        Ok(this)
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(self.name.get(..end).unwrap_or_default()).into_owned()
    }

    fn with(mut self, data: &[u8]) -> Self {
        for (place, byte) in self.data.iter_mut().zip(data) {
            *place = *byte;
        }
        self
    }

    fn short(&self) -> c_int {
        let [a, b, ..] = self.data;
        c_int::from(u16::from_ne_bytes([a, b]))
    }

    fn int(&self) -> c_int {
        let [a, b, c, d, ..] = self.data;
        c_int::from_ne_bytes([a, b, c, d])
    }

    fn call(&mut self, fd: RawFd, call: IfReqCall) -> io::Result<()> {
        // SAFETY: every `IfReqCall` reads or writes one ifreq, which `self` is by size, alignment and layout; none
        // of them follows a pointer in it.
        check(unsafe { libc::ioctl(fd, call.0, &raw mut *self) })
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Flags as the 16-bit field that ifreq has for them.
fn flag_bytes(flags: c_int) -> [u8; 2] {
    u16::try_from(flags).unwrap_or(0).to_ne_bytes()
}

/// One queue of a TAP interface.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    name: String,
    attached: bool,
    /// The interface has several queues, so that each can be attached and detached.
    multi_queue: bool,
    /// A socket in its place, in tests: it has no interface.
    #[cfg(any(test, feature = "test-utils"))]
    stand_in: bool,
}

impl Tap {
    /// A datagram socket in place of a TAP queue: each datagram is a frame with its header.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn stand_in(socket: std::os::unix::net::UnixDatagram) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            file: File::from(OwnedFd::from(socket)),
            name: "stand-in".to_owned(),
            attached: true,
            multi_queue: false,
            stand_in: true,
        })
    }

    /// Opens a queue of the interface `name`, making the interface if it is not there; `%d` in the name, or no name,
    /// lets the kernel choose one. `multi_queue` must be the same for all queues of the interface.
    pub(super) fn open(name: Option<&str>, multi_queue: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN)?;
        let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
        let mut request = IfReq::new(name.unwrap_or("vmtap%d"))?.with(&flag_bytes(flags));
        request.call(file.as_raw_fd(), TAP_SET_IFF)?;
        Self::with_header(file, request.name(), multi_queue)
    }

    /// Takes over a queue that someone else set up.
    pub(super) fn from_fd(fd: OwnedFd, multi_queue: bool) -> io::Result<Self> {
        let mut request = IfReq::new("")?;
        request.call(fd.as_raw_fd(), TAP_GET_IFF)?;
        let (flags, wanted) = (request.short(), libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        let wanted = wanted | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        if flags & wanted != wanted {
            let reason = format!(
                "it is a queue of {} with flags {flags:#x}; IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and, for several queues, \
                 IFF_MULTI_QUEUE ({wanted:#x}) are needed",
                request.name()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        // FIONBIO, which works on any descriptor.
        let socket = UnixStream::from(fd);
        socket.set_nonblocking(true)?;
        Self::with_header(File::from(OwnedFd::from(socket)), request.name(), multi_queue)
    }

    /// Sets the length of the header before each frame.
    fn with_header(file: File, name: String, multi_queue: bool) -> io::Result<Self> {
        let len: c_int = HEADER_LEN.try_into().map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
        Ok(Self {
            file,
            name,
            attached: true,
            multi_queue,
            #[cfg(any(test, feature = "test-utils"))]
            stand_in: false,
        })
    }

    /// The descriptor, as another process would pass it.
    #[cfg(test)]
    pub(super) fn into_file(self) -> File {
        self.file
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Tells the kernel which unfinished work the driver accepts in frames (`TUN_F_*`).
    pub(super) fn set_offload(&self, flags: c_uint) -> io::Result<()> {
        #[cfg(any(test, feature = "test-utils"))]
        if self.stand_in {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Whether the interface uses this queue; a detached one gets no frames. Without effect on an only queue.
    pub(super) fn attach(&mut self, attach: bool) -> io::Result<()> {
        if self.attached == attach || !self.multi_queue {
            return Ok(());
        }
        let flags = if attach {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        IfReq::new("")?
            .with(&flag_bytes(flags))
            .call(self.fd(), TAP_SET_QUEUE)?;
        self.attached = attach;
        Ok(())
    }

    /// Reads one frame, header first, into `to`, and what does not fit there into `overflow`.
    pub(super) fn read(&self, to: &mut GuestVectors, overflow: &mut [u8]) -> io::Result<usize> {
        to.vectors.push(IoVec {
            base: overflow.as_mut_ptr().expose_provenance(),
            len: overflow.len(),
        });
        let (vectors, count) = to.as_raw();
        // SAFETY: `vectors` is an array of `count` vectors. All but the last are mapped guest memory, kept by `to`,
        // which only the kernel writes through; the last is `overflow`, borrowed for the length of the call.
        let result = unsafe { libc::readv(self.fd(), vectors, count) };
        to.vectors.pop();
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame, header first.
    pub(super) fn write(&self, from: &GuestVectors) -> io::Result<usize> {
        let (vectors, count) = from.as_raw();
        // SAFETY: `vectors` is an array of `count` vectors of mapped guest memory, kept by `from`; the kernel only
        // reads it.
        let result = unsafe { libc::writev(self.fd(), vectors, count) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// A `struct iovec` whose address is a number, so that it can be sent between threads.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct IoVec {
    base: usize,
    len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());

/// Pieces of guest memory for one vectored call.
#[derive(Debug)]
pub(super) struct GuestVectors {
    /// Keeps the pieces mapped.
    memory: Arc<PodMemory>,
    vectors: Vec<IoVec>,
    len: usize,
}

impl GuestVectors {
    pub(super) fn new(memory: Arc<PodMemory>) -> Self {
        Self {
            memory,
            vectors: Vec::new(),
            len: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.vectors.clear();
        self.len = 0;
    }

    /// Bytes of all pieces.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where [`GuestVectors::back_to`] goes back to.
    pub(super) fn mark(&self) -> (usize, usize) {
        (self.vectors.len(), self.len)
    }

    /// Drops what was appended since `mark`.
    pub(super) fn back_to(&mut self, mark: (usize, usize)) {
        self.vectors.truncate(mark.0);
        self.len = mark.1;
    }

    /// Appends guest memory. False, and nothing appended, when a byte of it is private or absent, or when there are
    /// too many pieces.
    pub(super) fn push(&mut self, address: GuestAddress, len: usize) -> bool {
        let before = self.vectors.len();
        for slice in self.memory.get_slices(address, len) {
            match slice {
                Ok(slice) if self.vectors.len() < MAX_VECTORS => self.vectors.push(IoVec {
                    base: slice.ptr_guard_mut().as_ptr().expose_provenance(),
                    len: slice.len(),
                }),
                _ => {
                    self.vectors.truncate(before);
                    return false;
                }
            }
        }
        self.len = self.len.saturating_add(len);
        true
    }

    fn as_raw(&self) -> (*const libc::iovec, c_int) {
        let count = c_int::try_from(self.vectors.len()).unwrap_or(0);
        (self.vectors.as_ptr().cast(), count)
    }
}

/// A network interface of the host.
pub(super) struct Interface<'a> {
    name: &'a str,
    socket: OwnedFd,
}

impl<'a> Interface<'a> {
    pub(super) fn new(name: &'a str) -> io::Result<Self> {
        let socket = socket(libc::AF_INET)?;
        Ok(Self { name, socket })
    }

    fn call(&self, call: IfReqCall, data: &[u8]) -> io::Result<IfReq> {
        let mut request = IfReq::new(self.name)?.with(data);
        request.call(self.socket.as_raw_fd(), call)?;
        Ok(request)
    }

    pub(super) fn mtu(&self) -> io::Result<u16> {
        let mtu = self.call(GET_MTU, &[])?.int();
        // The driver's field has 16 bits (virtio 1.2 5.1.4).
        Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
    }

    /// Sets the MTU if it is another: that needs a right which the owner of a TAP need not have.
    pub(super) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        if self.mtu()? == mtu {
            return Ok(());
        }
        self.call(SET_MTU, &c_int::from(mtu).to_ne_bytes()).map(drop)
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut address = [0; 8];
        let (family, bytes) = address.split_at_mut(2);
        family.copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        bytes.copy_from_slice(&mac);
        self.call(SET_MAC, &address).map(drop)
    }

    /// Brings the interface up if it is down.
    pub(super) fn up(&self) -> io::Result<()> {
        let flags = self.call(GET_FLAGS, &[])?.short();
        if flags & libc::IFF_UP != 0 {
            return Ok(());
        }
        let [low, high, ..] = (flags | libc::IFF_UP).to_ne_bytes();
        self.call(SET_FLAGS, &[low, high]).map(drop)
    }

    /// Gives the interface an address with the netmask `mask`.
    pub(super) fn set_address(&self, address: IpAddr, mask: IpAddr) -> io::Result<()> {
        match (address, mask) {
            (IpAddr::V4(address), IpAddr::V4(mask)) => {
                self.call(SET_ADDRESS, &socket_address(address))?;
                self.call(SET_NETMASK, &socket_address(mask)).map(drop)
            }
            (IpAddr::V6(address), IpAddr::V6(mask)) => {
                let index = self.call(GET_INDEX, &[])?.int();
                let request = libc::in6_ifreq {
                    ifr6_addr: libc::in6_addr {
                        s6_addr: address.octets(),
                    },
                    ifr6_prefixlen: u128::from(mask).leading_ones(),
                    ifr6_ifindex: index,
                };
                let socket = socket(libc::AF_INET6)?;
                // SAFETY: on an IPv6 socket SIOCSIFADDR reads one in6_ifreq.
                let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) };
                match check(result) {
                    // It has this address.
                    Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                    other => other,
                }
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("address {address} and mask {mask} are of two IP versions"),
            )),
        }
    }
}

fn socket(family: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: `fd` was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct sockaddr_in` with port 0.
fn socket_address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    let (family, rest) = bytes.split_at_mut(2);
    family.copy_from_slice(&flag_bytes(libc::AF_INET));
    for (place, byte) in rest.iter_mut().skip(2).zip(address.octets()) {
        *place = byte;
    }
    bytes
}
