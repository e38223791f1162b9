//! The transport as a driver sees it: through ECAM and the BAR on a bus, with a mock hypervisor behind.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::Bus;
use crate::mock::MockHypervisor;
use crate::pci::Window;
use crate::sync::lock;
use crate::virtio::testing::{PageGate, test_memory};

mod saved;

const MEMORY: u64 = 0x10_0000;
const OK_STATUS: u64 = 1 | 2 | 8;

/// What happened to the device.
#[derive(Default)]
struct Log {
    activations: AtomicU64,
    kicks: AtomicU64,
    resets: AtomicU64,
    events: AtomicU64,
    fail_activate: AtomicU64,
    fail_kick: AtomicU64,
    features: AtomicU64,
    rings: Mutex<Vec<Option<u16>>>,
}

struct Dummy {
    log: Arc<Log>,
    sizes: Vec<u16>,
    active: Option<Activation>,
    extra: EventFd,
    config: [u8; 8],
}

impl VirtioDevice for Dummy {
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn features(&self) -> u64 {
        1 << 5 | 1 << VIRTIO_RING_F_EVENT_IDX
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            *d = self.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(c) = self.config.get_mut(offset as usize) {
            *c = data[0];
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert!(self.active.is_none(), "activated twice without a reset");
        self.log.activations.fetch_add(1, Ordering::SeqCst);
        self.log.features.store(activation.features, Ordering::SeqCst);
        *lock(&self.log.rings) = activation.queues.iter().map(|q| q.as_ref().map(|q| q.size())).collect();
        self.active = Some(activation);
        if self.log.fail_activate.load(Ordering::SeqCst) != 0 {
            return Err(DeviceError::Host {
                what: "activating",
                source: io::ErrorKind::Other.into(),
            });
        }
        Ok(())
    }
    fn on_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let activation = self.active.as_mut().expect("only called while active");
        self.log.kicks.fetch_add(1, Ordering::SeqCst);
        if self.log.fail_kick.load(Ordering::SeqCst) != 0 {
            return Err(DeviceError::Queue {
                index,
                source: virtio_queue::Error::InvalidChain,
            });
        }
        let memory = Arc::clone(&activation.memory);
        if let Some(queue) = &mut activation.queues[index] {
            while let Some(chain) = queue.pop(&memory)? {
                queue.add_used(&memory, chain.head_index(), 0)?;
            }
            queue.signal(&memory)?;
        }
        Ok(())
    }
    fn event_fds(&self) -> Vec<std::os::fd::RawFd> {
        vec![std::os::fd::AsRawFd::as_raw_fd(&self.extra)]
    }
    fn on_event(&mut self, index: usize) -> Result<(), DeviceError> {
        assert_eq!(index, 0);
        self.log.events.fetch_add(1, Ordering::SeqCst);
        if self.log.fail_kick.load(Ordering::SeqCst) != 0 {
            return Err(DeviceError::Host {
                what: "an event",
                source: io::ErrorKind::Other.into(),
            });
        }
        let _ = self.extra.read();
        Ok(())
    }
    fn save(&mut self) -> Result<serde_json::Value, crate::virtio::state::StateError> {
        Ok(serde_json::json!(self.config))
    }
    fn restore(&mut self, state: serde_json::Value) -> Result<(), crate::virtio::state::StateError> {
        self.config = crate::virtio::state::parse(state)?;
        Ok(())
    }
    fn reset(&mut self) {
        self.log.resets.fetch_add(1, Ordering::SeqCst);
        self.active = None;
    }
}

/// A driver on the other side of a bus.
struct Driver {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    hypervisor: Arc<MockHypervisor>,
    log: Arc<Log>,
    memory: Arc<PodMemory>,
    gate: Arc<PageGate>,
    subscriber: VirtioPciSubscriber,
    extra: EventFd,
    bar: u64,
}

