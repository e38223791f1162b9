//! `podvisor demo`: what a newcomer runs first, and the proof that the main job works. Starts podvisor as a child,
//! creates a pod from the built-in image over the API socket, has it use virtio-fs, blk and vsock and prove by a signed
//! report what it is, checks every result against the host's own copy, and leaves nothing behind.

pub mod agent;
mod interrupt;
mod monitor;
mod nested;
pub mod pattern;
mod results;
mod scratch;
mod steps;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use crate::hex;
use agent::Agent;
use interrupt::{Interrupt, Signals};
use monitor::Monitor;
use results::Results;
use scratch::Scratch;

/// Run the built-in pod once, end to end, and check everything it does.
#[derive(Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "the command's flags, one each")]
pub struct DemoArgs {
    /// Run the same image unencrypted, as an ordinary VM: no report, no digest
    #[arg(long)]
    native: bool,
    /// Run a real Linux pod in a host that is emulated in software: no /dev/kvm is needed, but the source tree's nested rig
    #[arg(long, conflicts_with_all = ["native", "save_image"])]
    nested: bool,
    /// Keep the pod's private pages out of the monitor's reach (a host with KVM_X86_SW_PROTECTED_VM)
    #[arg(long, conflicts_with_all = ["native", "nested", "save_image"])]
    private_memory: bool,
    /// Print one JSON object as the last line and nothing else on stdout
    #[arg(long)]
    json: bool,
    /// Write the built-in pod image (IGVM) to FILE and stop
    #[arg(long, value_name = "FILE")]
    save_image: Option<PathBuf>,
}

/// The SNP guest policy that the built-in image asks for: SMT allowed, and the bit that must be one.
const POLICY: u64 = 0x3_0000;
/// Memory limit of the demo's pod, as Kubernetes writes it.
const MEMORY_LIMIT: &str = "512Mi";

/// Runs the demo; the process exit code.
#[expect(clippy::print_stderr, reason = "the command's output")]
pub fn run(args: &DemoArgs) -> u8 {
    let start = Instant::now();
    if let Some(path) = &args.save_image {
        return match std::fs::write(path, crate::pod_image::POD_IMAGE) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("podvisor: {}: {error}", path.display());
                1
            }
        };
    }
    if args.nested {
        return nested::run(args.json);
    }
    if let Err(error) = kvm_usable() {
        eprintln!(
            "podvisor: the demo needs a usable /dev/kvm ({error}); without one, --nested emulates a host that has it"
        );
        return 2;
    }
    let mut results = Results::new(start, args.json);
    let outcome = demo(args, &mut results);
    if let Err(error) = &outcome {
        eprintln!("podvisor: the demo failed: {error}");
    }
    tell(args.json, &results);
    u8::from(outcome.is_err() || !results.failures().is_empty())
}

/// The results: what failed on standard error, then the table or the object.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the command's output")]
fn tell(json: bool, results: &Results) {
    for failure in results.failures() {
        eprintln!("podvisor: check failed: {failure}");
    }
    if json {
        println!("{}", results.json());
    } else {
        println!("{}", results.table());
    }
}

fn kvm_usable() -> io::Result<()> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
}

/// Everything of one run that the host knows in advance.
struct Setting {
    scratch: Scratch,
    seed: u64,
    nonce: [u8; 64],
    host_data: [u8; 32],
    native: bool,
    private_memory: bool,
}

