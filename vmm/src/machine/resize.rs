//! A running machine's sizes: vCPUs that come and go, memory that comes. The guest is told through the ACPI registers
//! of its chipset; what it takes of it, and when, is its own affair.

mod memory;

use std::collections::BTreeSet;

use kvm_ioctls::VmFd;

pub(super) use self::memory::{Room, filling};
use super::{BootError, During, Machine};
use crate::config::PodPlan;
use crate::cpuid::CpuidTemplate;
use crate::telling::Telling;

/// Sizes that are asked for; none: as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// vCPUs.
    pub vcpus: Option<u32>,
    /// Bytes of memory.
    pub memory: Option<u64>,
}

/// Why a machine cannot have other sizes. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The launch measured them.
    #[error("{field} {desired}: a confidential pod's sizes are part of its launch; give it what it needs in vm.create")]
    Confidential {
        /// The field.
        field: &'static str,
        /// Its value.
        desired: u64,
    },
    /// A number of vCPUs that cannot be.
    #[error(
        "desired_vcpus {desired}: the pod can have 1 to {max} vCPUs; more need a higher cpus.max_vcpus in vm.create"
    )]
    Vcpus {
        /// Asked for.
        desired: u32,
        /// The most there can be.
        max: u32,
    },
    /// The guest has not done what it was asked for last.
    #[error(
        "desired_vcpus {desired}: the guest has not let go of vCPU {vcpu} yet, which it was asked for; try again later"
    )]
    Pending {
        /// Asked for.
        desired: u32,
        /// What is waited for.
        vcpu: u32,
    },
    /// A size that cannot be, of the pod or a zone.
    #[error("desired_ram {desired}: {reason}")]
    Memory {
        /// Asked for.
        desired: u64,
        /// Why it cannot, and what can.
        reason: String,
    },
    /// The host refused.
    #[error(transparent)]
    Host(#[from] BootError),
}

impl ResizeError {
    /// The HTTP status that tells a client whose fault it was.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Confidential { .. } => 403,
            Self::Vcpus { .. } | Self::Memory { .. } => 400,
            Self::Pending { .. } => 429,
            Self::Host(_) => 500,
        }
    }
}

/// What a machine keeps for the time that it is given other sizes.
pub(super) struct Growth {
    /// The most vCPUs.
    max_vcpus: u32,
    /// To make vCPUs with; none when there can be no more than there are.
    cpuid: Option<CpuidTemplate>,
    /// vCPUs that the guest was asked to let go of.
    removing: BTreeSet<u32>,
    telling: Telling,
}

impl Growth {
    /// For a machine of `plan` whose vCPUs are made from `cpuid`.
    pub(super) fn new(plan: &PodPlan, cpuid: CpuidTemplate, telling: &Telling) -> Self {
        let max_vcpus = plan.max_vcpus();
        Self {
            max_vcpus,
            cpuid: (max_vcpus > plan.vcpus).then_some(cpuid),
            removing: BTreeSet::new(),
            telling: telling.clone(),
        }
    }
}

impl Machine {
    /// Whether [`Machine::resize`] would take `sizes`, as far as the host is willing.
    ///
    /// # Errors
    /// [`ResizeError`], other than of the host.
    pub fn may_resize(&self, sizes: Sizes) -> Result<(), ResizeError> {
        if let Some(desired) = sizes.vcpus {
            self.may_have_vcpus(desired)?;
        }
        if let Some(desired) = sizes.memory {
            self.may_have_memory(desired)?;
        }
        Ok(())
    }

    /// Gives the machine other sizes and tells the guest.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub fn resize(&mut self, sizes: Sizes) -> Result<(), ResizeError> {
        self.may_resize(sizes)?;
        let now = self.vcpu_count();
        let desired = sizes.vcpus.unwrap_or(now);
        self.plug_vcpus(now, desired)?;
        if let Some(memory) = sizes.memory
            && let Err(error) = self.resize_memory(memory)
        {
            for index in now..desired {
                self.vcpus.unplug(index);
            }
            return Err(error.into());
        }
        let told = if desired > now {
            self.chipset.vcpus_plugged(now..desired)
        } else if desired < now {
            self.growth.removing.extend(desired..now);
            self.chipset.vcpus_unplug(desired..now)
        } else {
            Ok(())
        };
        // Nothing is undone: the guest sees the change with the next interrupt.
        if let Err(error) = told {
            tracing::warn!(%error, "the guest cannot be told of its vCPUs now");
        }
        Ok(())
    }

    /// vCPUs that the guest has and was not asked to let go of.
    #[must_use]
    pub fn vcpu_count(&self) -> u32 {
        let plugged = self.vcpus.count().saturating_sub(self.growth.removing.len());
        u32::try_from(plugged).unwrap_or(u32::MAX)
    }

    /// The guest let go of vCPU `index`: its thread ends. False if it was not asked for it.
    pub fn vcpu_ejected(&mut self, index: u32) -> bool {
        self.growth.removing.remove(&index) && self.vcpus.unplug(index)
    }

    /// Whether a snapshot can hold the sizes.
    ///
    /// # Errors
    /// Which of them it cannot.
    pub(super) fn may_be_saved(&self) -> Result<(), BootError> {
        if let Some(vcpu) = self.growth.removing.first() {
            return Err(BootError::new(format!(
                "the guest was asked to let go of vCPU {vcpu} and has not yet: resume, and save it when it has"
            )));
        }
        match self.grown_memory() {
            0 => Ok(()),
            grown => Err(BootError::new(format!(
                "the pod was given {grown} bytes of memory while it ran: this version saves a pod with the memory that it was \
                 booted with; reboot it, and save it then"
            ))),
        }
    }

    fn may_have_vcpus(&self, desired: u32) -> Result<(), ResizeError> {
        if desired == self.vcpu_count() {
            return Ok(());
        }
        if self.confidential.is_some() {
            return Err(ResizeError::Confidential {
                field: "desired_vcpus",
                desired: desired.into(),
            });
        }
        let max = self.growth.max_vcpus;
        if desired == 0 || desired > max {
            return Err(ResizeError::Vcpus { desired, max });
        }
        match self.growth.removing.first() {
            Some(&vcpu) => Err(ResizeError::Pending { desired, vcpu }),
            None => Ok(()),
        }
    }

    /// Starts vCPUs `from` to `to`, or none of them.
    fn plug_vcpus(&mut self, from: u32, to: u32) -> Result<(), BootError> {
        for index in from..to {
            if let Err(error) = self.plug_vcpu(index, to) {
                for index in from..index {
                    self.vcpus.unplug(index);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn plug_vcpu(&mut self, index: u32, desired: u32) -> Result<(), BootError> {
        let what = || format!("vCPU {index} (desired_vcpus {desired})");
        let fd = match (self.vcpus.take_parked(index), &self.growth.cpuid) {
            (Some(fd), _) => fd,
            (None, Some(cpuid)) => super::create_vcpu(self.vm(), index, cpuid, &self.growth.telling).during(what())?,
            (None, None) => return Err(BootError::new(format!("{}: it cannot be made", what()))),
        };
        self.vcpus.plug(index, fd).during(what())
    }

    fn vm(&self) -> &VmFd {
        self.plug.hypervisor.vm()
    }
}
