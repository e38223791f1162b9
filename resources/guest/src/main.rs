//! The pod guest's image: the ring-0 stub, the memory functions that a compiler expects, the allocator, and the way
//! from the first instruction to the body in the library. See `docs/pod-guest.md`.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "entry points, memory functions and the allocator of a bare-metal program"
)]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use podguest::Start;

global_asm!(include_str!("boot.s"), options(att_syntax));

#[global_allocator]
static HEAP: podguest::memory::Heap = podguest::memory::Heap::new();

/// Ring 3 begins here. `platform` is EBX of the entry state; `emulated` and `c_bit` are what the stub found in the
/// CPUID page.
#[unsafe(no_mangle)]
extern "C" fn ring3_start(platform: u32, emulated: u32, c_bit: u32) -> ! {
    podguest::run(
        &HEAP,
        &Start {
            snp: platform == 1,
            emulated: emulated != 0,
            c_bit,
        },
    )
}

/// An exception in ring 0 or 3 ends here: three words of its frame, the error code first where there is one.
#[unsafe(no_mangle)]
extern "C" fn ring3_exception(vector: u64, a: u64, b: u64, c: u64, cr2: u64) -> ! {
    podguest::fail(format_args!("exception {vector} ({a:x} {b:x} {c:x}), cr2 {cr2:x}"))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    podguest::fail(format_args!("{info}"))
}

/// The precompiled `alloc` refers to it; with `panic = "abort"` nothing gets here.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    podguest::fail(format_args!("unwinding"))
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

/// strlen.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller's duty.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
