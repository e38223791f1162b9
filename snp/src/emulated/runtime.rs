//! The guest's side of the emulation at run time: the MSRs it writes and what they do to page states, GHCB and messages.
//! Knows guest memory but no KVM. Whatever a guest writes costs a bounded amount of work and no memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use podvisor_firmware::plan::PAGE_SIZE;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::ghcb::{self, Exit};
use super::guest::Guest;
use super::{MSR_GHCB, MSR_HAND_OVER, MSR_SEV_STATUS};
use crate::cpuid::{C_BIT, Leaf, MSR_VALIDATE, VALIDATE_MAX_ORDER};
use crate::private_memory::{PrivateMemory, PrivateMemoryError};
use crate::processor::MsrOutcome;
use crate::rmp::{NotRam, PageStates, Validation};
use crate::scrub;

/// GHCB MSR protocol (AMD 56421 table 3): request and answer codes in bits 11:0.
mod msr {
    pub(super) const SEV_INFO_RESP: u64 = 0x001;
    pub(super) const SEV_INFO: u64 = 0x002;
    pub(super) const CPUID: u64 = 0x004;
    pub(super) const CPUID_RESP: u64 = 0x005;
    pub(super) const AP_RESET_HOLD: u64 = 0x006;
    pub(super) const AP_RESET_HOLD_RESP: u64 = 0x007;
    pub(super) const PREF_GPA: u64 = 0x010;
    pub(super) const PREF_GPA_RESP: u64 = 0x011;
    pub(super) const REG_GPA: u64 = 0x012;
    pub(super) const REG_GPA_RESP: u64 = 0x013;
    pub(super) const PSC: u64 = 0x014;
    pub(super) const PSC_RESP: u64 = 0x015;
    pub(super) const HV_FT: u64 = 0x080;
    pub(super) const HV_FT_RESP: u64 = 0x081;
    pub(super) const TERM: u64 = 0x100;
}

/// Hypervisor features offered: SNP. (AP creation is not.)
pub(super) const HV_FEATURES: u64 = 1;
const GHCB_VERSION_MIN: u64 = 1;
const GHCB_VERSION_MAX: u64 = 2;
/// 63:12 all ones: no GHCB address is preferred, or none was taken.
const NO_GPA: u64 = u64::MAX << 12;
/// GFN field of a page-state change: bits 51:12.
const GFN_MASK: u64 = (1 << 40) - 1;
const NO_GFN: u64 = u64::MAX;
const RC_FAIL_INPUT: u64 = 1;
const RC_SIZE_MISMATCH: u64 = 6;
const CARRY: u64 = 1 << 8;

/// What one vCPU reads back.
struct Port {
    ghcb_msr: AtomicU64,
    /// The registered GHCB frame, or [`NO_GFN`].
    ghcb_gfn: AtomicU64,
    validation: AtomicU64,
}

/// How the guest's side behaves.
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// vCPUs there may be.
    pub max_vcpus: u32,
    /// Whether a validation of more than one page answers FAIL_SIZEMISMATCH, as PVALIDATE of 2 MiB does on
    /// guest_memfd; for tests of guests.
    pub size_mismatch: bool,
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        Self {
            max_vcpus: 256,
            size_mismatch: false,
        }
    }
}

/// Why pages did not change over.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Not all of them are RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
    /// The host refused.
    #[error(transparent)]
    Memory(#[from] PrivateMemoryError),
}

impl ConvertError {
    /// errno as KVM would give it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotRam(_) => libc::EINVAL,
            Self::Memory(error) => error.errno(),
        }
    }
}

