//! The transport's registers in its BAR (virtio 1.2 section 4.1.4.3 ff.), and the window onto them through
//! configuration space. An access of another width than the field's reads zeros and writes nothing.

use std::sync::atomic::Ordering;

use super::queues::Ring;
use super::{
    BAR_SIZE, COMMON_LEN, DEVICE, DEVICE_LEN, ISR, MSIX_PBA, MSIX_TABLE, NOTIFY, NOTIFY_LEN, NOTIFY_MULTIPLIER, Phase,
    VirtioPci, interrupt::NO_VECTOR, status,
};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;

const LOW: u64 = 0xFFFF_FFFF;
const HIGH: u64 = LOW << 32;

/// The ring register at `offset` of the common configuration, and which of its bits an access of `len` covers.
fn ring_at(offset: u64, len: usize) -> Option<(Ring, u64)> {
    let ring = match offset & !7 {
        0x20 => Ring::Desc,
        0x28 => Ring::Driver,
        0x30 => Ring::Device,
        _ => return None,
    };
    match (offset & 7, len) {
        (0, 8) => Some((ring, u64::MAX)),
        (0, 4) => Some((ring, LOW)),
        (4, 4) => Some((ring, HIGH)),
        _ => None,
    }
}

/// Half of a 64-bit feature set.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & LOW,
        1 => features >> 32,
        _ => 0,
    }
}

/// The value of a write of `N` bytes.
fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

impl VirtioPci {
    pub(super) fn read_register(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            0..COMMON_LEN => {
                let value = self.read_common(offset, data.len()).unwrap_or(0).to_le_bytes();
                for (i, d) in data.iter_mut().enumerate() {
                    *d = value.get(i).copied().unwrap_or(0);
                }
            }
            ISR => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE.. if offset < DEVICE + DEVICE_LEN => {
                data.fill(0);
                self.device.read_config(offset - DEVICE, data);
            }
            MSIX_TABLE..MSIX_PBA => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PBA.. => self.msix.read_pending(offset - MSIX_PBA, data),
            _ => data.fill(0),
        }
    }

    pub(super) fn write_register(&mut self, offset: u64, data: &[u8]) {
        match offset {
            0..COMMON_LEN => self.write_common(offset, data),
            DEVICE.. if offset < DEVICE + DEVICE_LEN => self.device.write_config(offset - DEVICE, data),
            NOTIFY.. if offset < NOTIFY + NOTIFY_LEN => self.notify((offset - NOTIFY) / NOTIFY_MULTIPLIER),
            MSIX_TABLE..MSIX_PBA => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn read_common(&self, offset: u64, len: usize) -> Option<u64> {
        let selected = self.phase.queue(self.queue_select);
        if let Some((ring, mask)) = ring_at(offset, len) {
            let address = selected.map_or(0, |q| q.ring(ring)) & mask;
            return Some(if mask == HIGH { address >> 32 } else { address });
        }
        Some(match (offset, len) {
            (0x00, 4) => u64::from(self.features_select),
            (0x04, 4) => half(self.offered(), self.features_select),
            (0x08, 4) => u64::from(self.driver_features_select),
            (0x0C, 4) => half(self.driver_features, self.driver_features_select),
            (0x10, 2) => u64::from(self.config_interrupt.vector()),
            (0x12, 2) => self.doorbells.len() as u64,
            (0x14, 1) => u64::from(self.status),
            (0x15, 1) => u64::from(self.generation.load(Ordering::Acquire)),
            (0x16, 2) => u64::from(self.queue_select),
            (0x18, 2) => selected.map_or(0, |q| u64::from(q.size)),
            (0x1A, 2) => {
                let interrupt = self.queue_interrupts.get(usize::from(self.queue_select));
                u64::from(interrupt.map_or(NO_VECTOR, |i| i.vector()))
            }
            (0x1C, 2) => selected.map_or(0, |q| u64::from(q.enabled)),
            (0x1E, 2) => selected.map_or(0, |_| u64::from(self.queue_select)),
            _ => return None,
        })
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let v = value(data);
        let word = u16::try_from(v).unwrap_or(NO_VECTOR);
        let select = self.queue_select;
        match (offset, data.len()) {
            (0x00, 4) => self.features_select = u32::try_from(v).unwrap_or(0),
            (0x08, 4) => self.driver_features_select = u32::try_from(v).unwrap_or(0),
            (0x0C, 4) => self.set_driver_features(v),
            (0x10, 2) => self.config_interrupt.set_vector(word),
            (0x14, 1) => self.write_status(v.to_le_bytes()[0]),
            (0x16, 2) => self.queue_select = word,
            (0x1A, 2) => {
                // A vector is only where an interrupt goes: the driver may move it at any time.
                if let Some(interrupt) = self.queue_interrupts.get(usize::from(select)) {
                    interrupt.set_vector(word);
                    self.interrupts_moved(usize::from(select)..usize::from(select) + 1);
                }
            }
            (_, len) => {
                // The queues' registers: gone with the setup once the device is active.
                let Phase::Configuring(setup) = &mut self.phase else {
                    return;
                };
                match (offset, len) {
                    (0x18, 2) => setup.set_size(select, word),
                    (0x1C, 2) if word == 1 => setup.enable(select),
                    _ => {
                        if let Some((ring, mask)) = ring_at(offset, len) {
                            let v = if mask == HIGH { v << 32 } else { v };
                            setup.set_ring(select, ring, mask, v);
                        }
                    }
                }
            }
        }
    }

    /// Features can be chosen until FEATURES_OK.
    fn set_driver_features(&mut self, v: u64) {
        if self.status & status(VIRTIO_CONFIG_S_FEATURES_OK) != 0 {
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = (self.driver_features & HIGH) | v & LOW,
            1 => self.driver_features = (self.driver_features & LOW) | v << 32,
            _ => {}
        }
    }

    /// What the PCI configuration access capability points to: (offset, length), if it may be accessed.
    fn window(&self) -> Option<(u64, usize)> {
        let mut cap = [0; 16];
        self.config.read(self.pci_cfg_cap, &mut cap);
        let [_, _, _, _, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = cap;
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let fits = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(len))
            && offset + u64::from(len) <= BAR_SIZE;
        fits.then_some((offset, usize::try_from(len).ok()?))
    }

    /// Reads the BAR through configuration space (virtio 1.2 4.1.4.9).
    pub(super) fn window_read(&mut self, data: &mut [u8]) {
        data.fill(0);
        if let Some((offset, len)) = self.window()
            && let Some(part) = data.get_mut(..len)
        {
            self.read_register(offset, part);
        }
    }

    /// Writes the BAR through configuration space.
    pub(super) fn window_write(&mut self, data: &[u8]) {
        if let Some((offset, len)) = self.window()
            && let Some(part) = data.get(..len)
        {
            self.write_register(offset, part);
        }
    }
}
