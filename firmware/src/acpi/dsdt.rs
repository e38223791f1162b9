//! The DSDT: host bridges with hot-pluggable slots, the PCI and CPU hotplug controllers (memory's is in `memory`), the
//! generic event device that tells the guest of events, COM1, the power button and S5. Names, registers and methods are Cloud
//! Hypervisor's, whose tables are baked into existing images.

use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, LessThan, Local, Memory32Fixed,
    Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, Release, ResourceTemplate,
    Return, ShiftLeft, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::AcpiMachine;
use super::memory::memory_hotplug;
use super::tables::{local_x2apic, table};
use crate::layout::{self, DeviceArea};

/// AML that is already bytes.
#[derive(Default)]
pub(super) struct Raw(Vec<u8>);

impl Raw {
    pub(super) fn push(&mut self, aml: &dyn Aml) {
        aml.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn path(name: &str) -> Path {
    Path::new(name)
}

pub(super) fn name(of: &str, value: &dyn Aml) -> Name {
    Name::new(path(of), value)
}

/// `_CRS` of a device that is a few registers in memory.
pub(super) fn register_crs(start: u64, len: u64) -> Name {
    let window = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, start + len - 1, None);
    name("_CRS", &ResourceTemplate::new(vec![&window]))
}

pub(super) fn field(region: &str, access: FieldAccessType, update: FieldUpdateRule, entries: Vec<FieldEntry>) -> Field {
    Field::new(path(region), access, FieldLockRule::NoLock, update, entries)
}

/// The whole table, of a machine whose devices are in `area`.
pub(super) fn dsdt(machine: &AcpiMachine, area: &DeviceArea) -> Vec<u8> {
    let mut aml = Raw::default();
    for segment in 0..machine.segments {
        host_bridge(&mut aml, machine, area, segment);
    }
    pci_hotplug(&mut aml, machine, area.pci_hotplug);
    cpu_hotplug(&mut aml, machine, area.cpu_hotplug);
    memory_hotplug(&mut aml, machine, area.memory_hotplug);
    events(&mut aml, machine, area.ged);
    mainboard(&mut aml);
    if machine.serial {
        serial(&mut aml);
    }
    aml.push(&Device::new(
        path("_SB_.PWRB"),
        vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)],
    ));
    aml.push(&name("_S5_", &Package::new(vec![&5u8])));
    table(*b"DSDT", 6, &aml.0)
}

fn bridge_name(segment: u16) -> String {
    format!("PC{segment:02X}")
}

fn host_bridge(aml: &mut Raw, machine: &AcpiMachine, area: &DeviceArea, segment: u16) {
    let [low, high] = machine.windows_in(area, segment);
    let low_word = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low_word(low.start),
        low_word(low.start + low.len - 1),
        None,
    );
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        high.start,
        high.start + high.len - 1,
        None,
    );
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(layout::PCI_CONFIG_IO_PORT, layout::PCI_CONFIG_IO_PORT, 1, 8);
    let io = [
        AddressSpace::new_io(0u16, 0xCF7, None),
        AddressSpace::new_io(0xD00u16, 0xFFFF, None),
    ];
    let [io_low, io_high] = &io;
    // Ports exist once, on segment 0.
    let crs = if segment == 0 {
        ResourceTemplate::new(vec![&bus, &config, &low, &high, io_low, io_high])
    } else {
        ResourceTemplate::new(vec![&bus, &low, &high])
    };
    let (slots, notify) = slots();
    aml.push(&Device::new(
        path(&format!("_SB_.{}", bridge_name(segment))),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_ADR", &ZERO),
            &name("_SEG", &segment),
            &name("_UID", &segment),
            &name("_CCA", &ONE),
            &name("SUPP", &ZERO),
            &name("_CRS", &crs),
            &slots,
            &Method::new(path("DVNT"), 2, true, vec![&notify]),
            &Method::new(
                path("PCNT"),
                0,
                true,
                vec![
                    &Acquire::new(path("\\_SB_.PHPR.BLCK"), 0xFFFF),
                    &Store::new(&path("\\_SB_.PHPR.PSEG"), &segment),
                    &MethodCall::new(path("DVNT"), vec![&path("\\_SB_.PHPR.PCIU"), &ONE]),
                    &MethodCall::new(path("DVNT"), vec![&path("\\_SB_.PHPR.PCID"), &3u8]),
                    &Release::new(path("\\_SB_.PHPR.BLCK")),
                ],
            ),
        ],
    ));
}

