//! Devices of a pod: buses, PCI with MSI-X, the virtio transport and devices, serial, ACPI registers. Knows neither
//! KVM nor SNP: guest memory is [`memory::PodMemory`], notifications and interrupts are the traits of [`platform`].

pub mod bus;
pub mod memory;
pub mod platform;
pub mod virtio;
