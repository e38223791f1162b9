//! Images that are not raw, told by their first bytes: served as they are, the guest would read the container and not the
//! disk in it. Reading such formats is not here, and nowhere in podvisor.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// First bytes and names: QEMU's `docs/interop/qcow2.txt`, "Header"; [MS-VHDX] 2.2.1; the Virtual Hard Disk Image Format
/// Specification, "Hard Disk Footer Format", whose copy opens a dynamic image.
const FORMATS: &[(&[u8], &str)] = &[(b"QFI\xfb", "Qcow2"), (b"vhdxfile", "Vhdx"), (b"conectix", "VHD")];

/// The format of the regular file at `path`, if it is one of [`FORMATS`]. A file that cannot be read has none: opening it
/// for the disk says why.
pub(super) fn format(path: &Path) -> Option<&'static str> {
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut start = [0; 8];
    let read = File::open(path).ok()?.read_at(&mut start, 0).ok()?;
    let start = start.get(..read)?;
    FORMATS
        .iter()
        .find(|(magic, _)| start.starts_with(magic))
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_the_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (bytes, expected) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Some("Qcow2")),
            (b"vhdxfile\0", Some("Vhdx")),
            (b"conectix\0", Some("VHD")),
            (b"QFI", None),
            (b"", None),
            (b"\0QFI\xfb\0\0\0\0", None),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(format(&path), expected, "{bytes:?}");
        }
        assert_eq!(format(dir.path()), None);
        assert_eq!(format(&dir.path().join("none")), None);
    }
}