/// The hot-pluggable slots of a bridge, and the notification of those in a bitmap.
fn slots() -> (Raw, Raw) {
    let mut slots = Raw::default();
    let mut notify = Raw::default();
    // Slot 0 is the host bridge itself.
    for slot in 1..layout::PCI_SLOTS {
        let slot_name = format!("S{slot:03}");
        let number = u32::from(slot);
        slots.push(&Device::new(
            path(&slot_name),
            vec![
                &name("_SUN", &slot),
                &name("_ADR", &(number << 16)),
                &Method::new(
                    path("_EJ0"),
                    1,
                    true,
                    vec![&MethodCall::new(
                        path("\\_SB_.PHPR.PCEJ"),
                        vec![&path("_SUN"), &path("_SEG")],
                    )],
                ),
            ],
        ));
        let bit = 1u32 << number;
        notify.push(&If::new(
            &And::new(&Local(0), &Arg(0), &bit),
            vec![&Notify::new(&path(&slot_name), &Arg(1))],
        ));
    }
    (slots, notify)
}

fn pci_hotplug(aml: &mut Raw, machine: &AcpiMachine, start: u64) {
    let mut scan = Raw::default();
    for segment in 0..machine.segments {
        scan.push(&MethodCall::new(
            path(&format!("\\_SB_.{}.PCNT", bridge_name(segment))),
            vec![],
        ));
    }
    let registers = [*b"PCIU", *b"PCID", *b"B0EJ", *b"PSEG"].map(|register| FieldEntry::Named(register, 32));
    aml.push(&Device::new(
        path("_SB_.PHPR"),
        vec![
            &name("_HID", &EISAName::new("PNP0A06")),
            &name("_STA", &0x0Bu8),
            &name("_UID", &"PCI Hotplug Controller"),
            &Mutex::new(path("BLCK"), 0),
            &register_crs(start, layout::PCI_HOTPLUG_SIZE),
            &OpRegion::new(
                path("PCST"),
                OpRegionSpace::SystemMemory,
                &start,
                &layout::PCI_HOTPLUG_SIZE,
            ),
            &field(
                "PCST",
                FieldAccessType::DWord,
                FieldUpdateRule::WriteAsZeroes,
                registers.to_vec(),
            ),
            &Method::new(
                path("PCEJ"),
                2,
                true,
                vec![
                    &Acquire::new(path("BLCK"), 0xFFFF),
                    &Store::new(&path("PSEG"), &Arg(1)),
                    &ShiftLeft::new(&path("B0EJ"), &ONE, &Arg(0)),
                    &Release::new(path("BLCK")),
                    &Return::new(&ZERO),
                ],
            ),
            &Method::new(path("PSCN"), 0, true, vec![&scan]),
        ],
    ));
}

fn cpu_hotplug(aml: &mut Raw, machine: &AcpiMachine, start: u64) {
    let bit = |register| FieldEntry::Named(register, 1);
    let flags = vec![
        FieldEntry::Reserved(32),
        bit(*b"CPEN"),
        bit(*b"CINS"),
        bit(*b"CRMV"),
        bit(*b"CEJ0"),
        FieldEntry::Reserved(4),
        FieldEntry::Named(*b"CCMD", 8),
    ];
    let words = vec![
        FieldEntry::Named(*b"CSEL", 32),
        FieldEntry::Reserved(32),
        FieldEntry::Named(*b"CDAT", 32),
    ];
    aml.push(&Device::new(
        path("_SB_.PRES"),
        vec![
            &name("_HID", &EISAName::new("PNP0A06")),
            &name("_UID", &"CPU Hotplug Controller"),
            &Mutex::new(path("CPLK"), 0),
            &register_crs(start, layout::CPU_HOTPLUG_SIZE),
            &OpRegion::new(
                path("PRST"),
                OpRegionSpace::SystemMemory,
                &start,
                &layout::CPU_HOTPLUG_SIZE,
            ),
            &field("PRST", FieldAccessType::Byte, FieldUpdateRule::WriteAsZeroes, flags),
            &field("PRST", FieldAccessType::DWord, FieldUpdateRule::Preserve, words),
        ],
    ));
    let mut cpus = Raw::default();
    cpus.push(&name("_HID", &"ACPI0010"));
    cpus.push(&name("_CID", &EISAName::new("PNP0A05")));
    cpu_methods(&mut cpus, machine.max_vcpus);
    for vcpu in 0..machine.max_vcpus {
        cpus.push(&Device::new(
            path(&cpu_name(vcpu)),
            vec![
                &name("_HID", &"ACPI0007"),
                &name("_UID", &vcpu),
                &Method::new(
                    path("_STA"),
                    0,
                    false,
                    vec![&Return::new(&MethodCall::new(path("CSTA"), vec![&vcpu]))],
                ),
                &name("_MAT", &BufferData::new(local_x2apic(vcpu, true))),
                &Method::new(
                    path("_EJ0"),
                    1,
                    false,
                    vec![&MethodCall::new(path("CEJ0"), vec![&vcpu])],
                ),
            ],
        ));
    }
    aml.push(&Device::new(path("_SB_.CPUS"), vec![&cpus]));
}

fn cpu_name(vcpu: u32) -> String {
    format!("C{vcpu:03X}")
}

