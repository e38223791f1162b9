//! The device on PCI and on an event loop, as in a pod.

use std::sync::Mutex;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::Bytes;

use super::*;
use crate::bus::Bus;
use crate::mock::MockHypervisor;
use crate::pci::{PciRoot, Window};
use crate::platform::Hypervisor;
use crate::virtio::pci::{Standing, TransportError, VirtioPci, add_to};

const NEEDS_RESET: u64 = 0x40;
const NOTIFY: u64 = 0x6000;

fn function(
    back_end: &BackEnd,
    memory: &Arc<PodMemory>,
    hypervisor: &Arc<MockHypervisor>,
    confidential: bool,
) -> std::result::Result<VirtioPci, TransportError> {
    let device = VhostUser::fs(&fs_options(back_end)).unwrap();
    VirtioPci::new(
        Box::new(device),
        "_fs0".to_owned(),
        Arc::clone(memory),
        Arc::clone(hypervisor) as Arc<dyn Hypervisor>,
        confidential,
    )
}

#[test]
fn confidential_pods_and_private_memory_are_refused() {
    let hypervisor = MockHypervisor::new();
    let back_end = BackEnd::start(0, 2);
    let error = function(&back_end, &shared_memory(), &hypervisor, true)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("_fs0") && error.contains("vhost-user is refused for a confidential pod"),
        "{error}"
    );
    let back_end = BackEnd::start(0, 2);
    let error = function(&back_end, &test_memory(1 << 20, None), &hypervisor, false)
        .err()
        .unwrap();
    let error = error.to_string();
    assert!(error.contains("_fs0") && error.contains("memory shared=on"), "{error}");
}

/// A pod with the device in slot 1.
struct Pod {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    hypervisor: Arc<MockHypervisor>,
    memory: Arc<PodMemory>,
    events: EventManager<Box<dyn MutEventSubscriber>>,
    function: Arc<Mutex<VirtioPci>>,
    bar: u64,
    chains: u16,
}

impl Pod {
    fn new(back_end: &BackEnd) -> Self {
        let bus = Arc::new(Bus::new());
        let window = |start, len| Window { start, len };
        let root = PciRoot::new(
            0,
            Arc::clone(&bus),
            window(0x100_0000_0000, 4 << 30),
            window(0xC000_0000, 640 << 20),
        );
        let (hypervisor, memory) = (MockHypervisor::new(), shared_memory());
        let function = function(back_end, &memory, &hypervisor, false).unwrap();
        let (_, subscriber) = add_to(&root, function, None).unwrap();
        let function = Arc::clone(&subscriber.0);
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(subscriber));
        root.write_config(1, 0, 4, &[6, 0]);
        let mut bar = [0; 8];
        root.read_config(1, 0, 0x10, &mut bar[..4]);
        root.read_config(1, 0, 0x14, &mut bar[4..]);
        Self {
            bus,
            root,
            hypervisor,
            memory,
            events,
            function,
            bar: u64::from_le_bytes(bar) & !0xF,
            chains: 0,
        }
    }

    fn w(&self, offset: u64, len: usize, v: u64) {
        assert!(self.bus.write(self.bar + offset, &v.to_le_bytes()[..len]));
    }

    fn r(&self, offset: u64, len: usize) -> u64 {
        let mut d = [0; 8];
        assert!(self.bus.read(self.bar + offset, &mut d[..len]));
        u64::from_le_bytes(d)
    }

    /// A driver's steps up to DRIVER_OK, with request queue 1 at 0x1000, and no vectors.
    fn up(&mut self) {
        self.chains = 0;
        self.memory.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
        self.w(0x14, 1, 3);
        self.w(8, 4, 1);
        self.w(0xC, 4, 1);
        self.w(0x14, 1, 0xB);
        self.w(0x16, 2, 1);
        self.w(0x20, 8, 0x1000);
        self.w(0x28, 8, 0x2000);
        self.w(0x30, 8, 0x3000);
        self.w(0x1C, 2, 1);
        self.w(0x14, 1, 0xF);
    }

    fn vector(&self, vector: u64) {
        self.w(0x16, 2, 1);
        self.w(0x1A, 2, vector);
    }

    fn msix(&self, on: bool) {
        for i in 0..3 {
            self.w(0x8000 + 16 * i, 8, 0xFEE0_0000);
            self.w(0x8000 + 16 * i + 8, 8, 0x40 + i);
        }
        let mut at = [0; 1];
        self.root.read_config(1, 0, 0x34, &mut at);
        loop {
            let mut cap = [0; 2];
            self.root.read_config(1, 0, u16::from(at[0]), &mut cap);
            if cap[0] == 0x11 {
                break;
            }
            at[0] = cap[1];
        }
        self.root
            .write_config(1, 0, u16::from(at[0]) + 2, &[0, if on { 0x80 } else { 0 }]);
    }

    /// Makes a chain of 4 readable and 4 writable bytes available.
    fn push(&mut self, text: &[u8; 4]) {
        let write = |at, value: &[u8]| self.memory.write_slice(value, GuestAddress(at)).unwrap();
        write(0x8000, text);
        let desc = |at: u64, flags: u16, next: u16| {
            let mut d = at.to_le_bytes().to_vec();
            d.extend(4u32.to_le_bytes());
            d.extend(flags.to_le_bytes());
            d.extend(next.to_le_bytes());
            d
        };
        write(0x1000, &desc(0x8000, 1, 1));
        write(0x1010, &desc(0x9000, 2, 0));
        let slot = u64::from(self.chains % 16);
        write(0x2004 + 2 * slot, &[0, 0]);
        self.chains += 1;
        write(0x2002, &self.chains.to_le_bytes());
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(0x3002)).unwrap()
    }

    /// Runs the loop until `done`.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            assert!(
                self.events.run_with_timeout(i32::from(WAIT_MS)).unwrap() > 0,
                "nothing happens"
            );
        }
    }

    fn echoed(&self) -> [u8; 4] {
        self.memory.read_obj(GuestAddress(0x9000)).unwrap()
    }
}

