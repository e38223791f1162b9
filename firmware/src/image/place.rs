//! Where the parts of an image lie in guest memory: the kernel where it wants to be, the initrd behind it, and behind both
//! the digests of their chunks and, under SEV-SNP, the shared pages that they are copied from.

use super::kernel::Kernel;
use crate::layout::MEM_32BIT_RESERVED_START;
use crate::plan::{PAGE_SIZE, Platform};
use crate::stage0::abi::{CHUNK_SIZE, DIGEST_LEN, MAX_CHUNKS, Payload};

/// Shared memory begins on one of these, so that it splits no large page of the private memory below it.
const LARGE_PAGE: u64 = 2 << 20;

/// Why there is no place.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// Beyond where it can be.
    #[error("{what} of {len} bytes would end at {end:#x}, and must end at or below {limit:#x}; use a smaller one")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its length.
        len: u64,
        /// Where it would end.
        end: u64,
        /// Where it may end.
        limit: u64,
    },
    /// More than the digests can pin.
    #[error("kernel and initrd have {len} bytes together, and an image holds {limit}; use smaller ones")]
    Chunks {
        /// Their length.
        len: u64,
        /// What an image holds.
        limit: u64,
    },
}

/// Where things lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The kernel.
    pub kernel: Payload,
    /// The initrd; all zero when there is none.
    pub initrd: Payload,
    /// GPA of the chunk digests.
    pub chunks: u64,
    /// Number of chunk digests.
    pub chunk_count: usize,
    /// End of everything.
    pub end: u64,
}

impl Places {
    /// Finds places for `kernel` and an initrd of `initrd` bytes.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub fn find(kernel: &Kernel<'_>, initrd: u64, platform: Platform, in_place: bool) -> Result<Self, PlaceError> {
        let len = kernel.payload.len() as u64;
        let chunks = len.div_ceil(CHUNK_SIZE).saturating_add(initrd.div_ceil(CHUNK_SIZE));
        let chunk_count = usize::try_from(chunks).ok().filter(|count| *count <= MAX_CHUNKS);
        let chunk_count = chunk_count.ok_or(PlaceError::Chunks {
            len: len.saturating_add(initrd),
            limit: MAX_CHUNKS as u64 * CHUNK_SIZE,
        })?;
        let mut next = kernel.dest;
        let mut take = |what, len: u64, limit: u64| {
            let start = next;
            let end = start.saturating_add(len);
            if end > limit {
                return Err(PlaceError::TooLarge { what, len, end, limit });
            }
            next = end.next_multiple_of(PAGE_SIZE);
            Ok((start, next))
        };
        const LIMIT: u64 = MEM_32BIT_RESERVED_START;
        let (dest, _) = take("the kernel", kernel.memory_len, LIMIT)?;
        let last = kernel.initrd_addr_max.saturating_add(1);
        let (initrd_dest, _) = take("the initrd", initrd, last.min(LIMIT))?;
        let staged_apart = platform == Platform::SevSnp && !in_place;
        if staged_apart {
            let (start, _) = take("the room between", 0, LIMIT)?;
            take("the room between", start.next_multiple_of(LARGE_PAGE) - start, LIMIT)?;
        }
        let (chunks, mut end) = take("the table of digests", (chunk_count * DIGEST_LEN) as u64, LIMIT)?;
        let (mut staged, mut initrd_staged) = (dest, initrd_dest);
        if staged_apart {
            (staged, _) = take("the kernel's shared copy", len, LIMIT)?;
            (initrd_staged, end) = take("the initrd's shared copy", initrd, LIMIT)?;
        }
        let initrd = if initrd == 0 {
            Payload::default()
        } else {
            Payload {
                staged: initrd_staged,
                dest: initrd_dest,
                len: initrd,
                memory_len: initrd,
                entry: 0,
            }
        };
        Ok(Self {
            kernel: Payload {
                staged,
                dest,
                len,
                memory_len: kernel.memory_len,
                entry: kernel.entry,
            },
            initrd,
            chunks,
            chunk_count,
            end,
        })
    }
}
