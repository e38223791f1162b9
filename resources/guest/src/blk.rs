//! The block device (virtio 1.2, 5.2): bounce buffers in the shared window, two requests in flight.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::paging::PageTables;
use crate::pattern::Pattern;
use crate::pci::Function;
use crate::sha256::Sha256;
use crate::virtio::{Device, Piece, Queue};
use crate::window::{Shared, Window};

/// Bytes in a sector.
pub const SECTOR: usize = 512;
const BUFFER: usize = 256 << 10;
const IN_FLIGHT: usize = 2;
const PAGE: usize = 4096;

mod feature {
    //! Feature bits.
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

mod kind {
    //! Request types.
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// A request's place in the window: header and status in `head`, data behind.
#[derive(Clone, Copy)]
struct Slot {
    head: Shared,
    data: Shared,
}

const STATUS_AT: usize = 64;

impl Slot {
    fn prepare(&self, kind: u32, sector: u64) {
        self.head.set(0, kind);
        self.head.set(4, 0_u32);
        self.head.set(8, sector);
        self.head.set(STATUS_AT, 0xFF_u8);
    }

    fn check(&self) -> Result<(), &'static str> {
        match self.head.get::<u8>(STATUS_AT) {
            0 => Ok(()),
            1 => Err("I/O error"),
            2 => Err("request not supported"),
            _ => Err("the device gave no status"),
        }
    }
}

/// The block device.
pub struct Blk {
    device: Device,
    queue: Queue,
    slots: Vec<Slot>,
    sectors: u64,
}

impl Blk {
    /// Brings the device up.
    ///
    /// # Errors
    /// Says what it lacks.
    pub fn start(function: &Function, tables: &PageTables, window: &Window) -> Result<Self, &'static str> {
        let wanted = feature::RO | feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
        let device = Device::start(function, tables, wanted)?;
        let queue = device.queue(window, 0, 64)?;
        device.go();
        let heads = window.take(PAGE).ok_or("the shared window is used up")?;
        let mut slots = Vec::new();
        for index in 0..IN_FLIGHT {
            let data = window.take(BUFFER).ok_or("the shared window is used up")?;
            slots.push(Slot {
                head: heads.part(index * 128, 128),
                data,
            });
        }
        let mut disk = Self {
            device,
            queue,
            slots,
            sectors: 0,
        };
        disk.look();
        Ok(disk)
    }

    /// Looks how large the disk is now.
    pub fn look(&mut self) {
        self.sectors = u64::from(self.device.config(4)) << 32 | u64::from(self.device.config(0));
    }

