//! virtio-watchdog as Cloud Hypervisor has it (device type 35, one queue): a driver that has once sent a ping must send
//! one every [`TIMEOUT`], or the pod is reset. A ping is a chain with a writable buffer, of which the first byte is
//! set to 1.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_WATCHDOG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use super::state::{self, StateError};
use crate::legacy::{ExitReason, ExitSink};
use crate::memory::PodMemory;
use crate::rate_limiter::Timer;

/// The longest time between two pings, Cloud Hypervisor's.
pub const TIMEOUT: Duration = Duration::from_secs(20);
/// Size of the one queue, Cloud Hypervisor's.
const QUEUE_SIZE: u16 = 8;

/// What the two sides share.
#[derive(Debug)]
struct Shared {
    paused: AtomicBool,
    event: EventFd,
}

/// The monitor's side of a watchdog.
#[derive(Clone, Debug)]
pub struct WatchdogHandle(Arc<Shared>);

impl WatchdogHandle {
    /// The pod is paused, or goes on. While it is paused no time passes; then the driver has the whole time again.
    pub fn set_paused(&self, paused: bool) {
        self.0.paused.store(paused, Ordering::Release);
        // Full: it is readable already.
        let _ = self.0.event.write(1);
    }
}

/// A virtio watchdog.
pub struct Watchdog {
    timeout: Duration,
    sink: Arc<dyn ExitSink>,
    timer: Timer,
    shared: Arc<Shared>,
    /// A ping has come; from then on they must.
    watching: bool,
    active: Option<(Arc<PodMemory>, ActiveQueue)>,
    pings: u64,
    expirations: u64,
    failed_chains: u64,
}

impl Watchdog {
    /// A watchdog that asks `sink` for a reset after `timeout` (as a rule [`TIMEOUT`]) without a ping.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(timeout: Duration, sink: Arc<dyn ExitSink>) -> io::Result<Self> {
        Ok(Self {
            timeout,
            sink,
            timer: Timer::new()?,
            shared: Arc::new(Shared {
                paused: AtomicBool::new(false),
                event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            watching: false,
            active: None,
            pings: 0,
            expirations: 0,
            failed_chains: 0,
        })
    }

    /// The monitor's side.
    #[must_use]
    pub fn handle(&self) -> WatchdogHandle {
        WatchdogHandle(Arc::clone(&self.shared))
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some((memory, mut queue)) = self.active.take() else {
            return Ok(());
        };
        let result = self.run(&memory, &mut queue);
        self.active = Some((memory, queue));
        result
    }

    fn run(&mut self, memory: &Arc<PodMemory>, queue: &mut ActiveQueue) -> Result<(), DeviceError> {
        let mut budget = u32::from(queue.size()).saturating_mul(2);
        let mut used = false;
        let mut pinged = false;
        'all: loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                let len = answer(memory, chain);
                let counter = if len == 0 {
                    &mut self.failed_chains
                } else {
                    &mut self.pings
                };
                *counter = counter.saturating_add(1);
                pinged |= len > 0;
                queue.add_used(memory, head, len)?;
                used = true;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    // Full: it is readable already.
                    let _ = self.shared.event.write(1);
                    break 'all;
                }
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        if pinged {
            self.watching = true;
            self.restart()?;
        }
        if used { queue.signal(memory) } else { Ok(()) }
    }

    /// Gives the driver the whole time, if it is to be watched now.
    fn restart(&mut self) -> Result<(), DeviceError> {
        if !self.watching || self.shared.paused.load(Ordering::Acquire) {
            self.timer.stop();
            return Ok(());
        }
        self.timer.start(self.timeout).map_err(|source| DeviceError::Host {
            what: "setting the watchdog's timer",
            source,
        })
    }
}

/// Answers a ping; how many bytes were written.
fn answer(memory: &PodMemory, chain: DescriptorChain<Arc<PodMemory>>) -> u32 {
    let mut chain = chain;
    let buffer = chain.next().filter(|d| d.is_write_only() && d.len() > 0);
    u32::from(buffer.is_some_and(|d| memory.write_obj(1_u8, d.addr()).is_ok()))
}

/// The system calls that it makes beyond the monitor's own (`libc::SYS_*`).
pub const SYSCALLS: &[i64] = &[
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_read,
    libc::SYS_write,
];

