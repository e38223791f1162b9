//! `podvisor ctl`: a monitor told from the command line what a client of the API would tell it. The subcommands and
//! arguments are ch-remote's, the options are parsed by the API's own types, and any monitor with that API will do.

use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use podvisor_api::endpoints::EndpointId;
use podvisor_api::http::Client;
use podvisor_api::types::{
    DeviceConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, RestoreConfig, VmResize, VmResizeDisk, VmResizeZone,
    VsockConfig,
};
use podvisor_api::{OptionForm, from_options, from_options_with_fds, object_from_options};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Failure, print};

const EXAMPLES: &str = "\
Examples:
  podvisor ctl --api-socket /run/pod/api.sock ping
  podvisor ctl --api-socket /run/pod/api.sock create pod.json
  podvisor ctl --api-socket /run/pod/api.sock boot
  podvisor ctl --api-socket /run/pod/api.sock add-disk path=data.img,readonly=on
  podvisor ctl --api-socket /run/pod/api.sock add-net fd=3,mac=02:00:00:00:00:01 3<>/dev/tap7
  podvisor ctl --api-socket /run/pod/api.sock resize --cpus 4 --memory 2G
  podvisor ctl --api-socket /run/pod/api.sock --json info | jq .state
Options are key=value pairs with commas between them. A value with a comma stands in \"quotes\", a list in [brackets], a
structure in <angle brackets>; sizes take K, M, G and T (powers of 1024), switches on, off, true and false.
Exit codes: 0 done, 1 refused or no answer, 2 wrong usage.";

/// `podvisor ctl`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, subcommand_required = true)]
pub(crate) struct CtlArgs {
    /// The monitor's API socket: PATH or path=PATH.
    #[arg(long, value_name = "PATH")]
    api_socket: String,
    /// Print bodies on one line, and refusals as a JSON array on stdout too.
    #[arg(long)]
    json: bool,
    /// Longest wait for the answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    #[command(subcommand)]
    command: Request,
}

