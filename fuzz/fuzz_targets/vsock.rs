//! A guest and host processes that do anything, in any order, to the vsock device over plain memory: nothing panics or
//! hangs, no connection outlives the bound, and what the device writes is a whole packet.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Once, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use podvisor_devices::virtio::testing::{Buf, Harness};
use podvisor_devices::virtio::vsock::{Vsock, VsockOptions};

const RX: usize = 0;
const TX: usize = 1;
const CID: u64 = 3;

fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("podvisor-fuzz-vsock-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory of our own");
        path
    })
}

struct World {
    h: Harness<Vsock>,
    streams: Vec<UnixStream>,
    listener: UnixListener,
    waiting: [usize; 2],
}

impl World {
    fn push(&mut self, queue: usize, bufs: &[Buf<'_>]) {
        if self.waiting[queue] < 64 {
            self.waiting[queue] += 1;
            self.h.push(queue, bufs);
        }
    }

    fn collect(&mut self) {
        for queue in [RX, TX] {
            for done in self.h.completed(queue) {
                self.waiting[queue] -= 1;
                if queue == RX && done.len > 0 {
                    let len = u32::from_le_bytes(done.data[24..28].try_into().expect("a header"));
                    assert_eq!(done.len, 44 + len);
                } else {
                    assert_eq!(done.len, 0);
                }
            }
        }
    }

    /// A packet whose fields are mostly sensible.
    fn packet(&mut self, rest: &[u8]) {
        let [ports, op, len, flags, credit, ..] = *rest else {
            return;
        };
        let host: u32 = match ports >> 6 {
            0 => 52,
            1 => 1 << 30,
            2 => (1 << 30) + u32::from(ports & 3),
            _ => u32::from(ports),
        };
        let guest = u32::from(ports & 3) + 1024;
        let data = usize::from(len) * 64;
        let mut header = Vec::new();
        header.extend((if op & 0x80 == 0 { CID } else { u64::from(op) }).to_le_bytes());
        header.extend(2u64.to_le_bytes());
        header.extend(guest.to_le_bytes());
        header.extend(host.to_le_bytes());
        header.extend((data as u32).to_le_bytes());
        header.extend(u16::from(1 + (flags >> 7)).to_le_bytes());
        header.extend(u16::from(op & 0xF).to_le_bytes());
        header.extend(u32::from(flags & 7).to_le_bytes());
        header.extend((u32::from(credit) << (credit & 15)).to_le_bytes());
        header.extend((u32::from(credit) * 77).to_le_bytes());
        self.push(TX, &[Buf::Read(&header), Buf::Read(&vec![len; data])]);
    }
}

fuzz_target!(|data: &[u8]| {
    static SIGNALS: Once = Once::new();
    // Host processes of ours write to closed sockets; blocked, the signal stays without effect.
    SIGNALS.call_once(|| vmm_sys_util::signal::block_signal(13).expect("SIGPIPE can be blocked"));
    let socket = directory().join("v.sock");
    let accept = directory().join("v.sock_52");
    let _ = std::fs::remove_file(&accept);
    let listener = UnixListener::bind(&accept).expect("the directory is ours");
    listener.set_nonblocking(true).expect("a socket");
    let options = VsockOptions {
        handshake_timeout: Duration::from_millis(1),
        ..VsockOptions::new(CID, socket.clone())
    };
    let h = Harness::new(Vsock::new(options).expect("the directory is ours"));
    let mut world = World {
        h,
        streams: Vec::new(),
        listener,
        waiting: [0; 2],
    };
    let _ = world.h.activate();
    let mut rest = data;
    let mut bytes = [0u8; 4096];
    for _ in 0..256 {
        let Some((&op, tail)) = rest.split_first() else { break };
        rest = tail;
        match op % 13 {
            0..=3 => {
                world.packet(rest);
                rest = rest.get(5..).unwrap_or_default();
                let _ = world.h.kick(TX);
            }
            4 => {
                let n = rest.len().min(50);
                let cut = n.min(usize::from(op >> 2));
                world.push(TX, &[Buf::Read(&rest[..cut]), Buf::Read(&rest[cut..n])]);
                rest = &rest[n..];
                let _ = world.h.kick(TX);
            }
            5 | 6 => {
                world.push(RX, &[Buf::Write(u32::from(op) * 20 + 1)]);
                let _ = world.h.kick(RX);
            }
            7 if world.streams.len() < 32 => {
                if let Ok(mut stream) = UnixStream::connect(&socket) {
                    stream.set_nonblocking(true).expect("a socket");
                    let _ = stream.write(if op & 0x80 == 0 {
                        b"CONNECT 1024\n"
                    } else {
                        &rest[..rest.len().min(20)]
                    });
                    world.streams.push(stream);
                }
            }
            8 => {
                if let Ok((stream, _)) = world.listener.accept() {
                    stream.set_nonblocking(true).expect("a socket");
                    world.streams.push(stream);
                }
            }
            9 | 10 if !world.streams.is_empty() => {
                let at = usize::from(op) % world.streams.len();
                let _ = world.streams[at].write(&bytes[..usize::from(op) * 16]);
                let _ = world.streams[at].read(&mut bytes);
            }
            11 if !world.streams.is_empty() => {
                let at = usize::from(op) % world.streams.len();
                if op & 0x80 == 0 {
                    let _ = world.streams[at].shutdown(std::net::Shutdown::Write);
                } else {
                    world.streams.swap_remove(at);
                }
            }
            12 if op & 0xF0 == 0xF0 => {
                world.h.reset();
                world.waiting = [0; 2];
                let _ = world.h.activate();
            }
            _ => {
                let _ = world.h.poll_events(0);
            }
        }
        world.collect();
    }
});
