//! The directory tree that the demo's pod walks: made anew for each run, its hashes kept by the host.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};

use super::pattern::pattern;

/// Files in the tree.
pub(crate) const FILES: usize = 120;
/// Folders they are spread over.
const FOLDERS: usize = 10;
/// Bytes in the tree, together: 32 MiB and a little.
pub(crate) const BYTES: usize = FILES / 8 * (SMALL * 7 + LARGE);
const SMALL: usize = 96 * 1024 + 17;
const LARGE: usize = 1_600_000;

/// SHA-256 in lower-case hex.
#[must_use]
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    crate::hex::encode(digest(&SHA256, bytes).as_ref())
}

/// What the tree holds: SHA-256 and size by path relative to its root.
pub(crate) type Manifest = BTreeMap<String, (String, usize)>;

/// Makes the tree below `root` (which exists) from `seed`.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn make(root: &Path, seed: u64) -> io::Result<Manifest> {
    let mut manifest = Manifest::new();
    for folder in 0..FOLDERS {
        fs::create_dir(root.join(format!("folder-{folder}")))?;
    }
    for file in 0..FILES {
        let path = format!("folder-{}/file-{file:03}.bin", file % FOLDERS);
        let contents = pattern(seed ^ file as u64, if file % 8 == 0 { LARGE } else { SMALL });
        fs::write(root.join(&path), &contents)?;
        manifest.insert(path, (sha256_hex(&contents), contents.len()));
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_as_large_as_promised_and_differs_by_seed() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let (one, two) = (make(&a, 1).unwrap(), make(&b, 2).unwrap());
        assert_eq!(one.len(), FILES);
        assert_eq!(one.values().map(|(_, size)| size).sum::<usize>(), BYTES);
        const { assert!(BYTES >= 32 << 20 && FILES >= 100) };
        for (path, (hash, size)) in &one {
            let contents = fs::read(a.join(path)).unwrap();
            assert_eq!((&sha256_hex(&contents), &contents.len()), (hash, size));
            assert_ne!(two[path].0, *hash);
        }
    }
}