/// What to tell the monitor.
#[derive(Debug, Subcommand)]
enum Request {
    /// Ask whether it lives, and its version.
    Ping,
    /// Create a VM from a JSON configuration (a file, or - for standard input).
    Create {
        /// File, or -.
        #[arg(default_value = "-")]
        config: PathBuf,
    },
    /// Boot the VM.
    Boot,
    /// Print the VM's configuration and state.
    Info,
    /// Print the devices' counters.
    Counters,
    /// Pause the VM.
    Pause,
    /// Let a paused VM go on.
    Resume,
    /// Reboot the VM.
    Reboot,
    /// Press the power button.
    PowerButton,
    /// Stop the VM.
    Shutdown,
    /// Delete the VM.
    Delete,
    /// Stop the VM and end the monitor.
    ShutdownVmm,
    /// Inject a non-maskable interrupt.
    Nmi,
    /// Change vCPUs, memory or balloon.
    Resize {
        /// vCPUs wanted.
        #[arg(long)]
        cpus: Option<u32>,
        /// Memory wanted (bytes, or with K, M, G, T).
        #[arg(long)]
        memory: Option<String>,
        /// Balloon wanted (bytes, or with K, M, G, T).
        #[arg(long)]
        balloon: Option<String>,
    },
    /// Change a disk's size.
    ResizeDisk {
        /// The disk's name.
        #[arg(long)]
        disk: String,
        /// Size wanted (bytes, or with K, M, G, T).
        #[arg(long)]
        size: String,
    },
    /// Change a memory zone's size.
    ResizeZone {
        /// The zone's name.
        #[arg(long)]
        id: String,
        /// Size wanted (bytes, or with K, M, G, T).
        #[arg(long)]
        size: String,
    },
    /// Add a VFIO device: path=/sys/bus/pci/devices/…[,id=NAME].
    AddDevice {
        /// Options.
        device: String,
    },
    /// Add a disk: path=FILE[,readonly=on][,id=NAME].
    AddDisk {
        /// Options.
        disk: String,
    },
    /// Add a file system: tag=TAG,shared_dir=DIR|socket=PATH[,id=NAME].
    AddFs {
        /// Options.
        fs: String,
    },
    /// Add a vhost-user device of any kind: socket=PATH,virtio_id=N,queue_sizes=[N,…].
    AddGenericVhostUser {
        /// Options.
        device: String,
    },
    /// Add a network device: tap=NAME or fd=N (or fd=[N,…], TAP queues open in this process)[,mac=MAC][,id=NAME].
    AddNet {
        /// Options.
        net: String,
    },
    /// Add persistent memory: file=FILE[,id=NAME].
    AddPmem {
        /// Options.
        pmem: String,
    },
    /// Add a vfio-user device: socket=PATH[,id=NAME].
    AddUserDevice {
        /// Options.
        device: String,
    },
    /// Add a vDPA device: path=/dev/vhost-vdpa-N[,id=NAME].
    AddVdpa {
        /// Options.
        device: String,
    },
    /// Add a vsock: cid=N,socket=PATH[,id=NAME].
    AddVsock {
        /// Options.
        vsock: String,
    },
    /// Remove a device by its name.
    RemoveDevice {
        /// Name.
        id: String,
    },
    /// Save the VM: file:///DIRECTORY.
    Snapshot {
        /// URL.
        destination: String,
    },
    /// Restore a VM: source_url=file:///DIRECTORY[,resume=on].
    Restore {
        /// Options.
        restore: String,
    },
    /// Write the guest's memory to a file: file:///FILE.
    Coredump {
        /// URL.
        destination: String,
    },
    /// Wait for a VM to be sent: unix:PATH, tcp:HOST:PORT, or receiver_url=URL[,…].
    ReceiveMigration {
        /// URL or options.
        receiver: String,
    },
    /// Send the VM to another monitor: unix:PATH, tcp:HOST:PORT, or destination_url=URL[,…].
    SendMigration {
        /// The other monitor is on this machine.
        #[arg(long)]
        local: bool,
        /// URL or options.
        destination: String,
    },
}

/// A request as the API has it.
struct Call {
    endpoint: EndpointId,
    body: Option<Value>,
    /// Descriptors of this process that go with it.
    files: Vec<RawFd>,
}

fn call(endpoint: EndpointId, body: Option<Value>) -> Call {
    Call {
        endpoint,
        body,
        files: Vec::new(),
    }
}

/// `endpoint` with what `options` says, as type `T` understands it.
fn with_options<T: OptionForm + Serialize>(endpoint: EndpointId, options: &str) -> Result<Call, Failure> {
    let parsed: T = from_options(options).map_err(|e| wrong(endpoint, options, e))?;
    Ok(call(
        endpoint,
        Some(serde_json::to_value(parsed).map_err(Failure::usage)?),
    ))
}

/// `endpoint` with what `options` says, of which there is no type here.
fn with_object(endpoint: EndpointId, options: &str) -> Result<Call, Failure> {
    let object = object_from_options(options).map_err(|e| wrong(endpoint, options, e))?;
    Ok(call(endpoint, Some(Value::Object(object))))
}

fn add_net(options: &str) -> Result<Call, Failure> {
    let endpoint = EndpointId::VmAddNet;
    let (net, files): (NetConfig, _) = from_options_with_fds(options).map_err(|e| wrong(endpoint, options, e))?;
    let body = serde_json::to_value(net).map_err(Failure::usage)?;
    Ok(Call {
        files,
        ..call(endpoint, Some(body))
    })
}

/// A URL, or options of which the URL is `key`.
fn migration(endpoint: EndpointId, key: &str, text: &str) -> Result<Call, Failure> {
    match text.split_once('=') {
        Some((first, _)) if !first.contains([':', '/']) => with_object(endpoint, text),
        _ => Ok(call(endpoint, Some(json!({ key: text })))),
    }
}

