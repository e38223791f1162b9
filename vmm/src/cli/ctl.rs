//! `podvisor ctl`: a monitor told from the command line what a client of the API would tell it. The subcommands and
//! arguments are ch-remote's, the options are parsed by the API's own types, and any monitor with that API will do.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use podvisor_api::http::Client;
use podvisor_api::types::{
    DeviceConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, RestoreConfig, VmResize, VmResizeDisk, VmResizeZone,
    VsockConfig,
};
use podvisor_api::{OptionForm, from_options, from_options_with_fds};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Failure, print};

const EXAMPLES: &str = "\
Examples:
  podvisor ctl --api-socket /run/pod/api.sock ping
  podvisor ctl --api-socket /run/pod/api.sock create pod.json
  podvisor ctl --api-socket /run/pod/api.sock boot
  podvisor ctl --api-socket /run/pod/api.sock add-disk path=data.img,readonly=on
  podvisor ctl --api-socket /run/pod/api.sock --json info | jq .state";

/// `podvisor ctl`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, subcommand_required = true)]
pub(crate) struct CtlArgs {
    /// The monitor's API socket: PATH or path=PATH.
    #[arg(long, value_name = "PATH")]
    api_socket: String,
    /// Print bodies as they came, on one line, and errors as a JSON array on stdout.
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
    /// Add a network device: tap=NAME[,mac=MAC][,id=NAME].
    AddNet {
        /// Options.
        net: String,
    },
    /// Add persistent memory: file=FILE[,id=NAME].
    AddPmem {
        /// Options.
        pmem: String,
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
}

/// A request as the API has it.
struct Call {
    method: &'static str,
    endpoint: &'static str,
    body: Option<Value>,
    /// Descriptors of this process that go with it.
    fds: Vec<i32>,
}

fn put(endpoint: &'static str, body: Option<Value>) -> Call {
    Call {
        method: "PUT",
        endpoint,
        body,
        fds: Vec::new(),
    }
}

fn get(endpoint: &'static str) -> Call {
    Call {
        method: "GET",
        endpoint,
        body: None,
        fds: Vec::new(),
    }
}

/// `PUT endpoint` with what `options` says, as type `T` understands it.
fn with_options<T: OptionForm + Serialize>(endpoint: &'static str, options: &str) -> Result<Call, Failure> {
    let parsed: T = from_options(options).map_err(Failure::usage)?;
    Ok(put(
        endpoint,
        Some(serde_json::to_value(parsed).map_err(Failure::usage)?),
    ))
}

impl Request {
    fn call(&self) -> Result<Call, Failure> {
        Ok(match self {
            Self::Ping => get("vmm.ping"),
            Self::Info => get("vm.info"),
            Self::Counters => get("vm.counters"),
            Self::Create { config } => put("vm.create", Some(read_json(config)?)),
            Self::Boot => put("vm.boot", None),
            Self::Pause => put("vm.pause", None),
            Self::Resume => put("vm.resume", None),
            Self::Reboot => put("vm.reboot", None),
            Self::PowerButton => put("vm.power-button", None),
            Self::Shutdown => put("vm.shutdown", None),
            Self::Delete => put("vm.delete", None),
            Self::ShutdownVmm => put("vmm.shutdown", None),
            Self::Nmi => put("vm.nmi", None),
            Self::AddDevice { device } => with_options::<DeviceConfig>("vm.add-device", device)?,
            Self::AddDisk { disk } => with_options::<DiskConfig>("vm.add-disk", disk)?,
            Self::AddFs { fs } => with_options::<FsConfig>("vm.add-fs", fs)?,
            Self::AddNet { net } => {
                let (net, fds): (NetConfig, _) = from_options_with_fds(net).map_err(Failure::usage)?;
                let body = serde_json::to_value(net).map_err(Failure::usage)?;
                Call {
                    fds,
                    ..put("vm.add-net", Some(body))
                }
            }
            Self::AddPmem { pmem } => with_options::<PmemConfig>("vm.add-pmem", pmem)?,
            Self::AddVsock { vsock } => with_options::<VsockConfig>("vm.add-vsock", vsock)?,
            Self::RemoveDevice { id } => put("vm.remove-device", Some(json!({"id": id}))),
            Self::Snapshot { destination } => put("vm.snapshot", Some(json!({"destination_url": destination}))),
            Self::Coredump { destination } => put("vm.coredump", Some(json!({"destination_url": destination}))),
            Self::Restore { restore } => with_options::<RestoreConfig>("vm.restore", restore)?,
            Self::Resize { cpus, memory, balloon } => resize(*cpus, memory.as_deref(), balloon.as_deref())?,
            Self::ResizeDisk { disk, size } => {
                with_options::<VmResizeDisk>("vm.resize-disk", &format!("id=\"{disk}\",desired_size={size}"))?
            }
            Self::ResizeZone { id, size } => {
                with_options::<VmResizeZone>("vm.resize-zone", &format!("id=\"{id}\",desired_ram={size}"))?
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
    with_options::<VmResize>("vm.resize", &options.join(","))
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
    let reply = client
        .request_with_files(
            call.method,
            call.endpoint,
            body.as_deref().map(str::as_bytes),
            &call.fds,
        )
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    if !matches!(reply.status, 200 | 204) {
        if args.json {
            print(&text)?;
        }
        return Err(Failure::runtime(refusal(call.endpoint, reply.status, &text)));
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
    format!("{endpoint}: {status}: {}", causes.join(": "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

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
        assert_eq!((disk.method, disk.endpoint), ("PUT", "vm.add-disk"));
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
        assert_eq!(call(&["info"]).method, "GET");
        let net = call(&["add-net", "fd=[5,6],num_queues=4"]);
        assert_eq!((&net.body.unwrap()["num_queues"], net.fds), (&json!(4), vec![5, 6]));
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
        assert_eq!(refusal("vm.boot", 500, "x"), "vm.boot: 500: x");
    }
}
