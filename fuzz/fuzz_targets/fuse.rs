//! FUSE requests of any form to the virtio-fs device over plain memory and a temporary directory: nothing panics or
//! hangs, every answer is whole, and nothing outside the share is read or changed.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::fuzz_target;
use podvisor_devices::virtio::fs::{Fs, FsLimits, FsOptions};
use podvisor_devices::virtio::testing::{Buf, Harness};

const CANARY: &[u8] = b"canary: not for the guest";
const FALLOCATE: u32 = 43;
const NAMES: [&[u8]; 8] = [
    b"a\0",
    b"b\0",
    b"link\0",
    b"up\0",
    b"..\0",
    b"../canary\0",
    b"dir\0",
    b"fifo\0",
];

fn base() -> &'static PathBuf {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("podvisor-fuzz-fuse-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory of our own");
        std::fs::write(path.join("canary"), CANARY).expect("our directory");
        path
    })
}

fn fresh_share() {
    let share = base().join("share");
    let _ = std::fs::remove_dir_all(&share);
    std::fs::create_dir(&share).expect("our directory");
    std::fs::write(share.join("a"), "the quick brown fox").expect("our directory");
    std::fs::create_dir(share.join("dir")).expect("our directory");
    std::os::unix::fs::symlink("../canary", share.join("link")).expect("our directory");
    std::os::unix::fs::symlink("..", share.join("up")).expect("our directory");
}

/// One request: two bytes choose operation and node, the rest is the body, closed by a name.
fn message(op: u32, node: u64, body: &[u8], unique: u64) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes.extend_from_slice(body);
    let len = u32::try_from(bytes.len()).expect("short");
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&op.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes[16..24].copy_from_slice(&node.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    static ROUND: AtomicU64 = AtomicU64::new(0);
    if ROUND.fetch_add(1, Ordering::Relaxed).is_multiple_of(16) {
        fresh_share();
    }
    let Some((&mode, mut rest)) = data.split_first() else {
        return;
    };
    let mut options = FsOptions::new("fuzz".into(), base().join("share"));
    options.queue_size = 16;
    options.readonly = mode & 1 != 0;
    options.limits = FsLimits { inodes: 8, handles: 4 };
    let mut h = Harness::new(Fs::new(options).expect("our directory"));
    h.activate().expect("nothing is missing");
    let init = [
        7u32.to_le_bytes(),
        38u32.to_le_bytes(),
        0u32.to_le_bytes(),
        u32::MAX.to_le_bytes(),
        [0; 4],
        [0; 4],
    ];
    let mut nodes = vec![1u64];
    let mut handles = vec![0u64];
    let mut next = message(26, 0, &init.concat(), 1);
    for unique in 2..64 {
        // Allocation for real would fill the disk.
        if next.len() >= 64 && next[4..8] == FALLOCATE.to_le_bytes() {
            next[51..56].fill(0);
            next[58..64].fill(0);
        }
        let cut = next.len().min(usize::from(rest.first().copied().unwrap_or(40)));
        let room = 16 + 16 * u32::from(rest.get(1).copied().unwrap_or(255));
        h.push(
            1,
            &[
                Buf::Read(&next[..cut]),
                Buf::Read(&next[cut..]),
                Buf::Write(16),
                Buf::Write(room),
            ],
        );
        let _ = h.kick(1);
        for done in h.completed(1) {
            if done.len > 0 {
                assert_eq!(done.data[..4], done.len.to_le_bytes());
                assert!(
                    !done.data.windows(CANARY.len()).any(|window| window == CANARY),
                    "the guest has the canary"
                );
                if let (Some(id), [0, 0, 0, 0]) = (done.data.get(16..24), &done.data[4..8]) {
                    let id = u64::from_le_bytes(id.try_into().expect("eight bytes"));
                    nodes.push(id);
                    handles.push(id);
                    if let Some(handle) = done.data.get(144..152) {
                        handles.push(u64::from_le_bytes(handle.try_into().expect("eight bytes")));
                    }
                }
            }
        }
        let [op, node, name, len, ..] = *rest else { break };
        rest = &rest[4..];
        let body = &rest[..rest.len().min(usize::from(len & 0x7F))];
        rest = &rest[body.len()..];
        let mut body = body.to_vec();
        if len & 0x80 != 0 {
            let handle = handles[usize::from(name) % handles.len()];
            body.splice(..body.len().min(8), handle.to_le_bytes());
        }
        if name & 0x80 != 0 {
            body.extend_from_slice(NAMES[usize::from(name & 7)]);
            if name & 0x40 != 0 {
                body.extend_from_slice(NAMES[usize::from(name >> 3 & 7)]);
            }
        }
        let node = nodes[usize::from(node) % nodes.len()];
        next = message(u32::from(op % 56), node, &body, unique);
    }
    drop(h);
    assert_eq!(std::fs::read(base().join("canary")).expect("still there"), CANARY);
    assert_eq!(std::fs::read_dir(base()).expect("still there").count(), 2);
});
