//! The DSDT's memory hotplug controller and its memory devices: a scan for what has come or should go, and the
//! addresses of each device, all read from the controller's registers at the time they are asked for. Names,
//! registers and methods are Cloud Hypervisor's; ejection (`_EJ0`) is ours.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, Device, EISAName, Equal, FieldAccessType,
    FieldEntry, FieldUpdateRule, If, LessThan, Local, Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion,
    OpRegionSpace, Or, Path, Release, ResourceTemplate, Return, ShiftLeft, Store, Subtract, While, ZERO,
};

use super::AcpiMachine;
use super::dsdt::{Raw, field, name, path, register_crs};
use crate::layout;

/// What Notify says of a device that came (ACPI 6.5 5.6.6, device check).
const DEVICE_CHECK: u8 = 1;
/// What it says of one that should go (ejection request).
const EJECT_REQUEST: u8 = 3;

/// The controller at `start` with `machine.memory_slots` devices; nothing when there are none.
pub(super) fn memory_hotplug(aml: &mut Raw, machine: &AcpiMachine, start: u64) {
    if machine.memory_slots == 0 {
        return;
    }
    let word = |register| FieldEntry::Named(register, 32);
    let bit = |register| FieldEntry::Named(register, 1);
    let range = [*b"MHBL", *b"MHBH", *b"MHLL", *b"MHLH"].map(word).to_vec();
    let proximity = vec![FieldEntry::Reserved(128), word(*b"MHPX")];
    let mut flags = vec![FieldEntry::Reserved(160)];
    flags.extend([*b"MEN_", *b"MINS", *b"MRMV", *b"MEJ0"].map(bit));
    let commands = [*b"MSEL", *b"MOEV", *b"MOSC"].map(word).to_vec();
    let words = |entries| field("MHPR", FieldAccessType::DWord, FieldUpdateRule::Preserve, entries);
    aml.push(&Device::new(
        path("_SB_.MHPC"),
        vec![
            &name("_HID", &EISAName::new("PNP0A06")),
            &name("_UID", &"Memory Hotplug Controller"),
            &Mutex::new(path("MLCK"), 0),
            &register_crs(start, layout::MEMORY_HOTPLUG_SIZE),
            &OpRegion::new(
                path("MHPR"),
                OpRegionSpace::SystemMemory,
                &start,
                &layout::MEMORY_HOTPLUG_SIZE,
            ),
            &words(range),
            &words(proximity),
            &field("MHPR", FieldAccessType::Byte, FieldUpdateRule::WriteAsZeroes, flags),
            &words(commands),
            &status(),
            &resources(),
            &ejection(),
            &scan(machine.memory_slots),
            &devices(machine.memory_slots),
        ],
    ));
}

/// Method `method` of `args` arguments whose body runs with the registers locked.
fn locked(method: &str, args: u8, body: &dyn Aml, result: &dyn Aml) -> Raw {
    let mut raw = Raw::default();
    let (lock, unlock) = (Acquire::new(path("MLCK"), 0xFFFF), Release::new(path("MLCK")));
    raw.push(&Method::new(
        path(method),
        args,
        true,
        vec![&lock, body, &unlock, result],
    ));
    raw
}

fn all(parts: &[&dyn Aml]) -> Raw {
    let mut raw = Raw::default();
    parts.iter().for_each(|part| raw.push(*part));
    raw
}

/// MSTA: whether slot Arg0 holds memory, as `_STA` says it.
fn status() -> Raw {
    let body = all(&[
        &Store::new(&path("MSEL"), &Arg(0)),
        &Store::new(&Local(0), &ZERO),
        &If::new(&Equal::new(&path("MEN_"), &ONE), vec![&Store::new(&Local(0), &0x0Fu8)]),
    ]);
    locked("MSTA", 1, &body, &Return::new(&Local(0)))
}

