//! What a PC has beside PCI: serial port, i8042, CMOS clock, debug port, and the ACPI registers of Cloud Hypervisor's
//! machine (power, timer, generic events, PCI and CPU hotplug).
