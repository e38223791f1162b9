//! The devices against a back end in this process. `hostile` has back ends that do wrong, `virtiofsd` Debian's.

mod back_end;
mod hostile;
mod transport;
mod virtiofsd;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use self::back_end::{BackEnd, PROTOCOL};
use super::*;
use crate::memory::PodRegion;
use crate::virtio::testing::{Buf, Harness, TEST_MEMORY_SIZE, test_memory};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Long enough that only a broken device runs into it.
const WAIT_MS: u16 = 30_000;

fn shared_region(gpa: u64, len: u64) -> PodRegion {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let file = Some(FileOffset::new(file, 0));
    let region = GuestRegionMmap::from_range(GuestAddress(gpa), usize::try_from(len).unwrap(), file).unwrap();
    PodRegion::new(Arc::new(region), None)
}

/// Memory that a back end can map.
fn shared_memory() -> Arc<PodMemory> {
    Arc::new(PodMemory::from_regions(vec![shared_region(0, TEST_MEMORY_SIZE)]).unwrap())
}

fn fs_options(back_end: &BackEnd) -> VhostUserFsOptions {
    VhostUserFsOptions {
        queue_size: 16,
        ..VhostUserFsOptions::new("kataShared".to_owned(), back_end.path.clone())
    }
}

fn harness(device: VhostUser) -> Harness<VhostUser> {
    let mut h = Harness::new(device);
    h.memory = shared_memory();
    h
}

fn fs(back_end: &BackEnd) -> Harness<VhostUser> {
    harness(VhostUser::fs(&fs_options(back_end)).unwrap())
}

/// Sends `text` over `queue` and returns what came back.
fn echo(h: &mut Harness<VhostUser>, queue: usize, text: &[u8]) -> Vec<u8> {
    h.push(
        queue,
        &[Buf::Read(text), Buf::Write(u32::try_from(text.len()).unwrap())],
    );
    h.kick(queue).unwrap();
    wait_for(h, queue)
}

/// Waits for one chain on `queue`, by the interrupts that the device forwards.
fn wait_for(h: &mut Harness<VhostUser>, queue: usize) -> Vec<u8> {
    loop {
        assert!(h.poll_events(WAIT_MS).unwrap(), "no interrupt came");
        let mut done = h.completed(queue);
        if let Some(chain) = done.pop() {
            assert!(done.is_empty());
            return chain.data;
        }
    }
}

#[test]
fn chains_go_to_the_back_end_and_come_back() {
    let back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    assert_eq!(h.device.device_type(), 26);
    let mut config = [0xAA; 44];
    h.device.read_config(0, &mut config);
    assert_eq!(&config[..10], b"kataShared");
    assert!(config[10..36].iter().all(|b| *b == 0));
    assert_eq!(config[36..40], 1u32.to_le_bytes());
    assert_eq!(config[40..], [0; 4]);
    h.activate().unwrap();
    for round in 0..40u8 {
        let (queue, text) = (usize::from(round % 2), [round, 1, 2, 3, 4]);
        assert_eq!(echo(&mut h, queue, &text), [4, 3, 2, 1, round]);
    }
    assert!(h.interrupts(0) + h.interrupts(1) > 0);
    back_end.see(|state| {
        assert!(state.owned);
        assert_eq!(state.chains, 40);
        assert_eq!(state.acked_protocol, PROTOCOL.bits());
        // VERSION_1, INDIRECT_DESC and the protocol's; the harness leaves EVENT_IDX out.
        assert_eq!(state.acked, 1 << 32 | 1 << 30 | 1 << 28);
        assert_eq!(state.tables, 1);
        let [(gpa, len, user)] = state.regions[..] else {
            panic!("one region")
        };
        assert_eq!((gpa, len), (0, TEST_MEMORY_SIZE));
        assert_ne!(user, 0);
    });
}

