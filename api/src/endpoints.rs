//! Every endpoint of Cloud Hypervisor's API (openapi 0.3.0), once: name, method, bodies, what a refusal says first, and
//! whether podvisor does it. The monitor's dispatch, `openapi.yaml` and `podvisor ctl` are made from this table. How a
//! request is carried out is not here.

/// What every path begins with.
pub const BASE: &str = "/api/v1/";

/// Status of an endpoint that podvisor knows and will not do. Not 404, which a client takes for a VM or a device that is
/// not there, and not 5xx, which invites it to try again.
pub const REFUSED: u16 = 403;

/// How an endpoint is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Asks.
    Get,
    /// Changes.
    Put,
}

impl Method {
    /// As the request line spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// A body, by the wire type it is read into or written from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// [`crate::types::VmConfig`].
    VmConfig,
    /// [`crate::types::VmInfo`].
    VmInfo,
    /// Counters by device and name.
    Counters,
    /// [`crate::types::VmmPingResponse`].
    VmmPingResponse,
    /// [`crate::types::VmResize`].
    VmResize,
    /// [`crate::types::VmResizeDisk`].
    VmResizeDisk,
    /// [`crate::types::VmResizeZone`].
    VmResizeZone,
    /// [`crate::types::VmRemoveDevice`].
    VmRemoveDevice,
    /// [`crate::types::VmSnapshotConfig`].
    VmSnapshotConfig,
    /// [`crate::types::RestoreConfig`].
    RestoreConfig,
    /// [`crate::types::DeviceConfig`].
    DeviceConfig,
    /// [`crate::types::DiskConfig`].
    DiskConfig,
    /// [`crate::types::FsConfig`].
    FsConfig,
    /// [`crate::types::NetConfig`].
    NetConfig,
    /// [`crate::types::PmemConfig`].
    PmemConfig,
    /// [`crate::types::VsockConfig`].
    VsockConfig,
    /// An object that nobody looks into, for its endpoint is refused.
    Object,
}

/// What a request must bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing, and what it brings is not looked at.
    Anything,
    /// No body; one is refused.
    NoBody,
    /// A JSON body.
    Json(Body),
}

/// What is answered when it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// 204.
    Nothing,
    /// 200 without a body.
    Empty,
    /// 200 with a body.
    Json(Body),
    /// 200 with [`crate::types::PciDeviceInfo`] when the VM runs, 204 when the device was only configured.
    Device,
}

/// A row of [`ENDPOINTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Which one.
    pub id: EndpointId,
    /// Its name: the path without [`BASE`].
    pub name: &'static str,
    /// How it is called; another method is 400.
    pub method: Method,
    /// What it takes.
    pub takes: Takes,
    /// What it answers.
    pub answer: Answer,
    /// What it does, in a line.
    pub summary: &'static str,
    /// What a refusal says could not be done.
    pub fails: &'static str,
    /// Why podvisor does not do it, and what to do instead; none: it does.
    pub refused: Option<&'static str>,
}

impl Endpoint {
    /// The endpoint at `path`, which begins with [`BASE`].
    #[must_use]
    pub fn at(path: &str) -> Option<&'static Self> {
        let name = path.strip_prefix(BASE)?;
        ENDPOINTS.iter().find(|endpoint| endpoint.name == name)
    }

    const fn new(name: &'static str, method: Method, takes: Takes, answer: Answer) -> Self {
        Self {
            id: EndpointId::VmmPing,
            name,
            method,
            takes,
            answer,
            summary: "",
            fails: "",
            refused: None,
        }
    }

    const fn says(self, summary: &'static str, fails: &'static str) -> Self {
        Self { summary, fails, ..self }
    }

    const fn refused(self, why: &'static str) -> Self {
        Self {
            refused: Some(why),
            ..self
        }
    }
}

const fn get(name: &'static str, answer: Body) -> Endpoint {
    Endpoint::new(name, Method::Get, Takes::Anything, Answer::Json(answer))
}

const fn act(name: &'static str) -> Endpoint {
    Endpoint::new(name, Method::Put, Takes::NoBody, Answer::Nothing)
}

const fn put(name: &'static str, takes: Body) -> Endpoint {
    Endpoint::new(name, Method::Put, Takes::Json(takes), Answer::Nothing)
}

const fn add(name: &'static str, takes: Body) -> Endpoint {
    Endpoint::new(name, Method::Put, Takes::Json(takes), Answer::Device)
}

macro_rules! endpoints {
    ($($id:ident = $row:expr;)*) => {
        /// The endpoints, so that a `match` over them has them all.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum EndpointId {
            $(#[doc = concat!("`", stringify!($id), "` of [`ENDPOINTS`].")] $id,)*
        }

        impl EndpointId {
            /// Its row.
            #[must_use]
            pub const fn endpoint(self) -> Endpoint {
                match self {
                    $(Self::$id => Endpoint { id: Self::$id, ..$row },)*
                }
            }
        }

        /// The table.
        pub const ENDPOINTS: &[Endpoint] = &[$(EndpointId::$id.endpoint(),)*];
    };
}

const MIGRATION: &str =
    "live migration is no goal of podvisor; save the pod with vm.snapshot and make it again with vm.restore";

