//! `podvisor igvm inspect`: what an image holds and does, for each platform it carries.

mod map;

use std::fmt::Write as _;

use podvisor_firmware::igvm::{self, PlanOptions};
use podvisor_firmware::image::read::{self, Payloads, Stage0Image};
use podvisor_firmware::plan::{LaunchPlan, PageKind, Platform, Step};
use podvisor_snp::digest::{predict, sha384};
use serde_json::{Value, json};

use super::args::InspectArgs;
use super::igvm_build::sha256;
use super::{Failure, chain, print};
use crate::hex;

/// Prints the image.
pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let name = args.file.display();
    let file = std::fs::File::open(&args.file)
        .and_then(|file| crate::sys::map_file(&file))
        .map_err(|e| Failure::runtime(format!("{name}: {e}")))?;
    let fail = |e: igvm::IgvmError| Failure::runtime(format!("{name}: {}", chain(&e)));
    let (mut platforms, mut maps) = (Vec::new(), String::new());
    for info in igvm::platforms(&file).map_err(fail)? {
        let Some(platform) = info.platform() else {
            platforms.push(json!({"platform": info.name(), "supported": false}));
            continue;
        };
        let options = PlanOptions {
            platform: Some(platform),
            ..PlanOptions::default()
        };
        let plan = igvm::plan(&file, &options).map_err(fail)?;
        let mut value = describe(info.name(), info.compatibility_mask, &plan);
        let stage0 = read::read(&plan, &sha256);
        let rows = map::rows(&plan, stage0.as_ref().ok().and_then(Option::as_ref));
        let _ = write!(
            maps,
            "\n\nmemory map, {}:\n{}",
            info.name(),
            map::draw(&rows).trim_end()
        );
        if let Some(object) = value.as_object_mut() {
            match stage0 {
                Ok(Some(image)) => drop(object.insert("stage0".to_owned(), stage0_json(&image))),
                Ok(None) => {}
                Err(error) => drop(object.insert("stage0_manifest".to_owned(), json!(chain(&error)))),
            }
            object.insert("map".to_owned(), map::json(&rows));
        }
        platforms.push(value);
    }
    if !args.json {
        // The drawing tells what these tell.
        for object in platforms.iter_mut().filter_map(Value::as_object_mut) {
            object.remove("map");
            object.remove("steps");
        }
    }
    let image = json!({
        "file": args.file.to_string_lossy(),
        "bytes": file.len(),
        "sha384": hex::encode(&sha384(&file)),
        "platforms": platforms,
    });
    print(&if args.json {
        image.to_string()
    } else {
        text(&image) + &maps
    })
}

/// What stage0 boots.
fn stage0_json(image: &Stage0Image) -> Value {
    let payload = |payload: &podvisor_firmware::stage0::abi::Payload| {
        json!({
            "bytes": payload.len,
            "gpa": format!("{:#x}", payload.dest),
            "copied_from": (payload.staged != payload.dest).then(|| format!("{:#x}", payload.staged)),
            "memory_bytes": payload.memory_len,
        })
    };
    let manifest = &image.manifest;
    json!({
        "command_line": image.command_line,
        "kernel": payload(&manifest.kernel),
        "entry": format!("{:#x}", manifest.kernel.entry),
        "initrd": if manifest.initrd.len > 0 { payload(&manifest.initrd) } else { Value::Null },
        "chunks": manifest.chunk_count,
        "payloads": match &image.payloads {
            Payloads::Match => "as measured".to_owned(),
            Payloads::Differ(what) => format!("refused by stage0: {what}"),
        },
    })
}

fn kind_name(kind: PageKind) -> &'static str {
    match kind {
        PageKind::Normal => "normal",
        PageKind::Zero => "zero",
        PageKind::Unmeasured => "unmeasured",
        PageKind::Secrets => "secrets",
        PageKind::Cpuid => "cpuid",
        PageKind::Shared => "shared",
    }
}