/// MCRS: the addresses of slot Arg0, as `_CRS` says them.
fn resources() -> Raw {
    // Offsets in the one descriptor of MR64, a QWord address space (ACPI 6.5 6.4.3.5.1).
    const MINIMUM: u8 = 14;
    const MAXIMUM: u8 = 22;
    const LENGTH: u8 = 38;
    let template = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        0u64,
        0xFFFF_FFFF_FFFF_FFFE,
        None,
    );
    let (high, buffer) = (Local(0), path("MR64"));
    let joined = |to: &str, upper: &str, lower: &str| {
        all(&[
            &ShiftLeft::new(&high, &path(upper), &32u8),
            &Or::new(&path(to), &high, &path(lower)),
        ])
    };
    let body = all(&[
        &Store::new(&path("MSEL"), &Arg(0)),
        &Name::new(path("MR64"), &ResourceTemplate::new(vec![&template])),
        &CreateQWordField::new(&path("MMIN"), &buffer, &MINIMUM),
        &CreateQWordField::new(&path("MMAX"), &buffer, &MAXIMUM),
        &CreateQWordField::new(&path("MLEN"), &buffer, &LENGTH),
        &joined("MMIN", "MHBH", "MHBL"),
        &joined("MLEN", "MHLH", "MHLL"),
        &Add::new(&path("MMAX"), &path("MMIN"), &path("MLEN")),
        &Subtract::new(&path("MMAX"), &path("MMAX"), &ONE),
    ]);
    locked("MCRS", 1, &body, &Return::new(&buffer))
}

/// MEJT: lets go of slot Arg0.
fn ejection() -> Raw {
    let body = all(&[&Store::new(&path("MSEL"), &Arg(0)), &Store::new(&path("MEJ0"), &ONE)]);
    locked("MEJT", 1, &body, &Raw::default())
}

fn slot_name(slot: u8) -> Path {
    path(&format!("M{slot:03}"))
}

/// MTFY, which notifies device Arg0 of Arg1, and MSCN, which looks for what has changed.
fn scan(slots: u8) -> Raw {
    let mut notify = Raw::default();
    for slot in 0..slots {
        notify.push(&If::new(
            &Equal::new(&Arg(0), &slot),
            vec![&Notify::new(&slot_name(slot), &Arg(1))],
        ));
    }
    let changed = |flag: &str, event: u8| {
        let flag = path(flag);
        // Writing the flag clears it.
        all(&[&If::new(
            &Equal::new(&flag, &ONE),
            vec![
                &MethodCall::new(path("MTFY"), vec![&Local(0), &event]),
                &Store::new(&flag, &ONE),
            ],
        )])
    };
    let body = all(&[
        &Store::new(&Local(0), &ZERO),
        &While::new(
            &LessThan::new(&Local(0), &slots),
            vec![
                &Store::new(&path("MSEL"), &Local(0)),
                &changed("MINS", DEVICE_CHECK),
                &changed("MRMV", EJECT_REQUEST),
                &Add::new(&Local(0), &Local(0), &ONE),
            ],
        ),
    ]);
    all(&[
        &Method::new(path("MTFY"), 2, true, vec![&notify]),
        &locked("MSCN", 0, &body, &Raw::default()),
    ])
}

/// The memory devices.
fn devices(slots: u8) -> Raw {
    let mut raw = Raw::default();
    for slot in 0..slots {
        let answer = |method: &str| all(&[&Return::new(&MethodCall::new(path(method), vec![&slot]))]);
        let (sta, crs) = (answer("MSTA"), answer("MCRS"));
        raw.push(&Device::new(
            slot_name(slot),
            vec![
                &name("_HID", &EISAName::new("PNP0C80")),
                &name("_UID", &slot),
                &Method::new(path("_STA"), 0, false, vec![&sta]),
                &Method::new(path("_CRS"), 0, true, vec![&crs]),
                &Method::new(
                    path("_EJ0"),
                    1,
                    false,
                    vec![&MethodCall::new(path("MEJT"), vec![&slot])],
                ),
            ],
        ));
    }
    raw
}