fn driver(confidential: bool, sizes: &[u16]) -> Driver {
    let bus = Arc::new(Bus::new());
    let window = |start, len| Window { start, len };
    let root = PciRoot::new(
        0,
        Arc::clone(&bus),
        window(0x100_0000_0000, 4 << 30),
        window(0xC000_0000, 640 << 20),
    );
    let hypervisor = MockHypervisor::new();
    let log = Arc::new(Log::default());
    let gate = Arc::new(PageGate::default());
    let memory = test_memory(MEMORY, Some(Arc::clone(&gate)));
    let extra = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = Dummy {
        log: Arc::clone(&log),
        sizes: sizes.to_vec(),
        active: None,
        extra: extra.try_clone().unwrap(),
        config: *b"config!!",
    };
    let function = VirtioPci::new(
        Box::new(device),
        "_dummy0".to_owned(),
        Arc::clone(&memory),
        Arc::clone(&hypervisor) as Arc<dyn Hypervisor>,
        confidential,
    )
    .unwrap();
    let (bdf, subscriber) = add_to(&root, function, None).unwrap();
    assert_eq!(bdf.slot, 1);
    let bar = lock(&subscriber.0).config.bar_address(0);
    root.write_config(1, 0, 4, &[6, 0]);
    Driver {
        bus,
        root,
        hypervisor,
        log,
        memory,
        gate,
        subscriber,
        extra,
        bar,
    }
}

impl Driver {
    fn w(&self, offset: u64, len: usize, v: u64) {
        assert!(self.bus.write(self.bar + offset, &v.to_le_bytes()[..len]));
    }
    fn r(&self, offset: u64, len: usize) -> u64 {
        let mut d = [0; 8];
        assert!(self.bus.read(self.bar + offset, &mut d[..len]));
        u64::from_le_bytes(d)
    }
    fn status(&self) -> u64 {
        self.r(0x14, 1)
    }
    fn features(&self) -> u64 {
        self.w(0, 4, 1);
        let high = self.r(4, 4);
        self.w(0, 4, 0);
        high << 32 | self.r(4, 4)
    }
    fn ack(&self, features: u64) {
        self.w(8, 4, 0);
        self.w(0xC, 4, features & 0xFFFF_FFFF);
        self.w(8, 4, 1);
        self.w(0xC, 4, features >> 32);
    }
    fn negotiate(&self) {
        self.w(0x14, 1, 1);
        self.w(0x14, 1, 3);
        self.ack(self.features());
        self.w(0x14, 1, OK_STATUS);
        assert_eq!(self.status(), OK_STATUS);
    }
    fn queue(&self, index: u64, size: u64, desc: u64, avail: u64, used: u64) {
        self.w(0x16, 2, index);
        self.w(0x18, 2, size);
        self.w(0x20, 8, desc);
        self.w(0x28, 4, avail & 0xFFFF_FFFF);
        self.w(0x2C, 4, avail >> 32);
        self.w(0x30, 8, used);
        self.w(0x1A, 2, index + 1);
        self.w(0x1C, 2, 1);
    }
    fn up(&self) {
        self.negotiate();
        self.queue(0, 16, 0x1000, 0x2000, 0x3000);
        self.w(0x14, 1, OK_STATUS | 4);
    }
    fn msix(&self) {
        for i in 0..2u64 {
            self.w(0x8000 + 16 * i, 8, 0xFEE0_0000);
            self.w(0x8000 + 16 * i + 8, 4, 0x40 + i);
            self.w(0x8000 + 16 * i + 12, 4, 0);
        }
        let cap = lock(&self.subscriber.0).msix_cap;
        self.root.write_config(1, 0, cap + 2, &[0, 0x80]);
    }
    fn seen(&self) -> (u64, u64, u64) {
        let l = &self.log;
        let get = |a: &AtomicU64| a.load(Ordering::SeqCst);
        (get(&l.activations), get(&l.kicks), get(&l.resets))
    }
}

