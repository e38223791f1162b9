//! SEV-SNP for podvisor: the one launch path and what answers it. `processor` holds the trait, `hardware` (KVM's
//! SNP ioctls) and `emulated` (an in-process model of KVM and the AMD firmware) implement it. The launch digest,
//! VMSA, ID block, reports, certificates and their verification need no /dev/kvm.

pub mod digest;
pub mod processor;
#[cfg(test)]
mod testing;
pub mod vmsa;
