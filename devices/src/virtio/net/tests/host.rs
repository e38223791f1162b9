//! With a real TAP interface, in a network namespace that the test makes for its thread. Needs /dev/net/tun and the
//! right to make one (root); says so and passes where there is none.
#![expect(unsafe_code, reason = "namespaces and packet sockets have no safe wrapper")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::FromRawFd;

use super::*;

/// Moves this thread into a network namespace of its own; false, and says why, where that cannot be.
fn own_namespace() -> bool {
    // SAFETY: takes no pointers; only this thread's view of the network changes.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        eprintln!("skipped: no network namespace: {}", io::Error::last_os_error());
        return false;
    }
    if let Err(error) = File::open("/dev/net/tun") {
        eprintln!("skipped: /dev/net/tun: {error}");
        return false;
    }
    // No neighbour discovery among the frames of the tests.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    true
}

/// A packet socket on `interface` for frames of the local experimental EtherType.
fn packet_socket(interface: &str) -> File {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let protocol = ETHERTYPE.to_be();
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: `name` is a C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0);
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: `address` is a sockaddr_ll of this length.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    // SAFETY: `fd` was just made and nobody else has it.
    unsafe { File::from_raw_fd(fd) }
}

const ETHERTYPE: u16 = 0x88B5;

/// An Ethernet frame to everybody, of `len` bytes.
fn ethernet(seed: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0xFF; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((14..len).map(|i| seed.wrapping_add((i % 251) as u8)));
    frame
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN], frame].concat()
}

fn receive(h: &mut Harness<Net>, queue: usize) -> Vec<Vec<u8>> {
    settle(h);
    received(h, queue)
        .into_iter()
        .map(|(bytes, _)| bytes[HEADER_LEN..].to_vec())
        .collect()
}

#[test]
fn an_interface_by_name_is_set_up_and_carries_frames() {
    if !own_namespace() {
        return;
    }
    let host = HostInterface {
        name: Some("pod0".to_owned()),
        mac: Some([2, 0, 0, 0, 0, 1]),
        address: Some(("192.168.249.1".parse().unwrap(), "255.255.255.0".parse().unwrap())),
    };
    let options = NetOptions {
        mtu: Some(9000),
        ..options()
    };
    let mut h = Harness::new(Net::open(&options, &host).unwrap());
    assert_eq!(h.device.interface(), "pod0");
    let mut mtu = [0; 2];
    h.device.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 9000);
    h.activate().unwrap();
    let mut packets = packet_socket("pod0");
    // To the host, small and jumbo.
    for len in [60, 9000] {
        h.push(TX, &[Buf::Read(&with_header(&ethernet(1, len)))]);
        h.kick(TX).unwrap();
        let mut got = vec![0; 10_000];
        let n = packets.read(&mut got).unwrap();
        assert!(got[..n] == ethernet(1, len));
    }
    assert_eq!(h.used(TX).len(), 2);
    // To the driver: the second frame needs six buffers, for which it waits.
    for _ in 0..4 {
        h.push(RX, &[Buf::Write(1536)]);
    }
    h.kick(RX).unwrap();
    packets.write_all(&ethernet(2, 60)).unwrap();
    packets.write_all(&ethernet(3, 9000)).unwrap();
    assert_eq!(receive(&mut h, RX), [ethernet(2, 60)]);
    for _ in 0..4 {
        h.push(RX, &[Buf::Write(1536)]);
    }
    h.kick(RX).unwrap();
    assert!(receive(&mut h, RX) == [ethernet(3, 9000)]);
    // The address works: a frame that the host's own stack made.
    let socket = UdpSocket::bind("192.168.249.1:0").unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(b"hello pod", "192.168.249.255:9").unwrap();
    h.push(RX, &[Buf::Write(1536)]);
    h.push(RX, &[Buf::Write(1536)]);
    h.kick(RX).unwrap();
    let frames = receive(&mut h, RX);
    assert!(
        frames
            .iter()
            .any(|f| f.ends_with(b"hello pod") && f[6..12] == [2, 0, 0, 0, 0, 1])
    );
    // A header that the kernel refuses loses that frame only.
    let mut bad = with_header(&ethernet(1, 60));
    bad[..8].fill(0xFF);
    h.push(TX, &[Buf::Read(&bad)]);
    h.kick(TX).unwrap();
    assert_eq!((h.used(TX).len(), count(&h, "tx_dropped")), (1, 1));
}

#[test]
fn an_interface_that_is_there_keeps_its_address() {
    if !own_namespace() {
        return;
    }
    let mask: IpAddr = "255.255.255.0".parse().unwrap();
    let mut host = HostInterface {
        name: Some("kept0".to_owned()),
        address: Some(("10.9.8.7".parse().unwrap(), mask)),
        ..HostInterface::default()
    };
    // The first queue of several makes it.
    let several = NetOptions {
        num_queues: 4,
        ..options()
    };
    let first = Net::open(&several, &host).unwrap();
    host.address = Some(("192.168.249.1".parse().unwrap(), mask));
    let second = Net::open(&several, &host).unwrap();
    assert_eq!(second.interface(), "kept0");
    assert!(UdpSocket::bind("10.9.8.7:0").is_ok());
    assert!(UdpSocket::bind("192.168.249.1:0").is_err());
    // It went with its last queue, and is made anew.
    drop((first, second));
    let _anew = Net::open(&several, &host).unwrap();
    assert!(UdpSocket::bind("192.168.249.1:0").is_ok());
}

