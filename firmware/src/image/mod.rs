//! Builds the image of a Linux pod: stage0, a measured manifest that says what is booted, and the kernel and initrd beside
//! it, whose digests the manifest pins. The result is a launch plan a platform; `igvm::build` writes them as a file.
//! What stage0 makes of the image is stage0's.

pub mod kernel;
mod lz4;
mod manifest;
mod place;
pub mod read;
#[cfg(test)]
mod tests;
pub mod unpack;

use std::borrow::Cow;

pub use self::kernel::{Kernel, KernelError, KernelForm, Unpacking};
pub use self::place::{PlaceError, Places};
pub use self::unpack::{UnpackError, unpack};
use crate::acpi::AcpiError;
use crate::plan::{GpaRange, LaunchPlan, PAGE_SIZE, PageKind, ParameterKind, Platform, Step, VcpuState};
use crate::stage0::{self, abi};

/// Most vCPUs that an image can be built for: the MADT of more does not fit into its page.
pub const MAX_VCPUS: u32 = 251;

/// stage0 as it is put into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shim<'a> {
    /// Its bytes, from [`abi::STAGE0_START`] on.
    pub image: &'a [u8],
    /// GPA of its first instruction, in 32-bit protected mode without paging.
    pub entry: u64,
    /// GPA where the memory ends that it uses beyond its bytes, page-aligned.
    pub memory_end: u64,
}

impl Shim<'static> {
    /// The one that podvisor is built with.
    #[must_use]
    pub fn embedded() -> Self {
        Self {
            image: stage0::IMAGE,
            entry: stage0::ENTRY,
            memory_end: abi::STAGE0_START + stage0::MEMORY_LEN.next_multiple_of(PAGE_SIZE),
        }
    }
}

/// The machine that the ACPI tables in the image describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageMachine {
    /// vCPUs that a pod can grow to, 1 to [`MAX_VCPUS`].
    pub max_vcpus: u32,
    /// PCI segments.
    pub segments: u16,
    /// Memory devices that can be plugged; none: 8 natively, 0 under SNP, where all memory is measured into being.
    pub memory_slots: Option<u8>,
}

/// What an image is made of.
pub struct ImageOptions<'a> {
    /// stage0.
    pub shim: Shim<'a>,
    /// The kernel command line.
    pub command_line: &'a str,
    /// The machine.
    pub machine: ImageMachine,
    /// The SNP guest policy.
    pub policy: u64,
    /// Measure the payloads too: they lie in their places as measured pages.
    pub measure_all: bool,
}

/// Computes the SHA-256 of bytes.
pub type Sha256<'d> = &'d dyn Fn(&[u8]) -> [u8; abi::DIGEST_LEN];

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The command line.
    #[error("the command line {what}")]
    CommandLine {
        /// What is wrong with it.
        what: String,
    },
    /// The vCPUs.
    #[error("{0} vCPUs at most: an image can be built for 1 to {max}", max = MAX_VCPUS)]
    Vcpus(u32),
    /// The machine cannot be described.
    #[error("the ACPI tables")]
    Acpi(#[from] AcpiError),
    /// There is no place for something.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The manifest does not fit.
    #[error(
        "the manifest has {len} bytes and its room {room}: shorten the command line, or lower the vCPUs or segments that the image is for"
    )]
    Manifest {
        /// Its length.
        len: usize,
        /// Its room.
        room: u64,
    },
    /// stage0 does not fit into its room.
    #[error("stage0 with {len} bytes, up to {end:#x}, does not fit between {start:#x} and {limit:#x}", start = abi::STAGE0_START, limit = abi::STAGE0_END)]
    Shim {
        /// Its length.
        len: usize,
        /// Where its memory ends.
        end: u64,
    },
}

/// An image whose plans can be made.
pub struct LinuxImage<'a> {
    options: ImageOptions<'a>,
    kernel: &'a Kernel<'a>,
    initrd: &'a [u8],
    /// SHA-256 of each chunk of the kernel, then of the initrd.
    chunks: Vec<u8>,
    chunks_digest: [u8; abi::DIGEST_LEN],
}

