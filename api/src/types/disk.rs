//! A disk and the rate limits that disks and network devices share.

use crate::node::{FieldError, Node};
use crate::options::{OptionForm, OptionMap};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The format of a disk image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum ImageType {
    /// Found out by looking.
    #[default]
    Unknown,
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// A VHD of fixed size.
    #[serde(alias = "Vhd")]
    FixedVhd,
    /// Hyper-V's format.
    Vhdx,
}

/// What the advisory lock on an image covers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum LockGranularity {
    /// The bytes of the image.
    #[default]
    ByteRange,
    /// The whole file.
    Full,
}

/// Host CPUs of the thread that serves one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VirtQueueAffinity {
    /// Index of the queue.
    pub queue_index: u16,
    /// Host CPU numbers.
    pub host_cpus: Vec<usize>,
}

/// A token bucket: `size` tokens, refilled within `refill_time`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct TokenBucket {
    /// Tokens (bytes or operations) that the bucket holds.
    pub size: u64,
    /// Tokens spent once, before the bucket proper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which the whole bucket refills.
    pub refill_time: u64,
}

/// Limits of bytes and operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// Limits that several disks share (`--rate-limit-group id=g,bw_size=…,bw_refill_time=…`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RateLimitGroupConfig {
    /// The name by which disks ask for it.
    pub id: String,
    /// Limits of all its disks together.
    #[serde(default)]
    pub rate_limiter_config: RateLimiterConfig,
}

impl OptionForm for RateLimitGroupConfig {
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        options.nest_rate_limiter();
        Ok(())
    }
}

/// A virtio-blk disk (`--disk path=/x.img,readonly=on`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DiskConfig {
    /// Name of the device; the monitor gives one where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// Slot on the PCI bus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// The image or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Refuse writes.
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Request queues.
    pub num_queues: usize,
    /// Descriptors of each queue; a power of two.
    pub queue_size: u16,
    /// Served by another process over vhost-user.
    pub vhost_user: bool,
    /// That process's socket.
    #[serde(alias = "socket", skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Limits of this disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Limits shared with others, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Do not use io_uring.
    pub disable_io_uring: bool,
    /// Do not use Linux AIO.
    pub disable_aio: bool,
    /// Serial number shown to the guest, at most 20 bytes (virtio 1.2, 5.2.6.1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Host CPUs of the queues' threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Follow backing files of copy-on-write images.
    pub backing_files: bool,
    /// Discard and write-zeroes may make holes in the image.
    pub sparse: bool,
    /// Format of the image.
    pub image_type: ImageType,
    /// What the lock on the image covers.
    pub lock_granularity: LockGranularity,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            id: None,
            pci_segment: 0,
            iommu: false,
            pci_device_id: None,
            path: None,
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            vhost_user: false,
            vhost_socket: None,
            rate_limiter_config: None,
            rate_limit_group: None,
            disable_io_uring: false,
            disable_aio: false,
            serial: None,
            queue_affinity: None,
            backing_files: false,
            sparse: true,
            image_type: ImageType::Unknown,
            lock_granularity: LockGranularity::ByteRange,
        }
    }
}

impl OptionForm for DiskConfig {
    /// `bw_size=…` and its like, `queue_affinity=[0@[1,2]]`.
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        options.nest_rate_limiter();
        if let Some(text) = options.take_text("queue_affinity") {
            let entries = super::cpu::affinity(&text, "queue_index").map_err(|e| e.within("queue_affinity"))?;
            options.set("queue_affinity", Node::List(entries));
        }
        Ok(())
    }
}
