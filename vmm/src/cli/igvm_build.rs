//! `podvisor igvm build`: an IGVM image of a Linux kernel and an initrd, its digest, its ID block and its bill of materials.
//! What an image consists of is `podvisor_firmware::image`'s.

mod output;
mod sbom;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use clap::ValueEnum;
use memmap2::Mmap;
use podvisor_firmware::igvm::{self, BuildOptions, PlanOptions};
use podvisor_firmware::image::{
    ImageMachine, ImageOptions, Kernel, LinuxImage, MAX_VCPUS, Places, Shim, Unpacking, unpack,
};
use podvisor_firmware::plan::{LaunchPlan, Platform};
use podvisor_snp::digest::{Prediction, predict_each};
use podvisor_snp::id_block::unsigned;
use serde_json::json;

use self::output::NewFile;
use super::id_block::Signers;
use super::{Failure, chain, print};
use crate::hex;

const EXAMPLES: &str = "\
Examples:
  podvisor igvm build --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --output pod.igvm
  podvisor igvm build --kernel vmlinux.zst --platform native --output pod.igvm --sbom none
  podvisor igvm build --kernel vmlinuz --initrd initrd.img --id-key id.pem --author-key author.pem --vcpus 2 --output pod.igvm --json
The same inputs make the same image, byte by byte; an ID block adds signatures, which differ each time.";

/// `podvisor igvm build`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BuildArgs {
    /// The kernel: a bzImage (Debian's vmlinuz) or an ELF vmlinux, also packed with gzip, zstd or lz4.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel command line; it is measured.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// What the image is for.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["snp", "native"])]
    platform: Vec<PlatformArg>,
    /// Measure kernel and initrd page by page instead of by their digests: slower to launch, and no copy.
    #[arg(long)]
    measure_all: bool,
    /// The SNP guest policy, in hex.
    #[arg(long, value_name = "HEX", default_value = "0x30000", value_parser = policy)]
    policy: u64,
    /// P-384 private key (PEM) that signs an ID block over the digest for --vcpus.
    #[arg(long, value_name = "PEM")]
    id_key: Option<PathBuf>,
    /// P-384 private key (PEM) that signs the ID key.
    #[arg(long, value_name = "PEM", requires = "id_key")]
    author_key: Option<PathBuf>,
    /// vCPUs that the pod will have: each adds its registers to the digest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u32,
    /// vCPUs that the ACPI tables in the image have room for.
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_vcpus: u32,
    /// PCI segments that the ACPI tables in the image have.
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments: u16,
    /// Memory devices that can be plugged [default: 8 natively, 0 under SEV-SNP]
    #[arg(long, value_name = "N")]
    memory_slots: Option<u8>,
    /// Put the vmlinux that is packed in a bzImage into the image: larger, and the guest need not unpack it.
    #[arg(long)]
    unpack_kernel: bool,
    /// The image; replaced as a whole if it exists.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// The bill of materials (SPDX 2.3 JSON), or none [default: the image's name with .spdx.json]
    #[arg(long, value_name = "FILE")]
    sbom: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The platforms of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PlatformArg {
    /// AMD SEV-SNP.
    Snp,
    /// An ordinary VM.
    Native,
}

impl PlatformArg {
    fn platform(self) -> Platform {
        match self {
            Self::Snp => Platform::SevSnp,
            Self::Native => Platform::Native,
        }
    }
}

/// Reads an SNP guest policy.
pub(super) fn policy(text: &str) -> Result<u64, String> {
    const MUST_BE_ONE: u64 = 1 << 17;
    let policy = u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16);
    match policy {
        Ok(policy) if policy & MUST_BE_ONE != 0 => Ok(policy),
        Ok(policy) => Err(format!("bit 17 must be one: {:#x}", policy | MUST_BE_ONE)),
        Err(_) => Err("a number in hex, such as 0x30000".to_owned()),
    }
}

/// A file of the command line, mapped.
struct Input {
    map: Option<Mmap>,
}

impl Input {
    fn open(option: &str, path: &Path) -> Result<Self, Failure> {
        let fail = |e: std::io::Error| Failure::runtime(format!("{option} {}: {e}", path.display()));
        let file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(fail(std::io::Error::other("empty, or no regular file")));
        }
        let map = Some(crate::sys::map_file(&file).map_err(fail)?);
        Ok(Self { map })
    }

    fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// What was built, for people, programs and the bill of materials.
struct Built<'a> {
    kernel: &'a Kernel<'a>,
    places: Places,
    /// For 1 to as many vCPUs as there are entries; none without SNP.
    predictions: Vec<Prediction>,
    file_bytes: u64,
    kernel_sha256: [u8; 32],
    initrd: Option<(u64, [u8; 32])>,
    time: Duration,
}

