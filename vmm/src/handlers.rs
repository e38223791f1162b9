//! The API: what each endpoint does. Which there are, and what they take and answer, is `podvisor_api`'s table; nothing
//! here knows sockets or HTTP framing.

mod snapshot;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use podvisor_api::endpoints::{Endpoint, EndpointId, REFUSED, Takes};
use podvisor_api::types::{DiskConfig, FsConfig, PmemConfig, VmConfig, VmRemoveDevice, VmmPingResponse, VsockConfig};
use podvisor_api::{JsonError, from_json};

use crate::pod::{Events, PodError, PodSlot};
use crate::registry::{AddedNet, Addition};

/// A request, as the handlers need it.
#[derive(Clone, Copy, Debug)]
pub struct Call<'r> {
    /// `GET`, `PUT`, …
    pub method: &'r str,
    /// The path, from its first slash.
    pub path: &'r str,
    /// The body; empty for none.
    pub body: &'r [u8],
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// JSON; none: there is no body (and with 200 an empty one).
    pub body: Option<String>,
}

/// What the handlers work on.
pub struct State<'s> {
    /// The pod.
    pub pod: &'s mut PodSlot,
    /// The event loop.
    pub events: &'s mut Events,
    /// Set when the monitor is to end.
    pub shutdown: &'s mut bool,
    /// Descriptors that came with the request; closed if the handler does not take them.
    pub files: Vec<OwnedFd>,
}

/// Why a request is refused, before it becomes a [`Reply`].
#[derive(Debug)]
struct Refusal {
    status: u16,
    causes: Vec<String>,
}

impl From<PodError> for Refusal {
    fn from(error: PodError) -> Self {
        Self {
            status: error.status(),
            causes: error.causes(),
        }
    }
}

impl Refusal {
    fn new(status: u16, cause: impl Into<String>) -> Self {
        Self {
            status,
            causes: vec![cause.into()],
        }
    }

    /// The refusal as the answer has it: the first string says what could not be done and names what was wrong with it,
    /// and the causes below that follow.
    fn of(mut self, endpoint: &Endpoint) -> Self {
        let first = match self.causes.first() {
            Some(cause) => format!("Error from API: {}: {cause}", endpoint.fails),
            None => format!("Error from API: {}", endpoint.fails),
        };
        self.causes.drain(..self.causes.len().min(1));
        self.causes.insert(0, first);
        self
    }
}

type Outcome = Result<Reply, Refusal>;

/// Whether `call` is vmm.ping, which needs no [`State`]: [`pong`] answers it.
#[must_use]
pub fn is_ping(call: &Call<'_>) -> bool {
    let ping = EndpointId::VmmPing.endpoint();
    call.method == ping.method.as_str() && Endpoint::at(call.path).is_some_and(|e| e.id == ping.id)
}

/// The answer to vmm.ping.
#[must_use]
pub fn pong() -> Reply {
    ping().unwrap_or(Reply {
        status: 500,
        body: None,
    })
}

/// The part of a device's section that says whether another process must be asked for it.
#[derive(Default, serde::Deserialize)]
struct Peer {
    #[serde(default)]
    vhost_user: Option<bool>,
    #[serde(default)]
    socket: Option<serde::de::IgnoredAny>,
}

/// Whether answering `call` may take so long that vmm.ping should not wait for it: memory is touched or given back page
/// by page, an image is measured, or another process is asked. Most requests never are; they are spared the helper.
#[must_use]
pub fn may_take_long(pod: &PodSlot, call: &Call<'_>) -> bool {
    let Some(endpoint) = Endpoint::at(call.path) else {
        return false;
    };
    match endpoint.id {
        EndpointId::VmBoot => pod.boot_may_take_long(),
        EndpointId::VmReboot => pod.boot_may_take_long() || pod.stop_may_take_long(),
        EndpointId::VmShutdown | EndpointId::VmDelete => pod.stop_may_take_long(),
        EndpointId::VmResize => pod.resize_may_take_long(),
        EndpointId::VmSnapshot => true,
        EndpointId::VmRestore => snapshot::reads_all(call.body),
        EndpointId::VmAddDisk | EndpointId::VmAddNet | EndpointId::VmAddFs => {
            let peer: Peer = serde_json::from_slice(call.body).unwrap_or_default();
            peer.vhost_user == Some(true) || (endpoint.id == EndpointId::VmAddFs && peer.socket.is_some())
        }
        _ => false,
    }
}

/// Answers `call`.
pub fn answer(state: &mut State<'_>, call: &Call<'_>) -> Reply {
    match route(state, call) {
        Ok(reply) => reply,
        Err(refusal) => {
            tracing::warn!(
                method = call.method,
                path = call.path,
                status = refusal.status,
                "refused: {}",
                refusal.causes.join(": ")
            );
            Reply {
                status: refusal.status,
                body: serde_json::to_string(&refusal.causes).ok(),
            }
        }
    }
}

