//! What the tests that run a real podvisor share: the process, its API, its pod.
#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "shared by test binaries, each of which uses a part of it; a failure here is the test's"
)]

pub(crate) mod full;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use podvisor::demo::agent::Agent;
use podvisor_api::http::Client;
use serde_json::{Value, json};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whether pods can be booted here; says so if not.
pub(crate) fn kvm() -> bool {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !usable {
        println!("skipped: no usable /dev/kvm");
    }
    usable
}

/// Calls `attempt` until it gives something.
pub(crate) fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A podvisor process with an API socket in a directory of its own; killed on drop.
pub(crate) struct Process {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
}

/// The command that starts podvisor on `socket`, its stderr going to `log`.
pub(crate) fn podvisor(socket: &Path, log: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
    command
        .args(["-vv", "--api-socket"])
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(log).unwrap());
    command
}

impl Process {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// As [`Process::start`], with more arguments; it runs in its directory.
    pub(crate) fn start_with(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let mut command = podvisor(&socket, &dir.path().join("log"));
        let child = command.args(args).current_dir(dir.path()).spawn().unwrap();
        let process = Self { dir, child, socket };
        wait_for("the API socket", || Client::connect(&process.socket).ok());
        process
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// One request on a connection of its own: the status and the body, null if there is none.
    pub(crate) fn request(&self, method: &str, endpoint: &str, body: Option<&Value>) -> (u16, Value) {
        let mut client = Client::connect(&self.socket).unwrap();
        let text = body.map(Value::to_string);
        let reply = client
            .request(method, endpoint, text.as_deref().map(str::as_bytes))
            .unwrap();
        (reply.status, serde_json::from_slice(&reply.body).unwrap_or(Value::Null))
    }

    pub(crate) fn put(&self, endpoint: &str, body: Option<&Value>) {
        let (status, said) = self.request("PUT", endpoint, body);
        assert!(
            matches!(status, 200 | 204),
            "{endpoint}: {status} {said}\n{}",
            self.log()
        );
    }

    pub(crate) fn info(&self) -> Value {
        let (status, info) = self.request("GET", "vm.info", None);
        assert_eq!(status, 200, "{info}");
        info
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent::connect(&self.path("vsock"), Instant::now() + PATIENCE).unwrap()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        wait_for("the monitor's end", || child.try_wait().unwrap())
    }

    /// Writes the pod image, a disk and a shared directory, and creates and boots a pod of them.
    pub(crate) fn boot_pod(&self, isolation: &str) {
        self.boot_with(&self.pod_config(isolation));
    }

    /// As [`Process::boot_pod`], with a configuration of its kind.
    pub(crate) fn boot_with(&self, config: &Value) {
        std::fs::write(self.path("pod.igvm"), podvisor::pod_image::POD_IMAGE).unwrap();
        std::fs::File::create(self.path("disk"))
            .unwrap()
            .set_len(4 << 20)
            .unwrap();
        std::fs::create_dir(self.path("share")).unwrap();
        std::fs::write(self.path("share/file"), "contents of the shared file").unwrap();
        self.put("vm.create", Some(config));
        self.put("vm.boot", None);
    }

    pub(crate) fn pod_config(&self, isolation: &str) -> Value {
        json!({
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "memory": {"size": 512u64 << 20},
            "payload": {"igvm": self.path("pod.igvm")},
            "platform": {"isolation": isolation},
            "disks": [{"path": self.path("disk"), "image_type": "Raw"}],
            "fs": [{"tag": "share", "shared_dir": self.path("share")}],
            "vsock": {"cid": 3, "socket": self.path("vsock")},
            "serial": {"mode": "Null"},
            "console": {"mode": "Off"},
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A PVH kernel of a few instructions at 1 MiB: an ELF64 file with one segment and the Xen entry note.
pub(crate) fn pvh_kernel(path: &Path, code: &[u8]) {
    const ENTRY: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&u32::try_from(ENTRY).unwrap().to_le_bytes());
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    elf.extend_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&5u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    };
    program_header(4, HEADERS, 0, note.len() as u64); // PT_NOTE
    program_header(1, HEADERS + note.len() as u64, ENTRY, code.len() as u64); // PT_LOAD
    elf.extend_from_slice(&note);
    elf.extend_from_slice(code);
    std::fs::File::create(path).unwrap().write_all(&elf).unwrap();
}

/// Prints OK on COM1 and powers off.
pub(crate) const HELLO: &[u8] = &[
    0x66, 0xBA, 0xF8, 0x03, 0xB0, b'O', 0xEE, 0xB0, b'K', 0xEE, // mov dx, 0x3f8; mov al, 'O'; out; …
    0x66, 0xBA, 0x00, 0x06, 0xB0, 0x34, 0xEE, // mov dx, 0x600; mov al, 0x34; out
    0xF4, 0xEB, 0xFD, // hlt; jmp
];
/// Halts for ever.
pub(crate) const IDLE: &[u8] = &[0xF4, 0xEB, 0xFD];

/// The beginning of a guest that needs what is above 4 GiB: long mode's page tables (and 32-bit code, in compatibility
/// mode) with the first 4 MiB on themselves, and 2 MiB from `address`, a multiple of 2 MiB, at 0x4000_0000.
pub(crate) fn with_window(address: u64) -> Vec<u8> {
    // PML4 at 0x203000, PDPT at 0x200000; PDs at 0x201000 (identity, 2 MiB pages) and 0x202000.
    let mut code = Vec::new();
    let half = |entry: u64, shift: u32| u32::try_from(entry >> shift & 0xFFFF_FFFF).unwrap();
    for (place, entry) in [
        (0x20_3000u32, 0x20_0003u64),
        (0x20_0000, 0x20_1003),
        (0x20_0008, 0x20_2003),
        (0x20_1000, 0x83),
        (0x20_1008, 0x20_0083),
        (0x20_2000, address | 0x83),
    ] {
        for shift in [0, 32] {
            code.extend_from_slice(&[0xC7, 0x05]); // mov dword [place], half
            code.extend_from_slice(&(place + shift / 8).to_le_bytes());
            code.extend_from_slice(&half(entry, shift).to_le_bytes());
        }
    }
    code.extend_from_slice(&[
        0xB8, 0x00, 0x30, 0x20, 0x00, 0x0F, 0x22, 0xD8, // mov eax, 0x203000; mov cr3, eax
        0x0F, 0x20, 0xE0, 0x83, 0xC8, 0x20, 0x0F, 0x22, 0xE0, // mov eax, cr4; or eax, PAE; mov cr4, eax
        0xB9, 0x80, 0x00, 0x00, 0xC0, 0x0F, 0x32, 0x0D, 0x00, 0x01, 0x00, 0x00, 0x0F, 0x30, // EFER |= LME
        0x0F, 0x20, 0xC0, 0x0D, 0x00, 0x00, 0x00, 0x80, 0x0F, 0x22, 0xC0, // cr0 |= PG
    ]);
    code
}

/// A guest that waits for the PCI hotplug register to show a slot going down, and ejects what it shows.
pub(crate) fn ejecting_guest() -> Vec<u8> {
    let mut code = with_window(0x7FF_FFE0_0000);
    code.extend_from_slice(&[
        // loop: the register's page is at 0x4000_0000 + (0xFFFE_F000 - 0xFFE0_0000) = 0x401E_F000
        0xA1, 0x04, 0xF0, 0x1E, 0x40, // mov eax, [0x401EF004] (PCID)
        0x85, 0xC0, // test eax, eax
        0x74, 0xF7, // jz loop
        0xA3, 0x08, 0xF0, 0x1E, 0x40, // mov [0x401EF008], eax (B0EJ)
        0xEB, 0xF0, // jmp loop
    ]);
    code
}
