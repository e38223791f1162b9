//! What the monitor takes from itself before it serves anybody: system calls ([`seccomp`]) and, where it is asked for,
//! files ([`landlock`]). Which of them a device needs is told by the device and its registration, not here.

mod bpf;
pub mod landlock;
pub mod seccomp;
