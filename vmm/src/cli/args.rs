//! What the command line accepts, and the configuration it describes. Options that are sections of the API's
//! configuration are parsed by the API's own types.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use podvisor_api::types::{NetConfig, PayloadConfig, RestoreConfig, VmConfig};
use podvisor_api::{OptionForm, OptionsError, from_options, from_options_with_fds};

use crate::sandbox::seccomp::Violation;

const EXAMPLES: &str = "\
Examples:
  Wait for a Kata shim (or curl) on a socket:
    podvisor --api-socket /run/pod/api.sock
  Boot a PVH kernel at once, its serial port on this terminal:
    podvisor --kernel vmlinux --initramfs initrd --cmdline 'console=ttyS0' --cpus boot=2 --memory size=1G --serial tty --console off
  Boot an IGVM image on the emulated SEV-SNP processor (protects nothing), sized by the pod's limits:
    podvisor --igvm pod.igvm --platform isolation=snp-emulated --pod handler=kata-cc,memory_limit=512Mi,cpu_limit=1 \\
             --fs tag=data,shared_dir=/srv/data --disk path=disk.img --vsock cid=3,socket=/run/pod/vsock.sock
  Build an image of a kernel and an initrd, predict its launch digest, and look into it:
    podvisor igvm build --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --output pod.igvm
    podvisor measure pod.igvm --vcpus 2
    podvisor igvm inspect pod.igvm";

/// A micro-VM monitor for pod sandboxes, driven by the Cloud Hypervisor REST API.
#[derive(Debug, Parser)]
#[command(name = "podvisor", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    /// A tool rather than a pod.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// The tools. Their options are defined when one of them is called: a pod's start does not pay for them.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Command {
    /// Run the built-in pod once, end to end, and check everything it does.
    Demo(crate::demo::DemoArgs),
    /// Tell a running monitor what to do, as ch-remote does.
    Ctl(super::ctl::CtlArgs),
    /// Watch a pod and its monitor live.
    Top(super::top::TopArgs),
    /// Print the memory and vCPUs that a pod's limits make.
    Size(SizeArgs),
    /// Predict the launch digest of an IGVM image, without a hypervisor.
    Measure(MeasureArgs),
    /// Tools for IGVM images.
    Igvm {
        #[command(subcommand)]
        command: IgvmCommand,
    },
    /// Print or verify a SEV-SNP attestation report.
    Attest {
        #[command(subcommand)]
        command: super::attest::AttestCommand,
    },
    /// Sign an ID block for a SEV-SNP launch.
    IdBlock {
        #[command(subcommand)]
        command: super::id_block::IdBlockCommand,
    },
}

/// Tools for IGVM images.
#[derive(Debug, Subcommand)]
pub(crate) enum IgvmCommand {
    /// Build an image of a Linux kernel and an initrd.
    Build(Box<super::igvm_build::BuildArgs>),
    /// Print what an image holds and does.
    Inspect(InspectArgs),
}

/// `podvisor size`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: podvisor size --handler kata-cc --memory-limit 512Mi --cpu-limit 1500m --json")]
pub(crate) struct SizeArgs {
    /// The runtime handler: kata-cc (confidential) or kata.
    #[arg(long)]
    pub(crate) handler: String,
    /// The sum of the containers' memory limits, as Kubernetes writes it (512Mi, 1G, 1.5Gi).
    #[arg(long)]
    pub(crate) memory_limit: Option<String>,
    /// The sum of the containers' CPU limits (2, 1500m).
    #[arg(long)]
    pub(crate) cpu_limit: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `podvisor measure`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  podvisor measure pod.igvm --vcpus 2 --json
  podvisor measure OVMF.amdsev.fd --vcpus 4 --cpu EPYC-Milan --kernel vmlinuz --cmdline console=ttyS0")]
pub(crate) struct MeasureArgs {
    /// The IGVM image, or OVMF with SEV metadata.
    pub(crate) file: PathBuf,
    /// vCPUs the pod will have: each adds its registers to the digest.
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// Model of the vCPUs: EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa or EPYC-Turin (QEMU's versions of them too, as
    /// EPYC-v4), or CPUID Fn0000_0001 EAX as 0x….
    #[arg(long, value_name = "MODEL", help_heading = "OVMF only")]
    pub(crate) cpu: Option<CpuModel>,
    /// Kernel that the firmware is to boot: its hash is measured.
    #[arg(long, value_name = "FILE", help_heading = "OVMF only")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel.
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "OVMF only")]
    pub(crate) initrd: Option<PathBuf>,
    /// Command line for --kernel.
    #[arg(long, value_name = "TEXT", requires = "kernel", help_heading = "OVMF only")]
    pub(crate) cmdline: Option<String>,
    /// SEV_FEATURES of the vCPUs.
    #[arg(long, value_name = "BITS", value_parser = number, help_heading = "OVMF only")]
    pub(crate) guest_features: Option<u64>,
    /// The hypervisor that starts the vCPUs.
    #[arg(long, value_enum, help_heading = "OVMF only")]
    pub(crate) vmm_type: Option<VmmTypeArg>,
    /// What pages without data are: zeros that are measured (as the specification, QEMU and podvisor have it) or ZERO
    /// pages (as Cloud Hypervisor has it).
    #[arg(long, value_enum, default_value_t = ZeroPagesArg::AsNormal)]
    pub(crate) zero_pages: ZeroPagesArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The hypervisors whose initial registers are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VmmTypeArg {
    /// QEMU on KVM, and podvisor.
    Qemu,
    /// Amazon EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

/// CPUID Fn0000_0001 EAX of a processor, given by name or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuModel(pub(crate) u32);

impl FromStr for CpuModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("0x") {
            let value = number(text)?;
            let fits = u32::try_from(value);
            return fits.map(Self).map_err(|_| format!("{text} has more than 32 bits"));
        }
        podvisor_firmware::ovmf::cpu_signature(text)
            .map(Self)
            .ok_or_else(|| format!("no processor {text}: EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa, EPYC-Turin, or 0x…"))
    }
}

