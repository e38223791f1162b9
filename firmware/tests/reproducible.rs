//! stage0 is measured, so whoever builds it must get the same bytes: here again, from a copy of its sources elsewhere.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::fs;
use std::path::Path;

use podvisor_firmware::stage0::{ENTRY, IMAGE, MEMORY_LEN};

#[path = "../../resources/bare_metal.rs"]
#[expect(
    clippy::print_stdout,
    reason = "what it prints is for Cargo, when a build script runs it"
)]
mod bare_metal;
#[path = "../stage0/flags.rs"]
mod flags;

/// Copies the files below `from` but for what was built there.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if !entry.file_type().unwrap().is_dir() {
            fs::copy(entry.path(), to).unwrap();
        } else if entry.file_name() != "target" {
            copy(&entry.path(), &to);
        }
    }
}

#[test]
fn a_build_elsewhere_gives_the_same_bytes() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let elsewhere = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stage0-elsewhere");
    let _ = fs::remove_dir_all(&elsewhere);
    copy(&here.join("stage0"), &elsewhere.join("stage0"));
    fs::create_dir_all(elsewhere.join("src")).unwrap();
    fs::copy(here.join("src/layout.rs"), elsewhere.join("src/layout.rs")).unwrap();
    let program = bare_metal::Program {
        dir: &elsewhere.join("stage0"),
        name: "stage0",
        flags: flags::FLAGS,
    };
    let elf = fs::read(bare_metal::compile(&program, &elsewhere.join("target")).unwrap()).unwrap();
    let again = bare_metal::Loaded::parse(&elf).unwrap();
    assert_eq!((again.entry, again.len), (ENTRY, MEMORY_LEN));
    assert!(again.gpa == podvisor_firmware::stage0::abi::STAGE0_START);
    assert!(again.data == IMAGE, "stage0 is not the same built twice");
    fs::remove_dir_all(&elsewhere).unwrap();
}
