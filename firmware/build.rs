//! Builds stage0 (`stage0/`), the boot shim that images of Linux pods hold (`src/stage0.rs`).

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../resources/bare_metal.rs"]
mod bare_metal;

use bare_metal::{Loaded, Program, compile};

/// The compiler uses no vector registers of its own accord: hypervisors that interpret ring 0 know few of their instructions,
/// and zeroing a structure needs none. What hashes asks for them by name. (The compiler warns that the ABI of its target then
/// has no floating point; stage0 has none. The target made for it, x86_64-unknown-none, is not part of a usual toolchain.)
const TARGET_FEATURES: &str = "-Ctarget-feature=-sse,-sse2";

fn main() -> Result<(), Box<dyn Error>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("stage0");
    for path in ["build.rs", "../resources/bare_metal.rs", "src/layout.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let program = Program {
        dir: &dir,
        name: "stage0",
        flags: &[TARGET_FEATURES],
    };
    let elf = fs::read(compile(&program, &out.join("stage0"))?)?;
    let loaded = Loaded::parse(&elf).ok_or("stage0 is not the ELF file that it should be")?;
    fs::write(out.join("stage0.bin"), loaded.data)?;
    let mut facts = String::new();
    for (name, value) in [
        ("LOADED_AT", loaded.gpa),
        ("ENTRY", loaded.entry),
        ("MEMORY_LEN", loaded.len),
    ] {
        writeln!(facts, "const BUILT_{name}: u64 = {value:#x};")?;
    }
    fs::write(out.join("stage0.rs"), facts)?;
    Ok(())
}
