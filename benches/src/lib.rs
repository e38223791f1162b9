//! Measurements of podvisor: what the benchmarks share. A process is timed from outside by the kernel's own
//! accounting; figures are medians over interleaved runs. No benchmark asserts a time.

pub mod process;
pub mod stats;
