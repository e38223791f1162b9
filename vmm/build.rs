//! Builds the pod guest (`resources/guest`) and wraps it into the IGVM image that the monitor embeds
//! (`src/pod_image.rs`). The image depends on the guest's sources and the compiler only: building it twice, anywhere,
//! gives the same bytes.

use std::borrow::Cow;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

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
