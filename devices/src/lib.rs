//! Devices of a pod: buses, PCI with MSI-X, the virtio transport and devices, serial, ACPI registers. Knows neither
//! KVM nor SNP: guest memory is [`memory::PodMemory`], notifications and interrupts are the traits of [`platform`].

#![cfg_attr(
    test,
    expect(
        clippy::cast_possible_truncation,
        reason = "tests cut values on purpose; the plain build still checks"
    )
)]

pub mod bus;
pub mod host_console;
pub mod legacy;
pub mod memory;
#[cfg(any(test, feature = "test-utils"))]
pub mod mock;
pub mod pci;
pub mod platform;
pub mod rate_limiter;
mod sync;
pub mod unix_socket;
pub mod virtio;
