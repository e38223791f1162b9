//! RAM in zones (`memory.zones`): each has a backing of its own, a file with a name among them. Zones lie one behind the
//! other in the guest's address space, around the 32-bit hole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::{GuestRam, RamError, RamOptions, advise, host_address, map_private, ram_ranges};
use crate::sys;

/// A part of the RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Its name.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// The file that backs it.
    pub file: Option<PathBuf>,
    /// How it is mapped.
    pub options: RamOptions,
    /// Bytes that it can be given later.
    pub hotplug_size: u64,
    /// Bytes of that which the guest is asked to take at once.
    pub hotplugged_size: u64,
}

/// A run of a zone in the guest's address space.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    len: u64,
    /// Which zone.
    zone: usize,
    /// Where it begins in the zone.
    offset: u64,
}

/// Where zones of these sizes lie.
fn pieces(sizes: &[u64]) -> Vec<Piece> {
    let mut ranges = ram_ranges(sizes.iter().sum()).into_iter();
    let mut pieces = Vec::new();
    let (mut gpa, mut room) = (0, 0);
    for (zone, size) in sizes.iter().enumerate() {
        let mut offset = 0;
        while offset < *size {
            if room == 0 {
                let Some(range) = ranges.next() else { break };
                (gpa, room) = range;
            }
            let len = room.min(size - offset);
            pieces.push(Piece { gpa, len, zone, offset });
            (gpa, room, offset) = (gpa + len, room - len, offset + len);
        }
    }
    pieces
}

/// A run of RAM, as a snapshot looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedRange {
    /// Guest address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// It is in its zone's own file already.
    pub in_file: bool,
}

/// The RAM of `size` bytes in `zones`, if there are any, in address order.
#[must_use]
pub fn saved_ranges(size: u64, zones: &[Zone]) -> Vec<SavedRange> {
    if zones.is_empty() {
        let range = |(gpa, len)| SavedRange {
            gpa,
            len,
            in_file: false,
        };
        return ram_ranges(size).into_iter().map(range).collect();
    }
    let sizes: Vec<u64> = zones.iter().map(|zone| zone.size).collect();
    let range = |piece: Piece| SavedRange {
        gpa: piece.gpa,
        len: piece.len,
        in_file: zones.get(piece.zone).is_some_and(Zone::keeps_itself),
    };
    pieces(&sizes).into_iter().map(range).collect()
}

impl Zone {
    /// Whether all that the guest writes is in a file with a name: nothing of it has to be saved.
    #[must_use]
    pub fn keeps_itself(&self) -> bool {
        self.options.shared && self.file.as_ref().is_some_and(|path| path.is_file())
    }

    /// Has the host write the zone's file to its disk, if it keeps itself.
    ///
    /// # Errors
    /// As the host says.
    pub fn sync(&self) -> io::Result<()> {
        match self.file.as_ref().filter(|_| self.keeps_itself()) {
            Some(path) => File::open(path)?.sync_all(),
            None => Ok(()),
        }
    }