/// Steps that follow on each other in the guest's memory and are of one kind are one entry.
fn steps(plan: &LaunchPlan<'_>) -> Vec<Value> {
    struct Run {
        gpa: u64,
        len: u64,
        data: usize,
        kind: &'static str,
    }
    let mut runs: Vec<Run> = Vec::new();
    for step in &plan.steps {
        let next = match step {
            Step::Pages { gpa, len, kind, data } => Run {
                gpa: *gpa,
                len: *len,
                data: data.len(),
                kind: kind_name(*kind),
            },
            Step::Parameters { gpa, area } => Run {
                gpa: *gpa,
                len: plan.areas.get(*area).map_or(0, |a| a.len),
                data: 0,
                kind: "parameters",
            },
            Step::Vcpu { .. } => continue,
        };
        match runs.last_mut() {
            Some(last) if last.kind == next.kind && last.gpa.checked_add(last.len) == Some(next.gpa) => {
                last.len = last.len.saturating_add(next.len);
                last.data = last.data.saturating_add(next.data);
            }
            _ => runs.push(next),
        }
    }
    runs.iter()
        .map(|r| json!({"gpa": format!("{:#x}", r.gpa), "bytes": r.len, "kind": r.kind, "data_bytes": r.data}))
        .collect()
}

fn describe(name: &str, mask: u32, plan: &LaunchPlan<'_>) -> Value {
    let vcpus: Vec<Value> = plan
        .vps
        .iter()
        .map(|vp| {
            let state = &vp.state;
            json!({
                "index": vp.index,
                "rip": format!("{:#x}", state.rip),
                "rsp": format!("{:#x}", state.rsp),
                "cr3": format!("{:#x}", state.cr3),
                "sev_features": format!("{:#x}", state.sev_features),
            })
        })
        .collect();
    let parameters: Vec<String> = plan
        .areas
        .iter()
        .flat_map(|area| &area.parameters)
        .map(|p| format!("{:?}", p.kind))
        .collect();
    let required: Vec<Value> = plan
        .required_memory
        .iter()
        .map(|r| json!({"gpa": format!("{:#x}", r.start), "bytes": r.len}))
        .collect();
    let mut value = json!({
        "platform": name,
        "supported": true,
        "compatibility_mask": format!("{mask:#x}"),
        "steps": steps(plan),
        "parameters": parameters,
        "vcpus": vcpus,
        "required_memory": required,
        "id_block": plan.id_block.is_some(),
    });
    if let (Some(policy), Some(object)) = (plan.policy, value.as_object_mut()) {
        object.insert("policy".to_owned(), json!(format!("{policy:#x}")));
    }
    if let (Platform::SevSnp, Some(object)) = (plan.platform, value.as_object_mut()) {
        match predict(plan, 1) {
            Ok(prediction) => {
                object.insert(
                    "launch_digest_1_vcpu".to_owned(),
                    json!(hex::encode(&prediction.digest)),
                );
                object.insert("measured_bytes".to_owned(), json!(prediction.measured_bytes));
            }
            Err(error) => {
                object.insert("not_measurable".to_owned(), json!(chain(&error)));
            }
        }
    }
    value
}

/// The same for people: nested fields as indented lines.
fn text(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value, 0);
    out.trim_end().to_owned()
}

fn write_value(out: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    let Some(object) = value.as_object() else { return };
    for (key, value) in object {
        match value {
            Value::Array(items) if items.iter().any(Value::is_object) => {
                let _ = writeln!(out, "{indent}{key}:");
                for item in items {
                    if item.as_object().is_some_and(|o| o.values().all(|v| !v.is_array())) {
                        let fields: Vec<String> = item
                            .as_object()
                            .into_iter()
                            .flatten()
                            .map(|(k, v)| format!("{k} {}", plain(v)))
                            .collect();
                        let _ = writeln!(out, "{indent}  {}", fields.join(", "));
                    } else {
                        write_value(out, item, depth + 1);
                        out.push('\n');
                    }
                }
            }
            Value::Array(items) => {
                let items: Vec<String> = items.iter().map(plain).collect();
                let _ = writeln!(out, "{indent}{key}: {}", items.join(", "));
            }
            Value::Null => {}
            Value::Object(_) => {
                let _ = writeln!(out, "{indent}{key}:");
                write_value(out, value, depth + 1);
            }
            other => {
                let _ = writeln!(out, "{indent}{key}: {}", plain(other));
            }
        }
    }
}

fn plain(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    // An image's text must not move the cursor of who looks at it.
    text.chars()
        .map(|c| if c.is_control() { '\u{FFFD}' } else { c })
        .collect()
}