    /// Capacity in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the disk refuses writes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.device.has(feature::RO)
    }

    fn slot(&self, index: usize) -> Result<Slot, &'static str> {
        self.slots.get(index).copied().ok_or("no such request slot")
    }

    /// Puts a request into the ring; `data` is what the device reads or writes.
    fn submit(&mut self, slot: &Slot, data: Option<Piece>) -> Result<u16, &'static str> {
        let head = Piece::In(slot.head.part(0, 16));
        let status = Piece::Out(slot.head.part(STATUS_AT, 1));
        let token = match data {
            Some(data) => self.queue.push(&[head, data, status]),
            None => self.queue.push(&[head, status]),
        };
        token.ok_or("the queue is full")
    }

    fn one(&mut self, kind: u32, sector: u64, data: Option<Piece>) -> Result<(), &'static str> {
        let slot = self.slot(0)?;
        slot.prepare(kind, sector);
        self.submit(&slot, data)?;
        self.queue.wait()?;
        slot.check()
    }

    fn check_range(&self, sector: u64, count: u64) -> Result<(), &'static str> {
        match sector.checked_add(count) {
            Some(end) if end <= self.sectors => Ok(()),
            _ => Err("beyond the end of the disk"),
        }
    }

    /// The serial number that the device tells.
    ///
    /// # Errors
    /// As the device answers.
    pub fn id(&mut self) -> Result<String, &'static str> {
        let data = self.slot(0)?.data.part(0, 20);
        data.clear();
        self.one(kind::GET_ID, 0, Some(Piece::Out(data)))?;
        let mut bytes = [0; 20];
        data.read(0, &mut bytes);
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(text
            .iter()
            .filter(|byte| byte.is_ascii_graphic())
            .map(|byte| char::from(*byte))
            .collect())
    }

    /// Runs `count` sectors through the slots, in order; `fill` prepares a buffer, `drain` takes one that is done.
    fn stream(
        &mut self,
        write: bool,
        sector: u64,
        count: u64,
        mut fill: impl FnMut(Shared),
        mut drain: impl FnMut(Shared),
    ) -> Result<(), &'static str> {
        self.check_range(sector, count)?;
        let total = (count as usize).checked_mul(SECTOR).ok_or("too many sectors")?;
        let (mut issued, mut done, mut outcome) = (0, 0, Ok(()));
        let mut tokens: [Option<u16>; IN_FLIGHT] = [None; IN_FLIGHT];
        let mut finished = [false; IN_FLIGHT];
        while done < issued || (issued < total && outcome.is_ok()) {
            while issued < total && issued - done < IN_FLIGHT * BUFFER && outcome.is_ok() {
                let index = issued / BUFFER % IN_FLIGHT;
                let slot = self.slot(index)?;
                let data = slot.data.part(0, BUFFER.min(total - issued));
                fill(data);
                slot.prepare(
                    if write { kind::OUT } else { kind::IN },
                    sector + (issued / SECTOR) as u64,
                );
                let piece = if write { Piece::In(data) } else { Piece::Out(data) };
                let token = self.submit(&slot, Some(piece))?;
                tokens.get_mut(index).map(|place| place.replace(token));
                self.queue.kick();
                issued += data.len();
            }
            let index = done / BUFFER % IN_FLIGHT;
            while finished.get(index) == Some(&false) {
                let token = Some(self.queue.wait()?.token);
                for (mark, _) in finished.iter_mut().zip(&tokens).filter(|(_, place)| **place == token) {
                    *mark = true;
                }
            }
            finished.get_mut(index).map(core::mem::take);
            tokens.get_mut(index).map(core::mem::take);
            let slot = self.slot(index)?;
            outcome = outcome.and(slot.check());
            let data = slot.data.part(0, BUFFER.min(total - done));
            if outcome.is_ok() {
                drain(data);
            }
            done += data.len();
        }
        outcome
    }

    /// Writes `count` sectors of a pattern and flushes.
    ///
    /// # Errors
    /// As the device answers.
    pub fn write(&mut self, sector: u64, count: u64, seed: u64) -> Result<(), &'static str> {
        if self.read_only() {
            return Err("the disk is read-only");
        }
        let mut pattern = Pattern::new(seed);
        let mut bytes = vec![0; 16 << 10];
        let fill = |data: Shared| {
            let mut at = 0;
            while at < data.len() {
                let count = bytes.len().min(data.len() - at);
                if let Some(piece) = bytes.get_mut(..count) {
                    pattern.fill(piece);
                    data.write(at, piece);
                }
                at += count;
            }
        };
        self.stream(true, sector, count, fill, |_| ())?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        if self.device.has(feature::FLUSH) {
            self.one(kind::FLUSH, 0, None)
        } else {
            Ok(())
        }
    }

    /// SHA-256 of `count` sectors.
    ///
    /// # Errors
    /// As the device answers.
    pub fn read(&mut self, sector: u64, count: u64) -> Result<[u8; 32], &'static str> {
        let mut hash = Sha256::new();
        self.stream(false, sector, count, |_| (), |data| crate::hash_shared(&mut hash, data))?;
        Ok(hash.finalize_reset())
    }

    /// Discards sectors, or zeroes them.
    ///
    /// # Errors
    /// As the device answers.
    pub fn clear(&mut self, sector: u64, count: u64, discard: bool) -> Result<(), &'static str> {
        let (feature, kind) = match discard {
            true => (feature::DISCARD, kind::DISCARD),
            false => (feature::WRITE_ZEROES, kind::WRITE_ZEROES),
        };
        if !self.device.has(feature) {
            return Err("the disk does not offer it");
        }
        self.check_range(sector, count)?;
        let segment = self.slot(0)?.data.part(0, 16);
        segment.set(0, sector);
        segment.set(8, u32::try_from(count).map_err(|_| "too many sectors")?);
        segment.set(12, 0_u32);
        self.one(kind, 0, Some(Piece::In(segment)))
    }

    /// Asks the device to write into, and unless the disk is read-only to read, the private page `page`. True when it
    /// did one of them.
    ///
    /// # Errors
    /// When the device does not work otherwise.
    pub fn probe(&mut self, page: Shared) -> Result<bool, &'static str> {
        let last = self
            .sectors
            .checked_sub((PAGE / SECTOR) as u64)
            .ok_or("the disk is too small")?;
        let written = self.one(kind::IN, last, Some(Piece::Out(page))).is_ok();
        let keep = self.slot(1)?.data.part(0, PAGE);
        self.one(kind::IN, last, Some(Piece::Out(keep)))?;
        let read = !self.read_only() && self.one(kind::OUT, last, Some(Piece::In(page))).is_ok();
        if read {
            self.one(kind::OUT, last, Some(Piece::In(keep)))?;
        }
        Ok(written || read)
    }
}
