//! What `/proc` tells of a monitor: its threads, its children, its descriptors.

use std::path::{Path, PathBuf};

/// The names of a process's threads.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    let names = tasks.filter_map(|task| name(task.unwrap()));
    names.map(|name| name.trim_end_matches('\n').to_owned()).collect()
}

/// The numbers of the vCPU threads, by the rule of the Rust shim: what starts with `vcpu` goes on as a number.
pub(crate) fn vcpus(pid: u32) -> Vec<u32> {
    let threads = threads(pid);
    let numbers = threads.iter().filter_map(|name| name.strip_prefix("vcpu"));
    let mut numbers: Vec<u32> = numbers.map(|rest| rest.parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

/// The processes that a process has started and that are there.
pub(crate) fn children(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).ok();
    tasks.filter_map(|task| of(task.unwrap())).collect()
}

/// A process's descriptors and what they lead to.
pub(crate) fn descriptors(pid: u32) -> Vec<(String, PathBuf)> {
    let list = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    list.filter_map(|entry| {
        let entry = entry.unwrap();
        let target = std::fs::read_link(entry.path()).ok()?;
        Some((entry.file_name().into_string().unwrap(), target))
    })
    .collect()
}

/// How a process has `file` open: the flags of each such descriptor.
pub(crate) fn open_flags(pid: u32, file: &Path) -> Vec<i32> {
    let file = file.canonicalize().unwrap();
    let fds = descriptors(pid).into_iter().filter(|(_, target)| *target == file);
    fds.map(|(fd, _)| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        i32::from_str_radix(flags.trim(), 8).unwrap()
    })
    .collect()
}
