//! How large a pod's VM is: Kubernetes quantities, and the rules of the runtime handlers `kata-cc` and `kata`. The one
//! function [`size`] serves vm.create, `--pod` and `podvisor size`.

use podvisor_api::types::PodConfig;

/// One mebibyte in bytes.
const MIB: u64 = 1 << 20;
/// Most memory that a limit may ask for: 64 TiB, above any host; also keeps the sum below the API's own limit.
pub const MAX_MEMORY_LIMIT: u64 = (64 << 40) - (2048 << 20);
/// Most vCPUs of a VM: local APIC identifiers of 8 bits, 0xff means all.
pub const MAX_VCPUS: u32 = 254;

/// Why a pod has no size. Names the field, the value and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// No such handler.
    #[error("pod.handler: `{value}` is no known handler; give kata-cc or kata")]
    Handler {
        /// What was given.
        value: String,
    },
    /// A limit is no quantity.
    #[error(
        "pod.{field}: `{value}` is no Kubernetes quantity ({reason}); give a number with an optional suffix \
         (n u m k M G T P E, Ki Mi Gi Ti Pi Ei) or exponent, for example {example}"
    )]
    Quantity {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
        /// One that is right.
        example: &'static str,
    },
    /// A limit is zero or negative.
    #[error("pod.{field}: `{value}` is not above 0; give a limit above 0, or leave it out for none")]
    NotPositive {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
    },
    /// A limit is beyond what a VM can have.
    #[error("pod.{field}: `{value}` is beyond the largest limit, {most}; give at most that")]
    TooLarge {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// The largest.
        most: String,
    },
}

/// A runtime handler, whose rules size the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// Confidential pods: 2048 MiB for the guest, the limit on top.
    KataCc,
    /// Kernel-isolated pods: 256 MiB for the guest, the limit (1792 MiB where there is none) on top.
    Kata,
}

impl Handler {
    /// The handler of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn parse(name: &str) -> Result<Self, SizingError> {
        match name {
            "kata-cc" => Ok(Self::KataCc),
            "kata" => Ok(Self::Kata),
            other => Err(SizingError::Handler { value: shown(other) }),
        }
    }

    /// MiB for the guest itself.
    const fn base_mib(self) -> u64 {
        match self {
            Self::KataCc => 2048,
            Self::Kata => 256,
        }
    }

    /// MiB on top where no limit is given.
    const fn unlimited_mib(self) -> u64 {
        match self {
            Self::KataCc => 0,
            Self::Kata => 1792,
        }
    }
}

/// The size of a pod's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Bytes of memory, whole MiB.
    pub memory_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
}

/// Sizes a pod's VM: memory = base + limit (rounded up to whole MiB), vCPUs = ceil(1 + CPU limit).
///
/// # Errors
/// [`SizingError`].
pub fn size(pod: &PodConfig) -> Result<Sizing, SizingError> {
    let handler = Handler::parse(&pod.handler)?;
    let extra_mib = match &pod.memory_limit {
        Some(limit) => memory_limit_mib(&limit.0)?,
        None => handler.unlimited_mib(),
    };
    let vcpus = match &pod.cpu_limit {
        Some(limit) => vcpus(&limit.0)?,
        None => 1,
    };
    // At most MAX_MEMORY_LIMIT + 2048 MiB, far from overflowing.
    Ok(Sizing {
        memory_bytes: (handler.base_mib() + extra_mib) * MIB,
        vcpus,
    })
}

fn memory_limit_mib(text: &str) -> Result<u64, SizingError> {
    const FIELD: &str = "memory_limit";
    let most = || SizingError::TooLarge {
        field: FIELD,
        value: shown(text),
        most: format!("{MAX_MEMORY_LIMIT} bytes"),
    };
    let quantity = limit(FIELD, text, "512Mi")?;
    let bytes = u64::try_from(quantity.ceil(0))
        .ok()
        .filter(|bytes| *bytes <= MAX_MEMORY_LIMIT)
        .ok_or_else(most)?;
    Ok(bytes.div_ceil(MIB))
}

fn vcpus(text: &str) -> Result<u32, SizingError> {
    const FIELD: &str = "cpu_limit";
    let most = || SizingError::TooLarge {
        field: FIELD,
        value: shown(text),
        most: format!("{} CPUs", MAX_VCPUS - 1),
    };
    // Kubernetes keeps CPUs in thousandths and rounds up to them; whole CPUs of the rounded value are those of the exact one.
    let quantity = limit(FIELD, text, "1500m")?;
    let cpus = u32::try_from(quantity.ceil(0))
        .ok()
        .and_then(|cpus| cpus.checked_add(1))
        .ok_or_else(most)?;
    if cpus <= MAX_VCPUS { Ok(cpus) } else { Err(most()) }
}

