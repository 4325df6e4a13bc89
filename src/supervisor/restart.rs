//! When a worker that has ended may be started again: a state machine without threads, locks or a clock of its own.
//!
//! ```text
//!             start               an end: the worker's, or a failed start
//!  Closed ──────────► running ───────────────► Closed, not before a back-off that doubles with each end in the window
//!    ▲                   │                        │ one end more than the window allows
//!    │ the trial has     │                        ▼
//!    │ lived for the     │   an end of the trial  Open until a time: nothing is started
//!    │ window            └──────────────────────► ▲
//!    └── trial ◄──────────────────────────────────┘ that time has come: one start is a trial
//! ```

use crate::crash::Cause;
use crate::error::StartError;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which workers are started again after their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Restart {
    /// None. Who asks for one that has ended gets its report.
    Never,
    /// Those that crashed, exited, were killed for a deadline or a limit, or could not be started; not those that were [disposed](crate::Worker::dispose). The default.
    #[default]
    OnCrash,
    /// All.
    Always,
}

/// When workers are started again, and how often.
///
/// The first restart is at once. Each further end within the window doubles the time until the next start, of which a random part of up to a half is taken away, so that
/// many workers that fell together do not rise together. One end more than the window allows opens the *circuit*: for a while nothing is started, and requests are refused with
/// [`StartError::CircuitOpen`], which says until when. Then one start is a trial: if it ends within the window too, the circuit opens again. A start that fails counts as an end.
///
/// ```
/// use hotcell::{Restart, RestartPolicy};
/// use std::time::Duration;
/// let policy = RestartPolicy::new(Restart::OnCrash)
///     .limit(10, Duration::from_secs(60))
///     .backoff(Duration::from_millis(50), Duration::from_secs(5))
///     .open_for(Duration::from_secs(30));
/// # let _ = policy;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct RestartPolicy {
    pub(crate) restart: Restart,
    restarts_max: u32,
    within: Duration,
    backoff_first: Duration,
    backoff_max: Duration,
    open_for: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            restart: Restart::default(),
            restarts_max: 5,
            within: Duration::from_secs(60),
            backoff_first: Duration::from_millis(10),
            backoff_max: Duration::from_secs(5),
            open_for: Duration::from_secs(30),
        }
    }
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> Self {
        Self::new(restart)
    }
}

impl RestartPolicy {
    /// A policy with the default limits.
    pub fn new(restart: Restart) -> Self {
        Self { restart, ..Self::default() }
    }

    /// Default: 5 within 60 s. How many restarts there may be in a window of time, at least 1; the end after the last of them opens the circuit.
    pub fn limit(mut self, restarts_max: u32, within: Duration) -> Self {
        (self.restarts_max, self.within) = (restarts_max, within);
        self
    }

    /// Default: 10 ms, at most 5 s. How long the second restart in the window is held back; each further one twice as long as the one before.
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        (self.backoff_first, self.backoff_max) = (first, max);
        self
    }

    /// Default: 30 s. How long the circuit stays open.
    pub fn open_for(mut self, time: Duration) -> Self {
        self.open_for = time;
        self
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        let bad =
            |option, given: String, expected| Err(StartError::Configuration { option, given, expected });
        if self.restarts_max == 0 {
            let expected = "at least 1 (Restart::Never is the policy without restarts)";
            return bad("the limit of restarts", "0".into(), expected);
        }
        if self.within.is_zero() {
            return bad(
                "the window of the restart limit",
                format!("{:?}", self.within),
                "longer than nothing",
            );
        }
        if self.open_for.is_zero() {
            return bad("open_for", format!("{:?}", self.open_for), "longer than nothing");
        }
        if self.backoff_first > self.backoff_max {
            return bad("the first back-off", format!("{:?}", self.backoff_first), "at most the longest one");
        }
        Ok(())
    }
}

/// What [`Restarts`] says to a start.
#[derive(Debug)]
pub(crate) enum Gate {
    /// It may be made now.
    Now,
    /// Not before this.
    Wait(Instant),
    /// Not until somebody does something about it.
    Refused(StartError),
}

/// What is known of one kept worker's starts and ends.
#[derive(Debug)]
pub(crate) struct Restarts {
    policy: RestartPolicy,
    /// The ends in the window.
    ends: VecDeque<Instant>,
    /// Why there is no worker: the last one's end, or why it could not be started.
    last: Option<Arc<StartError>>,
    not_before: Option<Instant>,
    open_until: Option<Instant>,
    /// The last start is the trial of a circuit that was open.
    trial: bool,
    started: Option<Instant>,
    starts: u64,
    random: fastrand::Rng,
}

impl Restarts {
    pub(crate) fn new(policy: RestartPolicy) -> Self {
        Self {
            policy,
            ends: VecDeque::new(),
            last: None,
            not_before: None,
            open_until: None,
            trial: false,
            started: None,
            starts: 0,
            random: fastrand::Rng::new(),
        }
    }

