//! The debug console of Bochs and QEMU at port 0xE9, as Cloud Hypervisor has it: every byte written is output, and a
//! read answers with the port's number, by which firmware finds it.

use crate::bus::BusDevice;
use crate::host_console::SharedHostConsole;
use crate::sync::lock;

/// The port, by default.
pub const DEBUG_CONSOLE_PORT: u64 = 0xE9;
/// Ports of the device.
pub const DEBUG_CONSOLE_SIZE: u64 = 1;
/// What a read answers.
const PRESENT: u8 = 0xE9;

/// The debug console. What its host's end has to do when it becomes ready is a
/// [`HostConsoleSubscriber`](crate::host_console::HostConsoleSubscriber)'s.
pub struct DebugConsole {
    host: SharedHostConsole,
}

impl DebugConsole {
    /// A console that writes to `host`.
    #[must_use]
    pub fn new(host: SharedHostConsole) -> Self {
        Self { host }
    }
}

impl BusDevice for DebugConsole {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut host = lock(&self.host);
        host.take(data);
        host.send();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};

    use super::*;
    use crate::host_console::{HostConsole, HostOutput, HostSide};

    #[test]
    fn bytes_come_out_and_the_port_answers() {
        let (mut reader, writer) = io::pipe().unwrap();
        let host = HostConsole::shared(HostSide::output(HostOutput::Fd(writer.into()))).unwrap();
        let mut console = DebugConsole::new(host);
        console.write(0, b"stage0");
        console.write(0, b"\n");
        let mut byte = [0; 2];
        console.read(0, &mut byte);
        assert_eq!(byte, [0xE9; 2]);
        let mut got = [0; 7];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"stage0\n");
    }
}
