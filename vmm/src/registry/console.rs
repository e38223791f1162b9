//! The virtio console, which every pod has unless it is off: the `console` section. Also the host's ends that the serial
//! port uses too.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use podvisor_api::types::{ConsoleMode, VmConfig};
use podvisor_devices::virtio::console::{self, Console, ConsoleOutput};

use super::{Kind, Means, RegistryError, Wanted, failed};

/// The kind. Its name is fixed: nobody adds or removes it.
pub(super) const KIND: Kind = Kind {
    name: "console",
    make: console,
    ids: |_| Vec::new(),
    syscalls: &[console::SYSCALLS],
    take_out: |_, _| {},
};

fn console(config: &VmConfig, _: &Means<'_>) -> Result<Vec<Wanted>, RegistryError> {
    let console = &config.console;
    let fail = |e: io::Error| failed(format!("console.mode {:?}", console.mode), e);
    let (output, input) = match console.mode {
        ConsoleMode::Off => return Ok(Vec::new()),
        ConsoleMode::Null => (ConsoleOutput::Discard, None),
        ConsoleMode::Tty => {
            let input = (config.serial.mode != ConsoleMode::Tty)
                .then(stdin)
                .transpose()
                .map_err(fail)?;
            (ConsoleOutput::Fd(stdout().map_err(fail)?), input)
        }
        ConsoleMode::File => {
            let file = open_output(console.file.as_deref()).map_err(|e| failed("console.file", e))?;
            (ConsoleOutput::Fd(file.into()), None)
        }
        ConsoleMode::Pty | ConsoleMode::Socket => return Err(failed("console.mode", unsupported_mode())),
    };
    let device = Console::new(output, input, None).map_err(fail)?;
    Ok(vec![Wanted {
        id: console.id.clone().unwrap_or_else(|| "__console".to_owned()),
        kind: "console",
        segment: console.pci_segment,
        slot: None,
        device: Box::new(device),
    }])
}

/// Words for console modes that do not exist here.
pub(crate) fn unsupported_mode() -> &'static str {
    "Pty and Socket are not supported yet; use Off, Null, Tty or File"
}

/// A descriptor of the monitor's standard output.
pub(crate) fn stdout() -> io::Result<OwnedFd> {
    io::stdout().as_fd().try_clone_to_owned()
}

/// A descriptor of the monitor's standard input.
pub(crate) fn stdin() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}

/// Opens a console's output file, emptied.
pub(crate) fn open_output(path: Option<&std::path::Path>) -> io::Result<File> {
    let path = path.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "mode File needs a file"))?;
    File::create(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}