impl Built<'_> {
    fn prediction(&self, vcpus: u32) -> Option<&Prediction> {
        self.predictions.get(usize::try_from(vcpus).ok()?.checked_sub(1)?)
    }
}

/// Builds the image.
pub(super) fn run(args: &BuildArgs) -> Result<(), Failure> {
    let start = Instant::now();
    let kernel_file = Input::open("--kernel", &args.kernel)?;
    let initrd_file = args.initrd.as_deref().map(|path| Input::open("--initrd", path));
    let initrd_file = initrd_file.transpose()?;
    let signers = signers(args)?;
    let at_kernel =
        |e: &dyn std::error::Error| Failure::runtime(format!("--kernel {}: {}", args.kernel.display(), chain(e)));
    let unpacked = unpack(kernel_file.bytes()).map_err(|e| at_kernel(&e))?;
    let unpacking = if args.unpack_kernel {
        Unpacking::Now
    } else {
        Unpacking::ByGuest
    };
    let kernel = Kernel::read(&unpacked, unpacking).map_err(|e| at_kernel(&e))?;
    let initrd = initrd_file.as_ref().map_or(&[][..], Input::bytes);
    std::thread::scope(|scope| {
        // The bill of materials names the files by their digests, which takes as long as the digests of the chunks.
        let of_files = scope.spawn(|| {
            let wanted = args.sbom.as_deref() != Some(Path::new("none"));
            let hash = |bytes: &[u8]| if wanted { sha256(bytes) } else { [0; 32] };
            (hash(kernel_file.bytes()), hash(initrd))
        });
        let image = LinuxImage::new(&kernel, initrd, image_options(args), &sha256).map_err(|e| fail(&e))?;
        let mut plans = plans(args, &image)?;
        let predictions = predictions(args, &mut plans, signers.as_ref())?;
        let places = image
            .places(plans.first().map_or(Platform::Native, |plan| plan.platform))
            .map_err(|e| fail(&e))?;
        let file = write(args, &plans)?;
        let (kernel_sha256, initrd_sha256) = of_files.join().unwrap_or_default();
        let mut built = Built {
            kernel: &kernel,
            places,
            predictions,
            file_bytes: file.len(),
            kernel_sha256,
            initrd: initrd_file.as_ref().map(|_| (initrd.len() as u64, initrd_sha256)),
            time: Duration::ZERO,
        };
        let sbom = sbom_path(args)
            .map(|path| {
                let text = sbom::document(args, &built, podvisor_firmware::stage0::IMAGE);
                let mut file = NewFile::create(&path)?;
                file.write(|to| to.write_all(text.as_bytes()))?;
                Ok::<_, Failure>(file)
            })
            .transpose()?;
        file.put()?;
        sbom.map(NewFile::put).transpose()?;
        built.time = start.elapsed();
        print(&report(args, &built))
    })
}

fn fail(error: &dyn std::error::Error) -> Failure {
    Failure::runtime(chain(error))
}

fn image_options(args: &BuildArgs) -> ImageOptions<'_> {
    ImageOptions {
        shim: Shim::embedded(),
        command_line: &args.cmdline,
        machine: ImageMachine {
            max_vcpus: args.max_vcpus,
            segments: args.segments,
            memory_slots: args.memory_slots,
        },
        policy: args.policy,
        measure_all: args.measure_all,
    }
}

/// One plan a platform, SNP's first.
fn plans<'i>(args: &BuildArgs, image: &'i LinuxImage<'_>) -> Result<Vec<LaunchPlan<'i>>, Failure> {
    [PlatformArg::Snp, PlatformArg::Native]
        .into_iter()
        .filter(|platform| args.platform.contains(platform))
        .map(|platform| image.plan(platform.platform()).map_err(|e| fail(&e)))
        .collect()
}

/// The keys of the ID block, if there is to be one.
fn signers(args: &BuildArgs) -> Result<Option<Signers>, Failure> {
    let Some(id) = &args.id_key else { return Ok(None) };
    if !args.platform.contains(&PlatformArg::Snp) {
        return Err(Failure::usage(
            "--id-key: an ID block is for --platform snp; leave it out",
        ));
    }
    Signers::read(id, args.author_key.as_deref()).map(Some)
}

