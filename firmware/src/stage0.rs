//! stage0, the boot shim that runs first inside a Linux pod's image, as the rest of podvisor sees it. The shim itself is
//! `firmware/stage0/`; what builds images that hold it is elsewhere.

#[path = "../stage0/src/abi.rs"]
pub mod abi;