/// A number, decimal or 0x….
pub(super) fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text} is no number: decimal, or hexadecimal as 0x…"))
}

/// The readings of a page without data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZeroPagesArg {
    /// ZERO pages.
    AsZero,
    /// NORMAL pages of zeros.
    AsNormal,
}

/// `podvisor igvm inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: podvisor igvm inspect pod.igvm")]
pub(crate) struct InspectArgs {
    /// The IGVM image.
    pub(crate) file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A pod, and how to watch it.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct RunArgs {
    /// Serve the API on this socket: PATH, path=PATH, or fd=N for a listening socket that was inherited.
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<String>,
    /// Kernel to boot: a PVH ELF (vmlinux). An IGVM image is taken too.
    #[arg(long, value_name = "FILE", help_heading = "What boots")]
    pub(crate) kernel: Option<PathBuf>,
    /// IGVM image to boot.
    #[arg(long, value_name = "FILE", conflicts_with = "kernel", help_heading = "What boots")]
    pub(crate) igvm: Option<PathBuf>,
    /// Go on with a pod that was saved: source_url=file://DIR[,resume=on]
    #[arg(long, value_name = "OPTIONS", conflicts_with_all = ["kernel", "igvm"], help_heading = "What boots")]
    pub(crate) restore: Option<String>,
    /// Initial RAM disk for --kernel.
    #[arg(long, value_name = "FILE", help_heading = "What boots")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", help_heading = "What boots")]
    pub(crate) cmdline: Option<String>,
    /// vCPUs: boot=N[,max=N][,topology=T:C:D:P]
    #[arg(long, value_name = "OPTIONS", help_heading = "The machine")]
    pub(crate) cpus: Option<String>,
    /// Memory: size=SIZE[,shared=on][,hugepages=on][,thp=off][,prefault=on][,mergeable=on]
    #[arg(long, value_name = "OPTIONS", help_heading = "The machine")]
    pub(crate) memory: Option<String>,
    /// A zone of the memory, with --memory size=0: id=NAME,size=SIZE[,file=FILE][,shared=on][,hugepages=on][,prefault=on]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "The machine")]
    pub(crate) memory_zone: Vec<String>,
    /// Size the machine by the pod's limits: handler=kata-cc|kata[,memory_limit=512Mi][,cpu_limit=1500m]
    #[arg(long, value_name = "OPTIONS", help_heading = "The machine")]
    pub(crate) pod: Option<String>,
    /// Platform: [isolation=none|snp|snp-emulated][,private_memory=on][,sev_snp=on][,num_pci_segments=N]
    #[arg(long, value_name = "OPTIONS", help_heading = "The machine")]
    pub(crate) platform: Option<String>,
    /// PCI segment: pci_segment=N[,mmio32_aperture_weight=N][,mmio64_aperture_weight=N]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "The machine")]
    pub(crate) pci_segment: Vec<String>,
    /// HOST_DATA of the pod's attestation reports: 64 hexadecimal digits.
    #[arg(long, value_name = "HEX", help_heading = "The machine")]
    pub(crate) host_data: Option<String>,
    /// Refuse to run the pod unless its launch digest is this: 96 hexadecimal digits, as `podvisor measure` prints.
    #[arg(long, value_name = "HEX", help_heading = "The machine")]
    pub(crate) expect_digest: Option<String>,
    /// Disk: path=FILE[,readonly=on][,direct=on][,num_queues=N][,queue_size=N][,serial=TEXT][,id=NAME]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "Devices")]
    pub(crate) disk: Vec<String>,
    /// Limits that disks share: id=NAME[,bw_size=N,bw_refill_time=MS][,ops_size=N,ops_refill_time=MS]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "Devices")]
    pub(crate) rate_limit_group: Vec<String>,
    /// Scratch disk, empty at each boot and gone with the pod: size=SIZE[,dir=DIR][,id=NAME]
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub(crate) scratch: Option<String>,
    /// File system: tag=TAG,shared_dir=DIR|socket=PATH[,readonly=on][,num_queues=N][,id=NAME]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "Devices")]
    pub(crate) fs: Vec<String>,
    /// Vsock: cid=N,socket=PATH[,id=NAME]
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub(crate) vsock: Option<String>,
    /// Network device: [tap=NAME][,mac=MAC][,ip=IP,mask=MASK][,num_queues=N][,mtu=N][,id=NAME], fd=[N,N] for TAP queues
    /// that were inherited, or vhost_user=on,socket=PATH[,vhost_mode=server]
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "Devices")]
    pub(crate) net: Vec<String>,
    /// Persistent memory: file=FILE[,size=SIZE][,discard_writes=on][,id=NAME], or file=DIR,size=SIZE
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append, help_heading = "Devices")]
    pub(crate) pmem: Vec<String>,
    /// Balloon: size=SIZE[,deflate_on_oom=on][,free_page_reporting=on]
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub(crate) balloon: Option<String>,
    /// Entropy source: src=FILE
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub(crate) rng: Option<String>,
    /// Serial port: off|null|tty|pty|file=FILE|socket=PATH
    #[arg(long, value_name = "MODE", help_heading = "Devices")]
    pub(crate) serial: Option<String>,
    /// Virtio console: off|null|tty|pty|file=FILE|socket=PATH
    #[arg(long, value_name = "MODE", help_heading = "Devices")]
    pub(crate) console: Option<String>,
    /// Debug port: off|null|tty|pty|file=FILE[,iobase=PORT]
    #[arg(long, value_name = "MODE", help_heading = "Devices")]
    pub(crate) debug_console: Option<String>,
    /// A watchdog (virtio): a guest that stops feeding it is reset.
    #[arg(long, help_heading = "Devices")]
    pub(crate) watchdog: bool,
    /// A device by which a guest tells that its kernel panicked.
    #[arg(long, help_heading = "Devices")]
    pub(crate) pvpanic: bool,
    /// Go on when the pod powers itself off: it stays created, for vm.boot or vm.delete.
    #[arg(long)]
    pub(crate) no_shutdown: bool,
    /// System calls that the monitor has no use for: true ends it, errno lets them fail, log only logs them, false allows all.
    #[arg(long, value_enum, default_value_t = Seccomp::True)]
    pub(crate) seccomp: Seccomp,
    /// Keep the monitor from all files but those of the configuration once the pod boots.
    #[arg(long)]
    pub(crate) landlock: bool,
    /// A path that stays reachable with --landlock: path=PATH,access=r|w|rw
    #[arg(long, value_name = "OPTIONS", num_args = 1.., action = ArgAction::Append)]
    pub(crate) landlock_rules: Vec<String>,
    /// Tell what happens to the pod: path=FILE or fd=N
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) event_monitor: Option<String>,
    /// Append the log to this file instead of stderr.
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Log more: -v info, -vv debug, -vvv everything.
    #[arg(short, action = ArgAction::Count)]
    pub(crate) verbosity: u8,
}

