//! A snapshot's directory, in Cloud Hypervisor's shape: `config.json` (the pod's configuration, which may be edited
//! where it says where things are), `state.json` (versioned, with a checksum) and `memory-ranges` (RAM, range after
//! range, with holes for what is zero).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use podvisor_api::types::VmConfig;
use podvisor_snp::digest::sha384;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::PodPlan;
use crate::hex;
use crate::machine::MachineState;
use crate::memory::{GuestRam, SavedRange, Zone, saved_ranges};

/// The format that this version writes and reads.
const VERSION: u64 = 2;
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
/// The state before it is whole.
const UNFINISHED: &str = "state.json.part";
const MEMORY: &str = "memory-ranges";
/// More than any state of ours: 64 MiB.
const MAX_JSON: u64 = 64 << 20;
/// A step of copying and of looking for zeros.
const CHUNK: usize = 64 << 10;
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Why a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The address of the directory.
    #[error("{field} {url:?}: give file:// and an absolute path")]
    Url {
        /// The field.
        field: &'static str,
        /// What it was.
        url: String,
    },
    /// A file of it.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no snapshot of podvisor, or not a whole one.
    #[error("{}: {reason}", path.display())]
    Broken {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl SnapshotError {
    /// Whether the host failed, as when its disk is full: the request was sound.
    #[must_use]
    pub fn is_the_hosts(&self) -> bool {
        let codes = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EIO];
        matches!(self, Self::File { source, .. } if source.raw_os_error().is_some_and(|code| codes.contains(&code)))
    }
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    podvisor_snapshot: u64,
    podvisor_version: String,
    /// SHA-384 of `state`, written compactly with sorted keys.
    checksum: String,
    state: Value,
}

/// A snapshot that was read; its memory is still in the file.
pub struct Snapshot {
    /// The pod.
    pub config: VmConfig,
    /// Its machine.
    pub state: MachineState,
    /// Its RAM, as far as that is not in files of its own.
    pub memory: Option<File>,
}

/// The directory that `url` names in `field`.
///
/// # Errors
/// When it is no `file://` address of an absolute path.
pub fn directory(field: &'static str, url: &str) -> Result<PathBuf, SnapshotError> {
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(SnapshotError::Url {
            field,
            url: url.to_owned(),
        }),
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::File {
        path: path.to_owned(),
        source,
    }
}