#[test]
fn an_ipv6_address_is_taken_and_a_mixed_one_refused() {
    if !own_namespace() {
        return;
    }
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "0");
    let v6: IpAddr = "fd00::1".parse().unwrap();
    let mut host = HostInterface {
        address: Some((v6, "ffff:ffff:ffff:ffff::".parse().unwrap())),
        ..HostInterface::default()
    };
    if fs::metadata("/proc/sys/net/ipv6").is_ok() {
        let device = Net::open(&options(), &host).unwrap();
        let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        assert!(
            addresses.contains("fd000000000000000000000000000001") && addresses.contains(device.interface()),
            "{addresses}"
        );
    } else {
        eprintln!("skipped: no IPv6 in this kernel");
    }
    host.address = Some((v6, "255.255.255.0".parse().unwrap()));
    let error = Net::open(&options(), &host).err().unwrap().to_string();
    assert!(
        error.contains("setting its address") && error.contains("two IP versions"),
        "{error}"
    );
}

#[test]
fn descriptors_are_taken_as_they_are_and_queues_attached_as_used() {
    if !own_namespace() {
        return;
    }
    let open = || Tap::open(Some("pod1"), true).unwrap();
    let queues = [open(), open(), open()];
    Interface::new("pod1").unwrap().up().unwrap();
    let fds = queues.map(|tap| OwnedFd::from(tap.into_file())).into();
    let options = NetOptions {
        num_queues: 6,
        queue_size: 128,
        ..options()
    };
    let mut h = Harness::new(Net::from_fds(&options, fds).unwrap());
    let mut packets = packet_socket("pod1");
    for count in [1_u16, 3, 2, 1, 3] {
        h.activate().unwrap();
        if count > 1 {
            h.push(6, &[Buf::Read(&[4, 0]), Buf::Read(&count.to_le_bytes()), Buf::Write(1)]);
            h.kick(6).unwrap();
            assert_eq!(h.completed(6)[0].data, [0]);
        }
        for pair in 0..3 {
            for _ in 0..64 {
                h.push(2 * pair, &[Buf::Write(1536)]);
            }
            h.kick(2 * pair).unwrap();
        }
        // Whatever queue the kernel chooses, every frame arrives.
        for seed in 0..30 {
            packets.write_all(&ethernet(seed, 60)).unwrap();
        }
        let mut got: Vec<_> = (0..3).map(|pair| receive(&mut h, 2 * pair)).collect();
        for unused in got.split_off(usize::from(count)) {
            assert!(unused.is_empty());
        }
        let mut seeds: Vec<u8> = got.into_iter().flatten().map(|f| f[14].wrapping_sub(14)).collect();
        seeds.sort_unstable();
        assert!(seeds.into_iter().eq(0..30));
        // Each pair in use sends.
        for pair in 0..count {
            h.push(2 * usize::from(pair) + 1, &[Buf::Read(&with_header(&ethernet(9, 80)))]);
            h.kick(2 * usize::from(pair) + 1).unwrap();
            let mut frame = [0; 100];
            assert_eq!(packets.read(&mut frame).unwrap(), 80);
        }
        h.reset();
    }
}

#[test]
fn an_interface_that_is_taken_or_of_another_kind_is_named() {
    if !own_namespace() {
        return;
    }
    let host = HostInterface {
        name: Some("pod2".to_owned()),
        ..HostInterface::default()
    };
    let device = Net::open(&options(), &host).unwrap();
    let error = Net::open(&options(), &host).err().unwrap().to_string();
    assert!(error.starts_with("net tap=pod2: cannot open queue 0: "), "{error}");
    assert!(error.ends_with("; someone else uses it"), "{error}");
    drop(device);
    let long = HostInterface {
        name: Some("a-name-of-16-byte".to_owned()),
        ..HostInterface::default()
    };
    let error = Net::open(&options(), &long).err().unwrap().to_string();
    assert!(error.contains("at most 15 bytes"), "{error}");
    let single = Tap::open(Some("pod3"), false).unwrap();
    let two = NetOptions {
        num_queues: 4,
        ..options()
    };
    let error = Net::from_fds(
        &two,
        vec![
            OwnedFd::from(single.into_file()),
            File::open("/dev/null").unwrap().into(),
        ],
    );
    let error = error.err().unwrap().to_string();
    assert!(
        error.starts_with("net fds[0]: ") && error.contains("IFF_MULTI_QUEUE"),
        "{error}"
    );
}

#[test]
fn an_interface_that_vanishes_leaves_the_loop_quiet() {
    if !own_namespace() {
        return;
    }
    let host = HostInterface {
        name: Some("pod4".to_owned()),
        ..HostInterface::default()
    };
    let mut h = Harness::new(Net::open(&options(), &host).unwrap());
    h.activate().unwrap();
    h.push(RX, &[Buf::Write(2000)]);
    h.kick(RX).unwrap();
    settle(&mut h);
    let deleted = std::process::Command::new("ip")
        .args(["link", "delete", "pod4"])
        .status();
    if !deleted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no ip command");
        return;
    }
    settle(&mut h);
    assert_eq!(count(&h, "rx_errors"), 1);
    h.push(TX, &[Buf::Read(&with_header(&ethernet(1, 60)))]);
    h.kick(TX).unwrap();
    settle(&mut h);
    assert_eq!((h.used(TX).len(), count(&h, "tx_dropped")), (1, 1));
}
