//! Exercises the private memory of `podvisor_snp::private_memory` on a host whose KVM has it (VM type
//! `KVM_X86_SW_PROTECTED_VM`; the nested rig's own kernel does): a guest of a few instructions fills and reads pages and
//! asks KVM to change them over, and what it sees, what the monitor sees and what the host holds are compared.
//! Prints a line for each thing that held; exit code 1 and one line when one did not.
#![expect(clippy::indexing_slicing, reason = "a test program, which may end by a panic")]
#![expect(clippy::print_stdout, reason = "what it has to say")]
#![expect(unsafe_code, reason = "a memory slot takes addresses")]

use std::error::Error;
use std::fs;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use podvisor_snp::private_memory::{PrivateMemory, SOFTWARE_PROTECTED_VM, hypercall, missing};
use podvisor_snp::processor::{MemoryRegion, ProcessorError};
use podvisor_snp::rmp::PageStates;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

const PAGE: u64 = 4096;
/// The guest's code and page tables: ordinary memory, where KVM can read the instructions that it emulates.
const CODE: u64 = 0;
const CODE_LEN: usize = 1 << 20;
/// Memory with a private half, in two slots that touch.
const RAM: [(u64, usize); 2] = [(0x1000_0000, 24 << 20), (0x1180_0000, 8 << 20)];
/// Ordinary memory that has no private half.
const PLAIN: u64 = 0x2000_0000;
const PLAIN_LEN: usize = 1 << 20;
const PORT: u16 = 0xE9;

/// `cld; rep stosq; out PORT, al; hlt`.
const FILL: (u64, &[u8]) = (0x100, &[0xFC, 0xF3, 0x48, 0xAB, 0xE6, 0xE9, 0xF4]);
/// `cld; repe scasq; out PORT, al; hlt`: ZF says whether all are RAX.
const SCAN: (u64, &[u8]) = (0x200, &[0xFC, 0xF3, 0x48, 0xAF, 0xE6, 0xE9, 0xF4]);
/// `vmmcall; out PORT, al; hlt`.
const CALL: (u64, &[u8]) = (0x300, &[0x0F, 0x01, 0xD9, 0xE6, 0xE9, 0xF4]);

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How a guest's run ended.
#[derive(Debug, PartialEq)]
enum End {
    Done(kvm_regs),
    Fault { flags: u64, gpa: u64, size: u64 },
}

struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    ram: GuestMemoryMmap<()>,
    states: PageStates,
    private: PrivateMemory,
    /// Kept mapped.
    _plain: GuestMemoryMmap<()>,
}

