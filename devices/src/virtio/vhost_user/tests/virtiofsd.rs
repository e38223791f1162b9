//! Debian's virtiofsd behind the device: the requests that a Linux guest makes to read and write a file. The package
//! `virtiofsd` has it, or `qemu-system-common` before Debian 13; it wants to be root.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;

const ROOT: u64 = 1;
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;

struct Virtiofsd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Virtiofsd {
    /// Starts it for a fresh directory; an error says why it cannot be.
    fn start() -> std::result::Result<Self, String> {
        // C's, which Debian 12 has, and its successor have other options.
        let (old, new) = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        fs::write(dir.path().join("shared/hello"), "hello from the host").unwrap();
        let (shared, socket) = (dir.path().join("shared"), dir.path().join("socket"));
        let (shared, socket) = (shared.display(), socket.display());
        let mut command = if Path::new(new).exists() {
            let mut command = Command::new(new);
            command.args(["--sandbox=chroot", &format!("--shared-dir={shared}")]);
            command
        } else if Path::new(old).exists() {
            let mut command = Command::new(old);
            command.args(["-f", "-o", "sandbox=chroot", "-o", &format!("source={shared}")]);
            command
        } else {
            return Err(format!("neither {new} nor {old} is installed"));
        };
        command.arg(format!("--socket-path={socket}"));
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("it does not start: {e}"))?;
        while !dir.path().join("socket").exists() {
            if child.try_wait().unwrap().is_some() {
                let mut why = String::new();
                std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut why).unwrap();
                return Err(format!("it ends at once: {why}"));
            }
            std::thread::yield_now();
        }
        Ok(Self { child, dir })
    }

    fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        self.end();
    }
}

/// A FUSE request on the request queue: (errno, body of the answer).
fn fuse(h: &mut Harness<VhostUser>, opcode: u32, node: u64, body: &[u8], room: u32) -> (i32, Vec<u8>) {
    let mut header = u32::try_from(40 + body.len()).unwrap().to_le_bytes().to_vec();
    header.extend(opcode.to_le_bytes());
    header.extend(7u64.to_le_bytes());
    header.extend(node.to_le_bytes());
    header.extend([0; 16]);
    h.push(
        1,
        &[Buf::Read(&header), Buf::Read(body), Buf::Write(16), Buf::Write(room)],
    );
    h.kick(1).unwrap();
    let data = wait_for(h, 1);
    let len = u32::from_le_bytes(data[..4].try_into().unwrap()) as usize;
    let errno = i32::from_le_bytes(data[4..8].try_into().unwrap());
    assert_eq!(data[8..16], 7u64.to_le_bytes());
    (errno, data[16..len].to_vec())
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// (node, file handle) and 24 bytes of what READ and WRITE have behind offset and size.
fn transfer(handle: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend([0; 20]);
    body
}

fn mount(h: &mut Harness<VhostUser>) {
    let mut init = Vec::new();
    for word in [7u32, 31, 0x2_0000, 0] {
        init.extend(word.to_le_bytes());
    }
    let (errno, answer) = fuse(h, INIT, 0, &init, 64);
    assert_eq!((errno, answer[0]), (0, 7));
}

fn read_hello(h: &mut Harness<VhostUser>) {
    let (errno, entry) = fuse(h, LOOKUP, ROOT, b"hello\0", 128);
    assert_eq!(errno, 0);
    let node = number(&entry);
    let (errno, open) = fuse(h, OPEN, node, &[0; 8], 16);
    assert_eq!(errno, 0);
    let (errno, data) = fuse(h, READ, node, &transfer(number(&open), 4096), 4096);
    assert_eq!((errno, &data[..]), (0, &b"hello from the host"[..]));
}

#[test]
fn files_are_read_and_written_through_debians_virtiofsd() {
    let mut virtiofsd = match Virtiofsd::start() {
        Ok(virtiofsd) => virtiofsd,
        Err(why) => {
            println!("skipped: virtiofsd: {why}");
            return;
        }
    };
    let options = VhostUserFsOptions::new("kataShared".to_owned(), virtiofsd.dir.path().join("socket"));
    let mut h = harness(VhostUser::fs(&options).unwrap());
    h.activate().unwrap();
    mount(&mut h);
    read_hello(&mut h);
    let (errno, _) = fuse(&mut h, LOOKUP, ROOT, b"nothing\0", 128);
    assert_eq!(errno, -libc::ENOENT);

    let mut create = Vec::new();
    for word in [libc::O_RDWR.cast_unsigned(), libc::S_IFREG | 0o644, 0, 0] {
        create.extend(word.to_le_bytes());
    }
    create.extend(b"made\0");
    let (errno, made) = fuse(&mut h, CREATE, ROOT, &create, 144);
    assert_eq!(errno, 0);
    let (node, handle) = (number(&made), number(&made[128..]));
    let mut write = transfer(handle, 14);
    write.extend(b"from the guest");
    let (errno, written) = fuse(&mut h, WRITE, node, &write, 8);
    assert_eq!((errno, written[0]), (0, 14));
    assert_eq!(
        fs::read(virtiofsd.dir.path().join("shared/made")).unwrap(),
        b"from the guest"
    );

    // The guest reboots, and mounts it once more.
    h.reset();
    h.activate().unwrap();
    mount(&mut h);
    read_hello(&mut h);

    virtiofsd.end();
    while h.poll_events(WAIT_MS).is_ok() {}
    assert_eq!(h.device.counters()[1], ("back_end_gone", 1));
    h.reset();
    assert!(h.activate().is_err());
}
