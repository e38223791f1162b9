//! vm.snapshot and vm.restore.

use podvisor_api::types::{RestoreConfig, VmSnapshotConfig};

use super::{Outcome, Refusal, State, done, parse};

/// vm.snapshot.
pub(super) fn save(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: VmSnapshotConfig = parse(body)?;
    state.pod.snapshot(&wanted.destination_url)?;
    done()
}

/// vm.restore.
pub(super) fn restore(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let wanted: RestoreConfig = parse(body)?;
    if wanted.prefault {
        return Err(Refusal::new(
            400,
            "prefault: pages are read when they are touched; leave it out",
        ));
    }
    state.pod.restore(&wanted.source_url, state.events)?;
    if wanted.resume {
        state.pod.resume()?;
    }
    done()
}
