//! The entropy device (virtio 1.2, 5.4).

use alloc::vec;
use alloc::vec::Vec;

use crate::paging::PageTables;
use crate::pci::Function;
use crate::virtio::{Device, Piece, Queue};
use crate::window::{Shared, Window};

/// The most bytes one request gives.
pub const MAX: usize = 512;

/// The entropy device.
pub struct Rng {
    queue: Queue,
    buffer: Shared,
}

impl Rng {
    /// Brings the device up.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window) -> Result<Self, &'static str> {
        let device = Device::start(function, tables, 0)?;
        let queue = device.queue(window, 0, 8)?;
        device.go();
        let buffer = window.take(MAX).ok_or("the shared window is used up")?;
        Ok(Self { queue, buffer })
    }

    /// `count` random bytes, at most [`MAX`].
    ///
    /// # Errors
    /// When the device gives none.
    pub fn bytes(&mut self, count: usize) -> Result<Vec<u8>, &'static str> {
        let mut bytes = Vec::new();
        while bytes.len() < count.min(MAX) {
            let wanted = self.buffer.part(0, count.min(MAX) - bytes.len());
            self.queue.push(&[Piece::Out(wanted)]).ok_or("the queue is full")?;
            let given = (self.queue.wait()?.len as usize).min(wanted.len());
            if given == 0 {
                return Err("the device gave nothing");
            }
            let mut piece = vec![0; given];
            wanted.read(0, &mut piece);
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Asks the device to write into the private page `page`. What it did shows in the page.
    ///
    /// # Errors
    /// When the queue is broken.
    pub fn probe(&mut self, page: Shared) -> Result<(), &'static str> {
        self.queue.push(&[Piece::Out(page)]).ok_or("the queue is full")?;
        self.queue.wait().map(|_| ())
    }
}