endpoints! {
    VmmPing = get("vmm.ping", Body::VmmPingResponse)
        .says("Says which monitor this is", "The VMM could not answer");
    VmmShutdown = Endpoint::new("vmm.shutdown", Method::Put, Takes::Anything, Answer::Empty)
        .says("Stops the VM and ends the monitor", "The VMM could not shut down");
    VmInfo = get("vm.info", Body::VmInfo)
        .says("Configuration and state of the VM", "The VM info is not available");
    VmCounters = get("vm.counters", Body::Counters)
        .says("Counters of the devices", "The VM counters are not available");
    VmCreate = put("vm.create", Body::VmConfig)
        .says("Takes the configuration of a VM", "The VM could not be created");
    VmDelete = act("vm.delete").says("Forgets the VM", "The VM could not be deleted");
    VmBoot = act("vm.boot").says("Starts the VM", "The VM could not boot");
    VmPause = act("vm.pause").says("Stops the vCPUs where they are", "The VM could not be paused");
    VmResume = act("vm.resume").says("Lets a paused VM go on", "The VM could not resume");
    VmShutdown = act("vm.shutdown").says("Ends the VM, which stays configured", "The VM could not shutdown");
    VmReboot = act("vm.reboot").says("Ends the VM and starts it again", "The VM could not reboot");
    VmPowerButton = act("vm.power-button")
        .says("Presses the power button", "The power button could not be pressed");
    VmNmi = act("vm.nmi").says("Sends an NMI to all vCPUs", "The NMI could not be sent to the VM");
    VmResize = put("vm.resize", Body::VmResize)
        .says("Changes vCPUs, memory or balloon", "The VM could not be resized");
    VmResizeDisk = put("vm.resize-disk", Body::VmResizeDisk)
        .says("Changes the size of a disk", "The disk could not be resized");
    VmResizeZone = put("vm.resize-zone", Body::VmResizeZone)
        .says("Changes the size of a memory zone", "The memory zone could not be resized");
    VmAddDevice = add("vm.add-device", Body::DeviceConfig)
        .says("Adds a host device", "The device could not be added to the VM")
        .refused("VFIO devices are not given to pods; give the pod a virtio device");
    VmAddDisk = add("vm.add-disk", Body::DiskConfig)
        .says("Adds a disk", "The disk could not be added to the VM");
    VmAddFs = add("vm.add-fs", Body::FsConfig)
        .says("Adds a shared file system", "The fs could not be added to the VM");
    VmAddGenericVhostUser = add("vm.add-generic-vhost-user", Body::Object)
        .says("Adds a generic vhost-user device", "The generic vhost-user device could not be added to the VM")
        .refused("a device of unknown kind cannot be checked; use vm.add-disk, vm.add-net or vm.add-fs with a socket");
    VmAddNet = add("vm.add-net", Body::NetConfig).says(
        "Adds a network device; its taps may come as descriptors with the request",
        "The network device could not be added to the VM",
    );
    VmAddPmem = add("vm.add-pmem", Body::PmemConfig)
        .says("Adds persistent memory", "The persistent memory device could not be added to the VM");
    VmAddUserDevice = add("vm.add-user-device", Body::Object)
        .says("Adds a vfio-user device", "The vfio-user device could not be added to the VM")
        .refused("vfio-user devices are not given to pods; give the pod a virtio device");
    VmAddVdpa = add("vm.add-vdpa", Body::Object)
        .says("Adds a vDPA device", "The vDPA device could not be added to the VM")
        .refused("vDPA devices are not given to pods; use vm.add-net or vm.add-disk");
    VmAddVsock = add("vm.add-vsock", Body::VsockConfig)
        .says("Adds the socket device", "The vsock device could not be added to the VM");
    VmRemoveDevice = put("vm.remove-device", Body::VmRemoveDevice)
        .says("Asks the guest to let go of a device", "The device could not be removed from the VM");
    VmSnapshot = put("vm.snapshot", Body::VmSnapshotConfig)
        .says("Saves a paused VM", "The VM could not be snapshotted");
    VmRestore = put("vm.restore", Body::RestoreConfig)
        .says("Makes a VM from what was saved", "The VM could not be restored");
    VmCoredump = put("vm.coredump", Body::Object)
        .says("Writes the guest's memory as a core file", "The VM could not be coredumped")
        .refused("a pod's memory is not read out; dump it inside the guest (kdump), or save the pod with vm.snapshot");
    VmReceiveMigration = put("vm.receive-migration", Body::Object)
        .says("Waits for a VM to be sent", "The VM could not be received")
        .refused(MIGRATION);
    VmSendMigration = put("vm.send-migration", Body::Object)
        .says("Sends the VM to another monitor", "The VM could not be sent")
        .refused(MIGRATION);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_all_of_cloud_hypervisors_endpoints_once() {
        let names: std::collections::BTreeSet<_> = ENDPOINTS.iter().map(|e| e.name).collect();
        assert_eq!((names.len(), ENDPOINTS.len()), (31, 31));
        let gets: Vec<_> = ENDPOINTS.iter().filter(|e| e.method == Method::Get).collect();
        assert_eq!(gets.len(), 3);
        let refused: Vec<_> = ENDPOINTS
            .iter()
            .filter(|e| e.refused.is_some())
            .map(|e| e.name)
            .collect();
        assert_eq!(
            refused,
            [
                "vm.add-device",
                "vm.add-generic-vhost-user",
                "vm.add-user-device",
                "vm.add-vdpa",
                "vm.coredump",
                "vm.receive-migration",
                "vm.send-migration"
            ]
        );
        for endpoint in ENDPOINTS {
            assert!(!endpoint.summary.is_empty() && !endpoint.fails.is_empty());
            assert_eq!(endpoint.id.endpoint(), *endpoint);
            assert_eq!(Endpoint::at(&format!("{BASE}{}", endpoint.name)), Some(endpoint));
        }
        for path in [
            "vm.info",
            "/api/v1/vm.infos",
            "/api/v1/",
            "/api/v2/vm.info",
            "/api/v1//vm.info",
            "",
        ] {
            assert_eq!(Endpoint::at(path), None, "{path}");
        }
    }
}