/// The digests, and with keys the ID block over that for `--vcpus`.
fn predictions(
    args: &BuildArgs,
    plans: &mut [LaunchPlan<'_>],
    signers: Option<&Signers>,
) -> Result<Vec<Prediction>, Failure> {
    let mut predictions = Vec::new();
    let Some(plan) = plans.iter_mut().find(|plan| plan.platform == Platform::SevSnp) else {
        return Ok(predictions);
    };
    let most = args.vcpus.max(args.max_vcpus);
    predict_each(plan, most, |prediction| predictions.push(prediction)).map_err(|e| fail(&e))?;
    let wanted = usize::try_from(args.vcpus)
        .ok()
        .and_then(|vcpus| predictions.get(vcpus.checked_sub(1)?));
    if let (Some(signers), Some(prediction)) = (signers, wanted) {
        let mut block = unsigned(prediction.digest);
        signers.sign(&mut block, args.policy).map_err(|e| fail(&e))?;
        plan.id_block = Some(block);
    }
    Ok(predictions)
}

/// Writes the file beside its name and checks what was written.
fn write(args: &BuildArgs, plans: &[LaunchPlan<'_>]) -> Result<NewFile, Failure> {
    let image = igvm::assemble(plans, &BuildOptions::default()).map_err(|e| fail(&e))?;
    let mut file = NewFile::create(&args.output)?;
    file.write(|to| image.write_to(to))?;
    let map = file.map()?;
    for plan in plans {
        let options = PlanOptions {
            platform: Some(plan.platform),
            ..PlanOptions::default()
        };
        let back = igvm::plan(&map, &options).map_err(|e| fail(&e))?;
        if plan.platform == Platform::SevSnp {
            let same = podvisor_snp::launch::check(&back, args.vcpus, &podvisor_snp::launch::LaunchOptions::default());
            let want = podvisor_snp::digest::predict(plan, args.vcpus).map_err(|e| fail(&e))?;
            if same.map_err(|e| fail(&e))? != want {
                return Err(Failure::runtime("the file measures otherwise than what it was made of"));
            }
        }
    }
    Ok(file)
}

fn sbom_path(args: &BuildArgs) -> Option<PathBuf> {
    match &args.sbom {
        Some(path) if path.as_os_str() == "none" => None,
        Some(path) => Some(path.clone()),
        None => {
            let mut name = args.output.clone().into_os_string();
            name.push(".spdx.json");
            Some(name.into())
        }
    }
}

fn report(args: &BuildArgs, built: &Built<'_>) -> String {
    let prediction = built.prediction(args.vcpus);
    let stage0 = podvisor_firmware::stage0::IMAGE.len();
    let initrd = built.initrd.map_or(0, |(len, _)| len);
    if args.json {
        let mut value = json!({
            "file": args.output.to_string_lossy(),
            "bytes": built.file_bytes,
            "sbom": sbom_path(args).map(|path| path.to_string_lossy().into_owned()),
            "kernel": {"form": built.kernel.form.name(), "bytes": built.kernel.payload.len(), "gpa": format!("{:#x}", built.kernel.dest)},
            "initrd": {"bytes": initrd, "gpa": format!("{:#x}", built.places.initrd.dest)},
            "stage0_bytes": stage0,
            "memory_needed": built.places.end,
            "vcpus": args.vcpus,
            "milliseconds": built.time.as_secs_f64() * 1e3,
        });
        if let (Some(prediction), Some(object)) = (prediction, value.as_object_mut()) {
            object.insert("launch_digest".to_owned(), json!(hex::encode(&prediction.digest)));
            object.insert("measured_bytes".to_owned(), json!(prediction.measured_bytes));
            object.insert("firmware_pages".to_owned(), json!(prediction.pages));
            object.insert("id_block".to_owned(), json!(args.id_key.is_some()));
        }
        return value.to_string();
    }
    let mut lines = vec![format!("{}: {} bytes", args.output.display(), built.file_bytes)];
    if let Some(prediction) = prediction {
        let plural = if args.vcpus == 1 { "" } else { "s" };
        lines.push(format!(
            "launch digest   {} ({} vCPU{plural})",
            hex::encode(&prediction.digest),
            args.vcpus
        ));
        lines.push(format!(
            "measured        {} bytes; {} pages go to the firmware",
            prediction.measured_bytes, prediction.pages
        ));
    }
    let kernel = built.kernel;
    lines.push(format!(
        "kernel          {} bytes ({}) at {:#x}",
        kernel.payload.len(),
        kernel.form.name(),
        kernel.dest
    ));
    if initrd > 0 {
        lines.push(format!(
            "initrd          {initrd} bytes at {:#x}",
            built.places.initrd.dest
        ));
    }
    lines.push(format!("stage0          {stage0} bytes"));
    lines.push(format!(
        "memory          at least {} MiB",
        built.places.end.div_ceil(1 << 20)
    ));
    if let Some(path) = sbom_path(args) {
        lines.push(format!("SBOM            {}", path.display()));
    }
    lines.push(format!("built in        {:.0} ms", built.time.as_secs_f64() * 1e3));
    lines.join("\n")
}