impl Machine {
    fn new(kvm: &Kvm) -> Outcome<Self> {
        let vm = kvm.create_vm_with_type(SOFTWARE_PROTECTED_VM)?;
        let ram = GuestMemoryMmap::from_ranges(&RAM.map(|(gpa, len)| (GuestAddress(gpa), len)))?;
        let plain = GuestMemoryMmap::from_ranges(&[(GuestAddress(CODE), CODE_LEN), (GuestAddress(PLAIN), PLAIN_LEN)])?;
        let private = PrivateMemory::new(&vm, ram.clone())?;
        for (slot, (gpa, len)) in (0..).zip(RAM) {
            private.map(&vm, &region(&ram, slot, gpa, len)?)?;
        }
        for (slot, gpa, len) in [(8, CODE, CODE_LEN), (9, PLAIN, PLAIN_LEN)] {
            let region = region(&plain, slot, gpa, len)?;
            // SAFETY: the range is a mapping that the machine keeps for as long as the VM.
            unsafe {
                vm.set_user_memory_region(kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: region.gpa,
                    memory_size: region.len,
                    userspace_addr: region.host_addr,
                })?;
            }
        }
        for (at, code) in [FILL, SCAN, CALL] {
            plain.write_slice(code, GuestAddress(CODE + at))?;
        }
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
        long_mode(&vcpu, &plain)?;
        Ok(Self {
            vcpu,
            vm,
            ram,
            states: PageStates::new(RAM.map(|(gpa, len)| (gpa, len as u64))),
            private,
            _plain: plain,
        })
    }

    /// Runs `code` with these registers to its end; hypercalls are answered as the monitor answers them.
    fn run(&mut self, code: (u64, &[u8]), regs: kvm_regs) -> Outcome<End> {
        self.vcpu.set_regs(&kvm_regs {
            rip: CODE + code.0,
            rflags: 2,
            ..regs
        })?;
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(PORT, _) => return Ok(End::Done(self.vcpu.get_regs()?)),
                VcpuExit::Hypercall(call) => {
                    let (states, private) = (&self.states, &self.private);
                    *call.ret = hypercall::answer(call.nr, &call.args, |gpa, len, to| {
                        change(states, private, gpa, len, to)
                    });
                }
                VcpuExit::MemoryFault { flags, gpa, size } => return Ok(End::Fault { flags, gpa, size }),
                other => return Err(format!("the guest left with {other:?}").into()),
            }
        }
    }

    fn fill(&mut self, gpa: u64, len: u64, value: u64) -> Outcome<End> {
        let regs = kvm_regs {
            rdi: gpa,
            rcx: len / 8,
            rax: value,
            ..kvm_regs::default()
        };
        self.run(FILL, regs)
    }

    /// Whether the guest sees nothing but `value`.
    fn sees(&mut self, gpa: u64, len: u64, value: u64) -> Outcome<bool> {
        let regs = kvm_regs {
            rdi: gpa,
            rcx: len / 8,
            rax: value,
            ..kvm_regs::default()
        };
        match self.run(SCAN, regs)? {
            End::Done(regs) => Ok(regs.rflags & 0x40 != 0),
            fault @ End::Fault { .. } => Err(format!("{fault:?} while reading {gpa:#x}").into()),
        }
    }

    /// The guest's KVM_HC_MAP_GPA_RANGE; what it gets in RAX.
    fn ask(&mut self, gpa: u64, len: u64, private: bool) -> Outcome<u64> {
        let regs = kvm_regs {
            rax: hypercall::KVM_HC_MAP_GPA_RANGE,
            rbx: gpa,
            rcx: len / PAGE,
            rdx: u64::from(private) << 4,
            ..kvm_regs::default()
        };
        match self.run(CALL, regs)? {
            End::Done(regs) => Ok(regs.rax),
            fault @ End::Fault { .. } => Err(format!("{fault:?} at a hypercall").into()),
        }
    }

    /// Whether the monitor sees nothing but `value`.
    fn host_sees(&self, gpa: u64, len: u64, value: u64) -> Outcome<bool> {
        let mut page = [0; 4096];
        for at in (gpa..gpa + len).step_by(page.len()) {
            self.ram.read_slice(&mut page, GuestAddress(at))?;
            if page.chunks(8).any(|word| word != value.to_le_bytes()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn change(states: &PageStates, private: &PrivateMemory, gpa: u64, len: u64, to: bool) -> Result<(), ProcessorError> {
    let refused = |errno, reason: String| ProcessorError {
        op: "KVM_HC_MAP_GPA_RANGE",
        errno,
        fw_error: 0,
        reason,
    };
    let gfns = gpa / PAGE..(gpa + len) / PAGE;
    states
        .check_ram(&gfns)
        .map_err(|error| refused(libc::EINVAL, error.to_string()))?;
    states
        .convert(gfns, to, |first, pages| private.convert(first, pages, to))
        .map_err(|error| refused(error.errno(), error.to_string()))
}

fn region(memory: &GuestMemoryMmap<()>, slot: u32, gpa: u64, len: usize) -> Outcome<MemoryRegion> {
    Ok(MemoryRegion {
        slot,
        gpa,
        len: len as u64,
        host_addr: memory.get_host_address(GuestAddress(gpa))?.expose_provenance() as u64,
    })
}

/// 64-bit mode with an identity map of the first GiB, in the code's memory.
fn long_mode(vcpu: &VcpuFd, code: &GuestMemoryMmap<()>) -> Outcome<()> {
    const TABLES: u64 = 0x10000;
    code.write_obj(CODE + TABLES + 0x1003, GuestAddress(TABLES))?;
    code.write_obj(CODE + TABLES + 0x2003, GuestAddress(TABLES + 0x1000))?;
    for entry in 0..512u64 {
        code.write_obj(entry << 21 | 0x83, GuestAddress(TABLES + 0x2000 + entry * 8))?;
    }
    let mut sregs = vcpu.get_sregs()?;
    let segment = |selector, type_, l| kvm_segment {
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(8, 11, 1);
    let data = segment(16, 3, 0);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0011, TABLES, 0x20, 0x500);
    Ok(vcpu.set_sregs(&sregs)?)
}

/// Bytes that this process and the page cache hold: the private halves are in the latter.
fn held() -> Outcome<i64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let field = |text: &str, name: &str| -> Outcome<i64> {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .ok_or("no such field")?;
        Ok(line.split_whitespace().nth(1).ok_or("no value")?.parse::<i64>()? * 1024)
    };
    Ok(field(&status, "VmRSS:")? + field(&meminfo, "Cached:")?)
}

fn check(what: &str, holds: bool) -> Outcome<()> {
    if !holds {
        return Err(format!("FAILED: {what}").into());
    }
    println!("ok {what}");
    Ok(())
}

fn conversions(machine: &mut Machine) -> Outcome<()> {
    // Over the edge of the two slots.
    let (at, len) = (RAM[1].0 - (4 << 20), 8u64 << 20);
    machine.fill(at, len, 0xA1)?;
    check("shared memory is the monitor's too", machine.host_sees(at, len, 0xA1)?)?;
    check(
        "a request for 8 MiB in two slots is answered with 0",
        machine.ask(at, len, true)? == 0,
    )?;
    check("what was shared is not seen in private", machine.sees(at, len, 0)?)?;
    machine.fill(at, len, 0xB2)?;
    check(
        "private memory keeps what the guest writes",
        machine.sees(at, len, 0xB2)?,
    )?;
    check("the monitor sees zeros there", machine.host_sees(at, len, 0)?)?;
    check("no device may touch it", !machine.states.is_shared(at, 8))?;
    check(
        "it is shared again",
        machine.ask(at, len, false)? == 0 && machine.states.is_shared(at, len),
    )?;
    check(
        "what was private is gone",
        machine.sees(at, len, 0)? && machine.host_sees(at, len, 0)?,
    )?;
    machine.fill(at, PAGE, 0xC3)?;
    check(
        "a request for the state that is there changes nothing",
        machine.ask(at, PAGE, false)? == 0 && machine.sees(at, PAGE, 0xC3)?,
    )?;
    let outside = RAM[1].0 + RAM[1].1 as u64;
    for (gpa, len) in [
        (outside, PAGE),
        (outside - PAGE, 2 * PAGE),
        (PLAIN, PAGE),
        (at, 1 << 52),
        (1 << 39, PAGE),
    ] {
        check(
            &format!("a request for {len:#x} bytes at {gpa:#x} is answered with EINVAL"),
            machine.ask(gpa, len, true)? == 22,
        )?;
    }
    check("and changes nothing", machine.states.is_shared(outside - PAGE, PAGE))
}

/// A page is in one half at a time, so that memory does not grow by conversions.
fn accounting(machine: &mut Machine) -> Outcome<()> {
    let (at, len) = (RAM[0].0, 16u64 << 20);
    machine.ask(at, len, false)?;
    let empty = held()?;
    let mut most = [0, 0];
    for round in 0..6u64 {
        let private = round % 2 == 0;
        machine.ask(at, len, private)?;
        let gone = held()? - empty;
        check(
            &format!("round {round}: {gone} bytes are held after the change"),
            gone < 2 << 20,
        )?;
        machine.fill(at, len, round)?;
        let full = held()? - empty;
        most[usize::from(private)] = full;
        // The kernel's counters are a little behind; a page held twice would be 16 MiB more.
        let expected = (len - (2 << 20)).cast_signed()..(len + (2 << 20)).cast_signed();
        check(
            &format!("round {round}: {full} bytes are held when the guest has filled 16 MiB"),
            expected.contains(&full),
        )?;
    }
    machine.ask(at, len, false)?;
    println!("note full: {} bytes shared, {} bytes private", most[0], most[1]);
    Ok(())
}

/// Single pages and short runs in any order, against a model of what each page must hold.
fn storm(machine: &mut Machine) -> Outcome<()> {
    let first = RAM[1].0 - 128 * PAGE;
    let mut model = [(false, 0u64); 256];
    machine.ask(first, 256 * PAGE, true)?;
    machine.ask(first, 256 * PAGE, false)?;
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for step in 1..=400u64 {
        let start = next(256);
        let len = (1 + next(16)).min(256 - start);
        let private = next(2) == 1;
        if machine.ask(first + start * PAGE, len * PAGE, private)? != 0 {
            return Err(format!("step {step}: refused").into());
        }
        for page in &mut model[usize::try_from(start)?..usize::try_from(start + len)?] {
            if page.0 != private {
                *page = (private, 0);
            }
        }
        let page = next(256);
        machine.fill(first + page * PAGE, PAGE, step)?;
        model[usize::try_from(page)?].1 = step;
        let (page, seen) = (next(256), next(256));
        let (_, value) = model[usize::try_from(page)?];
        if !machine.sees(first + page * PAGE, PAGE, value)? {
            return Err(format!("step {step}: page {page} does not hold {value}").into());
        }
        let (private, value) = model[usize::try_from(seen)?];
        if !machine.host_sees(first + seen * PAGE, PAGE, if private { 0 } else { value })? {
            return Err(format!("step {step}: the monitor does not see page {seen} as it should").into());
        }
    }
    check("400 changes of a few pages agree with a model", true)
}

/// What is loaded from within.
fn loading(machine: &mut Machine) -> Outcome<()> {
    let (at, len) = (RAM[1].0 - (3 << 20), 6u64 << 20);
    machine.ask(at, len, true)?;
    for page in (at..at + len).step_by(4096) {
        machine
            .ram
            .write_slice(&page.to_le_bytes().repeat(512), GuestAddress(page))?;
    }
    let frames = at / PAGE..(at + len) / PAGE;
    let before = (machine.vcpu.get_regs()?, machine.vcpu.get_sregs()?);
    machine
        .private
        .fill(&machine.vm, &machine.vcpu, std::slice::from_ref(&frames))?;
    check(
        "the vCPU that copied has its registers again",
        (machine.vcpu.get_regs()?, machine.vcpu.get_sregs()?) == before,
    )?;
    machine.private.empty_shared(at / PAGE, len / PAGE)?;
    check("the monitor's copy is gone", machine.host_sees(at, len, 0)?)?;
    let mut all = true;
    for page in (at..at + len).step_by(4096) {
        all &= machine.sees(page, PAGE, page)?;
    }
    check("6 MiB loaded from within are what the guest sees", all)
}

fn fault(machine: &mut Machine) -> Outcome<()> {
    machine.vm.set_memory_attributes(kvm_bindings::kvm_memory_attributes {
        address: PLAIN,
        size: PAGE,
        attributes: kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
        flags: 0,
    })?;
    let end = machine.fill(PLAIN, PAGE, 1)?;
    let End::Fault { flags, gpa, size } = end else {
        return Err(format!("FAILED: a touch of a page that has no private half gave {end:?}").into());
    };
    println!(
        "note {}",
        hypercall::memory_fault(flags, gpa, size, Some(machine.states.is_shared(gpa, size)))
    );
    check(
        "a touch of a page that has no private half is a memory fault",
        (flags, gpa, size) == (8, PLAIN, PAGE),
    )
}

fn main() -> Outcome<()> {
    let kvm = Kvm::new()?;
    if let Some(what) = missing(&kvm) {
        return Err(format!("this KVM has no {what}").into());
    }
    let mut machine = Machine::new(&kvm)?;
    conversions(&mut machine)?;
    storm(&mut machine)?;
    accounting(&mut machine)?;
    loading(&mut machine)?;
    fault(&mut machine)
}
