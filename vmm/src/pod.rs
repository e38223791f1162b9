//! The one pod that a monitor holds, from vm.create to vm.delete: its configuration, its machine while it runs, and the
//! order in which the two may change. A refused step changes nothing.

mod info;
mod memory;
mod resize;
mod saved;

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use podvisor_api::events::{Source, What};
use podvisor_api::types::{Isolation, PciDeviceInfo, VmConfig};
use podvisor_devices::pci::Bdf;
use serde_json::{Value, json};

use self::info::ShownConfig;
use crate::config::{PlanError, PodPlan};
use crate::consoles::{ConsoleError, Consoles};
use crate::machine::{BootError, BootTimings, DiskError, Machine, Outside, ResizeError};
use crate::registry::{self, AddedNet, Addition, Kept, RegistryError};
use crate::sandbox::landlock::{self, Grant, LandlockError};
use crate::snapshot::SnapshotError;
use crate::telling::Telling;
use crate::vcpu::ExitSignal;

/// The event loop's type.
pub type Events = EventManager<Box<dyn MutEventSubscriber>>;

/// Why a step was refused.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// There is no pod.
    #[error("VM is not created: send vm.create first")]
    NotCreated,
    /// There is one already.
    #[error("VM is already created: send vm.delete first, or start another monitor for another pod")]
    AlreadyCreated,
    /// It runs already.
    #[error("VM is already booted")]
    AlreadyRunning,
    /// It does not run.
    #[error("VM is not booted: send vm.boot first")]
    NotRunning,
    /// It is paused already, or not paused.
    #[error("VM is {0} already")]
    Already(&'static str),
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] PlanError),
    /// One of its consoles.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Its boot failed; it stays created.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// There is no such device.
    #[error("no device is named {0:?}: vm.info has the names")]
    NoDevice(String),
    /// The pod cannot have the device beside those it has.
    #[error("{0}")]
    Conflict(&'static str),
    /// The device cannot be made.
    #[error(transparent)]
    Refused(#[from] RegistryError),
    /// A disk keeps its size.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It cannot have these sizes.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// It cannot be saved or restored.
    #[error(transparent)]
    Unsaved(BootError),
    /// Its snapshot's files.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The monitor cannot be kept to its files.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// A device failed.
    #[error("{0}")]
    Device(&'static str, #[source] std::io::Error),
}

/// Bytes of memory from which on its taking back is expected to take long (a few milliseconds a GiB in use).
const MUCH_MEMORY: u64 = 2 << 30;

struct Running {
    machine: Machine,
    /// By the place of the device they serve, none for the chipset's: a name may be used again, a place not while it is
    /// taken.
    subscribers: Vec<(Option<Bdf>, SubscriberId)>,
}

struct Pod {
    plan: PodPlan,
    running: Option<Running>,
    timings: Option<BootTimings>,
    /// Behind the machine, whose devices use them.
    consoles: Consoles,
}

/// Room for one pod.
pub struct PodSlot {
    pod: Option<Pod>,
    exit: Arc<ExitSignal>,
    start: Instant,
    expect_digest: Option<[u8; 48]>,
    created_at: Option<Duration>,
    booted_at: Option<Duration>,
    telling: Telling,
    /// What the monitor itself needs under Landlock.
    files: Vec<Grant>,
    shown: ShownConfig,
}

impl PodSlot {
    /// An empty slot of a monitor that began at `start`. `expect_digest` is required of every boot.
    #[must_use]
    pub fn new(exit: Arc<ExitSignal>, start: Instant, expect_digest: Option<[u8; 48]>) -> Self {
        Self {
            pod: None,
            exit,
            start,
            expect_digest,
            created_at: None,
            booted_at: None,
            telling: Telling::default(),
            files: Vec::new(),
            shown: ShownConfig::default(),
        }
    }

    /// Has a pod with `landlock_enable` leave the monitor what it needs itself, beside what the pod names.
    pub fn keep(&mut self, file: Grant) {
        self.files.push(file);
    }

    /// Has `telling` told of what happens.
    pub fn tell(&mut self, telling: Telling) {
        self.telling = telling;
    }

    /// Takes `config` for the pod.
    ///
    /// # Errors
    /// When there is a pod, or the configuration cannot be.
    pub fn create(&mut self, config: VmConfig) -> Result<(), PodError> {
        if self.pod.is_some() {
            return Err(PodError::AlreadyCreated);
        }
        let mut plan = PodPlan::new(config, self.expect_digest)?;
        let consoles = Consoles::open(&mut plan.config)?;
        registry::scratch::open(&plan.config, &mut plan.descriptors)?;
        tracing::info!(
            vcpus = plan.vcpus,
            memory_bytes = plan.memory,
            isolation = isolation_name(plan.isolation),
            "pod created"
        );
        self.created_at = Some(self.start.elapsed());
        self.pod = Some(Pod {
            plan,
            running: None,
            timings: None,
            consoles,
        });
        Ok(())
    }

    /// Gives the created pod the TAP queues of its network device number `net`.
    ///
    /// # Errors
    /// When there is no such device, or it has another number of queues.
    pub fn hand_over(&mut self, net: usize, fds: Vec<OwnedFd>) -> Result<(), PodError> {
        let plan = &mut self.pod.as_mut().ok_or(PodError::NotCreated)?.plan;
        let gone = || PodError::NoDevice(format!("net[{net}]"));
        let config = plan.config.net().get(net).ok_or_else(gone)?.clone();
        let id = config.id.clone().ok_or_else(gone)?;
        let fds = Arc::new(fds);
        let added = AddedNet { config, fds };
        added.check().map_err(PlanError::Config)?;
        plan.descriptors.insert(id, added.fds);
        Ok(())
    }

    /// Boots it. When it returns, the vCPU threads run.
    ///
    /// # Errors
    /// When there is none, it runs, or it cannot boot; it stays created then.
    pub fn boot(&mut self, events: &mut Events) -> Result<(), PodError> {
        self.boot_with(&Kept::default(), events)
    }

    /// As [`PodSlot::boot`], with devices of the machine before.
    fn boot_with(&mut self, kept: &Kept, events: &mut Events) -> Result<(), PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        if pod.running.is_some() {
            return Err(PodError::AlreadyRunning);
        }
        landlock::enter(&pod.plan.config, &self.files)?;
        self.telling.vm(What::Booting);
        let outside = Outside {
            exit: &self.exit,
            telling: &self.telling,
            consoles: &pod.consoles,
            kept,
        };
        let (machine, subscribers) = Machine::boot(&pod.plan, outside)?;
        let subscribers = subscribers
            .into_iter()
            .map(|(place, s)| (place, events.add_subscriber(s)))
            .collect();
        let timings = machine.timings();
        tracing::info!(milliseconds = millis(timings.total), "pod booted");
        pod.timings = Some(timings);
        pod.running = Some(Running { machine, subscribers });
        self.booted_at = Some(self.start.elapsed());
        self.telling.vm(What::Booted);
        Ok(())
    }

    /// Whether booting it may take long: pages are touched one by one, an image is measured or copied, or another process
    /// is asked for a device.
    #[must_use]
    pub fn boot_may_take_long(&self) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.plan.boot_may_take_long())
    }

    /// Whether stopping it may take long: the host takes its memory back page by page.
    #[must_use]
    pub fn stop_may_take_long(&self) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.plan.memory >= MUCH_MEMORY)
    }

    /// Whether resizing it may take long: new pages are touched one by one.
    #[must_use]
    pub fn resize_may_take_long(&self) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.plan.ram.prefault)
    }

    /// Stops it; it stays created.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stop(&mut self, events: &mut Events) -> Result<(), PodError> {
        self.halt(events, drop)
    }

    /// Stops it and hands its machine, whose vCPUs stand, to `end`.
    fn halt<T>(&mut self, events: &mut Events, end: impl FnOnce(Machine) -> T) -> Result<T, PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        let running = pod.running.take().ok_or(PodError::NotRunning)?;
        let left = stop(running, events, &self.exit, end);
        self.telling.vm(What::Shutdown);
        Ok(left)
    }

    /// Stops it if it runs, and forgets it.
    pub fn delete(&mut self, events: &mut Events) {
        let Some(pod) = self.pod.take() else {
            return;
        };
        if let Some(running) = pod.running {
            stop(running, events, &self.exit, drop);
            self.telling.vm(What::Shutdown);
        }
        self.telling.vm(What::Deleted);
    }

    /// Stops it and boots it again. Disks stay open and back ends connected.
    ///
    /// # Errors
    /// As [`PodSlot::stop`] and [`PodSlot::boot`].
    pub fn reboot(&mut self, events: &mut Events) -> Result<(), PodError> {
        if self.pod.as_ref().is_some_and(|pod| pod.running.is_some()) {
            self.telling.vm(What::Rebooting);
        }
        let kept = self.halt(events, Machine::end)?;
        self.boot_with(&kept, events)?;
        self.telling.vm(What::Rebooted);
        Ok(())
    }

    /// Stops its vCPUs where they are.
    ///
    /// # Errors
    /// When it does not run, or is paused.
    pub fn pause(&mut self) -> Result<(), PodError> {
        let telling = self.telling.clone();
        let machine = self.machine_mut()?;
        if machine.paused() {
            return Err(PodError::Already("paused"));
        }
        telling.vm(What::Pausing);
        machine.pause();
        telling.vm(What::Paused);
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// When it does not run, or is not paused.
    pub fn resume(&mut self) -> Result<(), PodError> {
        let telling = self.telling.clone();
        let machine = self.machine_mut()?;
        if !machine.paused() {
            return Err(PodError::Already("running"));
        }
        telling.vm(What::Resuming);
        machine.resume();
        telling.vm(What::Resumed);
        Ok(())
    }

    /// The monitor's terminal has another size.
    pub fn window_changed(&mut self) {
        if let Some(pod) = &mut self.pod {
            pod.consoles.window_changed();
        }
    }

    /// Presses its power button.
    ///
    /// # Errors
    /// When it does not run, or the interrupt cannot be raised.
    pub fn power_button(&mut self) -> Result<(), PodError> {
        self.machine_mut()?
            .power_button()
            .map_err(|e| PodError::Device("raising the power button's interrupt", e))
    }

    /// Sends its vCPUs an NMI each, as an operator does who wants a hung guest to say where it hangs.
    ///
    /// # Errors
    /// When it does not run, or a vCPU does not take it.
    pub fn nmi(&mut self) -> Result<(), PodError> {
        self.machine_mut()?
            .nmi()
            .map_err(|e| PodError::Device("sending the NMI", e))
    }

    /// Adds a device: to the configuration, and to the machine if it runs, which tells where it is.
    ///
    /// # Errors
    /// When the device cannot be; nothing has changed then.
    pub fn add(&mut self, addition: &dyn Addition, events: &mut Events) -> Result<Option<PciDeviceInfo>, PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        if let Some(id) = addition.known(&pod.plan.config) {
            let devices = pod.running.as_ref().map(|r| r.machine.devices()).unwrap_or_default();
            return Ok(devices.iter().find(|d| d.id == id).map(|d| PciDeviceInfo {
                id: d.id.clone(),
                bdf: d.bdf.to_string(),
            }));
        }
        let mut config = pod.plan.config.clone();
        addition.put(&mut config).map_err(PodError::Conflict)?;
        let mut plan = PodPlan::changed(config, self.expect_digest)?.keeping(&pod.plan);
        plan.descriptors.extend(addition.descriptors(&plan.config));
        let info = match &mut pod.running {
            None => None,
            Some(running) => {
                let wanted = addition.make(&plan.config, &running.machine.means(&plan))?;
                let id = wanted.id.clone();
                if running.machine.devices().iter().any(|device| device.id == id) {
                    return Err(PodError::Conflict(
                        "the name belongs to a device that the guest has not let go of yet; give another id",
                    ));
                }
                let (bdf, subscriber) = running.machine.add(wanted)?;
                running.subscribers.push((Some(bdf), events.add_subscriber(subscriber)));
                tracing::info!(id, %bdf, "device added");
                Some(PciDeviceInfo {
                    id,
                    bdf: bdf.to_string(),
                })
            }
        };
        pod.plan = plan;
        Ok(info)
    }

    /// Takes a device out of the configuration, and asks a running guest to let go of it.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn remove(&mut self, id: &str) -> Result<(), PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        let mut config = pod.plan.config.clone();
        if registry::stays(&config, id) {
            return Err(PodError::Conflict(
                "the device is a part of the pod and stays in it: leave it out in vm.create",
            ));
        }
        let configured = registry::take_out(&mut config, id);
        // Made before the guest is told: what cannot be planned without the device is refused while nothing has changed.
        let plan = configured
            .then(|| PodPlan::changed(config, self.expect_digest))
            .transpose()?;
        let plugged = match &mut pod.running {
            Some(running) => running
                .machine
                .unplug(id)
                .map_err(|e| PodError::Device("raising the hotplug interrupt", e))?,
            None => false,
        };
        if !configured && !plugged {
            return Err(PodError::NoDevice(id.to_owned()));
        }
        if let Some(mut plan) = plan {
            plan = plan.keeping(&pod.plan);
            plan.descriptors.remove(id);
            pod.plan = plan;
        }
        Ok(())
    }

    /// Takes out the devices and vCPUs that the guest has let go of.
    pub fn ejected(&mut self, events: &mut Events) {
        self.vcpus_ejected();
        for (segment, slot) in self.exit.take_ejected() {
            let Some(running) = self.pod.as_mut().and_then(|pod| pod.running.as_mut()) else {
                continue;
            };
            let Some((name, bdf)) = running.machine.ejected(segment, slot) else {
                tracing::debug!(segment, slot, "the guest ejects a device that it was not asked to");
                continue;
            };
            if let Some(index) = running.subscribers.iter().position(|(place, _)| *place == Some(bdf)) {
                let (_, subscriber) = running.subscribers.remove(index);
                if let Err(error) = events.remove_subscriber(subscriber) {
                    tracing::warn!(?error, "a device was not on the event loop");
                }
            }
            tracing::info!(id = name, "device removed");
            let bdf = bdf.to_string();
            self.telling
                .tell(Source::Vm, What::DeviceRemoved, &[("id", &name), ("bdf", &bdf)]);
        }
    }

    /// The counters of its devices.
    ///
    /// # Errors
    /// When it does not run.
    pub fn counters(&mut self) -> Result<Value, PodError> {
        Ok(json!(self.machine_mut()?.counters()))
    }

    fn machine_mut(&mut self) -> Result<&mut Machine, PodError> {
        let pod = self.pod.as_mut().ok_or(PodError::NotCreated)?;
        pod.running.as_mut().map(|r| &mut r.machine).ok_or(PodError::NotRunning)
    }
}