fn broken(path: &Path, reason: impl Into<String>) -> SnapshotError {
    SnapshotError::Broken {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

fn create(path: &Path) -> Result<File, SnapshotError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(at(path))
}

/// Writes a snapshot into `dir`, which must be there and hold none; `state.json` comes last, so that a directory with
/// it is whole.
///
/// # Errors
/// When a file cannot be written; those that were are removed.
pub fn write(dir: &Path, plan: &PodPlan, state: &MachineState, ram: &GuestRam) -> Result<(), SnapshotError> {
    let mut made = Vec::new();
    let outcome = write_files(dir, plan, state, ram, &mut made);
    if outcome.is_err() {
        for path in made {
            // The error that is reported came first.
            let _ = fs::remove_file(path);
        }
    }
    outcome
}

fn write_files(
    dir: &Path,
    plan: &PodPlan,
    state: &MachineState,
    ram: &GuestRam,
    made: &mut Vec<PathBuf>,
) -> Result<(), SnapshotError> {
    let finished = dir.join(STATE);
    if finished.symlink_metadata().is_ok() {
        return Err(at(&finished)(io::ErrorKind::AlreadyExists.into()));
    }
    let mut new = |name: &str| {
        let path = dir.join(name);
        let file = create(&path)?;
        made.push(path.clone());
        Ok((path, file))
    };
    let (path, mut file) = new(CONFIG)?;
    let text = serde_json::to_vec_pretty(&plan.config).map_err(|e| broken(&path, e.to_string()))?;
    file.write_all(&text).map_err(at(&path))?;
    file.sync_all().map_err(at(&path))?;
    if state.has_memory_file() {
        let (path, file) = new(MEMORY)?;
        write_memory(&file, ram, &plan.zones).map_err(at(&path))?;
        file.sync_all().map_err(at(&path))?;
    }
    for zone in &plan.zones {
        zone.sync().map_err(at(zone.file.as_deref().unwrap_or(dir)))?;
    }
    // What has this name is whole, whenever the machine or the disk gives up.
    let (path, mut file) = new(UNFINISHED)?;
    let state = serde_json::to_value(state).map_err(|e| broken(&path, e.to_string()))?;
    let whole = StateFile {
        podvisor_snapshot: VERSION,
        podvisor_version: env!("CARGO_PKG_VERSION").to_owned(),
        checksum: checksum(&state),
        state,
    };
    let text = serde_json::to_vec(&whole).map_err(|e| broken(&path, e.to_string()))?;
    file.write_all(&text).map_err(at(&path))?;
    file.sync_all().map_err(at(&path))?;
    fs::rename(&path, &finished).map_err(at(&finished))?;
    made.push(finished);
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

fn checksum(state: &Value) -> String {
    hex::encode(&sha384(state.to_string().as_bytes()))
}

fn write_memory(file: &File, ram: &GuestRam, zones: &[Zone]) -> io::Result<()> {
    file.set_len(ram.size())?;
    let mut offset = 0;
    let mut chunk = vec![0; CHUNK];
    let mut touched = Touched::new();
    for SavedRange { gpa, len, in_file } in saved_ranges(ram.size(), zones) {
        // What is in a file of its own is a hole here.
        let mut done = if in_file { len } else { 0 };
        while done < len {
            let n = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
            if ram.host_of(gpa + done).is_none_or(|address| touched.any(address, n)) {
                let part = chunk.get_mut(..n).unwrap_or_default();
                ram.read(gpa + done, part)?;
                if ZEROS.get(..n) != Some(&*part) {
                    file.write_all_at(part, offset + done)?;
                }
            }
            done += n as u64;
        }
        offset += len;
    }
    Ok(())
}

/// Which pages of this process have ever been touched: the others are zeros, and reading them would make the kernel map a
/// page of zeros for each.
struct Touched {
    pagemap: Option<File>,
    entries: Vec<u8>,
}

impl Touched {
    fn new() -> Self {
        Self {
            pagemap: File::open("/proc/self/pagemap").ok(),
            entries: Vec::new(),
        }
    }

    /// Whether any page of `[address, address + len)`, anonymous memory, was; true when it cannot be told.
    fn any(&mut self, address: u64, len: usize) -> bool {
        // Linux Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page; bit 63 present, bit 62 swapped.
        const ENTRY: u64 = 8;
        let pages = len.div_ceil(4096);
        self.entries.resize(pages * 8, 0);
        let read = self
            .pagemap
            .as_ref()
            .map(|pagemap| pagemap.read_exact_at(&mut self.entries, address / 4096 * ENTRY));
        if !matches!(read, Some(Ok(()))) {
            return true;
        }
        let mut highest = self.entries.iter().skip(7).step_by(8);
        highest.any(|byte| byte & 0xC0 != 0)
    }
}

/// Opens a file for reading; a FIFO, which would hold the monitor up, is refused.
fn open(path: &Path) -> Result<File, SnapshotError> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(at(path))?;
    if file.metadata().map_err(at(path))?.is_file() {
        Ok(file)
    } else {
        Err(broken(path, "it is not a regular file"))
    }
}

fn read_json(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let file = open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(at(path))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(broken(path, "it is too long to be one of podvisor's"));
    }
    Ok(bytes)
}

/// Reads the snapshot in `dir`.
///
/// # Errors
/// When it is not podvisor's, of a newer format, damaged, or not whole.
pub fn read(dir: &Path) -> Result<Snapshot, SnapshotError> {
    let path = dir.join(STATE);
    let text: Value = serde_json::from_slice(&read_json(&path)?).map_err(|e| broken(&path, e.to_string()))?;
    match text.get("podvisor_snapshot").map(Value::as_u64) {
        Some(Some(VERSION)) => {}
        Some(version) => {
            let version = version.map_or_else(|| "unknown".to_owned(), |v| v.to_string());
            let reason = format!(
                "its format is {version}, and podvisor {} reads {VERSION}: restore it with the version that wrote it",
                env!("CARGO_PKG_VERSION")
            );
            return Err(broken(&path, reason));
        }
        None => {
            return Err(broken(
                &path,
                "it has no podvisor_snapshot: it is another monitor's, and podvisor restores its own snapshots only",
            ));
        }
    }
    let whole: StateFile = serde_json::from_value(text).map_err(|e| broken(&path, e.to_string()))?;
    if checksum(&whole.state) != whole.checksum {
        return Err(broken(
            &path,
            "its checksum is wrong: the file is damaged or was edited",
        ));
    }
    let state: MachineState = serde_json::from_value(whole.state).map_err(|e| broken(&path, e.to_string()))?;
    let path = dir.join(CONFIG);
    let config = podvisor_api::from_json(&read_json(&path)?).map_err(|e| broken(&path, e.to_string()))?;
    let memory = if state.has_memory_file() {
        let path = dir.join(MEMORY);
        let memory = open(&path)?;
        let len = memory.metadata().map_err(at(&path))?.len();
        if len != state.memory {
            return Err(broken(&path, format!("it has {len} bytes, not {}", state.memory)));
        }
        Some(memory)
    } else {
        None
    };
    Ok(Snapshot { config, state, memory })
}
