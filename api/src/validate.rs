//! What a configuration may say, beyond its types: the rules of Cloud Hypervisor's API and of the specifications behind
//! it, each with an error that names the field, the value and the remedy. Nothing is looked up on the machine here (no
//! file is opened, no KVM asked): that is the monitor's part.

mod devices;
mod machine;
mod memory;
mod names;
mod payload;
mod vhost_user;

use self::devices::{check_disk, check_fs, check_net, check_scratch, check_vsock, console, rate_limit_groups};
use self::machine::{cpus, memory, private_memory};
use self::names::{identifiers, segment_shares, segments};
use self::payload::{payload, platform, pod};
use crate::not_done::NOT_DONE;
use crate::types::VmConfig;

/// Most vCPUs of a VM: local APIC identifiers are 8 bits wide and 0xff means all (Intel SDM volume 3, 12.7.2.1).
pub const MAX_VCPUS: u32 = 254;
/// Most memory of a VM, in bytes: 64 TiB, half of what x86-64 Linux maps with four page-table levels and far above any
/// host.
pub const MAX_MEMORY_BYTES: u64 = 64 << 40;
/// Most descriptors of a virtqueue (virtio 1.2, 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// A rule that a configuration breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ConfigError {
    /// Path of the field (`disks[1].queue_size`).
    pub field: String,
    /// The value, why it cannot be, and what to give instead.
    pub reason: String,
    /// Whether this is an identifier given twice (the API answers 409, not 400).
    pub conflict: bool,
}

/// When rules are checked.
///
/// Cloud Hypervisor stores whatever `vm.create` brings and checks it on `vm.boot`, and clients can see that: a
/// configuration without a payload is created and only refused at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `vm.create`: all rules except that there must be something to boot.
    Create,
    /// `vm.boot`: all rules.
    Boot,
}

struct Findings(Vec<ConfigError>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(ConfigError {
            field: field.into(),
            reason: reason.into(),
            conflict: false,
        });
    }
}

impl VmConfig {
    /// Checks every rule that can be checked without looking at the machine.
    ///
    /// # Errors
    /// The first rule broken, in the order of the schema; [`VmConfig::problems`] has them all.
    pub fn validate(&self, stage: Stage) -> Result<(), ConfigError> {
        first(self.problems(stage))
    }

    /// All the rules that the configuration breaks, in the order of the schema.
    pub fn problems(&self, stage: Stage) -> Vec<ConfigError> {
        let mut found = Findings(Vec::new());
        cpus(&self.cpus, &mut found);
        memory(&self.memory, &mut found);
        payload(self, stage, &mut found);
        pod(self, &mut found);
        for (at, disk) in self.disks().iter().enumerate() {
            check_disk(disk, &format!("disks[{at}]"), &mut found);
        }
        rate_limit_groups(self, &mut found);
        if let Some(scratch) = &self.scratch {
            check_scratch(scratch, &mut found);
        }
        for (at, net) in self.net().iter().enumerate() {
            check_net(net, &format!("net[{at}]"), &mut found);
        }
        for (at, fs) in self.fs().iter().enumerate() {
            check_fs(fs, &format!("fs[{at}]"), &mut found);
        }
        for (at, pmem) in self.pmem().iter().enumerate() {
            memory::pmem(pmem, &format!("pmem[{at}]"), &mut found);
        }
        console(
            "serial",
            self.serial.mode,
            self.serial.file.as_deref(),
            self.serial.socket.as_deref(),
            &mut found,
        );
        console(
            "console",
            self.console.mode,
            self.console.file.as_deref(),
            self.console.socket.as_deref(),
            &mut found,
        );
        let debug = &self.debug_console;
        console("debug_console", debug.mode, debug.file.as_deref(), None, &mut found);
        if let Some(vsock) = &self.vsock {
            check_vsock(vsock, "vsock", &mut found);
        }
        if let Some(balloon) = &self.balloon {
            memory::balloon(balloon, &self.memory, &mut found);
        }
        if let Some(p) = &self.platform {
            platform(p, self.payload.as_ref(), &mut found);
            private_memory(self, &mut found);
        }
        segments(self, &mut found);
        segment_shares(self, &mut found);
        unsupported(self, &mut found);
        identifiers(self, &mut found);
        vhost_user::memory(self, &mut found);
        found.0
    }

    /// Gives the VM the size that its pod's limits come to.
    ///
    /// # Errors
    /// `memory.size` or `cpus` were given as well and disagree; both numbers are named and nothing is changed.
    pub fn apply_sizing(&mut self, memory_bytes: u64, vcpus: u32) -> Result<(), ConfigError> {
        let refuse = |field: &str, reason| {
            Err(ConfigError {
                field: field.to_owned(),
                reason,
                conflict: false,
            })
        };
        if self.memory.size_given && self.memory.size != memory_bytes {
            let given = self.memory.size;
            return refuse(
                "memory.size",
                format!("{given} bytes are given, but the pod's limits come to {memory_bytes}; leave memory.size out"),
            );
        }
        if self.cpus.given && self.cpus.boot_vcpus != vcpus {
            let given = self.cpus.boot_vcpus;
            return refuse(
                "cpus.boot_vcpus",
                format!("{given} vCPUs are given, but the pod's limits come to {vcpus}; leave cpus out"),
            );
        }
        self.memory.size = memory_bytes;
        self.cpus.boot_vcpus = vcpus;
        self.cpus.max_vcpus = self.cpus.max_vcpus.max(vcpus);
        Ok(())
    }
}

fn first(found: Vec<ConfigError>) -> Result<(), ConfigError> {
    found.into_iter().next().map_or(Ok(()), Err)
}

/// What podvisor will not do.
fn unsupported(config: &VmConfig, found: &mut Findings) {
    for row in NOT_DONE {
        for (field, value) in row.asked(config) {
            found.add(field, format!("{value}: {}", row.why));
        }
    }
}

#[cfg(test)]
mod tests;
