//! stage0's decisions, apart from the machine: what it makes of the measured manifest and of what the host gives (memory
//! map, vCPU count, MADT), the tables and boot parameters for Linux, and hashing. Nothing here touches the processor, so all
//! of it is tested on the host; `main.rs` is the image around it. See `docs/stage0.md`.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod accept;
pub mod acpi;
pub mod boot_params;
pub mod codes;
#[path = "../../src/layout.rs"]
pub mod layout;
pub mod madt;
pub mod manifest;
pub mod map;
pub mod refusal;
pub mod sha256;
pub mod work;

#[cfg(test)]
mod tests;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// Reads a little-endian number of `N` bytes at `offset`; none past the end.
fn number<const N: usize>(bytes: &[u8], offset: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(..N)?
        .copy_from_slice(bytes.get(offset..offset.checked_add(N)?)?);
    Some(u64::from_le_bytes(wide))
}

/// Writes `value` at `offset`; none past the end.
fn put(bytes: &mut [u8], offset: usize, value: &[u8]) -> Option<()> {
    bytes
        .get_mut(offset..offset.checked_add(value.len())?)?
        .copy_from_slice(value);
    Some(())
}