#[test]
fn an_interrupt_with_a_descriptor_does_not_pass_through_here() {
    let back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    let vector = EventFd::new(0).unwrap();
    h.interrupt(1).set_eventfd(Some(vector.try_clone().unwrap()));
    h.activate().unwrap();
    h.push(1, &[Buf::Read(b"abc"), Buf::Write(3)]);
    h.kick(1).unwrap();
    // Blocks until the back end writes it.
    assert_eq!(vector.read().unwrap(), 1);
    assert_eq!(h.completed(1)[0].data, b"cba");
    assert_eq!((h.interrupts(1), h.device.counters()[0].1), (0, 0));

    // The driver moves the vector: first to one, then to none.
    let other = EventFd::new(0).unwrap();
    h.interrupt(1).set_eventfd(Some(other.try_clone().unwrap()));
    h.device.interrupt_moved(1).unwrap();
    h.push(1, &[Buf::Read(b"de"), Buf::Write(2)]);
    h.kick(1).unwrap();
    assert_eq!(other.read().unwrap(), 1);
    assert_eq!(h.completed(1)[0].data, b"ed");
    h.interrupt(1).set_eventfd(None);
    h.device.interrupt_moved(1).unwrap();
    assert_eq!(echo(&mut h, 1, b"fg"), b"gf");
    assert_eq!(h.interrupts(1), 1);
    // Queues that are not there.
    h.device.interrupt_moved(2).unwrap();
    h.device.on_event(99).unwrap();
}

#[test]
fn a_reset_takes_the_queues_back_and_the_next_driver_gets_them() {
    let back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    h.reset();
    for round in 0..3 {
        h.activate().unwrap();
        assert!(back_end.see(|state| state.rings.iter().all(back_end::Ring::runs)));
        assert_eq!(echo(&mut h, 1, &[round, 7]), [7, round]);
        h.reset();
        assert!(back_end.see(|state| !state.rings.iter().any(back_end::Ring::runs)));
        // Nobody serves it now; the next driver's rings are other ones.
        h.push(1, &[Buf::Read(b"lost"), Buf::Write(4)]);
        h.kick(1).unwrap();
        assert!(h.completed(1).is_empty());
        h.reset();
    }
    assert_eq!(back_end.see(|state| (state.tables, state.chains)), (1, 3));
}

#[test]
fn queues_that_the_driver_leaves_out_are_not_lent() {
    let back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    let queue = h.queues[1].active(1, false);
    let activation = Activation {
        memory: Arc::clone(&h.memory),
        features: h.device.features() | 1 << 32,
        queues: vec![None, Some(queue)],
        config_changed: Arc::clone(&h.config_interrupt) as Arc<_>,
    };
    h.device.activate(activation).unwrap();
    assert_eq!(back_end.see(|s| (s.rings[0].runs(), s.rings[1].runs())), (false, true));
    assert_eq!(echo(&mut h, 1, b"xy"), b"yx");
    h.device.reset();
    assert!(!back_end.see(|s| s.rings[1].runs()));
}

#[test]
fn a_back_end_that_dies_fails_the_device_for_good() {
    let mut back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 0, b"ab"), b"ba");
    back_end.die();
    let error = h.poll_events(WAIT_MS).unwrap_err().to_string();
    let path = back_end.path.display().to_string();
    assert!(error.contains(&path) && error.contains("gone"), "{error}");
    // What the transport does then, and what a driver may try.
    h.device.reset();
    assert!(
        h.device.on_event(0).is_err(),
        "the loop would spin on a descriptor that is always ready"
    );
    let error = h.activate().unwrap_err().to_string();
    assert!(error.contains("not connected to again"), "{error}");
    h.device.reset();
    assert_eq!(h.device.counters()[1], ("back_end_gone", 1));
    assert!(h.device.is_lost());
}

#[test]
fn a_back_end_that_dies_while_a_message_is_under_way() {
    let mut back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    back_end.die();
    let error = h.activate().unwrap_err().to_string();
    assert!(error.contains("SET_FEATURES"), "{error}");
    h.device.reset();
    assert!(h.device.on_event(0).is_err());
}

#[test]
fn private_memory_is_refused_with_the_remedy() {
    let back_end = BackEnd::start(0, 2);
    let mut device = VhostUser::fs(&fs_options(&back_end)).unwrap();
    device.update_memory(&shared_memory()).unwrap();
    let anonymous = test_memory(1 << 20, None);
    let error = device.update_memory(&anonymous).unwrap_err().to_string();
    assert!(error.contains("memory.shared"), "{error}");

    // A file is not enough: a restored pod's is mapped privately.
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let mapping = vm_memory::mmap::MmapRegionBuilder::new(4096)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let private = PodMemory::from_regions(vec![PodRegion::new(Arc::new(region), None)]).unwrap();
    assert!(device.update_memory(&Arc::new(private)).is_err());
}

