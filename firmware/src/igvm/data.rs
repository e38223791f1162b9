//! The data of an IGVM file under construction: pages stored once each, and long runs of pages, borrowed as they are. And
//! the finished file, in the parts that it is written in.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;

use super::build::BuildError;
use crate::plan::PAGE_SIZE;

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// A finished IGVM file in parts; payloads are borrowed from the plans that it was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assembled<'p> {
    parts: Vec<Cow<'p, [u8]>>,
}

impl<'p> Assembled<'p> {
    pub(super) fn new(head: Vec<u8>, data: Data<'p>) -> Self {
        let mut parts = vec![Cow::Owned(head)];
        parts.extend(data.parts);
        Self { parts }
    }

    /// Length of the file.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no file is empty")]
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Writes the file, in few and large writes.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write_to(&self, to: &mut dyn io::Write) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| to.write_all(part))
    }

    /// The file in one piece.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.parts.concat()
    }
}

/// File data; offsets count from its start.
#[derive(Debug, Default)]
pub(super) struct Data<'p> {
    parts: Vec<Cow<'p, [u8]>>,
    len: u64,
    pages: HashMap<Cow<'p, [u8]>, u32>,
    runs: Vec<(&'p [u8], u32)>,
}

impl<'p> Data<'p> {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn offset(&self) -> Result<u32, BuildError> {
        u32::try_from(self.len).map_err(|_| BuildError::TooLarge)
    }

    fn push(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        match self.parts.last_mut() {
            Some(Cow::Owned(last)) => last.extend_from_slice(bytes),
            _ => self.parts.push(Cow::Owned(bytes.to_vec())),
        }
    }

    /// Adds zeros up to whole pages.
    fn pad(&mut self) {
        let part = usize::try_from(self.len % PAGE_SIZE).unwrap_or(0);
        if let Some(zeros) = [0; PAGE].get(part..).filter(|zeros| zeros.len() < PAGE) {
            self.push(zeros);
        }
    }

    /// Adds `bytes` and zeros up to whole pages; where they are.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<u32, BuildError> {
        let at = self.offset()?;
        self.push(bytes);
        self.pad();
        Ok(at)
    }

    /// Stores a page, or finds it; where it is.
    pub(super) fn page(&mut self, page: Cow<'p, [u8]>) -> Result<u32, BuildError> {
        if let Some(at) = self.pages.get(&page) {
            return Ok(*at);
        }
        let at = self.append(&page)?;
        self.pages.insert(page, at);
        Ok(at)
    }

    /// Stores a run of pages, or finds it as a whole; where it is. It is not copied.
    pub(super) fn run(&mut self, run: &'p [u8]) -> Result<u32, BuildError> {
        if let Some((_, at)) = self.runs.iter().find(|(known, _)| same_bytes(known, run)) {
            return Ok(*at);
        }
        let at = self.offset()?;
        self.len += run.len() as u64;
        self.parts.push(Cow::Borrowed(run));
        self.pad();
        self.offset()?;
        self.runs.push((run, at));
        Ok(at)
    }

    /// Makes it at least `len` bytes long.
    pub(super) fn at_least(&mut self, len: usize) {
        let missing = (len as u64).saturating_sub(self.len);
        self.push(&vec![0; usize::try_from(missing).unwrap_or(0)]);
    }
}

/// Whether two slices hold the same; at once when they are one.
pub(super) fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    std::ptr::eq(a, b) || a == b
}
