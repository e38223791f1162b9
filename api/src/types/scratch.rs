//! The scratch disk (an addition to Cloud Hypervisor's schema).

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

fn var_tmp() -> PathBuf {
    PathBuf::from("/var/tmp")
}

/// A disk that begins empty, takes of the host what is written to it and not discarded, and is gone with the pod
/// (`--scratch size=8G,dir=/var/tmp`). Its serial number is `podvisor-scratch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ScratchConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Bytes, a multiple of 4096: the most that it ever takes.
    pub size: u64,
    /// Directory of the host on whose file system it lies.
    #[serde(default = "var_tmp")]
    pub dir: PathBuf,
}

impl OptionForm for ScratchConfig {}
