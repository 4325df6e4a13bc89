//! `Budget`: what is left of a call's timeout.
//!
//! A call may wait for its turn, for a slot, for the reply, and for the rest of a long string. **Law.** Its timeout bounds all of these together: each wait gets what the waits before it
//! have left.
//!
//! The time counts from the moment at which the call first waits for anything. A call that finds its slot free and its reply at the first looks never reads the clock.

use std::time::{Duration, Instant};

/// A call's timeout, and since when it counts.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    timeout: Duration,
    since: Option<Instant>,
}

impl Budget {
    #[inline(always)]
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, since: None }
    }

    /// The whole timeout, for errors.
    #[inline(always)]
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A wait begins: gives what is left for it.
    #[inline(always)]
    pub(crate) fn wait(&mut self) -> Duration {
        self.wait_at(Instant::now())
    }

    /// Whether there was a wait, and nothing is left. A budget of zero is not over before it was waited for: what is there without a wait may be taken.
    pub(crate) fn is_over(&self) -> bool {
        self.since.is_some_and(|since| self.left_at(since, Instant::now()).is_zero())
    }

    #[inline(always)]
    fn wait_at(&mut self, now: Instant) -> Duration {
        match self.since {
            Some(since) => self.left_at(since, now),
            None => {
                self.since = Some(now);
                self.timeout
            }
        }
    }

    fn left_at(&self, since: Instant, now: Instant) -> Duration {
        // A deadline so far away that the clock cannot hold it is no deadline.
        self.timeout.saturating_sub(now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn each_wait_gets_what_those_before_it_have_left() {
        let start = Instant::now();
        let mut budget = Budget::new(100 * MS);
        assert_eq!(budget.wait_at(start), 100 * MS, "for its turn");
        assert_eq!(budget.wait_at(start + 20 * MS), 80 * MS, "for a slot");
        assert_eq!(budget.wait_at(start + 70 * MS), 30 * MS, "for the reply");
        assert_eq!(budget.wait_at(start + 100 * MS), Duration::ZERO, "for its string");
        assert_eq!(budget.wait_at(start + 500 * MS), Duration::ZERO);
        assert_eq!(budget.timeout(), 100 * MS, "what errors say");
    }

    #[test]
    fn time_counts_from_the_first_wait() {
        let start = Instant::now();
        let mut budget = Budget::new(100 * MS);
        assert_eq!(budget.wait_at(start + 300 * MS), 100 * MS);
        assert_eq!(budget.wait_at(start + 360 * MS), 40 * MS);
    }

    #[test]
    fn what_needs_no_wait_may_be_taken_without_time() {
        let mut none = Budget::new(Duration::ZERO);
        assert!(!none.is_over());
        assert_eq!(none.wait(), Duration::ZERO);
        assert!(none.is_over());
    }

    #[test]
    fn no_timeout_is_too_long() {
        let start = Instant::now();
        let mut budget = Budget::new(Duration::MAX);
        assert_eq!(budget.wait_at(start), Duration::MAX);
        assert_eq!(budget.wait_at(start + MS), Duration::MAX - MS);
        assert!(!budget.is_over());
    }
}
