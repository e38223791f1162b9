//! The debug console of Bochs and QEMU at port 0xE9, as Cloud Hypervisor has it: every byte written is output, and a
//! read answers with the port's number, by which firmware finds it.

use std::io::Write;
use std::os::fd::RawFd;

use super::Output;
use crate::bus::BusDevice;

/// The port, by default.
pub const DEBUG_CONSOLE_PORT: u64 = 0xE9;
/// Ports of the device.
pub const DEBUG_CONSOLE_SIZE: u64 = 1;
/// What a read answers.
const PRESENT: u8 = 0xE9;

/// The debug console.
pub struct DebugConsole {
    output: Output,
}

impl DebugConsole {
    /// A console that writes to `output`.
    #[must_use]
    pub fn new(output: Output) -> Self {
        Self { output }
    }

    /// The descriptor to watch for becoming writable; then call [`DebugConsole::drain`]. Without that, output that
    /// waits goes with the next byte.
    #[must_use]
    pub fn watch_fd(&self) -> Option<RawFd> {
        self.output.watch_fd()
    }

    /// Hands over output that still waits.
    pub fn drain(&mut self) {
        self.output.drain();
    }

    /// Bytes dropped so far, for a reader that does not keep up.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.output.dropped()
    }
}

impl BusDevice for DebugConsole {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // Output keeps what the host does not take now, and counts what it drops.
        let _ = self.output.write_all(data);
        self.output.drain();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};

    use super::*;

    #[test]
    fn bytes_come_out_and_the_port_answers() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut console = DebugConsole::new(Output::from_fd(writer.into()).unwrap());
        assert!(console.watch_fd().is_some());
        console.write(0, b"stage0");
        console.write(0, b"\n");
        let mut byte = [0; 2];
        console.read(0, &mut byte);
        assert_eq!(byte, [0xE9; 2]);
        let mut got = [0; 7];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"stage0\n");
        // A reader that does not keep up loses what is beyond the bound, and holds nobody up.
        for _ in 0..100_000 {
            console.write(0, b"four");
        }
        assert!(console.dropped() > 0);
        let kept = 400_000 - usize::try_from(console.dropped()).unwrap();
        let mut got = vec![0; kept];
        let mut have = 0;
        while have < kept {
            have += reader.read(&mut got[have..]).unwrap();
            console.drain();
        }
        assert!(got[..65536].chunks(4).all(|four| four == b"four"));
    }
}
