//! The wire types of the API, as Cloud Hypervisor (v54) names and defaults them, one file per concept. A type here is
//! the schema of its endpoint and of its command-line option; what a value may be is checked in `validate`.

mod console;
mod cpu;
mod disk;
mod fs;
mod landlock;
mod memory;
mod misc;
mod net;
mod payload;
mod platform;
mod pod;
mod requests;
mod scratch;
mod vm;

pub use console::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, SerialConfig};
pub use cpu::{CoreScheduling, CpuAffinity, CpuFeatures, CpuProfile, CpuTopology, CpusConfig};
pub use disk::{
    DiskConfig, ImageType, LockGranularity, RateLimitGroupConfig, RateLimiterConfig, TokenBucket, VirtQueueAffinity,
};
pub use fs::FsConfig;
pub use landlock::{LandlockAccess, LandlockConfig};
pub use memory::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
pub use misc::{BalloonConfig, DeviceConfig, PmemConfig, RngConfig, VsockConfig};
pub use net::{NetConfig, VhostMode};
pub use payload::PayloadConfig;
pub use platform::{Isolation, PciSegmentConfig, PlatformConfig};
pub use pod::{PodConfig, Quantity};
pub use requests::{
    MemoryRestoreMode, PciDeviceInfo, RestoreConfig, RestoredNetConfig, VmRemoveDevice, VmResize, VmResizeDisk,
    VmResizeZone, VmSnapshotConfig, VmmPingResponse,
};
pub use scratch::ScratchConfig;
pub use vm::{VmConfig, VmInfo, VmState};

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's skip_serializing_if passes a reference"
)]
fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests;
