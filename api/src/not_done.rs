//! What Cloud Hypervisor's configuration can ask for and podvisor will not do: one table, by which a configuration is
//! refused, the command line's options are refused, and which `docs/api.md` shows. Refused endpoints are in
//! [`crate::endpoints`]; what is only not done yet is the monitor's to say.

use crate::types::{CpuProfile, ImageType, VmConfig};

/// Something that podvisor will not do.
#[derive(Clone, Copy)]
pub struct NotDone {
    /// The field of the configuration that asks for it.
    pub field: &'static str,
    /// Cloud Hypervisor's command-line option for it, if it has one of its own.
    pub option: Option<&'static str>,
    /// Why not, or what to do instead.
    pub why: &'static str,
    asked: fn(&VmConfig) -> Vec<Asked>,
}

/// Where a configuration asks for it: the path of the field, and the value there.
type Asked = (String, String);

/// The table.
pub const NOT_DONE: &[NotDone] = &[
    NotDone {
        field: "cpus.kvm_hyperv",
        option: None,
        why: "Hyper-V's interfaces are for guests that are no pods; leave it out",
        asked: |config| flag("cpus.kvm_hyperv", config.cpus.kvm_hyperv),
    },
    NotDone {
        field: "cpus.features.amx",
        option: None,
        why: "AMX is not given to pods; leave it out",
        asked: |config| flag("cpus.features.amx", config.cpus.features.amx),
    },
    NotDone {
        field: "cpus.profile",
        option: None,
        why: "the guest is shown the host's processor; leave it out",
        asked: |config| match &config.cpus.profile {
            CpuProfile::Host => Vec::new(),
            CpuProfile::Named(name) => vec![("cpus.profile".to_owned(), shown(name))],
        },
    },
    NotDone {
        field: "payload.fw_cfg_config",
        option: Some("--fw-cfg-config"),
        why: "there is no fw_cfg device; an IGVM image or a kernel says everything that boots",
        asked: |config| {
            let asked = config.payload.as_ref().and_then(|p| p.fw_cfg_config.as_ref());
            value("payload.fw_cfg_config", asked)
        },
    },
    NotDone {
        field: "platform.tdx",
        option: None,
        why: "Intel TDX is not supported; leave it out, or give isolation \"snp\"",
        asked: |config| flag("platform.tdx", config.platform.as_ref().is_some_and(|p| p.tdx)),
    },
    NotDone {
        field: "platform.iommu_segments",
        option: None,
        why: "there is no virtual IOMMU; leave it out",
        asked: |config| {
            let segments = config.platform.as_ref().and_then(|p| p.iommu_segments.as_ref());
            let asked = segments.filter(|s| !s.is_empty()).map(|s| format!("{s:?}"));
            asked
                .map(|v| ("platform.iommu_segments".to_owned(), v))
                .into_iter()
                .collect()
        },
    },
    NotDone {
        field: "platform.serial_number, uuid, oem_strings",
        option: None,
        why: "the guest is shown no SMBIOS tables; hand it such data in the kernel's command line or a file system",
        asked: smbios,
    },
    NotDone {
        field: "iommu",
        option: None,
        why: "there is no virtual IOMMU; leave it out",
        asked: |config| flag("iommu", config.iommu),
    },
    NotDone {
        field: "iommu of a device",
        option: None,
        why: "there is no virtual IOMMU for it to be behind; leave it out",
        asked: behind_iommu,
    },
    NotDone {
        field: "disks[].image_type Qcow2, FixedVhd, Vhdx",
        option: None,
        why: "disks are raw images or block devices; convert it (qemu-img convert -O raw)",
        asked: |config| {
            let disks = config.disks().iter().enumerate();
            let other = disks.filter(|(_, d)| !matches!(d.image_type, ImageType::Raw | ImageType::Unknown));
            other
                .map(|(at, d)| (format!("disks[{at}].image_type"), format!("{:?}", d.image_type)))
                .collect()
        },
    },
    NotDone {
        field: "disks[].backing_files",
        option: None,
        why: "raw images have no backing files; leave it out",
        asked: |config| {
            let disks = config.disks().iter().enumerate().filter(|(_, d)| d.backing_files);
            disks
                .map(|(at, _)| (format!("disks[{at}].backing_files"), "true".to_owned()))
                .collect()
        },
    },
    NotDone {
        field: "devices",
        option: Some("--device"),
        why: "VFIO devices are not given to pods; give the pod a virtio device",
        asked: |config| {
            let devices = config.devices().iter().enumerate();
            devices
                .map(|(at, d)| (format!("devices[{at}].path"), shown(&d.path.to_string_lossy())))
                .collect()
        },
    },
    NotDone {
        field: "user_devices",
        option: Some("--user-device"),
        why: "vfio-user devices are not given to pods; give the pod a virtio device",
        asked: |config| list("user_devices", config.user_devices.as_deref()),
    },
    NotDone {
        field: "vdpa",
        option: Some("--vdpa"),
        why: "vDPA devices are not given to pods; use net or disks",
        asked: |config| list("vdpa", config.vdpa.as_deref()),
    },
    NotDone {
        field: "generic_vhost_user",
        option: Some("--generic-vhost-user"),
        why: "a device of unknown kind cannot be checked; use disks, net or fs with a socket",
        asked: |config| list("generic_vhost_user", config.generic_vhost_user.as_deref()),
    },
    NotDone {
        field: "ivshmem",
        option: Some("--ivshmem"),
        why: "memory is not shared between pods; use fs or vsock",
        asked: |config| value("ivshmem", config.ivshmem.as_ref()),
    },
    NotDone {
        field: "tpm",
        option: Some("--tpm"),
        why: "there is no TPM; a confidential pod attests itself with reports of the processor",
        asked: |config| value("tpm", config.tpm.as_ref()),
    },
    NotDone {
        field: "numa",
        option: Some("--numa"),
        why: "a pod is one NUMA node; leave it out",
        asked: |config| list("numa", config.numa.as_deref()),
    },
];

