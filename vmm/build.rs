//! Builds the pod guest (`resources/guest`) and wraps it into the IGVM image that the monitor embeds
//! (`src/pod_image.rs`). The image depends on the guest's sources and the compiler only: building it twice, anywhere,
//! gives the same bytes.

use std::borrow::Cow;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_firmware::igvm::{BuildOptions, build};
use podvisor_firmware::plan::{
    GpaRange, KVM_VMSA_GPA, LaunchPlan, PAGE_SIZE, PageKind, Parameter, ParameterArea, ParameterKind, Platform,
    Segment, Step, VcpuState, VpContext,
};
use podvisor_firmware::vmsa::vmsa_page;

#[path = "../resources/guest/src/layout.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the guest's own view of memory; the image needs part of it"
)]
mod layout;

/// The guest is always built for this target, whatever the monitor is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Instructions that the guest checks for at its start (`resources/guest/src/cpuid.rs`).
const TARGET_FEATURES: &str = "-Ctarget-feature=+sha,+ssse3,+sse4.1,+aes,+pclmulqdq";
/// SNP guest policy: SMT allowed, and the bit that must be one.
const POLICY: u64 = 0x3_0000;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest");
    for path in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let elf = fs::read(compile(&guest.canonicalize()?, &out.join("guest"))?)?;
    let image = Image::parse(&elf).ok_or("the guest is not the ELF file that it should be")?;
    let plans = [image.plan(Platform::Native), image.plan(Platform::SevSnp)];
    fs::write(out.join("pod.igvm"), build(&plans, &BuildOptions::default())?)?;
    Ok(())
}

/// Compiles the guest and returns the path of its ELF file.
fn compile(guest: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--locked", "--quiet", "--target", TARGET])
        .arg("--manifest-path")
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(guest);
    // What this build was told (flags, wrappers, profiles, clippy's arguments) is not meant for the guest.
    for (name, _) in std::env::vars_os() {
        if !is_for_guest(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    let flags = [TARGET_FEATURES.to_owned(), "-Crelocation-model=static".to_owned()];
    let remapped = remapped_paths(guest, target_dir)?;
    let flags: Vec<_> = flags.into_iter().chain(remapped).collect();
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    // Empty: none. The one that .cargo/config.toml names would make the image depend on where the tree lies: Cargo hashes
    // its path into the names of symbols.
    command.env("RUSTC_WORKSPACE_WRAPPER", "");
    let status = command.status()?;
    if !status.success() {
        return Err(format!("building the pod guest failed: {status}").into());
    }
    Ok(target_dir.join(TARGET).join("release/podguest"))
}

/// Whether an environment variable may reach the guest's build: where tools and registries are, nothing else.
fn is_for_guest(name: &str) -> bool {
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

/// Flags that keep this machine's paths out of the image.
fn remapped_paths(guest: &Path, target_dir: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
    };
    let mut paths = vec![(guest.to_path_buf(), "guest"), (target_dir.to_path_buf(), "target")];
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

/// The guest as its ELF file has it: one loadable segment.
struct Image<'a> {
    entry: u64,
    gpa: u64,
    len: u64,
    data: &'a [u8],
}

impl<'a> Image<'a> {
    fn parse(elf: &'a [u8]) -> Option<Self> {
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
        let mut image = None;
        for header in (0..count).map(|index| headers + index * size) {
            if word(header, 4)? != LOAD {
                continue;
            }
            let (offset, gpa) = (at(word(header + 8, 8)?)?, word(header + 24, 8)?);
            let (file_len, len) = (at(word(header + 32, 8)?)?, word(header + 40, 8)?);
            let data = elf.get(offset..offset.checked_add(file_len)?)?;
            let len = len.next_multiple_of(PAGE_SIZE);
            if image.is_some() || gpa != layout::IMAGE_START || gpa + len > layout::WINDOW_START {
                return None;
            }
            image = Some(Self {
                entry: word(24, 8)?,
                gpa,
                len,
                data,
            });
        }
        image
    }

    /// The launch plan of one platform.
    fn plan(&self, platform: Platform) -> LaunchPlan<'a> {
        let snp = platform == Platform::SevSnp;
        let mut plan = LaunchPlan::new(platform);
        plan.policy = snp.then_some(POLICY);
        let parameters = [
            (layout::VP_COUNT_PAGE, ParameterKind::VpCount),
            (layout::MEMORY_MAP_PAGE, ParameterKind::MemoryMap),
            (layout::COMMAND_LINE_PAGE, ParameterKind::CommandLine),
        ];
        for (area, (gpa, kind)) in parameters.into_iter().enumerate() {
            plan.areas.push(ParameterArea {
                len: PAGE_SIZE,
                initial: Cow::Borrowed(&[]),
                parameters: vec![Parameter { kind, offset: 0 }],
            });
            plan.steps.push(Step::Parameters { gpa, area });
        }
        if snp {
            for (gpa, kind) in [
                (layout::CPUID_PAGE, PageKind::Cpuid),
                (layout::SECRETS_PAGE, PageKind::Secrets),
            ] {
                plan.steps.push(Step::Pages {
                    gpa,
                    len: PAGE_SIZE,
                    kind,
                    data: Cow::Borrowed(&[]),
                });
            }
        }
        plan.steps.push(Step::Pages {
            gpa: self.gpa,
            len: self.len,
            kind: PageKind::Normal,
            data: Cow::Borrowed(self.data),
        });
        let state = self.entry_state(snp);
        let vmsa = if snp {
            Cow::Owned(vmsa_page(&state).to_vec())
        } else {
            Cow::Borrowed(&[][..])
        };
        plan.vps.push(VpContext {
            index: 0,
            gpa: if snp { KVM_VMSA_GPA } else { 0 },
            state,
            vmsa,
        });
        plan.steps.push(Step::Vcpu { vp: 0 });
        plan.required_memory.push(GpaRange {
            start: layout::CPUID_PAGE,
            len: layout::USED_END - layout::CPUID_PAGE,
        });
        plan
    }

    /// 32-bit protected mode without paging, EBX = 1 for SEV-SNP (`resources/guest/src/boot.s`). Without paging every
    /// access of an encrypted guest is to private memory, so that the stub needs no C-bit before it knows where it is.
    fn entry_state(&self, snp: bool) -> VcpuState {
        let code = Segment {
            selector: 0x08,
            attrib: 0xC9B,
            limit: u32::MAX,
            base: 0,
        };
        let data = Segment {
            selector: 0x10,
            attrib: 0xC93,
            ..code
        };
        VcpuState {
            rip: self.entry,
            rbx: u64::from(snp),
            cr0: 0x11,
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            sev_features: u64::from(snp),
            ..VcpuState::reset()
        }
    }
}