/// The run-time half of the emulated processor.
pub struct Runtime {
    memory: GuestMemoryMmap<()>,
    /// What KVM keeps of private pages, where it keeps any.
    private: OnceLock<PrivateMemory>,
    pages: PageStates,
    /// Held by whatever changes page states, so that their bitmaps change together.
    changing: Mutex<()>,
    ports: Box<[Port]>,
    cpuid: Mutex<Vec<Leaf>>,
    guest: Mutex<Option<Guest>>,
    sev_status: AtomicU64,
    /// The guest gave the emulation up: it is an ordinary VM.
    handed_over: AtomicBool,
    size_mismatch: bool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runtime {
    /// The run-time half over `memory`, all of it shared.
    #[must_use]
    pub fn new(memory: GuestMemoryMmap<()>, options: &RuntimeOptions) -> Self {
        let pages = PageStates::new(
            memory
                .iter()
                .map(|region| (region.start_addr().raw_value(), region.len())),
        );
        let ports = (0..options.max_vcpus)
            .map(|_| Port {
                ghcb_msr: AtomicU64::new(sev_info()),
                ghcb_gfn: AtomicU64::new(NO_GFN),
                validation: AtomicU64::new(0),
            })
            .collect();
        Self {
            memory,
            private: OnceLock::new(),
            pages,
            changing: Mutex::new(()),
            ports,
            cpuid: Mutex::new(Vec::new()),
            guest: Mutex::new(None),
            sev_status: AtomicU64::new(0b111),
            handed_over: AtomicBool::new(false),
            size_mismatch: options.size_mismatch,
        }
    }

    /// The page states.
    #[must_use]
    pub fn pages(&self) -> &PageStates {
        &self.pages
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    pub(super) fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        lock(&self.guest)
    }

    pub(super) fn set_cpuid(&self, leaves: Vec<Leaf>) {
        *lock(&self.cpuid) = leaves;
    }

    /// The guest runs from here on, as `guest` in the firmware, with SEV_FEATURES `features`.
    pub fn start(&self, guest: Guest, features: u64) {
        self.sev_status.store(0b011 | features << 2, Ordering::Release);
        *self.guest() = Some(guest);
    }

    /// Private pages are KVM's from here on. Called once, before there is any.
    pub(super) fn keep_private_in(&self, private: PrivateMemory) {
        // The launch initialises a VM once.
        let _ = self.private.set(private);
    }

    /// KVM's private memory, if it is used.
    pub(super) fn private(&self) -> Option<&PrivateMemory> {
        self.private.get()
    }

    /// Makes whole pages private or shared, whatever they were; those that change read as zeros afterwards.
    ///
    /// # Errors
    /// [`ConvertError`]: nothing changed for a range that is not RAM; where the host refuses, what it did not refuse has.
    pub fn convert(&self, gfns: Range<u64>, private: bool) -> Result<(), ConvertError> {
        self.pages.check_ram(&gfns)?;
        self.convert_ram(gfns, private)
    }

    /// [`Runtime::convert`] of the part of `gfns` that is RAM.
    pub(super) fn convert_ram(&self, gfns: Range<u64>, private: bool) -> Result<(), ConvertError> {
        let _changing = lock(&self.changing);
        let changed = |first, pages| match self.private() {
            Some(memory) => memory.convert(first, pages, private).map_err(ConvertError::from),
            None => Ok(scrub::scrub(&self.memory, first, pages).map_err(PrivateMemoryError::from)?),
        };
        self.pages.convert(gfns, private, changed).inspect_err(|error| {
            tracing::error!("a page-state change failed: {error}");
        })
    }

    /// A guest's WRMSR.
    pub fn write_msr(&self, vcpu: u32, number: u32, value: u64) -> MsrOutcome {
        let Some(port) = self.ports.get(vcpu as usize) else {
            return MsrOutcome::Fault;
        };
        if self.handed_over.load(Ordering::Acquire) {
            return MsrOutcome::Fault;
        }
        match number {
            MSR_GHCB if value.trailing_zeros() >= 12 => self.vmgexit(port, value),
            MSR_GHCB => self.msr_protocol(port, value),
            MSR_VALIDATE => self.validate(port, value),
            // What is in KVM's private memory cannot be shared in place.
            MSR_HAND_OVER if value == 1 && self.private().is_none() => self.hand_over(),
            _ => MsrOutcome::Fault,
        }
    }

    /// A guest's RDMSR.
    pub fn read_msr(&self, vcpu: u32, number: u32) -> MsrOutcome {
        let Some(port) = self.ports.get(vcpu as usize) else {
            return MsrOutcome::Fault;
        };
        if self.handed_over.load(Ordering::Acquire) {
            // As an ordinary processor that knows the MSR has it: nothing is active.
            return match number {
                MSR_SEV_STATUS => MsrOutcome::Value(0),
                _ => MsrOutcome::Fault,
            };
        }
        match number {
            MSR_GHCB => MsrOutcome::Value(port.ghcb_msr.load(Ordering::Acquire)),
            MSR_SEV_STATUS => MsrOutcome::Value(self.sev_status.load(Ordering::Acquire)),
            MSR_VALIDATE => MsrOutcome::Value(port.validation.load(Ordering::Acquire)),
            _ => MsrOutcome::Fault,
        }
    }

    /// The guest goes on as one without SEV: all memory is shared as it is. There is no such thing on hardware.
    fn hand_over(&self) -> MsrOutcome {
        let _changing = lock(&self.changing);
        self.pages.share_in_place();
        self.handed_over.store(true, Ordering::Release);
        *self.guest() = None;
        tracing::info!("the guest gave up the emulated SEV-SNP: its memory is shared with the host");
        MsrOutcome::Value(1)
    }

    fn msr_protocol(&self, port: &Port, request: u64) -> MsrOutcome {
        let argument = request >> 12;
        let answer = match request & 0xFFF {
            msr::SEV_INFO => sev_info(),
            msr::CPUID => {
                let register = request >> 30 & 3;
                msr::CPUID_RESP | register << 30 | u64::from(self.cpuid_register(request >> 32, register)) << 32
            }
            msr::AP_RESET_HOLD => msr::AP_RESET_HOLD_RESP,
            msr::PREF_GPA => msr::PREF_GPA_RESP | NO_GPA,
            msr::REG_GPA if argument <= GFN_MASK && self.pages.is_ram(&(argument..argument + 1)) => {
                port.ghcb_gfn.store(argument, Ordering::Release);
                msr::REG_GPA_RESP | argument << 12
            }
            msr::REG_GPA => msr::REG_GPA_RESP | NO_GPA,
            msr::PSC => {
                let gfn = argument & GFN_MASK;
                let done = match request >> 52 & 0xF {
                    1 => self.convert(gfn..gfn + 1, true).is_ok(),
                    2 => self.convert(gfn..gfn + 1, false).is_ok(),
                    _ => false,
                };
                msr::PSC_RESP | u64::from(!done) << 32
            }
            msr::HV_FT => msr::HV_FT_RESP | HV_FEATURES << 12,
            msr::TERM => {
                let [_, low, high, ..] = request.to_le_bytes();
                return MsrOutcome::Terminate {
                    set: low >> 4,
                    code: high,
                };
            }
            _ => return MsrOutcome::Fault,
        };
        port.ghcb_msr.store(answer, Ordering::Release);
        MsrOutcome::Value(answer)
    }

    fn cpuid_register(&self, leaf: u64, register: u64) -> u32 {
        let cpuid = lock(&self.cpuid);
        let found = cpuid
            .iter()
            .find(|entry| u64::from(entry.eax_in) == leaf && entry.ecx_in == 0);
        found.map_or(0, |entry| match register {
            0 => entry.eax,
            1 => entry.ebx,
            2 => entry.ecx,
            _ => entry.edx,
        })
    }

    fn validate(&self, port: &Port, value: u64) -> MsrOutcome {
        let order = value >> 1 & 0x3F;
        if value & 0xF80 != 0 || value >> 52 != 0 || order > u64::from(VALIDATE_MAX_ORDER) {
            return MsrOutcome::Fault;
        }
        let first = value >> 12;
        let outcome = if self.size_mismatch && order > 0 {
            RC_SIZE_MISMATCH
        } else {
            let _changing = lock(&self.changing);
            match self.pages.validate(first..first + (1 << order), value & 1 == 1) {
                Validation::Changed => 0,
                Validation::Unchanged => CARRY,
                Validation::NotPrivate => RC_FAIL_INPUT,
            }
        };
        port.validation.store(outcome, Ordering::Release);
        MsrOutcome::Value(outcome)
    }

    fn vmgexit(&self, port: &Port, gpa: u64) -> MsrOutcome {
        if port.ghcb_gfn.load(Ordering::Acquire) != gpa / PAGE_SIZE || !self.pages.is_shared(gpa, PAGE_SIZE) {
            return MsrOutcome::Fault;
        }
        port.ghcb_msr.store(gpa, Ordering::Release);
        match ghcb::handle(self, gpa) {
            Ok(Exit::Done) => MsrOutcome::Value(gpa),
            Ok(Exit::Terminate { set, code }) => MsrOutcome::Terminate { set, code },
            Err(_) => MsrOutcome::Fault,
        }
    }
}

fn sev_info() -> u64 {
    GHCB_VERSION_MAX << 48 | GHCB_VERSION_MIN << 32 | u64::from(C_BIT) << 24 | msr::SEV_INFO_RESP
}