fn wrong(endpoint: EndpointId, options: &str, error: impl std::fmt::Display) -> Failure {
    let name = endpoint.endpoint().name;
    Failure::usage(format!(
        "{}: {options}: {error}",
        name.strip_prefix("vm.").unwrap_or(name)
    ))
}

impl Request {
    fn call(&self) -> Result<Call, Failure> {
        use EndpointId as E;
        Ok(match self {
            Self::Ping => call(E::VmmPing, None),
            Self::Info => call(E::VmInfo, None),
            Self::Counters => call(E::VmCounters, None),
            Self::Create { config } => call(E::VmCreate, Some(read_json(config)?)),
            Self::Boot => call(E::VmBoot, None),
            Self::Pause => call(E::VmPause, None),
            Self::Resume => call(E::VmResume, None),
            Self::Reboot => call(E::VmReboot, None),
            Self::PowerButton => call(E::VmPowerButton, None),
            Self::Shutdown => call(E::VmShutdown, None),
            Self::Delete => call(E::VmDelete, None),
            Self::ShutdownVmm => call(E::VmmShutdown, None),
            Self::Nmi => call(E::VmNmi, None),
            Self::AddDevice { device } => with_options::<DeviceConfig>(E::VmAddDevice, device)?,
            Self::AddDisk { disk } => with_options::<DiskConfig>(E::VmAddDisk, disk)?,
            Self::AddFs { fs } => with_options::<FsConfig>(E::VmAddFs, fs)?,
            Self::AddGenericVhostUser { device } => with_object(E::VmAddGenericVhostUser, device)?,
            Self::AddNet { net } => add_net(net)?,
            Self::AddPmem { pmem } => with_options::<PmemConfig>(E::VmAddPmem, pmem)?,
            Self::AddUserDevice { device } => with_object(E::VmAddUserDevice, device)?,
            Self::AddVdpa { device } => with_object(E::VmAddVdpa, device)?,
            Self::AddVsock { vsock } => with_options::<VsockConfig>(E::VmAddVsock, vsock)?,
            Self::RemoveDevice { id } => call(E::VmRemoveDevice, Some(json!({"id": id}))),
            Self::Snapshot { destination } => call(E::VmSnapshot, Some(json!({"destination_url": destination}))),
            Self::Coredump { destination } => call(E::VmCoredump, Some(json!({"destination_url": destination}))),
            Self::Restore { restore } => with_options::<RestoreConfig>(E::VmRestore, restore)?,
            Self::ReceiveMigration { receiver } => migration(E::VmReceiveMigration, "receiver_url", receiver)?,
            Self::SendMigration { local, destination } => {
                let mut call = migration(E::VmSendMigration, "destination_url", destination)?;
                if let (true, Some(Value::Object(body))) = (local, &mut call.body) {
                    body.insert("local".to_owned(), json!(true));
                }
                call
            }
            Self::Resize { cpus, memory, balloon } => resize(*cpus, memory.as_deref(), balloon.as_deref())?,
            Self::ResizeDisk { disk, size } => {
                with_options::<VmResizeDisk>(E::VmResizeDisk, &format!("id=\"{disk}\",desired_size={size}"))?
            }
            Self::ResizeZone { id, size } => {
                with_options::<VmResizeZone>(E::VmResizeZone, &format!("id=\"{id}\",desired_ram={size}"))?
            }
        })
    }
}

fn resize(cpus: Option<u32>, memory: Option<&str>, balloon: Option<&str>) -> Result<Call, Failure> {
    let cpus = cpus.map(|n| n.to_string());
    let wanted = [
        ("desired_vcpus", cpus.as_deref()),
        ("desired_ram", memory),
        ("desired_balloon", balloon),
    ];
    let options: Vec<String> = wanted
        .iter()
        .filter_map(|(key, value)| value.map(|v| format!("{key}={v}")))
        .collect();
    if options.is_empty() {
        return Err(Failure::usage(
            "resize: nothing to change; give --cpus, --memory or --balloon",
        ));
    }
    with_options::<VmResize>(EndpointId::VmResize, &options.join(","))
}

