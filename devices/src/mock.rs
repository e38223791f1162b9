//! A hypervisor made of counters, for tests and fuzz targets: doorbells are recorded, interrupts counted. Not part of
//! the monitor.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::platform::{Hypervisor, IrqLine, MsiMessage, MsiVectors};
use crate::sync::lock;

/// Interrupt vectors that count. A trigger while nothing is routed is dropped, as KVM does.
#[derive(Debug, Default)]
pub struct CountedVectors {
    vectors: Mutex<Vec<(Option<MsiMessage>, u64)>>,
    sets: AtomicU64,
    refuse: AtomicBool,
}

impl CountedVectors {
    /// `count` vectors.
    #[must_use]
    pub fn new(count: u16) -> Self {
        Self {
            vectors: Mutex::new(vec![(None, 0); usize::from(count)]),
            ..Self::default()
        }
    }

    /// How often vector `index` was raised while routed.
    pub fn triggered(&self, index: usize) -> u64 {
        lock(&self.vectors).get(index).map_or(0, |v| v.1)
    }

    /// Where vector `index` is routed.
    pub fn route(&self, index: usize) -> Option<MsiMessage> {
        lock(&self.vectors).get(index).and_then(|v| v.0)
    }

    /// How often a route was set.
    pub fn sets(&self) -> u64 {
        self.sets.load(Ordering::SeqCst)
    }

    /// Makes the hypervisor refuse routes from now on, or not.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::SeqCst);
    }
}

impl MsiVectors for CountedVectors {
    fn set(&self, index: u16, message: Option<MsiMessage>) -> io::Result<()> {
        self.sets.fetch_add(1, Ordering::SeqCst);
        if self.refuse.load(Ordering::SeqCst) && message.is_some() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        match lock(&self.vectors).get_mut(usize::from(index)) {
            Some(vector) => {
                vector.0 = message;
                Ok(())
            }
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        if let Some(vector) = lock(&self.vectors)
            .get_mut(usize::from(index))
            .filter(|v| v.0.is_some())
        {
            vector.1 += 1;
        }
        Ok(())
    }

    fn eventfd(&self, _index: u16) -> Option<EventFd> {
        None
    }
}

/// The hypervisor.
#[derive(Debug, Default)]
pub struct MockHypervisor {
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
    vectors: Mutex<Vec<Arc<CountedVectors>>>,
    changes: AtomicUsize,
}

impl MockHypervisor {
    /// A hypervisor without devices.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Addresses with a doorbell, in order.
    pub fn doorbells(&self) -> Vec<u64> {
        lock(&self.doorbells).keys().copied().collect()
    }

    /// How often a doorbell was added or removed.
    pub fn doorbell_changes(&self) -> usize {
        self.changes.load(Ordering::SeqCst)
    }

    /// The guest writes to `address`: signals the doorbell there. False when there is none: the write would reach
    /// user space.
    pub fn ring(&self, address: u64) -> bool {
        lock(&self.doorbells)
            .get(&address)
            .is_some_and(|fd| fd.write(1).is_ok())
    }

    /// The vectors of the `index`th device that asked for some.
    pub fn vectors(&self, index: usize) -> Option<Arc<CountedVectors>> {
        lock(&self.vectors).get(index).cloned()
    }
}

impl Hypervisor for MockHypervisor {
    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        let mut doorbells = lock(&self.doorbells);
        if doorbells.contains_key(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.insert(address, fd.try_clone()?);
        self.changes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn remove_doorbell(&self, address: u64, _fd: &EventFd) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        match lock(&self.doorbells).remove(&address) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn msi_vectors(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let vectors = Arc::new(CountedVectors::new(count));
        lock(&self.vectors).push(Arc::clone(&vectors));
        Ok(vectors)
    }
}

/// A pin interrupt that counts.
#[derive(Debug, Default)]
pub struct CountedLine(AtomicU64);

impl CountedLine {
    /// How often it was raised.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountedLine {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