/// The `--seccomp` modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Seccomp {
    /// Filter.
    #[default]
    True,
    /// Do not filter.
    False,
    /// Log what would be filtered.
    Log,
    /// Let it fail.
    Errno,
}

impl Seccomp {
    /// What happens on a call that is not allowed; none: nothing is filtered.
    pub(crate) fn violation(self) -> Option<Violation> {
        match self {
            Self::True => Some(Violation::End),
            Self::Errno => Some(Violation::Refuse),
            Self::Log => Some(Violation::Log),
            Self::False => None,
        }
    }
}

/// Why the options do not describe a pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsageError {
    /// An option's text.
    #[error("{option} {text}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its text.
        text: String,
        /// Why it is refused.
        source: OptionsError,
    },
    /// A value.
    #[error("{option}: {reason}")]
    Value {
        /// The option.
        option: &'static str,
        /// What is wrong.
        reason: String,
    },
}

fn section<T: OptionForm>(option: &'static str, text: &str) -> Result<T, UsageError> {
    from_options(text).map_err(|source| UsageError::Option {
        option,
        text: text.to_owned(),
        source,
    })
}

/// The sections of an option that may be given several times; none if it is not.
fn sections<T: OptionForm>(option: &'static str, texts: &[String]) -> Result<Option<Vec<T>>, UsageError> {
    let all: Vec<T> = texts
        .iter()
        .map(|text| section(option, text))
        .collect::<Result<_, _>>()?;
    Ok((!all.is_empty()).then_some(all))
}

