//! The serial port: a few lines in a pod's life. Every byte costs an exit, so what is said is short.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{ghcb, layout, ring0};

static BY_GHCB: AtomicBool = AtomicBool::new(false);

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port_write(layout::SERIAL_PORT, byte);
        }
        Ok(())
    }
}

/// From now on ports are reached through the GHCB (SEV-SNP hardware, where the instruction would fault).
pub fn use_ghcb() {
    BY_GHCB.store(true, Ordering::Relaxed);
}

/// Writes a byte to a port.
pub fn port_write(port: u16, value: u8) {
    if BY_GHCB.load(Ordering::Relaxed) {
        ghcb::port_write(port, value);
    } else {
        ring0::out8(port, value);
    }
}

/// Reads a byte from a port; None where that instruction would fault (SEV-SNP hardware).
#[must_use]
pub fn port_read(port: u16) -> Option<u8> {
    (!BY_GHCB.load(Ordering::Relaxed)).then(|| ring0::in8(port))
}

/// Prints `pod: <message>` and a line end.
pub fn say(message: fmt::Arguments<'_>) {
    let _ = writeln!(Serial, "pod: {message}");
}
