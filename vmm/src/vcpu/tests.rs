//! vCPU threads against real-mode guests of a few bytes.

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{GuestRam, RamOptions};

/// Records what the guest does; IN gives 0x5A, OUT to port 0x60 ends the guest.
struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>, Arc<ExitSignal>);

impl GuestIo for Recorder {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0x5A);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        lock(&self.0).push((port.into(), data.to_vec()));
        if port == 0x60 {
            self.1.give(PodExit::Shutdown);
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x11);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        lock(&self.0).push((gpa, data.to_vec()));
    }
}

struct Guest {
    vcpus: Option<Vcpus>,
    exit: Arc<ExitSignal>,
    io: Arc<Recorder>,
    _ram: GuestRam,
    _vm: VmFd,
}

/// Runs real-mode `code` at 0x1000.
fn start(code: &[u8]) -> Option<Guest> {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        println!("skipped: no /dev/kvm");
        return None;
    };
    let vm = kvm.create_vm().unwrap();
    crate::kvm::split_irqchip(&vm).unwrap();
    let ram = GuestRam::new(1 << 20, &RamOptions::default()).unwrap();
    ram.give_to(&vm, None).unwrap();
    ram.launch_memory()
        .unwrap()
        .write_slice(code, GuestAddress(0x1000))
        .unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (0x1000, 2, 0x8000);
    vcpu.set_regs(&regs).unwrap();
    let exit = Arc::new(ExitSignal::new().unwrap());
    let io = Arc::new(Recorder(Mutex::default(), Arc::clone(&exit)));
    let context = VcpuContext {
        io: Arc::clone(&io) as Arc<dyn GuestIo>,
        affinity: Arc::default(),
        processor: None,
        exit: Arc::clone(&exit),
        exits: Arc::new(Exits::new(
            std::time::Instant::now(),
            podvisor_firmware::layout::device_area(46).into(),
        )),
    };
    let vcpus = Vcpus::start(vec![vcpu], &context).unwrap();
    Some(Guest {
        vcpus: Some(vcpus),
        exit,
        io,
        _ram: ram,
        _vm: vm,
    })
}

/// Waits for the exit signal.
fn wait(guest: &Guest) {
    let mut poll = [libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(guest.exit.fd()),
        events: libc::POLLIN,
        revents: 0,
    }];
    #[expect(unsafe_code, reason = "poll in a test")]
    // SAFETY: one valid pollfd.
    unsafe {
        libc::poll(poll.as_mut_ptr(), 1, -1);
    }
}

/// Waits for the guest's end, as the control loop does.
fn reason(guest: &Guest) -> PodExit {
    loop {
        wait(guest);
        if let Some(reason) = guest.exit.take() {
            return reason;
        }
    }
}

#[test]
fn port_and_memory_accesses_reach_the_devices() {
    // in al, 0x71; out 0x80, al; mov dx, 0x3f8; mov si, 0x1040; mov cx, 3; cld; rep outsb
    let mut code = vec![
        0xE4, 0x71, 0xE6, 0x80, 0xBA, 0xF8, 0x03, 0xBE, 0x40, 0x10, 0xB9, 3, 0, 0xFC, 0xF3, 0x6E,
    ];
    code.extend([0xB8, 0xFF, 0xFF, 0x8E, 0xD8]); // ds = 0xffff
    code.extend([0xC6, 0x06, 0x20, 0x00, 0x77]); // mov byte [0x20], 0x77: 0x100010
    code.extend([0xE6, 0x60, 0xFA, 0xF4]); // out 0x60, al; cli; hlt
    code.resize(0x40, 0x90);
    code.extend(b"abc");
    let Some(guest) = start(&code) else { return };
    assert_eq!(reason(&guest), PodExit::Shutdown);
    let seen = lock(&guest.io.0).clone();
    assert_eq!(seen[0], (0x80, vec![0x5A]));
    assert_eq!(
        seen[1..4],
        [(0x3F8, vec![b'a']), (0x3F8, vec![b'b']), (0x3F8, vec![b'c'])]
    );
    assert_eq!(seen[4], (0x10_0010, vec![0x77]));
}