    /// Whether a worker may be started now.
    pub(crate) fn gate(&self, now: Instant) -> Gate {
        let Some(last) = &self.last else { return Gate::Now };
        let disposed = matches!(**last, StartError::Disposed);
        match self.policy.restart {
            Restart::Never => return Gate::Refused(not_restarted(last)),
            Restart::OnCrash if disposed => return Gate::Refused(StartError::Disposed),
            Restart::OnCrash | Restart::Always => {}
        }
        if let Some(until) = self.open_until.filter(|until| *until > now) {
            return Gate::Refused(StartError::CircuitOpen {
                until,
                retry_after: until - now,
                restarts_max: self.policy.restarts_max,
                within: self.policy.within,
                last: Arc::clone(last),
            });
        }
        match self.not_before.filter(|at| *at > now) {
            Some(at) => Gate::Wait(at),
            None => Gate::Now,
        }
    }

    /// Why there is no worker, if there was one.
    pub(crate) fn last(&self) -> Option<&Arc<StartError>> {
        self.last.as_ref()
    }

    /// How often a worker was started again.
    pub(crate) fn restarts(&self) -> u64 {
        self.starts.saturating_sub(1)
    }

    /// Until when the circuit is open.
    pub(crate) fn open_until(&self, now: Instant) -> Option<Instant> {
        self.open_until.filter(|until| *until > now)
    }

    /// Whether nothing is known that matters for the next start.
    pub(crate) fn is_forgettable(&self, now: Instant) -> bool {
        self.last.is_none()
            || (self.policy.restart == Restart::Always
                || !matches!(self.last.as_deref(), Some(StartError::Disposed)))
                && self.policy.restart != Restart::Never
                && self.open_until(now).is_none()
                && self.ends.back().is_none_or(|end| self.is_old(*end, now))
    }

    /// Whether the last start is a trial, after the circuit was open.
    pub(crate) fn is_trial(&self) -> bool {
        self.trial
    }

    /// A start is being made.
    pub(crate) fn starting(&mut self, now: Instant) {
        self.trial = self.open_until.take().is_some() || self.trial;
        self.not_before = None;
        self.started = Some(now);
        self.starts += 1;
    }

    /// The start has failed. Gives until when the circuit is open, if it has opened.
    pub(crate) fn failed(&mut self, now: Instant, why: Arc<StartError>) -> Option<Instant> {
        self.last = Some(why);
        self.count(now)
    }

    /// The worker has ended. Gives until when the circuit is open, if it has opened.
    pub(crate) fn ended(&mut self, now: Instant, why: Arc<StartError>) -> Option<Instant> {
        let wished = matches!(*why, StartError::Disposed);
        self.last = Some(why);
        // An end that somebody wished for says nothing about the next one.
        if wished { None } else { self.count(now) }
    }

    fn is_old(&self, end: Instant, now: Instant) -> bool {
        now.saturating_duration_since(end) >= self.policy.within
    }

    fn count(&mut self, now: Instant) -> Option<Instant> {
        while self.ends.front().is_some_and(|end| self.is_old(*end, now)) {
            self.ends.pop_front();
        }
        let lived = self.started.is_some_and(|started| self.is_old(started, now));
        self.trial &= !lived;
        self.ends.push_back(now);
        let ends = u32::try_from(self.ends.len()).unwrap_or(u32::MAX);
        if self.trial || ends > self.policy.restarts_max {
            self.trial = false;
            self.ends.clear();
            self.open_until = now.checked_add(self.policy.open_for);
            return self.open_until;
        }
        self.not_before = now.checked_add(self.backoff(ends));
        None
    }

    /// How long to hold back after the `ends`-th end in the window.
    fn backoff(&mut self, ends: u32) -> Duration {
        let Some(doublings) = ends.checked_sub(2) else { return Duration::ZERO };
        let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let full = self.policy.backoff_first.saturating_mul(factor).min(self.policy.backoff_max);
        full.mul_f64(1.0 - self.random.f64() / 2.0)
    }
}

/// The refusal of a worker that ended before and is not started again.
fn not_restarted(last: &Arc<StartError>) -> StartError {
    match &**last {
        StartError::Died(report) => StartError::Died(report.clone()),
        StartError::Disposed => StartError::Disposed,
        _ => StartError::NotRestarted { last: Arc::clone(last) },
    }
}

