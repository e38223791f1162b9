//! The small devices: the virtio console, the watchdog, pvpanic, and ports such as the serial port's. Each comes up at
//! its first use.

use alloc::vec;
use alloc::vec::Vec;

use crate::console;
use crate::layout;
use crate::paging::PageTables;
use crate::pci::Function;
use crate::virtio::{Device, Piece, Queue};
use crate::window::{Shared, Window};

/// The most bytes of one line.
pub const LINE: usize = 256;

/// `VIRTIO_CONSOLE_F_SIZE`.
const SIZE: u64 = 1;

/// The virtio console (virtio 1.2, 5.3), one port.
pub struct Console {
    device: Device,
    receive: Queue,
    transmit: Queue,
    input: Shared,
    output: Shared,
}

impl Console {
    /// Brings the device up.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window) -> Result<Self, &'static str> {
        let full = "the shared window is used up";
        let device = Device::start(function, tables, SIZE)?;
        let receive = device.queue(window, 0, 4)?;
        let transmit = device.queue(window, 1, 4)?;
        device.go();
        Ok(Self {
            device,
            receive,
            transmit,
            input: window.take(LINE).ok_or(full)?,
            output: window.take(LINE).ok_or(full)?,
        })
    }

    /// Columns and rows of the host's window.
    ///
    /// # Errors
    /// When the device does not tell.
    pub fn size(&self) -> Result<(u16, u16), &'static str> {
        if !self.device.has(SIZE) {
            return Err("the console has no size");
        }
        let both = self.device.config(0);
        Ok((both as u16, (both >> 16) as u16))
    }

    /// Prints `text`, at most [`LINE`] bytes of it.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn print(&mut self, text: &[u8]) -> Result<(), &'static str> {
        let text = text.get(..LINE).unwrap_or(text);
        self.output.write(0, text);
        let piece = Piece::In(self.output.part(0, text.len()));
        self.transmit.push(&[piece]).ok_or("the queue is full")?;
        self.transmit.wait().map(|_| ())
    }

    /// Waits for what is typed until it is `count` bytes, at most [`LINE`].
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn typed(&mut self, count: usize) -> Result<Vec<u8>, &'static str> {
        let mut text = Vec::new();
        while text.len() < count.min(LINE) {
            let room = self.input.part(0, count.min(LINE) - text.len());
            self.receive.push(&[Piece::Out(room)]).ok_or("the queue is full")?;
            let given = (self.receive.wait()?.len as usize).min(room.len());
            if given == 0 {
                return Err("the console gave nothing");
            }
            let mut piece = vec![0; given];
            room.read(0, &mut piece);
            text.extend_from_slice(&piece);
        }
        Ok(text)
    }
}

/// Cloud Hypervisor's watchdog.
pub struct Watchdog {
    queue: Queue,
    answer: Shared,
}

impl Watchdog {
    /// Brings the device up. It watches from the first ping on.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window) -> Result<Self, &'static str> {
        let device = Device::start(function, tables, 0)?;
        let queue = device.queue(window, 0, 4)?;
        device.go();
        let page = window.take(1).ok_or("the shared window is used up")?;
        Ok(Self {
            queue,
            answer: page.part(0, 1),
        })
    }

    /// Feeds it.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub fn ping(&mut self) -> Result<(), &'static str> {
        self.answer.write(0, &[0]);
        self.queue.push(&[Piece::Out(self.answer)]).ok_or("the queue is full")?;
        let mut answer = [0];
        let used = self.queue.wait()?;
        self.answer.read(0, &mut answer);
        if (used.len, answer) == (1, [1]) {
            Ok(())
        } else {
            Err("the watchdog answers something else")
        }
    }
}

/// Writes `text` to a port, byte by byte.
pub fn print_to_port(port: u16, text: &[u8]) {
    for byte in text {
        console::port_write(port, *byte);
    }
}

/// Waits for what is typed on the serial port until it is `count` bytes, at most [`LINE`].
///
/// # Errors
/// When it does not come soon.
pub fn serial_typed(count: usize) -> Result<Vec<u8>, &'static str> {
    const LINE_STATUS: u16 = layout::SERIAL_PORT + 5;
    const DATA_READY: u8 = 1;
    // Each costs an exit: some seconds.
    const TRIES: u32 = 200_000;
    let mut text = Vec::new();
    for _ in 0..TRIES {
        if text.len() >= count.min(LINE) {
            return Ok(text);
        }
        if console::port_read(LINE_STATUS).ok_or("ports cannot be read here")? & DATA_READY != 0 {
            text.extend(console::port_read(layout::SERIAL_PORT));
        }
    }
    Err("nothing was typed")
}
