//! Running a pod: the command line's own, or one that comes through the API.

use std::os::fd::OwnedFd;
use std::time::Instant;

use podvisor_api::events::What;

use super::Failure;
use super::args::RunArgs;
use crate::api_socket::ApiSocket;
use crate::control::{ControlError, Monitor};
use crate::sandbox::seccomp;
use crate::telling::Telling;
use crate::{isolation, logging, machine, sys};

/// Runs the monitor until its pod ends.
pub(super) fn run(args: RunArgs, start: Instant) -> Result<(), Failure> {
    let config = args.config().map_err(Failure::usage)?;
    let taps = inherited_taps(&args)?;
    let expect_digest = args.expected_digest().map_err(Failure::usage)?;
    let restored = args.restored().map_err(Failure::usage)?;
    if config.is_none() && restored.is_none() && args.api_socket.is_none() {
        return Err(Failure::usage(
            "nothing to do: give --api-socket PATH to wait for the API, or --kernel FILE or --igvm FILE to boot; \
             --help has examples",
        ));
    }
    sys::one_heap();
    sys::private_umask();
    sys::ignore_signals();
    sys::raise_descriptor_limit();
    logging::start(logging::level(args.verbosity), args.log_file.as_deref(), start)
        .map_err(|e| Failure::usage(format!("--log-file: {e}")))?;
    tracing::info!("podvisor {} pid {}", env!("CARGO_PKG_VERSION"), std::process::id());
    // Told before anything is made, so that a machine without KVM hears one thing.
    drop(machine::open_kvm().map_err(Failure::usage)?);
    let mut monitor = Monitor::new(start, expect_digest).map_err(Failure::runtime)?;
    monitor.outlive_pod(args.no_shutdown);
    if let Some(text) = &args.event_monitor {
        let telling = Telling::open(text, start).map_err(|e| Failure::usage(format!("--event-monitor {e}")))?;
        telling.vmm(What::Starting);
        monitor.tell(telling);
    }
    if let Some(socket) = &args.api_socket {
        monitor.serve(ApiSocket::open(socket).map_err(Failure::runtime)?);
    }
    if let Some(violation) = args.seccomp.violation() {
        seccomp::enter(violation).map_err(Failure::runtime)?;
    }
    if let Some(config) = config {
        let emulated = config.isolation() == podvisor_api::types::Isolation::SnpEmulated;
        if emulated && args.log_file.is_some() {
            // The log says it too, but not where it is seen.
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("podvisor: {}\n", isolation::EMULATION_NOTICE).as_bytes(),
            );
        }
        monitor.boot(config, taps).map_err(|e| match e {
            ControlError::Pod(crate::pod::PodError::Config(_)) => Failure::usage(e),
            e => Failure::runtime(e),
        })?;
    }
    if let Some(wanted) = restored {
        monitor.restore(&wanted).map_err(Failure::runtime)?;
    }
    monitor.run().map_err(Failure::runtime)
}

/// The TAP queues that `--net fd=…` names, by the place of their device. Taken over before this process has any other
/// descriptor of its own.
fn inherited_taps(args: &RunArgs) -> Result<Vec<(usize, Vec<OwnedFd>)>, Failure> {
    let mut taken = Vec::new();
    let mut all = Vec::new();
    for (index, (_, fds)) in args.nets().map_err(Failure::usage)?.into_iter().enumerate() {
        let mut queues = Vec::new();
        for fd in fds {
            if taken.contains(&fd) {
                return Err(Failure::usage(format!(
                    "--net fd={fd}: it is given twice; give it once"
                )));
            }
            taken.push(fd);
            let queue = sys::inherited_tap(fd);
            queues.push(queue.map_err(|e| Failure::usage(format!("--net fd={fd}: not a TAP queue: {e}")))?);
        }
        if !queues.is_empty() {
            all.push((index, queues));
        }
    }
    Ok(all)
}