impl Setting {
    fn new(args: &DemoArgs) -> io::Result<Self> {
        let scratch = Scratch::new()?;
        let mut random = [0; 72];
        aws_lc_rs::rand::fill(&mut random).map_err(io::Error::other)?;
        let (nonce, seed) = random.split_first_chunk::<64>().ok_or(io::ErrorKind::Other)?;
        let policy_text = "package agent_policy\n\ndefault AllowRequestsFailingPolicy := false\n";
        let policy_file = scratch.path().join("policy.rego");
        std::fs::write(&policy_file, policy_text)?;
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&policy_file)?);
        let setting = Self {
            seed: seed.first_chunk().map_or(0, |s| u64::from_le_bytes(*s)),
            nonce: *nonce,
            host_data: hash.as_ref().try_into().map_err(io::Error::other)?,
            native: args.native,
            private_memory: args.private_memory,
            scratch,
        };
        std::fs::create_dir(setting.share())?;
        std::fs::write(setting.image(), crate::pod_image::POD_IMAGE)?;
        std::fs::File::create(setting.disk())?.set_len(steps::DISK_BYTES)?;
        Ok(setting)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
    fn share(&self) -> PathBuf {
        self.path("share")
    }
    fn image(&self) -> PathBuf {
        self.path("pod.igvm")
    }
    fn disk(&self) -> PathBuf {
        self.path("disk.raw")
    }
    fn vsock(&self) -> PathBuf {
        self.path("vsock")
    }

    /// The body of vm.create.
    fn config(&self) -> Value {
        let isolation = if self.native { "none" } else { "snp-emulated" };
        let host_data = (!self.native).then(|| hex::encode(&self.host_data));
        json!({
            "pod": {"handler": "kata-cc", "memory_limit": MEMORY_LIMIT},
            "payload": {"igvm": self.image(), "host_data": host_data},
            "platform": {"isolation": isolation, "private_memory": self.private_memory},
            "disks": [{"path": self.disk(), "image_type": "Raw"}],
            "fs": [{"tag": "share", "shared_dir": self.share()}],
            "vsock": {"cid": 3, "socket": self.vsock()},
            "serial": {"mode": "Null"},
            "console": {"mode": "Off"},
        })
    }
}

fn demo(args: &DemoArgs, results: &mut Results) -> Result<(), io::Error> {
    let signals = Signals::take()?;
    let setting = Setting::new(args)?;
    let interrupt = Interrupt::watch(signals, setting.scratch.path().to_owned())?;
    std::thread::scope(|scope| {
        // The tree is made while the pod boots; both are needed only when the pod walks it.
        let tree = scope.spawn(|| tree::make(&setting.share(), setting.seed));
        let mut monitor = Monitor::start(&setting.path("api.sock"), &setting.path("monitor.log"))?;
        interrupt.monitor_is(monitor.pid());
        results.step("monitor_ready", "podvisor answers on its API socket");
        let outcome = boot(&setting, &mut monitor, results).and_then(|(digest, mut agent)| {
            if let Some(digest) = digest {
                let attested = steps::attest(&mut agent, &digest, POLICY, setting.nonce);
                let host_data = attested.clone().and_then(|found| {
                    let wrong = || format!("the report's HOST_DATA is {}", hex::encode(&found));
                    (found == setting.host_data).then_some(()).ok_or_else(wrong)
                });
                results.check("report_verified", attested.map(drop));
                results.check("host_data_ok", host_data);
                results.step(
                    "report_verified",
                    "the pod's signed report holds: chain, nonce, policy, digest, HOST_DATA",
                );
            }
            let manifest = tree
                .join()
                .map_err(|_| io::Error::other("the thread that makes the tree ended early"))??;
            work(&setting, &mut agent, &manifest, results);
            results.figure("monitor_rss_kib", json!(monitor.own_rss_kib()?));
            agent.command("poweroff")?;
            monitor.wait(Duration::from_secs(10))?;
            results.step("powered_off", "the pod powered off and the monitor ended");
            let disk = steps::disk_afterwards(&setting.disk(), setting.seed);
            results.check("blk_ok", disk);
            let gone = !setting.vsock().exists() && !monitor.socket_exists();
            results.check(
                "clean",
                gone.then_some(()).ok_or_else(|| "a socket was left behind".into()),
            );
            results.step("disk_checked", "the disk holds what the pod wrote and nothing else");
            Ok(())
        });
        outcome.map_err(|error| io::Error::other(format!("{error}\n{}", monitor.log().trim_end())))
    })
}

