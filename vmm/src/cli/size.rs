//! `podvisor size`: what a pod's limits make, by the rules that boot uses.

use podvisor_api::types::{PodConfig, Quantity};

use super::args::SizeArgs;
use super::{Failure, print};
use crate::sizing;

/// Prints memory and vCPUs.
pub(super) fn run(args: &SizeArgs) -> Result<(), Failure> {
    let pod = PodConfig {
        handler: args.handler.clone(),
        memory_limit: args.memory_limit.clone().map(Quantity),
        cpu_limit: args.cpu_limit.clone().map(Quantity),
    };
    let sizing = sizing::size(&pod).map_err(Failure::usage)?;
    if args.json {
        let json = serde_json::json!({"memory_bytes": sizing.memory_bytes, "vcpus": sizing.vcpus});
        return print(&json.to_string());
    }
    print(&format!(
        "memory {} MiB ({} bytes)\nvcpus  {}",
        sizing.memory_bytes >> 20,
        sizing.memory_bytes,
        sizing.vcpus
    ))
}
