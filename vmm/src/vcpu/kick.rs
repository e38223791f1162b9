//! Getting a vCPU thread out of KVM_RUN: a signal whose handler sets `immediate_exit` in that thread's own run page,
//! so that a kick which arrives just before KVM_RUN is not lost.
#![expect(
    unsafe_code,
    reason = "a signal handler writes one byte of the thread's kvm_run page"
)]

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into this thread's kvm_run mapping, which lives as long as `Kickable` does.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, once a process.
///
/// # Errors
/// When the signal cannot be used.
pub(crate) fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| io::Error::from_raw_os_error(e.errno()));
    });
    result
}

/// While it lives, [`kick`] interrupts this thread's KVM_RUN of the vCPU it was made from.
pub(crate) struct Kickable(());

impl Kickable {
    /// For the thread that runs `vcpu`, and only as long as `vcpu` lives.
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self(())
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}

/// Makes `thread` leave KVM_RUN, or not enter it.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // A thread that has ended needs no kick.
    let _ = thread.kill(SIGRTMIN());
}
