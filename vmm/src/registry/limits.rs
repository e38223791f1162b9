//! Rate limits.

use std::sync::Arc;

use podvisor_api::types::{RateLimiterConfig, TokenBucket};
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
