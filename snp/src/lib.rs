//! SEV-SNP for podvisor: the one launch path (`launch`) and what answers it. `processor` holds the trait; `emulated`, an
//! in-process model of KVM and the AMD firmware, implements it. The launch digest, ID blocks, guest messages,
//! reports, certificates and their verification need no /dev/kvm.

pub mod chain;
pub mod cpuid;
pub mod digest;
mod ecdsa;
pub mod emulated;
mod fpu;
pub mod guest_message;
pub mod id_block;
pub mod launch;
pub mod private_memory;
pub mod processor;
pub mod report;
pub mod rmp;
mod scrub;
#[cfg(test)]
mod testing;
pub mod vcpu_state;
pub mod verify;
