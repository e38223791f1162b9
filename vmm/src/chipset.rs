//! The fixed part of a pod's machine: the two buses, PCI segments, serial port, debug port, pvpanic, clock, ACPI
//! registers. What a configuration adds as virtio devices is `registry`'s.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::MutEventSubscriber;
use podvisor_devices::bus::{Bus, BusDevice, BusError, SharedBusDevice};
use podvisor_devices::host_console::{HostConsoleSubscriber, SharedHostConsole};
use podvisor_devices::legacy::{
    AcpiPower, Cmos, CpuHotplug, DebugConsole, DebugPort, ExitReason, ExitSink, Ged, GedEvent, HotplugSink, I8042,
    IoApic, PciHotplug, PmTimer, Serial, SerialSubscriber,
    acpi_pm::{ACPI_POWER_SIZE, PM_TIMER_SIZE},
    cmos::CMOS_SIZE,
    debug_console::DEBUG_CONSOLE_SIZE,
    hotplug::{CPU_HOTPLUG_SIZE, PCI_HOTPLUG_SIZE},
    i8042::I8042_SIZE,
    memory_hotplug::{MEMORY_HOTPLUG_SIZE, MemoryHotplug, MemoryHotplugError},
    serial::SERIAL_SIZE,
};
use podvisor_devices::pci::{Bdf, PciRoot, Window};
use podvisor_firmware::acpi::AcpiMachine;
use podvisor_firmware::layout;
use podvisor_firmware::plan::GpaRange;
use podvisor_firmware::stage0::codes;

use crate::consoles::Consoles;
use crate::kvm::KvmHypervisor;
use crate::vcpu::{ExitSignal, GuestIo, PodExit};

/// Bytes of the PCI configuration ports.
const PCI_CONFIG_PORTS: u64 = 8;

/// Why the chipset cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ChipsetError {
    /// Two devices at one address: more segments or a narrower address space than the map has room for.
    #[error("the guest's address map")]
    Bus(#[from] BusError),
    /// The debug port is where another device is.
    #[error("debug_console.iobase {port:#x} is taken; give a free port, such as 0xe9")]
    DebugConsole {
        /// The port.
        port: u16,
        /// By whom.
        source: BusError,
    },
}

/// The two buses, as vCPUs use them.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// MMIO.
    pub mmio: Arc<Bus>,
}

impl GuestIo for Buses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if !self.pio.read(port.into(), data) {
            tracing::trace!("IN from port {port:#x}, where nothing is");
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if !self.pio.write(port.into(), data) {
            tracing::trace!("OUT to port {port:#x}, where nothing is");
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if !self.mmio.read(gpa, data) {
            tracing::trace!("read of {gpa:#x}, where nothing is");
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.mmio.write(gpa, data) {
            tracing::trace!("write to {gpa:#x}, where nothing is");
        }
    }
}

/// Passes what the guest asks for on to the control loop.
struct Asks(Arc<ExitSignal>);

/// Passes a device's wish to end the pod on to the control loop.
pub(crate) fn ends(exit: &Arc<ExitSignal>) -> Arc<dyn ExitSink> {
    Arc::new(Asks(Arc::clone(exit)))
}

impl ExitSink for Asks {
    fn exit(&self, reason: ExitReason) {
        self.0.give(match reason {
            ExitReason::PowerOff => PodExit::Shutdown,
            ExitReason::Reset => PodExit::Reset,
            ExitReason::Refused(code) => PodExit::Terminated {
                set: codes::REASON_SET,
                code,
            },
        });
    }
}

impl HotplugSink for Asks {
    fn eject_slot(&self, segment: u16, slot: u8) {
        self.0.eject(segment, slot);
    }

    fn eject_vcpu(&self, index: u32) {
        self.0.eject_vcpu(index);
    }
}

/// The fixed devices of a pod.
pub struct Chipset {
    /// The buses.
    pub buses: Arc<Buses>,
    /// PCI segments, in order.
    pub segments: Vec<Arc<PciRoot>>,
    ged: Arc<Mutex<Ged>>,
    cpu_hotplug: Arc<Mutex<CpuHotplug>>,
    /// Always there, for the tables in an IGVM image may name it: without slots it says that nothing is plugged.
    memory_hotplug: Arc<Mutex<MemoryHotplug>>,
    pci_hotplug: Arc<Mutex<PciHotplug>>,
    serial: Option<Arc<Mutex<Serial>>>,
    debug: Option<SharedHostConsole>,
}

fn shared(device: impl BusDevice + 'static) -> SharedBusDevice {
    Arc::new(Mutex::new(device))
}

/// Puts `device` on `bus`.
fn place<D: BusDevice + 'static>(bus: &Bus, at: u64, len: u64, device: D) -> Result<Arc<Mutex<D>>, ChipsetError> {
    let device = Arc::new(Mutex::new(device));
    bus.insert(at, len, Arc::clone(&device) as SharedBusDevice)?;
    Ok(device)
}