/// Stops the vCPUs first, then takes the devices off the loop.
fn stop<T>(running: Running, events: &mut Events, exit: &ExitSignal, end: impl FnOnce(Machine) -> T) -> T {
    let Running {
        mut machine,
        subscribers,
    } = running;
    machine.pause();
    for (_, id) in subscribers {
        if let Err(error) = events.remove_subscriber(id) {
            tracing::warn!(?error, "a device was not on the event loop");
        }
    }
    let left = end(machine);
    // What the guest asked for while it was being stopped is answered by that.
    drop(exit.take_ejected());
    drop(exit.take_ejected_vcpus());
    if let Some(reason) = exit.take() {
        tracing::debug!(?reason, "the guest ended while it was being stopped");
    }
    left
}

fn isolation_name(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::None => "none",
        Isolation::Snp => "snp",
        Isolation::SnpEmulated => "snp-emulated",
    }
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The status class of an error, as HTTP has it.
impl PodError {
    /// The HTTP status that tells a client whose fault it was.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::NotCreated | Self::NoDevice(_) => 404,
            Self::Resize(error) => error.status(),
            Self::Config(PlanError::Config(error)) if error.conflict => 409,
            Self::Config(_) | Self::Refused(_) | Self::Disk(_) | Self::Console(_) => 400,
            // What Cloud Hypervisor's description has for a VM that is not booted.
            Self::NotRunning => 405,
            Self::Conflict(_) | Self::AlreadyCreated | Self::AlreadyRunning | Self::Already(_) => 409,
            Self::Snapshot(error) if error.is_the_hosts() => 500,
            Self::Unsaved(_) | Self::Snapshot(_) => 400,
            Self::Landlock(LandlockError::Path { .. }) => 400,
            Self::Boot(_) | Self::Landlock(_) | Self::Device(..) => 500,
        }
    }

    /// The error and its causes, one string each.
    #[must_use]
    pub fn causes(&self) -> Vec<String> {
        let mut causes: Vec<String> = vec![self.to_string()];
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if causes.last() != Some(&text) {
                causes.push(text);
            }
            cause = error.source();
        }
        causes
    }
}