/// A worker's end, as the reason why there is none.
pub(crate) fn why_ended(report: &crate::CrashReport) -> Arc<StartError> {
    Arc::new(match report.cause() {
        Cause::Disposed => StartError::Disposed,
        _ => StartError::Died(Box::new(report.clone())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn why() -> Arc<StartError> {
        Arc::new(StartError::TimedOut { program: "worker".into(), after: SECOND })
    }

    fn policy() -> RestartPolicy {
        RestartPolicy::new(Restart::OnCrash)
            .limit(3, 60 * SECOND)
            .backoff(SECOND, 3 * SECOND)
            .open_for(100 * SECOND)
    }

    /// Starts and ends `times` times, each as soon as that is allowed; gives the time after the last end.
    fn fall(restarts: &mut Restarts, mut now: Instant, times: usize) -> Instant {
        for _ in 0..times {
            if let Gate::Wait(at) = restarts.gate(now) {
                now = at;
            }
            assert!(matches!(restarts.gate(now), Gate::Now));
            restarts.starting(now);
            restarts.ended(now, why());
        }
        now
    }

    #[test]
    fn the_first_restart_is_at_once_and_each_further_one_waits_about_twice_as_long() {
        let (mut restarts, mut now) = (Restarts::new(policy().limit(9, 600 * SECOND)), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..6 {
            restarts.starting(now);
            restarts.ended(now, why());
            let at = if let Gate::Wait(at) = restarts.gate(now) { at } else { now };
            waits.push(at - now);
            now = at;
        }
        assert_eq!(waits[0], Duration::ZERO);
        for (wait, full) in waits[1..].iter().zip([1, 2, 3, 3, 3]) {
            assert!((full * SECOND / 2..=full * SECOND).contains(wait), "{waits:?}");
        }
    }

    #[test]
    fn jitter_differs_from_worker_to_worker() {
        let now = Instant::now();
        let waits: std::collections::HashSet<_> = (0..32)
            .map(|seed| {
                let mut restarts = Restarts::new(policy());
                restarts.random = fastrand::Rng::with_seed(seed);
                fall(&mut restarts, now, 2);
                let Gate::Wait(at) = restarts.gate(now) else { panic!("it backs off") };
                at - now
            })
            .collect();
        assert!(waits.len() > 16, "{waits:?}");
    }

    #[test]
    fn one_end_too_many_opens_the_circuit_and_its_error_says_until_when() {
        let mut restarts = Restarts::new(policy());
        let now = fall(&mut restarts, Instant::now(), 4);
        match restarts.gate(now + 40 * SECOND) {
            Gate::Refused(StartError::CircuitOpen { until, retry_after, restarts_max: 3, .. }) => {
                assert_eq!((until, retry_after), (now + 100 * SECOND, 60 * SECOND));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(restarts.open_until(now), Some(now + 100 * SECOND));
        assert!(matches!(restarts.gate(now + 100 * SECOND), Gate::Now));
    }

    #[test]
    fn a_trial_that_falls_opens_the_circuit_again_and_one_that_lives_closes_it() {
        let mut restarts = Restarts::new(policy());
        let now = fall(&mut restarts, Instant::now(), 4) + 100 * SECOND;
        restarts.starting(now);
        assert_eq!(restarts.ended(now + SECOND, why()), Some(now + 101 * SECOND));
        let now = now + 101 * SECOND;
        restarts.starting(now);
        let now = now + 60 * SECOND;
        assert_eq!(restarts.ended(now, why()), None, "it lived for the window");
        fall(&mut restarts, now, 2);
    }

    #[test]
    fn ends_outside_of_the_window_do_not_count() {
        let (mut restarts, mut now) = (Restarts::new(policy()), Instant::now());
        for _ in 0..20 {
            restarts.starting(now);
            now += 61 * SECOND;
            assert_eq!(restarts.ended(now, why()), None);
            assert!(matches!(restarts.gate(now), Gate::Now));
        }
        assert_eq!(restarts.restarts(), 19);
        assert!(!restarts.is_forgettable(now) && restarts.is_forgettable(now + 60 * SECOND));
    }

    #[test]
    fn a_failed_start_counts_as_an_end() {
        let (mut restarts, mut now) = (Restarts::new(policy()), Instant::now());
        for end in 1..=4 {
            if let Gate::Wait(at) = restarts.gate(now) {
                now = at;
            }
            restarts.starting(now);
            assert_eq!(restarts.failed(now, why()).is_some(), end == 4);
        }
    }

    #[test]
    fn each_policy_refuses_what_it_says() {
        let now = Instant::now();
        for (restart, wished, again) in [
            (Restart::Never, false, false),
            (Restart::Never, true, false),
            (Restart::OnCrash, false, true),
            (Restart::OnCrash, true, false),
            (Restart::Always, false, true),
            (Restart::Always, true, true),
        ] {
            let mut restarts = Restarts::new(restart.into());
            assert!(matches!(restarts.gate(now), Gate::Now), "a first start is none again");
            restarts.starting(now);
            restarts.ended(now, if wished { Arc::new(StartError::Disposed) } else { why() });
            assert_eq!(matches!(restarts.gate(now), Gate::Now), again, "{restart:?}, wished: {wished}");
        }
    }

    #[test]
    fn a_first_start_that_failed_and_is_not_repeated_says_what_happened() {
        let (mut restarts, now) = (Restarts::new(Restart::Never.into()), Instant::now());
        restarts.starting(now);
        restarts.failed(now, why());
        let Gate::Refused(error) = restarts.gate(now) else { panic!("it is not started again") };
        let text = error.to_string();
        assert!(text.contains(&why().to_string()), "{text}");
    }

    #[test]
    fn senseless_values_are_refused() {
        let sound = RestartPolicy::default;
        assert!(sound().check().is_ok());
        for bad in [
            sound().limit(0, SECOND),
            sound().limit(1, Duration::ZERO),
            sound().open_for(Duration::ZERO),
            sound().backoff(2 * SECOND, SECOND),
        ] {
            assert!(matches!(bad.check(), Err(StartError::Configuration { .. })), "{bad:?}");
        }
    }
}