#[test]
fn regions_come_and_go_while_rings_run() {
    let base = shared_memory();
    let more = |count: u64| {
        let mut regions = vec![(0, TEST_MEMORY_SIZE)];
        regions.extend((0..count).map(|i| (TEST_MEMORY_SIZE + i * 8192, 8192)));
        regions
    };
    let with = |regions: &[(u64, u64)], old: &Arc<PodMemory>| {
        let keep = vm_memory::GuestMemory::iter(old.as_ref());
        assert_eq!(keep.count(), 1);
        let first = first_region(old);
        let new = regions.iter().skip(1).map(|(gpa, len)| shared_region(*gpa, *len));
        let all: Vec<_> = std::iter::once(first).chain(new).collect();
        Arc::new(PodMemory::from_regions(all).unwrap())
    };
    for slots in [true, false] {
        let mut protocol = PROTOCOL;
        protocol.set(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS, slots);
        let back_end = BackEnd::with(0, 2, protocol, Vec::new());
        let mut h = harness(VhostUser::fs(&fs_options(&back_end)).unwrap());
        h.memory = with(&more(0), &base);
        h.activate().unwrap();
        let seven = with(&more(7), &base);
        h.device.update_memory(&seven).unwrap();
        let seen = back_end.see(|s| (s.regions.iter().map(|r| (r.0, r.1)).collect::<Vec<_>>(), s.tables));
        assert_eq!(seen, (more(7), if slots { 1 } else { 2 }));
        assert_eq!(echo(&mut h, 0, b"still"), b"llits");
        let nine = h.device.update_memory(&with(&more(9), &base));
        assert_eq!(nine.is_ok(), slots);
        if slots {
            let mut seen = back_end.see(|s| s.regions.iter().map(|r| (r.0, r.1)).collect::<Vec<_>>());
            seen.sort_unstable();
            assert_eq!(seen, more(9));
            assert_eq!(echo(&mut h, 0, b"more"), b"erom");
            let error = h.device.update_memory(&with(&more(40), &base)).unwrap_err().to_string();
            assert!(error.contains("41 memory regions, the back end takes 32"), "{error}");
        }
    }
}

/// The first region of `memory` once more: the same file.
fn first_region(memory: &Arc<PodMemory>) -> PodRegion {
    let region = vm_memory::GuestMemory::iter(memory.as_ref()).next().unwrap();
    let file = region.shared_file().unwrap().clone();
    let len = usize::try_from(vm_memory::GuestMemoryRegion::len(region)).unwrap();
    let region = GuestRegionMmap::from_range(GuestAddress(0), len, Some(file)).unwrap();
    PodRegion::new(Arc::new(region), None)
}

#[test]
fn a_socket_that_appears_late_is_connected_to_and_one_that_does_not_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let error = VhostUser::fs(&VhostUserFsOptions::new("t".into(), path.clone()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
    assert!(error.contains("start the back end first"), "{error}");

    let binding = path.clone();
    let client = std::thread::spawn(move || frontend::connect(&binding).map(|_| ()));
    let listener = UnixListener::bind(&path).unwrap();
    listener.accept().unwrap();
    client.join().unwrap().unwrap();
}

#[test]
fn a_listener_that_does_not_accept_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let _listener = UnixListener::bind(&path).unwrap();
    // Clients until its backlog is full; a connect that waits would wait for ever now.
    let mut waiting = Vec::new();
    while let Ok(client) = crate::unix_socket::sys::connect(&path) {
        waiting.push(client);
    }
    let error = VhostUser::fs(&VhostUserFsOptions::new("t".into(), path))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("cannot connect"), "{error}");
}