impl<'a> LinuxImage<'a> {
    /// Checks the parts and computes the digests of their chunks.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn new(
        kernel: &'a Kernel<'a>,
        initrd: &'a [u8],
        options: ImageOptions<'a>,
        sha256: Sha256<'_>,
    ) -> Result<Self, ImageError> {
        check_command_line(options.command_line, kernel.cmdline_size)?;
        let max = options.machine.max_vcpus;
        if !(1..=MAX_VCPUS).contains(&max) {
            return Err(ImageError::Vcpus(max));
        }
        let shim = &options.shim;
        let end = abi::STAGE0_START + (shim.image.len() as u64).next_multiple_of(PAGE_SIZE);
        if end > shim.memory_end || shim.memory_end > abi::STAGE0_END || !shim.memory_end.is_multiple_of(PAGE_SIZE) {
            return Err(ImageError::Shim {
                len: shim.image.len(),
                end: shim.memory_end,
            });
        }
        // What cannot be placed need not be hashed.
        Places::find(kernel, initrd.len() as u64, Platform::SevSnp, options.measure_all)?;
        let chunk = usize::try_from(abi::CHUNK_SIZE).unwrap_or(usize::MAX);
        let chunks: Vec<u8> = kernel
            .payload
            .chunks(chunk)
            .chain(initrd.chunks(chunk))
            .flat_map(sha256)
            .collect();
        let chunks_digest = sha256(&chunks);
        Ok(Self {
            options,
            kernel,
            initrd,
            chunks,
            chunks_digest,
        })
    }

    /// Where everything lies on `platform`.
    ///
    /// # Errors
    /// [`ImageError::Place`].
    pub fn places(&self, platform: Platform) -> Result<Places, ImageError> {
        let initrd = self.initrd.len() as u64;
        Ok(Places::find(self.kernel, initrd, platform, self.options.measure_all)?)
    }

    /// The launch plan of `platform`, its steps in the order in which every loader measures them alike: parameters first,
    /// then what the firmware fills, the measured pages, the rest, vCPUs last.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn plan(&self, platform: Platform) -> Result<LaunchPlan<'_>, ImageError> {
        let snp = platform == Platform::SevSnp;
        let places = self.places(platform)?;
        let manifest = manifest::write(self, &places, platform)?;
        let mut plan = LaunchPlan::new(platform);
        plan.policy = snp.then_some(self.options.policy);
        // One page each for what the host tells.
        plan.add_parameter_pages(&[
            (abi::VP_COUNT_PAGE, ParameterKind::VpCount),
            (abi::MEMORY_MAP_PAGE, ParameterKind::MemoryMap),
            (abi::MADT_PAGE, ParameterKind::Madt),
        ]);
        if snp {
            pages(
                &mut plan,
                abi::CPUID_PAGE,
                PageKind::Cpuid,
                Cow::Borrowed(&[]),
                PAGE_SIZE,
            );
            pages(
                &mut plan,
                abi::SECRETS_PAGE,
                PageKind::Secrets,
                Cow::Borrowed(&[]),
                PAGE_SIZE,
            );
        }
        let shim = &self.options.shim;
        pages(
            &mut plan,
            abi::MANIFEST_START,
            PageKind::Normal,
            Cow::Owned(manifest),
            0,
        );
        pages(
            &mut plan,
            abi::STAGE0_START,
            PageKind::Normal,
            Cow::Borrowed(shim.image),
            0,
        );
        let kind = if self.options.measure_all || !snp {
            PageKind::Normal
        } else {
            PageKind::Shared
        };
        pages(&mut plan, places.chunks, kind, Cow::Borrowed(&self.chunks), 0);
        pages(
            &mut plan,
            places.kernel.staged,
            kind,
            Cow::Borrowed(&*self.kernel.payload),
            0,
        );
        pages(&mut plan, places.initrd.staged, kind, Cow::Borrowed(self.initrd), 0);
        let platform = if snp { abi::PLATFORM_SNP } else { abi::PLATFORM_NATIVE };
        plan.add_first_vcpu(VcpuState::protected_mode(shim.entry, platform, snp));
        plan.required_memory = vec![
            GpaRange {
                start: abi::CPUID_PAGE,
                len: abi::STAGE0_END - abi::CPUID_PAGE,
            },
            GpaRange {
                start: self.kernel.dest,
                len: places.end - self.kernel.dest,
            },
        ];
        Ok(plan)
    }
}

fn check_command_line(text: &str, most: usize) -> Result<(), ImageError> {
    let refuse = |what| Err(ImageError::CommandLine { what });
    if let Some(at) = text.bytes().position(|byte| byte == 0) {
        return refuse(format!("has a NUL at byte {at}; leave it out"));
    }
    if text.len() > most {
        return refuse(format!(
            "has {} bytes, and this kernel takes {most}; shorten it",
            text.len()
        ));
    }
    Ok(())
}

/// Adds the pages of `data`, and at least `least` bytes.
fn pages<'a>(plan: &mut LaunchPlan<'a>, gpa: u64, kind: PageKind, data: Cow<'a, [u8]>, least: u64) {
    let len = (data.len() as u64).max(least).next_multiple_of(PAGE_SIZE);
    if len > 0 {
        plan.steps.push(Step::Pages { gpa, len, kind, data });
    }
}