    /// The zone's file, for a private mapping of what another pod left in it.
    fn kept(&self) -> io::Result<File> {
        let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, reason);
        if self.file.as_ref().is_none_or(|path| !path.is_file()) {
            return Err(invalid(
                "the pod's memory is in the zone's file: give the file that it was saved with",
            ));
        }
        let file = self.backing()?;
        file.ok_or_else(|| invalid("the zone has no file"))
    }

    fn failed(&self, source: io::Error) -> RamError {
        RamError::Zone {
            id: self.id.clone(),
            file: self.file.clone().unwrap_or_default(),
            source,
        }
    }

    /// What is behind the zone, if that is a file, with a name or without.
    fn backing(&self) -> io::Result<Option<File>> {
        match &self.file {
            Some(path) if path.is_dir() => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_TMPFILE)
                    .mode(0o600)
                    .open(path)?;
                file.set_len(self.size)?;
                Ok(Some(file))
            }
            Some(path) => {
                // What is mapped privately is another pod's, perhaps, and only read.
                let shared = self.options.shared;
                let file = OpenOptions::new()
                    .read(true)
                    .write(shared)
                    .create(shared)
                    .mode(0o600)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)?;
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "not a regular file or directory",
                    ));
                }
                match metadata.len() {
                    len if len >= self.size => {}
                    _ if shared => file.set_len(self.size)?,
                    len => {
                        let reason = format!(
                            "it has {len} bytes, the zone {}: a file that is mapped privately must hold all of it",
                            self.size
                        );
                        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
                    }
                }
                Ok(Some(file))
            }
            None if self.options.shared || self.options.hugepages => {
                let file = sys::memfd(c"podvisor-zone", self.options.hugepages)?;
                file.set_len(self.size)?;
                Ok(Some(file))
            }
            None => Ok(None),
        }
    }

    fn map(&self, piece: &Piece, file: Option<&File>) -> io::Result<GuestRegionMmap> {
        let size = usize::try_from(piece.len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // Huge pages without a name are shared: a private copy would double what is scarce.
        let shared = self.options.shared || (self.options.hugepages && self.file.is_none());
        let mut flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if !self.options.hugepages {
            // Huge pages are the zone's from the start: a touch without one would be the monitor's end.
            flags |= libc::MAP_NORESERVE;
        }
        match file {
            Some(file) => builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, piece.offset)),
            None => flags |= libc::MAP_ANONYMOUS,
        }
        let huge = self.options.hugepages && self.file.is_none();
        let region = builder.with_mmap_flags(flags).with_hugetlbfs(huge).build();
        GuestRegionMmap::new(region.map_err(io::Error::other)?, GuestAddress(piece.gpa))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }
}

impl GuestRam {
    /// Maps the RAM that `zones` make, lazily; files with a name are made and made longer as they need to be, if they are
    /// shared.
    ///
    /// # Errors
    /// When the host cannot, by the zone's name.
    pub fn in_zones(zones: &[Zone]) -> Result<Self, RamError> {
        let sizes: Vec<u64> = zones.iter().map(|zone| zone.size).collect();
        let mut files = Vec::new();
        for zone in zones {
            files.push(zone.backing().map_err(|e| zone.failed(e))?);
        }
        let mut regions = Vec::new();
        for piece in pieces(&sizes) {
            let (Some(zone), Some(file)) = (zones.get(piece.zone), files.get(piece.zone)) else {
                continue;
            };
            let region = zone.map(&piece, file.as_ref()).map_err(|e| zone.failed(e))?;
            advise(host_address(&region), piece.len, piece.gpa, &zone.options)?;
            regions.push(Arc::new(region));
        }
        Ok(Self { regions })
    }
}