/// Status, notification and ejection of a vCPU, and the scan for what has changed.
fn cpu_methods(aml: &mut Raw, max_vcpus: u32) {
    const LOCK: &str = "\\_SB_.PRES.CPLK";
    let lock = || Acquire::new(path(LOCK), 0xFFFF);
    let unlock = || Release::new(path(LOCK));
    let select = |which: &dyn Aml| {
        let mut raw = Raw::default();
        raw.push(&Store::new(&path("\\_SB_.PRES.CSEL"), which));
        raw
    };
    aml.push(&Method::new(
        path("CSTA"),
        1,
        true,
        vec![
            &lock(),
            &select(&Arg(0)),
            &Store::new(&Local(0), &ZERO),
            &If::new(
                &Equal::new(&path("\\_SB_.PRES.CPEN"), &ONE),
                vec![&Store::new(&Local(0), &0x0Fu8)],
            ),
            &unlock(),
            &Return::new(&Local(0)),
        ],
    ));
    let mut notify = Raw::default();
    for vcpu in 0..max_vcpus {
        notify.push(&If::new(
            &Equal::new(&Arg(0), &vcpu),
            vec![&Notify::new(&path(&cpu_name(vcpu)), &Arg(1))],
        ));
    }
    aml.push(&Method::new(path("CTFY"), 2, true, vec![&notify]));
    aml.push(&Method::new(
        path("CEJ0"),
        1,
        true,
        vec![
            &lock(),
            &select(&Arg(0)),
            &Store::new(&path("\\_SB_.PRES.CEJ0"), &ONE),
            &unlock(),
        ],
    ));
    let changed = |flag: &str, event: u8| {
        let mut raw = Raw::default();
        let flag = path(flag);
        raw.push(&If::new(
            &Equal::new(&flag, &ONE),
            vec![
                &MethodCall::new(path("CTFY"), vec![&Local(0), &event]),
                &Store::new(&flag, &ONE),
            ],
        ));
        raw
    };
    aml.push(&Method::new(
        path("CSCN"),
        0,
        true,
        vec![
            &lock(),
            &Store::new(&Local(0), &ZERO),
            &While::new(
                &LessThan::new(&Local(0), &max_vcpus),
                vec![
                    &select(&Local(0)),
                    &changed("\\_SB_.PRES.CINS", 1),
                    &changed("\\_SB_.PRES.CRMV", 3),
                    &Add::new(&Local(0), &Local(0), &ONE),
                ],
            ),
            &unlock(),
        ],
    ));
}

/// The event byte (bit 0 CPU, 1 memory, 2 PCI, 3 power button) and the device whose interrupt says to look at it.
fn events(aml: &mut Raw, machine: &AcpiMachine, start: u64) {
    let on = |bit: u8, action: &dyn Aml| {
        let mut raw = Raw::default();
        let masked = And::new(&Local(1), &Local(0), &bit);
        raw.push(&masked);
        raw.push(&If::new(&Equal::new(&Local(1), &bit), vec![action]));
        raw
    };
    let memory = if machine.memory_slots > 0 {
        on(2, &MethodCall::new(path("\\_SB_.MHPC.MSCN"), vec![]))
    } else {
        Raw::default()
    };
    aml.push(&Device::new(
        path("_SB_.GEC_"),
        vec![
            &name("_HID", &EISAName::new("PNP0A06")),
            &name("_UID", &"Generic Event Controller"),
            &register_crs(start, layout::GED_SIZE),
            &OpRegion::new(path("GDST"), OpRegionSpace::SystemMemory, &start, &layout::GED_SIZE),
            &field(
                "GDST",
                FieldAccessType::Byte,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GDAT", 8)],
            ),
            &Method::new(
                path("ESCN"),
                0,
                true,
                vec![
                    &Store::new(&Local(0), &path("GDAT")),
                    &on(1, &MethodCall::new(path("\\_SB_.CPUS.CSCN"), vec![])),
                    &memory,
                    &on(4, &MethodCall::new(path("\\_SB_.PHPR.PSCN"), vec![])),
                    &on(8, &Notify::new(&path("\\_SB_.PWRB"), &0x80u8)),
                ],
            ),
        ],
    ));
    let interrupt = Interrupt::new(true, true, false, false, layout::GED_IRQ);
    aml.push(&Device::new(
        path("_SB_.GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                path("_EVT"),
                1,
                true,
                vec![&MethodCall::new(path("\\_SB_.GEC_.ESCN"), vec![])],
            ),
        ],
    ));
}

/// Reserves the PCI configuration window, without which Linux does not use it.
fn mainboard(aml: &mut Raw) {
    const ECAM_LEN: u32 = 256 << 20;
    let start = u32::try_from(layout::PCI_MMCONFIG_START).unwrap_or(0);
    aml.push(&Device::new(
        path("_SB_.MBRD"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, start, ECAM_LEN)]),
            ),
        ],
    ));
}

fn serial(aml: &mut Raw) {
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8);
    aml.push(&Device::new(
        path("_SB_.COM1"),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_DDN", &"COM1"),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    ));
}
