//! Serial port, virtio console, debug port.

use crate::node::{FieldError, Node};
use crate::options::{OptionForm, OptionMap};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where a console's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum ConsoleMode {
    /// The device does not exist.
    Off,
    /// A pseudo-terminal made for it.
    Pty,
    /// podvisor's standard input and output.
    Tty,
    /// A file.
    File,
    /// A UNIX socket that podvisor listens on.
    Socket,
    /// Nowhere.
    Null,
}

/// Rewrites `tty`, `off`, `file=/p`, `socket=/p` into `mode` and its field.
fn rewrite_mode(options: &mut OptionMap) {
    for word in ["off", "pty", "tty", "null"] {
        if !options.has("mode") && options.take_flag(word) {
            options.set("mode", Node::Text(word.to_owned()));
        }
    }
    for word in ["file", "socket"] {
        if !options.has("mode") && options.has(word) {
            options.set("mode", Node::Text(word.to_owned()));
        }
    }
}

/// The virtio console (`--console off|null|tty|pty|file=/p|socket=/p`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ConsoleConfig {
    /// Where it goes.
    pub mode: ConsoleMode,
    /// The file, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket, with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Name of the device; the monitor gives one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Tty,
            file: None,
            socket: None,
            id: None,
            pci_segment: 0,
            iommu: false,
        }
    }
}

impl OptionForm for ConsoleConfig {
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        rewrite_mode(options);
        Ok(())
    }
}

/// The 16550 serial port (`--serial off|null|tty|pty|file=/p|socket=/p`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct SerialConfig {
    /// Where it goes.
    pub mode: ConsoleMode,
    /// The file, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket, with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Has no meaning for a serial port; kept because clients send it.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Null,
            file: None,
            socket: None,
            iommu: false,
        }
    }
}

impl OptionForm for SerialConfig {
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        rewrite_mode(options);
        Ok(())
    }
}

/// The debug port, one byte a write (`--debug-console file=/p,iobase=0xe9`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DebugConsoleConfig {
    /// Where it goes.
    pub mode: ConsoleMode,
    /// The file, with mode `File`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The I/O port.
    pub iobase: Option<u16>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Off,
            file: None,
            iobase: Some(0xe9),
        }
    }
}

impl OptionForm for DebugConsoleConfig {
    fn rewrite(options: &mut OptionMap) -> Result<(), FieldError> {
        rewrite_mode(options);
        Ok(())
    }
}
