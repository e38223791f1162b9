//! The few system calls that the standard library has no name for, each behind a safe function. Nothing here knows
//! what a pod is.
#![expect(unsafe_code, reason = "thin wrappers around libc calls, one block each")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Creates an anonymous file in memory (`memfd_create(2)`), close-on-exec; with `hugepages` backed by huge pages.
///
/// # Errors
/// As the system call: no huge pages configured, or out of descriptors.
pub fn memfd(name: &CStr, hugepages: bool) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | if hugepages { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: `name` is a valid C string for the length of the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else holds it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Maps `file` for reading. What another process changes in it meanwhile is seen; a file that is cut while it is mapped
/// ends the process when the lost part is read, so images must not be changed in place.
///
/// # Errors
/// As the system call.
pub fn map_file(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is private and read-only, and its bytes are parsed as untrusted data: no type relies on them
    // keeping a value.
    unsafe { memmap2::Mmap::map(file) }
}

/// Advises the kernel about `[address, address + len)` of this process (`madvise(2)`). Only advice that keeps the
/// contents may be given.
///
/// # Errors
/// As the system call.
pub fn advise(address: u64, len: u64, advice: MemoryAdvice) -> io::Result<()> {
    let (Ok(address), Ok(len)) = (usize::try_from(address), usize::try_from(len)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let advice = match advice {
        MemoryAdvice::HugePages => libc::MADV_HUGEPAGE,
        MemoryAdvice::Mergeable => libc::MADV_MERGEABLE,
        MemoryAdvice::DontDump => libc::MADV_DONTDUMP,
        MemoryAdvice::Populate => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: none of the advice above changes what the memory holds or whether it is mapped.
    if unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(address), len, advice) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What [`advise`] may tell the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryAdvice {
    /// Back it by transparent huge pages.
    HugePages,
    /// Let KSM merge equal pages.
    Mergeable,
    /// Keep it out of core dumps.
    DontDump,
    /// Allocate every page now.
    Populate,
}

/// Raises the number of descriptors this process may have to what its user may have at most: a shared directory holds one
/// for each file that the guest knows. A limit that cannot be raised stays.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a live local of the right type.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 && limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above; the call only reads it.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

/// Has the kernel send SIGTERM to the process that `command` starts when the thread that starts it ends.
pub fn end_with_parent(command: &mut Command) {
    let before_exec = || {
        // SAFETY: prctl(PR_SET_PDEATHSIG) takes one number, touches no memory, and is async-signal-safe.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: the closure makes one async-signal-safe system call and does not allocate.
    unsafe { command.pre_exec(before_exec) };
}

/// Sends SIGKILL to process `pid`; one that is gone is no error.
pub fn kill(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid)
        && pid > 0
    {
        // SAFETY: kill touches no memory; a positive pid names one process.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

/// Takes over descriptor `fd`, inherited from the parent, if it is a listening UNIX socket.
///
/// # Errors
/// EBADF when it is not open, EINVAL when it is no listening socket.
pub fn inherited_listener(fd: RawFd) -> io::Result<OwnedFd> {
    let mut listens: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the two out-pointers are to live locals, and `length` is the size of the first; any fd may be asked about.
    let asked = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &raw mut length,
        )
    };
    if asked < 0 {
        return Err(io::Error::last_os_error());
    }
    if listens == 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the descriptor is open (it was just asked about), was handed to this process by its parent under this
    // number, and nothing else in the process was told it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over descriptor `fd`, inherited from the parent, if it is a queue of a TAP interface.
///
/// # Errors
/// EBADF when it is not open, EBADFD or ENOTTY when it is something else.
pub fn inherited_tap(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is; any fd may be asked about, and nothing that is not a TAP
    // queue knows the request.
    if unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above, it is open; F_SETFD takes a number.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is a TAP queue, of which this process makes none before it has taken those of its parent; the caller
    // takes each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor for what `fd`, inherited from the parent, stands for, made non-blocking.
///
/// # Errors
/// EBADF when it is not open.
pub fn inherited_output(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl may be asked about any number; these commands take a number and touch no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else holds it.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // SAFETY: as above; `copy` is open.
    let flags = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy)
}

/// Has all threads allocate from one heap: an arena of each thread's own costs it address space, page faults and system
/// calls, and the data path does not allocate.
pub fn one_heap() {
    // SAFETY: mallopt takes two numbers; this one only limits how many arenas are made later.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Makes every file and socket this process creates private to its user.
pub fn private_umask() {
    // SAFETY: umask has no preconditions and cannot fail.
    unsafe { libc::umask(0o077) };
}

/// Makes a write to a closed pipe or socket, or beyond the largest file that the process may have (RLIMIT_FSIZE), an error
/// rather than the end of the process, and leaves no zombies of children that a parent had before it became this process.
pub fn ignore_signals() {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGCHLD] {
        // SAFETY: SIG_IGN is a valid disposition for all of them.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Has a system call that a filter refuses (SIGSYS) end the process, with a line on stderr that names it.
///
/// # Errors
/// As `sigaction(2)`.
pub fn end_on_refused_call() -> io::Result<()> {
    extern "C" fn refused(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo_t; for SIGSYS the call's number is the int
        // after the call's address (Linux include/uapi/asm-generic/siginfo.h, `_sigsys._syscall`).
        let number = unsafe { info.cast::<libc::c_int>().add(6).read() };
        let mut line = *b"podvisor: seccomp: system call 0000 is not allowed: ending (--seccomp log tells more)\n";
        let digits = [1000, 100, 10, 1].map(|unit| b'0' + u8::try_from(number / unit % 10).unwrap_or(0));
        if let Some(place) = line.get_mut(31..35) {
            place.copy_from_slice(&digits);
        }
        // SAFETY: write(2) and _exit(2) may be called in a signal handler; `line` lives through the call.
        unsafe {
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
            libc::_exit(128 + libc::SIGSYS);
        }
    }
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = refused as *const () as usize;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and only makes calls a handler may make.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Filters the system calls of this thread, and of those it starts, by a classic BPF program (`seccomp(2)`); it gives up
/// privileges by running programs for that.
///
/// # Errors
/// As the system calls.
pub fn filter_calls(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the call takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` names `len` instructions that live through the call; the kernel copies and checks them.
    if unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has this process go on when it reads from a terminal, or writes to one, in whose background it is: reads fail then.
pub fn ignore_job_control() {
    for signal in [libc::SIGTTIN, libc::SIGTTOU] {
        // SAFETY: SIG_IGN is a valid disposition for both.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Whether terminal `fd` is this process's to set: it is in its foreground, or the terminal has no foreground.
#[must_use]
pub fn in_foreground(fd: RawFd) -> bool {
    // SAFETY: both take at most a number and touch no memory.
    let (foreground, own) = unsafe { (libc::tcgetpgrp(fd), libc::getpgrp()) };
    foreground == -1 || foreground == own
}

/// Columns and rows of terminal `fd`; None when it is no terminal, or has no window.
#[must_use]
pub fn window_size(fd: RawFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes a winsize.
    let rc = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) };
    (rc == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// A descriptor that reports signals as readable data (`signalfd(2)`); the signals are blocked from then on, in this
/// thread and in those it starts.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks `signals` and opens the descriptor.
    ///
    /// # Errors
    /// As the system calls.
    pub fn new(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = vmm_sys_util::signal::create_sigset(signals).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        // SAFETY: `set` is a valid signal set; no old set is asked for.
        let rc = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::from_raw_os_error(rc));
        }
        // SAFETY: `set` is a valid signal set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor and nobody else holds it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of the next pending signal, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<libc::c_int> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is `size` bytes long and ours.
        let n = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(n) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel filled the whole structure, which is plain data.
        let number = unsafe { info.assume_init() }.ssi_signo;
        libc::c_int::try_from(number).ok()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Whether a write to `fd` would not block now.
#[must_use]
pub fn writable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd; a timeout of zero returns at once.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLOUT != 0 }
}

/// The peak resident set of this process in KiB.
#[must_use]
pub fn peak_rss_kib() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid buffer for the structure.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: the call succeeded and filled the structure, which is plain data.
    u64::try_from(unsafe { usage.assume_init() }.ru_maxrss).unwrap_or(0)
}
