//! The 16550A serial port (vm-superio's) on an event loop: output through [`Output`], input from a descriptor that is
//! read only while the port's FIFO has room. The end of the input ends nothing but the input.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::{Value, json};
use vm_superio::Trigger;
use vm_superio::serial::{Serial as Uart, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::output::Output;
use crate::bus::BusDevice;
use crate::platform::IrqLine;
use crate::sync::lock;

/// Ports of the device.
pub const SERIAL_SIZE: u64 = 8;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Signals when the guest has read all input.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter is a signal that is already there.
        let _ = self.0.write(1);
    }
}

/// The serial port.
pub struct Serial {
    uart: Uart<Line, Room, Output>,
    room: EventFd,
    input: Option<File>,
}

impl Serial {
    /// A port on interrupt `line` that writes to `output` and reads `input`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(line: Arc<dyn IrqLine>, output: Output, input: Option<OwnedFd>) -> io::Result<Self> {
        let room = EventFd::new(EFD_NONBLOCK)?;
        let uart = Uart::with_events(Line(line), Room(room.try_clone()?), output);
        let input = input.map(File::from);
        Ok(Self { uart, room, input })
    }

    /// Gives the guest `data` as input; returns how many bytes the FIFO took.
    pub fn feed(&mut self, data: &[u8]) -> usize {
        let room = self.uart.fifo_capacity();
        let part = data.get(..room.min(data.len())).unwrap_or(data);
        match self.uart.enqueue_raw_bytes(part) {
            Ok(n) => n,
            Err(error) => {
                tracing::warn!(?error, "serial input");
                part.len()
            }
        }
    }

    /// Reads what the FIFO has room for. False when the input has ended.
    fn take_input(&mut self) -> bool {
        let room = self.uart.fifo_capacity();
        let Some(input) = &mut self.input else { return false };
        let mut data = [0; 64];
        let Some(part) = data.get_mut(..room.min(64)).filter(|p| !p.is_empty()) else {
            return true;
        };
        match input.read(part) {
            Ok(0) => false,
            Ok(n) => {
                self.feed(data.get(..n).unwrap_or_default());
                true
            }
            Err(e) => matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock),
        }
    }

    /// Hands over output that still waits.
    pub fn drain(&mut self) {
        self.uart.writer_mut().drain();
    }

    fn input_fd(&self) -> Option<RawFd> {
        self.input.as_ref().map(AsRawFd::as_raw_fd)
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
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset @ 0..8), Some(first)) = (u8::try_from(offset), data.first())
            && let Err(error) = self.uart.write(offset, *first)
        {
            tracing::debug!(?error, "serial port");
        }
    }
}

/// What the loop reports.
const INPUT: u32 = 0;
const ROOM: u32 = 1;
const WRITABLE: u32 = 2;

/// The serial port as the event manager runs it; the port bus holds the same one.
pub struct SerialSubscriber {
    serial: Arc<Mutex<Serial>>,
    watching: bool,
}

impl SerialSubscriber {
    /// Runs `serial`.
    #[must_use]
    pub fn new(serial: Arc<Mutex<Serial>>) -> Self {
        Self {
            serial,
            watching: false,
        }
    }

    fn watch_input(&mut self, serial: &mut Serial, ops: &mut EventOps) {
        if let Some(fd) = serial.input_fd().filter(|_| !self.watching) {
            match ops.add(Events::with_data_raw(fd, INPUT, EventSet::IN)) {
                Ok(()) => self.watching = true,
                Err(error) => {
                    tracing::debug!(?error, "serial input cannot be watched and is not read");
                    serial.input = None;
                }
            }
        }
    }

    fn unwatch_input(&mut self, serial: &Serial, ops: &mut EventOps) {
        if let Some(fd) = serial.input_fd().filter(|_| self.watching) {
            self.watching = false;
            if let Err(error) = ops.remove(Events::with_data_raw(fd, INPUT, EventSet::IN)) {
                tracing::warn!(?error, "serial input");
            }
        }
    }
}

impl MutEventSubscriber for SerialSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        let serial = Arc::clone(&self.serial);
        let mut serial = lock(&serial);
        if serial.input.is_some() {
            if let Err(error) = ops.add(Events::with_data(&serial.room, ROOM, EventSet::IN)) {
                tracing::error!(?error, "serial input will stop when the FIFO is full");
            }
            self.watch_input(&mut serial, ops);
        }
        if let Some(fd) = serial.uart.writer().watch_fd() {
            // Edges only: a console that takes everything wakes nobody.
            let events = EventSet::OUT | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::with_data_raw(fd, WRITABLE, events)) {
                tracing::debug!(?error, "serial output is handed over with the next byte only");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let serial = Arc::clone(&self.serial);
        let mut serial = lock(&serial);
        match events.data() {
            INPUT => {
                if !serial.take_input() {
                    self.unwatch_input(&serial, ops);
                    serial.input = None;
                } else if serial.uart.fifo_capacity() == 0 {
                    self.unwatch_input(&serial, ops);
                }
            }
            ROOM => {
                // Nothing to read: an earlier wake-up took it.
                let _ = serial.room.read();
                self.watch_input(&mut serial, ops);
            }
            _ => serial.drain(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;
    use crate::mock::CountedLine;

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
        let mut s = Serial::new(line.clone(), Output::new(Box::new(sink.clone())), None).unwrap();
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

    #[test]
    fn input_waits_for_room_and_its_end_is_only_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let line = Arc::new(CountedLine::default());
        let out = Output::new(Box::new(io::sink()));
        let serial = Arc::new(Mutex::new(Serial::new(line, out, Some(reader.into())).unwrap()));
        let mut manager = EventManager::<SerialSubscriber>::new().unwrap();
        manager.add_subscriber(SerialSubscriber::new(Arc::clone(&serial)));
        let sent: Vec<u8> = (0..200).collect();
        writer.write_all(&sent).unwrap();
        drop(writer);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            while manager.run_with_timeout(0).unwrap() > 0 {}
            let mut s = lock(&serial);
            let mut d = [0];
            s.read(5, &mut d);
            assert_eq!(d[0] & 1, 1, "stuck after {} bytes", got.len());
            while d[0] & 1 != 0 {
                let mut byte = [0];
                s.read(0, &mut byte);
                got.push(byte[0]);
                s.read(5, &mut d);
            }
        }
        assert_eq!(got, sent);
        while manager.run_with_timeout(0).unwrap() > 0 {}
        assert!(lock(&serial).input.is_none());
    }
}
