//! The seam between the launch path and what answers it: real KVM + AMD firmware, or the in-process emulation.
//! Holds the trait, its argument types and its error; no behaviour.

use kvm_ioctls::{VcpuFd, VmFd};
use podvisor_firmware::plan::PageKind;

/// Which kind of processor answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessorKind {
    /// KVM on SEV-SNP hardware.
    Hardware,
    /// The in-process emulation. It protects nothing.
    Emulated,
}

/// An error as KVM gives it: an errno and, for firmware commands, the firmware's code (`kvm_sev_cmd.error`).
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{op}: {} (firmware error {fw_error:#x}): {reason}", std::io::Error::from_raw_os_error(*errno))]
pub struct ProcessorError {
    /// The operation, by KVM's name.
    pub op: &'static str,
    /// errno of the call.
    pub errno: i32,
    /// Firmware status code, 0 when the firmware was not reached.
    pub fw_error: u32,
    /// What was wrong, in words.
    pub reason: String,
}

/// One memslot.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRegion {
    /// KVM slot number.
    pub slot: u32,
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host virtual address of the (shared half of the) mapping.
    pub host_addr: u64,
}

/// `KVM_SEV_SNP_LAUNCH_UPDATE`: what is left to do after the call is written back, as KVM does.
#[derive(Clone, Copy, Debug)]
pub struct LaunchUpdate<'s> {
    /// First guest frame number.
    pub gfn: u64,
    /// Source bytes, a multiple of the page size; ignored for [`PageKind::Zero`].
    pub source: &'s [u8],
    /// Bytes to import.
    pub len: u64,
    /// SNP page type.
    pub kind: PageKind,
}

/// The 96-byte ID block and the 4096-byte ID authentication information.
pub type IdBlockPages = (Box<[u8; 96]>, Box<[u8; 4096]>);

/// `KVM_SEV_SNP_LAUNCH_FINISH`.
#[derive(Clone, Debug, Default)]
pub struct LaunchFinish {
    /// The ID block, if the image has one.
    pub id_block: Option<IdBlockPages>,
    /// Whether the author key is used.
    pub author_key_enabled: bool,
    /// HOST_DATA of every report of this guest.
    pub host_data: [u8; 32],
    /// VCEK_DISABLED.
    pub vcek_disabled: bool,
}

/// What became of a guest's access to an MSR that left the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MsrOutcome {
    /// Done; for a read the value.
    Value(u64),
    /// Not an MSR of ours: the guest gets #GP.
    Fault,
    /// The guest asked to be terminated (GHCB MSR protocol 0x100).
    Terminate {
        /// Reason code set.
        set: u8,
        /// Reason code.
        code: u8,
    },
}

/// SEV-SNP as the launch path and the vCPU loop use it. Every method mirrors one operation of KVM and fails
/// with the error KVM gives.
pub trait Processor: Send + Sync {
    /// Which one this is.
    fn kind(&self) -> ProcessorKind;
    /// Argument of `KVM_CREATE_VM` for guests of this processor.
    fn vm_type(&self) -> u64;
    /// `KVM_SEV_INIT2` with `vmsa_features` (without the SNP bit), before any vCPU exists.
    ///
    /// # Errors
    /// As KVM.
    fn init(&self, vm: &VmFd, vmsa_features: u64) -> Result<(), ProcessorError>;
    /// `KVM_CREATE_GUEST_MEMFD` and `KVM_SET_USER_MEMORY_REGION2`.
    ///
    /// # Errors
    /// As KVM.
    fn map_region(&self, vm: &VmFd, region: &MemoryRegion) -> Result<(), ProcessorError>;
    /// `KVM_SET_MEMORY_ATTRIBUTES` over `[gpa, gpa + len)`.
    ///
    /// # Errors
    /// As KVM.
    fn set_private(&self, vm: &VmFd, gpa: u64, len: u64, private: bool) -> Result<(), ProcessorError>;
    /// `KVM_SEV_SNP_LAUNCH_START`.
    ///
    /// # Errors
    /// As KVM.
    fn launch_start(&self, vm: &VmFd, policy: u64) -> Result<(), ProcessorError>;
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`; on success `update` holds what remains (`len == 0` when done). A rejected
    /// CPUID page comes back corrected through `correction`, with firmware error INVALID_PARAM.
    ///
    /// # Errors
    /// As KVM.
    fn launch_update(
        &self,
        vm: &VmFd,
        update: &mut LaunchUpdate<'_>,
        correction: Option<&mut [u8]>,
    ) -> Result<(), ProcessorError>;
    /// `KVM_SEV_SNP_LAUNCH_FINISH`: measures the state of each vCPU, in order, and seals the guest.
    ///
    /// # Errors
    /// As KVM.
    fn launch_finish(&self, vm: &VmFd, vcpus: &[VcpuFd], finish: &LaunchFinish) -> Result<(), ProcessorError>;
    /// The guest's page-state change (`KVM_HC_MAP_GPA_RANGE`): `[gpa, gpa + len)` becomes private or shared.
    ///
    /// # Errors
    /// EINVAL for a range that is not RAM; as the host says.
    fn page_state_change(&self, gpa: u64, len: u64, private: bool) -> Result<(), ProcessorError>;
    /// A guest's WRMSR that left the kernel (the GHCB protocol of the emulation).
    fn write_msr(&self, vcpu: u32, msr: u32, value: u64) -> MsrOutcome;
    /// A guest's RDMSR that left the kernel.
    fn read_msr(&self, vcpu: u32, msr: u32) -> MsrOutcome;
    /// Whether every byte of `[gpa, gpa + len)` is shared, so that a device may touch it. Lock-free: on the data path.
    fn is_shared(&self, gpa: u64, len: u64) -> bool;
    /// The digest of this launch as the processor computed it, once finished (the emulation knows it; real
    /// hardware tells it only in reports).
    fn launch_digest(&self) -> Option<[u8; 48]>;
}
