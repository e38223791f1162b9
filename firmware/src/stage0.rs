//! stage0, the boot shim that runs first inside a Linux pod's image, as the rest of podvisor sees it. The shim itself is
//! `firmware/stage0/`; what builds images that hold it is elsewhere.

#[path = "../stage0/src/abi.rs"]
pub mod abi;
#[path = "../stage0/src/codes.rs"]
pub mod codes;

mod built {
    //! What the build script found out.
    include!(concat!(env!("OUT_DIR"), "/stage0.rs"));
    pub(super) const ENTRY: u64 = BUILT_ENTRY;
    pub(super) const MEMORY_LEN: u64 = BUILT_MEMORY_LEN;
    pub(super) const WITH: &str = BUILT_WITH;
    pub(super) const LOADED_AT: u64 = BUILT_LOADED_AT;
}

/// The shim's bytes, from [`abi::STAGE0_START`] on; whole pages when it is measured, the rest of the last one being zero.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stage0.bin"));

/// GPA of its first instruction: 32-bit protected mode with flat segments, paging off, EBX = `abi::PLATFORM_*`.
pub const ENTRY: u64 = built::ENTRY;

/// Bytes of RAM that it takes from [`abi::STAGE0_START`] on, beyond its file included.
pub const MEMORY_LEN: u64 = built::MEMORY_LEN;

/// The compiler that built it, as `rustc --version` says: another makes other bytes.
pub const COMPILER: &str = built::WITH;

const _: () = {
    assert!(built::LOADED_AT == abi::STAGE0_START);
    assert!(MEMORY_LEN <= abi::STAGE0_END - abi::STAGE0_START);
    assert!(IMAGE.len() <= 48 << 10, "stage0 is larger than 48 KiB");
};
