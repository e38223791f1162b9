//! Devices that another process serves over vhost-user: that process has to map all of the pod's memory.

use std::path::Path;

use super::Findings;
use super::devices::socket_path;
use crate::types::{Isolation, MemoryConfig, VmConfig};

/// A vhost-user section needs a socket, and a socket a path that can be.
pub(super) fn socket(field: &str, vhost_user: bool, socket: Option<&str>, found: &mut Findings) {
    if vhost_user && socket.is_none_or(str::is_empty) {
        found.add(
            format!("{field}.vhost_socket"),
            "is missing beside vhost_user; give the server's socket",
        );
    }
    if let Some(socket) = socket {
        socket_path(&format!("{field}.vhost_socket"), Path::new(socket), found);
    }
}

/// The field by which a configuration first asks for vhost-user.
fn asked(config: &VmConfig) -> Option<String> {
    let disk = config.disks().iter().position(|disk| disk.vhost_user);
    let net = config.net().iter().position(|net| net.vhost_user);
    let fs = config.fs().iter().position(|fs| fs.socket.is_some());
    disk.map(|at| format!("disks[{at}].vhost_user"))
        .or_else(|| net.map(|at| format!("net[{at}].vhost_user")))
        .or_else(|| fs.map(|at| format!("fs[{at}].socket")))
}

/// Whether another process can map the memory, by Cloud Hypervisor's rule.
fn mappable(memory: &MemoryConfig) -> bool {
    let zones = memory.zones.as_deref().unwrap_or_default();
    if memory.shared || memory.hugepages {
        return true;
    }
    memory.size == 0 && !zones.is_empty() && zones.iter().all(|zone| zone.shared || zone.hugepages)
}

/// vhost-user and the memory that it needs.
pub(super) fn memory(config: &VmConfig, found: &mut Findings) {
    let Some(field) = asked(config) else { return };
    if !mappable(&config.memory) {
        found.add(
            "memory.shared",
            format!("is false, but {field} has another process map the memory; give true"),
        );
    }
    if config.isolation() != Isolation::None {
        found.add(
            field,
            "vhost-user is refused for a confidential pod: its back end cannot be held to shared pages; use a device \
             that this monitor serves itself (fs: shared_dir, disks: path, net: tap)",
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn refused(config: &Value) -> Vec<String> {
        let config: VmConfig = crate::from_json(config.to_string().as_bytes()).unwrap();
        let mut found = Findings(Vec::new());
        memory(&config, &mut found);
        found.0.into_iter().map(|error| error.to_string()).collect()
    }

    #[test]
    fn the_memory_has_to_be_mappable() {
        let shims = json!({"fs": [{"tag": "kataShared", "socket": "/s"}], "memory": {"size": 1 << 30, "shared": true}});
        assert!(refused(&shims).is_empty());
        for (section, field) in [
            (json!({"fs": [{"tag": "t", "socket": "/s"}]}), "fs[0].socket"),
            (
                json!({"disks": [{"path": "/d"}, {"vhost_user": true, "vhost_socket": "/s"}]}),
                "disks[1].vhost_user",
            ),
            (
                json!({"net": [{"vhost_user": true, "vhost_socket": "/s"}]}),
                "net[0].vhost_user",
            ),
        ] {
            for (memory, fine) in [
                (json!({"size": 1 << 30}), false),
                (json!({"size": 1 << 30, "shared": true}), true),
                (json!({"size": 1 << 30, "hugepages": true}), true),
                (
                    json!({"size": 0, "zones": [{"id": "a", "size": 1 << 30, "shared": true}]}),
                    true,
                ),
                (json!({"size": 0, "zones": [{"id": "a", "size": 1 << 30}]}), false),
            ] {
                let mut config = section.clone();
                config["memory"] = memory;
                let said = refused(&config);
                assert_eq!(said.is_empty(), fine, "{config}: {said:?}");
                assert!(
                    fine || said[0].starts_with("memory.shared: ") && said[0].contains(field),
                    "{said:?}"
                );
            }
        }
        // Nobody else is asked for it.
        assert!(refused(&json!({"fs": [{"tag": "t", "shared_dir": "/d"}], "disks": [{"path": "/d"}]})).is_empty());
    }

    #[test]
    fn a_confidential_pod_has_no_back_ends() {
        let config = json!({
            "fs": [{"tag": "t", "socket": "/s"}], "memory": {"size": 1 << 30, "shared": true},
            "platform": {"isolation": "snp-emulated"},
        });
        let said = refused(&config);
        assert!(said.len() == 1 && said[0].starts_with("fs[0].socket: "), "{said:?}");
    }
}
