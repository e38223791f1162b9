//! Writes the measured manifest (`stage0::abi`).

use zerocopy::IntoBytes;

use super::{ImageError, LinuxImage, Places};
use crate::acpi::AcpiMachine;
use crate::acpi::baked::BakedTables;
use crate::layout;
use crate::plan::Platform;
use crate::stage0::abi::{MAGIC, MANIFEST_END, MANIFEST_START, Manifest, Span, VERSION};

/// The manifest of `image` on `platform`.
pub(super) fn write(image: &LinuxImage<'_>, places: &Places, platform: Platform) -> Result<Vec<u8>, ImageError> {
    let options = &image.options;
    let slots = match platform {
        Platform::Native => layout::MEMORY_SLOTS,
        Platform::SevSnp => 0,
    };
    let tables = BakedTables::build(&AcpiMachine {
        vcpus: 1,
        max_vcpus: options.machine.max_vcpus,
        segments: options.machine.segments,
        memory_slots: options.machine.memory_slots.unwrap_or(slots),
        phys_bits: 0,
        serial: true,
    })?;
    let mut bytes = vec![0; size_of::<Manifest>()];
    let room = MANIFEST_END - MANIFEST_START;
    let mut add = |part: &[&[u8]]| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let offset = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        part.iter().for_each(|part| bytes.extend_from_slice(part));
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX).saturating_sub(offset);
        Span { offset, len }
    };
    let setup_header = add(&[&image.kernel.setup_header]);
    let command_line = add(&[options.command_line.as_bytes(), &[0]]);
    let acpi = add(&[&tables.bytes]);
    let fixups = add(&[tables.fixups.as_bytes()]);
    let len = u32::try_from(bytes.len()).ok().filter(|len| u64::from(*len) <= room);
    let len = len.ok_or(ImageError::Manifest { len: bytes.len(), room })?;
    let head = Manifest {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        len,
        chunk_count: u32::try_from(places.chunk_count).unwrap_or(u32::MAX),
        setup_header,
        command_line,
        acpi,
        fixups,
        kernel: places.kernel,
        initrd: places.initrd,
        chunks: places.chunks,
        chunks_digest: image.chunks_digest,
    };
    if let Some(place) = bytes.get_mut(..size_of::<Manifest>()) {
        place.copy_from_slice(head.as_bytes());
    }
    Ok(bytes)
}
