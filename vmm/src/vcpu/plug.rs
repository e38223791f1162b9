//! vCPUs that come and go while the pod runs. KVM keeps a vCPU for the life of its VM, so one that goes is parked, in
//! the state of one that was just made, and runs again when it comes back.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::VcpuFd;

use super::{Vcpu, VcpuThread, Vcpus, affinity, kick, lock};

/// Small: the loop is shallow, and a pod may have many vCPUs.
const STACK: usize = 256 << 10;

impl Vcpus {
    /// Starts a thread for vCPU `index`, which has none. It has its name when this returns, and is paused if the others
    /// are.
    ///
    /// # Errors
    /// When a thread cannot be had; the vCPU is parked then.
    pub fn plug(&mut self, index: u32, fd: VcpuFd) -> io::Result<()> {
        let (begun, begins) = sync_channel(1);
        self.spawn(index, fd, Some(begun))?;
        // An error: it panicked, and said so.
        let _ = begins.recv();
        if self.paused {
            self.wait_parked();
        }
        Ok(())
    }

    /// Ends the thread of vCPU `index` and parks the vCPU; whether it had one.
    pub fn unplug(&mut self, index: u32) -> bool {
        let Some(at) = self.threads.iter().position(|vcpu| vcpu.index == index) else {
            return false;
        };
        let vcpu = self.threads.remove(at);
        let wish = lock(&self.control.wish);
        vcpu.retire.store(true, Ordering::SeqCst);
        drop(wish);
        self.control.changed.notify_all();
        kick::kick(&vcpu.thread);
        // A panicking thread has been reported by its own message.
        if let Ok(Some(mut fd)) = vcpu.thread.join() {
            if let Err(error) = settle(&mut fd) {
                tracing::warn!(index, %error, "KVM_SET_MP_STATE of a vCPU that was unplugged");
            }
            self.parked.insert(index, fd);
        }
        true
    }

    /// Takes vCPU `index` back, if it was unplugged before.
    pub fn take_parked(&mut self, index: u32) -> Option<VcpuFd> {
        self.parked.remove(&index)
    }

    /// How many are plugged.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Keeps the thread at place `at`, of vCPU `index`, on the host CPUs that are its own; if it cannot, there is no thread.
    fn bind(&mut self, index: u32, at: usize) -> io::Result<()> {
        let (Some(cpus), Some(vcpu)) = (self.context.affinity.get(&index), self.threads.get(at)) else {
            return Ok(());
        };
        let bound = affinity::bind(&vcpu.thread, cpus).map_err(|error| {
            let reason = format!("cpus.affinity: vCPU {index} cannot run on host CPUs {cpus:?}: {error}");
            io::Error::new(error.kind(), reason)
        });
        if bound.is_err() {
            self.unplug(index);
        }
        bound
    }

    /// Starts the thread of vCPU `index`, which tells `begun` that it has its name.
    pub(super) fn spawn(&mut self, index: u32, fd: VcpuFd, begun: Option<SyncSender<()>>) -> io::Result<()> {
        let (control, retire) = (Arc::clone(&self.control), Arc::new(AtomicBool::new(false)));
        let handle = fd.as_raw_fd();
        let vcpu = Vcpu {
            index,
            fd,
            context: self.context.clone(),
            counts: self.context.exits.of(index),
        };
        // Not moved into the thread at once: if there is none, the vCPU must not be lost.
        let slot = Arc::new(Mutex::new(Some(vcpu)));
        let (theirs, ended) = (Arc::clone(&slot), Arc::clone(&retire));
        let spawned = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || {
                // Nobody waits at boot.
                let _ = begun.map(|begun| begun.send(()));
                let vcpu = lock(&theirs).take()?;
                Some(vcpu.run(&control, &ended))
            });
        match spawned {
            Ok(thread) => {
                let at = self.threads.partition_point(|vcpu| vcpu.index < index);
                let vcpu = VcpuThread {
                    index,
                    thread,
                    handle,
                    retire,
                };
                self.threads.insert(at, vcpu);
                self.bind(index, at)
            }
            Err(error) => {
                if let Some(vcpu) = lock(&slot).take() {
                    self.parked.insert(index, vcpu.fd);
                }
                Err(error)
            }
        }
    }
}

/// Finishes the device access that a vCPU may be in the middle of, and has it wait for INIT as a new one does.
fn settle(fd: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
    if fd.get_mp_state()?.mp_state == KVM_MP_STATE_RUNNABLE {
        fd.set_kvm_immediate_exit(1);
        // It does not enter the guest.
        let _ = fd.run();
        fd.set_kvm_immediate_exit(0);
    }
    fd.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_UNINITIALIZED,
    })
}
