//! Compiles the bare-metal programs that the workspace embeds (the pod guest, stage0) and reads their ELF files. A part of
//! build scripts, which include it as source: it knows nothing of what the programs do, nor of images.

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// They are always built for this target, whatever the workspace is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program to build: its directory, which is a package of its own.
pub(crate) struct Program<'a> {
    /// The package's directory.
    pub(crate) dir: &'a Path,
    /// The name of its binary.
    pub(crate) name: &'a str,
    /// Flags for the compiler beside those that all such programs have.
    pub(crate) flags: &'a [&'a str],
}

/// Compiles the program and returns the path of its ELF file. The file depends on the program's sources and the compiler
/// only: building it twice, anywhere, gives the same bytes.
///
/// # Errors
/// When the build fails.
pub(crate) fn compile(program: &Program<'_>, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let dir = program.dir.canonicalize()?;
    for path in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "link.ld"] {
        println!("cargo::rerun-if-changed={}", dir.join(path).display());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--locked", "--quiet", "--target", TARGET])
        .arg("--manifest-path")
        .arg(dir.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(&dir);
    // What this build was told (flags, wrappers, profiles, clippy's arguments) is not meant for the program.
    for (name, _) in std::env::vars_os() {
        if !is_for_program(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    let flags: Vec<_> = ["-Crelocation-model=static"]
        .iter()
        .chain(program.flags)
        .map(|flag| (*flag).to_owned())
        .chain(remapped_paths(&dir, target_dir)?)
        .collect();
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    // Empty: none. The one that .cargo/config.toml names would make the file depend on where the tree lies: Cargo hashes
    // its path into the names of symbols.
    command.env("RUSTC_WORKSPACE_WRAPPER", "");
    let status = command.status()?;
    if !status.success() {
        return Err(format!("building {} failed: {status}", program.name).into());
    }
    Ok(target_dir.join(TARGET).join("release").join(program.name))
}

/// Whether an environment variable may reach the program's build: where tools and registries are, nothing else.
fn is_for_program(name: &str) -> bool {
    let ours = [
        "CARGO",
        "RUST",
        "CLIPPY",
        "MIRI",
        "LLVM_PROFILE",
        "CFLAGS",
        "LDFLAGS",
        "DEP_",
        "TARGET",
        "PROFILE",
    ];
    let kept = [
        "CARGO_HOME",
        "CARGO_HTTP",
        "CARGO_NET",
        "CARGO_REGISTR",
        "CARGO_SOURCE",
        "RUSTUP_",
    ];
    kept.iter().any(|prefix| name.starts_with(prefix)) || !ours.iter().any(|prefix| name.starts_with(prefix))
}

/// Flags that keep this machine's paths out of the file.
fn remapped_paths(dir: &Path, target_dir: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
    };
    let mut paths = vec![(dir.to_path_buf(), "guest"), (target_dir.to_path_buf(), "target")];
    // One directory a registry; its name depends on where the registry is reached.
    if let Ok(registries) = fs::read_dir(home.join("registry/src")) {
        for registry in registries {
            paths.push((registry?.path(), "registry"));
        }
    }
    Ok(paths
        .into_iter()
        .map(|(path, name)| format!("--remap-path-prefix={}=/{name}", path.display()))
        .collect())
}

/// A program as its ELF file has it: one loadable segment.
pub(crate) struct Loaded<'a> {
    /// Address of its first instruction.
    pub(crate) entry: u64,
    /// Address of its first byte.
    pub(crate) gpa: u64,
    /// Bytes of memory that it takes, zeros at its end included.
    pub(crate) len: u64,
    /// What the file has of them.
    pub(crate) data: &'a [u8],
}

impl<'a> Loaded<'a> {
    /// Reads an ELF64 file; none when it is not one with exactly one loadable segment.
    pub(crate) fn parse(elf: &'a [u8]) -> Option<Self> {
        const LOAD: u64 = 1;
        let word = |at: usize, len: usize| -> Option<u64> {
            let mut bytes = [0; 8];
            bytes
                .get_mut(..len)?
                .copy_from_slice(elf.get(at..at.checked_add(len)?)?);
            Some(u64::from_le_bytes(bytes))
        };
        let at = |value: u64| usize::try_from(value).ok();
        if elf.get(..5)? != b"\x7fELF\x02" {
            return None;
        }
        let (headers, size, count) = (at(word(32, 8)?)?, at(word(54, 2)?)?, at(word(56, 2)?)?);
        let mut loaded = None;
        for header in (0..count).map(|index| headers + index * size) {
            if word(header, 4)? != LOAD {
                continue;
            }
            let (offset, gpa) = (at(word(header + 8, 8)?)?, word(header + 24, 8)?);
            let (file_len, len) = (at(word(header + 32, 8)?)?, word(header + 40, 8)?);
            if loaded.is_some() {
                return None;
            }
            loaded = Some(Self {
                entry: word(24, 8)?,
                gpa,
                len,
                data: elf.get(offset..offset.checked_add(file_len)?)?,
            });
        }
        loaded
    }
}
