//! The pitfalls of a replacement for Cloud Hypervisor under the shims, one test or more each, by number
//! (`docs/shims.md`).

mod devices;
mod lifetime;
mod resize;
mod vsock;
mod wire;
