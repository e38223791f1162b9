//! The way from the first Rust instruction to the kernel's, in order. See `docs/stage0.md`.

use stage0::abi;
use stage0::accept::Ranges;
use stage0::boot_params::{self, Facts, Kept, Kind};
use stage0::manifest::{self, Image, Range, pages};
use stage0::map::MemoryMap;
use stage0::refusal::Refusal;
use stage0::sha256::{self, Engine};
use stage0::{PAGE, acpi, madt};

use crate::machine::memory;
use crate::others::{self, Job, START_PAGE};
use crate::platform::{self, Platform};

/// The ACPI tables, up to the end of stage0's memory.
const ACPI_AREA: u64 = 0x1E_0000;
/// The confidential-computing blob.
const BLOB_PAGE: u64 = 0x1D_F000;
/// `boot_params`.
const BOOT_PARAMS: u64 = 0x1D_E000;
const PAGE_LEN: usize = PAGE as usize;

/// What the host said, checked.
struct Host {
    map: MemoryMap,
    vcpus: u32,
    madt: Option<usize>,
    phys_bits: u8,
}

/// Boots what the manifest says.
///
/// # Errors
/// The reason not to.
pub(crate) fn run(platform: &'static dyn Platform) -> Result<core::convert::Infallible, Refusal> {
    platform.start()?;
    let head = memory::read(abi::MANIFEST_START, PAGE_LEN);
    let bytes = memory::read(abi::MANIFEST_START, manifest::length(head)?);
    let image = manifest::read(bytes, platform.confidential())?;
    let host = read_host(platform)?;
    check_memory(&image, &host)?;
    let known = known(platform, &image)?;
    let ranges = if platform.confidential() {
        platform::accept(platform, &start_page())?;
        Ranges::remaining(&host.map, &known)?
    } else {
        Ranges::default()
    };
    let engine = engine(platform, &image);
    let job = Job {
        platform,
        image,
        ranges,
        engine,
        digests: read_digests(platform, &image, engine)?,
    };
    others::share_out(job, host.vcpus - 1)?;
    if shared(platform, &image) {
        for payload in image.payloads() {
            platform.take_back(&pages(payload.staged, payload.len))?;
        }
        platform.take_back(&image.chunk_pages())?;
    }
    describe(platform, &image, &host)?;
    platform.hand_over()?;
    memory::jump(image.kernel.entry, BOOT_PARAMS)
}

/// Whether chunk digests and payloads come in shared pages.
fn shared(platform: &dyn Platform, image: &Image<'_>) -> bool {
    platform.confidential() && !image.all_in_place()
}

fn start_page() -> Range {
    pages(START_PAGE, PAGE)
}

/// Reads and checks the parameters, which are the host's.
fn read_host(platform: &dyn Platform) -> Result<Host, Refusal> {
    let [sizes, ..] = platform.cpuid(0x8000_0008, 0);
    let phys_bits = (sizes & 0xFF) as u8;
    if !(36..=52).contains(&phys_bits) {
        return Err(Refusal::Cpuid("leaf 0x80000008 has no width of physical addresses"));
    }
    let map = MemoryMap::read(memory::read(abi::MEMORY_MAP_PAGE, PAGE_LEN), phys_bits)?;
    let count = memory::read(abi::VP_COUNT_PAGE, PAGE_LEN);
    let vcpus = count.first_chunk().map_or(0, |count| u32::from_le_bytes(*count));
    madt::check_count(vcpus)?;
    let madt = madt::check(memory::read(abi::MADT_PAGE, PAGE_LEN), vcpus)?;
    Ok(Host {
        map,
        vcpus,
        madt,
        phys_bits,
    })
}

/// Everything that the image needs is RAM.
fn check_memory(image: &Image<'_>, host: &Host) -> Result<(), Refusal> {
    let own = Range {
        start: abi::CPUID_PAGE,
        end: abi::STAGE0_END,
    };
    host.map.check_ram(own, "image")?;
    host.map.check_ram(start_page(), "start of processors")?;
    host.map.check_ram(image.chunk_pages(), "chunk list")?;
    for payload in image.payloads() {
        host.map
            .check_ram(pages(payload.staged, payload.len), "staged payload")?;
        host.map.check_ram(pages(payload.dest, payload.memory_len), "payload")?;
    }
    Ok(())
}

