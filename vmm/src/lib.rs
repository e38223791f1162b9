//! The monitor: from a configuration to a running pod, and the control loop and command line around it. Devices,
//! images, SNP and the API's wire format live in crates of their own; here they meet.

pub mod cpuid;
pub mod kvm;
pub mod logging;
pub mod memory;
pub mod pod_image;
pub mod sys;
pub mod vcpu;