fn route(state: &mut State<'_>, call: &Call<'_>) -> Outcome {
    let unknown = || Refusal::new(404, format!("{} is no endpoint of this API", call.path));
    let endpoint = Endpoint::at(call.path).ok_or_else(unknown)?;
    let name = endpoint.name;
    let wanted = endpoint.method.as_str();
    if call.method != wanted {
        let reason = format!("{name} takes {wanted}, not {}", call.method);
        return Err(Refusal::new(400, reason));
    }
    if let Some(why) = endpoint.refused {
        return Err(Refusal::new(REFUSED, format!("{name}: {why}")).of(endpoint));
    }
    let check = match (endpoint.takes, call.body.is_empty()) {
        (Takes::NoBody, false) => Err(format!("{name} takes no body, and {} bytes came", call.body.len())),
        (Takes::Json(_), true) => Err(format!("{name} needs a JSON body")),
        _ => Ok(()),
    };
    check.map_err(|reason| Refusal::new(400, reason))?;
    tracing::debug!(method = call.method, name, "request");
    dispatch(state, endpoint, call.body).map_err(|refusal| refusal.of(endpoint))
}

fn dispatch(state: &mut State<'_>, endpoint: &Endpoint, body: &[u8]) -> Outcome {
    match endpoint.id {
        EndpointId::VmmPing => ping(),
        EndpointId::VmmShutdown => Ok(vmm_shutdown(state)),
        EndpointId::VmInfo => Ok(Reply {
            status: 200,
            body: Some(state.pod.info()?),
        }),
        EndpointId::VmCounters => json(&state.pod.counters()?),
        EndpointId::VmCreate => done(state.pod.create(parse::<VmConfig>(body)?)),
        EndpointId::VmDelete => {
            state.pod.delete(state.events);
            done(Ok(()))
        }
        EndpointId::VmBoot => done(state.pod.boot(state.events)),
        EndpointId::VmPause => done(state.pod.pause()),
        EndpointId::VmResume => done(state.pod.resume()),
        EndpointId::VmShutdown => done(state.pod.stop(state.events)),
        EndpointId::VmReboot => done(state.pod.reboot(state.events)),
        EndpointId::VmPowerButton => done(state.pod.power_button()),
        EndpointId::VmNmi => done(state.pod.nmi()),
        EndpointId::VmResize => done(state.pod.resize(&parse(body)?)),
        EndpointId::VmResizeZone => done(state.pod.resize_zone(&parse(body)?)),
        EndpointId::VmAddDisk => add_section::<DiskConfig>(state, body),
        EndpointId::VmAddFs => add_section::<FsConfig>(state, body),
        EndpointId::VmAddNet => add_net(state, body),
        EndpointId::VmAddPmem => add_section::<PmemConfig>(state, body),
        EndpointId::VmAddVsock => add_section::<VsockConfig>(state, body),
        EndpointId::VmRemoveDevice => done(state.pod.remove(&parse::<VmRemoveDevice>(body)?.id)),
        EndpointId::VmSnapshot => snapshot::save(state, body),
        EndpointId::VmRestore => snapshot::restore(state, body),
        EndpointId::VmResizeDisk => done(state.pod.resize_disk(&parse(body)?)),
        EndpointId::VmAddDevice
        | EndpointId::VmAddGenericVhostUser
        | EndpointId::VmAddUserDevice
        | EndpointId::VmAddVdpa
        | EndpointId::VmCoredump
        | EndpointId::VmReceiveMigration
        | EndpointId::VmSendMigration => Err(Refusal::new(REFUSED, endpoint.refused.unwrap_or_default())),
    }
}

fn done(outcome: Result<(), PodError>) -> Outcome {
    outcome?;
    Ok(Reply {
        status: 204,
        body: None,
    })
}

fn json(value: &impl serde::Serialize) -> Outcome {
    serde_json::to_string(value)
        .map(|body| Reply {
            status: 200,
            body: Some(body),
        })
        .map_err(|e| Refusal::new(500, e.to_string()))
}

fn ping() -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    json(&VmmPingResponse {
        build_version: format!("v{version}"),
        version: version.to_owned(),
        pid: i64::from(std::process::id()),
        features: ["igvm", "io_uring", "kvm", "snp-emulated"].map(str::to_owned).to_vec(),
    })
}

fn vmm_shutdown(state: &mut State<'_>) -> Reply {
    state.pod.delete(state.events);
    *state.shutdown = true;
    Reply {
        status: 200,
        body: None,
    }
}

/// The body as type `T`.
fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    from_json(body).map_err(|e: JsonError| Refusal::new(400, e.to_string()))
}

/// 200 with where the device is when the pod runs, 204 when it is only configured.
fn add(state: &mut State<'_>, addition: &dyn Addition) -> Outcome {
    match state.pod.add(addition, state.events)? {
        Some(info) => json(&info),
        None => done(Ok(())),
    }
}

/// As [`add`], for a device that is its section of the configuration alone.
fn add_section<T: Addition + serde::de::DeserializeOwned>(state: &mut State<'_>, body: &[u8]) -> Outcome {
    add(state, &parse::<T>(body)?)
}

fn add_net(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let config = parse(body)?;
    let fds = Arc::new(std::mem::take(&mut state.files));
    let added = AddedNet { config, fds };
    added.check().map_err(|e| Refusal::new(400, e.to_string()))?;
    add(state, &added)
}

#[cfg(test)]
mod tests;
