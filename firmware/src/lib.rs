//! What boots a pod. Every source (an IGVM file, a PVH ELF kernel, a bzImage) becomes one [`plan::LaunchPlan`];
//! the launch, the digest prediction, `inspect` and the IGVM builder all read that plan and nothing else.
//! Runs without /dev/kvm and has no unsafe code. What executes a plan lives in `podvisor-snp` (encrypted) and
//! in the monitor (plain).
#![forbid(unsafe_code)]

pub mod acpi;
pub mod igvm;
pub mod image;
pub mod initdata;
pub mod inspect;
pub mod layout;
pub mod linux;
pub mod machine;
pub mod memory_map;
pub mod ovmf;
pub mod parameters;
pub mod plan;
pub mod stage0;
pub mod vmsa;
