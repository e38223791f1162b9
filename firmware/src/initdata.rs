//! Initdata of Confidential Containers: the TOML that a pod's owner writes, and the disk in which it reaches the guest. What
//! becomes HOST_DATA is the hash of the exact TOML, by the algorithm that it names; hashing is the caller's.
//! Source: Kata kata-types/src/initdata.rs; the disk: the magic `initdata`, u64 little-endian length, gzip of the TOML.

use std::borrow::Cow;
use std::io::Read as _;

use flate2::read::GzDecoder;

const MAGIC: &[u8; 8] = b"initdata";
/// Most bytes of the TOML: more than any policy, and little enough to unpack from a hostile disk.
pub const MAX_TOML: u64 = 4 << 20;

/// The hash algorithm that initdata names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// SHA-256.
    Sha256,
    /// SHA-384, of which the first 32 bytes are HOST_DATA.
    Sha384,
    /// SHA-512, of which the first 32 bytes are HOST_DATA.
    Sha512,
}

/// Why a file is no initdata.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InitdataError {
    /// The disk ends before what its length names.
    #[error("initdata disk: breaks off: its length field names {0} bytes of gzip")]
    Length(u64),
    /// What is in the disk.
    #[error("initdata disk: not gzip ({0})")]
    Gzip(String),
    /// More than [`MAX_TOML`].
    #[error("initdata: longer than {MAX_TOML} bytes")]
    TooLong,
    /// A line before the first table.
    #[error("initdata line {0}: must be `name = \"value\"`, a comment or a table, on one line")]
    Line(usize),
    /// The version.
    #[error("initdata: `version` must be there once, and be \"0.1.0\"")]
    Version,
    /// The algorithm.
    #[error("initdata: `algorithm` must be there once, and be sha256, sha384 or sha512")]
    Algorithm,
}

/// The TOML of `file`, which is the TOML or a disk with it, and its algorithm.
///
/// # Errors
/// [`InitdataError`].
pub fn read(file: &[u8]) -> Result<(Cow<'_, [u8]>, Algorithm), InitdataError> {
    let toml = match file.strip_prefix(MAGIC) {
        Some(disk) => Cow::Owned(unpack(disk)?),
        None => Cow::Borrowed(file),
    };
    if toml.len() as u64 > MAX_TOML {
        return Err(InitdataError::TooLong);
    }
    let algorithm = algorithm(&toml)?;
    Ok((toml, algorithm))
}

/// What a disk holds behind its magic.
fn unpack(disk: &[u8]) -> Result<Vec<u8>, InitdataError> {
    let (len, rest) = disk.split_first_chunk().ok_or(InitdataError::Length(0))?;
    let len = u64::from_le_bytes(*len);
    let packed = usize::try_from(len).ok().and_then(|len| rest.get(..len));
    let mut toml = Vec::new();
    GzDecoder::new(packed.ok_or(InitdataError::Length(len))?)
        .take(MAX_TOML + 1)
        .read_to_end(&mut toml)
        .map_err(|e| InitdataError::Gzip(e.to_string()))?;
    Ok(toml)
}

/// The algorithm, of the keys before the first table. They are read in TOML's plainest form only, so that nothing is taken
/// otherwise than a reader of all of TOML takes it.
fn algorithm(toml: &[u8]) -> Result<Algorithm, InitdataError> {
    let (mut version, mut algorithm) = (Vec::new(), Vec::new());
    for (index, line) in toml.split(|byte| *byte == b'\n').enumerate() {
        let bad = || InitdataError::Line(index + 1);
        let line = std::str::from_utf8(line).map_err(|_| bad())?.trim();
        if line.starts_with('[') {
            break;
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, rest) = line.split_once('=').ok_or_else(bad)?;
        let rest = rest.trim();
        let quote = rest
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''))
            .ok_or_else(bad)?;
        let (value, after) = rest.get(1..).and_then(|rest| rest.split_once(quote)).ok_or_else(bad)?;
        let after = after.trim();
        if value.contains('\\') || !(after.is_empty() || after.starts_with('#')) {
            return Err(bad());
        }
        match name.trim() {
            "version" => version.push(value),
            "algorithm" => algorithm.push(value),
            name if !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || b"_-".contains(&c)) => {}
            _ => return Err(bad()),
        }
    }
    if version != ["0.1.0"] {
        return Err(InitdataError::Version);
    }
    match algorithm[..] {
        ["sha256"] => Ok(Algorithm::Sha256),
        ["sha384"] => Ok(Algorithm::Sha384),
        ["sha512"] => Ok(Algorithm::Sha512),
        _ => Err(InitdataError::Algorithm),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const TOML: &str =
        "# pod\nversion = \"0.1.0\"\nalgorithm = 'sha384' # of this file\n\n[data]\n\"policy.rego\" = '''\nx\n'''\n";

    fn disk(toml: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(toml).unwrap();
        let packed = packed.finish().unwrap();
        let mut disk = [&MAGIC[..], &(packed.len() as u64).to_le_bytes(), &packed].concat();
        // A disk is whole sectors.
        disk.resize(disk.len().next_multiple_of(512), 0);
        disk
    }

    #[test]
    fn a_disk_and_its_toml_are_read_alike() {
        let packed = disk(TOML.as_bytes());
        let (toml, algorithm) = read(&packed).unwrap();
        assert_eq!((&toml[..], algorithm), (TOML.as_bytes(), Algorithm::Sha384));
        assert_eq!(read(TOML.as_bytes()).unwrap(), (toml, algorithm));
    }

    #[test]
    fn what_is_no_initdata_is_refused_by_name() {
        let of = |text: &str| read(text.as_bytes()).unwrap_err();
        assert_eq!(of(""), InitdataError::Version);
        assert_eq!(of("version = \"0.1.0\""), InitdataError::Algorithm);
        assert_eq!(of("version = \"0.1.0\"\nalgorithm = \"md5\""), InitdataError::Algorithm);
        assert_eq!(of("[data]\nversion = \"0.1.0\""), InitdataError::Version);
        let twice = format!("algorithm = \"sha256\"\n{TOML}");
        assert_eq!(of(&twice), InitdataError::Algorithm);
        for line in [
            "x = \"\"\"a",
            "x = 1",
            "x",
            "\"algorithm\" = \"sha256\"",
            "x = \"a\\u0041\"",
        ] {
            assert_eq!(of(line), InitdataError::Line(1), "{line}");
        }
        let whole = disk(TOML.as_bytes());
        assert_eq!(read(&whole[..12]), Err(InitdataError::Length(0)));
        assert!(matches!(read(&whole[..40]), Err(InitdataError::Length(len)) if len > 40));
        let mut broken = whole;
        broken[16] ^= 1;
        assert!(matches!(read(&broken), Err(InitdataError::Gzip(_))));
        let bomb = disk(&b"\n".repeat(usize::try_from(MAX_TOML).unwrap() * 2));
        assert_eq!(read(&bomb), Err(InitdataError::TooLong));
    }

    proptest! {
        #[test]
        fn no_disk_panics(at: prop::sample::Index, byte: u8, cut: prop::sample::Index, tail: Vec<u8>) {
            let mut bytes = disk(TOML.as_bytes());
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(cut.index(bytes.len()) + 1);
            bytes.extend(&tail);
            let _ = read(&bytes);
            let _ = read(&tail);
        }
    }
}
