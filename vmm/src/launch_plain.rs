//! The plain launch: executes a plan on an ordinary VM. Pages are copied into guest memory, parameters filled,
//! registers applied. The encrypted launch of the same plans is `podvisor_snp`'s.

use kvm_ioctls::VcpuFd;
use podvisor_firmware::machine::MachineDescription;
use podvisor_firmware::parameters::{self, ParameterError};
use podvisor_firmware::plan::{LaunchPlan, Platform, Step};
use podvisor_snp::vcpu_state::{self, RegisterError};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::LaunchMemory;

/// Why a plan cannot be executed.
#[derive(Debug, thiserror::Error)]
pub enum PlainLaunchError {
    /// A plan for an encrypted guest.
    #[error("the image is for {0:?} only: start it with platform.isolation=snp-emulated, or give a native image")]
    Platform(Platform),
    /// The image needs memory that the pod does not have.
    #[error("the image puts {len:#x} bytes at {gpa:#x}, where the pod has no memory: raise memory.size")]
    NoRam {
        /// First byte.
        gpa: u64,
        /// Length.
        len: u64,
    },
    /// A parameter cannot be filled.
    #[error("filling the image's parameters")]
    Parameter(#[from] ParameterError),
    /// A step names a parameter area or vCPU that the plan does not hold.
    #[error("the plan refers to {0}, which it does not hold")]
    Dangling(&'static str),
    /// The initial registers are not possible.
    #[error("setting the initial registers of vCPU {vcpu}")]
    Registers {
        /// Its index.
        vcpu: usize,
        /// Why.
        source: RegisterError,
    },
}

/// Executes `plan` on `memory` (fresh, all zero) and `vcpus`.
///
/// # Errors
/// [`PlainLaunchError`]; memory may have been written then.
pub fn launch(
    plan: &LaunchPlan<'_>,
    machine: &MachineDescription,
    memory: &LaunchMemory,
    vcpus: &[VcpuFd],
) -> Result<(), PlainLaunchError> {
    if plan.platform != Platform::Native {
        return Err(PlainLaunchError::Platform(plan.platform));
    }
    for range in &plan.required_memory {
        if !machine.is_ram(range.start, range.len) {
            return Err(PlainLaunchError::NoRam {
                gpa: range.start,
                len: range.len,
            });
        }
    }
    let mut writer = Writer { memory, fresh_from: 0 };
    for step in &plan.steps {
        match step {
            Step::Pages { gpa, len, data, .. } => writer.put(*gpa, *len, data)?,
            Step::Parameters { gpa, area } => {
                let area = plan
                    .areas
                    .get(*area)
                    .ok_or(PlainLaunchError::Dangling("a parameter area"))?;
                writer.put(*gpa, area.len, &parameters::fill(area, machine)?)?;
            }
            Step::Vcpu { .. } => {}
        }
    }
    for (index, vcpu) in vcpus.iter().enumerate() {
        let context = u16::try_from(index).ok().and_then(|i| plan.vcpu_state(i));
        match context {
            Some(context) => vcpu_state::apply(vcpu, &context.state)
                .map_err(|source| PlainLaunchError::Registers { vcpu: index, source })?,
            None => return Err(PlainLaunchError::Dangling("the registers of vCPU 0")),
        }
    }
    Ok(())
}

/// Writes pages; zeros are written only where something was written before.
struct Writer<'m> {
    memory: &'m LaunchMemory,
    /// Nothing at or above it has been written.
    fresh_from: u64,
}

impl Writer<'_> {
    fn put(&mut self, gpa: u64, len: u64, data: &[u8]) -> Result<(), PlainLaunchError> {
        let no_ram = || PlainLaunchError::NoRam { gpa, len };
        let data = usize::try_from(len)
            .ok()
            .and_then(|len| data.get(..len))
            .unwrap_or(data);
        self.memory.write_slice(data, GuestAddress(gpa)).map_err(|_| no_ram())?;
        let end = gpa.checked_add(len).ok_or_else(no_ram)?;
        if !data.is_empty() {
            self.zero(gpa + data.len() as u64, end.min(self.fresh_from))
                .map_err(|()| no_ram())?;
        } else if len > 0 {
            self.zero(gpa, end.min(self.fresh_from)).map_err(|()| no_ram())?;
            // The range must exist even where nothing is written.
            self.memory
                .read_obj::<u8>(GuestAddress(end - 1))
                .map_err(|_| no_ram())?;
        }
        self.fresh_from = self.fresh_from.max(end);
        Ok(())
    }

