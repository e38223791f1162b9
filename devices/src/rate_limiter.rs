//! Token buckets for bandwidth and operations, with the meaning that Cloud Hypervisor and Firecracker give them. A
//! [`RateLimiter`] is the buckets, which several devices may share (a rate-limit group); a [`Throttle`] is one user
//! of them, with the timer that says when to try again.
//!
//! A request that is larger than its bucket passes when the bucket is full and leaves a debt, so that no request
//! waits for ever and the long-term rate holds.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::sync::lock;

/// The shortest wait that a throttle asks its timer for: a shorter one costs more wake-ups than it gains.
const MIN_WAIT: Duration = Duration::from_millis(1);
/// The longest wait at once; who needs more waits again.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// One bucket as the API describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucketConfig {
    /// Tokens (bytes or operations) that the bucket holds. 0: no limit.
    pub size: u64,
    /// Tokens that may be used once, before the bucket's own.
    pub one_time_burst: u64,
    /// Milliseconds in which an empty bucket becomes full. 0: no limit.
    pub refill_time: u64,
}

#[derive(Debug)]
struct Bucket {
    size: u64,
    burst: u64,
    refill: Duration,
    tokens: u64,
    /// Tokens that were used and were not there.
    debt: u64,
    /// The time up to which tokens were added.
    updated: Instant,
}

impl Bucket {
    fn new(config: TokenBucketConfig, now: Instant) -> Option<Self> {
        let limited = config.size > 0 && config.refill_time > 0;
        limited.then(|| Self {
            size: config.size,
            burst: config.one_time_burst,
            refill: Duration::from_millis(config.refill_time),
            tokens: config.size,
            debt: 0,
            updated: now,
        })
    }

    fn is_full(&self) -> bool {
        self.debt == 0 && self.tokens >= self.size
    }

    /// Adds the tokens of the time that passed, whole ones only; the rest of the time counts later.
    fn replenish(&mut self, now: Instant) {
        if self.is_full() {
            self.updated = self.updated.max(now);
            return;
        }
        let passed = now.saturating_duration_since(self.updated).as_nanos();
        let refill = self.refill.as_nanos();
        let added = passed.saturating_mul(u128::from(self.size)) / refill.max(1);
        let missing = u128::from(self.debt) + u128::from(self.size - self.tokens.min(self.size));
        if added >= missing {
            (self.debt, self.tokens, self.updated) = (0, self.size, now);
            return;
        }
        // Less than `missing`, which is at most two 64-bit numbers' sum.
        let time = added * refill / u128::from(self.size);
        let time = u64::try_from(time).map_or(Duration::MAX, Duration::from_nanos);
        self.updated = self.updated.checked_add(time).unwrap_or(now);
        let to_debt = added.min(u128::from(self.debt));
        self.debt -= u64::try_from(to_debt).unwrap_or(self.debt);
        let rest = u64::try_from(added - to_debt).unwrap_or(u64::MAX);
        self.tokens = self.tokens.saturating_add(rest).min(self.size);
    }

    /// How long until `tokens` can be used; zero: now.
    fn wait(&self, tokens: u64) -> Duration {
        let beyond_burst = tokens.saturating_sub(self.burst);
        // A request larger than the bucket needs a full one.
        let needed = beyond_burst.min(self.size);
        let missing = u128::from(self.debt) + u128::from(needed.saturating_sub(self.tokens));
        let nanos = (missing.saturating_mul(self.refill.as_nanos())).div_ceil(u128::from(self.size));
        u64::try_from(nanos).map_or(MAX_WAIT, Duration::from_nanos)
    }

    /// Uses `tokens`, those that are not there as a debt.
    fn charge(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let rest = tokens - from_burst;
        let from_bucket = rest.min(self.tokens);
        self.tokens -= from_bucket;
        self.debt = self.debt.saturating_add(rest - from_bucket);
    }
}

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Buckets {
    fn replenish(&mut self, now: Instant) {
        for bucket in [&mut self.bandwidth, &mut self.operations].into_iter().flatten() {
            bucket.replenish(now);
        }
    }

    /// The longer wait of the two.
    fn wait(&self, bytes: u64, operations: u64) -> Duration {
        let wait = |bucket: &Option<Bucket>, tokens| bucket.as_ref().map_or(Duration::ZERO, |b| b.wait(tokens));
        wait(&self.bandwidth, bytes).max(wait(&self.operations, operations))
    }

    fn charge(&mut self, bytes: u64, operations: u64) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.operations, operations)] {
            if let Some(bucket) = bucket {
                bucket.charge(tokens);
            }
        }
    }
}

/// Buckets for bandwidth and operations. Shared by an [`Arc`], it limits all its users together.
#[derive(Debug)]
pub struct RateLimiter(Mutex<Buckets>);

