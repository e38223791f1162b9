//! States of virtio devices as a hostile `state.json` holds them: those of a device that a driver runs, with numbers and
//! values replaced. Taken over or refused, the device then runs: nothing panics or spins.
#![no_main]

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::bus::Bus;
use podvisor_devices::host_console::{HostConsole, HostOutput, HostSide};
use podvisor_devices::memory::{PodMemory, Reclaim};
use podvisor_devices::mock::MockHypervisor;
use podvisor_devices::pci::{PciFunction, PciRoot, Window};
use podvisor_devices::platform::Hypervisor;
use podvisor_devices::virtio::balloon::{Balloon, BalloonOptions};
use podvisor_devices::virtio::blk::{Blk, BlkOptions};
use podvisor_devices::virtio::console::Console;
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::fs::{Fs, FsOptions};
use podvisor_devices::virtio::net::{Net, NetOptions};
use podvisor_devices::virtio::pci::{VirtioPci, VirtioPciSubscriber, add_to};
use podvisor_devices::virtio::rng::Rng;
use podvisor_devices::virtio::state::TransportState;
use podvisor_devices::virtio::testing::test_memory;
use serde_json::{Value, json};

const BAR: u64 = 1 << 40;

struct NoReclaim;

impl Reclaim for NoReclaim {
    fn discard(&self, _gpa: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

fn device(kind: u8) -> Box<dyn VirtioDevice> {
    let path = std::env::temp_dir().join(format!("podvisor-fuzz-snapshot-{}", std::process::id()));
    match kind % 6 {
        0 => Box::new(Rng::open(Path::new("/dev/urandom")).unwrap()),
        1 => {
            let output = HostOutput::Writer(Box::new(io::sink()));
            let host = HostConsole::shared(HostSide::Streams { output, input: None });
            Box::new(Console::new(host.unwrap()).unwrap())
        }
        2 => {
            let options = NetOptions {
                num_queues: 4,
                queue_size: 16,
                ..NetOptions::default()
            };
            let sockets = (0..2).map(|_| UnixDatagram::pair().unwrap().1).collect();
            Box::new(Net::with_sockets(&options, sockets).unwrap())
        }
        3 => {
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
            Box::new(Blk::open(BlkOptions::new(path)).unwrap())
        }
        4 => Box::new(Balloon::new(BalloonOptions::default(), Arc::new(NoReclaim)).unwrap()),
        _ => Box::new(Fs::new(FsOptions::new("fuzz".to_owned(), "/proc/self/fdinfo".into())).unwrap()),
    }
}

struct Machine {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    function: Arc<Mutex<VirtioPci>>,
    events: EventManager<VirtioPciSubscriber>,
}

fn machine(kind: u8, memory: &Arc<PodMemory>) -> Machine {
    let bus = Arc::new(Bus::new());
    let window = |start, len| Window { start, len };
    let root = PciRoot::new(0, Arc::clone(&bus), window(BAR, 1 << 32), window(0xC000_0000, 1 << 29));
    let hypervisor = MockHypervisor::new() as Arc<dyn Hypervisor>;
    let function = VirtioPci::new(device(kind), "_fuzz0".to_owned(), Arc::clone(memory), hypervisor, false);
    let (_, subscriber) = add_to(&root, function.unwrap(), None).unwrap();
    let function = Arc::clone(&subscriber.0);
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(subscriber);
    Machine {
        bus,
        root,
        function,
        events,
    }
}

impl Machine {
    fn write(&self, offset: u64, len: usize, value: u64) {
        self.bus.write(BAR + offset, &value.to_le_bytes()[..len]);
    }

    /// A driver takes all features and the first queues.
    fn up(&self) {
        self.root.write_config(1, 0, 4, &[6, 0]);
        self.write(0x14, 1, 3);
        for half in 0..2 {
            let mut features = [0; 4];
            self.write(0, 4, half);
            self.bus.read(BAR + 4, &mut features);
            self.write(8, 4, half);
            self.write(0xC, 4, u64::from(u32::from_le_bytes(features)));
        }
        self.write(0x14, 1, 0xB);
        for queue in 0..4u64 {
            self.write(0x16, 2, queue);
            self.write(0x18, 2, 8);
            for (register, at) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)] {
                self.write(register, 8, queue * 0x4000 + at);
            }
            self.write(0x1A, 2, queue);
            self.write(0x1C, 2, 1);
        }
        self.write(0x14, 1, 0xF);
    }

    fn run(&mut self) {
        // A device that asks for turns without end is found by the limit.
        for turn in 0.. {
            assert!(turn < 10_000, "the device keeps the loop busy");
            if self.events.run_with_timeout(0).unwrap_or(0) == 0 {
                break;
            }
        }
    }
}

fn leaves<'v>(value: &'v mut Value, found: &mut Vec<&'v mut Value>) {
    if matches!(&*value, Value::Array(items) if items.len() >= 200) {
        return found.push(value);
    }
    match value {
        Value::Array(items) => items.iter_mut().for_each(|v| leaves(v, found)),
        Value::Object(map) => map.values_mut().for_each(|v| leaves(v, found)),
        leaf => found.push(leaf),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let memory = test_memory(0x4_0000, None);
    let first = machine(*kind, &memory);
    first.up();
    let saved = first.function.lock().unwrap().save().expect("none of these is refused");
    let mut state = serde_json::to_value(saved).expect("states are JSON");
    drop(first);
    // 11 bytes a change: which place, what it becomes.
    for change in rest.chunks_exact(11) {
        let mut found = Vec::new();
        leaves(&mut state, &mut found);
        let place = usize::from(u16::from_le_bytes([change[0], change[1]])) % found.len();
        let number = u64::from_le_bytes(change[3..11].try_into().unwrap());
        *found[place] = match change[2] % 6 {
            0 => json!(number),
            1 => json!(number % 16),
            2 => json!(number % 0x4_0000),
            3 => Value::Null,
            4 => json!(number % 2 == 0),
            _ => json!({"pairs": number % 5, "offloads": number >> 8}),
        };
    }
    let Ok(state) = serde_json::from_value::<TransportState>(state) else {
        return;
    };
    let mut second = machine(*kind, &memory);
    let (offset, settings) = state.settings();
    second.root.write_config(1, 0, offset, settings);
    let _ = second.function.lock().unwrap().restore(&state);
    second.run();
    for queue in 0..4 {
        second.function.lock().unwrap().write_bar(0, 0x6000 + 4 * queue, &[0, 0]);
        second.run();
    }
    let mut byte = [0; 4];
    for offset in (0..0x40).step_by(2).chain(0x4000..0x4040) {
        second.function.lock().unwrap().read_bar(0, offset, &mut byte);
    }
    let _ = second.function.lock().unwrap().save();
    second.function.lock().unwrap().write_bar(0, 0x14, &[0]);
    second.run();
});
