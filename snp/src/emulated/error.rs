//! A refusal of the emulated KVM and firmware before it has the name of the call, and the firmware's status codes.

use crate::processor::ProcessorError;

/// Status codes of the AMD secure processor (AMD 56860 table 5, `enum sev_ret_code`).
pub(crate) mod fw {
    /// The command does not fit the guest's state.
    pub(crate) const INVALID_GUEST_STATE: u32 = 2;
    /// The policy forbids it.
    pub(crate) const POLICY_FAILURE: u32 = 7;
    /// A signature does not verify.
    pub(crate) const BAD_SIGNATURE: u32 = 0xA;
    /// A digest or authentication tag does not match.
    pub(crate) const BAD_MEASUREMENT: u32 = 0xB;
    /// A parameter is invalid.
    pub(crate) const INVALID_PARAM: u32 = 0x16;
    /// Out of a resource.
    pub(crate) const RESOURCE_LIMIT: u32 = 0x17;
    /// A message sequence number would overflow.
    pub(crate) const AEAD_OFLOW: u32 = 0x1D;
}

/// errno, firmware status and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    pub(super) fw_error: u32,
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn new(errno: i32, fw_error: u32, reason: impl Into<String>) -> Self {
        Self {
            errno,
            fw_error,
            reason: reason.into(),
        }
    }

    pub(super) fn einval(reason: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, 0, reason)
    }

    /// The firmware refused: EIO and its status.
    pub(super) fn firmware(status: u32, reason: impl Into<String>) -> Self {
        Self::new(libc::EIO, status, reason)
    }

    pub(super) fn of(self, op: &'static str) -> ProcessorError {
        ProcessorError {
            op,
            errno: self.errno,
            fw_error: self.fw_error,
            reason: self.reason,
        }
    }
}
