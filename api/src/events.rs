//! The records of the event monitor, as Cloud Hypervisor writes them: what happened, where, and when, each a JSON
//! object over several lines with an empty line behind it. Who writes them, and where to, is the monitor's.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The monitor.
    Vmm,
    /// The pod.
    Vm,
    /// Its vCPUs.
    #[serde(rename = "cpu_manager")]
    CpuManager,
    /// One of its virtio devices.
    VirtioDevice,
    /// What runs in it.
    Guest,
}

/// What happened. What takes time has two: one when it begins, one when it has been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// vmm: the process begins.
    Starting,
    /// vmm: it ends; vm: the pod stopped.
    Shutdown,
    /// vm.
    Booting,
    /// vm.
    Booted,
    /// vm.
    Pausing,
    /// vm.
    Paused,
    /// vm.
    Resuming,
    /// vm.
    Resumed,
    /// vm.
    Resizing,
    /// vm.
    Resized,
    /// vm.
    Snapshotting,
    /// vm.
    Snapshotted,
    /// vm.
    Restoring,
    /// vm.
    Restored,
    /// vm.
    Rebooting,
    /// vm.
    Rebooted,
    /// vm: the pod is forgotten.
    Deleted,
    /// vm: a device is gone (`id`, `bdf`).
    DeviceRemoved,
    /// `cpu_manager`: a vCPU was made (`id`).
    #[serde(rename = "create_vcpu")]
    CreateVcpu,
    /// virtio-device: its driver is ready (`id`).
    Activated,
    /// virtio-device: its driver let go of it (`id`).
    Reset,
    /// virtio-device: it cannot go on (`id`); an addition to Cloud Hypervisor's events.
    Failed,
    /// virtio-device: the host refuses what the pod writes to its disk (`id`, `error`); an addition, as the next.
    StorageFailing,
    /// virtio-device: it takes it again (`id`).
    StorageWorking,
    /// guest: its kernel panicked (`event`: `panic`, or `crash_loaded` if it handles that itself).
    Panic,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Time since the monitor started; `{"secs":…,"nanos":…}`.
    pub timestamp: Duration,
    /// What it is about.
    pub source: Source,
    /// What happened.
    pub event: What,
    /// More about it; null for nothing.
    pub properties: Option<BTreeMap<String, String>>,
}

impl Event {
    /// The record's bytes: the object, then an empty line.
    #[must_use]
    pub fn to_record(&self) -> String {
        // Strings, numbers and a map with string keys: nothing that JSON cannot hold.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push_str("\n\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_the_one_that_cloud_hypervisor_writes() {
        let booted = Event {
            timestamp: Duration::from_nanos(6_483_920),
            source: Source::Vm,
            event: What::Booted,
            properties: None,
        };
        let text = "{\n  \"timestamp\": {\n    \"secs\": 0,\n    \"nanos\": 6483920\n  },\n  \"source\": \"vm\",\n  \
                    \"event\": \"booted\",\n  \"properties\": null\n}\n\n";
        assert_eq!(booted.to_record(), text);
    }

    #[test]
    fn names_are_cloud_hypervisors() {
        for (source, event, names) in [
            (
                Source::CpuManager,
                What::CreateVcpu,
                ["\"cpu_manager\"", "\"create_vcpu\""],
            ),
            (
                Source::VirtioDevice,
                What::Activated,
                ["\"virtio-device\"", "\"activated\""],
            ),
            (Source::Vm, What::DeviceRemoved, ["\"vm\"", "\"device-removed\""]),
            (Source::Vmm, What::Starting, ["\"vmm\"", "\"starting\""]),
        ] {
            assert_eq!(serde_json::to_string(&source).unwrap(), names[0]);
            assert_eq!(serde_json::to_string(&event).unwrap(), names[1]);
        }
    }

    #[test]
    fn a_record_is_read_back_with_its_properties() {
        let event = Event {
            timestamp: Duration::new(3, 4),
            source: Source::VirtioDevice,
            event: What::Reset,
            properties: Some([("id".to_owned(), "_disk0".to_owned())].into()),
        };
        let record = event.to_record();
        assert!(record.ends_with("    \"id\": \"_disk0\"\n  }\n}\n\n"), "{record}");
        assert_eq!(serde_json::from_str::<Event>(&record).unwrap(), event);
    }
}