impl VirtioDevice for Watchdog {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_WATCHDOG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.into_iter().next().flatten();
        self.active = queue.map(|queue| (activation.memory, queue));
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.timer.fd(), self.shared.event.as_raw_fd()]
    }

    fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        if index == 0 {
            if self.timer.expired() {
                self.expirations = self.expirations.saturating_add(1);
                // Until the next ping: the reset takes its time, and one is enough.
                self.watching = false;
                tracing::warn!(timeout = ?self.timeout, "the watchdog heard no ping in time: reset");
                self.sink.exit(ExitReason::Reset);
            }
            return Ok(());
        }
        // An error: it is not readable, another turn took it.
        let _ = self.shared.event.read();
        self.restart()?;
        self.serve()
    }

    fn save(&mut self) -> Result<Value, StateError> {
        Ok(Value::Bool(self.watching))
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        self.watching = state::parse(state)?;
        // A driver that was saved has the whole time again.
        Ok(self.restart()?)
    }

    fn reset(&mut self) {
        self.active = None;
        self.watching = false;
        self.timer.stop();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("pings", self.pings),
            ("expirations", self.expirations),
            ("failed_chains", self.failed_chains),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::virtio::testing::{Buf, Harness};

    #[derive(Default)]
    struct Resets(Mutex<Vec<ExitReason>>);
    impl ExitSink for Resets {
        fn exit(&self, reason: ExitReason) {
            self.0.lock().unwrap().push(reason);
        }
    }

    const NEVER: Duration = Duration::from_secs(1 << 30);
    const SOON: Duration = Duration::from_millis(1);

    fn watchdog(timeout: Duration) -> (Harness<Watchdog>, Arc<Resets>) {
        let resets = Arc::new(Resets::default());
        let mut h = Harness::new(Watchdog::new(timeout, Arc::clone(&resets) as Arc<dyn ExitSink>).unwrap());
        h.activate().unwrap();
        (h, resets)
    }

    fn ping(h: &mut Harness<Watchdog>) {
        h.push(0, &[Buf::Write(1)]);
        h.kick(0).unwrap();
        let done = h.completed(0);
        assert_eq!((done[0].len, &done[0].data), (1, &vec![1]));
    }

    #[test]
    fn a_silent_driver_is_reset_once() {
        let (mut h, resets) = watchdog(SOON);
        assert!(!h.poll_events(5).unwrap(), "not before the first ping");
        ping(&mut h);
        assert!(h.poll_events(60_000).unwrap());
        assert!(!h.poll_events(5).unwrap());
        assert_eq!(*resets.0.lock().unwrap(), [ExitReason::Reset]);
        ping(&mut h);
        assert!(h.poll_events(60_000).unwrap());
        assert_eq!(resets.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_paused_or_reset_pod_is_left_alone() {
        let (mut h, resets) = watchdog(SOON);
        let handle = h.device.handle();
        handle.set_paused(true);
        assert!(h.poll_events(60_000).unwrap());
        ping(&mut h);
        assert!(!h.poll_events(5).unwrap(), "paused");
        assert!(resets.0.lock().unwrap().is_empty());
        handle.set_paused(false);
        while resets.0.lock().unwrap().is_empty() {
            assert!(h.poll_events(60_000).unwrap(), "time passes again");
        }
        ping(&mut h);
        h.reset();
        h.device.on_event(0).unwrap();
        assert!(!h.poll_events(5).unwrap());
        assert_eq!(resets.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn chains_that_are_no_ping_come_back_and_start_nothing() {
        let (mut h, _resets) = watchdog(NEVER);
        h.push(0, &[Buf::Read(&[1])]);
        h.push(0, &[Buf::Read(&[1]), Buf::Write(1)]);
        let gpa = u64::MAX;
        let raw = crate::virtio::testing::RawBuf {
            gpa,
            len: 1,
            writable: true,
        };
        h.push_raw(0, &[raw]);
        h.kick(0).unwrap();
        assert!(h.used(0).iter().all(|(_, len)| *len == 0));
        let counters = h.device.counters();
        assert_eq!(counters, [("pings", 0), ("expirations", 0), ("failed_chains", 3)]);
        assert!(!h.device.watching);
        ping(&mut h);
        assert!(h.device.watching);
    }
}
