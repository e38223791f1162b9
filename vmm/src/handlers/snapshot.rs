//! vm.snapshot and vm.restore.

use podvisor_api::types::{RestoreConfig, VmSnapshotConfig};

use super::{Outcome, State, done, parse};

/// vm.snapshot.
pub(super) fn save(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: VmSnapshotConfig = parse(body)?;
    done(state.pod.snapshot(&wanted.destination_url))
}

/// vm.restore.
pub(super) fn restore(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: RestoreConfig = parse(body)?;
    done(state.pod.restore(&wanted, state.events))
}
