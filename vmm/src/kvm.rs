//! The devices' view of KVM: doorbells as ioeventfds, MSI vectors as irqfds over lazily made GSI routes. A vector costs nothing before it is raised for the first time: routes that the guest programmed meanwhile go
//! to KVM in one table.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use podvisor_api::events::{Source, What};
use podvisor_devices::platform::{DeviceStep, Hypervisor, MsiMessage, MsiVectors};
use podvisor_firmware::layout::FIRST_MSI_GSI;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::telling::Telling;

/// KVM takes at most this many routes (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: u32 = 4096;

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// KVM as [`Hypervisor`].
pub struct KvmHypervisor {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    telling: Telling,
}

/// The GSI routing table beyond the interrupt pins.
struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<RouteTable>,
}

#[derive(Default)]
struct RouteTable {
    /// Entry `i` is GSI `FIRST_MSI_GSI + i`.
    messages: Vec<Option<MsiMessage>>,
    dirty: bool,
    reserved: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmHypervisor {
    /// The hypervisor side of `vm`, which has local APICs in the kernel ([`split_irqchip`]).
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        let routes = Arc::new(Routes {
            vm: Arc::clone(&vm),
            table: Mutex::default(),
        });
        Self {
            vm,
            routes,
            telling: Telling::default(),
        }
    }

    /// The same, with `telling` told what the devices do.
    #[must_use]
    pub fn told_to(self, telling: &Telling) -> Self {
        Self {
            telling: telling.clone(),
            ..self
        }
    }

    /// Sends `message` without a route: what is rare (interrupt pins) needs no more.
    ///
    /// # Errors
    /// When KVM refuses the message.
    pub fn send_msi(vm: &VmFd, message: &MsiMessage) -> io::Result<()> {
        let (address_lo, address_hi) = halves(message.address);
        let msi = kvm_msi {
            address_lo,
            address_hi,
            data: message.data,
            ..Default::default()
        };
        // A guest that has masked the interrupt, or has no such APIC, is no error of ours.
        vm.signal_msi(msi).map(|_| ()).map_err(os_error)
    }

    /// The VM behind it.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }
}

/// Gives `vm` local APICs in the kernel and no other interrupt controller: interrupt pins are the chipset's, which is
/// why MSI routes begin at [`FIRST_MSI_GSI`].
///
/// # Errors
/// As KVM.
pub fn split_irqchip(vm: &VmFd) -> io::Result<()> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [FIRST_MSI_GSI.into(), 0, 0, 0],
        ..Default::default()
    })
    .map_err(os_error)
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of the address")]
fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

impl Hypervisor for KvmHypervisor {
    fn stepped(&self, id: &str, step: DeviceStep) {
        let tell = |event, more: &[(&str, &str)]| {
            let properties: Vec<_> = [("id", id)].into_iter().chain(more.iter().copied()).collect();
            self.telling.tell(Source::VirtioDevice, event, &properties);
        };
        match step {
            DeviceStep::Activated => tell(What::Activated, &[]),
            DeviceStep::Reset => tell(What::Reset, &[]),
            DeviceStep::Failed => tell(What::Failed, &[]),
            DeviceStep::StorageFailing(code) => {
                let error = io::Error::from_raw_os_error(code).to_string();
                tell(What::StorageFailing, &[("error", &error)]);
            }
            DeviceStep::StorageWorking => tell(What::StorageWorking, &[]),
        }
    }

    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        self.vm
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }

    fn remove_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        self.vm
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }

    fn msi_vectors(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let mut table = lock(&self.routes.table);
        let reserved = table.reserved.saturating_add(u32::from(count));
        if reserved > MAX_ROUTES - FIRST_MSI_GSI {
            return Err(io::Error::other(
                "no interrupt vectors are left: the pod has too many devices",
            ));
        }
        table.reserved = reserved;
        drop(table);
        Ok(Arc::new(Vectors {
            vectors: (0..count).map(|_| Vector::new(Arc::clone(&self.routes))).collect(),
        }))
    }
}

impl Routes {
    /// Gives the table to KVM if it changed.
    fn flush(&self, table: &mut RouteTable) -> io::Result<()> {
        if !table.dirty {
            return Ok(());
        }
        let mut entries = Vec::with_capacity(table.messages.len());
        for (gsi, message) in (FIRST_MSI_GSI..).zip(&table.messages) {
            if let Some(message) = message {
                entries.push(msi_route(gsi, message));
            }
        }
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&routing).map_err(os_error)?;
        table.dirty = false;
        Ok(())
    }
}