#[test]
fn a_back_end_that_connects() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    // What another monitor left there goes; what is no socket stays.
    drop(UnixListener::bind(&path).unwrap());
    let mut back_end = BackEnd::connecting(&path, 1 << VIRTIO_NET_F_CSUM, 2);
    let options = VhostUserNetOptions {
        server: true,
        ..VhostUserNetOptions::new(path.clone())
    };
    let mut h = harness(VhostUser::net(&options).unwrap());
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 1, b"xyz"), b"zyx");
    assert!(!path.exists(), "one client is all that is waited for");
    back_end.die();
    std::fs::write(&path, "a file").unwrap();
    let error = VhostUser::net(&options).err().unwrap().to_string();
    assert!(error.contains("no back end connects"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");

    let nobody = dir.path().join("nobody");
    let error = frontend::accept(&nobody, std::time::Duration::ZERO).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(!nobody.exists());
}

#[test]
fn options_are_checked_before_anyone_connects() {
    let nowhere = PathBuf::from("/nonexistent/socket");
    let fs = |tag: &str, num_queues, queue_size| {
        let options = VhostUserFsOptions {
            num_queues,
            queue_size,
            ..VhostUserFsOptions::new(tag.to_owned(), nowhere.clone())
        };
        VhostUser::fs(&options).err().unwrap().to_string()
    };
    assert!(fs("", 1, 16).contains("fs tag"));
    assert!(fs(&"x".repeat(37), 1, 16).contains("1 to 36"));
    assert!(fs("a\0b", 1, 16).contains("NUL"));
    assert!(fs("t", 0, 16).contains("fs num_queues=0"));
    assert!(fs("t", 256, 16).contains("fs num_queues=256"));
    assert!(fs("t", 1, 24).contains("fs queue_size=24"));
    let net = |num_queues, mtu| {
        let options = VhostUserNetOptions {
            num_queues,
            mtu,
            ..VhostUserNetOptions::new(nowhere.clone())
        };
        VhostUser::net(&options).err().unwrap().to_string()
    };
    assert!(net(3, None).contains("net num_queues=3"));
    assert!(net(2, Some(67)).contains("net mtu=67"));
}

#[test]
fn fewer_queues_than_asked_for_are_refused() {
    let back_end = BackEnd::start(0, 2);
    let options = VhostUserFsOptions {
        num_queues: 2,
        ..fs_options(&back_end)
    };
    let error = VhostUser::fs(&options).err().unwrap().to_string();
    assert!(error.contains("3 queues are asked for, the back end has 2"), "{error}");
}

/// A disk of 8 sectors in write-back mode, with 9 queues and all features.
fn disk(num_queues: u16) -> (BackEnd, std::result::Result<VhostUser, VhostUserError>) {
    let mut config = vec![0; 60];
    config[0] = 8;
    config[32] = 1;
    config[34] = 9;
    let back_end = BackEnd::with(0xFFFF, 9, PROTOCOL, config);
    let options = VhostUserBlkOptions {
        num_queues,
        queue_size: 16,
        ..VhostUserBlkOptions::new(back_end.path.clone())
    };
    let device = VhostUser::blk(&options);
    (back_end, device)
}

#[test]
fn a_disk_has_the_back_ends_configuration() {
    let (back_end, device) = disk(2);
    let mut h = harness(device.unwrap());
    assert_eq!((h.device.device_type(), h.device.queue_max_sizes()), (2, &[16, 16][..]));
    let mut config = [0; 64];
    h.device.read_config(0, &mut config);
    assert_eq!((config[0], config[32]), (8, 1));
    // The number of queues is what was asked for, and what lies behind the structure is zero.
    assert_eq!((&config[34..36], &config[60..]), (&[2, 0][..], &[0; 4][..]));
    let bit = |b: u32| h.device.features() & 1 << b != 0;
    assert!(
        bit(12) && bit(9) && bit(11) && bit(13) && bit(14),
        "MQ, FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES"
    );
    assert!(!bit(0) && !bit(7) && !bit(15), "features that nothing is known of");

    h.activate().unwrap();
    assert_eq!(echo(&mut h, 1, b"disk"), b"ksid");
    h.device.write_config(32, &[0]);
    h.device.write_config(0, &[9; 40]);
    h.device.write_config(u64::MAX, &[0]);
    h.device.write_config(31, &[5, 1]);
    h.reset();
    h.device.write_config(32, &[2]);
    assert_eq!(
        back_end.see(|s| s.config_writes.clone()),
        [(32, vec![0]), (32, vec![1])]
    );
    h.device.read_config(0, &mut config);
    assert_eq!((config[0], config[32]), (8, 1));
}

#[test]
fn a_reset_restores_the_cache_mode() {
    let (back_end, device) = disk(1);
    let mut device = device.unwrap();
    assert_eq!(device.features() & 1 << 12, 0, "one queue: no MQ");
    device.write_config(32, &[0]);
    device.reset();
    device.reset();
    assert_eq!(
        back_end.see(|s| s.config_writes.clone()),
        [(32, vec![0]), (32, vec![1])]
    );
}

#[test]
fn a_disk_needs_a_configuration() {
    let back_end = BackEnd::with(0, 1, VhostUserProtocolFeatures::MQ, Vec::new());
    let error = VhostUser::blk(&VhostUserBlkOptions::new(back_end.path.clone()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("CONFIG"), "{error}");
    // One that has the feature and refuses: a shorter answer.
    let back_end = BackEnd::with(0, 1, PROTOCOL, vec![1, 2, 3]);
    let error = VhostUser::blk(&VhostUserBlkOptions::new(back_end.path.clone()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("GET_CONFIG"), "{error}");
    // Several queues, and a back end without MQ.
    let back_end = BackEnd::with(0, 4, PROTOCOL, vec![0; 60]);
    let options = VhostUserBlkOptions {
        num_queues: 4,
        ..VhostUserBlkOptions::new(back_end.path.clone())
    };
    let error = VhostUser::blk(&options).err().unwrap().to_string();
    assert!(error.contains("VIRTIO_BLK_F_MQ"), "{error}");
}

#[test]
fn a_network_has_our_mac_and_mtu() {
    let back_end = BackEnd::start(u64::MAX >> 40, 2);
    let options = VhostUserNetOptions {
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: Some(1400),
        offload_ufo: false,
        ..VhostUserNetOptions::new(back_end.path.clone())
    };
    let mut h = harness(VhostUser::net(&options).unwrap());
    let mut config = [0; 16];
    h.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x78, 5, 0, 0, 0, 0]);
    // CSUM, GUEST_CSUM, MTU, MAC, TSO both ways, MRG_RXBUF, STATUS; no UFO (10, 14), no control queue (17, 22).
    let low = h.device.features() & 0xFF_FFFF;
    assert_eq!(low, 0b1_1011_1011_1010_1011 & !(1 << 10));
    assert_eq!(h.device.queue_max_sizes(), [256, 256]);
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 1, b"frame"), b"emarf");
}

