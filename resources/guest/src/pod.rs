//! The pod: what the machine has, brought up when first used, and the commands that concern its memory and identity.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::blk::Blk;
use crate::fuse::Client;
use crate::layout;
use crate::paging::PageTables;
use crate::params::Parameters;
use crate::pattern::Pattern;
use crate::pci::Function;
use crate::platform::{Console, Watchdog};
use crate::report::{Report, Reporter};
use crate::rng::Rng;
use crate::snp::Pages;
use crate::window::{Shared, Window};

const PAGE: usize = 4096;

/// Virtio device types.
pub mod device_type {
    /// Block.
    pub const BLK: u16 = 2;
    /// Console.
    pub const CONSOLE: u16 = 3;
    /// Entropy.
    pub const RNG: u16 = 4;
    /// Socket.
    pub const VSOCK: u16 = 19;
    /// File system.
    pub const FS: u16 = 26;
    /// Watchdog, as Cloud Hypervisor numbers it.
    pub const WATCHDOG: u16 = 35;
    /// No virtio device: pvpanic.
    pub const PVPANIC: u16 = u16::MAX;
}

/// The machine as the agent uses it.
pub struct Pod {
    /// What the host says about the machine.
    pub parameters: Parameters,
    /// Whether the processor is emulated.
    pub emulated: bool,
    /// Page states; None on a native platform.
    pub pages: Option<Pages>,
    /// The page tables.
    pub tables: PageTables,
    /// The shared window.
    pub window: Window,
    /// The devices that PCI shows.
    pub functions: Vec<Function>,
    /// The first block device, once used.
    pub blk: Option<Blk>,
    /// The file system, once used.
    pub fs: Option<Client>,
    /// The entropy device, once used.
    pub rng: Option<Rng>,
    /// The virtio console, once used.
    pub console: Option<Console>,
    /// The watchdog, once used.
    pub watchdog: Option<Watchdog>,
    /// The pages of guest requests, once used.
    pub reporter: Option<Reporter>,
}

impl Pod {
    /// The first device of a type.
    #[must_use]
    pub fn function(&self, kind: u16) -> Option<Function> {
        self.functions.iter().find(|function| function.kind == kind).copied()
    }

    /// The answer to `hello`.
    #[must_use]
    pub fn hello(&self) -> String {
        let mut devices = String::new();
        let names = [
            (device_type::BLK, "blk"),
            (device_type::FS, "fs"),
            (device_type::RNG, "rng"),
        ];
        for (_, name) in names.iter().filter(|(kind, _)| self.function(*kind).is_some()) {
            if !devices.is_empty() {
                devices.push(',');
            }
            devices.push_str(name);
        }
        format!(
            "ok version=1 platform={} emulated={} vcpus={} memory={} devices={devices}",
            if self.pages.is_some() { "snp" } else { "native" },
            u8::from(self.emulated),
            self.parameters.vcpus,
            self.parameters.memory,
        )
    }

