//! The ACPI MADT (ACPI 6.5, 5.2.12): the host's, checked entry by entry, or one made from the vCPU count.

use crate::refusal::Refusal;
use crate::{layout, number, put};

/// Most vCPUs that a pod may start with.
pub const MAX_VCPUS: u32 = 1024;
/// Most bytes that a MADT made here has.
pub const MAX_LEN: usize = HEADER + MAX_VCPUS as usize * X2APIC + IOAPIC + OVERRIDE;

const HEADER: usize = 44;
const LENGTH: usize = 4;
const CHECKSUM: usize = 9;
const X2APIC: usize = 16;
const IOAPIC: usize = 12;
const OVERRIDE: usize = 10;
/// Pins of the I/O APIC.
const PINS: u64 = 24;

/// Checks the host's vCPU count.
///
/// # Errors
/// [`Refusal::VcpuCount`].
pub fn check_count(count: u32) -> Result<(), Refusal> {
    let what = match count {
        0 => "there is none",
        1..=MAX_VCPUS => return Ok(()),
        _ => "more than 1024",
    };
    Err(Refusal::VcpuCount { what, count })
}

/// The sum of all bytes, which is 0 for a table that is whole.
#[must_use]
pub fn sum(table: &[u8]) -> u8 {
    table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Checks the MADT in `page` for a pod of `vcpus`: its length in bytes, or none when the page is all zero.
///
/// # Errors
/// [`Refusal::Madt`] naming the place, or [`Refusal::VcpuCount`] when it has another number of vCPUs.
pub fn check(page: &[u8], vcpus: u32) -> Result<Option<usize>, Refusal> {
    if page.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let field = |offset: usize, what, is: &dyn Fn(u64) -> bool| {
        let value = number::<4>(page, offset).unwrap_or(0);
        is(value).then_some(value).ok_or(Refusal::Madt { what, offset, value })
    };
    field(0, "signature", &|value| {
        value == u64::from(u32::from_le_bytes(*b"APIC"))
    })?;
    let len = field(LENGTH, "length", &|len| {
        len >= HEADER as u64 && len <= page.len() as u64
    })? as usize;
    let table = page.get(..len).unwrap_or(page);
    if sum(table) != 0 {
        return Err(Refusal::Madt {
            what: "checksum",
            offset: CHECKSUM,
            value: u64::from(sum(table)),
        });
    }
    field(36, "local APIC address", &|address| address == layout::APIC_START)?;
    field(40, "flags", &|flags| flags <= 1)?;
    let mut entries = Entries::default();
    let mut at = HEADER;
    while at < len {
        at += entries.take(table, at)?;
    }
    if !entries.ioapic {
        return Err(Refusal::Madt {
            what: "no I/O APIC",
            offset: len,
            value: 0,
        });
    }
    if entries.enabled != vcpus {
        return Err(Refusal::VcpuCount {
            what: "the MADT enables another number",
            count: vcpus,
        });
    }
    Ok(Some(len))
}

/// What has been seen of a table.
#[derive(Default)]
struct Entries {
    enabled: u32,
    cpus: u64,
    ioapic: bool,
    overridden: u32,
}

impl Entries {
    /// Checks the entry at `at`; its length.
    fn take(&mut self, table: &[u8], at: usize) -> Result<usize, Refusal> {
        let value = number::<2>(table, at).unwrap_or(0);
        let wrong = |what| Refusal::Madt {
            what,
            offset: at,
            value,
        };
        let (kind, len) = (value & 0xFF, (value >> 8) as usize);
        let entry = at.checked_add(len).and_then(|end| table.get(at..end));
        let entry = entry.filter(|entry| entry.len() >= 2).ok_or(wrong("entry length"))?;
        let byte = |offset| number::<1>(entry, offset).unwrap_or(u64::MAX);
        let word = |offset| number::<4>(entry, offset).unwrap_or(u64::MAX);
        match (kind, len) {
            // Local APIC: processor, identifier, flags.
            (0, 8) => self.cpu(byte(3), byte(2), word(4)).map_err(wrong)?,
            // Local x2APIC: identifier, flags, processor.
            (9, X2APIC) if number::<2>(entry, 2) == Some(0) => {
                self.cpu(word(4), word(12), word(8)).map_err(wrong)?;
            }
            (1, IOAPIC) if !self.ioapic && word(4) == layout::IOAPIC_START && word(8) == 0 && byte(3) == 0 => {
                self.ioapic = true;
            }
            // An ISA interrupt's source and global interrupt, each once.
            (2, OVERRIDE) if byte(2) == 0 && byte(3) < 16 && word(4) < PINS && byte(9) == 0 && byte(8) < 16 => {
                let bit = 1 << byte(3);
                if self.overridden & bit != 0 {
                    return Err(wrong("interrupt overridden twice"));
                }
                self.overridden |= bit;
            }
            (0 | 1 | 2 | 9, _) => return Err(wrong("entry")),
            _ => return Err(wrong("entry type")),
        }
        Ok(len)
    }

    /// vCPUs are numbered from 0, in order, the enabled ones first.
    fn cpu(&mut self, id: u64, processor: u64, flags: u64) -> Result<(), &'static str> {
        if id != self.cpus || processor != id {
            return Err("processor out of order");
        }
        match flags {
            1 if u64::from(self.enabled) == self.cpus => self.enabled += 1,
            2 => {}
            _ => return Err("processor flags"),
        }
        self.cpus += 1;
        Ok(())
    }
}

/// Makes a MADT of `vcpus` in `table`, as podvisor's own; its length in bytes. None when it does not fit.
pub fn make(table: &mut [u8], vcpus: u32) -> Option<usize> {
    let len = HEADER + vcpus as usize * X2APIC + IOAPIC + OVERRIDE;
    let table = table.get_mut(..len)?;
    table.fill(0);
    put(table, 0, b"APIC")?;
    put(table, LENGTH, &u32::try_from(len).ok()?.to_le_bytes())?;
    put(table, 8, &[5])?;
    put(table, 10, b"PODVSRPODVISOR\x01\0\0\0RVAT\0\0\0\x01")?;
    put(table, 36, &u32::try_from(layout::APIC_START).ok()?.to_le_bytes())?;
    let mut at = HEADER;
    for vcpu in 0..vcpus {
        put(table, at, &[9, 16])?;
        for (offset, value) in [(4, vcpu), (8, 1), (12, vcpu)] {
            put(table, at + offset, &value.to_le_bytes())?;
        }
        at += X2APIC;
    }
    put(table, at, &[1, 12])?;
    put(table, at + 4, &u32::try_from(layout::IOAPIC_START).ok()?.to_le_bytes())?;
    at += IOAPIC;
    put(table, at, &[2, 10, 0, 4])?;
    put(table, at + 4, &layout::SERIAL_IRQ.to_le_bytes())?;
    let checksum = 0u8.wrapping_sub(sum(table));
    put(table, CHECKSUM, &[checksum])?;
    Some(len)
}
