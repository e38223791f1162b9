//! vm.snapshot and vm.restore.

use podvisor_api::types::{RestoreConfig, VmSnapshotConfig};

use super::{Outcome, State, done, parse};

/// vm.snapshot.
pub(super) fn save(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: VmSnapshotConfig = parse(body)?;
    done(state.pod.snapshot(&wanted.destination_url))
}

/// Whether a vm.restore of this body copies all memory.
pub(super) fn reads_all(body: &[u8]) -> bool {
    podvisor_api::from_json::<RestoreConfig>(body).is_ok_and(|wanted| wanted.copies_memory())
}

/// vm.restore.
pub(super) fn restore(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: RestoreConfig = parse(body)?;
    let files = std::mem::take(&mut state.files);
    done(state.pod.restore(&wanted, files, state.events))
}
