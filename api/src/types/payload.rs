//! What boots.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Kernel, firmware or image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PayloadConfig {
    /// Firmware image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Kernel: PVH ELF or bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line, handed over verbatim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// IGVM image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub igvm: Option<PathBuf>,
    /// HOST_DATA of an SNP launch: 64 hexadecimal digits (SNP ABI, SNP_LAUNCH_FINISH).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_data: Option<String>,
    /// Files for a fw_cfg device; refused if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fw_cfg_config: Option<serde_json::Value>,
}

impl PayloadConfig {
    /// Whether anything is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// HOST_DATA as bytes, if it is given and is 64 hexadecimal digits.
    pub fn host_data_bytes(&self) -> Option<[u8; 32]> {
        let text = self.host_data.as_ref()?;
        if text.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digit = |at: usize| {
                pair.get(at)
                    .and_then(|c| char::from(*c).to_digit(16))
                    .and_then(|d| u8::try_from(d).ok())
            };
            *byte = digit(0)? << 4 | digit(1)?;
        }
        Some(bytes)
    }
}
