//! The control loop: one thread that waits for the API socket, signals, the pod's end and the devices, and acts on
//! them. Devices are served inside the loop; the rest only raises a flag there and is handled after it, where the loop
//! itself may be changed.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events as Ready, MutEventSubscriber, SubscriberOps};
use podvisor_api::events::What;
use podvisor_api::types::{RestoreConfig, VmConfig};

use podvisor_firmware::stage0::codes;

use crate::api_socket::ApiSocket;
use crate::pod::{Events, PodError, PodSlot};
use crate::sandbox::landlock::Grant;
use crate::sys::SignalFd;
use crate::telling::Telling;
use crate::vcpu::{ExitSignal, PodExit};

/// Why the monitor ended other than well.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A descriptor that the loop needs cannot be had.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The event loop itself failed.
    #[error("event loop: {0:?}")]
    Loop(event_manager::Error),
    /// The pod cannot be created or booted.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The pod ended itself.
    #[error("the pod stopped: {0}")]
    Stopped(String),
}

/// Raises a flag when its descriptor is readable.
struct Watch {
    fd: RawFd,
    raised: Rc<Cell<bool>>,
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, _: Ready, _: &mut EventOps<'_>) {
        self.raised.set(true);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Ready::new_raw(self.fd, EventSet::IN)) {
            tracing::error!(
                ?error,
                fd = self.fd,
                "a descriptor of the control loop cannot be watched"
            );
        }
    }
}

fn watch(events: &mut Events, fd: &impl AsRawFd) -> Rc<Cell<bool>> {
    let raised = Rc::new(Cell::new(false));
    events.add_subscriber(Box::new(Watch {
        fd: fd.as_raw_fd(),
        raised: Rc::clone(&raised),
    }));
    raised
}

/// The monitor of one pod.
pub struct Monitor {
    events: Events,
    pod: PodSlot,
    exit: Arc<ExitSignal>,
    exit_raised: Rc<Cell<bool>>,
    signals: SignalFd,
    signals_raised: Rc<Cell<bool>>,
    api: Option<(ApiSocket, Rc<Cell<bool>>)>,
    telling: Telling,
    /// The monitor is to end, well.
    shutdown: bool,
    /// The pod's end is not the monitor's.
    outlives: bool,
}

impl Monitor {
    /// A monitor of a process that began at `start`. SIGTERM and SIGINT end it in order from here on.
    ///
    /// # Errors
    /// When descriptors cannot be had.
    pub fn new(start: Instant, expect_digest: Option<[u8; 48]>) -> Result<Self, ControlError> {
        let host = |what| move |source| ControlError::Host { what, source };
        // A few descriptors are ready at once at most; each event is handled by its subscriber.
        let mut events = EventManager::new_with_capacity(32).map_err(ControlError::Loop)?;
        let exit = Arc::new(ExitSignal::new().map_err(host("creating the pod's exit signal"))?);
        let exit_raised = watch(&mut events, exit.fd());
        let signals = SignalFd::new(&[libc::SIGTERM, libc::SIGINT, libc::SIGWINCH]).map_err(host("taking signals"))?;
        let signals_raised = watch(&mut events, &signals);
        Ok(Self {
            pod: PodSlot::new(Arc::clone(&exit), start, expect_digest),
            events,
            exit,
            exit_raised,
            signals,
            signals_raised,
            api: None,
            telling: Telling::default(),
            shutdown: false,
            outlives: false,
        })
    }

    /// Has `telling` told of what happens.
    pub fn tell(&mut self, telling: Telling) {
        self.telling = telling.clone();
        self.pod.tell(telling);
    }

    /// Whether the monitor goes on when the pod powers itself off (`--no-shutdown`).
    pub fn outlive_pod(&mut self, outlives: bool) {
        self.outlives = outlives;
    }

    /// Serves the API on `socket`.
    pub fn serve(&mut self, socket: ApiSocket) {
        if let Some(path) = socket.path() {
            // It is removed at the end.
            self.pod.keep(Grant::directory_of(path));
        }
        let raised = watch(&mut self.events, &socket);
        self.api = Some((socket, raised));
    }

