//! The work that the demo's pod does, and the host's own check of each result. Every function returns why the check
//! failed in words; none believes the pod.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use podvisor_snp::verify::{Certificates, Expectations, Roots, verify};

use super::agent::{Agent, Answer};
use super::pattern::pattern;
use super::tree::{Manifest, sha256_hex};
use crate::hex;

/// Port on which the host waits for the stream that the pod opens.
pub(crate) const HOST_PORT: u32 = 5005;
/// Bytes sent each way over vsock.
const VSOCK_BYTES: usize = 256 * 1024 + 3;
/// Bytes of the file that the pod writes.
const FILE_BYTES: usize = 1_000_003;
/// Name of that file.
const FILE_NAME: &str = "written-by-the-pod.bin";
/// Sectors that the pod writes, and where.
const SECTORS: usize = 4096;
const FIRST_SECTOR: u64 = 1024;
/// Size of the demo's disk in bytes.
pub(crate) const DISK_BYTES: u64 = 16 << 20;

/// Why a check failed.
pub(crate) type Failure = String;

fn say(error: impl std::fmt::Display) -> Failure {
    error.to_string()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, expected: &T) -> Result<(), Failure> {
    if got == expected {
        Ok(())
    } else {
        Err(format!("{what} is {got:?}, expected {expected:?}"))
    }
}

/// The pod's report over a nonce that the host chose: chain up to the emulated root, signature, nonce, policy, digest.
/// The HOST_DATA it carries.
pub(crate) fn attest(agent: &mut Agent, digest: &[u8; 48], policy: u64, nonce: [u8; 64]) -> Result<[u8; 32], Failure> {
    let answer = agent.command(&format!("report {}", hex::encode(&nonce))).map_err(say)?;
    let bytes = |key: &str| {
        let text = answer.value(key).ok_or(format!("no {key} in the pod's answer"))?;
        hex::decode(text).ok_or(format!("the {key} in the pod's answer is no hex"))
    };
    let expectations = Expectations {
        digest: Some(*digest),
        report_data: Some(nonce),
        policy: Some(policy),
        ..Expectations::default()
    };
    let certificates = Certificates::from_table(&bytes("certs")?).map_err(say)?;
    let verified = verify(&bytes("report")?, &certificates, &expectations, &Roots::emulated()).map_err(say)?;
    Ok(verified.report.host_data())
}

/// A stream opened by the host, echoed, and one opened by the pod.
pub(crate) fn vsock(agent: &mut Agent, socket: &Path, seed: u64) -> Result<(), Failure> {
    let data = pattern(seed, VSOCK_BYTES);
    if agent.echo(&data).map_err(say)? != data {
        return Err("the pod echoed other bytes than it was sent".into());
    }
    let path = format!("{}_{HOST_PORT}", socket.display());
    let listener = UnixListener::bind(&path).map_err(say)?;
    listener.set_nonblocking(true).map_err(say)?;
    let received = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&listener));
        agent
            .command(&format!("dial {HOST_PORT} {VSOCK_BYTES} {seed}"))
            .map_err(say)?;
        receiver
            .join()
            .map_err(|_| String::from("the receiving thread ended early"))?
    });
    let removed = std::fs::remove_file(&path).map_err(say);
    if received? != data {
        return Err("the pod's own stream carried other bytes than asked for".into());
    }
    removed
}

/// Takes the pod's stream and all it carries.
fn receive(listener: &UnixListener) -> Result<Vec<u8>, Failure> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(error) => return Err(format!("the pod opened no stream: {error}")),
        }
    };
    stream.set_nonblocking(false).map_err(say)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(say)?;
    let mut bytes = Vec::with_capacity(VSOCK_BYTES);
    stream
        .take(2 * VSOCK_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(say)?;
    Ok(bytes)
}