fn read_json(path: &PathBuf) -> Result<Value, Failure> {
    let named = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text).map_err(|e| named(&e))?;
    } else {
        text = std::fs::read_to_string(path).map_err(|e| named(&e))?;
    }
    serde_json::from_str(&text).map_err(|e| named(&e))
}

/// Tells the monitor, and prints what it answers.
pub(super) fn run(args: &CtlArgs) -> Result<(), Failure> {
    let call = args.command.call()?;
    let path = PathBuf::from(args.api_socket.strip_prefix("path=").unwrap_or(&args.api_socket));
    let failed = |error: std::io::Error| Failure::runtime(format!("--api-socket {}: {error}", path.display()));
    let mut client = Client::connect(&path).map_err(failed)?;
    client
        .set_timeout(Some(Duration::from_secs(args.timeout)))
        .map_err(failed)?;
    let body = call.body.map(|body| body.to_string());
    let endpoint = call.endpoint.endpoint();
    let reply = client
        .request_with_files(
            endpoint.method.as_str(),
            endpoint.name,
            body.as_deref().map(str::as_bytes),
            &call.files,
        )
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    if !matches!(reply.status, 200 | 204) {
        if args.json {
            print(&text)?;
        }
        return Err(Failure::runtime(refusal(endpoint.name, reply.status, &text)));
    }
    match serde_json::from_str::<Value>(&text) {
        Ok(value) if !args.json => print(&format!("{value:#}")),
        Ok(value) => print(&value.to_string()),
        Err(_) if text.is_empty() => Ok(()),
        Err(_) => print(&text),
    }
}

