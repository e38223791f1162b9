//! The API: one function an endpoint, and the table that finds it. Nothing here knows sockets or HTTP framing.

mod snapshot;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use podvisor_api::types::{DiskConfig, FsConfig, VmConfig, VmRemoveDevice, VmmPingResponse, VsockConfig};
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
}

type Outcome = Result<Reply, Refusal>;

const BASE: &str = "/api/v1/";

/// Whether an endpoint takes a body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Body {
    No,
    Needed,
}

struct Endpoint {
    name: &'static str,
    method: &'static str,
    body: Body,
    /// What could not be done, when it is refused.
    fails: &'static str,
    handle: fn(&mut State<'_>, &[u8]) -> Outcome,
}

const fn get(name: &'static str, fails: &'static str, handle: fn(&mut State<'_>, &[u8]) -> Outcome) -> Endpoint {
    Endpoint {
        name,
        method: "GET",
        body: Body::No,
        fails,
        handle,
    }
}

const fn put(
    name: &'static str,
    body: Body,
    fails: &'static str,
    handle: fn(&mut State<'_>, &[u8]) -> Outcome,
) -> Endpoint {
    Endpoint {
        name,
        method: "PUT",
        body,
        fails,
        handle,
    }
}

const ENDPOINTS: &[Endpoint] = &[
    get("vmm.ping", "The VMM could not answer", ping),
    put("vmm.shutdown", Body::No, "The VMM could not shut down", vmm_shutdown),
    get("vm.info", "The VM info is not available", info),
    get("vm.counters", "The VM counters are not available", counters),
    put("vm.create", Body::Needed, "The VM could not be created", create),
    put("vm.delete", Body::No, "The VM could not be deleted", delete),
    put("vm.boot", Body::No, "The VM could not boot", boot),
    put("vm.pause", Body::No, "The VM could not be paused", pause),
    put(
        "vm.snapshot",
        Body::Needed,
        "The VM could not be snapshotted",
        snapshot::save,
    ),
    put(
        "vm.restore",
        Body::Needed,
        "The VM could not be restored",
        snapshot::restore,
    ),
    put("vm.resume", Body::No, "The VM could not resume", resume),
    put("vm.shutdown", Body::No, "The VM could not shutdown", shutdown),
    put("vm.reboot", Body::No, "The VM could not reboot", reboot),
    put(
        "vm.power-button",
        Body::No,
        "The power button could not be pressed",
        power_button,
    ),
    put(
        "vm.add-disk",
        Body::Needed,
        "The disk could not be added to the VM",
        add_section::<DiskConfig>,
    ),
    put(
        "vm.add-net",
        Body::Needed,
        "The network device could not be added to the VM",
        add_net,
    ),
    put(
        "vm.add-fs",
        Body::Needed,
        "The fs could not be added to the VM",
        add_section::<FsConfig>,
    ),
    put(
        "vm.add-vsock",
        Body::Needed,
        "The vsock device could not be added to the VM",
        add_section::<VsockConfig>,
    ),
    put(
        "vm.remove-device",
        Body::Needed,
        "The device could not be removed from the VM",
        remove_device,
    ),
    put("vm.resize", Body::Needed, "The VM could not be resized", resize),
];

/// Endpoints of Cloud Hypervisor's API (openapi 0.3.0) that this version does not have.
const LATER: &[&str] = &[
    "vm.add-device",
    "vm.add-generic-vhost-user",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.coredump",
    "vm.nmi",
    "vm.receive-migration",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.send-migration",
];

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
    let name = call.path.strip_prefix(BASE).ok_or_else(unknown)?;
    let Some(endpoint) = ENDPOINTS.iter().find(|e| e.name == name) else {
        if LATER.contains(&name) {
            let version = env!("CARGO_PKG_VERSION");
            return Err(Refusal::new(
                501,
                format!("{name} is not supported yet by podvisor {version}"),
            ));
        }
        return Err(unknown());
    };
    if call.method != endpoint.method {
        let reason = format!("{name} takes {}, not {}", endpoint.method, call.method);
        return Err(Refusal::new(400, reason));
    }
    let check = match (endpoint.body, call.body.is_empty()) {
        (Body::No, false) => Err(format!("{name} takes no body")),
        (Body::Needed, true) => Err(format!("{name} needs a JSON body")),
        _ => Ok(()),
    };
    check.map_err(|reason| Refusal::new(400, reason))?;
    tracing::debug!(method = call.method, name, "request");
    (endpoint.handle)(state, call.body).map_err(|mut refusal| {
        refusal.causes.insert(0, endpoint.fails.to_owned());
        refusal.causes.insert(0, "Error from API".to_owned());
        refusal
    })
}

#[expect(clippy::unnecessary_wraps, reason = "the handlers have one signature")]
fn done() -> Outcome {
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

fn ping(_: &mut State<'_>, _: &[u8]) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    json(&VmmPingResponse {
        build_version: format!("v{version}"),
        version: version.to_owned(),
        pid: i64::from(std::process::id()),
        features: ["igvm", "io_uring", "kvm", "snp-emulated"].map(str::to_owned).to_vec(),
    })
}

fn vmm_shutdown(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.delete(state.events);
    *state.shutdown = true;
    Ok(Reply {
        status: 200,
        body: None,
    })
}

fn info(state: &mut State<'_>, _: &[u8]) -> Outcome {
    json(&state.pod.info()?)
}

fn counters(state: &mut State<'_>, _: &[u8]) -> Outcome {
    json(&state.pod.counters()?)
}

/// The body as type `T`.
fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    from_json(body).map_err(|e: JsonError| Refusal::new(400, e.to_string()))
}

fn create(state: &mut State<'_>, body: &[u8]) -> Outcome {
    state.pod.create(parse::<VmConfig>(body)?)?;
    done()
}

/// 200 with where the device is when the pod runs, 204 when it is only configured.
fn add(state: &mut State<'_>, addition: &dyn Addition) -> Outcome {
    match state.pod.add(addition, state.events)? {
        Some(info) => json(&info),
        None => done(),
    }
}

/// As [`add`], for a device that is its section of the configuration alone.
fn add_section<T: Addition + serde::de::DeserializeOwned>(state: &mut State<'_>, body: &[u8]) -> Outcome {
    add(state, &parse::<T>(body)?)
}

fn add_net(state: &mut State<'_>, body: &[u8]) -> Outcome {
    let config = parse(body)?;
    let fds = Arc::new(std::mem::take(&mut state.files));
    add(state, &AddedNet { config, fds })
}

fn remove_device(state: &mut State<'_>, body: &[u8]) -> Outcome {
    state.pod.remove(&parse::<VmRemoveDevice>(body)?.id)?;
    done()
}

fn resize(state: &mut State<'_>, body: &[u8]) -> Outcome {
    state.pod.resize(&parse(body)?)?;
    done()
}

fn delete(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.delete(state.events);
    done()
}

fn boot(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.boot(state.events)?;
    done()
}

fn pause(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.pause()?;
    done()
}

fn resume(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.resume()?;
    done()
}

fn shutdown(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.stop(state.events)?;
    done()
}

fn reboot(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.reboot(state.events)?;
    done()
}

fn power_button(state: &mut State<'_>, _: &[u8]) -> Outcome {
    state.pod.power_button()?;
    done()
}

#[cfg(test)]
mod tests;
