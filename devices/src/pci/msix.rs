//! MSI-X (PCI Local Bus 3.0 section 6.8.2): the vector table, the pending bits, and the rule that a masked vector is
//! remembered instead of sent. The routes behind it are [`MsiVectors`].

use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::platform::{MsiMessage, MsiVectors};
use crate::sync::lock;

/// Capability id.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Most vectors of one function.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
const ENTRY: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// The MSI-X state of one function; triggered from any thread.
pub struct Msix {
    vectors: Arc<dyn MsiVectors>,
    enabled: AtomicBool,
    /// Which vectors are routed, for [`Msix::trigger`] without the lock.
    live: Vec<AtomicBool>,
    state: Mutex<State>,
}

/// What a snapshot holds of it: the table and the pending bits. Whether it is on is in configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
}

struct State {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
    routes: Vec<Option<MsiMessage>>,
    enabled: bool,
    masked: bool,
}

fn message(entry: &[u8; ENTRY]) -> (MsiMessage, bool) {
    let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = *entry;
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let data = u32::from_le_bytes([d0, d1, d2, d3]);
    (MsiMessage { address, data }, control & 1 != 0)
}

impl Msix {
    /// A table of `count` vectors, all masked, as after a reset. `count` is cut to [`MAX_VECTORS`], at least one.
    #[must_use]
    pub fn new(count: u16, vectors: Arc<dyn MsiVectors>) -> Self {
        let count = usize::from(count.clamp(1, MAX_VECTORS));
        let mut masked = [0; ENTRY];
        if let Some(control) = masked.get_mut(12) {
            *control = 1;
        }
        Self {
            vectors,
            enabled: AtomicBool::new(false),
            live: (0..count).map(|_| AtomicBool::new(false)).collect(),
            state: Mutex::new(State {
                table: vec![masked; count],
                pending: vec![false; count],
                routes: vec![None; count],
                enabled: false,
                masked: false,
            }),
        }
    }