/// Creates and boots the pod; its launch digest (None when native) and a stream to its agent.
fn boot(setting: &Setting, monitor: &mut Monitor, results: &mut Results) -> io::Result<(Option<[u8; 48]>, Agent)> {
    monitor.request("PUT", "vm.create", Some(&setting.config()))?;
    results.step(
        "created",
        "the pod is created: kata-cc, a limit of 512 MiB, a shared directory, a disk, a vsock",
    );
    monitor.request("PUT", "vm.boot", None)?;
    results.step("booted", "the image is placed in the pod's memory, its vCPU runs");
    let info = monitor
        .request("GET", "vm.info", None)?
        .ok_or_else(|| io::Error::other("vm.info has no body"))?;
    let vcpus = told(&info, "/config/cpus/boot_vcpus");
    results.figure("memory_bytes", told(&info, "/config/memory/size"));
    results.figure("vcpus", vcpus.clone());
    let digest = if setting.native {
        None
    } else {
        Some(digests(&info, vcpus.as_u64().unwrap_or(1), results)?)
    };
    let mut agent = Agent::connect(&setting.vsock(), Instant::now() + Duration::from_secs(20))?;
    let hello = agent.command("hello")?;
    let platform = if setting.native { "native" } else { "snp" };
    if hello.value("platform") != Some(platform) {
        return Err(io::Error::other(format!(
            "the pod says '{}', expected platform={platform}",
            hello.ok
        )));
    }
    results.step("pod_answers", &format!("the pod answers over vsock: {}", hello.ok));
    Ok((digest, agent))
}

/// What vm.info says at `pointer` (RFC 6901); null when it says nothing there.
fn told(info: &Value, pointer: &str) -> Value {
    info.pointer(pointer).cloned().unwrap_or_default()
}

/// The digest predicted from the image alone, held against the one that the processor computed.
fn digests(info: &Value, vcpus: u64, results: &mut Results) -> io::Result<[u8; 48]> {
    let plan = podvisor_firmware::igvm::plan(
        crate::pod_image::POD_IMAGE,
        &podvisor_firmware::igvm::PlanOptions {
            platform: Some(podvisor_firmware::plan::Platform::SevSnp),
            ..Default::default()
        },
    )
    .map_err(io::Error::other)?;
    let vcpus = u32::try_from(vcpus).map_err(io::Error::other)?;
    let predicted = podvisor_snp::digest::predict(&plan, vcpus).map_err(io::Error::other)?;
    let expected = hex::encode(&predicted.digest);
    let launched = told(info, "/podvisor/digest");
    let launched = launched.as_str().unwrap_or_default();
    results.figure("isolation", told(info, "/podvisor/isolation"));
    results.figure("digest_predicted", json!(expected));
    results.figure("digest_launched", json!(launched));
    results.figure("measured_bytes", json!(predicted.measured_bytes));
    let equal = if launched == expected {
        Ok(())
    } else {
        Err("predicted and launched digest differ".into())
    };
    results.check("digest_ok", equal);
    Ok(predicted.digest)
}

/// The pod's work on its devices.
fn work(setting: &Setting, agent: &mut Agent, manifest: &tree::Manifest, results: &mut Results) {
    results.check("vsock_ok", steps::vsock(agent, &setting.vsock(), setting.seed));
    results.step(
        "vsock",
        "streams opened by the host and by the pod carried what they should",
    );
    let share: &Path = &setting.share();
    results.check("fs_ok", steps::shared_directory(agent, share, manifest, setting.seed));
    let text = format!(
        "the pod hashed {} files, {} MiB, and wrote one back",
        tree::FILES,
        tree::BYTES >> 20
    );
    results.step("shared_directory", &text);
    results.check("blk_ok", steps::disk(agent, setting.seed));
    results.step("disk", "the pod wrote 2 MiB to its disk, flushed and read it again");
}
