//! The encrypted launch as the monitor drives it: which processor answers, what it is told of the machine, what the
//! launch measured. The launch itself is `podvisor_snp`'s.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use podvisor_api::types::Isolation;
use podvisor_firmware::machine::MachineDescription;
use podvisor_firmware::parameters;
use podvisor_firmware::plan::{GpaRange, LaunchPlan};
use podvisor_snp::emulated::{self, Emulated};
use podvisor_snp::launch::{self, LaunchOptions, LaunchReport};
use podvisor_snp::processor::{Processor, ProcessorKind};

use crate::config::PodPlan;
use crate::hex;
use crate::machine::{BootError, During};
use crate::memory::{GuestRam, LaunchMemory};

/// What is said wherever the emulation shows.
pub const EMULATION_NOTICE: &str = "platform.isolation=snp-emulated: the SEV-SNP processor is EMULATED and protects nothing; it is for tests and demos";

/// The processor of a confidential pod, and what its launch measured.
pub struct Confidential {
    processor: Arc<dyn Processor>,
    memory: LaunchMemory,
    report: Option<LaunchReport>,
}

impl Confidential {
    /// The processor that `plan` asks for, over `ram`; none for a pod without isolation.
    ///
    /// # Errors
    /// When there is no such processor here.
    pub fn new(plan: &PodPlan, ram: &GuestRam) -> Result<Option<Self>, BootError> {
        match plan.isolation {
            Isolation::None => return Ok(None),
            Isolation::Snp => {
                return Err(BootError::new(
                    "platform.sev_snp: there is no SEV-SNP processor to launch on",
                ));
            }
            Isolation::SnpEmulated => {}
        }
        tracing::warn!("{EMULATION_NOTICE}");
        let memory = ram.launch_memory().during("guest memory")?;
        let mut options = emulated::Options::default();
        options.runtime.max_vcpus = plan.vcpus;
        options.private_memory = plan.private_memory;
        let processor = Arc::new(Emulated::new(memory.clone(), options));
        Ok(Some(Self {
            processor,
            memory,
            report: None,
        }))
    }

    /// Prepares `vm` before it has vCPUs: SEV initialised for `plan`, the guest's SNP MSRs sent to the processor.
    ///
    /// # Errors
    /// As KVM.
    pub fn init(&self, vm: &VmFd, plan: &LaunchPlan<'_>) -> Result<(), BootError> {
        self.processor
            .init(vm, launch::vmsa_features(plan))
            .during("initialising SEV-SNP")?;
        if self.processor.kind() == ProcessorKind::Emulated {
            route_msrs(vm).during("sending the guest's SNP MSRs to the emulated processor")?;
        }
        Ok(())
    }

    /// The processor.
    #[must_use]
    pub fn processor(&self) -> &dyn Processor {
        self.processor.as_ref()
    }

    /// The processor, to keep.
    #[must_use]
    pub fn shared_processor(&self) -> Arc<dyn Processor> {
        Arc::clone(&self.processor)
    }

    /// What the launch measured; none before it.
    #[must_use]
    pub fn report(&self) -> Option<&LaunchReport> {
        self.report.as_ref()
    }

    /// Launches `image`.
    ///
    /// # Errors
    /// When the launch fails, or measures something other than what was promised.
    pub fn launch(
        mut self,
        plan: &PodPlan,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        image: &LaunchPlan<'_>,
        machine: &MachineDescription,
    ) -> Result<Self, BootError> {
        for range in &image.required_memory {
            if !machine.is_ram(range.start, range.len) {
                return Err(BootError::new(format!(
                    "the image needs {:#x} bytes of memory at {:#x}: raise memory.size",
                    range.len, range.start
                )));
            }
        }
        let areas = image
            .areas
            .iter()
            .map(|area| parameters::fill(area, machine))
            .collect::<Result<Vec<_>, _>>()
            .during("filling the image's parameters")?;
        let options = LaunchOptions {
            private_ram: crate::memory::ram_ranges(plan.memory)
                .into_iter()
                .map(|(start, len)| GpaRange { start, len })
                .collect(),
            areas,
            host_data: plan.host_data,
            expect_digest: plan.expect_digest,
            vcek_disabled: false,
        };
        let report =
            launch::launch(self.processor.as_ref(), vm, vcpus, &self.memory, image, &options).during("SNP launch")?;
        tracing::info!(
            digest_predicted = hex::encode(&report.predicted.digest),
            digest_launched = report.launched.as_ref().map(|d| hex::encode(d)).unwrap_or_default(),
            measured_bytes = report.predicted.measured_bytes,
            "SNP launch measured"
        );
        self.report = Some(report);
        Ok(self)
    }
}

/// The emulated processor answers its MSRs itself; KVM would have others of its own, or none, under these numbers.
fn route_msrs(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    })?;
    let ranges = emulated::MSRS.map(|base| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count: 1,
        bitmap: &[0],
    });
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
}
