//! Builds the pod guest (`resources/guest`) and wraps it into the IGVM image that the monitor embeds
//! (`src/pod_image.rs`). The image depends on the guest's sources and the compiler only: building it twice, anywhere,
//! gives the same bytes.

use std::borrow::Cow;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use podvisor_firmware::igvm::{BuildOptions, build};
use podvisor_firmware::plan::{GpaRange, LaunchPlan, PAGE_SIZE, PageKind, ParameterKind, Platform, Step, VcpuState};

#[path = "../resources/guest/src/layout.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the guest's own view of memory; the image needs part of it"
)]
mod layout;

#[path = "../resources/bare_metal.rs"]
mod bare_metal;

use bare_metal::{Loaded, Program, compile};

/// Instructions that the guest checks for at its start (`resources/guest/src/cpuid.rs`); it does without SHA's.
const TARGET_FEATURES: &str = "-Ctarget-feature=+sha,+ssse3,+sse4.1,+aes,+pclmulqdq";
/// SNP guest policy: SMT allowed, and the bit that must be one.
const POLICY: u64 = 0x3_0000;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../resources/bare_metal.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let program = Program {
        dir: &guest,
        name: "podguest",
        flags: &[TARGET_FEATURES],
    };
    let elf = fs::read(compile(&program, &out.join("guest"))?)?;
    let image = Image::parse(&elf).ok_or("the guest is not the ELF file that it should be")?;
    let plans = [image.plan(Platform::Native), image.plan(Platform::SevSnp)];
    fs::write(out.join("pod.igvm"), build(&plans, &BuildOptions::default())?)?;
    Ok(())
}

/// The guest in memory.
struct Image<'a> {
    entry: u64,
    gpa: u64,
    len: u64,
    data: &'a [u8],
}

impl<'a> Image<'a> {
    fn parse(elf: &'a [u8]) -> Option<Self> {
        let Loaded { entry, gpa, len, data } = Loaded::parse(elf)?;
        let len = len.next_multiple_of(PAGE_SIZE);
        let fits = gpa == layout::IMAGE_START && gpa + len <= layout::WINDOW_START;
        fits.then_some(Self { entry, gpa, len, data })
    }

    /// The launch plan of one platform.
    fn plan(&self, platform: Platform) -> LaunchPlan<'a> {
        let snp = platform == Platform::SevSnp;
        let mut plan = LaunchPlan::new(platform);
        plan.policy = snp.then_some(POLICY);
        plan.add_parameter_pages(&[
            (layout::VP_COUNT_PAGE, ParameterKind::VpCount),
            (layout::MEMORY_MAP_PAGE, ParameterKind::MemoryMap),
            (layout::COMMAND_LINE_PAGE, ParameterKind::CommandLine),
        ]);
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
        // EBX = 1 for SEV-SNP (`resources/guest/src/boot.s`).
        plan.add_first_vcpu(VcpuState::protected_mode(self.entry, u32::from(snp), snp));
        plan.required_memory.push(GpaRange {
            start: layout::CPUID_PAGE,
            len: layout::USED_END - layout::CPUID_PAGE,
        });
        plan
    }
}
