//! What stage0 does with the processor and memory: everything unsafe is here, in small files; the decisions are the library's.

pub(crate) mod cpu;
pub(crate) mod memory;
