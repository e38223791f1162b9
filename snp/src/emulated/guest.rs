//! The firmware's view of a guest that runs: who it is and the keys of its messages.

use super::psp::GuestContext;

/// A launched guest, as the firmware knows it.
pub struct Guest {
    context: GuestContext,
}

impl Guest {
    pub(super) fn new(context: GuestContext) -> Self {
        Self { context }
    }
}
