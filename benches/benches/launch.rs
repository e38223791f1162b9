//! Parsing and planning an IGVM image against SHA-384 over the same bytes.
#![expect(missing_docs, reason = "criterion's macros make undocumented items")]

fn main() {}
