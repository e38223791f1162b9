//! The monitor: from a configuration to a running pod, and the control loop and command line around it. Devices,
//! images, SNP and the API's wire format live in crates of their own; here they meet.

pub mod api_socket;
pub mod chipset;
pub mod cli;
pub mod config;
pub mod consoles;
pub mod control;
pub mod cpuid;
pub mod demo;
pub mod device_memory;
pub mod handlers;
pub mod hex;
pub mod isolation;
pub mod kvm;
pub mod launch_plain;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod pod;
pub mod pod_image;
pub mod registry;
pub mod sandbox;
pub mod sizing;
pub mod snapshot;
pub mod sys;
pub mod telling;
pub mod vcpu;
