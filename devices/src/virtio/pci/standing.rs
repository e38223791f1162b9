//! How a device stands, for those who must not wait for its lock: a vCPU holds that while a driver resets a device whose
//! back end takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// How a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No driver runs it.
    Configuring,
    /// A driver runs it.
    Active,
    /// It failed and was not reset since, or cannot be used again at all.
    Failed,
}

/// Tells how a device stands, as of the last step that ended.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<AtomicU8>);

impl Watch {
    /// How it stands.
    #[must_use]
    pub fn get(&self) -> Standing {
        match self.0.load(Ordering::Acquire) {
            0 => Standing::Configuring,
            1 => Standing::Active,
            _ => Standing::Failed,
        }
    }

    pub(super) fn set(&self, standing: Standing) {
        self.0.store(standing as u8, Ordering::Release);
    }
}
