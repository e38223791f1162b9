//! A pod's limits, from which podvisor sizes the VM (an addition to Cloud Hypervisor's schema).

use crate::options::OptionForm;
use serde::de::{self, Deserializer, IgnoredAny, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A Kubernetes resource quantity as it was written (`512Mi`, `1500m`, `2`); what it means is the sizing's matter. On the
/// wire a string or a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(feature = "openapi")]
impl schemars::JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A Kubernetes resource quantity, such as `512Mi`, `1500m` or 2.",
            "type": ["string", "number"],
        })
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsText;
        impl Visitor<'_> for AsText {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a Kubernetes quantity, such as \"512Mi\" or 2")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Quantity, E> {
                Ok(Quantity(v.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Quantity, E> {
                Ok(Quantity(v.to_string()))
            }

            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Quantity, E> {
                Ok(Quantity(v.to_string()))
            }

            fn visit_f64<E: de::Error>(self, v: f64) -> Result<Quantity, E> {
                Ok(Quantity(v.to_string()))
            }
        }
        deserializer.deserialize_any(AsText)
    }
}

/// The pod (`--pod handler=kata-cc,memory_limit=512Mi,cpu_limit=1500m`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema), schemars(!try_from))]
#[serde(try_from = "PodWire")]
pub struct PodConfig {
    /// The runtime handler whose rules apply: `kata-cc` or `kata`.
    pub handler: String,
    /// The sum of the containers' memory limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Quantity>,
    /// The sum of the containers' CPU limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<Quantity>,
}

impl OptionForm for PodConfig {}

#[derive(Deserialize)]
struct PodWire {
    handler: String,
    memory_limit: Option<Quantity>,
    cpu_limit: Option<Quantity>,
    requests: Option<IgnoredAny>,
    memory_request: Option<IgnoredAny>,
    cpu_request: Option<IgnoredAny>,
}

impl TryFrom<PodWire> for PodConfig {
    type Error = String;

    fn try_from(wire: PodWire) -> Result<Self, String> {
        for (name, given) in [
            ("requests", wire.requests),
            ("memory_request", wire.memory_request),
            ("cpu_request", wire.cpu_request),
        ] {
            if given.is_some() {
                return Err(format!(
                    "`{name}` is not honoured: containerd hands only limits to the shim, so the VM is sized from limits; \
                     leave it out and give memory_limit and cpu_limit"
                ));
            }
        }
        Ok(Self {
            handler: wire.handler,
            memory_limit: wire.memory_limit,
            cpu_limit: wire.cpu_limit,
        })
    }
}