/// The devices at ports that no configuration moves and nobody speaks to but the guest; `memory` is bytes of RAM.
fn fixed_ports(pio: &Bus, memory: u64, exit: &Arc<ExitSignal>) -> Result<(), ChipsetError> {
    let ends = ends(exit);
    let below = memory.min(layout::MEM_32BIT_RESERVED_START);
    let cmos = Cmos::new(below, memory - below, Arc::clone(&ends));
    let ports: [(u16, u64, SharedBusDevice); 5] = [
        (layout::CMOS_PORT, CMOS_SIZE, shared(cmos)),
        (layout::DEBUG_PORT, 1, shared(DebugPort)),
        (layout::I8042_PORT, I8042_SIZE, shared(I8042::new(Arc::clone(&ends)))),
        (
            layout::ACPI_SHUTDOWN_PORT,
            ACPI_POWER_SIZE,
            shared(AcpiPower::new(ends)),
        ),
        (layout::ACPI_PM_TIMER_PORT, PM_TIMER_SIZE, shared(PmTimer::new())),
    ];
    for (port, len, device) in ports {
        pio.insert(port.into(), len, device)?;
    }
    Ok(())
}

impl Chipset {
    /// Builds the devices of `machine` with `memory` bytes of RAM.
    ///
    /// # Errors
    /// [`ChipsetError`].
    pub fn new(
        machine: &AcpiMachine,
        memory: u64,
        consoles: &Consoles,
        kvm: &KvmHypervisor,
        exit: &Arc<ExitSignal>,
    ) -> Result<Self, ChipsetError> {
        let buses = Arc::new(Buses::default());
        let (pio, mmio) = (&buses.pio, &buses.mmio);
        fixed_ports(pio, memory, exit)?;
        let segments = pci(machine, &buses)?;
        let vm = Arc::clone(kvm.vm());
        let send = Box::new(move |message| KvmHypervisor::send_msi(&vm, &message));
        let ioapic = place(mmio, layout::IOAPIC_START, layout::IOAPIC_SIZE, IoApic::new(send))?;
        let line = |irq: u32| IoApic::line(&ioapic, usize::try_from(irq).unwrap_or(usize::MAX));
        let area = machine.device_area();
        let ged = place(mmio, area.ged, layout::GED_SIZE, Ged::new(line(layout::GED_IRQ)))?;
        let hotplug: Arc<dyn HotplugSink> = Arc::new(Asks(Arc::clone(exit)));
        let count = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let cpus = CpuHotplug::new(count(machine.vcpus), count(machine.max_vcpus), Arc::clone(&hotplug));
        let cpu_hotplug = place(mmio, area.cpu_hotplug, CPU_HOTPLUG_SIZE, cpus)?;
        let slots = MemoryHotplug::new(machine.memory_slots, Arc::clone(&hotplug));
        let memory_hotplug = place(mmio, area.memory_hotplug, MEMORY_HOTPLUG_SIZE, slots)?;
        let slots = PciHotplug::new(machine.segments, hotplug);
        let pci_hotplug = place(mmio, area.pci_hotplug, PCI_HOTPLUG_SIZE, slots)?;
        let serial = consoles.serial.as_ref().map(|host| {
            let device = Serial::new(line(layout::SERIAL_IRQ), Arc::clone(host));
            place(pio, layout::SERIAL_PORT.into(), SERIAL_SIZE, device)
        });
        let serial = serial.transpose()?;
        if let Some((port, host)) = &consoles.debug {
            let (port, device) = (*port, shared(DebugConsole::new(Arc::clone(host))));
            pio.insert(port.into(), DEBUG_CONSOLE_SIZE, device)
                .map_err(|source| ChipsetError::DebugConsole { port, source })?;
        }
        Ok(Self {
            buses,
            segments,
            ged,
            cpu_hotplug,
            memory_hotplug,
            pci_hotplug,
            serial,
            debug: consoles.debug.as_ref().map(|(_, host)| Arc::clone(host)),
        })
    }

