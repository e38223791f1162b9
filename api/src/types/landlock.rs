//! Which files the monitor may reach beyond those that its configuration names.

use crate::options::OptionForm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A path that stays reachable under `landlock_enable` (`--landlock-rules path=/d,access=rw`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct LandlockConfig {
    /// A file, or a directory with all that is in it; it must exist when the pod boots.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: LandlockAccess,
}

/// What may be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum LandlockAccess {
    /// Reading.
    #[serde(rename = "r")]
    Read,
    /// Writing, creating and removing.
    #[serde(rename = "w")]
    Write,
    /// Both.
    #[serde(rename = "rw", alias = "wr")]
    ReadWrite,
}

impl OptionForm for LandlockConfig {}
