//! The body of the pod guest: a bare-metal program that stands in for a pod (`docs/pod-guest.md`). `main.rs` is the
//! image around it; the ring-0 part is `boot.s`.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod agent;
pub mod blk;
pub mod console;
pub mod cpuid;
pub mod fs;
pub mod fuse;
pub mod ghcb;
pub mod idle;
pub mod layout;
pub mod memory;
pub mod mmio;
pub mod paging;
pub mod params;
pub mod pattern;
pub mod pci;
pub mod platform;
pub mod pod;
pub mod report;
pub mod ring0;
pub mod rng;
pub mod sha256;
pub mod snp;
pub mod virtio;
pub mod vsock;
pub mod window;

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

/// The port that the agent listens on.
const AGENT_PORT: u32 = 1024;

/// What the ring-0 stub found out.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The image was launched for SEV-SNP.
    pub snp: bool,
    /// The CPUID page names the emulated processor.
    pub emulated: bool,
    /// Position of the C-bit; 0 for none.
    pub c_bit: u32,
}

static CONFIDENTIAL: AtomicBool = AtomicBool::new(false);

/// The body. `heap` is the allocator, still empty.
pub fn run(heap: &memory::Heap, start: &Start) -> ! {
    let outcome = boot(heap, start);
    fail(format_args!(
        "{}",
        outcome.err().unwrap_or("the socket device is broken")
    ))
}

fn boot(heap: &memory::Heap, start: &Start) -> Result<(), &'static str> {
    CONFIDENTIAL.store(start.snp, Ordering::Relaxed);
    let tables = paging::PageTables::new(start.c_bit);
    let mut pages = None;
    if start.snp {
        tables.share(layout::WINDOW_START, layout::WINDOW_LEN);
        pages = Some(snp::Pages::start(start.emulated)?);
        if !start.emulated {
            mmio::use_ghcb();
            console::use_ghcb();
        }
    }
    memory::start(heap);
    let parameters = params::read()?;
    if cpuid::has_sha(start.snp && !start.emulated) {
        sha256::use_instructions();
    }
    if !cpuid::suffices(start.snp && !start.emulated) {
        return Err("the processor lacks AES or SSE 4.1");
    }
    if start.emulated || !start.snp {
        idle::start(&tables)?;
    }
    let mut pod = pod::Pod {
        parameters,
        emulated: start.emulated,
        pages,
        functions: pci::scan(&tables),
        tables,
        window: window::Window::new(),
        blk: None,
        fs: None,
        rng: None,
        console: None,
        watchdog: None,
        reporter: None,
    };
    let function = pod.function(pod::device_type::VSOCK).ok_or("no socket device")?;
    let vsock = vsock::Vsock::start(&function, &pod.tables, &pod.window, AGENT_PORT)?;
    pod.functions
        .retain(|function| function.kind != pod::device_type::VSOCK);
    console::say(format_args!("ready"));
    agent::Agent::new(pod, vsock).serve();
    Ok(())
}

/// Says why on the serial port, and powers off.
pub fn fail(message: fmt::Arguments<'_>) -> ! {
    console::say(message);
    if CONFIDENTIAL.load(Ordering::Relaxed) {
        ghcb::terminate();
    }
    power(false)
}

/// Powers off, or resets. Does not return.
pub fn power(reset: bool) -> ! {
    const POWER_OFF: u8 = 0x34;
    const RESET: u8 = 1;
    console::port_write(layout::SHUTDOWN_PORT, if reset { RESET } else { POWER_OFF });
    ring0::stop()
}

/// Adds shared memory to a hash, by way of private memory: what is hashed is read once.
pub fn hash_shared(hash: &mut sha256::Sha256, data: window::Shared) {
    let mut bytes = [0; 8192];
    let mut at = 0;
    while at < data.len() {
        let count = bytes.len().min(data.len() - at);
        let piece = bytes.get_mut(..count).unwrap_or_default();
        data.read(at, piece);
        hash.update(piece);
        at += count;
    }
}
