//! Which files the monitor may still reach once its pod boots, if `landlock_enable` is set: those of the configuration,
//! the host's devices that a pod is made of, and what `landlock_rules` add. A thread cannot give itself back what it gave
//! up, so this holds for the rest of the process's life, and a file that a later request names must be covered by a rule.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
use podvisor_api::types::{ConsoleMode, LandlockAccess, VmConfig};

use crate::registry;

/// A path that stays reachable, with all beneath it if it is a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The path.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: LandlockAccess,
}

impl Grant {
    /// Reading `path`.
    pub fn read(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: LandlockAccess::Read,
        }
    }

    /// All of `path`.
    pub fn write(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: LandlockAccess::ReadWrite,
        }
    }

    /// Reading `path`, and writing unless `readonly`.
    pub fn unless(readonly: bool, path: impl Into<PathBuf>) -> Self {
        if readonly { Self::read(path) } else { Self::write(path) }
    }

    /// The directory of a file or socket that is made, replaced or removed.
    #[must_use]
    pub fn directory_of(path: &Path) -> Self {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        Self::write(directory.unwrap_or(Path::new(".")))
    }
}

/// Why the monitor cannot be restricted.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel has no Landlock.
    #[error(
        "landlock_enable: this kernel does not have Landlock enabled (CONFIG_SECURITY_LANDLOCK and lsm=landlock,…)"
    )]
    Missing,
    /// A path cannot be looked at.
    #[error("landlock_rules: {path}: give paths that exist when the pod boots")]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: landlock::PathFdError,
    },
    /// The kernel does not take the rules.
    #[error("landlock_enable")]
    Rules(#[from] landlock::RulesetError),
}

/// The newest interface whose rights are asked for; an older kernel enforces those it knows.
const NEWEST: ABI = ABI::V5;

static ENTERED: OnceLock<()> = OnceLock::new();

/// Restricts this thread, the control thread, and those it starts from here on to the files of `config` and `more`, if
/// `config` asks for it and no pod before it did.
///
/// # Errors
/// [`LandlockError`]; nothing is restricted then.
pub fn enter(config: &VmConfig, more: &[Grant]) -> Result<(), LandlockError> {
    if !config.landlock_enable || ENTERED.get().is_some() {
        return Ok(());
    }
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?.create()?;
    // What the configuration names and is not there is told by whom it is missing for.
    let mut granted = grants(config);
    granted.retain(|grant| grant.path.exists());
    granted.extend_from_slice(more);
    granted.extend(config.landlock_rules.iter().flatten().map(|rule| Grant {
        path: rule.path.clone(),
        access: rule.access,
    }));
    for grant in granted {
        let path = PathFd::new(&grant.path).map_err(|source| LandlockError::Path {
            path: grant.path.clone(),
            source,
        })?;
        let mut access = rights(grant.access);
        if !grant.path.is_dir() {
            access &= AccessFs::from_file(NEWEST);
        }
        rules = rules.add_rule(PathBeneath::new(path, access))?;
    }
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        return Err(LandlockError::Missing);
    }
    // Only the control thread comes here.
    let _ = ENTERED.set(());
    Ok(())
}

fn rights(access: LandlockAccess) -> BitFlags<AccessFs> {
    let execute: BitFlags<AccessFs> = AccessFs::Execute.into();
    match access {
        LandlockAccess::Read => AccessFs::from_read(NEWEST) & !execute,
        LandlockAccess::Write => AccessFs::from_write(NEWEST),
        LandlockAccess::ReadWrite => AccessFs::from_all(NEWEST) & !execute,
    }
}

/// What the configuration names, and the devices of the host.
fn grants(config: &VmConfig) -> Vec<Grant> {
    let host = ["/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/ptmx", "/dev/pts"];
    let mut grants: Vec<Grant> = host.map(Grant::write).to_vec();
    grants.push(Grant::read("/proc/self"));
    let payload = config.payload.iter();
    grants.extend(
        payload
            .flat_map(|p| [&p.kernel, &p.igvm, &p.initramfs, &p.firmware])
            .flatten()
            .map(Grant::read),
    );
    let zones = config
        .memory
        .zones
        .iter()
        .flatten()
        .filter_map(|zone| zone.file.as_ref());
    grants.extend(zones.map(|file| file_or_directory(file)));
    for (mode, file) in [
        (config.serial.mode, &config.serial.file),
        (config.console.mode, &config.console.file),
        (config.debug_console.mode, &config.debug_console.file),
    ] {
        grants.extend(
            file.iter()
                .filter(|_| mode == ConsoleMode::File)
                .map(|file| Grant::directory_of(file)),
        );
    }
    for socket in [&config.serial.socket, &config.console.socket] {
        grants.extend(socket.iter().map(|socket| Grant::directory_of(socket)));
    }
    grants.extend(registry::files(config));
    grants
}

/// A file that is made if it is not there.
fn file_or_directory(path: &Path) -> Grant {
    if path.exists() {
        Grant::write(path)
    } else {
        Grant::directory_of(path)
    }
}
