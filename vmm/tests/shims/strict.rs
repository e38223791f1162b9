//! `vm.info` as the Rust shim's own types read it: fields without a default are required where their parent is present.

use std::net::Ipv4Addr;

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(crate) struct VmInfo {
    pub(crate) config: VmConfig,
    pub(crate) state: State,
    pub(crate) memory_actual_size: Option<u64>,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Shutdown,
    Paused,
}

#[derive(Debug, Deserialize)]
pub(crate) struct VmConfig {
    pub(crate) cpus: Option<Cpus>,
    pub(crate) memory: Option<Memory>,
    pub(crate) disks: Option<Vec<Disk>>,
    pub(crate) net: Option<Vec<Net>>,
    pub(crate) rng: Option<Rng>,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) fs: Option<Vec<Fs>>,
    pub(crate) serial: Option<Console>,
    pub(crate) console: Option<Console>,
    pub(crate) devices: Option<Vec<Device>>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Cpus {
    pub(crate) boot_vcpus: u8,
    pub(crate) max_vcpus: u8,
    pub(crate) max_phys_bits: u8,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Memory {
    pub(crate) size: u64,
    pub(crate) hotplug_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) enum ImageType {
    FixedVhd,
    Qcow2,
    Raw,
    Vhdx,
    Unknown,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Disk {
    pub(crate) num_queues: usize,
    pub(crate) queue_size: u16,
    pub(crate) image_type: Option<ImageType>,
    #[serde(default)]
    pub(crate) id: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Net {
    pub(crate) ip: Ipv4Addr,
    pub(crate) mask: Ipv4Addr,
    pub(crate) mac: String,
    pub(crate) num_queues: usize,
    pub(crate) queue_size: u16,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Rng {
    pub(crate) src: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Balloon {
    pub(crate) size: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Fs {
    pub(crate) tag: String,
    pub(crate) socket: String,
    pub(crate) num_queues: usize,
    pub(crate) queue_size: u16,
}

#[derive(Debug, Deserialize)]
pub(crate) enum Mode {
    Off,
    Pty,
    Tty,
    File,
    Null,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Console {
    pub(crate) mode: Mode,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Device {
    pub(crate) path: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Vsock {
    pub(crate) cid: u64,
    pub(crate) socket: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Platform {
    pub(crate) num_pci_segments: u16,
}
