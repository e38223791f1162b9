//! Measurements of podvisor: what is shared between the benchmarks. No benchmark asserts a time.
