//! The emulated processor: an in-process model of KVM's SEV-SNP calls and of the AMD firmware, on an ordinary VM. It protects
//! nothing; see `docs/emulated-processor.md` for what it does and does not model. This file holds the type and its
//! [`Processor`] implementation; the launch is in `psp`, the guest's requests are in `runtime` and below.

mod error;
mod ghcb;
mod guest;
mod kvm_probe;
mod psp;
mod runtime;
mod vmsa;

use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

pub(crate) use error::fw;
pub use guest::Guest;
pub use runtime::{ConvertError, Runtime, RuntimeOptions};

use self::error::Refusal;
use self::psp::{Import, Launch, Slot};
use self::runtime::lock;
use crate::chain::SigningChain;
use crate::private_memory::{PrivateMemory, PrivateMemoryError, SOFTWARE_PROTECTED_VM};
use crate::processor::{
    LaunchFinish, LaunchUpdate, MemoryRegion, MsrOutcome, Processor, ProcessorError, ProcessorKind,
};
use crate::vcpu_state;

/// The GHCB MSR.
pub const MSR_GHCB: u32 = 0xC001_0130;
/// The SEV_STATUS MSR.
pub const MSR_SEV_STATUS: u32 = 0xC001_0131;
pub use crate::cpuid::{MSR_HAND_OVER, MSR_VALIDATE};

/// Every MSR of the emulation: what a monitor lets through to [`Processor::write_msr`] and [`Processor::read_msr`].
pub const MSRS: [u32; 4] = [MSR_GHCB, MSR_SEV_STATUS, MSR_VALIDATE, MSR_HAND_OVER];

/// Faults that tests put into the launch.
#[derive(Clone, Debug, Default)]
pub struct Injection {
    /// Most pages that one update imports, as if a signal came after them.
    pub most_pages_per_update: Option<u64>,
    /// Whether the first acceptable CPUID page is rejected, with itself as the correction.
    pub reject_cpuid_once: bool,
}

/// What kind of processor is emulated.
#[derive(Clone)]
pub struct Options {
    /// SEV_FEATURES that `KVM_SEV_INIT2` takes (without the SNP bit): DebugSwap.
    pub vmsa_features: u64,
    /// Policy bits that `KVM_SEV_SNP_LAUNCH_START` takes: ABI version, SMT, must-be-one, DEBUG, SINGLE_SOCKET.
    pub policy_bits: u64,
    /// Major and minor version of the firmware's ABI.
    pub abi_version: (u8, u8),
    /// CPUID Fn0000_0001 EAX; a Milan.
    pub processor_signature: u32,
    /// The guest's side.
    pub runtime: RuntimeOptions,
    /// Who signs reports; None: the test chain that podvisor ships.
    pub chain: Option<Arc<SigningChain>>,
    /// Whether private pages are KVM's, out of the monitor's reach: a VM of type
    /// [`SOFTWARE_PROTECTED_VM`](crate::private_memory::SOFTWARE_PROTECTED_VM), which few hosts have.
    pub private_memory: bool,
    /// Faults.
    pub injection: Injection,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            vmsa_features: 1 << 5,
            policy_bits: 0xFFFF | 1 << 16 | psp::POLICY_MUST_BE_ONE | 1 << 19 | 1 << 20,
            abi_version: (1, 55),
            processor_signature: 0x00A0_0F11,
            runtime: RuntimeOptions::default(),
            chain: None,
            private_memory: false,
            injection: Injection::default(),
        }
    }
}

/// The emulated processor of one VM.
pub struct Emulated {
    options: Options,
    runtime: Runtime,
    launch: Mutex<Launch>,
}

impl Emulated {
    /// An emulated processor for one VM whose RAM is `memory`.
    #[must_use]
    pub fn new(memory: GuestMemoryMmap<()>, options: Options) -> Self {
        Self {
            runtime: Runtime::new(memory, &options.runtime),
            launch: Mutex::new(Launch::new()),
            options,
        }
    }

