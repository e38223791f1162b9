//! The compiler's flags for stage0, for whoever builds it.

/// The compiler uses no vector registers of its own accord: hypervisors that interpret ring 0 know few of their instructions,
/// and zeroing a structure needs none. What hashes asks for them by name. (The compiler warns that the ABI of its target then
/// has no floating point; stage0 has none. The target made for it, x86_64-unknown-none, is not part of a usual toolchain.)
pub(crate) const FLAGS: &[&str] = &["-Ctarget-feature=-sse,-sse2"];
