//! Instructions that have no safe form. Holds no policy.
#![expect(unsafe_code, reason = "each function is one or a few instructions")]

use core::arch::asm;

/// What a PVALIDATE said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validated {
    /// Return code: 0 done, 1 bad input, 6 size mismatch.
    pub(crate) code: u32,
    /// The page's state did not change.
    pub(crate) unchanged: bool,
}

/// Reads an MSR.
pub(crate) fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR. What memory it names may change.
pub(crate) fn wrmsr(msr: u32, value: u64) {
    // SAFETY: callers write the MSRs of the GHCB protocol and of the emulation, which change pages that they own.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// VMGEXIT (REP VMMCALL).
pub(crate) fn vmgexit() {
    // SAFETY: the hypervisor reads and writes shared memory only.
    unsafe { asm!("rep vmmcall", options(nostack, preserves_flags)) };
}

/// PVALIDATE of the 4 KiB or 2 MiB page at virtual address `address`.
pub(crate) fn pvalidate(address: u64, large: bool, validate: bool) -> Validated {
    let (code, carry): (u64, u8);
    // SAFETY: callers name pages that they own; nothing else lies in them.
    unsafe {
        asm!(".byte 0xF2, 0x0F, 0x01, 0xFF", "setc {carry}", carry = out(reg_byte) carry,
            inout("rax") address => code, in("ecx") u32::from(large),
            in("edx") u32::from(validate), options(nostack));
    }
    Validated {
        code: code as u32,
        unchanged: carry != 0,
    }
}

/// CPUID. Not on an encrypted guest.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// Writes a byte to an I/O port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: port I/O reaches devices only.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes two bytes to an I/O port.
pub(crate) fn out16(port: u16, value: u16) {
    // SAFETY: port I/O reaches devices only.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Makes changes of the page tables take effect.
pub(crate) fn flush_tlb() {
    // SAFETY: CR3 is loaded with what it holds.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Stops this processor for ever.
pub(crate) fn stop() -> ! {
    loop {
        // SAFETY: interrupts are off; nothing wakes it but INIT.
        unsafe { asm!("hlt", options(nomem, nostack, preserves_flags)) };
    }
}
