//! The command line's spelling, as Cloud Hypervisor and ch-remote write it.

use super::from_options;
use crate::types::*;
use proptest::prelude::*;

#[test]
fn the_options_of_the_command_line() {
    let cpus: CpusConfig =
        from_options("boot=2,max=4,topology=1:4:1:1,affinity=[0@[0,2-3],1@[4]],features=amx").unwrap();
    assert_eq!(
        (
            cpus.boot_vcpus,
            cpus.max_vcpus,
            cpus.topology.unwrap().cores_per_die,
            cpus.features.amx
        ),
        (2, 4, 4, true)
    );
    let affinity = cpus.affinity.unwrap();
    assert_eq!(
        (affinity[0].host_cpus.as_slice(), affinity[1].vcpu),
        ([0, 2, 3].as_slice(), 1)
    );
    assert_eq!(from_options::<CpusConfig>("boot=3").unwrap().max_vcpus, 3);

    let memory: MemoryConfig =
        from_options("size=512M,shared=on,hotplug_method=virtio-mem,hotplug_size=1T,thp=off").unwrap();
    assert_eq!(
        (memory.size, memory.shared, memory.thp, memory.hotplug_size),
        (512 << 20, true, false, Some(1 << 40))
    );
    assert_eq!(memory.hotplug_method, HotplugMethod::VirtioMem);

    let disk: DiskConfig = from_options(
        "path=/x.img,readonly=on,direct=true,num_queues=4,queue_size=256,id=d,serial=s,image_type=raw,bw_size=1M,bw_refill_time=100,queue_affinity=[3@[1]]",
    )
    .unwrap();
    assert_eq!(
        (
            disk.readonly,
            disk.direct,
            disk.num_queues,
            disk.queue_size,
            disk.image_type
        ),
        (true, true, 4, 256, ImageType::Raw)
    );
    assert_eq!(disk.rate_limiter_config.unwrap().bandwidth.unwrap().size, 1 << 20);
    assert_eq!(disk.queue_affinity.unwrap()[0].queue_index, 3);
    let nested: DiskConfig = from_options("path=/x,rate_limiter_config=<ops=<size=10,refill_time=1000>>").unwrap();
    assert_eq!(nested.rate_limiter_config.unwrap().ops.unwrap().refill_time, 1000);

    let fs: FsConfig = from_options("tag=T,shared_dir=/d,readonly").unwrap();
    assert!(fs.readonly && fs.socket.is_none() && fs.queue_size == 1024);
    let vsock: VsockConfig = from_options("cid=3,socket=/x,id=v").unwrap();
    assert_eq!(
        (vsock.cid, vsock.socket.to_str(), vsock.id.as_deref()),
        (3, Some("/x"), Some("v"))
    );
    let platform: PlatformConfig =
        from_options("num_pci_segments=2,sev_snp=on,iommu_segments=[0,1],oem_strings=[\"a,b\",c]").unwrap();
    assert_eq!(
        (platform.isolation(), platform.oem_strings.unwrap()),
        (Isolation::Snp, vec!["a,b".to_owned(), "c".to_owned()])
    );
    let emulated: PlatformConfig = from_options("isolation=snp-emulated").unwrap();
    assert_eq!(emulated.isolation, Some(Isolation::SnpEmulated));
    let pod: PodConfig = from_options("handler=kata-cc,memory_limit=512Mi,cpu_limit=1500m").unwrap();
    assert_eq!(
        (pod.handler.as_str(), pod.cpu_limit.unwrap().0.as_str()),
        ("kata-cc", "1500m")
    );
    assert_eq!(
        from_options::<RngConfig>("src=/dev/random").unwrap().src.to_str(),
        Some("/dev/random")
    );
}

#[test]
fn consoles_by_a_bare_word() {
    for (text, mode) in [
        ("off", ConsoleMode::Off),
        ("null", ConsoleMode::Null),
        ("tty", ConsoleMode::Tty),
        ("pty", ConsoleMode::Pty),
    ] {
        assert_eq!(from_options::<SerialConfig>(text).unwrap().mode, mode);
        assert_eq!(from_options::<ConsoleConfig>(text).unwrap().mode, mode);
    }
    let file: SerialConfig = from_options("file=/p").unwrap();
    assert_eq!(
        (file.mode, file.file.unwrap().to_str()),
        (ConsoleMode::File, Some("/p"))
    );
    assert_eq!(
        from_options::<ConsoleConfig>("socket=/p").unwrap().mode,
        ConsoleMode::Socket
    );
    assert_eq!(
        from_options::<ConsoleConfig>("tty,iommu=on").map(|c| (c.mode, c.iommu)),
        Ok((ConsoleMode::Tty, true))
    );
    assert!(
        from_options::<SerialConfig>("loud")
            .unwrap_err()
            .to_string()
            .contains("loud")
    );
}