/// The monitor's own words, cause after cause.
fn refusal(endpoint: &str, status: u16, body: &str) -> String {
    let causes: Vec<String> = serde_json::from_str(body).unwrap_or_else(|_| vec![body.to_owned()]);
    let mut said = format!("{endpoint}: {status}");
    for cause in causes {
        // An error that shows its cause has it told once.
        if !said.ends_with(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use podvisor_api::endpoints::{ENDPOINTS, Takes};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ctl: CtlArgs,
    }

    fn call(words: &[&str]) -> Call {
        let args =
            Cli::try_parse_from(["ctl", "--api-socket", "/s"].iter().chain(words)).unwrap_or_else(|e| panic!("{e}"));
        args.ctl.command.call().unwrap()
    }

    #[test]
    fn options_become_the_apis_json() {
        let disk = call(&["add-disk", "path=/d,readonly=on,id=mine"]);
        assert_eq!(disk.endpoint, EndpointId::VmAddDisk);
        let body = disk.body.unwrap();
        assert_eq!(
            (&body["path"], &body["readonly"], &body["id"]),
            (&json!("/d"), &json!(true), &json!("mine"))
        );
        let resize = call(&["resize", "--cpus", "4", "--memory", "4G"]);
        assert_eq!(
            resize.body.unwrap(),
            json!({"desired_vcpus": 4, "desired_ram": 4u64 << 30})
        );
        let restore = call(&["restore", "source_url=file:///x"]);
        assert_eq!(restore.body.unwrap()["source_url"], "file:///x");
        assert_eq!(call(&["info"]).endpoint, EndpointId::VmInfo);
    }

    #[test]
    fn every_endpoint_has_its_subcommand() {
        let words: &[&[&str]] = &[
            &["ping"],
            &["shutdown-vmm"],
            &["info"],
            &["counters"],
            &[
                "create",
                concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/wire/scenarios.json"),
            ],
            &["delete"],
            &["boot"],
            &["pause"],
            &["resume"],
            &["shutdown"],
            &["reboot"],
            &["power-button"],
            &["nmi"],
            &["resize", "--cpus", "2", "--memory", "1G", "--balloon", "0"],
            &["resize-disk", "--disk", "d,x", "--size", "1G"],
            &["resize-zone", "--id", "z", "--size", "1G"],
            &["add-device", "path=/sys/bus/pci/devices/0000:01:00.0"],
            &["add-disk", "path=/d"],
            &["add-fs", "tag=t,socket=/s"],
            &["add-generic-vhost-user", "socket=/s,virtio_id=26,queue_sizes=[64,128]"],
            &["add-net", "tap=t"],
            &["add-pmem", "file=/p"],
            &["add-user-device", "socket=/s"],
            &["add-vdpa", "path=/dev/vhost-vdpa-0,num_queues=1,iommu=off"],
            &["add-vsock", "cid=3,socket=/s"],
            &["remove-device", "d"],
            &["snapshot", "file:///s"],
            &["restore", "source_url=file:///s"],
            &["coredump", "file:///c"],
            &["receive-migration", "unix:/s"],
            &["send-migration", "--local", "unix:/s=1"],
        ];
        let calls: Vec<_> = words.iter().map(|words| call(words)).collect();
        for (call, endpoint) in calls.iter().zip(ENDPOINTS) {
            assert_eq!(call.endpoint, endpoint.id);
            assert_eq!(
                call.body.is_some(),
                matches!(endpoint.takes, Takes::Json(_)),
                "{}",
                endpoint.name
            );
        }
        assert_eq!(calls.len(), ENDPOINTS.len());
        let body = |name: &str| {
            let call = calls.iter().find(|call| call.endpoint.endpoint().name == name).unwrap();
            call.body.clone().unwrap()
        };
        assert_eq!(
            body("vm.add-generic-vhost-user"),
            json!({"socket": "/s", "virtio_id": 26, "queue_sizes": [64, 128]})
        );
        assert_eq!(
            body("vm.add-vdpa"),
            json!({"path": "/dev/vhost-vdpa-0", "num_queues": 1, "iommu": false})
        );
        assert_eq!(body("vm.receive-migration"), json!({"receiver_url": "unix:/s"}));
        assert_eq!(
            body("vm.send-migration"),
            json!({"destination_url": "unix:/s=1", "local": true})
        );
        assert_eq!(body("vm.resize-disk"), json!({"id": "d,x", "desired_size": 1u64 << 30}));
        let options = call(&["send-migration", "destination_url=tcp:h:1,local=on"]);
        assert_eq!(
            options.body.unwrap(),
            json!({"destination_url": "tcp:h:1", "local": true})
        );
    }

    #[test]
    fn the_descriptors_of_a_network_device_are_not_in_its_body() {
        let net = call(&["add-net", "fd=[3,4],num_queues=4,mac=02:00:00:00:00:01,id=n"]);
        assert_eq!(net.files, [3, 4]);
        let body = net.body.unwrap();
        assert_eq!((&body["num_queues"], &body["id"]), (&json!(4), &json!("n")));
        assert_eq!((body.get("fd"), body.get("fds")), (None, None));
        assert_eq!(call(&["add-net", "fd=3"]).files, [3]);
        assert!(call(&["add-net", "tap=t"]).files.is_empty());
    }

    #[test]
    fn wrong_words_are_refused_before_anything_is_sent() {
        let parse = |words: &[&str]| {
            Cli::try_parse_from(["ctl", "--api-socket", "/s"].iter().chain(words))
                .map_err(|e| e.to_string())
                .and_then(|cli| cli.ctl.command.call().map(drop).map_err(|e| format!("{e:?}")))
        };
        assert!(parse(&["resize"]).unwrap_err().contains("nothing to change"));
        assert!(parse(&["add-disk", "paht=/x"]).unwrap_err().contains("paht"));
        assert!(parse(&["resize", "--memory", "lots"]).is_err());
        assert!(parse(&["add-disk"]).is_err());
    }

    #[test]
    fn a_refusal_is_told_cause_after_cause() {
        assert_eq!(refusal("vm.boot", 404, r#"["a","b"]"#), "vm.boot: 404: a: b");
        assert_eq!(refusal("vm.boot", 404, r#"["a: b","b"]"#), "vm.boot: 404: a: b");
        assert_eq!(refusal("vm.boot", 500, "x"), "vm.boot: 500: x");
    }
}
