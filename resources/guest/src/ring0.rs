//! What ring 3 asks of the ring-0 stub (INT3, `boot.s`), and port I/O, which the I/O permission bitmap lets ring 3
//! do itself. Holds no policy.
#![expect(unsafe_code, reason = "the only way into ring 0")]

use core::arch::asm;

/// What a PVALIDATE said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// Return code: 0 done, 1 bad input, 6 size mismatch.
    pub code: u32,
    /// The page's state did not change.
    pub unchanged: bool,
}

/// Reads an MSR.
#[must_use]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: service 0 executes RDMSR.
    unsafe {
        asm!("int3", inout("eax") 0 => low, in("ecx") msr, out("edx") high);
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: service 1 executes WRMSR. The monitor may change memory that the value names: the asm may touch memory.
    unsafe {
        asm!("int3", inout("eax") 1 => _, in("ecx") msr, in("esi") value as u32, in("edx") (value >> 32) as u32);
    }
}

/// One GHCB exchange: write the GHCB MSR, leave to the hypervisor (not when emulated), read the MSR.
#[must_use]
pub fn ghcb_exchange(value: u64, emulated: bool) -> u64 {
    const GHCB_MSR: u32 = 0xC001_0130;
    let service = if emulated { 2 } else { 3 };
    let (low, high): (u32, u32);
    // SAFETY: services 2 and 3 execute WRMSR, VMGEXIT (3 only), RDMSR.
    unsafe {
        asm!("int3", inout("eax") service => low, in("ecx") GHCB_MSR, in("esi") value as u32,
            inout("edx") (value >> 32) as u32 => high);
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Sleeps until an interrupt comes; one that is pending already ends it at once.
pub fn halt() {
    // SAFETY: service 4 executes STI, HLT, CLI; interrupt handlers save what they use and push below the stack pointer.
    unsafe { asm!("int3", inout("eax") 4 => _) };
}

/// PVALIDATE of the 4 KiB or 2 MiB page at `address`. Hardware only.
#[must_use]
pub fn pvalidate(address: u64, large: bool, validate: bool) -> Validated {
    let (code, carry): (u32, u32);
    // SAFETY: service 5 executes PVALIDATE; callers name pages they own.
    unsafe {
        asm!("int3", inout("eax") 5 => code, in("rdi") address, in("ecx") u32::from(large),
            inout("edx") u32::from(validate) => carry);
    }
    Validated {
        code,
        unchanged: carry != 0,
    }
}

/// Makes changes of the page tables take effect.
pub fn flush_tlb() {
    // SAFETY: service 6 reloads CR3.
    unsafe { asm!("int3", inout("eax") 6 => _) };
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: port I/O reaches devices only.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port I/O reaches devices only.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The time-stamp counter.
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Stops this processor for ever.
pub fn stop() -> ! {
    loop {
        halt();
    }
}