impl GuestRam {
    /// Maps the RAM of a snapshot privately: zones of `kept` from their own files, the others from `memory`.
    ///
    /// # Errors
    /// When the host cannot, or a zone is to be shared or in huge pages, by its name.
    pub fn from_zones(zones: &[Zone], kept: &[&str], memory: Option<&File>) -> Result<Self, RamError> {
        let sizes: Vec<u64> = zones.iter().map(|zone| zone.size).collect();
        let mut files = Vec::new();
        for zone in zones {
            if zone.options.shared || zone.options.hugepages {
                let reason = "shared and hugepages must be off: a restored pod has its memory mapped privately";
                return Err(zone.failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
            }
            let own = kept.contains(&zone.id.as_str()).then(|| zone.kept()).transpose();
            files.push(own.map_err(|e| zone.failed(e))?);
        }
        let mut regions = Vec::new();
        let mut at = 0;
        for piece in pieces(&sizes) {
            let (Some(zone), Some(file)) = (zones.get(piece.zone), files.get(piece.zone)) else {
                continue;
            };
            let (file, offset) = match file {
                Some(file) => (Some(file), piece.offset),
                None => (memory, at),
            };
            let file = file.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
            let mapped = file
                .and_then(File::try_clone)
                .and_then(|file| map_private(piece.gpa, piece.len, FileOffset::new(file, offset)));
            let region = mapped.map_err(|e| zone.failed(e))?;
            advise(host_address(&region), piece.len, piece.gpa, &zone.options)?;
            regions.push(Arc::new(region));
            at += piece.len;
        }
        Ok(Self { regions })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    fn zone(id: &str, size: u64, file: Option<PathBuf>, shared: bool) -> Zone {
        Zone {
            id: id.to_owned(),
            size,
            file,
            options: RamOptions {
                shared,
                ..Default::default()
            },
            hotplug_size: 0,
            hotplugged_size: 0,
        }
    }

    #[test]
    fn zones_lie_behind_each_other_around_the_hole() {
        let piece = |gpa, len, zone, offset| Piece { gpa, len, zone, offset };
        assert_eq!(
            pieces(&[1 << 30, 3 << 30, 1 << 30]),
            [
                piece(0, 1 << 30, 0, 0),
                piece(1 << 30, 2 << 30, 1, 0),
                piece(4 << 30, 1 << 30, 1, 2 << 30),
                piece(5 << 30, 1 << 30, 2, 0),
            ]
        );
        assert_eq!(
            pieces(&[3 << 30, 4096]),
            [piece(0, 3 << 30, 0, 0), piece(4 << 30, 4096, 1, 0)]
        );
    }

    #[test]
    fn a_shared_zone_is_its_file_and_a_private_one_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zone");
        let zones = [
            zone("a", 1 << 20, None, false),
            zone("b", 2 << 20, Some(path.clone()), true),
            zone("c", 1 << 20, None, true),
            zone("d", 1 << 20, Some(dir.path().to_owned()), true),
        ];
        let at = GuestAddress(0x18_0000);
        {
            let ram = GuestRam::in_zones(&zones).unwrap();
            assert_eq!(ram.size(), 5 << 20);
            let all = ram.launch_memory().unwrap();
            all.write_obj(7u32, at).unwrap();
            // Over the edge of two zones.
            all.write_slice(&[1; 4096], GuestAddress((1 << 20) - 2048)).unwrap();
        }
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2 << 20);
        let mut byte = [0; 4];
        file.read_exact_at(&mut byte, 0x8_0000).unwrap();
        assert_eq!(u32::from_le_bytes(byte), 7);
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "files in a directory have no name"
        );
        let private = [
            zone("a", 1 << 20, None, false),
            zone("b", 2 << 20, Some(path.clone()), false),
        ];
        let ram = GuestRam::in_zones(&private).unwrap();
        let all = ram.launch_memory().unwrap();
        assert_eq!(all.read_obj::<u32>(at).unwrap(), 7);
        all.write_obj(8u32, at).unwrap();
        file.read_exact_at(&mut byte, 0x8_0000).unwrap();
        assert_eq!(u32::from_le_bytes(byte), 7, "the file is as it was");
    }

    #[test]
    fn files_that_cannot_be_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let short = dir.path().join("short");
        File::create(&short).unwrap().set_len(4096).unwrap();
        for (file, shared, words) in [
            (short.clone(), false, "4096"),
            (dir.path().join("none"), false, "none"),
            (PathBuf::from("/dev/null"), true, "regular"),
        ] {
            let error = GuestRam::in_zones(&[zone("mem0", 1 << 20, Some(file), shared)])
                .err()
                .unwrap();
            let mut text = error.to_string();
            text += &std::error::Error::source(&error).unwrap().to_string();
            assert!(text.contains("mem0") && text.contains(words), "{text}");
        }
        GuestRam::in_zones(&[zone("mem0", 1 << 20, Some(short.clone()), true)]).unwrap();
        assert_eq!(short.metadata().unwrap().len(), 1 << 20, "a shared file is made longer");
    }
}