    /// Number of vectors.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.live.len()).unwrap_or(MAX_VECTORS)
    }

    /// The capability after its id and next bytes, and its writable bits: table at `table` and pending bits at `pba`
    /// of BAR `bar`.
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> ([u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        let parts = self
            .count()
            .saturating_sub(1)
            .to_le_bytes()
            .into_iter()
            .chain((table | u32::from(bar)).to_le_bytes())
            .chain((pba | u32::from(bar)).to_le_bytes());
        for (b, p) in body.iter_mut().zip(parts) {
            *b = p;
        }
        let writable = ((CONTROL_ENABLE | CONTROL_FUNCTION_MASK) >> 8).to_le_bytes()[0];
        (body, [0, writable, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Whether the guest has enabled MSI-X.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Takes over the capability's message control word.
    pub fn set_control(&self, control: u16) {
        let mut state = lock(&self.state);
        let enabled = control & CONTROL_ENABLE != 0;
        let masked = control & CONTROL_FUNCTION_MASK != 0;
        if (state.enabled, state.masked) == (enabled, masked) {
            return;
        }
        (state.enabled, state.masked) = (enabled, masked);
        self.enabled.store(enabled, Ordering::Release);
        if !enabled {
            state.pending.fill(false);
        }
        for index in 0..self.live.len() {
            self.apply(&mut state, index);
        }
    }

    /// Brings the route of vector `index` to what the registers say; sends what became pending while it was masked.
    fn apply(&self, state: &mut State, index: usize) {
        let (Some(entry), Some(live)) = (state.table.get(index), self.live.get(index)) else {
            return;
        };
        let (msg, masked) = message(entry);
        let wanted = (state.enabled && !state.masked && !masked).then_some(msg);
        let (Some(route), Ok(number)) = (state.routes.get_mut(index), u16::try_from(index)) else {
            return;
        };
        if *route != wanted {
            if wanted.is_none() {
                // Before the route goes: see `trigger`.
                live.store(false, Ordering::SeqCst);
            }
            if let Err(error) = self.vectors.set(number, wanted) {
                tracing::warn!(vector = number, %error, "an MSI-X vector cannot be routed");
                live.store(false, Ordering::SeqCst);
                *route = None;
                return;
            }
            *route = wanted;
            live.store(wanted.is_some(), Ordering::SeqCst);
        }
        if wanted.is_some()
            && let Some(pending) = state.pending.get_mut(index).filter(|p| **p)
        {
            *pending = false;
            if let Err(error) = self.vectors.trigger(number) {
                tracing::warn!(vector = number, %error, "a pending MSI-X vector cannot be raised");
            }
        }
    }

    /// Raises vector `index`, or remembers it while it is masked. Takes no lock unless it is masked. A vector that
    /// does not exist, or any while MSI-X is off, is dropped.
    ///
    /// # Errors
    /// When the hypervisor's descriptor fails.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let Some(live) = self.live.get(usize::from(index)) else {
            return Ok(());
        };
        if live.load(Ordering::SeqCst) {
            self.vectors.trigger(index)?;
            fence(Ordering::SeqCst);
            // Masked meanwhile? Then the route may have gone before our interrupt: remember it. An interrupt too
            // many is harmless, a lost one is not.
            if live.load(Ordering::SeqCst) {
                return Ok(());
            }
        }
        let mut state = lock(&self.state);
        if !state.enabled {
            return Ok(());
        }
        if live.load(Ordering::SeqCst) {
            return self.vectors.trigger(index);
        }
        if let Some(pending) = state.pending.get_mut(usize::from(index)) {
            *pending = true;
        }
        Ok(())
    }

    /// A descriptor that raises vector `index` when written. While the vector is masked the hypervisor keeps what was
    /// written to it; the pending bits do not show it.
    #[must_use]
    pub fn eventfd(&self, index: u16) -> Option<EventFd> {
        self.vectors.eventfd(index)
    }

    /// The table and the pending bits.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let state = lock(&self.state);
        MsixState {
            table: state.table.clone(),
            pending: state.pending.clone(),
        }
    }

    /// Takes over a table and pending bits; false when they are not those of so many vectors.
    pub fn restore(&self, saved: &MsixState) -> bool {
        let count = self.live.len();
        if saved.table.len() != count || saved.pending.len() != count {
            return false;
        }
        for (offset, entry) in (0..).step_by(ENTRY).zip(&saved.table) {
            self.write_table(offset, entry);
        }
        let mut state = lock(&self.state);
        state.pending.clone_from(&saved.pending);
        for index in 0..count {
            self.apply(&mut state, index);
        }
        true
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let mut bytes = state
            .table
            .iter()
            .flatten()
            .skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for d in data {
            *d = bytes.next().copied().unwrap_or(0);
        }
    }

    /// The guest writes the table; of the control word only the mask bit is kept.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let mut changed: Option<usize> = None;
        let Some(start) = usize::try_from(offset).ok().filter(|o| *o < state.table.len() * ENTRY) else {
            return;
        };
        for (at, d) in (start..).zip(data) {
            let (index, byte) = (at / ENTRY, at % ENTRY);
            let Some(slot) = state.table.get_mut(index).and_then(|e| e.get_mut(byte)) else {
                break;
            };
            *slot = match byte {
                12 => d & 1,
                13.. => 0,
                _ => *d,
            };
            if let Some(done) = changed.filter(|c| *c != index) {
                self.apply(&mut state, done);
            }
            changed = Some(index);
        }
        if let Some(index) = changed {
            self.apply(&mut state, index);
        }
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, d) in data.iter_mut().enumerate() {
            let first = start.saturating_add(i).saturating_mul(8);
            *d = state
                .pending
                .iter()
                .skip(first)
                .take(8)
                .rev()
                .fold(0, |byte, p| byte << 1 | u8::from(*p));
        }
    }
}

#[cfg(test)]
mod tests;
