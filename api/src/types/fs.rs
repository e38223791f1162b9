//! A shared file system.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

fn one() -> usize {
    1
}

fn default_queue_size() -> u16 {
    1024
}

/// A virtio-fs device (`--fs tag=T,socket=/x` with a virtiofsd behind it, `--fs tag=T,shared_dir=/d,readonly` served by
/// podvisor itself).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct FsConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The mount tag, 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
    /// Socket of the vhost-user server. Exactly one of this and `shared_dir` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Directory that podvisor serves itself (an addition to Cloud Hypervisor's schema).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_dir: Option<PathBuf>,
    /// Refuse every change (with `shared_dir`; an addition to Cloud Hypervisor's schema).
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub readonly: bool,
    /// Request queues, beside the high-priority one.
    #[serde(default = "one")]
    pub num_queues: usize,
    /// Descriptors of each queue; a power of two.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
}

impl OptionForm for FsConfig {}