    /// Creates and boots a pod, as vm.create and vm.boot do. `taps` are the TAP queues of its network devices, by their
    /// place in `config`.
    ///
    /// # Errors
    /// When either is refused.
    pub fn boot(&mut self, config: VmConfig, taps: Vec<(usize, Vec<OwnedFd>)>) -> Result<(), ControlError> {
        self.pod.create(config)?;
        for (net, fds) in taps {
            self.pod.hand_over(net, fds)?;
        }
        let long = self.pod.boot_may_take_long();
        self.meanwhile(long, PodSlot::boot)
    }

    /// Does `step`; if it may take `long`, the API answers vmm.ping meanwhile.
    fn meanwhile(
        &mut self,
        long: bool,
        step: impl FnOnce(&mut PodSlot, &mut Events) -> Result<(), PodError>,
    ) -> Result<(), ControlError> {
        let (pod, events) = (&mut self.pod, &mut self.events);
        match &mut self.api {
            Some((socket, _)) if long => {
                socket.meanwhile(|| step(pod, events))?;
                // What came meanwhile waits in the socket's queue, of which no descriptor tells.
                socket.serve(pod, events, &mut self.shutdown);
            }
            _ => step(pod, events)?,
        }
        Ok(())
    }

    /// Makes a pod from a snapshot, as vm.restore does.
    ///
    /// # Errors
    /// When it is refused.
    pub fn restore(&mut self, wanted: &RestoreConfig) -> Result<(), ControlError> {
        self.pod.restore(wanted, Vec::new(), &mut self.events)?;
        Ok(())
    }

    /// Runs until the pod or a client or a signal ends it.
    ///
    /// # Errors
    /// When the pod cannot go on, or the loop cannot.
    pub fn run(mut self) -> Result<(), ControlError> {
        let outcome = self.run_loop();
        self.pod.delete(&mut self.events);
        self.telling.vmm(What::Shutdown);
        outcome
    }

    fn run_loop(&mut self) -> Result<(), ControlError> {
        while !self.shutdown {
            match self.events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                Err(error) => return Err(ControlError::Loop(error)),
            }
            if self.signals_raised.take() {
                while let Some(signal) = self.signals.next() {
                    if signal == libc::SIGWINCH {
                        self.pod.window_changed();
                        continue;
                    }
                    tracing::info!(signal, "stopping on a signal");
                    self.shutdown = true;
                }
            }
            if self.exit_raised.take() {
                let reason = self.exit.take();
                self.pod.ejected(&mut self.events);
                if let Some(reason) = reason {
                    self.on_exit(reason)?;
                }
            }
            if let Some((socket, raised)) = &mut self.api
                && raised.take()
            {
                socket.serve(&mut self.pod, &mut self.events, &mut self.shutdown);
            }
        }
        if let Some((socket, _)) = &mut self.api {
            socket.flush();
        }
        Ok(())
    }

    fn on_exit(&mut self, reason: PodExit) -> Result<(), ControlError> {
        match reason {
            PodExit::Shutdown => {
                tracing::info!("the pod powered off");
                if self.outlives {
                    self.pod.stop(&mut self.events)?;
                } else {
                    self.shutdown = true;
                }
                Ok(())
            }
            PodExit::Reset => {
                tracing::info!("the pod resets");
                let long = self.pod.boot_may_take_long() || self.pod.stop_may_take_long();
                self.meanwhile(long, PodSlot::reboot)
            }
            PodExit::Terminated {
                set: codes::REASON_SET,
                code,
            } => Err(ControlError::Stopped(format!(
                "stage0 refused to boot the pod: {} (reason set {} code {code}); the serial port says more",
                codes::words(code),
                codes::REASON_SET
            ))),
            PodExit::Terminated { set, code } => Err(ControlError::Stopped(format!(
                "the confidential guest asked to be terminated, reason set {set} code {code}"
            ))),
            PodExit::Failed(reason) => Err(ControlError::Stopped(reason)),
        }
    }
}
