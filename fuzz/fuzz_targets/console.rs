//! virtio-console and virtio-rng against random chains and rings: every chain comes back when there is something to
//! say, the event loop comes to rest, a private page stays as it is and its bytes stay inside.
#![no_main]

#[path = "common/chains.rs"]
mod chains;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use chains::{Input, SECRET, check_secret, damage, harness, push, used};
use libfuzzer_sys::fuzz_target;
use podvisor_devices::host_console::{HostConsole, HostOutput, HostSide};
use podvisor_devices::virtio::console::Console;
use podvisor_devices::virtio::device::VirtioDevice;
use podvisor_devices::virtio::rng::Rng;
use podvisor_devices::virtio::testing::Harness;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lets the device do what it can; false when it needs a reset.
fn settle<D: VirtioDevice>(h: &mut Harness<D>) -> bool {
    for _ in 0..10_000 {
        match h.poll_events(0) {
            Ok(true) => {}
            Ok(false) => return true,
            Err(_) => return false,
        }
    }
    panic!("the device never comes to rest");
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let broken = flags & 2 != 0;
    if flags & 1 != 0 {
        let mut h = harness(Rng::open(Path::new("/dev/urandom")).unwrap(), flags & 4 != 0);
        let pushed = push(&mut h, 0, &mut input, 20);
        if broken {
            damage(&mut h, 0, &mut input);
        }
        let alive = h.kick(0).is_ok() && settle(&mut h);
        assert!(broken || (alive && used(&h, 0) == pushed));
        check_secret(&h);
        return;
    }
    let sink = Sink::default();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let host = HostConsole::shared(HostSide::Streams {
        output: HostOutput::Writer(Box::new(sink.clone())),
        input: Some(ours.into()),
    });
    let mut h = harness(Console::new(host.unwrap()).unwrap(), flags & 4 != 0);
    theirs.write_all(&vec![b'x'; usize::from(input.byte()) * 16]).unwrap();
    push(&mut h, 0, &mut input, 5);
    let sent = push(&mut h, 1, &mut input, 5);
    if broken {
        damage(&mut h, usize::from(flags >> 3 & 1), &mut input);
    }
    let alive = h.kick(1).is_ok() && h.kick(0).is_ok() && settle(&mut h);
    assert!(broken || (alive && used(&h, 1) == sent));
    check_secret(&h);
    let said = sink.0.lock().unwrap();
    assert!(
        !said.split(|b| *b != SECRET).any(|run| run.len() >= 64),
        "private bytes were printed"
    );
});
