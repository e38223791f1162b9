//! Finds stage0's manifest in a launch plan and checks the payloads against it, to tell people what an image boots. For
//! hostile images: nothing in the manifest is believed.

use std::borrow::Cow;

use zerocopy::FromBytes;

use super::Sha256;
use crate::plan::{LaunchPlan, Step};
use crate::stage0::abi::{CHUNK_SIZE, DIGEST_LEN, MAGIC, MANIFEST_END, MANIFEST_START, MAX_CHUNKS, Manifest, Span};

/// Why a manifest cannot be read.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    /// It is too short, or a field points outside.
    #[error("stage0's manifest: {0} lies outside it")]
    Outside(&'static str),
    /// Of another version.
    #[error("stage0's manifest has version {0}, which is not known here")]
    Version(u32),
}

/// Whether payloads are those that the manifest pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payloads {
    /// They are.
    Match,
    /// They are not, or are not in the image; where.
    Differ(String),
}

/// A manifest, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage0Image {
    /// The manifest's head.
    pub manifest: Manifest,
    /// The kernel command line.
    pub command_line: String,
    /// Whether kernel and initrd in the image are what the manifest pins.
    pub payloads: Payloads,
}

/// The manifest of `plan`; none when its image is not stage0's.
///
/// # Errors
/// [`ManifestError`].
pub fn read(plan: &LaunchPlan<'_>, sha256: Sha256<'_>) -> Result<Option<Stage0Image>, ManifestError> {
    let memory = Memory::new(plan);
    let most = MANIFEST_END - MANIFEST_START;
    let Some(head) = memory.read(MANIFEST_START, size_of::<Manifest>() as u64) else {
        return Ok(None);
    };
    let Ok(manifest) = Manifest::read_from_bytes(&head) else {
        return Ok(None);
    };
    if manifest.magic != MAGIC {
        return Ok(None);
    }
    if manifest.version != crate::stage0::abi::VERSION {
        return Err(ManifestError::Version(manifest.version));
    }
    let bytes = Some(u64::from(manifest.len)).filter(|len| *len <= most);
    let bytes = bytes.and_then(|len| memory.read(MANIFEST_START, len));
    let bytes = bytes.ok_or(ManifestError::Outside("its end"))?;
    let text = span(&bytes, manifest.command_line).ok_or(ManifestError::Outside("command_line"))?;
    let command_line = String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned();
    let payloads = match check(&memory, &manifest, sha256) {
        Ok(()) => Payloads::Match,
        Err(what) => Payloads::Differ(what),
    };
    Ok(Some(Stage0Image {
        manifest,
        command_line,
        payloads,
    }))
}

fn span(bytes: &[u8], span: Span) -> Option<&[u8]> {
    let start = usize::try_from(span.offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(span.len).ok()?)?)
}

fn check(memory: &Memory<'_>, manifest: &Manifest, sha256: Sha256<'_>) -> Result<(), String> {
    let count = usize::try_from(manifest.chunk_count).unwrap_or(usize::MAX);
    let payloads = [("kernel", manifest.kernel), ("initrd", manifest.initrd)];
    let chunks = payloads
        .iter()
        .fold(0u64, |sum, (_, p)| sum.saturating_add(p.len.div_ceil(CHUNK_SIZE)));
    if count > MAX_CHUNKS || chunks != count as u64 {
        return Err(format!("the manifest names {count} chunks, its payloads have {chunks}"));
    }
    let table = memory.read(manifest.chunks, (count * DIGEST_LEN) as u64);
    let table = table.ok_or("the chunk digests are not in the image")?;
    if sha256(&table) != manifest.chunks_digest {
        return Err("the chunk digests are not those that are measured".to_owned());
    }
    let mut digests = table.chunks(DIGEST_LEN);
    for (name, payload) in payloads {
        let bytes = memory.read(payload.staged, payload.len);
        let bytes = bytes.ok_or_else(|| format!("the {name} is not in the image"))?;
        let size = usize::try_from(CHUNK_SIZE).unwrap_or(usize::MAX);
        for (number, chunk) in bytes.chunks(size).enumerate() {
            if digests.next() != Some(&sha256(chunk)[..]) {
                return Err(format!("chunk {number} of the {name} is not the one that is measured"));
            }
        }
    }
    Ok(())
}

/// Guest memory as a plan fills it: data by address.
struct Memory<'m>(Vec<(u64, &'m [u8])>);

impl<'m> Memory<'m> {
    fn new(plan: &'m LaunchPlan<'_>) -> Self {
        let mut parts: Vec<(u64, &[u8])> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Pages { gpa, data, .. } if !data.is_empty() => Some((*gpa, &**data)),
                _ => None,
            })
            .collect();
        parts.sort_by_key(|(gpa, _)| *gpa);
        Self(parts)
    }

    /// The bytes at `start`; borrowed when one step holds all of them.
    fn read(&self, start: u64, len: u64) -> Option<Cow<'m, [u8]>> {
        let len = usize::try_from(len).ok()?;
        let first = self.at(start).unwrap_or_default();
        if let Some(all) = first.get(..len) {
            return Some(Cow::Borrowed(all));
        }
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let part = self.at(start.checked_add(bytes.len() as u64)?)?;
            bytes.extend_from_slice(part.get(..len - bytes.len()).unwrap_or(part));
        }
        Some(Cow::Owned(bytes))
    }

    /// Data from `address` to the end of the step that holds it.
    fn at(&self, address: u64) -> Option<&'m [u8]> {
        let after = self.0.partition_point(|(gpa, _)| *gpa <= address);
        let (gpa, data) = self.0.get(after.checked_sub(1)?)?;
        let offset = usize::try_from(address.checked_sub(*gpa)?).ok()?;
        data.get(offset..).filter(|rest| !rest.is_empty())
    }
}
