//! Gathers page directives into steps: neighbours in guest memory whose data are neighbours in the file become one
//! step, so that a launch works on ranges and points straight into the file. Also finds overlaps, by sorting.

use std::borrow::Cow;

use igvm_defs::IgvmVariableHeaderType as Vht;

use super::IgvmError;
use super::error::Reason;
use super::headers::{Header, type_name};
use crate::plan::{PAGE_SIZE, PageKind, Step};

/// A run of pages being gathered.
#[derive(Clone, Copy, Debug)]
struct Run {
    gpa: u64,
    len: u64,
    kind: PageKind,
    /// File offset of the data, none for zeros.
    data: Option<u64>,
}

/// The steps of a plan under construction.
#[derive(Debug, Default)]
pub(super) struct Steps<'a> {
    file: &'a [u8],
    steps: Vec<Step<'a>>,
    run: Option<Run>,
}

impl<'a> Steps<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self {
            file,
            steps: Vec::new(),
            run: None,
        }
    }

    /// Adds a page whose data, if any, was found to be inside the file.
    pub(super) fn page(&mut self, gpa: u64, kind: PageKind, data: Option<u64>) {
        if let Some(run) = &mut self.run {
            let follows = match (run.data, data) {
                (Some(start), Some(next)) => start.checked_add(run.len) == Some(next),
                (None, None) => true,
                _ => false,
            };
            if follows && run.kind == kind && run.gpa.checked_add(run.len) == Some(gpa) {
                run.len = run.len.saturating_add(PAGE_SIZE);
                return;
            }
        }
        self.flush();
        self.run = Some(Run {
            gpa,
            len: PAGE_SIZE,
            kind,
            data,
        });
    }

    /// Adds a step that is not pages.
    pub(super) fn push(&mut self, step: Step<'a>) {
        self.flush();
        self.steps.push(step);
    }

    pub(super) fn finish(mut self) -> Vec<Step<'a>> {
        self.flush();
        self.steps
    }

    fn flush(&mut self) {
        let Some(Run { gpa, len, kind, data }) = self.run.take() else {
            return;
        };
        let data = data
            .and_then(|start| {
                Some((
                    usize::try_from(start).ok()?,
                    usize::try_from(start.checked_add(len)?).ok()?,
                ))
            })
            .and_then(|(start, end)| self.file.get(start..end))
            .unwrap_or_default();
        self.steps.push(Step::Pages {
            gpa,
            len,
            kind,
            data: Cow::Borrowed(data),
        });
    }
}

/// Memory that one header fills; 32 bytes, since a file may have millions.
#[derive(Clone, Copy, Debug)]
struct Claim {
    gpa: u64,
    len: u64,
    index: u32,
    offset: u32,
    typ: Vht,
}

/// All the memory that headers fill, to find overlaps in n·log n.
#[derive(Debug, Default)]
pub(super) struct Claims(Vec<Claim>);

impl Claims {
    /// `header` fills `[gpa, gpa + len)`, which ends below 2^52.
    pub(super) fn add(&mut self, header: &Header<'_>, gpa: u64, len: u64) {
        // Offsets in a file are 32 bits wide, and no header is shorter than a byte.
        let index = u32::try_from(header.index).unwrap_or(u32::MAX);
        let offset = u32::try_from(header.offset).unwrap_or(u32::MAX);
        self.0.push(Claim {
            gpa,
            len,
            index,
            offset,
            typ: header.typ,
        });
    }

    /// Refuses the later of two headers that fill the same memory.
    pub(super) fn check(mut self) -> Result<(), IgvmError> {
        self.0.sort_by_key(|claim| claim.gpa);
        for pair in self.0.windows(2) {
            let [low, high] = pair else { continue };
            if low.gpa.saturating_add(low.len) > high.gpa {
                let (first, second) = if low.index < high.index {
                    (low, high)
                } else {
                    (high, low)
                };
                return Err(IgvmError {
                    header: type_name(second.typ),
                    index: Some(second.index as usize),
                    offset: u64::from(second.offset),
                    reason: Reason::Overlap {
                        gpa: second.gpa,
                        len: second.len,
                        other: first.index as usize,
                        other_offset: u64::from(first.offset),
                    },
                });
            }
        }
        Ok(())
    }
}