impl RateLimiter {
    /// Full buckets. None when nothing is limited: neither bucket is there, or each has a size or refill time of 0.
    #[must_use]
    pub fn new(bandwidth: Option<TokenBucketConfig>, operations: Option<TokenBucketConfig>) -> Option<Arc<Self>> {
        let now = Instant::now();
        let bucket = |config: Option<TokenBucketConfig>| config.and_then(|config| Bucket::new(config, now));
        let buckets = Buckets {
            bandwidth: bucket(bandwidth),
            operations: bucket(operations),
        };
        let limited = buckets.bandwidth.is_some() || buckets.operations.is_some();
        limited.then(|| Arc::new(Self(Mutex::new(buckets))))
    }

    /// Uses `bytes` and `operations` of both buckets at the time `now`, or of neither.
    ///
    /// # Errors
    /// The time until they are there, if nobody else uses them.
    pub fn take(&self, now: Instant, bytes: u64, operations: u64) -> Result<(), Duration> {
        let mut buckets = lock(&self.0);
        buckets.replenish(now);
        let wait = buckets.wait(bytes, operations);
        if !wait.is_zero() {
            return Err(wait);
        }
        buckets.charge(bytes, operations);
        Ok(())
    }

    /// Uses `bytes` and `operations` whether they are there or not: for what was done before its size was known.
    pub fn charge(&self, now: Instant, bytes: u64, operations: u64) {
        let mut buckets = lock(&self.0);
        buckets.replenish(now);
        buckets.charge(bytes, operations);
    }

    /// The time until one more byte and operation are there; zero: now.
    #[must_use]
    pub fn wait(&self, now: Instant) -> Duration {
        let mut buckets = lock(&self.0);
        buckets.replenish(now);
        buckets.wait(1, 1)
    }
}

/// One user of a [`RateLimiter`], and its timer.
#[derive(Debug)]
pub struct Throttle {
    limiter: Arc<RateLimiter>,
    timer: Timer,
    waiting: bool,
}

impl Throttle {
    /// A user of `limiter`.
    ///
    /// # Errors
    /// When no timer can be made.
    pub fn new(limiter: Arc<RateLimiter>) -> io::Result<Self> {
        Ok(Self {
            limiter,
            timer: Timer::new()?,
            waiting: false,
        })
    }

    /// Readable when a wait is over; then call [`Throttle::on_timer`].
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.timer.fd()
    }

    /// Whether it waits for its timer: nothing is admitted until then.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Uses `bytes` and `operations`. False: they are not there, and the timer is set.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn admit(&mut self, bytes: u64, operations: u64) -> io::Result<bool> {
        if self.waiting {
            return Ok(false);
        }
        match self.limiter.take(Instant::now(), bytes, operations) {
            Ok(()) => Ok(true),
            Err(wait) => self.start(wait),
        }
    }

    /// Whether anything is left to use; false: the timer is set. Use it with [`Throttle::charge`].
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn is_open(&mut self) -> io::Result<bool> {
        if self.waiting {
            return Ok(false);
        }
        let wait = self.limiter.wait(Instant::now());
        if wait.is_zero() { Ok(true) } else { self.start(wait) }
    }

    /// Uses `bytes` and `operations`, whether they are there or not.
    pub fn charge(&self, bytes: u64, operations: u64) {
        self.limiter.charge(Instant::now(), bytes, operations);
    }

    fn start(&mut self, wait: Duration) -> io::Result<bool> {
        self.timer.start(wait.clamp(MIN_WAIT, MAX_WAIT))?;
        self.waiting = true;
        Ok(false)
    }

    /// The timer's descriptor is readable: the wait may be over.
    pub fn on_timer(&mut self) {
        self.waiting &= !self.timer.expired();
    }

    /// Waits no more: its driver is gone.
    pub fn reset(&mut self) {
        self.timer.stop();
        self.waiting = false;
    }
}

