//! Which system calls the monitor may still make once it serves the API: one filter for the control thread, which all
//! later threads inherit, and a narrower one on top for vCPU threads, where a guest's exits are handled. No program can be
//! started, no memory made executable, no thread of another process signalled. The devices' own calls come from the
//! registry.

use std::io;
use std::sync::OnceLock;

use libc::sock_filter;

use super::bpf::{self, Calls, Condition};
use crate::registry;
use crate::sys;

/// What happens on a call that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The process ends, with a line that names the call.
    End,
    /// The call fails with EPERM.
    Refuse,
    /// The kernel logs it and goes on.
    Log,
}

/// Why the filters cannot be put in place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel does not take them.
    #[error("this kernel does not take the filter (CONFIG_SECCOMP_FILTER); --seccomp false does without")]
    Apply(#[source] io::Error),
    /// The handler that names a refused call cannot be set.
    #[error("handling SIGSYS")]
    Handler(#[source] io::Error),
}

/// What this process does on a violation, once it is filtered: as the filters, a property of the process.
static ENTERED: OnceLock<Violation> = OnceLock::new();
/// The program for vCPU threads, compiled for the first of them.
static VCPU_PROGRAM: OnceLock<Vec<sock_filter>> = OnceLock::new();

/// Filters this thread, the control thread, and every thread it starts from here on.
///
/// # Errors
/// [`SeccompError`].
pub fn enter(violation: Violation) -> Result<(), SeccompError> {
    if violation == Violation::End {
        sys::end_on_refused_call().map_err(SeccompError::Handler)?;
    }
    apply(&bpf::program(&control_calls(), refusal(violation)))?;
    // A second call finds the first one's filter in force.
    let _ = ENTERED.set(violation);
    Ok(())
}

/// Filters this thread, a vCPU's, further, if the process is filtered.
///
/// # Errors
/// [`SeccompError`].
pub fn enter_vcpu() -> Result<(), SeccompError> {
    let Some(violation) = ENTERED.get() else { return Ok(()) };
    apply(VCPU_PROGRAM.get_or_init(|| vcpu_program(refusal(*violation))))
}

fn apply(program: &[sock_filter]) -> Result<(), SeccompError> {
    sys::filter_calls(program).map_err(SeccompError::Apply)
}

/// What the kernel is told to do on a call that is not allowed.
fn refusal(violation: Violation) -> u32 {
    match violation {
        Violation::End => libc::SECCOMP_RET_TRAP,
        Violation::Refuse => libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        Violation::Log => libc::SECCOMP_RET_LOG,
    }
}

/// What any thread needs: memory, locks, time, its own end, and descriptors that are open.
const THREAD: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the control thread needs beside: files, sockets and threads.
const CONTROL: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_access,
    libc::SYS_bind,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpgrp,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_listen,
    libc::SYS_memfd_create,
    libc::SYS_mkdir,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readlink,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rename,
    libc::SYS_sched_setaffinity,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_signalfd4,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// What nobody asks for and does no more than the calls beside it: with these between them, runs of allowed calls are one,
/// and the filter a fifth shorter.
const BETWEEN: &[i64] = &[
    libc::SYS_accept,
    libc::SYS_alarm,
    libc::SYS_dup2,
    libc::SYS_eventfd,
    libc::SYS_faccessat,
    libc::SYS_futimesat,
    libc::SYS_getdents,
    libc::SYS_getitimer,
    libc::SYS_getpeername,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_pause,
    libc::SYS_pipe,
    libc::SYS_pselect6,
    libc::SYS_select,
    libc::SYS_sendfile,
    libc::SYS_set_tid_address,
    libc::SYS_setitimer,
    libc::SYS_signalfd,
    libc::SYS_socketpair,
];

/// What a vCPU thread needs beside: a driver's start makes its device's ring or connection work, on the thread that wrote
/// the register; pages that change between private and shared are given up. It opens nothing.
const VCPU: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// Those that are allowed to every thread with some arguments only.
fn limited() -> [(i64, Vec<Condition>); 5] {
    let not_executable = vec![masked(2, libc::PROT_EXEC.unsigned_abs(), 0)];
    // vCPU threads are kicked, and a panic ends its own process.
    let own = vec![is(0, std::process::id())];
    let options = [libc::PR_SET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS];
    [
        (libc::SYS_mmap, not_executable.clone()),
        (libc::SYS_mprotect, not_executable),
        (libc::SYS_tgkill, own),
        (libc::SYS_prctl, options.map(|o| is(0, o.unsigned_abs())).to_vec()),
        (libc::SYS_ioctl, IOCTLS.to_vec()),
    ]
}

/// What the control thread may call.
fn control_calls() -> Calls {
    let devices: Vec<i64> = registry::syscalls().collect();
    // Network interfaces are asked and set up through sockets of their addresses' families.
    let domains = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|domain| is(0, domain.unsigned_abs()));
    let number = |call: i64| u32::try_from(call).unwrap_or(u32::MAX);
    let limited = limited().into_iter().chain([(libc::SYS_socket, domains.to_vec())]);
    let mut calls: Calls = limited.map(|(call, only)| (number(call), only)).collect();
    let lists = [THREAD, CONTROL, BETWEEN, &devices];
    let mut always: Vec<u32> = lists.into_iter().flatten().map(|call| number(*call)).collect();
    always.sort_unstable();
    always.dedup();
    // A device that lists one of the limited ones too does not widen it.
    always.retain(|call| !calls.iter().any(|(limited, _)| limited == call));
    calls.extend(always.into_iter().map(|call| (call, Vec::new())));
    calls.sort_unstable_by_key(|(call, _)| *call);
    calls
}

