//! Latencies: how long a session's calls take, and how their waits end.
//!
//! Measuring costs two looks at the clock, which is as much as half a call. So it is off by default, and where it is on one call in [`SAMPLE_EVERY`] is measured: a prime, so that a caller's own rhythm
//! does not fall in step with it. A session that measures never takes the way of a plain call (`SessionInner::claim_direct` finds no slot for it), so that one has no branch for this.
//!
//! The histogram is log-linear: values below 64 ns have a bucket each; above, each power of two is cut into 32 buckets, so a value is known to 1 in 32. It is an array of counters that any thread
//! may raise or read at any time; nothing is ever locked, and nothing is allocated after the session was opened.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// One call in so many is measured.
const SAMPLE_EVERY: u32 = 17;
/// Buckets to a power of two, as a power of two.
const BITS: u32 = 5;
/// Times from 2 to this power of nanoseconds on, more than an hour, share the last bucket.
const POWER_MAX: u32 = 42;
const BUCKETS: usize = ((POWER_MAX - BITS + 1) as usize) << BITS;

/// The bucket of a time.
fn bucket(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(BITS + 1);
    // At most 58 * 32 + 63.
    let at = (u64::from(shift) << BITS) + (ns >> shift);
    usize::try_from(at).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// The longest time of a bucket.
fn longest(bucket: usize) -> u64 {
    let shift = (bucket >> BITS).saturating_sub(1);
    if bucket == BUCKETS - 1 {
        return u64::MAX;
    }
    let step = (bucket - (shift << BITS)) as u64;
    ((step + 1) << shift) - 1
}

/// A session's histogram, as calls write it.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Calls until the next that is measured. Threads may overwrite each other's count: then the next one comes a little later, or sooner.
    until_next: AtomicU32,
    sum: AtomicU64,
    max: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self {
            until_next: AtomicU32::new(0),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Before a call: the time, if this call is one to be measured.
    #[inline]
    pub(crate) fn start(&self) -> Option<Instant> {
        let left = self.until_next.load(Relaxed);
        if left != 0 {
            self.until_next.store(left - 1, Relaxed);
            return None;
        }
        self.until_next.store(SAMPLE_EVERY - 1, Relaxed);
        Some(Instant::now())
    }

    /// After a call that gave a result.
    #[inline]
    pub(crate) fn stop(&self, started: Option<Instant>) {
        if let Some(started) = started {
            self.record(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
    }

    fn record(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.sum.fetch_add(ns, Relaxed);
        self.max.fetch_max(ns, Relaxed);
    }

    /// What has been recorded up to now. Calls go on meanwhile: one that is recorded at this moment may be in some of the numbers and not yet in others.
    pub(crate) fn read(&self) -> Latencies {
        // The sum first, so that it has no call that the count has not, on machines that keep the order; a mean is then never above the truth.
        let sum = self.sum.load(Relaxed);
        let buckets: Box<[u64]> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        Latencies { count: buckets.iter().sum(), buckets, sum, max: self.max.load(Relaxed) }
    }
}

/// How long a session's calls took, as far as they were measured: a snapshot.
///
/// From [`Session::latencies`](crate::Session::latencies). One call in 17 is measured, from its beginning to its result, waiting for a slot included, by `CLOCK_MONOTONIC`; reading that clock
/// adds about its own cost once, some 20 ns. Calls that gave an error and submitted ones are not counted, nor are the session's own requests (loading, `ping`, `read`).
#[derive(Clone, PartialEq, Eq)]
pub struct Latencies {
    count: u64,
    sum: u64,
    max: u64,
    buckets: Box<[u64]>,
}

impl Latencies {
    /// How many calls were measured.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean; zero if nothing was measured.
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.sum.checked_div(self.count).unwrap_or(0))
    }

    /// The longest; zero if nothing was measured.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The time within which `percent` percent (0 to 100) of the measured calls returned, at most 1 in 32 above the exact one and never above [`Latencies::max`]; zero if nothing was measured.
    pub fn percentile(&self, percent: f64) -> Duration {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // Counts above 2^53 calls do not happen; `as` brings what is out of range, or no number, back into it.
        let rank = ((self.count as f64 * percent / 100.0).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        let at = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        Duration::from_nanos(at.map_or(0, longest).min(self.max))
    }
}

/// The text, not the two thousand counts behind it.
impl std::fmt::Debug for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} calls measured: mean {:?}", self.count, self.mean())?;
        for percent in [50.0, 99.0, 99.9] {
            write!(f, ", p{percent} {:?}", self.percentile(percent))?;
        }
        write!(f, ", max {:?}", self.max())
    }
}

