//! ACPI power registers as Cloud Hypervisor has them: a sleep/reset register (the FADT's hardware-reduced sleep
//! control and reset register are the same byte) and the PM timer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ExitReason, ExitSink, read_le};
use serde_json::{Value, json};

use crate::bus::BusDevice;

/// Bytes of the sleep/reset register.
pub const ACPI_POWER_SIZE: u64 = 4;
/// Bytes of the PM timer.
pub const PM_TIMER_SIZE: u64 = 4;
/// SLP_TYP of S5.
const S5: u8 = 5;
/// Sleep control register: SLP_TYP in bits 4:2, SLP_EN in bit 5 (ACPI 6.5 4.8.3.7).
const POWER_OFF: u8 = S5 << 2 | 1 << 5;
/// The FADT's reset value.
const RESET: u8 = 1;
/// The same with SLP_TYP 6, which is podvisor's own: with a reason code in a second byte, stage0's refusal on a plain VM.
const REFUSED: u8 = 6 << 2 | 1 << 5;
/// ACPI 6.5 4.8.3.3.
const PM_TIMER_HZ: u128 = 3_579_545;

/// The sleep/reset register.
pub struct AcpiPower {
    sink: Arc<dyn ExitSink>,
}

impl AcpiPower {
    /// A register that tells `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn ExitSink>) -> Self {
        Self { sink }
    }
}

impl BusDevice for AcpiPower {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [POWER_OFF, ..]) => self.sink.exit(ExitReason::PowerOff),
            (0, [RESET, ..]) => self.sink.exit(ExitReason::Reset),
            (0, [REFUSED, code]) => self.sink.exit(ExitReason::Refused(*code)),
            _ => {}
        }
    }
}

/// The 32-bit PM timer at 3.579545 MHz.
pub struct PmTimer {
    start: Instant,
}

impl PmTimer {
    /// A timer that starts at 0 now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// The counter after `elapsed`; wraps at 32 bits.
    fn counter(elapsed: Duration) -> u32 {
        let ticks = elapsed.as_nanos() * PM_TIMER_HZ / 1_000_000_000;
        u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0)
    }
}

impl Default for PmTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for PmTimer {
    fn save(&self) -> Value {
        json!(Self::counter(self.start.elapsed()))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let ticks: u32 = serde_json::from_value(state)?;
        let nanos = u128::from(ticks) * 1_000_000_000 / PM_TIMER_HZ;
        let past = Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        // A host that has not been up for so long cannot say when it was: the timer begins anew.
        self.start = Instant::now().checked_sub(past).unwrap_or_else(Instant::now);
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let counter = Self::counter(self.start.elapsed());
        let shift = u32::try_from(offset.saturating_mul(8)).unwrap_or(u32::MAX);
        read_le(counter.checked_shr(shift).unwrap_or(0), data);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_counts_at_its_frequency_and_wraps() {
        assert_eq!(PmTimer::counter(Duration::from_secs(1)), 3_579_545);
        assert_eq!(PmTimer::counter(Duration::from_secs(10)), 35_795_450);
        let wrap = PmTimer::counter(Duration::from_secs(1200));
        assert_eq!(u64::from(wrap), 1200 * 3_579_545 - (1 << 32));
        assert_eq!(PmTimer::counter(Duration::from_secs((1 << 40) + 1)), 3_579_545);
    }
}