#[test]
fn capabilities_say_where_everything_is() {
    let d = driver(false, &[16, 8]);
    let read = |at: u16| {
        let mut b = [0; 16];
        d.root.read_config(1, 0, at, &mut b);
        b
    };
    assert_eq!(&read(0)[..4], [0xF4, 0x1A, 0x42, 0x10]);
    assert_eq!(read(8)[..4], [1, 0, 0x80, 1]);
    let mut at = u16::from(read(0x34)[0]);
    let mut found = Vec::new();
    while at != 0 {
        let c = read(at);
        let word = |i: usize| u32::from_le_bytes(c[i..i + 4].try_into().unwrap());
        match c[0] {
            9 => found.push((u32::from(c[3]), word(8), word(12))),
            0x11 => found.push((u32::from(u16::from_le_bytes([c[2], c[3]])), word(4), word(8))),
            other => panic!("capability {other}"),
        }
        at = u16::from(c[1]);
    }
    let expected = [
        (1, 0, 0x40),
        (3, 0x2000, 1),
        (4, 0x4000, 0x1000),
        (2, 0x6000, 0x1000),
        (5, 0, 0),
        (2, 0x8000, 0x4_8000),
    ];
    assert_eq!(found, expected);
    assert_eq!(d.r(0x12, 2), 2);
    assert_eq!(d.r(0x4000, 8).to_le_bytes(), *b"config!!");
}

#[test]
fn a_driver_brings_the_device_up_and_its_queue_works() {
    let d = driver(false, &[16]);
    d.msix();
    d.up();
    assert_eq!(d.status(), OK_STATUS | 4);
    assert_eq!(d.seen(), (1, 0, 0));
    assert_eq!(*lock(&d.log.rings), [Some(16)]);
    assert_eq!(d.hypervisor.doorbells(), [d.bar + 0x6000]);

    let mut manager = EventManager::<VirtioPciSubscriber>::new().unwrap();
    manager.add_subscriber(d.subscriber.clone());
    d.memory.write_obj(0u16, GuestAddress(0x2004)).unwrap();
    d.memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    assert!(d.hypervisor.ring(d.bar + 0x6000));
    assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
    let used: u16 = d.memory.read_obj(GuestAddress(0x3002)).unwrap();
    assert_eq!(used, 1);
    let vectors = d.hypervisor.vectors(0).unwrap();
    assert_eq!((vectors.triggered(0), vectors.triggered(1)), (0, 1));
    assert_eq!(vectors.route(1).unwrap().data, 0x41);

    // A doorbell write that reaches user space, and the device's own descriptor.
    d.w(0x6000, 2, 0);
    assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
    d.extra.write(1).unwrap();
    assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
    assert_eq!((d.seen(), d.log.events.load(Ordering::SeqCst)), ((1, 2, 0), 1));
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "everything is drained");
}

#[test]
fn without_msix_the_isr_register_tells_and_clears() {
    let d = driver(false, &[16]);
    d.up();
    d.memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    lock(&d.subscriber.0).drive(|dev| dev.on_queue(0)).unwrap();
    assert_eq!(d.r(0x2000, 1), 1);
    assert_eq!(d.r(0x2000, 1), 0);
}

#[test]
fn features_must_be_offered_and_include_version_1() {
    let d = driver(false, &[16]);
    assert_eq!(d.features(), 1 << 32 | 1 << 29 | 1 << 5);
    for bad in [1u64 << 5, 1 << 32 | 1 << 6, 1 << 33 | 1 << 32, 0] {
        d.w(0x14, 1, 3);
        d.ack(bad);
        d.w(0x14, 1, OK_STATUS);
        assert_eq!(d.status(), 3, "{bad:#x}");
        d.w(0x14, 1, OK_STATUS | 4);
        assert_eq!(d.status(), 3, "no DRIVER_OK without FEATURES_OK");
        d.w(0x14, 1, 0);
    }
    d.w(0x14, 1, 3);
    d.ack(1 << 32 | 1 << 5);
    d.w(0x14, 1, OK_STATUS);
    d.ack(1 << 32);
    d.w(8, 4, 0);
    assert_eq!(d.r(0xC, 4), 1 << 5, "features are fixed after FEATURES_OK");
    d.w(8, 4, 2);
    d.w(0xC, 4, 5);
    assert_eq!(d.r(0xC, 4), 0);
    d.w(0, 4, 7);
    assert_eq!(d.r(4, 4), 0);
}