    /// The guest's side of it.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Moves what the launch imported to where the guest sees it. What came from the image itself, which is no secret, stays
    /// readable here too: KVM looks at the instructions that it emulates through the monitor's half.
    fn fill_private(&self, vm: &VmFd, vcpus: &[VcpuFd], imports: &[Import]) -> Result<(), Refusal> {
        let (Some(memory), Some(vcpu)) = (self.runtime.private(), vcpus.first()) else {
            return Ok(());
        };
        let ranges: Vec<_> = imports.iter().map(|import| import.gfns.clone()).collect();
        memory
            .fill(vm, vcpu, &ranges)
            .map_err(|error| Refusal::new(libc::EIO, 0, error.to_string()))?;
        for import in imports.iter().filter(|import| !import.of_image) {
            memory
                .empty_shared(import.gfns.start, import.gfns.end - import.gfns.start)
                .map_err(|error| refusal(&error))?;
        }
        Ok(())
    }

    fn seal(&self, vcpus: &[VcpuFd], features: u64) -> Result<Vec<Box<crate::digest::Page>>, Refusal> {
        vcpus
            .iter()
            .map(|vcpu| {
                let mut state =
                    vcpu_state::read(vcpu).map_err(|error| Refusal::new(error.errno, 0, error.to_string()))?;
                if state.dr7 != vmsa::DR7_FIXED {
                    return Err(Refusal::einval(format!("DR7 is {:#x}, must be 0x400", state.dr7)));
                }
                state.sev_features = features;
                Ok(Box::new(vmsa::page(&vmsa::as_kvm_builds(&state))))
            })
            .collect()
    }
}

fn refusal(error: &PrivateMemoryError) -> Refusal {
    Refusal::new(error.errno(), 0, error.to_string())
}

/// Whole pages `[gpa, gpa + len)` as frames.
fn frames(gpa: u64, len: u64) -> Result<std::ops::Range<u64>, Refusal> {
    let end = gpa.checked_add(len);
    match end {
        Some(end) if len > 0 && gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) => {
            Ok(gpa / PAGE_SIZE..end / PAGE_SIZE)
        }
        _ => Err(Refusal::einval(format!(
            "[{gpa:#x}, +{len:#x}) is not a range of whole pages"
        ))),
    }
}

impl Processor for Emulated {
    fn kind(&self) -> ProcessorKind {
        ProcessorKind::Emulated
    }

    fn vm_type(&self) -> u64 {
        if self.options.private_memory {
            SOFTWARE_PROTECTED_VM
        } else {
            0
        }
    }

    fn init(&self, vm: &VmFd, vmsa_features: u64) -> Result<(), ProcessorError> {
        lock(&self.launch)
            .init(&self.options, vmsa_features, kvm_probe::vcpus_exist(vm))
            .map_err(|refusal| refusal.of("KVM_SEV_INIT2"))?;
        if self.options.private_memory {
            let memory = PrivateMemory::new(vm, self.runtime.memory().clone());
            self.runtime
                .keep_private_in(memory.map_err(|error| refusal(&error).of("KVM_SEV_INIT2"))?);
        }
        Ok(())
    }

    fn map_region(&self, vm: &VmFd, region: &MemoryRegion) -> Result<(), ProcessorError> {
        const OP: &str = "KVM_SET_USER_MEMORY_REGION2";
        let gfns = frames(region.gpa, region.len).map_err(|refusal| refusal.of(OP))?;
        let slot = Slot {
            slot: region.slot,
            gfn: gfns.start,
            pages: gfns.end - gfns.start,
        };
        let mut launch = lock(&self.launch);
        launch.check_slot(slot).map_err(|refusal| refusal.of(OP))?;
        let host = self.runtime.memory().get_host_address(GuestAddress(region.gpa));
        let is_ours = host.is_ok_and(|host| host.addr() as u64 == region.host_addr);
        if !is_ours || !self.runtime.pages().is_ram(&gfns) {
            return Err(Refusal::einval("not the RAM that the emulated processor was made with").of(OP));
        }
        match self.runtime.private() {
            Some(memory) => memory.map(vm, region).map_err(|error| refusal(&error).of(OP))?,
            None => kvm_probe::set_region(
                vm,
                kvm_userspace_memory_region {
                    slot: region.slot,
                    flags: 0,
                    guest_phys_addr: region.gpa,
                    memory_size: region.len,
                    userspace_addr: region.host_addr,
                },
            )
            .map_err(|error| Refusal::new(error.errno(), 0, "KVM refused the memslot").of(OP))?,
        }
        launch.add_slot(slot);
        Ok(())
    }

