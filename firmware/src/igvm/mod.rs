//! IGVM files (igvm_defs 0.5, format versions 1 and 2): [`plan`] turns one into a launch plan, [`build`] writes
//! plans as one. The reader is for hostile files: it works in place, in time and memory linear in the length of
//! the headers, and every refusal names the header, its position and the reason.

pub mod build;
mod data;
pub mod error;
pub mod headers;
mod native;
mod pages;
mod read;
#[cfg(test)]
pub(crate) mod tests;

pub use build::{BuildError, BuildOptions, FormatVersion, assemble, build, check};
pub use data::Assembled;
pub use error::{IgvmError, Reason};
pub use native::PAT_RESET;
pub use read::{MAX_AREA_SIZE, MAX_HEADERS, MAX_PARAMETERS, PlatformInfo, plan, platforms};

use crate::plan::Platform;

/// What a page without file data is, under SNP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroPages {
    /// A NORMAL page of zeros, as the specification, QEMU and the igvm crate have it.
    #[default]
    AsNormal,
    /// A ZERO page, as Cloud Hypervisor has it; the launch digest is another.
    AsZero,
}

/// Choices of [`plan`].
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanOptions {
    /// The platform to plan for; none: SEV-SNP if the file has it, else native.
    pub platform: Option<Platform>,
    /// What pages without file data are.
    pub zero_pages: ZeroPages,
}
