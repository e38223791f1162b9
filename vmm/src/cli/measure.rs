//! `podvisor measure`: the launch digest of an image or a firmware, predicted from the file alone.

use std::path::Path;

use podvisor_firmware::igvm::{self, PlanOptions, ZeroPages};
use podvisor_firmware::linux::{ImageKind, detect};
use podvisor_firmware::ovmf::{self, BootHashes, Hypervisor, OvmfOptions};
use podvisor_firmware::plan::{LaunchPlan, Platform};
use podvisor_snp::digest::{PredictError, predict, predict_pages, sha256};

use super::args::{MeasureArgs, VmmTypeArg, ZeroPagesArg};
use super::{Failure, chain, print};
use crate::hex;

/// Prints the digest.
pub(super) fn run(args: &MeasureArgs) -> Result<(), Failure> {
    let name = args.file.display();
    let file = map(&args.file)?;
    let fail = |e: &PredictError| Failure::runtime(format!("{name}: {}", chain(e)));
    let (plan, volume) = if detect(&file) != ImageKind::Igvm && ovmf::is_ovmf(&file) {
        (of_ovmf(args, &file)?, Some(ovmf::volume(&file)))
    } else {
        (of_igvm(args, &file)?, None)
    };
    let prediction = predict(&plan, args.vcpus).map_err(|e| fail(&e))?;
    let digest = hex::encode(&prediction.digest);
    if args.json {
        let mut json = serde_json::json!({
            "launch_digest": digest,
            "vcpus": args.vcpus,
            "measured_bytes": prediction.measured_bytes,
            "pages": prediction.pages,
        });
        if let (Some(volume), Some(fields)) = (volume, json.as_object_mut()) {
            let digest = predict_pages(&volume).map_err(|e| fail(&e))?;
            fields.insert("volume_digest".to_owned(), hex::encode(&digest).into());
        }
        return print(&json.to_string());
    }
    print(&digest)
}

fn map(path: &Path) -> Result<memmap2::Mmap, Failure> {
    std::fs::File::open(path)
        .and_then(|file| crate::sys::map_file(&file))
        .map_err(|e| Failure::runtime(format!("{}: {e}", path.display())))
}

fn of_igvm<'f>(args: &MeasureArgs, file: &'f [u8]) -> Result<LaunchPlan<'f>, Failure> {
    let given = [
        ("--cpu", args.cpu.is_some()),
        ("--kernel", args.kernel.is_some()),
        ("--guest-features", args.guest_features.is_some()),
        ("--vmm-type", args.vmm_type.is_some()),
    ];
    if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
        return Err(Failure::usage(format!(
            "{option} is for OVMF only, and {} is none: an IGVM image holds what is measured",
            args.file.display()
        )));
    }
    let options = PlanOptions {
        platform: Some(Platform::SevSnp),
        zero_pages: match args.zero_pages {
            ZeroPagesArg::AsZero => ZeroPages::AsZero,
            ZeroPagesArg::AsNormal => ZeroPages::AsNormal,
        },
    };
    igvm::plan(file, &options).map_err(|e| Failure::runtime(format!("{}: {}", args.file.display(), chain(&e))))
}

fn of_ovmf<'f>(args: &MeasureArgs, file: &'f [u8]) -> Result<LaunchPlan<'f>, Failure> {
    let hypervisor = match args.vmm_type {
        None | Some(VmmTypeArg::Qemu) => Hypervisor::Qemu,
        Some(VmmTypeArg::Ec2) => Hypervisor::Ec2,
        Some(VmmTypeArg::Gce) => Hypervisor::Gce,
    };
    let signature = match (args.cpu, hypervisor) {
        (Some(cpu), _) => cpu.0,
        // Others do not show the guest its processor in RDX.
        (None, Hypervisor::Ec2 | Hypervisor::Gce) => 0,
        (None, Hypervisor::Qemu) => {
            return Err(Failure::usage(
                "--cpu: QEMU puts the processor's signature into the registers that are measured; name the model, as EPYC-Milan",
            ));
        }
    };
    let vcpus = u16::try_from(args.vcpus).ok().filter(|vcpus| *vcpus > 0);
    let vcpus = vcpus.ok_or_else(|| Failure::usage(format!("--vcpus: {} is not between 1 and 65535", args.vcpus)))?;
    let options = OvmfOptions {
        hypervisor,
        vcpus,
        signature,
        sev_features: args.guest_features.unwrap_or(1),
        hashes: hashes(args)?,
    };
    ovmf::plan(file, &options).map_err(|e| Failure::runtime(format!("{}: {}", args.file.display(), chain(&e))))
}

/// The hashes of what the firmware is to boot, if it is to boot something.
fn hashes(args: &MeasureArgs) -> Result<Option<BootHashes>, Failure> {
    let Some(kernel) = &args.kernel else {
        return Ok(None);
    };
    let initrd = match &args.initrd {
        Some(initrd) => sha256(&map(initrd)?),
        None => sha256(&[]),
    };
    let mut command_line = args.cmdline.clone().unwrap_or_default().into_bytes();
    command_line.push(0);
    Ok(Some(BootHashes {
        kernel: sha256(&map(kernel)?),
        initrd,
        command_line: sha256(&command_line),
    }))
}