impl RunArgs {
    /// The launch digest that `--expect-digest` promises.
    pub(crate) fn expected_digest(&self) -> Result<Option<[u8; 48]>, UsageError> {
        let Some(text) = &self.expect_digest else {
            return Ok(None);
        };
        crate::hex::decode(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Some)
            .ok_or_else(|| UsageError::Value {
                option: "--expect-digest",
                reason: format!("{text:?} is not 96 hexadecimal digits"),
            })
    }

    /// The snapshot that `--restore` names.
    pub(crate) fn restored(&self) -> Result<Option<RestoreConfig>, UsageError> {
        self.restore
            .as_deref()
            .map(|text| section("--restore", text))
            .transpose()
    }

    /// The network devices with the descriptors that they name.
    pub(crate) fn nets(&self) -> Result<Vec<(NetConfig, Vec<i32>)>, UsageError> {
        let net = |text: &String| {
            from_options_with_fds(text).map_err(|source| UsageError::Option {
                option: "--net",
                text: text.clone(),
                source,
            })
        };
        self.net.iter().map(net).collect()
    }

    /// The configuration that the options describe; none without a payload.
    pub(crate) fn config(&self) -> Result<Option<VmConfig>, UsageError> {
        let mut config = VmConfig::default();
        if let Some(text) = &self.cpus {
            config.cpus = section("--cpus", text)?;
        }
        if let Some(text) = &self.memory {
            config.memory = section("--memory", text)?;
        }
        if let Some(text) = &self.pod {
            config.pod = Some(section("--pod", text)?);
        }
        if let Some(text) = &self.platform {
            config.platform = Some(section("--platform", text)?);
        }
        config.disks = sections("--disk", &self.disk)?;
        config.rate_limit_groups = sections("--rate-limit-group", &self.rate_limit_group)?;
        if let Some(text) = &self.scratch {
            config.scratch = Some(section("--scratch", text)?);
        }
        let net: Vec<_> = self.nets()?.into_iter().map(|(net, _)| net).collect();
        config.net = (!net.is_empty()).then_some(net);
        config.fs = sections("--fs", &self.fs)?;
        config.memory.zones = sections("--memory-zone", &self.memory_zone)?;
        config.pci_segments = sections("--pci-segment", &self.pci_segment)?;
        config.pmem = sections("--pmem", &self.pmem)?;
        if let Some(text) = &self.balloon {
            config.balloon = Some(section("--balloon", text)?);
        }
        if let Some(text) = &self.vsock {
            config.vsock = Some(section("--vsock", text)?);
        }
        if let Some(text) = &self.rng {
            config.rng = section("--rng", text)?;
        }
        if let Some(text) = &self.serial {
            config.serial = section("--serial", text)?;
        }
        if let Some(text) = &self.console {
            config.console = section("--console", text)?;
        }
        if let Some(text) = &self.debug_console {
            config.debug_console = section("--debug-console", text)?;
        }
        config.watchdog = self.watchdog;
        config.pvpanic = self.pvpanic;
        config.landlock_enable = self.landlock;
        let rules = self
            .landlock_rules
            .iter()
            .map(|text| section("--landlock-rules", text))
            .collect::<Result<Vec<_>, _>>()?;
        config.landlock_rules = (!rules.is_empty()).then_some(rules);
        let payload = PayloadConfig {
            kernel: self.kernel.clone(),
            igvm: self.igvm.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            host_data: self.host_data.clone(),
            ..PayloadConfig::default()
        };
        if payload.kernel.is_none() && payload.igvm.is_none() {
            return if config == VmConfig::default() && payload.is_empty() {
                Ok(None)
            } else {
                Err(UsageError::Value {
                    option: "--kernel or --igvm",
                    reason:
                        "a pod was described but nothing to boot in it; give one of them, or leave all pod options \
                             out and create the pod through the API"
                            .to_owned(),
                })
            };
        }
        config.payload = Some(payload);
        Ok(Some(config))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use podvisor_api::types::ConsoleMode;

    use super::*;

    fn parse(args: &[&str]) -> RunArgs {
        Args::try_parse_from(std::iter::once("podvisor").chain(args.iter().copied()))
            .unwrap()
            .run
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_shims_command_lines_are_taken() {
        let args = parse(&["--api-socket", "/run/s", "-vv", "--seccomp", "false"]);
        assert_eq!((args.verbosity, args.seccomp), (2, Seccomp::False));
        assert_eq!(args.config().unwrap(), None);
    }

    #[test]
    fn several_disks_in_one_or_many_options() {
        let args = parse(&[
            "--kernel",
            "k",
            "--disk",
            "path=a",
            "path=b,readonly=on",
            "--disk",
            "path=c",
        ]);
        let config = args.config().unwrap().unwrap();
        assert_eq!(config.disks().len(), 3);
        assert!(config.disks()[1].readonly);
    }

    #[test]
    fn networks_and_groups() {
        let args = parse(&[
            "--kernel",
            "k",
            "--net",
            "fd=[7,8],num_queues=4",
            "tap=t",
            "--rate-limit-group",
            "id=g,ops_size=10,ops_refill_time=1000",
        ]);
        let config = args.config().unwrap().unwrap();
        assert_eq!(config.net()[1].tap.as_deref(), Some("t"));
        assert_eq!(config.rate_limit_groups()[0].rate_limiter_config.ops.unwrap().size, 10);
        let fds: Vec<_> = args.nets().unwrap().into_iter().map(|(_, fds)| fds).collect();
        assert_eq!(fds, [vec![7, 8], vec![]]);
    }

    #[test]
    fn memory_of_every_kind() {
        let args = "--kernel k --memory size=0 --memory-zone id=a,size=1G id=b,size=1G,file=/f,shared=on \
                    --pmem file=/p,size=2M --balloon size=1M,free_page_reporting=on --pci-segment pci_segment=1 \
                    --scratch size=8G";
        let config = parse(&args.split_whitespace().collect::<Vec<_>>())
            .config()
            .unwrap()
            .unwrap();
        assert_eq!(config.memory.total(), 2 << 30);
        assert!(config.memory.zones.unwrap()[1].shared);
        assert_eq!(config.pmem.unwrap()[0].size, Some(2 << 20));
        assert_eq!(config.balloon.unwrap().size, 1 << 20);
        let scratch = config.scratch.unwrap();
        assert_eq!((scratch.size, scratch.dir.as_path()), (8 << 30, Path::new("/var/tmp")));
        assert_eq!(config.pci_segments.unwrap()[0].mmio32_aperture_weight, 1);
    }

    #[test]
    fn consoles_and_small_devices_are_cloud_hypervisors() {
        let args = [
            "--kernel",
            "k",
            "--serial",
            "socket=/run/s",
            "--console",
            "pty",
            "--debug-console",
            "file=/tmp/debug,iobase=0x402",
            "--watchdog",
            "--pvpanic",
        ];
        let config = parse(&args).config().unwrap().unwrap();
        assert_eq!(config.serial.mode, ConsoleMode::Socket);
        assert_eq!(config.serial.socket.as_deref(), Some(Path::new("/run/s")));
        assert_eq!(config.console.mode, ConsoleMode::Pty);
        assert_eq!(config.debug_console.mode, ConsoleMode::File);
        assert_eq!(config.debug_console.iobase, Some(0x402));
        assert!(config.watchdog && config.pvpanic);
        assert!(!VmConfig::default().watchdog);
        let error = parse(&["--kernel", "k", "--serial", "loud"]).config().unwrap_err();
        assert!(error.to_string().contains("--serial loud"), "{error}");
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        let error = parse(&["--kernel", "k", "--net", "tpa=x"]).config().unwrap_err();
        assert!(error.to_string().starts_with("--net"), "{error}");
        let error = parse(&["--disk", "path=a"]).config().unwrap_err();
        assert!(error.to_string().contains("--igvm"), "{error}");
        let error = parse(&["--kernel", "k", "--memory", "size=1Q"]).config().unwrap_err();
        assert!(error.to_string().contains("--memory size=1Q"), "{error}");
        let error = parse(&["--expect-digest", "ab"]).expected_digest().unwrap_err();
        assert!(error.to_string().contains("96"), "{error}");
    }
}
