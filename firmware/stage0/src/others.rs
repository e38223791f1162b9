//! The other processors: they are started to share the work, and put back to where they were.

use stage0::abi;
use stage0::accept::Ranges;
use stage0::layout;
use stage0::manifest::Image;
use stage0::refusal::{Refusal, What};
use stage0::sha256::{self, Engine};
use stage0::work::Queue;

use crate::machine::memory::{self, Lent};
use crate::platform::{self, Platform};

/// The page below 1 MiB that they start in.
pub(crate) const START_PAGE: u64 = 0x8000;

/// Interrupt command register of the local APIC (Intel SDM volume 3, 11.6.1; AMD APM volume 2, 16.5).
const ICR: u64 = layout::APIC_START + 0x300;
const ALL_BUT_SELF: u32 = 3 << 18;
const ASSERT: u32 = 1 << 14;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;

static QUEUE: Queue = Queue::new();
static JOB: Lent<Job> = Lent::new();

/// All that is to be done, in items: first memory to accept, then chunks to copy and hash.
pub(crate) struct Job {
    /// What runs stage0.
    pub(crate) platform: &'static dyn Platform,
    /// What is booted.
    pub(crate) image: Image<'static>,
    /// Memory to accept.
    pub(crate) ranges: Ranges,
    /// How to hash.
    pub(crate) engine: Engine,
    /// The chunk digests, private.
    pub(crate) digests: &'static [u8],
}

/// One chunk of a payload.
struct Chunk {
    what: What,
    /// Its number in the payload.
    number: usize,
    staged: u64,
    dest: u64,
    len: u64,
}

impl Job {
    fn chunk(&self, index: usize) -> Option<Chunk> {
        let mut number = index;
        for (what, payload) in [(What::Kernel, &self.image.kernel), (What::Initrd, &self.image.initrd)] {
            let count = stage0::manifest::chunks_of(payload.len) as usize;
            if number < count {
                let at = number as u64 * abi::CHUNK_SIZE;
                return Some(Chunk {
                    what,
                    number,
                    staged: payload.staged + at,
                    dest: payload.dest + at,
                    len: abi::CHUNK_SIZE.min(payload.len - at),
                });
            }
            number -= count;
        }
        None
    }

    /// Accepts the chunk's pages and copies it there, unless it lies there, and hashes it.
    fn take(&self, index: usize) -> Result<(), Refusal> {
        let chunk = self.chunk(index).ok_or(Refusal::Internal("no such chunk"))?;
        let copy = memory::write(chunk.dest, chunk.len as usize);
        // What lies there already was accepted by the launch.
        if chunk.staged != chunk.dest {
            platform::accept(self.platform, &stage0::manifest::pages(chunk.dest, chunk.len))?;
            if self.platform.confidential() {
                memory::copy_shared(chunk.staged, copy);
            } else {
                copy.copy_from_slice(memory::read(chunk.staged, copy.len()));
            }
        }
        let digest = sha256::digest(self.engine, copy);
        let wanted = self.digests.chunks_exact(abi::DIGEST_LEN).nth(index);
        if wanted == Some(&digest[..]) {
            return Ok(());
        }
        Err(Refusal::Payload {
            what: chunk.what,
            chunk: chunk.number,
        })
    }

    fn item(&self, index: usize) -> Result<(), Refusal> {
        match self.ranges.piece(index) {
            Some(piece) => platform::accept(self.platform, &piece),
            None => self.take(index - self.ranges.pieces()),
        }
    }
}

/// Does all of the job, with the other `helpers` processors if that is worth it.
///
/// # Errors
/// The refusal of the lowest item that failed.
pub(crate) fn share_out(job: Job, helpers: u32) -> Result<(), Refusal> {
    let total = job.ranges.pieces() + job.image.chunk_count;
    let job = JOB.lend(job).ok_or(Refusal::Internal("the job is lost"))?;
    let start = helpers > 0 && job.image.chunk_count > 1 && job.platform.starts_others();
    QUEUE.open(total);
    if start {
        memory::put_trampoline(START_PAGE);
        memory::write_register(ICR, ALL_BUT_SELF | ASSERT | INIT);
        memory::write_register(ICR, ALL_BUT_SELF | ASSERT | STARTUP | (START_PAGE >> 12) as u32);
    }
    let mut mine = None;
    QUEUE.help(|index| {
        let outcome = job.item(index);
        if let Err(refusal) = outcome {
            mine.get_or_insert((index, refusal));
        }
        outcome.is_ok()
    });
    let failed = QUEUE.wait();
    if start {
        // Back to waiting for Linux's SIPI, wherever they are.
        memory::write_register(ICR, ALL_BUT_SELF | ASSERT | INIT);
    }
    match (failed, mine) {
        (None, _) => Ok(()),
        (Some(index), Some((seen, refusal))) if seen == index => Err(refusal),
        // Another processor's: what it saw is seen again, and where memory was accepted meanwhile, that is what is told.
        (Some(index), _) => job.item(index).and(Err(Refusal::Internal("an item failed once"))),
    }
}

/// What another processor does.
pub(crate) fn help() {
    if let Some(job) = JOB.get() {
        QUEUE.help(|index| job.item(index).is_ok());
    }
}
