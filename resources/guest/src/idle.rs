//! Waiting for devices: a short spin, because most answers are quick, then sleep until an interrupt. Interrupts stay off
//! while the body runs; one that came stays pending in the local APIC, so none is lost between the look and the sleep.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::mmio::Registers;
use crate::paging::PageTables;
use crate::virtio::Queue;
use crate::{layout, ring0};

/// About 0.2 ms: longer than a device's usual answer, shorter than a host's scheduling quantum.
const SPIN_CYCLES: u64 = 500_000;
static SLEEPS: AtomicBool = AtomicBool::new(false);

/// Enables the local APIC. Without it (SEV-SNP hardware, where its registers would need exits of their own) waiting
/// only spins.
///
/// # Errors
/// When its registers cannot be mapped.
pub fn start(tables: &PageTables) -> Result<(), &'static str> {
    const SPURIOUS: u64 = 0xF0;
    const ENABLE: u32 = 0x100;
    const LINT0: u64 = 0x350;
    const MASKED: u32 = 0x1_0000;
    let apic = Registers::map(tables, layout::APIC_START, 4096).ok_or("the local APIC cannot be mapped")?;
    apic.set(SPURIOUS, ENABLE | layout::SPURIOUS_VECTOR);
    // The legacy interrupt controller, never set up, would deliver pins (the power button's) as exception vectors.
    apic.set(LINT0, MASKED);
    SLEEPS.store(true, Ordering::Relaxed);
    Ok(())
}

/// Returns when one of the queues has a used chain.
pub fn wait_for(queues: &[&Queue]) {
    let ready = || queues.iter().any(|queue| queue.ready());
    loop {
        let start = ring0::rdtsc();
        while ring0::rdtsc().wrapping_sub(start) < SPIN_CYCLES {
            if ready() {
                return;
            }
            core::hint::spin_loop();
        }
        if SLEEPS.load(Ordering::Relaxed) {
            queues.iter().for_each(|queue| queue.want_interrupt(true));
            core::sync::atomic::fence(Ordering::SeqCst);
            if !ready() {
                ring0::halt();
            }
            queues.iter().for_each(|queue| queue.want_interrupt(false));
        }
    }
}
