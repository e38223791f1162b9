//! vCPU threads: one a vCPU, named `vcpu0`, `vcpu1`, … (the shims read these names). A thread enters the guest and
//! serves what makes it leave: port I/O, MMIO, MSRs. Whatever the guest does, the thread goes on, parks, or ends with
//! a reason told to the control loop; it never panics.

mod affinity;
pub mod exits;
mod kick;
mod plug;
mod run_page;
pub mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use podvisor_snp::private_memory;
use podvisor_snp::processor::{MsrOutcome, Processor, ProcessorError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::exits::{Counts, Exits, Kind};
use self::state::{StateError, VcpuState};
use crate::sandbox::seccomp;

/// What answers the guest's port I/O and MMIO. A device lock is held for one access at most.
pub trait GuestIo: Send + Sync {
    /// IN.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A read of unbacked guest memory.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A write to unbacked guest memory.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// Why the pod stopped, or what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodExit {
    /// It powered itself off.
    Shutdown,
    /// It asked for a reset, or triple-faulted.
    Reset,
    /// A confidential guest asked to be terminated, or stage0 refused to boot one that is not.
    Terminated {
        /// Reason code set (GHCB 2.3.1; 1 is Linux's, 2 is podvisor's).
        set: u8,
        /// Reason code.
        code: u8,
    },
    /// It cannot go on.
    Failed(String),
}

/// Tells the control loop that the pod stopped (the first reason counts), and which PCI slots its guest let go of.
#[derive(Debug)]
pub struct ExitSignal {
    reason: Mutex<Option<PodExit>>,
    /// Segment and slot; a set, so that a guest cannot grow it beyond the slots there are.
    ejected: Mutex<BTreeSet<(u16, u8)>>,
    /// vCPUs; as few as there are.
    ejected_vcpus: Mutex<BTreeSet<u32>>,
    /// A reason was given and not taken yet.
    given: AtomicBool,
    fd: EventFd,
}

impl ExitSignal {
    /// A signal not yet given.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            ejected: Mutex::default(),
            ejected_vcpus: Mutex::default(),
            given: AtomicBool::new(false),
            fd: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Gives the reason.
    pub fn give(&self, reason: PodExit) {
        lock(&self.reason).get_or_insert(reason);
        self.given.store(true, Ordering::SeqCst);
        // A full counter is a signal already.
        let _ = self.fd.write(1);
    }

    /// The guest let go of `slot` of `segment`.
    pub fn eject(&self, segment: u16, slot: u8) {
        lock(&self.ejected).insert((segment, slot));
        // A full counter is a signal already.
        let _ = self.fd.write(1);
    }

    /// Takes the slots that the guest let go of.
    pub fn take_ejected(&self) -> BTreeSet<(u16, u8)> {
        std::mem::take(&mut *lock(&self.ejected))
    }

    /// The guest let go of vCPU `index`.
    pub fn eject_vcpu(&self, index: u32) {
        lock(&self.ejected_vcpus).insert(index);
        // A full counter is a signal already.
        let _ = self.fd.write(1);
    }

    /// Takes the vCPUs that the guest let go of.
    pub fn take_ejected_vcpus(&self) -> BTreeSet<u32> {
        std::mem::take(&mut *lock(&self.ejected_vcpus))
    }

    /// Takes the reason, if one was given.
    pub fn take(&self) -> Option<PodExit> {
        let _ = self.fd.read();
        let reason = lock(&self.reason).take();
        self.given.store(false, Ordering::SeqCst);
        reason
    }

    /// Whether a reason was given that nobody took yet.
    #[must_use]
    pub fn given(&self) -> bool {
        self.given.load(Ordering::SeqCst)
    }

    /// Readable when a reason was given.
    #[must_use]
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

struct Control {
    wish: Mutex<Wish>,
    changed: Condvar,
    /// Threads that wait for the wish to change, or have ended.
    parked: Mutex<usize>,
    parked_changed: Condvar,
    /// A quick look for the run loop: the wish is not Run.
    interrupt: AtomicBool,
}

/// Host CPUs by vCPU.
pub type Affinity = BTreeMap<u32, Vec<usize>>;

/// What every vCPU thread of a pod works with.
#[derive(Clone)]
pub struct VcpuContext {
    /// Answers I/O.
    pub io: Arc<dyn GuestIo>,
    /// Host CPUs of the vCPUs whose threads may not run on all, by their index.
    pub affinity: Arc<Affinity>,
    /// Answers MSRs of a confidential pod.
    pub processor: Option<Arc<dyn Processor>>,
    /// Hears why the pod stopped.
    pub exit: Arc<ExitSignal>,
    /// Counts what makes vCPUs leave the guest.
    pub exits: Arc<Exits>,
}

/// The vCPUs of a pod, each with a thread of its own while it is plugged; dropping them stops them.
pub struct Vcpus {
    control: Arc<Control>,
    context: VcpuContext,
    /// In the order of their indices.
    threads: Vec<VcpuThread>,
    /// vCPUs that were plugged and are not now: KVM keeps them for the life of the VM.
    parked: BTreeMap<u32, VcpuFd>,
    paused: bool,
}

struct VcpuThread {
    index: u32,
    /// Gives the vCPU back.
    thread: JoinHandle<Option<VcpuFd>>,
    /// The descriptor that the thread owns until it is joined.
    handle: RawFd,
    /// This one is to end.
    retire: Arc<AtomicBool>,
}

impl Vcpus {
    /// Starts a thread for each of `fds`. Returns when all of them exist under their names and are about to run.
    ///
    /// # Errors
    /// When a thread cannot be had; those already started are stopped.
    pub fn start(fds: Vec<VcpuFd>, context: &VcpuContext) -> io::Result<Self> {
        let mut vcpus = Self::start_paused(fds, context)?;
        vcpus.resume();
        Ok(vcpus)
    }

    /// As [`Vcpus::start`], but paused.
    ///
    /// # Errors
    /// As [`Vcpus::start`].
    pub fn start_paused(fds: Vec<VcpuFd>, context: &VcpuContext) -> io::Result<Self> {
        kick::install()?;
        let control = Arc::new(Control {
            wish: Mutex::new(Wish::Pause),
            changed: Condvar::new(),
            parked: Mutex::new(0),
            parked_changed: Condvar::new(),
            interrupt: AtomicBool::new(true),
        });
        let mut vcpus = Self {
            control,
            context: context.clone(),
            threads: Vec::with_capacity(fds.len()),
            parked: BTreeMap::new(),
            paused: true,
        };
        for (index, fd) in (0u32..).zip(fds) {
            vcpus.spawn(index, fd, None)?;
        }
        vcpus.wait_parked();
        Ok(vcpus)
    }

    /// The state of every vCPU of `vm`, in order; the guest must be paused. `msrs` are those to read.
    ///
    /// # Errors
    /// When a vCPU's cannot be read.
    pub fn save(&self, vm: &VmFd, msrs: &[u32]) -> Result<Vec<VcpuState>, StateError> {
        if !self.paused {
            return Err(StateError::Busy);
        }
        let read = |vcpu: &VcpuThread| VcpuState::read(&mut state::second_handle(vm, vcpu.handle)?, msrs);
        self.threads.iter().map(read).collect()
    }

    /// Sends each vCPU of `vm` an NMI. The guest stands meanwhile: KVM takes a vCPU's calls only while it does not run.
    ///
    /// # Errors
    /// When a vCPU does not take it.
    pub fn nmi(&mut self, vm: &VmFd) -> io::Result<()> {
        let ran = !self.paused;
        self.pause();
        let send = |vcpu: &VcpuThread| {
            let vcpu = state::second_handle(vm, vcpu.handle).map_err(io::Error::other)?;
            vcpu.nmi().map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        let sent = self.threads.iter().try_for_each(send);
        if ran {
            self.resume();
        }
        sent
    }

    /// Stops the guest where it is; returns when no vCPU runs.
    pub fn pause(&mut self) {
        self.want(Wish::Pause);
        self.wait_parked();
        self.paused = true;
    }

    /// Lets a paused guest go on.
    pub fn resume(&mut self) {
        self.want(Wish::Run);
        self.paused = false;
    }

    /// What made them leave the guest, and how often.
    #[must_use]
    pub fn exits(&self) -> &Exits {
        &self.context.exits
    }

    /// Whether the guest is paused.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.paused
    }

    fn want(&self, wish: Wish) {
        let mut current = lock(&self.control.wish);
        *current = wish;
        self.control.interrupt.store(wish != Wish::Run, Ordering::SeqCst);
        drop(current);
        self.control.changed.notify_all();
        // A parked thread is no guest's: it sees the new wish before it runs again.
        if wish != Wish::Run && *lock(&self.control.parked) < self.threads.len() {
            for vcpu in &self.threads {
                kick::kick(&vcpu.thread);
            }
        }
    }

    fn wait_parked(&self) {
        let mut parked = lock(&self.control.parked);
        while *parked < self.threads.len() {
            parked = self
                .control
                .parked_changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.want(Wish::Stop);
        for vcpu in self.threads.drain(..) {
            // A panicking thread has been reported by its own message.
            let _ = vcpu.thread.join();
        }
    }
}

impl Control {
    fn park(&self, by: isize) {
        let mut parked = lock(&self.parked);
        *parked = parked.saturating_add_signed(by);
        drop(parked);
        self.parked_changed.notify_all();
    }

    /// Waits while the wish is to pause. False: the thread is to end, because all are or because of `retire`.
    fn may_run(&self, retire: &AtomicBool) -> bool {
        if retire.load(Ordering::SeqCst) {
            return false;
        }
        if !self.interrupt.load(Ordering::SeqCst) {
            return true;
        }
        let mut wish = lock(&self.wish);
        if *wish == Wish::Pause {
            self.park(1);
            while *wish == Wish::Pause && !retire.load(Ordering::SeqCst) {
                wish = self.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
            }
            self.park(-1);
        }
        *wish == Wish::Run
    }

    /// The thread is done with its guest but not told to end: it counts as parked until then.
    fn wait_for_stop(&self, retire: &AtomicBool) {
        self.park(1);
        let mut wish = lock(&self.wish);
        while *wish != Wish::Stop && !retire.load(Ordering::SeqCst) {
            wish = self.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
        }
        self.park(-1);
    }
}

struct Vcpu {
    index: u32,
    fd: VcpuFd,
    context: VcpuContext,
    counts: Arc<Counts>,
}

/// What the run loop does next.
enum Next {
    Go,
    /// Look at the wish.
    Interrupted,
    /// The pod ended, and the control loop has been told why.
    Ended,
    End(PodExit),
}

impl Vcpu {
    /// Runs the guest until the thread is to end; gives the vCPU back.
    fn run(mut self, control: &Control, retire: &AtomicBool) -> VcpuFd {
        if let Err(error) = seccomp::enter_vcpu() {
            let reason = format!("vCPU {}: {error}", self.index);
            self.context.exit.give(PodExit::Failed(reason));
            control.wait_for_stop(retire);
            return self.fd;
        }
        let kickable = kick::Kickable::new(&mut self.fd);
        if control.may_run(retire) {
            self.context.exits.enters();
        }
        let mut left = false;
        while control.may_run(retire) {
            let next = self.step();
            if !left {
                left = true;
                self.context.exits.leaves();
            }
            match next {
                Next::Go => {}
                Next::Interrupted => self.fd.set_kvm_immediate_exit(0),
                Next::End(reason) => {
                    tracing::debug!(vcpu = self.index, ?reason, "the guest ended");
                    self.context.exit.give(reason);
                    control.wait_for_stop(retire);
                    break;
                }
                Next::Ended => {
                    control.wait_for_stop(retire);
                    break;
                }
            }
        }
        drop(kickable);
        self.fd
    }

    fn step(&mut self) -> Next {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => return Next::Interrupted,
            Err(e) => return Next::End(PodExit::Failed(format!("KVM_RUN of vCPU {}: {e}", self.index))),
        };
        let counts = &*self.counts;
        match exit {
            VcpuExit::IoIn(port, _) | VcpuExit::IoOut(port, _) => {
                counts.count(exits::port(port));
                let io = &self.context.io;
                run_page::for_each_pio(&mut self.fd, |access| match access {
                    run_page::Pio::In(port, data) => io.pio_read(port, data),
                    run_page::Pio::Out(port, data) => io.pio_write(port, data),
                });
                if self.context.exit.given() {
                    Next::Ended
                } else {
                    Next::Go
                }
            }
            VcpuExit::MmioRead(gpa, data) => {
                counts.count(exits::mmio(gpa, &self.context.exits.areas));
                self.context.io.mmio_read(gpa, data);
                Next::Go
            }
            VcpuExit::MmioWrite(gpa, data) => {
                counts.count(exits::mmio(gpa, &self.context.exits.areas));
                self.context.io.mmio_write(gpa, data);
                Next::Go
            }
            VcpuExit::X86Rdmsr(exit) => {
                counts.count(Kind::Msr);
                match read_msr(self.context.processor.as_deref(), self.index, exit.index) {
                    MsrOutcome::Value(value) => *exit.data = value,
                    MsrOutcome::Fault => *exit.error = 1,
                    MsrOutcome::Terminate { set, code } => return Next::End(PodExit::Terminated { set, code }),
                }
                Next::Go
            }
            VcpuExit::X86Wrmsr(exit) => {
                counts.count(Kind::Msr);
                match write_msr(self.context.processor.as_deref(), self.index, exit.index, exit.data) {
                    MsrOutcome::Value(_) => {}
                    MsrOutcome::Fault => *exit.error = 1,
                    MsrOutcome::Terminate { set, code } => return Next::End(PodExit::Terminated { set, code }),
                }
                Next::Go
            }
            VcpuExit::Hypercall(call) => {
                let processor = self.context.processor.as_deref();
                *call.ret = hypercall(processor, call.nr, &call.args);
                Next::Go
            }
            VcpuExit::MemoryFault { flags, gpa, size } => Next::End(PodExit::Failed(format!(
                "vCPU {}: {}",
                self.index,
                memory_fault(self.context.processor.as_deref(), flags, gpa, size)
            ))),
            VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr => {
                counts.count(Kind::Interrupted);
                Next::Interrupted
            }
            // The pins are edges: none waits for its end.
            VcpuExit::IoapicEoi(_) => {
                counts.count(Kind::IoApicEoi);
                Next::Go
            }
            VcpuExit::Shutdown => {
                counts.count(Kind::Other);
                tracing::warn!(vcpu = self.index, "the guest triple-faulted");
                Next::End(PodExit::Reset)
            }
            VcpuExit::SystemEvent(kind, data) => {
                counts.count(Kind::Other);
                Next::End(system_event(kind, data))
            }
            other => {
                let what = format!("{other:?}");
                Next::End(PodExit::Failed(self.refused(&what)))
            }
        }
    }

    /// Words for an exit that cannot be served.
    fn refused(&mut self, exit: &str) -> String {
        let index = self.index;
        let suberror = run_page::internal_error(&mut self.fd);
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        match suberror {
            0 => format!("vCPU {index} left the guest at {rip:#x} with {exit}, which this monitor cannot serve"),
            1 => format!("vCPU {index}: KVM cannot emulate the instruction at {rip:#x}"),
            n => format!("vCPU {index}: KVM internal error {n} at {rip:#x}"),
        }
    }
}

fn read_msr(processor: Option<&dyn Processor>, vcpu: u32, msr: u32) -> MsrOutcome {
    processor.map_or(MsrOutcome::Fault, |p| p.read_msr(vcpu, msr))
}

fn write_msr(processor: Option<&dyn Processor>, vcpu: u32, msr: u32, value: u64) -> MsrOutcome {
    processor.map_or(MsrOutcome::Fault, |p| p.write_msr(vcpu, msr, value))
}

/// The answer to a hypercall that KVM hands out; a pod without a processor of its own is asked for none.
fn hypercall(processor: Option<&dyn Processor>, number: u64, arguments: &[u64; 6]) -> u64 {
    private_memory::hypercall::answer(number, arguments, |gpa, len, private| match processor {
        Some(processor) => processor.page_state_change(gpa, len, private),
        None => Err(ProcessorError {
            op: "KVM_HC_MAP_GPA_RANGE",
            errno: libc::EINVAL,
            fw_error: 0,
            reason: "the pod has no private memory".to_owned(),
        }),
    })
}

/// Words for a touch of memory that KVM cannot give the guest.
fn memory_fault(processor: Option<&dyn Processor>, flags: u64, gpa: u64, size: u64) -> String {
    private_memory::hypercall::memory_fault(flags, gpa, size, processor.map(|p| p.is_shared(gpa, size)))
}

fn system_event(kind: u32, data: &[u64]) -> PodExit {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => PodExit::Shutdown,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => PodExit::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_SEV_TERM => {
            let [_, second, third, ..] = data.first().copied().unwrap_or(0).to_le_bytes();
            PodExit::Terminated {
                set: second >> 4,
                code: third,
            }
        }
        other => PodExit::Failed(format!("KVM reported system event {other}")),
    }
}

#[cfg(test)]
mod tests;
