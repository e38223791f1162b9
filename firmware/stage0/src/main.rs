//! The image around stage0: entry points, exceptions, the memory functions that a compiler expects. The decisions are in the
//! library, their order is in `boot`.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "entry points and memory functions of a bare-metal program")]

mod boot;
mod machine;
mod others;
mod platform;

use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use platform::{Emulated, Hardware, Native, Platform, Serial};
use stage0::refusal::Refusal;

global_asm!(include_str!("boot.s"), options(att_syntax));

static NATIVE: Native = Native;
static EMULATED: Emulated = Emulated::new();
static HARDWARE: Hardware = Hardware::new();
/// What the entry code found: 0 native, 1 emulated, 2 hardware.
static KIND: AtomicU32 = AtomicU32::new(2);

fn platform() -> &'static dyn Platform {
    match KIND.load(Ordering::Relaxed) {
        0 => &NATIVE,
        1 => &EMULATED,
        _ => &HARDWARE,
    }
}

fn refuse(refusal: &Refusal) -> ! {
    let platform = platform();
    // Without an agreement with the hypervisor there is no way to the serial port, and on a plain VM always one.
    let _ = writeln!(Serial(platform), "stage0: refused: {refusal}\r");
    platform.end(refusal.code())
}

/// The first processor gets here, in long mode.
#[unsafe(no_mangle)]
extern "C" fn stage0_start(kind: u32) -> ! {
    KIND.store(kind, Ordering::Relaxed);
    match boot::run(platform()) {
        Ok(never) => match never {},
        Err(refusal) => refuse(&refusal),
    }
}

/// The others get here, and stop when there is nothing to do.
#[unsafe(no_mangle)]
extern "C" fn stage0_helper() {
    others::help();
}

/// An exception: three words of its frame, the error code first where there is one.
#[unsafe(no_mangle)]
extern "C" fn stage0_exception(vector: u64, first: u64, second: u64, _third: u64, address: u64) -> ! {
    refuse(&Refusal::Exception {
        vector,
        first,
        second,
        address,
    })
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    refuse(&Refusal::Internal("panic"))
}

/// memcpy.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(dest: *mut u8, src: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's duty; REP MOVSB uses RCX, RSI, RDI, and DF is clear.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") dest => _, inout("rsi") src => _,
            options(nostack, preserves_flags));
    }
    dest
}

/// memmove.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(dest: *mut u8, src: *const u8, len: usize) -> *mut u8 {
    if (dest.addr()).wrapping_sub(src.addr()) >= len {
        // SAFETY: copying upwards does not overwrite what is still to be read.
        return unsafe { memcpy(dest, src, len) };
    }
    // SAFETY: the caller's duty; downwards from the last byte, DF is set only meanwhile.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _,
            inout("rdi") dest.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") src.wrapping_add(len).wrapping_sub(1) => _, options(nostack));
    }
    dest
}

/// memset.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(dest: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's duty; REP STOSB uses RCX, RDI, AL.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") dest => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    dest
}

/// memcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut i = 0;
    while i < len {
        // SAFETY: i < len, the caller's duty.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// bcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's duty.
    unsafe { memcmp(a, b, len) }
}