impl NotDone {
    /// Where `config` asks for it: the paths of the fields, and the values there.
    #[must_use]
    pub fn asked(&self, config: &VmConfig) -> Vec<(String, String)> {
        (self.asked)(config)
    }
}

impl std::fmt::Debug for NotDone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NotDone")
            .field("field", &self.field)
            .finish_non_exhaustive()
    }
}

/// A value as a refusal shows it.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

fn flag(field: &str, asked: bool) -> Vec<Asked> {
    asked
        .then(|| (field.to_owned(), "true".to_owned()))
        .into_iter()
        .collect()
}

fn value(field: &str, value: Option<&serde_json::Value>) -> Vec<Asked> {
    value
        .map(|v| (field.to_owned(), shown(&v.to_string())))
        .into_iter()
        .collect()
}

/// An absent list and an empty one ask for nothing.
fn list(field: &str, list: Option<&[serde_json::Value]>) -> Vec<Asked> {
    let first = list.and_then(<[_]>::first);
    first
        .map(|v| (format!("{field}[0]"), shown(&v.to_string())))
        .into_iter()
        .collect()
}

fn smbios(config: &VmConfig) -> Vec<Asked> {
    let Some(platform) = &config.platform else {
        return Vec::new();
    };
    let strings = platform.oem_strings.as_ref().filter(|s| !s.is_empty());
    let fields = [
        ("serial_number", platform.serial_number.clone()),
        ("uuid", platform.uuid.clone()),
        ("oem_strings", strings.map(|s| format!("{s:?}"))),
    ];
    let given = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
    given
        .map(|(name, value)| (format!("platform.{name}"), shown(&value)))
        .collect()
}

fn behind_iommu(config: &VmConfig) -> Vec<Asked> {
    fn of<T>(name: &str, list: &[T], iommu: impl Fn(&T) -> bool) -> Vec<Asked> {
        let asked = list.iter().enumerate().filter(|(_, device)| iommu(device));
        asked
            .map(|(at, _)| (format!("{name}[{at}].iommu"), "true".to_owned()))
            .collect()
    }
    let mut all = of("disks", config.disks(), |d| d.iommu);
    all.extend(of("net", config.net(), |d| d.iommu));
    all.extend(of("pmem", config.pmem(), |d| d.iommu));
    all.extend(flag("rng.iommu", config.rng.iommu));
    all.extend(flag("console.iommu", config.console.iommu));
    all.extend(flag("vsock.iommu", config.vsock.as_ref().is_some_and(|v| v.iommu)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Stage, from_json};

    /// What asks for each row, in the order of the table.
    const ASKING: &[&str] = &[
        r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":true}}"#,
        r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"features":{"amx":true}}}"#,
        r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"profile":"Skylake"}}"#,
        r#"{"payload":{"kernel":"/k","fw_cfg_config":{"e820":true}}}"#,
        r#"{"platform":{"tdx":true}}"#,
        r#"{"platform":{"iommu_segments":[0]}}"#,
        r#"{"platform":{"oem_strings":["x"]}}"#,
        r#"{"iommu":true}"#,
        r#"{"vsock":{"cid":3,"socket":"/s","iommu":true}}"#,
        r#"{"disks":[{"path":"/a"},{"path":"/b","image_type":"Qcow2"}]}"#,
        r#"{"disks":[{"path":"/b","backing_files":true}]}"#,
        r#"{"devices":[{"path":"/sys/bus/pci/devices/0000:01:00.0"}]}"#,
        r#"{"user_devices":[{"socket":"/s"}]}"#,
        r#"{"vdpa":[{"path":"/dev/vhost-vdpa-0"}]}"#,
        r#"{"generic_vhost_user":[{"socket":"/s"}]}"#,
        r#"{"ivshmem":{"path":"/x","size":4096}}"#,
        r#"{"tpm":{"socket":"/s"}}"#,
        r#"{"numa":[{"guest_numa_id":0}]}"#,
    ];

    #[test]
    fn each_row_refuses_what_asks_for_it_and_nothing_else_does() {
        assert_eq!(ASKING.len(), NOT_DONE.len());
        for (row, text) in NOT_DONE.iter().zip(ASKING) {
            let config: VmConfig = from_json(text.as_bytes()).unwrap();
            let asked: Vec<_> = NOT_DONE.iter().filter(|r| !r.asked(&config).is_empty()).collect();
            assert_eq!(asked.len(), 1, "{text}: {asked:?}");
            assert_eq!(asked[0].field, row.field, "{text}");
            let (field, value) = row.asked(&config).remove(0);
            let error = config.validate(Stage::Create).unwrap_err().to_string();
            assert_eq!(error, format!("{field}: {value}: {}", row.why));
        }
    }

    #[test]
    fn what_the_shims_always_send_asks_for_nothing() {
        let text = br#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"features":{"amx":false}},
            "platform":{"tdx":false,"iommu_segments":null},"iommu":false,"devices":[],"numa":null,"tpm":null,"vdpa":[],
            "disks":[{"path":"/a","image_type":"Unknown","backing_files":false,"iommu":false}],"ivshmem":null,
            "payload":{"kernel":"/k","fw_cfg_config":null},"vsock":{"cid":3,"socket":"/s","iommu":false}}"#;
        let config: VmConfig = from_json(text).unwrap();
        assert!(NOT_DONE.iter().all(|row| row.asked(&config).is_empty()));
    }
}