/// A one-shot timer that is asked without waiting.
#[derive(Debug)]
pub(crate) struct Timer {
    timer: TimerFd,
    /// Started, and its end was not seen.
    started: bool,
}

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            started: false,
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Starts it anew.
    pub(crate) fn start(&mut self, wait: Duration) -> io::Result<()> {
        // Zero would stop it.
        self.timer.reset(wait.max(Duration::from_nanos(1)), None)?;
        self.started = true;
        Ok(())
    }

    pub(crate) fn stop(&mut self) {
        self.started = false;
        if let Err(error) = self.timer.clear() {
            tracing::warn!(%error, "a timer cannot be stopped");
        }
    }

    /// Whether it came to its end since it was started; true once. Quiets the descriptor.
    pub(crate) fn expired(&mut self) -> bool {
        // Read only what is there: the descriptor blocks.
        if !self.started || self.timer.is_armed().unwrap_or(true) {
            return false;
        }
        self.started = false;
        if let Err(error) = self.timer.wait() {
            tracing::warn!(%error, "a timer cannot be read");
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn config(size: u64, one_time_burst: u64, refill_time: u64) -> Option<TokenBucketConfig> {
        Some(TokenBucketConfig {
            size,
            one_time_burst,
            refill_time,
        })
    }

    #[test]
    fn nothing_is_limited_by_empty_buckets() {
        assert!(RateLimiter::new(None, None).is_none());
        assert!(RateLimiter::new(config(0, 5, 100), config(100, 5, 0)).is_none());
        assert!(RateLimiter::new(config(0, 5, 100), config(1, 0, 1)).is_some());
    }

    #[test]
    fn a_bucket_refills_with_time_and_a_burst_counts_once() {
        let limiter = RateLimiter::new(config(1000, 500, 1000), None).unwrap();
        let start = Instant::now() + SECOND;
        assert_eq!(limiter.take(start, 1500, 1), Ok(()));
        assert_eq!(limiter.take(start, 100, 1), Err(SECOND / 10));
        assert_eq!(limiter.take(start + SECOND / 20, 100, 1), Err(SECOND / 20));
        assert_eq!(limiter.take(start + SECOND / 10, 100, 1), Ok(()));
        assert_eq!(limiter.take(start + 100 * SECOND, 1000, 1), Ok(()));
        assert!(limiter.take(start + 100 * SECOND, 1, 1).is_err());
    }

    #[test]
    fn both_buckets_or_neither() {
        let limiter = RateLimiter::new(config(1000, 0, 1000), config(2, 0, 1000)).unwrap();
        let now = Instant::now() + SECOND;
        assert_eq!(limiter.take(now, 10, 1), Ok(()));
        assert!(limiter.take(now, 1000, 1).is_err());
        assert_eq!(limiter.take(now, 990, 1), Ok(()));
        assert_eq!(limiter.take(now, 0, 1), Err(SECOND / 2));
    }

    #[test]
    fn a_request_larger_than_its_bucket_passes_and_is_paid_for() {
        let limiter = RateLimiter::new(config(100, 0, 1000), None).unwrap();
        let now = Instant::now() + SECOND;
        assert_eq!(limiter.take(now, 250, 1), Ok(()));
        assert_eq!(limiter.wait(now), SECOND * 151 / 100);
        assert!(limiter.take(now + SECOND, 1, 1).is_err());
        assert_eq!(limiter.take(now + 2 * SECOND, 50, 1), Ok(()));
        limiter.charge(now + 2 * SECOND, u64::MAX, u64::MAX);
        limiter.charge(now + 2 * SECOND, u64::MAX, u64::MAX);
        assert!(limiter.take(now + 1000 * SECOND, 1, 1).is_err());
    }

    #[test]
    fn users_of_one_limiter_share_it_and_the_timer_ends_the_wait() {
        let limiter = RateLimiter::new(None, config(1, 0, 1)).unwrap();
        let mut one = Throttle::new(Arc::clone(&limiter)).unwrap();
        let mut two = Throttle::new(limiter).unwrap();
        one.charge(0, 2);
        assert!(!two.admit(0, 1).unwrap() && two.is_waiting());
        assert!(!two.admit(0, 0).unwrap(), "nothing overtakes");
        let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
        let event = vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0);
        epoll
            .ctl(vmm_sys_util::epoll::ControlOperation::Add, two.fd(), event)
            .unwrap();
        while !two.admit(0, 1).unwrap() {
            let mut events = [event];
            assert_eq!(epoll.wait(60_000, &mut events).unwrap(), 1);
            two.on_timer();
            assert!(!two.is_waiting());
        }
        one.on_timer();
        one.charge(0, 1000);
        assert!(!one.is_open().unwrap());
        one.reset();
        one.on_timer();
        assert!(!one.is_waiting());
    }

    proptest! {
        /// Whatever is asked for and when, no more is given than the bucket, the burst, and what time refills, plus
        /// one request's debt; and waiting as told is enough.
        #[test]
        fn the_rate_holds(
            (size, burst, refill) in (1u64..5000, 0u64..5000, 1u64..5000),
            asks in proptest::collection::vec((0u64..6000, 0u64..3_000_000_000), 1..60),
        ) {
            let limiter = RateLimiter::new(config(size, burst, refill), None).unwrap();
            let start = Instant::now() + SECOND;
            let mut now = start;
            let mut given = 0;
            for (tokens, pause) in asks {
                now += Duration::from_nanos(pause);
                if let Err(wait) = limiter.take(now, tokens, 0) {
                    now += wait;
                    prop_assert_eq!(limiter.take(now, tokens, 0), Ok(()));
                }
                given += tokens;
                let refilled = (now - start).as_nanos() * u128::from(size) / (u128::from(refill) * 1_000_000);
                prop_assert!(u128::from(given) <= u128::from(size + burst + 6000) + refilled + 1);
            }
        }
    }
}