#[test]
fn a_confidential_pod_requires_access_platform() {
    let d = driver(true, &[16]);
    assert_ne!(d.features() & 1 << 33, 0);
    d.w(0x14, 1, 3);
    d.ack(1 << 32);
    d.w(0x14, 1, OK_STATUS);
    assert_eq!(d.status(), 3);
    d.ack(1 << 32 | 1 << 33);
    d.w(0x14, 1, OK_STATUS);
    assert_eq!(d.status(), OK_STATUS);
}

#[test]
fn bad_queues_need_a_reset_and_never_reach_the_device() {
    let end = MEMORY;
    let bad = [
        (16, 0, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, end, 0x2000, 0x3000),
        (16, end - 0xF0, 0x2000, 0x3000),
        (16, 0x1000, end - 0x20, 0x3000),
        (16, 0x1000, 0x2000, end - 0x80),
        (16, !0xF, 0x2000, 0x3000),
        (16, 0x1000, !1, 0x3000),
        (16, 0x1000, 0x2000, 1 << 63),
        (16, 0x1000, 0x2000, 0x7000),
        (16, 0x1000, 0x6FF8, 0x3000),
    ];
    for (size, desc, avail, used) in bad {
        let d = driver(false, &[16]);
        d.gate.make_private(0x7000, 4096);
        d.msix();
        d.w(0x10, 2, 0);
        d.negotiate();
        d.queue(0, size, desc, avail, used);
        d.w(0x14, 1, OK_STATUS | 4);
        assert_eq!(d.status(), OK_STATUS | 4 | 0x40, "{desc:#x} {avail:#x} {used:#x}");
        assert_eq!(d.seen().0, 0);
        assert_eq!(d.hypervisor.vectors(0).unwrap().triggered(0), 1, "config interrupt");
        assert_eq!(d.r(0x20, 8), desc, "registers can be read");
        d.w(0x14, 1, 0);
        assert_eq!(d.status(), 0);
        d.up();
        assert_eq!(d.seen().0, 1, "after a reset it works");
    }
}

#[test]
fn rings_may_end_where_ram_ends() {
    let d = driver(false, &[16]);
    d.negotiate();
    d.queue(0, 16, MEMORY - 0x100, 0x2000, 0x3000);
    d.w(0x14, 1, OK_STATUS | 4);
    assert_eq!(d.status(), OK_STATUS | 4);
    assert_eq!(d.seen().0, 1);
}

#[test]
fn queue_sizes_and_selectors_are_checked() {
    let d = driver(false, &[16]);
    for bad in [0, 3, 17, 32, 0xFFFF] {
        d.w(0x18, 2, bad);
        assert_eq!(d.r(0x18, 2), 16);
    }
    d.w(0x18, 2, 8);
    assert_eq!(d.r(0x18, 2), 8);
    d.w(0x16, 2, 1);
    for at in [0x18u64, 0x1C, 0x1E] {
        d.w(at, 2, 1);
        assert_eq!(d.r(at, 2), 0);
    }
    d.w(0x20, 8, 0x1000);
    assert_eq!(d.r(0x20, 8), 0);
    assert_eq!(d.r(0x1A, 2), 0xFFFF);
    d.w(0x16, 2, 0);
    d.w(0x1A, 2, 2);
    assert_eq!(d.r(0x1A, 2), 0xFFFF, "a vector that is not there");
    d.w(0x1A, 2, 1);
    assert_eq!(d.r(0x1A, 2), 1);
    assert_eq!(d.r(0x18, 4), 0, "wrong width");
    assert_eq!(d.r(0x20, 2), 0);
    d.w(0x14, 4, 0xFF);
    assert_eq!(d.status(), 0);
}