    /// What the event loop runs for these devices.
    #[must_use]
    pub fn subscribers(&self) -> Vec<Box<dyn MutEventSubscriber>> {
        let serial = self.serial.iter().map(|serial| {
            let subscriber = SerialSubscriber(Arc::clone(serial));
            Box::new(subscriber) as Box<dyn MutEventSubscriber>
        });
        let debug = self.debug.iter().map(|host| {
            let subscriber = HostConsoleSubscriber(Arc::clone(host));
            Box::new(subscriber) as Box<dyn MutEventSubscriber>
        });
        serial.chain(debug).collect()
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn power_button(&self) -> std::io::Result<()> {
        self.notify(GedEvent::PowerButton)
    }

    /// Tells the guest that a device came.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn plugged(&self, bdf: Bdf) -> std::io::Result<()> {
        self.pci_hotplug
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .plugged(bdf.segment, bdf.slot);
        self.notify(GedEvent::Pci)
    }

    /// Asks the guest to let go of a device; it answers by an ejection.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn unplug(&self, bdf: Bdf) -> std::io::Result<()> {
        self.pci_hotplug
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .unplug(bdf.segment, bdf.slot);
        self.notify(GedEvent::Pci)
    }

    /// Tells the guest that `vcpus` came.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn vcpus_plugged(&self, vcpus: Range<u32>) -> std::io::Result<()> {
        let mut controller = self.cpu_hotplug.lock().unwrap_or_else(PoisonError::into_inner);
        for index in vcpus {
            controller.plugged(index);
        }
        drop(controller);
        self.notify(GedEvent::Cpu)
    }

    /// Asks the guest to let go of `vcpus`; it answers by ejections.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn vcpus_unplug(&self, vcpus: Range<u32>) -> std::io::Result<()> {
        let mut controller = self.cpu_hotplug.lock().unwrap_or_else(PoisonError::into_inner);
        for index in vcpus {
            controller.unplug(index);
        }
        drop(controller);
        self.notify(GedEvent::Cpu)
    }

    /// Tells the guest that memory came to `[start, start + len)`. An interrupt that cannot be raised is no error: the
    /// guest sees the memory with the next one.
    ///
    /// # Errors
    /// When there is no slot for it.
    pub fn memory_plugged(&self, start: u64, len: u64) -> Result<(), MemoryHotplugError> {
        let mut controller = self.memory_hotplug.lock().unwrap_or_else(PoisonError::into_inner);
        controller.add(start, len)?;
        drop(controller);
        if let Err(error) = self.notify(GedEvent::Memory) {
            tracing::warn!(%error, "the guest cannot be told of its memory now");
        }
        Ok(())
    }

    fn notify(&self, event: GedEvent) -> std::io::Result<()> {
        self.ged.lock().unwrap_or_else(PoisonError::into_inner).notify(event)
    }
}

impl Drop for Chipset {
    fn drop(&mut self) {
        // The buses and the segments hold each other: take the devices off, so that all of them go.
        for (index, root) in self.segments.iter().enumerate() {
            for slot in 0..layout::PCI_SLOTS {
                drop(root.remove(slot));
            }
            let ecam = layout::PCI_MMCONFIG_START + index as u64 * layout::PCI_MMCONFIG_SEGMENT_SIZE;
            // It is there: `pci` put it there.
            let _ = self.buses.mmio.remove(ecam);
        }
    }
}

fn pci(machine: &AcpiMachine, buses: &Buses) -> Result<Vec<Arc<PciRoot>>, BusError> {
    let window = |range: GpaRange| Window {
        start: range.start,
        len: range.len,
    };
    let mut segments = Vec::with_capacity(machine.segments.into());
    for segment in 0..machine.segments {
        let [low, high] = machine.windows(segment);
        let root = PciRoot::new(segment, Arc::clone(&buses.mmio), window(high), window(low));
        let ecam = layout::PCI_MMCONFIG_START + u64::from(segment) * layout::PCI_MMCONFIG_SEGMENT_SIZE;
        buses
            .mmio
            .insert(ecam, layout::PCI_MMCONFIG_SEGMENT_SIZE, root.ecam())?;
        if segment == 0 {
            buses
                .pio
                .insert(layout::PCI_CONFIG_IO_PORT.into(), PCI_CONFIG_PORTS, root.config_ports())?;
        }
        segments.push(root);
    }
    Ok(segments)
}
