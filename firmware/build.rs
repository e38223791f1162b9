//! Builds stage0 (`stage0/`), the boot shim that images of Linux pods hold (`src/stage0.rs`).

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "../resources/bare_metal.rs"]
mod bare_metal;
#[path = "stage0/flags.rs"]
mod flags;

use bare_metal::{Loaded, Program, compile};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("stage0");
    for path in [
        "build.rs",
        "stage0/flags.rs",
        "../resources/bare_metal.rs",
        "src/layout.rs",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let program = Program {
        dir: &dir,
        name: "stage0",
        flags: flags::FLAGS,
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
    writeln!(facts, "const BUILT_WITH: &str = {:?};", compiler()?)?;
    fs::write(out.join("stage0.rs"), facts)?;
    Ok(())
}

/// The compiler's version.
fn compiler() -> Result<String, Box<dyn Error>> {
    let rustc = std::env::var_os("RUSTC").ok_or("RUSTC is not set")?;
    let said = Command::new(rustc).arg("--version").output()?;
    Ok(String::from_utf8(said.stdout)?.trim().to_owned())
}
