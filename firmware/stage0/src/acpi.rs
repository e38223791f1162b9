//! The ACPI tables for Linux: the measured DSDT, FADT and MCFG, put in place and fitted to the machine, with MADT, XSDT and
//! RSDP beside them.

use crate::abi::{FIXUP_MMIO_START, FIXUP_TOP};
use crate::manifest::Image;
use crate::refusal::Refusal;
use crate::{layout, madt, number, put};

const HEADER: usize = 36;
const LENGTH: usize = 4;
const CHECKSUM: usize = 9;
/// X_DSDT of the FADT.
const X_DSDT: usize = 140;
/// Bytes in an RSDP of revision 2.
const RSDP_LEN: usize = 36;

/// Where the finished tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// GPA of the RSDP.
    pub rsdp: u64,
    /// Bytes used from the start of the area.
    pub len: usize,
}

/// Lays the tables out in `area`, which lies at GPA `gpa`. `host_madt` is the host's MADT, checked; one for `vcpus` is
/// made when there is none.
///
/// # Errors
/// [`Refusal::Acpi`] when the measured tables are not what they should be, or do not fit.
pub fn lay_out(
    area: &mut [u8],
    gpa: u64,
    image: &Image<'_>,
    host_madt: Option<&[u8]>,
    vcpus: u32,
    phys_bits: u8,
) -> Result<Tables, Refusal> {
    const ROOM: Refusal = Refusal::Acpi("no room");
    let (dsdt, fadt, mcfg) = find(image.acpi)?;
    put(area, 0, image.acpi).ok_or(ROOM)?;
    fix(
        area.get_mut(dsdt..dsdt + table_len(image.acpi, dsdt)?),
        image,
        phys_bits,
    )?;
    let at = |offset: usize| gpa + offset as u64;
    let table = area.get_mut(fadt..fadt + table_len(image.acpi, fadt)?).ok_or(ROOM)?;
    put(table, X_DSDT, &at(dsdt).to_le_bytes()).ok_or(Refusal::Acpi("FADT"))?;
    finish(table).ok_or(ROOM)?;

    let madt = image.acpi.len().next_multiple_of(16);
    let room = area.get_mut(madt..).ok_or(ROOM)?;
    let len = match host_madt {
        Some(host) => {
            put(room, 0, host).ok_or(ROOM)?;
            host.len()
        }
        None => madt::make(room, vcpus).ok_or(ROOM)?,
    };
    let xsdt = (madt + len).next_multiple_of(16);
    let xsdt_len = HEADER + 3 * 8;
    let table = area.get_mut(xsdt..xsdt + xsdt_len).ok_or(ROOM)?;
    table.fill(0);
    put(table, 0, b"XSDT").ok_or(ROOM)?;
    put(table, LENGTH, &(xsdt_len as u32).to_le_bytes()).ok_or(ROOM)?;
    put(table, 8, b"\x01\0PODVSRPODVISOR\x01\0\0\0RVAT\0\0\0\x01").ok_or(ROOM)?;
    for (index, listed) in [fadt, madt, mcfg].into_iter().enumerate() {
        put(table, HEADER + index * 8, &at(listed).to_le_bytes()).ok_or(ROOM)?;
    }
    finish(table).ok_or(ROOM)?;

    let rsdp = (xsdt + xsdt_len).next_multiple_of(16);
    let table = area.get_mut(rsdp..rsdp + RSDP_LEN).ok_or(ROOM)?;
    table.fill(0);
    put(table, 0, b"RSD PTR \0PODVSR\x02").ok_or(ROOM)?;
    put(table, 20, &(RSDP_LEN as u32).to_le_bytes()).ok_or(ROOM)?;
    put(table, 24, &at(xsdt).to_le_bytes()).ok_or(ROOM)?;
    let first = 0u8.wrapping_sub(madt::sum(table.get(..20).unwrap_or(&[])));
    put(table, 8, &[first]).ok_or(ROOM)?;
    let all = 0u8.wrapping_sub(madt::sum(table));
    put(table, 32, &[all]).ok_or(ROOM)?;
    Ok(Tables {
        rsdp: at(rsdp),
        len: rsdp + RSDP_LEN,
    })
}

/// Sets the checksum of a table.
fn finish(table: &mut [u8]) -> Option<()> {
    put(table, CHECKSUM, &[0])?;
    let checksum = 0u8.wrapping_sub(madt::sum(table));
    put(table, CHECKSUM, &[checksum])
}

fn table_len(tables: &[u8], at: usize) -> Result<usize, Refusal> {
    let len = at.checked_add(LENGTH).and_then(|at| number::<4>(tables, at));
    len.map(|len| len as usize)
        .filter(|len| *len >= HEADER && at.checked_add(*len).is_some_and(|end| end <= tables.len()))
        .ok_or(Refusal::Acpi("a table is longer than the tables"))
}

/// Offsets of DSDT, FADT and MCFG.
fn find(tables: &[u8]) -> Result<(usize, usize, usize), Refusal> {
    let mut at = 0;
    let mut found = [0; 3];
    for (signature, place) in [*b"DSDT", *b"FACP", *b"MCFG"].into_iter().zip(&mut found) {
        if number::<4>(tables, at) != Some(u64::from(u32::from_le_bytes(signature))) {
            return Err(Refusal::Acpi("DSDT, FADT and MCFG are not there in this order"));
        }
        *place = at;
        at = (at + table_len(tables, at)?).next_multiple_of(16);
    }
    let [dsdt, fadt, mcfg] = found;
    if table_len(tables, fadt)? < X_DSDT + 8 {
        return Err(Refusal::Acpi("FADT"));
    }
    Ok((dsdt, fadt, mcfg))
}

/// Puts the numbers into the DSDT that depend on the width of addresses.
fn fix(dsdt: Option<&mut [u8]>, image: &Image<'_>, phys_bits: u8) -> Result<(), Refusal> {
    const WRONG: Refusal = Refusal::Acpi("a fixup is not one of the DSDT");
    let dsdt = dsdt.ok_or(WRONG)?;
    let area = layout::device_area(phys_bits);
    for fixup in image.fixups {
        let base = match fixup.base {
            FIXUP_MMIO_START => area.mmio_start,
            // The area ends 128 KiB below.
            FIXUP_TOP => area.mmio_end + (128 << 10),
            _ => return Err(WRONG),
        };
        if (fixup.offset as usize) < HEADER {
            return Err(WRONG);
        }
        let value = base.wrapping_add(fixup.addend);
        put(dsdt, fixup.offset as usize, &value.to_le_bytes()).ok_or(WRONG)?;
    }
    finish(dsdt).ok_or(WRONG)
}
