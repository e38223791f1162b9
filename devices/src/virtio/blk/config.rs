//! Configuration space of a disk and the limits it promises (virtio 1.2 5.2.4).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::BlkOptions;
use super::file::DiskFile;
use super::request::{Limits, SECTOR_SHIFT};

/// Length of the structure up to and including `unused1` (behind it: secure erase and zones, not offered).
const CONFIG_LEN: usize = 60;
/// Offset of `writeback`, the only writable field.
const WRITEBACK: usize = 32;
/// The most data buffers that a driver is told to put into one request: fits `MAX_SEGMENTS` with room for buffers
/// that lie over two memory regions.
const MAX_SEG_MAX: u32 = 1022;
/// Most ranges of one discard request.
const MAX_DISCARD_RANGES: u32 = 32;
/// Most sectors of one discard range: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << (30 - SECTOR_SHIFT);
/// Most sectors of one write-zeroes range: 64 MiB, which may have to be written.
const MAX_ZEROES_SECTORS: u32 = 1 << (26 - SECTOR_SHIFT);

/// Features and configuration space of one disk.
#[derive(Debug)]
pub(super) struct Config {
    bytes: [u8; CONFIG_LEN],
    features: u64,
}

impl Config {
    /// What `disk` with `options` offers.
    pub(super) fn new(disk: &DiskFile, options: &BlkOptions) -> (Self, Limits) {
        let sparse = options.sparse && disk.can_punch;
        let limits = Limits {
            sectors: disk.size >> SECTOR_SHIFT,
            readonly: options.readonly,
            discard: sparse && !options.readonly,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_write_zeroes_sectors: MAX_ZEROES_SECTORS,
            max_ranges: MAX_DISCARD_RANGES,
        };
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        if options.readonly {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if limits.discard {
            bits.push(VIRTIO_BLK_F_DISCARD);
        }
        if options.num_queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        let features = bits.iter().fold(0, |all, bit| all | 1_u64 << bit);
        let mut config = Self {
            bytes: [0; CONFIG_LEN],
            features,
        };
        config.fill(disk, options, &limits, sparse);
        (config, limits)
    }

    fn fill(&mut self, disk: &DiskFile, options: &BlkOptions, limits: &Limits, sparse: bool) {
        // A chain has a header and a status beside its data, and may not be longer than the queue.
        let seg_max = u32::from(options.queue_size.saturating_sub(2).max(1)).min(MAX_SEG_MAX);
        let block_sectors = disk.logical_block >> SECTOR_SHIFT;
        let per_physical = (disk.physical_block / disk.logical_block.max(1)).max(1);
        self.put(0, &limits.sectors.to_le_bytes());
        self.put(12, &seg_max.to_le_bytes());
        self.put(20, &disk.logical_block.to_le_bytes());
        // physical_block_exp, alignment_offset, min_io_size (logical blocks)
        self.put(24, &[per_physical.trailing_zeros().to_le_bytes()[0], 0]);
        self.put(26, &u16::try_from(per_physical).unwrap_or(1).to_le_bytes());
        self.put(WRITEBACK, &[1]);
        self.put(34, &options.num_queues.to_le_bytes());
        if limits.discard {
            self.put(36, &limits.max_discard_sectors.to_le_bytes());
            self.put(40, &limits.max_ranges.to_le_bytes());
            let alignment = block_sectors.max(disk.physical_block >> SECTOR_SHIFT).max(1);
            self.put(44, &alignment.to_le_bytes());
        }
        if !limits.readonly {
            self.put(48, &limits.max_write_zeroes_sectors.to_le_bytes());
            self.put(52, &1_u32.to_le_bytes());
            self.put(56, &[u8::from(sparse)]);
        }
    }

    fn put(&mut self, offset: usize, value: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(offset).zip(value) {
            *place = *byte;
        }
    }

    /// The disk has this many sectors now.
    pub(super) fn set_sectors(&mut self, sectors: u64) {
        self.put(0, &sectors.to_le_bytes());
    }

    /// The features offered.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Reads; what lies behind the structure is zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = self.bytes.get(start..).unwrap_or_default().iter();
        for place in data {
            *place = bytes.next().copied().unwrap_or(0);
        }
    }

    /// Writes; only `writeback` takes a value, and only 0 or 1.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(start) = usize::try_from(offset)
            && let Some(at) = WRITEBACK.checked_sub(start)
            && let Some(value @ (0 | 1)) = data.get(at)
        {
            self.put(WRITEBACK, &[*value]);
        }
    }

    /// Whether writes may stay in a cache until they are flushed, given the negotiated `features`.
    pub(super) fn writeback(&self, features: u64) -> bool {
        let has = |bit: u32| features & 1 << bit != 0;
        if has(VIRTIO_BLK_F_CONFIG_WCE) {
            return self.is_writeback();
        }
        has(VIRTIO_BLK_F_FLUSH)
    }

    /// What the field says.
    pub(super) fn is_writeback(&self) -> bool {
        self.bytes.get(WRITEBACK) != Some(&0)
    }

    /// Sets the field.
    pub(super) fn set_writeback(&mut self, on: bool) {
        self.put(WRITEBACK, &[u8::from(on)]);
    }

    /// Back to what a fresh driver finds.
    pub(super) fn reset(&mut self) {
        self.put(WRITEBACK, &[1]);
    }
}