/// How a session's waits ended: a snapshot, from [`Session::counters`](crate::Session::counters). All count from the opening of the session.
///
/// A wait that ended at the first looks (64 of them, less than 2 µs) is in neither `spun` nor `parked`. Waits for a [`Pipeline`](crate::Pipeline)'s results are in neither, and while the session has a
/// pipeline its worker's waits are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Requests that were sent: calls, submitted ones too, and the session's own.
    pub requests: u64,
    /// Waits of callers for a reply that ended while they spun on, after the first looks.
    pub spun: u64,
    /// Waits of callers for a reply in which they slept.
    pub parked: u64,
    /// Waits of the worker for a request that ended while it spun on, after the first looks. Untrusted.
    pub worker_spun: u64,
    /// Waits of the worker for a request in which it slept. Untrusted.
    pub worker_parked: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_time_lies_in_its_bucket_and_buckets_leave_no_gap() {
        assert_eq!(bucket(0), 0);
        for at in 0..BUCKETS - 1 {
            let last = longest(at);
            assert_eq!((bucket(last), bucket(last + 1)), (at, at + 1));
            assert!(at == 0 || (last - longest(at - 1)) * 32 <= last.max(64), "{at}");
        }
        assert_eq!(longest(BUCKETS - 2) + 1, (1 << POWER_MAX) - (1 << (POWER_MAX - 1 - BITS)));
        assert_eq!((bucket(1 << POWER_MAX), bucket(u64::MAX)), (BUCKETS - 1, BUCKETS - 1));
    }

    #[test]
    fn nothing_measured_is_zero() {
        let none = Recorder::new().read();
        assert_eq!((none.count(), none.mean(), none.max()), (0, Duration::ZERO, Duration::ZERO));
        assert_eq!(none.percentile(99.9), Duration::ZERO);
        assert_eq!(none.to_string(), "0 calls measured: mean 0ns, p50 0ns, p99 0ns, p99.9 0ns, max 0ns");
    }

    #[test]
    fn one_call_in_seventeen_is_measured() {
        let recorder = Recorder::new();
        let measured: Vec<usize> = (0..52).filter(|_| recorder.start().is_some()).collect();
        assert_eq!(measured, [0, 17, 34, 51]);
    }

    proptest! {
        #[test]
        fn percentiles_are_those_of_the_sorted_list(
            mut times in proptest::collection::vec(
                prop_oneof![0..100u64, 50..5000u64, 0..1u64 << 44, any::<u64>().prop_map(|n| n >> 20)], 1..400),
            percent in 0.0..=100.0f64,
        ) {
            let recorder = Recorder::new();
            for ns in &times {
                recorder.record(*ns);
            }
            let read = recorder.read();
            times.sort_unstable();
            let max = times[times.len() - 1];
            prop_assert_eq!(read.count(), times.len() as u64);
            prop_assert_eq!(read.max(), Duration::from_nanos(max));
            prop_assert_eq!(read.mean(), Duration::from_nanos(times.iter().sum::<u64>() / times.len() as u64));
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            for percent in [0.0, percent, 50.0, 99.9, 100.0] {
                let rank = ((times.len() as f64 * percent / 100.0).ceil() as usize).clamp(1, times.len());
                let exact = times[rank - 1];
                let given = u64::try_from(read.percentile(percent).as_nanos()).unwrap();
                prop_assert!(given >= exact, "{} {}", given, exact);
                // The last bucket has no upper bound but the maximum.
                let most = if exact >= longest(BUCKETS - 2) { max } else { exact + exact / 32 };
                prop_assert!(given <= most.min(max), "{} {}", given, exact);
            }
            prop_assert_eq!(read.percentile(f64::NAN), read.percentile(0.0));
            prop_assert_eq!(read.percentile(1e9), read.max());
        }
    }

    #[test]
    fn threads_lose_no_call_and_readers_see_sane_numbers() {
        let (threads, each) = (4, 5_000u64);
        let recorder = Recorder::new();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let recorder = &recorder;
                scope.spawn(move || (0..each).for_each(|i| recorder.record(i * (thread + 1))));
            }
            let mut before = 0;
            while before < threads * each {
                let read = recorder.read();
                assert!(read.count() >= before && read.count() <= threads * each);
                assert!(
                    read.percentile(50.0) <= read.percentile(99.0) && read.percentile(99.0) <= read.max()
                );
                assert!(read.max() < Duration::from_nanos(each * threads));
                before = read.count();
            }
        });
        let all: u64 = (0..each).sum::<u64>() * (1..=threads).sum::<u64>();
        assert_eq!(recorder.read().mean(), Duration::from_nanos(all / (threads * each)));
    }
}
