//! What `vm.info` tells of a pod. Clients ask often, the configuration changes seldom and is most of the answer: its text
//! is kept and made anew when the configuration has become another.

use std::time::Duration;

use podvisor_api::types::{Isolation, VmConfig, VmState};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Pod, PodError, PodSlot, isolation_name, millis};
use crate::hex;
use crate::machine::Machine;

/// The text of a configuration.
#[derive(Default)]
pub(super) struct ShownConfig {
    of: Option<VmConfig>,
    text: String,
}

impl ShownConfig {
    /// The text of `config`.
    fn text(&mut self, config: &VmConfig) -> Result<&str, serde_json::Error> {
        if self.of.as_ref() != Some(config) {
            self.of = None;
            self.text = serde_json::to_string(config)?;
            self.of = Some(config.clone());
        }
        Ok(&self.text)
    }
}

/// `podvisor_api::types::VmInfo` without its configuration.
#[derive(Serialize)]
struct Shown<'p> {
    state: VmState,
    memory_actual_size: u64,
    podvisor: Extras<'p>,
}

#[derive(Serialize)]
struct Extras<'p> {
    #[serde(flatten)]
    rest: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Vec<Device<'p>>>,
}

#[derive(Serialize)]
struct Device<'p> {
    id: &'p str,
    kind: &'p str,
    bdf: String,
    state: &'p str,
}

fn devices(machine: &Machine) -> Vec<Device<'_>> {
    let own = machine.devices().iter().map(|d| Device {
        id: &d.id,
        kind: d.kind,
        bdf: d.bdf.to_string(),
        state: d.state(),
    });
    let pvpanic = machine.pvpanic().map(|(id, bdf)| Device {
        id,
        kind: "pvpanic",
        bdf: bdf.to_string(),
        state: "active",
    });
    own.chain(pvpanic).collect()
}

impl PodSlot {
    /// What the pod is and how it is, as the JSON of a `VmInfo`.
    ///
    /// # Errors
    /// When there is none.
    pub fn info(&mut self) -> Result<String, PodError> {
        let mut shown = std::mem::take(&mut self.shown);
        let answer = self.told(&mut shown);
        self.shown = shown;
        answer
    }

    fn told(&self, shown: &mut ShownConfig) -> Result<String, PodError> {
        let pod = self.pod.as_ref().ok_or(PodError::NotCreated)?;
        let machine = pod.running.as_ref().map(|r| &r.machine);
        let state = match machine {
            None => VmState::Created,
            Some(machine) if machine.paused() => VmState::Paused,
            Some(_) => VmState::Running,
        };
        let rest = Shown {
            state,
            memory_actual_size: self.actual_memory(machine.map_or(pod.plan.memory, Machine::memory)),
            podvisor: Extras {
                rest: self.rest(pod, machine),
                devices: machine.map(devices),
            },
        };
        let text = shown.text(&pod.plan.config).and_then(|config| {
            let rest = serde_json::to_string(&rest)?;
            // An object of its own, whose members come behind the configuration.
            Ok(format!("{{\"config\":{config},{}", rest.get(1..).unwrap_or_default()))
        });
        text.map_err(|e| PodError::Device("writing vm.info", e.into()))
    }

    /// What podvisor tells beyond Cloud Hypervisor's fields, but the devices.
    fn rest(&self, pod: &Pod, machine: Option<&Machine>) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("version", json!(env!("CARGO_PKG_VERSION")));
        put("isolation", json!(isolation_name(pod.plan.isolation)));
        put("emulated", json!(pod.plan.isolation == Isolation::SnpEmulated));
        if pod.plan.private_memory {
            put("private_memory", json!(true));
        }
        put("vcpus", json!(pod.plan.vcpus));
        put("memory_bytes", json!(machine.map_or(pod.plan.memory, Machine::memory)));
        if let Some(sized) = &pod.plan.config.pod {
            put(
                "sizing",
                json!({"pod": sized, "memory_bytes": pod.plan.memory, "vcpus": pod.plan.vcpus}),
            );
        }
        if let Some(report) = machine.and_then(Machine::confidential).and_then(|c| c.report()) {
            put("digest", json!(hex::encode(&report.predicted.digest)));
            put("digest_predicted", json!(hex::encode(&report.predicted.digest)));
            put(
                "digest_launched",
                json!(report.launched.as_ref().map(|d| hex::encode(d))),
            );
            put("policy", json!(format!("{:#x}", report.policy)));
            put("measured_bytes", json!(report.predicted.measured_bytes));
        }
        if pod.plan.isolation != Isolation::None {
            put("host_data", json!(hex::encode(&pod.plan.host_data)));
        }
        put("timings_ms", self.timings(pod));
        put("monitor_peak_rss_kib", json!(crate::sys::peak_rss_kib()));
        map
    }

    fn timings(&self, pod: &Pod) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Option<Duration>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), json!(millis(value)));
            }
        };
        put("created_at", self.created_at);
        put("booted_at", self.booted_at.filter(|_| pod.timings.is_some()));
        put("boot", pod.timings.map(|t| t.total));
        put("boot_plan", pod.timings.map(|t| t.plan));
        put("boot_build", pod.timings.map(|t| t.build));
        put("boot_launch", pod.timings.map(|t| t.launch));
        Value::Object(map)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use podvisor_api::types::VmInfo;

    use super::*;
    use crate::vcpu::ExitSignal;

    #[test]
    fn it_is_the_apis_own_type_and_follows_the_configuration() {
        let mut slot = PodSlot::new(Arc::new(ExitSignal::new().unwrap()), Instant::now(), None);
        assert!(matches!(slot.info(), Err(PodError::NotCreated)));
        let config = r#"{"balloon": {"size": 0}, "disks": [{"path": "/a"}]}"#;
        slot.create(podvisor_api::from_json(config.as_bytes()).unwrap())
            .unwrap();
        for size in [0, 4096, 8192, 0] {
            slot.resize(&podvisor_api::types::VmResize {
                desired_balloon: Some(size),
                ..Default::default()
            })
            .unwrap();
            let text = slot.info().unwrap();
            let info: VmInfo = serde_json::from_str(&text).unwrap();
            assert_eq!(info.config.balloon.as_ref().unwrap().size, size);
            // No member that the type does not have, and none left out.
            let (text, again): (Value, _) = (
                serde_json::from_str(&text).unwrap(),
                serde_json::to_value(&info).unwrap(),
            );
            assert_eq!(text, again);
            let config = serde_json::to_value(&slot.pod.as_ref().unwrap().plan.config).unwrap();
            assert_eq!(text["config"], config);
        }
    }
}