    /// The block device.
    ///
    /// # Errors
    /// When there is none or it does not come up.
    pub fn blk(&mut self) -> Result<&mut Blk, &'static str> {
        if self.blk.is_none() {
            let function = self.function(device_type::BLK).ok_or("no block device")?;
            self.blk = Some(Blk::start(&function, &self.tables, &self.window)?);
        }
        self.blk.as_mut().ok_or("no block device")
    }

    /// The file system.
    ///
    /// # Errors
    /// When there is none or it does not come up.
    pub fn fs(&mut self) -> Result<&mut Client, &'static str> {
        if self.fs.is_none() {
            let function = self.function(device_type::FS).ok_or("no file system")?;
            self.fs = Some(Client::start(&function, &self.tables, &self.window)?);
        }
        self.fs.as_mut().ok_or("no file system")
    }

    /// The entropy device.
    ///
    /// # Errors
    /// When there is none or it does not come up.
    pub fn rng(&mut self) -> Result<&mut Rng, &'static str> {
        if self.rng.is_none() {
            let function = self.function(device_type::RNG).ok_or("no entropy device")?;
            self.rng = Some(Rng::start(&function, &self.tables, &self.window)?);
        }
        self.rng.as_mut().ok_or("no entropy device")
    }

    /// The virtio console.
    ///
    /// # Errors
    /// When there is none or it does not come up.
    pub fn console(&mut self) -> Result<&mut Console, &'static str> {
        if self.console.is_none() {
            let function = self.function(device_type::CONSOLE).ok_or("no console")?;
            self.console = Some(Console::start(&function, &self.tables, &self.window)?);
        }
        self.console.as_mut().ok_or("no console")
    }

    /// The watchdog.
    ///
    /// # Errors
    /// When there is none or it does not come up.
    pub fn watchdog(&mut self) -> Result<&mut Watchdog, &'static str> {
        if self.watchdog.is_none() {
            let function = self.function(device_type::WATCHDOG).ok_or("no watchdog")?;
            self.watchdog = Some(Watchdog::start(&function, &self.tables, &self.window)?);
        }
        self.watchdog.as_mut().ok_or("no watchdog")
    }

    /// Tells the monitor of panic `events`; what it knows of.
    ///
    /// # Errors
    /// When there is no pvpanic.
    pub fn panic(&mut self, events: u8) -> Result<u8, &'static str> {
        let function = self.function(device_type::PVPANIC).ok_or("no pvpanic")?;
        let register = function.memory(&self.tables, 1)?;
        let known = register.get(0);
        register.set(0, events);
        Ok(known)
    }

    /// An attestation report over `data`.
    ///
    /// # Errors
    /// On a native platform, and as [`Reporter::report`].
    pub fn report(&mut self, data: &[u8; 64]) -> Result<Report, &'static str> {
        if self.pages.is_none() {
            return Err("a native platform gives no reports");
        }
        if self.reporter.is_none() {
            self.reporter = Some(Reporter::new(&self.window).ok_or("the shared window is used up")?);
        }
        self.reporter.as_ref().ok_or("no reporter")?.report(data)
    }

    /// The private page of the probes, filled with a pattern.
    #[must_use]
    pub fn probe_page(&self, seed: u64) -> Shared {
        let page = Shared::scratch().part(0, PAGE);
        page.write(0, &pattern_page(seed));
        page
    }

    /// Whether the page still holds the pattern, its first `skip` bytes aside.
    #[must_use]
    pub fn probe_page_holds(&self, seed: u64, skip: usize) -> bool {
        let mut bytes = vec![0; PAGE];
        Shared::scratch().part(0, PAGE).read(0, &mut bytes);
        bytes.get(skip..) == pattern_page(seed).get(skip..)
    }

    /// Converts pages to shared and back, `rounds` times. What was written in one state must never be seen in the other;
    /// the emulation promises zeros.
    ///
    /// # Errors
    /// On a native platform, for too many pages, or when a rule is broken.
    pub fn convert(&self, pages: u64, rounds: u64) -> Result<(), &'static str> {
        let own = self.pages.as_ref().ok_or("a native platform has no page states")?;
        let limit = layout::CONVERT_LEN / PAGE as u64;
        if pages == 0 || pages > limit {
            return Err("pages not in 1..=2048");
        }
        let area = Shared::scratch().part(0, pages as usize * PAGE);
        let parts = || (0..pages as usize).map(|index| area.part(index * PAGE, PAGE));
        for round in 0..rounds {
            for private in [false, true] {
                let mark = pattern_page(round << 1 | u64::from(private));
                parts().for_each(|page| page.write(0, &mark));
                own.convert(area, private)?;
                if !parts().all(|page| scrubbed(page, &mark, self.emulated)) {
                    return Err("a conversion kept a page's contents");
                }
            }
        }
        Ok(())
    }
}

fn pattern_page(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    Pattern::new(seed).fill(&mut bytes);
    bytes
}

fn scrubbed(page: Shared, old: &[u8], zeros: bool) -> bool {
    let mut bytes = [0; PAGE];
    page.read(0, &mut bytes);
    if zeros { bytes == [0; PAGE] } else { bytes != old }
}