#[test]
fn a_looping_and_a_halted_guest_can_be_paused_resumed_and_stopped() {
    for code in [&[0xEB, 0xFE][..], &[0xF4, 0xEB, 0xFD]] {
        let Some(mut guest) = start(code) else { return };
        let vcpus = guest.vcpus.as_mut().unwrap();
        for _ in 0..20 {
            vcpus.pause();
            assert!(vcpus.paused());
            vcpus.resume();
        }
        assert!(!vcpus.paused());
        drop(guest.vcpus.take());
        assert_eq!(guest.exit.take(), None);
    }
}

#[test]
fn a_guest_that_powered_off_can_still_be_paused() {
    let Some(mut guest) = start(&[0xE6, 0x60, 0xFA, 0xF4, 0xEB, 0xFE]) else {
        return;
    };
    assert_eq!(reason(&guest), PodExit::Shutdown);
    let vcpus = guest.vcpus.as_mut().unwrap();
    vcpus.pause();
    vcpus.resume();
}

#[test]
fn a_guest_that_powered_off_does_not_go_on() {
    // out 0x60, al; out 0x61, al; cli; hlt
    let Some(mut guest) = start(&[0xE6, 0x60, 0xE6, 0x61, 0xFA, 0xF4]) else {
        return;
    };
    wait(&guest);
    guest.vcpus.as_mut().unwrap().pause();
    let ports: Vec<u64> = lock(&guest.io.0).iter().map(|(port, _)| *port).collect();
    assert_eq!(ports, [0x60]);
    assert_eq!(guest.exit.take(), Some(PodExit::Shutdown));
}

#[test]
fn the_thread_has_its_name() {
    let Some(_guest) = start(&[0xEB, 0xFE]) else { return };
    let names: Vec<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|t| std::fs::read_to_string(t.unwrap().path().join("comm")).ok())
        .collect();
    assert!(names.iter().any(|n| n.trim() == "vcpu0"), "{names:?}");
}

#[test]
fn system_events_become_reasons() {
    assert_eq!(system_event(1, &[]), PodExit::Shutdown);
    assert_eq!(system_event(6, &[0x0005_1100]), PodExit::Terminated { set: 1, code: 5 });
    assert!(matches!(system_event(99, &[]), PodExit::Failed(_)));
}

#[test]
fn hypercalls_and_memory_faults_are_answered_without_a_processor_too() {
    assert_eq!(hypercall(None, 12, &[0x1000, 1, 0x10, 0, 0, 0]), 22);
    let told = memory_fault(None, 8, 0x1000, 0x1000);
    assert!(told.contains("0x1000 as private"), "{told}");
    assert!(told.contains("the pod has no private memory"), "{told}");
}

#[test]
fn a_hypercall_changes_the_processors_pages() {
    let ram = GuestRam::new(1 << 20, &RamOptions::default()).unwrap();
    let memory = ram.launch_memory().unwrap();
    let processor = podvisor_snp::emulated::Emulated::new(memory, podvisor_snp::emulated::Options::default());
    let ask = |gpa, pages, private: u64| hypercall(Some(&processor), 12, &[gpa, pages, private << 4, 0, 0, 0]);
    assert_eq!(ask(0x4000, 2, 1), 0);
    assert!(!processor.is_shared(0x4000, 1) && !processor.is_shared(0x5FFF, 1));
    assert!(processor.is_shared(0x3000, 0x1000) && processor.is_shared(0x6000, 0x1000));
    assert_eq!(ask(0xF_F000, 2, 1), 22, "the second page is no RAM");
    assert!(processor.is_shared(0xF_F000, 0x1000));
    assert_eq!(ask(0x4000, 1, 0), 0);
    assert!(processor.is_shared(0x4000, 0x1000));
}
