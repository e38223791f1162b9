//! The CMOS clock (MC146818) at ports 0x70 and 0x71: time of day from the host's clock in UTC, memory size
//! registers, and the reset that a zero in the shutdown-status byte asks for. Writes to the clock are not kept.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{ExitReason, ExitSink};
use serde_json::{Value, json};

use crate::bus::BusDevice;

/// Ports from 0x70.
pub const CMOS_SIZE: u64 = 2;
const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;
/// Bit 7 of the index port gates NMIs.
const INDEX_MASK: u8 = 0x7F;
/// Shutdown status, selected with NMIs off, written 0: a reset, as Cloud Hypervisor takes it.
const SHUTDOWN_INDEX: u8 = 0x8F;
/// Registers.
const REGISTERS: usize = 128;

/// The host's time since 1970.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// The CMOS clock.
pub struct Cmos {
    index: u8,
    registers: [u8; REGISTERS],
    clock: Clock,
    sink: Arc<dyn ExitSink>,
}

/// A date and time in UTC.
#[derive(Debug, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    /// The proleptic Gregorian date of a day count (days from 1970, by era arithmetic over 400-year cycles that
    /// start in March).
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            weekday: (days + 4) % 7 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }
}

/// Two decimal digits.
fn bcd(v: u64) -> u8 {
    u8::try_from(((v / 10 % 10) << 4) | (v % 10)).unwrap_or(0)
}

impl Cmos {
    /// A clock for a pod with this much RAM below and above 4 GiB, in bytes.
    #[must_use]
    pub fn new(below_4g: u64, above_4g: u64, sink: Arc<dyn ExitSink>) -> Self {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::with_clock(below_4g, above_4g, sink, Box::new(now))
    }

    /// As [`Cmos::new`], with a clock of the caller's.
    #[must_use]
    pub fn with_clock(below_4g: u64, above_4g: u64, sink: Arc<dyn ExitSink>, clock: Clock) -> Self {
        const MIB: u64 = 1 << 20;
        const UNIT: u64 = 64 << 10;
        let mut registers = [0; REGISTERS];
        // QEMU's layout: KiB above 1 MiB (0x30), 64 KiB units above 16 MiB (0x34) and above 4 GiB (0x5B).
        let kib = u16::try_from(below_4g.saturating_sub(MIB) / 1024).unwrap_or(u16::MAX);
        let low = u16::try_from(below_4g.saturating_sub(16 * MIB) / UNIT).unwrap_or(u16::MAX);
        let high = (above_4g / UNIT).to_le_bytes();
        let fields = [
            (0x30, kib.to_le_bytes()),
            (0x34, low.to_le_bytes()),
            (0x15, 640u16.to_le_bytes()),
        ];
        let bytes = fields.into_iter().flat_map(|(at, v): (usize, [u8; 2])| (at..).zip(v));
        for (at, v) in bytes.chain((0x5B..0x5E).zip(high)) {
            if let Some(register) = registers.get_mut(at) {
                *register = v;
            }
        }
        Self {
            index: 0,
            registers,
            clock,
            sink,
        }
    }

    fn register(&self) -> u8 {
        let now = (self.clock)();
        let t = Civil::from_unix(now.as_secs());
        let index = self.index & INDEX_MASK;
        match index {
            0x00 => bcd(t.second),
            0x02 => bcd(t.minute),
            0x04 => bcd(t.hour),
            0x06 => bcd(t.weekday),
            0x07 => bcd(t.day),
            0x08 => bcd(t.month),
            0x09 => bcd(t.year % 100),
            // 32 kHz divider; update in progress during a second's last millisecond.
            0x0A => 0x20 | u8::from(now.subsec_millis() == 999) << 7,
            // 24 hours, BCD.
            0x0B => 0x02,
            0x0C => 0,
            // The battery is good.
            0x0D => 0x80,
            0x32 => bcd(t.year / 100),
            _ => self.registers.get(usize::from(index)).copied().unwrap_or(0),
        }
    }
}

impl BusDevice for Cmos {
    fn save(&self) -> Value {
        json!(self.index)
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        self.index = serde_json::from_value(state)?;
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(first) = data.first_mut() {
            match offset {
                INDEX_PORT => *first = self.index,
                DATA_PORT => *first = self.register(),
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (INDEX_PORT, [index]) => self.index = *index,
            (DATA_PORT, [0]) if self.index == SHUTDOWN_INDEX => self.sink.exit(ExitReason::Reset),
            (DATA_PORT, [value]) => {
                if let Some(register) = self.registers.get_mut(usize::from(self.index & INDEX_MASK)) {
                    *register = *value;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::tests::Exits;

    fn cmos(at: Duration) -> (Arc<Exits>, Cmos) {
        let exits = Arc::new(Exits::default());
        let c = Cmos::with_clock(3 << 30, 5 << 30, exits.clone(), Box::new(move || at));
        (exits, c)
    }

    fn get(c: &mut Cmos, index: u8) -> u8 {
        let mut d = [0];
        c.write(0, &[index]);
        c.read(1, &mut d);
        d[0]
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d @N`: 2000-02-29 23:59:58 Tue, 2026-11-24 08:19:00 Tue, 2100-03-01 00:00:00 Mon.
        for (seconds, expected) in [
            (951_868_798, [0x58, 0x59, 0x23, 3, 0x29, 0x02, 0x00, 0x20]),
            (1_795_508_340, [0x00, 0x19, 0x08, 3, 0x24, 0x11, 0x26, 0x20]),
            (4_107_542_400, [0x00, 0x00, 0x00, 2, 0x01, 0x03, 0x00, 0x21]),
        ] {
            let (_, mut c) = cmos(Duration::from_secs(seconds));
            let read = [0, 2, 4, 6, 7, 8, 9, 0x32].map(|i| get(&mut c, i));
            assert_eq!(read, expected, "{seconds}");
        }
    }

    #[test]
    fn consecutive_days_are_consecutive_for_two_centuries() {
        let mut last = Civil::from_unix(0);
        assert_eq!((last.year, last.month, last.day, last.weekday), (1970, 1, 1, 5));
        for day in 1..73_000u64 {
            let t = Civil::from_unix(day * 86_400);
            let next_day = (t.year, t.month) == (last.year, last.month) && t.day == last.day + 1;
            let next_month = t.day == 1 && (t.year * 12 + t.month == last.year * 12 + last.month + 1) && last.day >= 28;
            assert!(next_day || next_month, "{last:?} -> {t:?}");
            last = t;
        }
    }

    #[test]
    fn memory_sizes_and_status() {
        let (exits, mut c) = cmos(Duration::from_millis(999));
        let word = |c: &mut Cmos, at| u32::from(get(c, at)) | u32::from(get(c, at + 1)) << 8;
        assert_eq!(word(&mut c, 0x34), ((3 << 30) - (16 << 20)) >> 16);
        assert_eq!(
            word(&mut c, 0x5B) | u32::from(get(&mut c, 0x5D)) << 16,
            (5u64 << 30 >> 16) as u32
        );
        assert_eq!(get(&mut c, 0x0A), 0xA0);
        assert_eq!((get(&mut c, 0x0B), get(&mut c, 0x0D)), (2, 0x80));
        assert_eq!(get(&mut c, 0x80 | 0x0D), 0x80, "the NMI bit is not part of the index");
        c.write(0, &[0x0F]);
        c.write(1, &[0]);
        assert_eq!(exits.take(), []);
        c.write(0, &[0x8F]);
        c.write(1, &[0]);
        assert_eq!(exits.take(), [ExitReason::Reset]);
    }
}