#[test]
fn doorbells_and_vectors_of_a_pod() {
    let back_end = BackEnd::start(0, 2);
    let mut pod = Pod::new(&back_end);
    pod.up();
    // A driver without MSI-X: the ISR bit; through the address that the hypervisor watches.
    pod.push(b"isr!");
    assert!(pod.hypervisor.ring(pod.bar + NOTIFY + 4));
    pod.run_until(|pod| pod.r(0x2000, 1) == 1);
    assert_eq!((pod.used(), pod.echoed()), (1, *b"!rsi"));

    // Vectors chosen after DRIVER_OK: the back end is told each time.
    let told = back_end.see(|s| s.calls_set);
    pod.vector(2);
    pod.msix(true);
    assert!(back_end.see(|s| s.calls_set) >= told + 2);
    let vectors = pod.hypervisor.vectors(0).unwrap();
    pod.push(b"msix");
    // Through an exit this time.
    pod.w(NOTIFY + 4, 2, 1);
    pod.run_until(|_| vectors.triggered(2) > 0);
    assert_eq!((pod.used(), pod.echoed()), (2, *b"xism"));
    pod.vector(1);
    pod.push(b"move");
    pod.w(NOTIFY + 4, 2, 1);
    pod.run_until(|_| vectors.triggered(1) > 0);
    pod.msix(false);
    pod.push(b"none");
    pod.w(NOTIFY + 4, 2, 1);
    pod.run_until(|pod| pod.r(0x2000, 1) == 1);
    assert_eq!((pod.used(), pod.echoed()), (4, *b"enon"));

    // A doorbell before DRIVER_OK is not lost.
    pod.w(0x14, 1, 0);
    assert!(!back_end.see(|s| s.rings[1].runs()));
    pod.memory.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
    pod.w(NOTIFY + 4, 2, 1);
    pod.up();
    pod.push(b"next");
    pod.w(NOTIFY + 4, 2, 1);
    pod.run_until(|pod| pod.r(0x2000, 1) == 1 && pod.used() == 1);
}

#[test]
fn a_dead_back_end_needs_a_reset_and_leaves_the_loop_quiet() {
    let mut back_end = BackEnd::start(0, 2);
    let mut pod = Pod::new(&back_end);
    let watch = crate::sync::lock(&pod.function).watch();
    assert_eq!(watch.get(), Standing::Configuring);
    pod.up();
    assert_eq!(watch.get(), Standing::Active);
    back_end.die();
    pod.run_until(|pod| pod.r(0x14, 1) & NEEDS_RESET != 0);
    assert_eq!(watch.get(), Standing::Failed);
    // The loop lets go of the socket, which stays readable.
    while pod.events.run_with_timeout(0).unwrap() > 0 {}
    // A driver that tries again is told again.
    pod.w(0x14, 1, 0);
    pod.up();
    assert_eq!(pod.r(0x14, 1) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(pod.events.run_with_timeout(0).unwrap(), 0);
    assert!(!crate::sync::lock(&pod.function).is_active());
    pod.w(0x14, 1, 0);
    assert_eq!(watch.get(), Standing::Failed, "a reset does not help");
}

#[test]
fn how_a_device_stands_is_told_while_its_back_end_takes_its_time() {
    let back_end = BackEnd::start(0, 2);
    let mut pod = Pod::new(&back_end);
    pod.up();
    let watch = crate::sync::lock(&pod.function).watch();
    // The back end answers nothing while its state is taken, and the driver's reset waits for an answer.
    let busy = crate::sync::lock(&back_end.state);
    std::thread::scope(|scope| {
        let (bus, status) = (Arc::clone(&pod.bus), pod.bar + 0x14);
        let reset = scope.spawn(move || bus.write(status, &[0]));
        assert_eq!(watch.get(), Standing::Active);
        drop(busy);
        assert!(reset.join().unwrap());
    });
    assert_eq!(watch.get(), Standing::Configuring);
}

#[test]
fn a_back_end_that_dies_before_a_driver_comes() {
    let mut back_end = BackEnd::start(0, 2);
    let mut pod = Pod::new(&back_end);
    let watch = crate::sync::lock(&pod.function).watch();
    back_end.die();
    while pod.events.run_with_timeout(0).unwrap() > 0 {}
    assert_eq!(watch.get(), Standing::Failed);
    pod.up();
    assert_eq!(pod.r(0x14, 1) & NEEDS_RESET, NEEDS_RESET);
}
