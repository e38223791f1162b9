//! `podvisor demo --nested`: a real Linux pod where there is no KVM. The nested rig of the source tree emulates a host with
//! KVM in software and runs this podvisor in it; here its steps are read, told and counted.

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::results::Results;

/// The rig, from the root of the source tree.
const RIG: &str = "resources/nested/run.sh";
/// The directory with the demo's case, beside the rig.
const CASES: &str = "demo";

/// The steps that the case tells, and the check that each makes in the results.
const STEPS: [(&str, Option<&str>); 8] = [
    ("host_up", None),
    ("linux_up", Some("boot_ok")),
    ("fs", Some("fs_ok")),
    ("blk", Some("blk_ok")),
    ("vsock", Some("vsock_ok")),
    ("net", Some("net_ok")),
    ("powered_off", Some("power_off_ok")),
    ("clean", Some("clean")),
];

/// Runs it; the process exit code: 0 all steps were done, 1 one was not, 2 the rig is not there or did not work.
#[expect(clippy::print_stderr, reason = "the command's output")]
pub(super) fn run(json: bool) -> u8 {
    let mut results = Results::new(Instant::now(), json);
    if !json {
        pass_on("            the emulated host starts, in some 20 s", json);
    }
    let code = match find().and_then(|rig| follow(start(&rig)?, json, &mut results)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podvisor: demo --nested: {error}");
            return 2;
        }
    };
    super::tell(json, &results);
    match code {
        0 => u8::from(!results.failures().is_empty()),
        other => other,
    }
}

/// Where the rig is: above podvisor's program, as cargo builds it, or above the working directory.
fn find() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let here = std::env::current_dir()?;
    let mut roots = program.ancestors().chain(here.ancestors());
    roots.find_map(rig_in).ok_or_else(|| {
        io::Error::other(format!(
            "the nested rig ({RIG}) is part of podvisor's source tree, and there is none above {} or {}: \
             run this in the source tree",
            program.display(),
            here.display()
        ))
    })
}

fn rig_in(root: &Path) -> Option<PathBuf> {
    let rig = root.join(RIG);
    rig.is_file().then_some(rig)
}

/// Starts the rig. It ends, and its emulated machine with it, when this process does.
fn start(rig: &Path) -> io::Result<Child> {
    let cases = rig.with_file_name(CASES);
    Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "bash"])
        .arg(rig)
        .arg("--podvisor")
        .arg(std::env::current_exe()?)
        .arg("--cases")
        .arg(cases)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("setpriv (util-linux) does not start: {error}")))
}

/// Tells what the rig says until it ends; its exit code.
fn follow(mut rig: Child, json: bool, results: &mut Results) -> io::Result<u8> {
    let output = rig.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    for line in BufReader::new(output).lines() {
        if let Some(other) = heard(&line?, results) {
            pass_on(&other, json);
        }
    }
    let status = rig.wait()?;
    for (_, check) in STEPS {
        if let Some(name) = check.filter(|name| !results.has_check(name)) {
            results.check(name, Err("the pod did not come to it".into()));
        }
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(2))
}

/// Takes a line of the rig's: a step goes into the results, what a person should read comes back.
fn heard(line: &str, results: &mut Results) -> Option<String> {
    let Some((name, text)) = line.strip_prefix("    step ").and_then(|step| step.split_once(' ')) else {
        let frame = ["RUN ", "RIG ", "CASE linux-pod ok"]
            .iter()
            .any(|start| line.starts_with(start));
        return (!frame).then(|| line.to_owned());
    };
    let Some((name, check)) = STEPS.iter().find(|(known, _)| *known == name) else {
        return Some(line.to_owned());
    };
    if let Some(check) = check {
        results.check(check, Ok(()));
    }
    results.step(name, text);
    None
}

/// What is no step (packages that are fetched, why a case failed); with `--json` standard output is the object's.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the command's output")]
fn pass_on(line: &str, json: bool) {
    if json {
        eprintln!("{line}");
    } else {
        println!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Results {
        Results::new(Instant::now(), true)
    }

    #[test]
    fn a_step_is_a_check_and_a_timing() {
        let mut results = quiet();
        assert_eq!(heard("    step fs virtio-fs: all there", &mut results), None);
        let json = results.json();
        assert_eq!(json["fs_ok"], true);
        assert!(json["timings_ms"]["fs"].is_number());
    }

    #[test]
    fn the_frame_is_not_passed_on_and_a_failure_is() {
        let mut results = quiet();
        assert_eq!(heard("RUN linux-pod", &mut results), None);
        assert_eq!(heard("CASE linux-pod ok (20 s)", &mut results), None);
        let failed = "CASE linux-pod FAILED (20 s)";
        assert_eq!(heard(failed, &mut results).as_deref(), Some(failed));
        assert_eq!(
            heard("    step unheard-of x", &mut results).as_deref(),
            Some("    step unheard-of x")
        );
        assert!(results.json().get("unheard-of").is_none());
    }

    #[test]
    fn a_rig_that_ends_early_fails_what_was_not_reached_and_keeps_its_code() {
        let mut results = quiet();
        let rig = Command::new("sh")
            .args([
                "-c",
                "echo '    step linux_up up'; echo 'CASE linux-pod FAILED'; exit 1",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(follow(rig, true, &mut results).unwrap(), 1);
        let json = results.json();
        assert_eq!((&json["boot_ok"], &json["net_ok"]), (&true.into(), &false.into()));
        assert_eq!(results.failures().len(), 6);
    }

    #[test]
    fn the_rig_is_found_from_below_the_source_tree_and_names_its_case() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let rig = root.ancestors().find_map(rig_in).unwrap();
        assert!(rig.with_file_name(CASES).join("linux-pod/host").is_file());
        assert!(rig_in(Path::new("/proc")).is_none());
    }
}
