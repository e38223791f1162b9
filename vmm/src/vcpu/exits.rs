//! How often vCPUs leave the guest for the monitor, by kind, and when they first did: what a boot spends its time on. A
//! vCPU's thread alone writes its counters, and nobody waits for anybody. Exits that KVM serves itself are in KVM's own
//! statistics (/sys/kernel/debug/kvm), not here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use podvisor_firmware::layout;

use super::lock;

/// Kinds of exits. Their names in vm.counters are [`NAMES`], in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Kind {
    PortSerial,
    PortPci,
    PortClock,
    PortAcpi,
    PortOther,
    MmioBar,
    MmioConfig,
    MmioIoApic,
    MmioAcpi,
    MmioOther,
    Msr,
    IoApicEoi,
    Interrupted,
    Other,
}

const KINDS: usize = 14;
const NAMES: [&str; KINDS] = [
    "exits_port_serial",
    "exits_port_pci_config",
    "exits_port_cmos",
    "exits_port_acpi",
    "exits_port_other",
    "exits_mmio_bar",
    "exits_mmio_pci_config",
    "exits_mmio_ioapic",
    "exits_mmio_acpi",
    "exits_mmio_other",
    "exits_msr",
    "exits_ioapic_eoi",
    "exits_interrupted",
    "exits_other",
];

/// The kind of an access to `port`.
pub(super) fn port(port: u16) -> Kind {
    match port {
        layout::SERIAL_PORT..=0x3FF => Kind::PortSerial,
        layout::PCI_CONFIG_IO_PORT..=0xCFF => Kind::PortPci,
        layout::CMOS_PORT | 0x71 => Kind::PortClock,
        layout::ACPI_SHUTDOWN_PORT..=0x60B => Kind::PortAcpi,
        _ => Kind::PortOther,
    }
}

/// The kind of an access to `gpa`.
pub(super) fn mmio(gpa: u64, areas: &Areas) -> Kind {
    const CONFIG_END: u64 = layout::PCI_MMCONFIG_START + (256 << 20);
    match gpa {
        layout::MEM_32BIT_DEVICES_START..layout::PCI_MMCONFIG_START => Kind::MmioBar,
        layout::PCI_MMCONFIG_START..CONFIG_END => Kind::MmioConfig,
        layout::IOAPIC_START..layout::APIC_START => Kind::MmioIoApic,
        _ if gpa >= areas.acpi => Kind::MmioAcpi,
        _ if gpa >= areas.window => Kind::MmioBar,
        _ => Kind::MmioOther,
    }
}

/// Where, above 4 GiB, what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Areas {
    /// Start of the 64-bit window.
    pub window: u64,
    /// The first of the ACPI devices.
    pub acpi: u64,
}

impl From<layout::DeviceArea> for Areas {
    fn from(area: layout::DeviceArea) -> Self {
        Self {
            window: area.mmio_start,
            acpi: area.mmio_end,
        }
    }
}

/// One vCPU's exits.
#[derive(Debug, Default)]
pub(super) struct Counts([AtomicU64; KINDS]);

impl Counts {
    /// Counts one. The vCPU's own thread alone does, so that no locked instruction is needed.
    pub(super) fn count(&self, kind: Kind) {
        if let Some(counter) = self.0.get(kind as usize) {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }
}

/// The exits of all vCPUs that a pod has had since its boot.
#[derive(Debug)]
pub struct Exits {
    began: Instant,
    pub(super) areas: Areas,
    vcpus: Mutex<BTreeMap<u32, Arc<Counts>>>,
    entered: OnceLock<u64>,
    left: OnceLock<u64>,
}

impl Exits {
    /// Nothing yet; times are told from `began` on, when the boot began.
    #[must_use]
    pub fn new(began: Instant, areas: Areas) -> Self {
        Self {
            began,
            areas,
            vcpus: Mutex::default(),
            entered: OnceLock::new(),
            left: OnceLock::new(),
        }
    }

    /// The counters of vCPU `index`, whose thread starts; they go on where those of an earlier thread ended.
    pub(super) fn of(&self, index: u32) -> Arc<Counts> {
        Arc::clone(lock(&self.vcpus).entry(index).or_default())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A vCPU is about to enter the guest.
    pub(super) fn enters(&self) {
        self.entered.get_or_init(|| self.now());
    }

    /// A vCPU has left it.
    pub(super) fn leaves(&self) {
        self.left.get_or_init(|| self.now());
    }

    /// The sums over the vCPUs, by name, and the times in microseconds from the beginning of the boot.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        let vcpus = lock(&self.vcpus);
        let sum = |kind: usize| {
            let of = |vcpu: &Arc<Counts>| vcpu.0.get(kind).map_or(0, |counter| counter.load(Ordering::Relaxed));
            vcpus.values().map(of).fold(0, u64::wrapping_add)
        };
        let mut all: BTreeMap<_, _> = NAMES
            .iter()
            .enumerate()
            .map(|(kind, name)| (*name, sum(kind)))
            .collect();
        for (name, time) in [("first_entry_us", &self.entered), ("first_exit_us", &self.left)] {
            all.extend(time.get().map(|time| (name, *time)));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_has_its_kind() {
        let areas = Areas::from(layout::device_area(46));
        for (at, kind) in [
            (0x3F8, Kind::PortSerial),
            (0x3FF, Kind::PortSerial),
            (0x2F8, Kind::PortOther),
            (0xCF8, Kind::PortPci),
            (0xCFF, Kind::PortPci),
            (0x71, Kind::PortClock),
            (0x608, Kind::PortAcpi),
            (0x80, Kind::PortOther),
        ] {
            assert_eq!(port(at), kind, "{at:#x}");
        }
        for (at, kind) in [
            (layout::MEM_32BIT_DEVICES_START, Kind::MmioBar),
            (layout::MEM_64BIT_DEVICES_START + 5, Kind::MmioBar),
            (layout::PCI_MMCONFIG_START + 0x8000, Kind::MmioConfig),
            (layout::IOAPIC_START + 0x10, Kind::MmioIoApic),
            (layout::GED_START, Kind::MmioAcpi),
            (layout::MEMORY_HOTPLUG_START, Kind::MmioAcpi),
            (0xA_0000, Kind::MmioOther),
            (layout::RAM_64BIT_START, Kind::MmioOther),
        ] {
            assert_eq!(mmio(at, &areas), kind, "{at:#x}");
        }
    }

    #[test]
    fn counters_are_sums_and_the_first_times_stay() {
        let exits = Exits::new(
            Instant::now(),
            Areas {
                window: 1 << 40,
                acpi: 2 << 40,
            },
        );
        assert!(!exits.counters().contains_key("first_entry_us"));
        let (one, other) = (exits.of(0), exits.of(1));
        exits.enters();
        exits.leaves();
        for counts in [&one, &one, &other] {
            counts.count(Kind::PortSerial);
        }
        other.count(Kind::Other);
        assert!(Arc::ptr_eq(&one, &exits.of(0)), "a vCPU that comes again grows nothing");
        let told = exits.counters();
        assert_eq!(
            (told["exits_port_serial"], told["exits_other"], told["exits_msr"]),
            (3, 1, 0)
        );
        exits.enters();
        exits.leaves();
        assert_eq!(exits.counters(), told);
        assert!(told["first_exit_us"] >= told["first_entry_us"]);
    }
}