fn limit(field: &'static str, text: &str, example: &'static str) -> Result<Quantity, SizingError> {
    let quantity = Quantity::parse(text).map_err(|reason| SizingError::Quantity {
        field,
        value: shown(text),
        reason,
        example,
    })?;
    if quantity.negative || quantity.nanos == 0 {
        return Err(SizingError::NotPositive {
            field,
            value: shown(text),
        });
    }
    Ok(quantity)
}

/// At most 80 characters of a value, for an error.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A Kubernetes `resource.Quantity` (apimachinery `pkg/api/resource`): an exact number, kept in billionths as that type's
/// canonical form is: finer ones are rounded up, away from zero, and values above 2^63-1 are capped there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    negative: bool,
    /// The magnitude in billionths.
    nanos: u128,
}

/// Billionths in one.
const NANO: u128 = 1_000_000_000;
/// The largest quantity (apimachinery caps at 2^63 - 1).
const CAP: u128 = (i64::MAX as u128) * NANO;

impl Quantity {
    /// Parses a quantity: sign, decimal number with or without a fraction (`.5`, `5.`), suffix or exponent.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let number_end = rest
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at_checked(number_end).unwrap_or((rest, ""));
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return Err("there is no number");
        }
        if fraction.contains('.') {
            return Err("there are two decimal points");
        }
        let nanos = match scale(suffix)? {
            Scale::Binary(shift) => scaled(whole, fraction, 0, 1 << shift),
            Scale::Decimal(exponent) => scaled(whole, fraction, exponent, 1),
        };
        Ok(Self { negative, nanos })
    }

    /// The magnitude in units of 10^-`decimals` (0 for whole ones, 3 for thousandths), rounded up; at most 9 decimals.
    #[must_use]
    pub fn ceil(&self, decimals: u32) -> u128 {
        self.nanos.div_ceil(10u128.pow(9u32.saturating_sub(decimals)))
    }

    /// Whether it is below zero.
    #[must_use]
    pub fn is_negative(&self) -> bool {
        self.negative && self.nanos != 0
    }
}

enum Scale {
    /// Times 2^n.
    Binary(u32),
    /// Times 10^n.
    Decimal(i64),
}

fn scale(suffix: &str) -> Result<Scale, &'static str> {
    Ok(match suffix {
        "" => Scale::Decimal(0),
        "Ki" => Scale::Binary(10),
        "Mi" => Scale::Binary(20),
        "Gi" => Scale::Binary(30),
        "Ti" => Scale::Binary(40),
        "Pi" => Scale::Binary(50),
        "Ei" => Scale::Binary(60),
        "n" => Scale::Decimal(-9),
        "u" => Scale::Decimal(-6),
        "m" => Scale::Decimal(-3),
        "k" => Scale::Decimal(3),
        "M" => Scale::Decimal(6),
        "G" => Scale::Decimal(9),
        "T" => Scale::Decimal(12),
        "P" => Scale::Decimal(15),
        "E" => Scale::Decimal(18),
        other => {
            let exponent = other.strip_prefix(['e', 'E']).ok_or("the suffix is unknown")?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err("the exponent is no whole number");
            }
            // apimachinery parses exponents as 32-bit numbers.
            Scale::Decimal(
                exponent
                    .parse::<i32>()
                    .map_err(|_| "the exponent is out of range")?
                    .into(),
            )
        }
    })
}

/// `whole.fraction` x 10^`exponent` x `factor` in billionths, rounded up, at most [`CAP`]. Exact, and linear in the length
/// of the text whatever the exponent.
fn scaled(whole: &str, fraction: &str, exponent: i64, factor: u128) -> u128 {
    // No more zeros than these can matter: above them the cap is reached, below them one billionth.
    const ZEROS: usize = 64;
    let digits: Vec<u128> = whole
        .bytes()
        .chain(fraction.bytes())
        .map(|b| u128::from(b.saturating_sub(b'0')))
        .collect();
    if digits.iter().all(|digit| *digit == 0) {
        return 0;
    }
    let unit = factor * NANO;
    let point = i64::try_from(whole.len()).unwrap_or(i64::MAX).saturating_add(exponent);
    let before = usize::try_from(point).unwrap_or(0);
    let (before_point, behind_point) = digits.split_at(before.min(digits.len()));
    let padding = before.saturating_sub(digits.len()).min(ZEROS);
    let integer = before_point
        .iter()
        .copied()
        .chain(std::iter::repeat_n(0, padding))
        .fold(0u128, |value, digit| value.saturating_mul(10).saturating_add(digit));
    let leading = usize::try_from(point.saturating_neg()).unwrap_or(0).min(ZEROS);
    // From the last digit up, so that each step's rounding up is exact: ceil((n + x) / 10) = ceil((n + ceil(x)) / 10).
    let part = behind_point
        .iter()
        .rev()
        .copied()
        .chain(std::iter::repeat_n(0, leading))
        .fold(0u128, |below, digit| (digit * unit + below).div_ceil(10));
    integer.saturating_mul(unit).saturating_add(part).min(CAP)
}

#[cfg(test)]
mod tests;
