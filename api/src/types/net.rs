//! A network device.

use super::RateLimiterConfig;
use crate::node::FieldError;
use crate::options::{OptionForm, OptionMap};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Which side of a vhost-user connection podvisor is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum VhostMode {
    /// It connects.
    #[default]
    Client,
    /// It listens.
    Server,
}

/// A virtio-net device. Descriptors of its tap queues come beside the request; the numbers a client writes into `fds`
/// are its own and mean nothing here, so they are not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NetConfig {
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
    /// Tap interface to open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the tap interface (not applied to a tap that came as a descriptor).
    pub ip: IpAddr,
    /// Network mask of the tap interface.
    pub mask: IpAddr,
    /// The guest's MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The tap interface's MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<String>,
    /// Largest packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queues: two (receive, transmit) for each pair.
    pub num_queues: usize,
    /// Descriptors of each queue; a power of two.
    pub queue_size: u16,
    /// Served by another process over vhost-user.
    pub vhost_user: bool,
    /// That process's socket.
    #[serde(alias = "socket", skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Which side of that connection podvisor is.
    pub vhost_mode: VhostMode,
    /// Limits of this device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Offer TCP segmentation offload.
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    pub offload_ufo: bool,
    /// Offer checksum offload.
    pub offload_csum: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            pci_segment: 0,
            iommu: false,
            pci_device_id: None,
            tap: None,
            ip: IpAddr::V4(Ipv4Addr::new(192, 168, 249, 1)),
            mask: IpAddr::V4(Ipv4Addr::new(255, 255, 255, 0)),
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            rate_limiter_config: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

impl OptionForm for NetConfig {
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        options.nest_rate_limiter();
        Ok(())
    }
}