/// The shared directory: every file's hash as the pod saw it, and a file that the pod wrote as the host sees it.
pub(crate) fn shared_directory(agent: &mut Agent, root: &Path, manifest: &Manifest, seed: u64) -> Result<(), Failure> {
    let walked = listing(&agent.command("fs-walk").map_err(say)?)?;
    same("the number of files that the pod saw", &walked.len(), &manifest.len())?;
    for (path, expected) in manifest {
        same(path, &walked.get(path), &Some(expected))?;
    }
    agent
        .command(&format!("fs-write {FILE_NAME} {FILE_BYTES} {seed}"))
        .map_err(say)?;
    let written = std::fs::read(root.join(FILE_NAME)).map_err(say)?;
    same(
        "the hash of the file that the pod wrote",
        &sha256_hex(&written),
        &sha256_hex(&pattern(seed, FILE_BYTES)),
    )
}

fn listing(answer: &Answer) -> Result<BTreeMap<String, (String, usize)>, Failure> {
    let mut files = BTreeMap::new();
    for line in &answer.lines {
        let mut fields = line.splitn(4, ' ');
        let (Some("file"), Some(hash), Some(size), Some(path)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(format!("a line of the walk is '{line}'"));
        };
        let size = size.parse().map_err(|_| format!("a size in '{line}'"))?;
        files.insert(path.to_owned(), (hash.to_owned(), size));
    }
    Ok(files)
}

/// The disk, while the pod runs: written, flushed, read again by the pod.
pub(crate) fn disk(agent: &mut Agent, seed: u64) -> Result<(), Failure> {
    agent
        .command(&format!("blk-write {FIRST_SECTOR} {SECTORS} {seed}"))
        .map_err(say)?;
    let read = agent
        .command(&format!("blk-read {FIRST_SECTOR} {SECTORS}"))
        .map_err(say)?;
    let expected = sha256_hex(&pattern(seed, SECTORS * 512));
    same(
        "the hash of the sectors that the pod read",
        &read.value("sha256"),
        &Some(expected.as_str()),
    )
}

/// The disk, after the pod is gone: what it wrote is there, and nothing else is.
pub(crate) fn disk_afterwards(path: &Path, seed: u64) -> Result<(), Failure> {
    let file = File::open(path).map_err(say)?;
    same("the disk's size", &file.metadata().map_err(say)?.len(), &DISK_BYTES)?;
    let mut contents = vec![0; usize::try_from(DISK_BYTES).map_err(say)?];
    file.read_exact_at(&mut contents, 0).map_err(say)?;
    let start = usize::try_from(FIRST_SECTOR * 512).map_err(say)?;
    let (before, rest) = contents.split_at_checked(start).ok_or("the disk is too small")?;
    let (written, after) = rest.split_at_checked(SECTORS * 512).ok_or("the disk is too small")?;
    if written != pattern(seed, SECTORS * 512) {
        return Err("the disk does not hold what the pod wrote".into());
    }
    if before.iter().chain(after).any(|byte| *byte != 0) {
        return Err("the disk holds bytes that the pod was not asked to write".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_with(edit: impl Fn(&mut Vec<u8>)) -> tempfile::NamedTempFile {
        let mut contents = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        contents[1024 * 512..(1024 + SECTORS) * 512].copy_from_slice(&pattern(9, SECTORS * 512));
        edit(&mut contents);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), contents).unwrap();
        file
    }

    #[test]
    fn a_disk_is_judged_to_the_byte() {
        assert_eq!(disk_afterwards(disk_with(|_| ()).path(), 9), Ok(()));
        assert!(disk_afterwards(disk_with(|_| ()).path(), 8).is_err());
        assert!(disk_afterwards(disk_with(|c| c[600_000] ^= 1).path(), 9).is_err());
        assert!(disk_afterwards(disk_with(|c| c[0] = 1).path(), 9).is_err());
        assert!(disk_afterwards(disk_with(|c| c.truncate(1000)).path(), 9).is_err());
    }

    #[test]
    fn a_walk_is_read_with_spaces_in_paths() {
        let answer = Answer {
            lines: vec!["file ab 3 a b/c d".into()],
            ok: String::new(),
        };
        assert_eq!(listing(&answer).unwrap()["a b/c d"], ("ab".to_owned(), 3));
        let broken = Answer {
            lines: vec!["file ab".into()],
            ok: String::new(),
        };
        assert!(listing(&broken).is_err());
    }
}