#[test]
fn a_network_without_checksums_has_no_segmentation() {
    let back_end = BackEnd::start(u64::MAX >> 40, 2);
    let options = VhostUserNetOptions {
        offload_csum: false,
        ..VhostUserNetOptions::new(back_end.path.clone())
    };
    let device = VhostUser::net(&options).unwrap();
    assert_eq!(device.features() & 0xFF_FFFF, 1 << 15 | 1 << 16, "MRG_RXBUF and STATUS");
}

#[test]
fn the_driver_says_which_pairs_the_back_end_may_use() {
    let back_end = BackEnd::start(1 << VIRTIO_NET_F_CSUM, 6);
    let options = VhostUserNetOptions {
        num_queues: 6,
        queue_size: 16,
        ..VhostUserNetOptions::new(back_end.path.clone())
    };
    let mut h = harness(VhostUser::net(&options).unwrap());
    assert_eq!(h.device.queue_max_sizes(), [16, 16, 16, 16, 16, 16, 64]);
    let bit = |bit: u32| h.device.features() & 1 << bit != 0;
    assert!(bit(VIRTIO_NET_F_MQ) && bit(VIRTIO_NET_F_CTRL_VQ) && !bit(VIRTIO_NET_F_MAC));
    h.activate().unwrap();
    let enabled = || back_end.see(|s| s.rings.iter().map(|r| r.enabled).collect::<Vec<_>>());
    let first = |count| (0..6).map(|i| i < count).collect::<Vec<_>>();
    assert_eq!(enabled(), first(2));
    assert_eq!(
        back_end.see(|s| s.acked & (1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ)),
        0
    );
    for (command, answer, pairs) in [
        (&[4, 0, 3, 0][..], 0, 3),
        (&[4, 0, 1, 0], 0, 1),
        (&[4, 0, 2, 0], 0, 2),
        (&[4, 0, 0, 0], 1, 2),
        (&[4, 0, 4, 0], 1, 2),
        (&[4, 0, 0xFF, 0xFF], 1, 2),
        (&[1, 0, 1], 1, 2),
        (&[], 1, 2),
    ] {
        let mut bufs = vec![Buf::Write(1)];
        if !command.is_empty() {
            bufs.insert(0, Buf::Read(command));
        }
        h.push(6, &bufs);
        h.kick(6).unwrap();
        let done = h.completed(6);
        assert_eq!(
            (done.len(), done[0].len, &done[0].data[..]),
            (1, 1, &[answer][..]),
            "{command:?}"
        );
        assert_eq!(enabled(), first(2 * pairs), "{command:?}");
    }
    assert_eq!(echo(&mut h, 3, b"pair two"), b"owt riap");
    h.reset();
    h.activate().unwrap();
    assert_eq!(enabled(), first(2));
    // A back end that dies in a command.
    drop(back_end);
    h.push(6, &[Buf::Read(&[4, 0, 2, 0]), Buf::Write(1)]);
    assert!(h.kick(6).is_err());
}

#[test]
fn unused_descriptors_are_quiet() {
    let back_end = BackEnd::start(0, 2);
    let mut h = fs(&back_end);
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 0, b"a"), b"a");
    h.device.reset();
    assert!(!h.poll_events(0).unwrap());
}
