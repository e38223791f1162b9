//! What of Linux the tests need and no library gives: TAP interfaces, pseudo terminals, and processes that start in
//! another network namespace or as another user.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// A TAP queue as a shim hands it over: set up, with the virtio header (Linux `if_tun.h`). None where none can be made.
pub(crate) fn tap(number: u32) -> Option<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
    const IFF_TAP_NO_PI_VNET_HDR: i16 = 0x0002 | 0x1000 | 0x4000;
    let name = format!("pvs{}x{number}", std::process::id() % 1_000_000);
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    let mut request = [0u8; 40];
    for (to, from) in request.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    for (to, from) in request.iter_mut().skip(16).zip(IFF_TAP_NO_PI_VNET_HDR.to_ne_bytes()) {
        *to = from;
    }
    // SAFETY: `request` has the size of struct ifreq and lives over the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } == 0;
    if !done {
        println!("skipped: no TAP interface can be made here");
    }
    done.then_some(file)
}

/// A pseudo terminal: the master, the slave.
pub(crate) fn pty() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: both numbers live over the call; the null pointers mean no name, no settings, no size.
    let made = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    // SAFETY: openpty has just made both and nobody else has them.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether this process may make namespaces and change users; says so if not.
pub(crate) fn privileged() -> bool {
    // SAFETY: a number comes back, nothing else happens.
    let root = unsafe { libc::geteuid() } == 0;
    let made = root
        && Command::new("unshare")
            .args(["-m", "-n", "true"])
            .status()
            .is_ok_and(|s| s.success());
    if !made {
        println!("skipped: no namespaces can be made here");
    }
    made
}

/// Has `command` start in a network namespace of its own, as the Rust shim's child does.
pub(crate) fn in_new_netns(command: &mut Command) {
    // SAFETY: between fork and exec one system call is made, nothing is allocated.
    unsafe { command.pre_exec(|| done(libc::unshare(libc::CLONE_NEWNET))) };
}

fn mount(from: &CStr, to: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the strings end in zero and live over the call; no type and no data are needed for these flags.
    done(unsafe { libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), flags, std::ptr::null()) })
}

/// Has `command` start as user and group `id` with no other group, in a mount namespace in which `/dev/kvm` is `kvm`, a
/// device node that the user may use: a rootless sandbox on a host whose users may run virtual machines.
pub(crate) fn as_user(command: &mut Command, id: u32, kvm: &Path) {
    let kvm = CString::new(kvm.to_str().unwrap()).unwrap();
    // SAFETY: between fork and exec only system calls are made, on strings made before.
    unsafe {
        command.pre_exec(move || {
            done(libc::unshare(libc::CLONE_NEWNS))?;
            mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE)?;
            mount(&kvm, c"/dev/kvm", libc::MS_BIND)?;
            done(libc::setgroups(0, std::ptr::null()))?;
            done(libc::setgid(id))?;
            done(libc::setuid(id))
        })
    };
}

/// A node of the character device 10:232 (Linux `miscdevice.h`, `KVM_MINOR`) that everybody may use.
pub(crate) fn kvm_node(path: &Path) -> io::Result<()> {
    let text = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the string ends in zero and lives over the call.
    done(unsafe { libc::mknod(text.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(10, 232)) })?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
}