    fn zero(&self, mut from: u64, to: u64) -> Result<(), ()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while from < to {
            let n = usize::try_from((to - from).min(4096)).unwrap_or(4096);
            self.memory
                .write_slice(ZEROS.get(..n).unwrap_or(&ZEROS), GuestAddress(from))
                .map_err(|_| ())?;
            from += n as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use podvisor_firmware::memory_map::memory_map;
    use podvisor_firmware::plan::{GpaRange, PageKind};

    use super::*;
    use crate::memory::{GuestRam, RamOptions};

    fn machine() -> MachineDescription {
        MachineDescription {
            vcpus: 1,
            max_vcpus: 1,
            memory: memory_map(4 << 20, 1 << 40).unwrap(),
            mmio: [GpaRange { start: 0, len: 0 }; 2],
            command_line: String::new(),
            memory_is_shared: true,
        }
    }

    fn pages(gpa: u64, len: u64, data: &'static [u8]) -> Step<'static> {
        Step::Pages {
            gpa,
            len,
            kind: PageKind::Normal,
            data: Cow::Borrowed(data),
        }
    }

    #[test]
    fn later_zeros_cover_earlier_data() {
        let ram = GuestRam::new(4 << 20, &RamOptions::default()).unwrap();
        let memory = ram.launch_memory().unwrap();
        let mut plan = LaunchPlan::new(Platform::Native);
        plan.steps = vec![
            pages(0x20_0000, 6, b"abcdef"),
            pages(0x20_0000, 6, b"x"),
            pages(0x30_0000, 0x1000, b""),
        ];
        launch(&plan, &machine(), &memory, &[]).unwrap();
        let mut got = [9; 7];
        memory.read_slice(&mut got, GuestAddress(0x20_0000)).unwrap();
        assert_eq!(&got, b"x\0\0\0\0\0\0");
    }

    #[test]
    fn what_is_not_ram_is_named() {
        let ram = GuestRam::new(4 << 20, &RamOptions::default()).unwrap();
        let memory = ram.launch_memory().unwrap();
        for step in [
            pages(0x40_0000, 1, b"a"),
            pages(0x3F_F000, 0x2000, b""),
            pages(u64::MAX - 3, 8, b""),
        ] {
            let mut plan = LaunchPlan::new(Platform::Native);
            plan.steps = vec![step];
            assert!(matches!(
                launch(&plan, &machine(), &memory, &[]),
                Err(PlainLaunchError::NoRam { .. })
            ));
        }
        let mut plan = LaunchPlan::new(Platform::Native);
        plan.required_memory = vec![GpaRange {
            start: 0x10_0000,
            len: 8 << 20,
        }];
        let error = launch(&plan, &machine(), &memory, &[]).unwrap_err();
        assert!(error.to_string().contains("0x800000 bytes at 0x100000"), "{error}");
    }

    #[test]
    fn an_encrypted_plan_is_refused_by_name() {
        let ram = GuestRam::new(4 << 20, &RamOptions::default()).unwrap();
        let memory = ram.launch_memory().unwrap();
        let error = launch(&LaunchPlan::new(Platform::SevSnp), &machine(), &memory, &[]).unwrap_err();
        assert!(error.to_string().contains("isolation=snp-emulated"));
    }
}
