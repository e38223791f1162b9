//! The types against what Cloud Hypervisor shows and what the shims send.

use super::*;