/// The program for vCPU threads. It stands on top of the control thread's, so that only what that one allows is decided.
fn vcpu_program(refuse: u32) -> Vec<sock_filter> {
    let in_one = |lists: &[&[i64]], call: u32| lists.iter().any(|list| list.contains(&i64::from(call)));
    let limited = limited().map(|(call, _)| call);
    let calls = control_calls();
    let decided = calls
        .iter()
        .map(|(call, _)| *call)
        .filter(|call| !in_one(&[BETWEEN], *call));
    bpf::narrower(
        decided.map(|call| (call, in_one(&[THREAD, VCPU, &limited], call))),
        refuse,
    )
}

/// An argument's value.
const fn is(argument: u8, value: u32) -> Condition {
    masked(argument, u32::MAX, value)
}

/// Some of its bits.
const fn masked(argument: u8, mask: u32, value: u32) -> Condition {
    Condition { argument, mask, value }
}

/// The requests of `ioctl(2)`: KVM's first, since each entry into the guest is one; of the rest, by the type byte (Linux
/// `Documentation/userspace-api/ioctl/ioctl-number.rst`), what files, block devices, network interfaces and terminals
/// are asked. Those that put words into a terminal or take it over are not among them.
const IOCTLS: &[Condition] = &[
    masked(1, 0xff00, 0xae00), // KVM
    masked(1, 0xff00, 0x1200), // block devices
    masked(1, 0xff00, 0x6600), // file flags
    masked(1, 0xff00, 0x8900), // sockets and interfaces
    masked(1, 0xffc0, 0x54c0), // TAP
    terminal(libc::TCGETS),
    terminal(libc::TCSETS),
    terminal(libc::TCSETSW),
    terminal(libc::TCSETSF),
    terminal(libc::TIOCGWINSZ),
    terminal(libc::TIOCSWINSZ),
    terminal(libc::TIOCGPGRP),
    terminal(libc::TIOCGPTN),
    terminal(libc::TIOCSPTLCK),
    terminal(libc::TIOCGPTPEER),
    terminal(libc::TIOCEXCL),
    terminal(libc::FIONBIO),
    terminal(libc::FIONREAD),
    terminal(libc::FIOCLEX),
];

#[expect(clippy::cast_possible_truncation, reason = "a request of ioctl(2) has 32 bits")]
const fn terminal(request: libc::Ioctl) -> Condition {
    is(1, request as u32)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs `work` on a thread of its own: the filters are a thread's, and this process runs other tests too.
    fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();

    fn control_program() -> Vec<sock_filter> {
        bpf::program(&control_calls(), EPERM)
    }

    #[expect(unsafe_code, reason = "the standard library has no such socket")]
    fn netlink() -> std::io::Error {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd < 0);
        std::io::Error::last_os_error()
    }

    #[test]
    fn the_control_thread_starts_no_program_and_opens_no_foreign_socket() {
        on_a_thread(|| {
            apply(&control_program()).unwrap();
            let refused = Command::new("/bin/true").status().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
            assert_eq!(netlink().raw_os_error(), Some(libc::EPERM));
            assert!(std::os::unix::net::UnixDatagram::unbound().is_ok());
            assert!(std::fs::read("/proc/self/status").is_ok());
            std::thread::spawn(|| ()).join().unwrap();
        });
    }

    #[test]
    fn a_vcpu_thread_opens_nothing() {
        on_a_thread(|| {
            apply(&control_program()).unwrap();
            apply(&vcpu_program(EPERM)).unwrap();
            let refused = std::fs::File::open("/dev/null").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
            assert!(std::os::unix::net::UnixDatagram::unbound().is_err());
            assert!(vmm_sys_util::eventfd::EventFd::new(0).is_ok());
        });
    }

    #[test]
    fn memory_is_not_made_executable() {
        on_a_thread(|| {
            apply(&control_program()).unwrap();
            let writable = memmap2::MmapMut::map_anon(4096).unwrap();
            let refused = writable.make_exec().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        });
    }

    #[test]
    fn what_every_kind_of_device_calls_is_allowed() {
        let calls = control_calls();
        let listed = |call: i64| calls.iter().any(|(number, _)| i64::from(*number) == call);
        assert!(registry::syscalls().all(listed));
        assert!(registry::syscalls().any(|call| call == libc::SYS_io_uring_enter));
    }
}
