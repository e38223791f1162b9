//! `podvisor measure`: the launch digest of an image, predicted from the image alone.

use podvisor_firmware::igvm::{self, PlanOptions, ZeroPages};
use podvisor_firmware::plan::Platform;
use podvisor_snp::digest::predict;

use super::args::{MeasureArgs, ZeroPagesArg};
use super::{Failure, print};
use crate::hex;

/// Prints the digest.
pub(super) fn run(args: &MeasureArgs) -> Result<(), Failure> {
    let name = args.file.display();
    let file = std::fs::File::open(&args.file)
        .and_then(|file| crate::sys::map_file(&file))
        .map_err(|e| Failure::runtime(format!("{name}: {e}")))?;
    let options = PlanOptions {
        platform: Some(Platform::SevSnp),
        zero_pages: match args.zero_pages {
            ZeroPagesArg::AsZero => ZeroPages::AsZero,
            ZeroPagesArg::AsNormal => ZeroPages::AsNormal,
        },
    };
    let plan = igvm::plan(&file, &options).map_err(|e| Failure::runtime(format!("{name}: {}", super::chain(&e))))?;
    let prediction =
        predict(&plan, args.vcpus).map_err(|e| Failure::runtime(format!("{name}: {}", super::chain(&e))))?;
    let digest = hex::encode(&prediction.digest);
    if args.json {
        let json = serde_json::json!({
            "launch_digest": digest,
            "vcpus": args.vcpus,
            "measured_bytes": prediction.measured_bytes,
            "pages": prediction.pages,
        });
        return print(&json.to_string());
    }
    print(&digest)
}