/// What is accepted or shared already, or is accepted apart from the rest: the image's pages, stage0's own memory, the
/// staged payloads, and where the payloads go.
fn known(platform: &dyn Platform, image: &Image<'_>) -> Result<Ranges, Refusal> {
    let mut known = Ranges::default();
    known.add(start_page())?;
    known.add(Range {
        start: abi::CPUID_PAGE,
        end: image.pages.end,
    })?;
    known.add(Range {
        start: abi::STAGE0_START,
        end: memory::end(),
    })?;
    known.add(image.chunk_pages())?;
    for payload in image.payloads() {
        known.add(pages(payload.dest, payload.len))?;
        if shared(platform, image) {
            known.add(pages(payload.staged, payload.len))?;
        }
    }
    Ok(known)
}

/// How this processor hashes. Payloads of a few pages need no special instructions, and hypervisors that interpret ring 0 claim
/// some that they do not know.
fn engine(platform: &dyn Platform, image: &Image<'_>) -> Engine {
    const SMALL: u64 = 256 << 10;
    const SSSE3: u32 = 1 << 9;
    const SSE41: u32 = 1 << 19;
    const BMI2: u32 = 1 << 8;
    const SHA: u32 = 1 << 29;
    if image.payloads().all(|payload| payload.len <= SMALL) {
        return Engine::Software;
    }
    let [_, _, features, _] = platform.cpuid(1, 0);
    let [_, more, _, _] = platform.cpuid(7, 0);
    if more & SHA != 0 && features & (SSSE3 | SSE41) == SSSE3 | SSE41 {
        Engine::Extensions
    } else if more & BMI2 != 0 {
        Engine::Bmi2
    } else {
        Engine::Software
    }
}

/// Copies the chunk digests, and checks the copy.
fn read_digests(platform: &dyn Platform, image: &Image<'_>, engine: Engine) -> Result<&'static [u8], Refusal> {
    let digests = memory::digests(image.chunk_count * abi::DIGEST_LEN);
    if shared(platform, image) {
        memory::copy_shared(image.chunks, digests);
    } else {
        digests.copy_from_slice(memory::read(image.chunks, digests.len()));
    }
    if sha256::digest(engine, digests) != image.chunks_digest {
        return Err(Refusal::ChunkList);
    }
    Ok(digests)
}

/// Writes what Linux is told.
fn describe(platform: &dyn Platform, image: &Image<'_>, host: &Host) -> Result<(), Refusal> {
    const NO_PAGE: Refusal = Refusal::Internal("no page");
    let area = memory::write(ACPI_AREA, (abi::STAGE0_END - ACPI_AREA) as usize);
    let madt = host.madt.map(|len| memory::read(abi::MADT_PAGE, len));
    let tables = acpi::lay_out(area, ACPI_AREA, image, madt, host.vcpus, host.phys_bits)?;
    let firmware = Kept {
        range: Range {
            start: abi::CPUID_PAGE,
            end: abi::SECRETS_PAGE + PAGE,
        },
        kind: Kind::Reserved,
    };
    let blob = Kept {
        range: pages(BLOB_PAGE, PAGE),
        kind: Kind::Reserved,
    };
    let acpi = Kept {
        range: pages(ACPI_AREA, tables.len as u64),
        kind: Kind::Acpi,
    };
    let kept = [firmware, blob, acpi];
    let confidential = platform.stays_confidential();
    if confidential {
        let page = memory::write(BLOB_PAGE, PAGE_LEN);
        boot_params::cc_blob(page, BLOB_PAGE, abi::SECRETS_PAGE, abi::CPUID_PAGE).ok_or(NO_PAGE)?;
    }
    let facts = Facts {
        image,
        map: &host.map,
        kept: if confidential {
            &kept
        } else {
            kept.get(2..).unwrap_or(&[])
        },
        rsdp: tables.rsdp,
        setup_data: if confidential { BLOB_PAGE } else { 0 },
    };
    let page = memory::write(BOOT_PARAMS, PAGE_LEN).first_chunk_mut().ok_or(NO_PAGE)?;
    boot_params::fill(page, &facts)
}