#[test]
fn queue_registers_are_dead_after_driver_ok() {
    let d = driver(false, &[16, 16]);
    d.up();
    let read = || -> Vec<u64> {
        d.w(0x16, 2, 0);
        [(0x18u64, 2), (0x1C, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
            .map(|(at, n)| d.r(at, n))
            .to_vec()
    };
    let before = read();
    d.queue(0, 4, 0x8000, 0x9000, 0xA000);
    d.queue(1, 4, 0x8000, 0x9000, 0xA000);
    assert_eq!(read(), before);
    d.w(0x16, 2, 1);
    assert_eq!(d.r(0x1C, 2), 0, "a queue cannot be enabled late");
    d.w(0x14, 1, OK_STATUS | 4);
    assert_eq!(d.seen(), (1, 0, 0), "DRIVER_OK again does nothing");
    d.w(0x14, 1, 1);
    assert_eq!(d.status(), OK_STATUS | 4, "bits cannot be cleared but by a reset");
}

#[test]
fn a_device_failure_needs_a_reset() {
    let d = driver(false, &[16]);
    d.msix();
    d.w(0x10, 2, 0);
    d.up();
    d.log.fail_kick.store(1, Ordering::SeqCst);
    let mut manager = EventManager::<VirtioPciSubscriber>::new().unwrap();
    manager.add_subscriber(d.subscriber.clone());
    d.w(0x6000, 2, 0);
    manager.run_with_timeout(1000).unwrap();
    assert_eq!(d.status(), OK_STATUS | 4 | 0x40);
    assert_eq!(d.seen(), (1, 1, 1));
    assert_eq!(d.hypervisor.vectors(0).unwrap().triggered(0), 1);
    assert_eq!(d.r(0x15, 1), 1, "the generation moved");
    // Until the reset, doorbells are ignored; one rung through the hypervisor is only drained.
    d.w(0x6000, 2, 0);
    d.hypervisor.ring(d.bar + 0x6000);
    manager.run_with_timeout(100).unwrap();
    assert_eq!(d.seen().1, 1);
    // An event that fails without a driver is watched no longer, so that the loop does not spin.
    d.extra.write(1).unwrap();
    assert_eq!(manager.run_with_timeout(100).unwrap(), 1);
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
    d.log.fail_kick.store(0, Ordering::SeqCst);
    d.w(0x14, 1, 0);
    d.up();
    d.w(0x6000, 2, 0);
    manager.run_with_timeout(1000).unwrap();
    assert_eq!(d.seen().1, 2);
}

#[test]
fn a_failed_activation_lets_go_of_the_queues() {
    let d = driver(false, &[16]);
    d.log.fail_activate.store(1, Ordering::SeqCst);
    d.up();
    assert_eq!((d.status() & 0x40, d.seen()), (0x40, (1, 0, 1)));
    assert!(d.hypervisor.doorbells().is_empty());
    d.log.fail_activate.store(0, Ordering::SeqCst);
    d.w(0x14, 1, 0);
    d.up();
    assert_eq!(d.status(), OK_STATUS | 4);
}

#[test]
fn a_doorbell_before_driver_ok_is_looked_at_when_the_device_is_up() {
    let d = driver(false, &[16]);
    let mut manager = EventManager::<VirtioPciSubscriber>::new().unwrap();
    manager.add_subscriber(d.subscriber.clone());
    d.w(0x6000, 2, 0);
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
    d.up();
    assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
    assert_eq!(d.seen(), (1, 1, 0));
    d.w(0x6000 + 4, 2, 0);
    d.w(0x6FFC, 2, 0);
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "no such queue");
}

#[test]
fn doorbells_follow_the_bar_and_go_with_the_device() {
    let d = driver(false, &[16, 16]);
    assert_eq!(d.hypervisor.doorbell_changes(), 0, "none before the driver is there");
    d.up();
    assert_eq!(d.hypervisor.doorbell_changes(), 2);
    d.w(0x14, 1, 0);
    d.up();
    assert_eq!(d.hypervisor.doorbell_changes(), 2, "a reset keeps them");
    d.root.write_config(1, 0, 0x10, &0xC000_0000u32.to_le_bytes());
    d.root.write_config(1, 0, 0x14, &0u32.to_le_bytes());
    assert_eq!(d.hypervisor.doorbells(), [0xC000_6000, 0xC000_6004]);
    d.root.write_config(1, 0, 4, &[4, 0]);
    assert!(d.hypervisor.doorbells().is_empty());
    d.root.write_config(1, 0, 4, &[6, 0]);
    assert_eq!(d.hypervisor.doorbells().len(), 2);
    let resets = d.seen().2;
    d.root.remove(1).unwrap();
    assert!(d.hypervisor.doorbells().is_empty());
    assert_eq!(d.seen().2, resets + 1);
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let d = driver(false, &[16]);
    let cap = lock(&d.subscriber.0).pci_cfg_cap;
    let point = |bar: u8, offset: u32, len: u32| {
        d.root.write_config(1, 0, cap + 4, &[bar]);
        d.root.write_config(1, 0, cap + 8, &offset.to_le_bytes());
        d.root.write_config(1, 0, cap + 12, &len.to_le_bytes());
    };
    let read = || {
        let mut v = [0xEE; 4];
        d.root.read_config(1, 0, cap + 16, &mut v);
        v
    };
    point(0, 0x12, 2);
    assert_eq!(read(), [1, 0, 0, 0]);
    point(0, 0x14, 1);
    d.root.write_config(1, 0, cap + 16, &[1, 0, 0, 0]);
    assert_eq!(d.status(), 1);
    for (bar, offset, len) in [
        (1, 0, 4),
        (0, 0x8_0000, 4),
        (0, 1, 4),
        (0, 0, 3),
        (0, 0, 8),
        (0, u32::MAX - 3, 4),
    ] {
        point(bar, offset, len);
        assert_eq!(read(), [0; 4]);
        d.root.write_config(1, 0, cap + 16, &[0xFF; 4]);
    }
    assert_eq!(d.status(), 1);
}

#[test]
fn impossible_devices_are_refused() {
    let make = |sizes: Vec<u16>| {
        let device = Dummy {
            log: Arc::default(),
            sizes,
            active: None,
            extra: EventFd::new(0).unwrap(),
            config: [0; 8],
        };
        let memory = test_memory(MEMORY, None);
        VirtioPci::new(Box::new(device), "x".into(), memory, MockHypervisor::new(), false).err()
    };
    assert!(matches!(make(vec![3]), Some(TransportError::Queues { .. })));
    assert!(matches!(make(vec![2; 1025]), Some(TransportError::Queues { .. })));
    assert!(make(vec![2; 1024]).is_none());
    assert!(identity("x", 0x40).is_err());
}

/// Register accesses that lead somewhere more often than random bytes do.
fn access() -> impl Strategy<Value = (u64, usize, u64)> {
    let offset = prop_oneof![
        4 => 0u64..0x40,
        1 => Just(0x14u64),
        1 => 0x2000u64..0x2004,
        1 => 0x4000u64..0x4010,
        1 => 0x6000u64..0x6010,
        2 => 0x8000u64..0x8040,
        1 => 0x4_8000u64..0x4_8010,
        1 => 0u64..BAR_SIZE,
    ];
    let value = prop_oneof![
        Just(0u64),
        Just(1),
        Just(3),
        Just(0xB),
        Just(0xF),
        Just(16),
        Just(0x1000),
        Just(0x2000),
        Just(0x3000),
        Just(0xFFFF_FFFF),
        any::<u64>(),
    ];
    (
        offset,
        prop_oneof![Just(1usize), Just(2), Just(4), Just(8), 1usize..9],
        value,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_order_of_register_writes_panics_or_moves_active_queues(
        up_first in any::<bool>(),
        accesses in proptest::collection::vec((access(), any::<bool>()), 0..120),
    ) {
        let d = driver(false, &[16, 8]);
        if up_first {
            d.up();
        }
        let mut frozen: Option<FrozenQueues> = None;
        for ((offset, len, value), write) in accesses {
            if write {
                d.w(offset, len, value);
            } else {
                d.r(offset, len);
            }
            let this = lock(&d.subscriber.0);
            match &this.phase {
                Phase::Active(now, _) => {
                    if let Some(before) = &frozen {
                        prop_assert_eq!(before, now);
                    }
                    frozen = Some(now.clone());
                    prop_assert_ne!(this.status & 4, 0);
                }
                Phase::Failed(_) => prop_assert_ne!(this.status & 0x40, 0),
                Phase::Configuring(_) => {
                    prop_assert_eq!(this.status & 0x44, 0);
                    frozen = None;
                }
            }
            // A reset in between may freeze other values; otherwise they stay.
            if this.status == 0 {
                frozen = None;
            }
        }
        let (activations, _, resets) = d.seen();
        prop_assert!(activations <= resets + 1);
    }
}
