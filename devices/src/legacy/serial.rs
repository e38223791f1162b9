//! The 16550A serial port (vm-superio's) on a console of the host: output goes there at once, input comes as far as the
//! port's FIFO has room, and more when the guest has read it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::{Value, json};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart};

use crate::bus::BusDevice;
use crate::host_console::SharedHostConsole;
use crate::platform::IrqLine;
use crate::sync::lock;

/// Ports of the device.
pub const SERIAL_SIZE: u64 = 8;
/// Receiver buffer (16550 data sheet, table 1).
const DATA: u8 = 0;
/// Modem control, with the loopback bit.
const MODEM_CONTROL: u8 = 4;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// The host's end as the UART writes to it, a byte at a time.
struct Transmitter(SharedHostConsole);

impl Write for Transmitter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut host = lock(&self.0);
        host.take(data);
        host.send();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub struct Serial {
    uart: Uart<Line, NoEvents, Transmitter>,
    host: SharedHostConsole,
}

impl Serial {
    /// A port on interrupt `line`, connected to `host`.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>, host: SharedHostConsole) -> Self {
        // A client that waits already hears the first byte.
        lock(&host).on_ready();
        let uart = Uart::with_events(Line(line), NoEvents, Transmitter(Arc::clone(&host)));
        Self { uart, host }
    }

    /// Gives the guest `data` as input; returns how many bytes the FIFO took.
    pub fn feed(&mut self, data: &[u8]) -> usize {
        let room = self.uart.fifo_capacity();
        let part = data.get(..room.min(data.len())).unwrap_or(data);
        if part.is_empty() {
            return 0;
        }
        match self.uart.enqueue_raw_bytes(part) {
            Ok(n) => n,
            Err(error) => {
                tracing::warn!(?error, "serial input");
                part.len()
            }
        }
    }

    /// Moves input that waits into the FIFO, as far as there is room.
    fn take_input(&mut self) {
        let host = Arc::clone(&self.host);
        let mut host = lock(&host);
        while !host.input().is_empty() {
            let taken = self.feed(host.input().make_contiguous());
            if taken == 0 {
                // Full, or looped back by the driver.
                return;
            }
            host.input().drain(..taken);
            host.input_taken();
        }
    }

    fn on_ready(&mut self) {
        lock(&self.host).on_ready();
        self.take_input();
    }
}

impl BusDevice for Serial {
    fn save(&self) -> Value {
        let s = self.uart.state();
        let registers = [
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.line_control,
            s.modem_control,
            s.scratch,
            s.interrupt_enable,
        ];
        json!((registers, s.in_buffer))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let (registers, input): ([u8; 6], Vec<u8>) = serde_json::from_value(state)?;
        let [low, high, line, modem, scratch, interrupts] = registers;
        // Written as a driver would: the divisor is behind the latch bit of the line control register.
        for (register, value) in [
            (3, line | 0x80),
            (0, low),
            (1, high),
            (3, line & !0x80),
            (1, interrupts),
            (3, line),
            (4, modem),
            (7, scratch),
        ] {
            self.write(register, &[value]);
        }
        self.feed(&input);
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset @ 0..8), Some(first)) = (u8::try_from(offset), data.first_mut()) {
            *first = self.uart.read(offset);
            if offset == DATA {
                self.take_input();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset @ 0..8), Some(first)) = (u8::try_from(offset), data.first()) {
            if let Err(error) = self.uart.write(offset, *first) {
                tracing::debug!(?error, "serial port");
            }
            if offset == MODEM_CONTROL {
                // A driver that has ended its loopback test takes input again.
                self.take_input();
            }
        }
    }
}

/// The serial port as the event manager runs it; the port bus holds the same one.
pub struct SerialSubscriber(pub Arc<Mutex<Serial>>);

impl MutEventSubscriber for SerialSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        let mut serial = lock(&self.0);
        let fd = lock(&serial.host).fd();
        if let Some(fd) = fd
            && let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN))
        {
            tracing::error!(
                ?error,
                "the serial port has no input, and output goes with the next byte only"
            );
        }
        // What was there before the loop watched.
        serial.on_ready();
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        lock(&self.0).on_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;
    use crate::host_console::{HostConsole, HostOutput, HostSide};
    use crate::mock::CountedLine;
    use crate::unix_socket::PrivateListener;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_come_out_and_odd_accesses_do_nothing() {
        let sink = Sink::default();
        let line = Arc::new(CountedLine::default());
        let host = HostConsole::shared(HostSide::output(HostOutput::Writer(Box::new(sink.clone())))).unwrap();
        let mut s = Serial::new(line.clone(), host);
        for b in b"pod: ready\n" {
            s.write(0, &[*b]);
        }
        s.write(8, b"x");
        s.write(0, &[]);
        let mut d = [9; 3];
        s.read(5, &mut d);
        assert_eq!(d, [0x60, 0, 0]);
        s.read(u64::MAX, &mut d);
        assert_eq!(d, [0; 3]);
        assert_eq!(*lock(&sink.0), b"pod: ready\n");
        assert_eq!(line.count(), 0);
        s.write(1, &[2]);
        s.write(0, b"!");
        assert!(line.count() > 0, "THR interrupt when it is enabled");
    }

    fn piped() -> (io::PipeWriter, Arc<Mutex<Serial>>, EventManager<SerialSubscriber>) {
        let (reader, writer) = io::pipe().unwrap();
        let host = HostConsole::shared(HostSide::Streams {
            output: HostOutput::Discard,
            input: Some(reader.into()),
        });
        let serial = Serial::new(Arc::new(CountedLine::default()), host.unwrap());
        let serial = Arc::new(Mutex::new(serial));
        let mut manager = EventManager::<SerialSubscriber>::new().unwrap();
        manager.add_subscriber(SerialSubscriber(Arc::clone(&serial)));
        (writer, serial, manager)
    }

    /// Reads until the port has nothing more.
    fn drain(s: &mut Serial, got: &mut Vec<u8>) {
        let mut d = [0];
        loop {
            s.read(5, &mut d);
            if d[0] & 1 == 0 {
                return;
            }
            s.read(0, &mut d);
            got.push(d[0]);
        }
    }

    #[test]
    fn input_waits_for_room_and_its_end_is_only_its_end() {
        let (mut writer, serial, mut manager) = piped();
        let sent: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        writer.write_all(&sent).unwrap();
        drop(writer);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            let before = got.len();
            while manager.run_with_timeout(0).unwrap() > 0 {}
            drain(&mut lock(&serial), &mut got);
            assert!(got.len() > before, "stuck after {before} bytes");
        }
        assert_eq!(got, sent);
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "the loop rests");
    }

    #[test]
    fn a_client_that_waits_hears_the_first_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let listener = PrivateListener::bind(&path).unwrap();
        let host = HostConsole::shared(HostSide::Socket(listener)).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let mut s = Serial::new(Arc::new(CountedLine::default()), host);
        s.write(0, b"!");
        let mut got = [0];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"!");
    }

    #[test]
    fn input_during_the_drivers_loopback_test_waits_for_its_end() {
        let (mut writer, serial, mut manager) = piped();
        lock(&serial).write(4, &[0x10]);
        writer.write_all(b"typed").unwrap();
        while manager.run_with_timeout(0).unwrap() > 0 {}
        let mut got = Vec::new();
        let mut s = lock(&serial);
        s.write(0, b"L");
        drain(&mut s, &mut got);
        assert_eq!(got, b"L");
        s.write(4, &[0]);
        drain(&mut s, &mut got);
        assert_eq!(got, b"Ltyped");
    }
}
