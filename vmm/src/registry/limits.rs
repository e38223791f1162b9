//! Rate limits: the buckets of a device's own, and of the groups that disks share.

use std::collections::BTreeMap;
use std::sync::Arc;

use podvisor_api::types::{RateLimiterConfig, TokenBucket, VmConfig};
use podvisor_devices::rate_limiter::{RateLimiter, TokenBucketConfig};

/// Full buckets as `config` has them; None if it limits nothing.
pub(super) fn limiter(config: &RateLimiterConfig) -> Option<Arc<RateLimiter>> {
    let bucket = |bucket: TokenBucket| TokenBucketConfig {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: bucket.refill_time,
    };
    RateLimiter::new(config.bandwidth.map(bucket), config.ops.map(bucket))
}

/// The buckets of rate limit groups, by the groups' names; a group that limits nothing has none.
pub type Groups = BTreeMap<String, Arc<RateLimiter>>;

/// Full buckets of the groups of `config`.
pub(crate) fn groups(config: &VmConfig) -> Groups {
    let groups = config.rate_limit_groups().iter();
    groups
        .filter_map(|group| Some((group.id.clone(), limiter(&group.rate_limiter_config)?)))
        .collect()
}