fn msi_route(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let (address_lo, address_hi) = halves(message.address);
    entry.u.msi = kvm_irq_routing_msi {
        address_lo,
        address_hi,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// Raising drops the interrupt.
const MASKED: u8 = 0;
/// The route is recorded; KVM has not been told.
const RECORDED: u8 = 1;
/// Writing the descriptor raises the interrupt.
const WIRED: u8 = 2;

struct Vectors {
    vectors: Vec<Vector>,
}

struct Vector {
    routes: Arc<Routes>,
    state: AtomicU8,
    fd: OnceLock<EventFd>,
    inner: Mutex<VectorInner>,
}

#[derive(Default)]
struct VectorInner {
    gsi: Option<u32>,
    message: Option<MsiMessage>,
    registered: bool,
    /// Someone else holds the descriptor and may raise it at any time.
    exported: bool,
}

impl Vector {
    fn new(routes: Arc<Routes>) -> Self {
        Self {
            routes,
            state: AtomicU8::new(MASKED),
            fd: OnceLock::new(),
            inner: Mutex::default(),
        }
    }

    fn fd(&self) -> io::Result<&EventFd> {
        if let Some(fd) = self.fd.get() {
            return Ok(fd);
        }
        let fd = EventFd::new(EFD_NONBLOCK)?;
        Ok(self.fd.get_or_init(|| fd))
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        let Some(new) = message else {
            self.state.store(MASKED, Ordering::Release);
            if inner.exported && inner.registered {
                self.unregister(&mut inner)?;
            }
            return Ok(());
        };
        if inner.message != Some(new) {
            let mut table = lock(&self.routes.table);
            let index = match inner.gsi {
                Some(gsi) => usize::try_from(gsi - FIRST_MSI_GSI).unwrap_or(usize::MAX),
                None => {
                    let index = table.messages.len();
                    table.messages.push(None);
                    inner.gsi = u32::try_from(index).ok().map(|i| FIRST_MSI_GSI + i);
                    index
                }
            };
            if let Some(slot) = table.messages.get_mut(index) {
                *slot = Some(new);
            }
            table.dirty = true;
            inner.message = Some(new);
            self.state.store(RECORDED, Ordering::Release);
        } else if self.state.load(Ordering::Acquire) == MASKED {
            self.state.store(RECORDED, Ordering::Release);
        }
        if inner.exported {
            self.wire(&mut inner)?;
        }
        Ok(())
    }

    /// Tells KVM about the route and the descriptor.
    fn wire(&self, inner: &mut VectorInner) -> io::Result<()> {
        let Some(gsi) = inner.gsi else { return Ok(()) };
        self.routes.flush(&mut lock(&self.routes.table))?;
        if !inner.registered {
            self.routes.vm.register_irqfd(self.fd()?, gsi).map_err(os_error)?;
            inner.registered = true;
        }
        self.state.store(WIRED, Ordering::Release);
        Ok(())
    }

    fn unregister(&self, inner: &mut VectorInner) -> io::Result<()> {
        if let (true, Some(gsi), Some(fd)) = (inner.registered, inner.gsi, self.fd.get()) {
            self.routes.vm.unregister_irqfd(fd, gsi).map_err(os_error)?;
            inner.registered = false;
        }
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        match self.state.load(Ordering::Acquire) {
            MASKED => Ok(()),
            WIRED => self.fd()?.write(1),
            _ => {
                let mut inner = lock(&self.inner);
                if self.state.load(Ordering::Acquire) == MASKED {
                    return Ok(());
                }
                self.wire(&mut inner)?;
                self.fd()?.write(1)
            }
        }
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let mut inner = lock(&self.inner);
        // The VM may be going away too; then there is nothing to undo.
        let _ = self.unregister(&mut inner);
    }
}

impl MsiVectors for Vectors {
    fn set(&self, index: u16, message: Option<MsiMessage>) -> io::Result<()> {
        self.vectors
            .get(usize::from(index))
            .map_or(Ok(()), |vector| vector.set(message))
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        self.vectors.get(usize::from(index)).map_or(Ok(()), Vector::trigger)
    }

    fn eventfd(&self, index: u16) -> Option<EventFd> {
        let vector = self.vectors.get(usize::from(index))?;
        let mut inner = lock(&vector.inner);
        inner.exported = true;
        if vector.state.load(Ordering::Acquire) != MASKED {
            vector.wire(&mut inner).ok()?;
        }
        vector.fd().ok()?.try_clone().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> Option<Arc<VmFd>> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            println!("skipped: no /dev/kvm");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        split_irqchip(&vm).unwrap();
        Some(vm)
    }

    #[test]
    fn a_vector_reaches_kvm_when_first_raised() {
        let Some(vm) = vm() else { return };
        let _vcpu = vm.create_vcpu(0).unwrap();
        let kvm = KvmHypervisor::new(vm);
        let vectors = kvm.msi_vectors(3).unwrap();
        let table = || lock(&kvm.routes.table);
        vectors.trigger(0).unwrap();
        assert!(table().messages.is_empty(), "a masked vector has no route");
        let message = MsiMessage {
            address: 0xFEE0_0000,
            data: 0x31,
        };
        vectors.set(0, Some(message)).unwrap();
        vectors.set(2, Some(message)).unwrap();
        assert!(table().dirty, "recorded, not yet told");
        vectors.trigger(2).unwrap();
        assert!(!table().dirty);
        vectors.trigger(0).unwrap();
        vectors.set(0, None).unwrap();
        vectors.set(0, Some(message)).unwrap();
        assert!(!table().dirty, "masking and unmasking costs no new table");
        vectors.trigger(0).unwrap();
        assert_eq!(table().messages.len(), 2);
        assert!(vectors.eventfd(2).is_some());
        vectors.set(2, None).unwrap();
        vectors.trigger(9).unwrap();
    }

    #[test]
    fn vectors_run_out_with_an_error() {
        let Some(vm) = vm() else { return };
        let kvm = KvmHypervisor::new(vm);
        assert!(kvm.msi_vectors(4000).is_ok());
        let error = kvm.msi_vectors(200).err().unwrap();
        assert!(error.to_string().contains("too many devices"));
    }

    #[test]
    fn a_doorbell_and_a_message() {
        let Some(vm) = vm() else { return };
        let kvm = KvmHypervisor::new(vm);
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        kvm.add_doorbell(0xE000_0000, &fd).unwrap();
        kvm.remove_doorbell(0xE000_0000, &fd).unwrap();
        assert!(kvm.remove_doorbell(0xE000_0000, &fd).is_err());
        let _vcpu = kvm.vm.create_vcpu(0).unwrap();
        let message = MsiMessage {
            address: 0xFEE0_0000,
            data: 0x24,
        };
        KvmHypervisor::send_msi(&kvm.vm, &message).unwrap();
    }
}