#[test]
fn quotes_keep_commas_and_brackets() {
    let disk: DiskConfig = from_options(r#"path="/a,b[<",id=x"#).unwrap();
    assert_eq!(
        (disk.path.unwrap().to_str(), disk.id.as_deref()),
        (Some("/a,b[<"), Some("x"))
    );
}

#[test]
fn errors_name_key_value_and_what_is_accepted() {
    let rows: [(Result<(), super::OptionsError>, &[&str]); 9] = [
        (
            from_options::<DiskConfig>("pth=/x").map(drop),
            &["pth", "accepted are", "path", "readonly"],
        ),
        (from_options::<CpusConfig>("boots=1").map(drop), &["boots", "boot"]),
        (
            from_options::<DiskConfig>("readonly=yes").map(drop),
            &["readonly: ", "`yes`", "on, off, true, false"],
        ),
        (
            from_options::<MemoryConfig>("size=512X").map(drop),
            &["size: ", "`512X`", "K, M, G or T"],
        ),
        (
            from_options::<MemoryConfig>("size=99999999999T").map(drop),
            &["size: ", "2^64"],
        ),
        (
            from_options::<SerialConfig>("mode=loud").map(drop),
            &["mode: ", "`loud`", "Off", "Tty"],
        ),
        (
            from_options::<DiskConfig>("id=a,id=b").map(drop),
            &["`id` is given twice"],
        ),
        (
            from_options::<DiskConfig>("path=/a[").map(drop),
            &["bracket is not closed"],
        ),
        (
            from_options::<CpusConfig>("topology=1:2").map(drop),
            &["topology: ", "threads:cores:dies:packages"],
        ),
    ];
    for (result, parts) in rows {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    assert!(from_options::<FsConfig>("tag").is_err() && from_options::<VsockConfig>("").is_err());
}

proptest! {
    /// What is written as options is read back, whatever characters the values hold (but the quote, which quotes).
    #[test]
    fn disks_round_trip(path in "/[ -!#-~]{0,40}", id in "[a-z0-9_]{1,9}", readonly: bool, queues in 1usize..64, size in 1u16..1024) {
        let text = format!("path=\"{path}\",id={id},readonly={},num_queues={queues},queue_size={size}", if readonly { "on" } else { "off" });
        let disk: DiskConfig = from_options(&text).unwrap();
        let want = DiskConfig { path: Some(path.trim().into()), id: Some(id), readonly, num_queues: queues, queue_size: size, ..Default::default() };
        prop_assert_eq!(disk, want);
    }

    #[test]
    fn nothing_panics(text in "[a-z_=,<>\\[\\]\"@0-9:KMGT -]{0,60}") {
        let _ = from_options::<CpusConfig>(&text);
        let _ = from_options::<DiskConfig>(&text);
        let _ = from_options::<PlatformConfig>(&text);
        let _ = from_options::<ConsoleConfig>(&text);
    }
}

#[test]
fn descriptors_stand_beside_the_types_own_keys() {
    let (net, fds): (crate::types::NetConfig, _) =
        crate::from_options_with_fds("fd=[5,6],num_queues=4,mac=02:00:00:00:00:01").unwrap();
    assert_eq!((fds, net.num_queues), (vec![5, 6], 4));
    let one = crate::from_options_with_fds::<crate::types::NetConfig>("fd=7").unwrap();
    assert_eq!(one.1, [7]);
    let none = crate::from_options_with_fds::<crate::types::NetConfig>("tap=x").unwrap();
    assert!(none.1.is_empty());
    for text in ["fd=x", "fd=[3,2]", "fd=-1"] {
        let error = crate::from_options_with_fds::<crate::types::NetConfig>(text).unwrap_err();
        assert!(error.to_string().contains("fd"), "{error}");
    }
    // Where it has no meaning it is a key that nobody knows.
    assert!(crate::from_options::<crate::types::NetConfig>("fd=7").is_err());
}
