//! A VM, its RAM, vCPUs and a plan, for the tests that need KVM.
#![allow(clippy::allow_attributes, dead_code, reason = "each test binary uses a part of this")]

use std::borrow::Cow;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use podvisor_firmware::plan::{
    GpaRange, KVM_VMSA_GPA, LaunchPlan, PageKind, ParameterArea, Platform, Segment, Step, VcpuState, VpContext,
};
use podvisor_firmware::vmsa::vmsa_page;
use podvisor_snp::emulated::{Emulated, Options};
use podvisor_snp::launch::LaunchOptions;
use podvisor_snp::processor::{MemoryRegion, Processor};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// RAM of the test VM: two regions.
pub(crate) const RAM: [(u64, usize); 2] = [(0, 8 << 20), (0x4000_0000, 2 << 20)];

pub(crate) struct Machine {
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) emulated: Emulated,
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) vm: VmFd,
    pub(crate) kvm: Kvm,
}

/// A VM without INIT2, slots or vCPUs; None, and says so, without KVM.
pub(crate) fn bare(options: Options) -> Option<Machine> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: no /dev/kvm ({error})");
            return None;
        }
    };
    let ranges: Vec<_> = RAM.iter().map(|(start, len)| (GuestAddress(*start), *len)).collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let emulated = Emulated::new(memory.clone(), options);
    let vm = kvm.create_vm_with_type(emulated.vm_type()).unwrap();
    Some(Machine {
        vcpus: Vec::new(),
        emulated,
        memory,
        vm,
        kvm,
    })
}

impl Machine {
    pub(crate) fn map(&self) {
        for (slot, (gpa, len)) in RAM.iter().enumerate() {
            let host = self.memory.get_host_address(GuestAddress(*gpa)).unwrap();
            self.emulated
                .map_region(
                    &self.vm,
                    &MemoryRegion {
                        slot: slot as u32,
                        gpa: *gpa,
                        len: *len as u64,
                        host_addr: host as u64,
                    },
                )
                .unwrap();
        }
    }

    pub(crate) fn add_vcpus(&mut self, count: u64) {
        let cpuid = self
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .unwrap();
        for id in 0..count {
            let vcpu = self.vm.create_vcpu(id).unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
            self.vcpus.push(vcpu);
        }
    }
}

/// A VM ready to launch with `vcpus` vCPUs.
pub(crate) fn machine(vcpus: u64, options: Options) -> Option<Machine> {
    let mut machine = bare(options)?;
    machine.emulated.init(&machine.vm, 0).unwrap();
    machine.map();
    machine.add_vcpus(vcpus);
    Some(machine)
}

pub(crate) fn all_ram() -> Vec<GpaRange> {
    RAM.iter()
        .map(|(start, len)| GpaRange {
            start: *start,
            len: *len as u64,
        })
        .collect()
}

pub(crate) fn options() -> LaunchOptions {
    LaunchOptions {
        private_ram: all_ram(),
        areas: vec![vec![0x77; 100]],
        host_data: [0x42; 32],
        ..LaunchOptions::default()
    }
}

pub(crate) fn long_mode(rip: u64) -> VcpuState {
    let data = Segment {
        selector: 0x18,
        attrib: 0xc93,
        limit: 0xffff_ffff,
        base: 0,
    };
    let limit = |attrib| Segment {
        selector: 0,
        attrib,
        limit: 0xffff,
        base: 0,
    };
    VcpuState {
        cs: Segment {
            selector: 0x10,
            attrib: 0xa9b,
            ..data
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        gdtr: limit(0),
        idtr: limit(0),
        ldtr: limit(0x82),
        tr: limit(0x8b),
        efer: 0x1d00,
        cr0: 0x8000_0031,
        cr3: 0x2000,
        cr4: 0x60,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        rflags: 2,
        rip,
        rsp: 0x9000,
        pat: 0x0007_0406_0007_0406,
        rdx: 0xa0_0f11,
        sev_features: 1,
        xcr0: 1,
        mxcsr: 0x1f80,
        x87_fcw: 0x37f,
        ..VcpuState::default()
    }
}

pub(crate) fn context(index: u16, rip: u64) -> VpContext<'static> {
    let state = long_mode(rip);
    VpContext {
        index,
        gpa: KVM_VMSA_GPA,
        vmsa: Cow::Owned(vmsa_page(&state).to_vec()),
        state,
    }
}

pub(crate) fn pages(gpa: u64, len: u64, kind: PageKind, data: Vec<u8>) -> Step<'static> {
    Step::Pages {
        gpa,
        len,
        kind,
        data: Cow::Owned(data),
    }
}

/// A plan with every kind of step.
pub(crate) fn plan() -> LaunchPlan<'static> {
    let bytes = |seed: u8, len: usize| {
        (0..=u8::MAX)
            .cycle()
            .take(len)
            .map(|i| seed.wrapping_add(i.wrapping_mul(7)))
            .collect::<Vec<u8>>()
    };
    let mut plan = LaunchPlan::new(Platform::SevSnp);
    plan.policy = Some(0x30000);
    plan.areas.push(ParameterArea {
        len: 0x2000,
        initial: Cow::Borrowed(&[]),
        parameters: Vec::new(),
    });
    plan.vps.push(context(0, 0x10_0000));
    plan.steps = vec![
        pages(0x10_0000, 0x50_000, PageKind::Normal, bytes(1, 0x4_F123)),
        pages(0x20_0000, 0x3000, PageKind::Normal, Vec::new()),
        pages(0x21_0000, 0x2000, PageKind::Zero, Vec::new()),
        pages(0x22_0000, 0x1000, PageKind::Unmeasured, bytes(9, 100)),
        pages(0x23_0000, 0x1000, PageKind::Secrets, Vec::new()),
        pages(0x23_1000, 0x1000, PageKind::Cpuid, Vec::new()),
        pages(0x30_0000, 0x2000, PageKind::Shared, bytes(3, 0x1800)),
        Step::Parameters {
            gpa: 0x24_0000,
            area: 0,
        },
        pages(0x4000_0000, 0x1000, PageKind::Normal, bytes(5, 4096)),
        Step::Vcpu { vp: 0 },
    ];
    plan
}