    fn set_private(&self, _vm: &VmFd, gpa: u64, len: u64, private: bool) -> Result<(), ProcessorError> {
        const OP: &str = "KVM_SET_MEMORY_ATTRIBUTES";
        let gfns = frames(gpa, len).map_err(|refusal| refusal.of(OP))?;
        self.runtime
            .convert_ram(gfns, private)
            .map_err(|error| Refusal::new(error.errno(), 0, error.to_string()).of(OP))
    }

    fn launch_start(&self, _vm: &VmFd, policy: u64) -> Result<(), ProcessorError> {
        lock(&self.launch)
            .start(&self.options, policy)
            .map_err(|refusal| refusal.of("KVM_SEV_SNP_LAUNCH_START"))
    }

    fn launch_update(
        &self,
        _vm: &VmFd,
        update: &mut LaunchUpdate<'_>,
        correction: Option<&mut [u8]>,
    ) -> Result<(), ProcessorError> {
        lock(&self.launch)
            .update(&self.options, &self.runtime, update, correction)
            .map_err(|refusal| refusal.of("KVM_SEV_SNP_LAUNCH_UPDATE"))
    }

    fn launch_finish(&self, vm: &VmFd, vcpus: &[VcpuFd], finish: &LaunchFinish) -> Result<(), ProcessorError> {
        const OP: &str = "KVM_SEV_SNP_LAUNCH_FINISH";
        let mut launch = lock(&self.launch);
        launch.check_can_finish().map_err(|refusal| refusal.of(OP))?;
        let features = launch.features();
        let vmsas = self.seal(vcpus, features).map_err(|refusal| refusal.of(OP))?;
        let context = launch.finish(&vmsas, finish).map_err(|refusal| refusal.of(OP))?;
        self.fill_private(vm, vcpus, &launch.take_imports())
            .map_err(|refusal| refusal.of(OP))?;
        let chain = match &self.options.chain {
            Some(chain) => Arc::clone(chain),
            None => SigningChain::test_chain()
                .map_err(|error| Refusal::new(libc::EIO, fw::RESOURCE_LIMIT, error.to_string()).of(OP))?,
        };
        self.runtime
            .start(Guest::new(context, chain, self.options.processor_signature), features);
        Ok(())
    }

    fn page_state_change(&self, gpa: u64, len: u64, private: bool) -> Result<(), ProcessorError> {
        const OP: &str = "KVM_HC_MAP_GPA_RANGE";
        let gfns = frames(gpa, len).map_err(|refusal| refusal.of(OP))?;
        self.runtime
            .convert(gfns, private)
            .map_err(|error| Refusal::new(error.errno(), 0, error.to_string()).of(OP))
    }

    fn write_msr(&self, vcpu: u32, msr: u32, value: u64) -> MsrOutcome {
        self.runtime.write_msr(vcpu, msr, value)
    }

    fn read_msr(&self, vcpu: u32, msr: u32) -> MsrOutcome {
        self.runtime.read_msr(vcpu, msr)
    }

    fn is_shared(&self, gpa: u64, len: u64) -> bool {
        self.runtime.pages().is_shared(gpa, len)
    }

    fn launch_digest(&self) -> Option<[u8; 48]> {
        lock(&self.launch).digest()
    }
}
