//! Modules that crash their workers again and again: plain data, without threads, locks or a clock of its own.

use crate::crash::CrashReport;
use crate::error::StartError;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

/// When a module is put into quarantine: its further loads are refused until it is [released](crate::Supervisor::release).
///
/// What counts is that a worker ended while a call into the module ran, or a load of it, and that the facts name that call as the cause ([`CrashReport::culprit`]): a crash, an exit, a passed deadline or limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quarantine {
    crashes_max: u32,
    within: Duration,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self::after(5, Duration::from_secs(60))
    }
}

impl Quarantine {
    /// Default: after 5 crashes within 60 s. At least 1 crash.
    pub const fn after(crashes: u32, within: Duration) -> Self {
        Self { crashes_max: crashes, within }
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        let bad =
            |option, given: String, expected| Err(StartError::Configuration { option, given, expected });
        if self.crashes_max == 0 {
            return bad(
                "the crashes before quarantine",
                "0".into(),
                "at least 1 (no_quarantine() turns it off)",
            );
        }
        if self.within.is_zero() {
            return bad("the window of quarantine", format!("{:?}", self.within), "longer than nothing");
        }
        Ok(())
    }
}

/// The modules of one supervisor that have crashed workers.
#[derive(Debug, Default)]
pub(crate) struct Ward {
    policy: Option<Quarantine>,
    modules: FxHashMap<String, Record>,
}

#[derive(Debug, Default)]
struct Record {
    crashes: VecDeque<(Instant, CrashReport)>,
    quarantined: bool,
}

impl Ward {
    pub(crate) fn new(policy: Option<Quarantine>) -> Self {
        Self { policy, modules: FxHashMap::default() }
    }

    /// Books a crash on account of a module. True if that has put it into quarantine.
    pub(crate) fn crashed(&mut self, now: Instant, module: &str, report: &CrashReport) -> bool {
        let Some(policy) = self.policy else { return false };
        let old = |at: Instant| now.saturating_duration_since(at) >= policy.within;
        // What is too old to matter is forgotten, so that this does not grow with all that ever crashed.
        self.modules
            .retain(|_, record| record.quarantined || record.crashes.back().is_some_and(|(at, _)| !old(*at)));
        let record = self.modules.entry(module.to_owned()).or_default();
        if !record.quarantined {
            while record.crashes.front().is_some_and(|(at, _)| old(*at)) {
                record.crashes.pop_front();
            }
        }
        record.crashes.push_back((now, report.clone()));
        if record.crashes.len() > policy.crashes_max as usize {
            record.crashes.pop_front();
        }
        let full = record.crashes.len() >= policy.crashes_max as usize;
        full && !std::mem::replace(&mut record.quarantined, true)
    }

    /// The last crashes of a module that is in quarantine, the oldest first.
    pub(crate) fn reports(&self, module: &str) -> Option<Vec<CrashReport>> {
        let record = self.modules.get(module).filter(|record| record.quarantined)?;
        Some(record.crashes.iter().map(|(_, report)| report.clone()).collect())
    }

    /// The modules that are in quarantine.
    pub(crate) fn quarantined(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .modules
            .iter()
            .filter(|(_, record)| record.quarantined)
            .map(|(name, _)| name.clone())
            .collect();
        names.sort();
        names
    }

    /// Forgets a module's crashes. False if it was not in quarantine.
    pub(crate) fn release(&mut self, module: &str) -> bool {
        self.modules.remove(module).is_some_and(|record| record.quarantined)
    }
}

/// A module's name for the books: a file by its true path as far as that can be had, so that another spelling does not open another account.
pub(crate) fn module_key(directory: Option<&Path>, name: &str) -> String {
    if !name.contains('/') {
        return name.to_owned();
    }
    let path = directory.map_or_else(|| Path::new(name).to_owned(), |directory| directory.join(name));
    path.canonicalize().unwrap_or(path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::{Cause, Death, Involvement, Usage};
    use std::sync::Arc;

    const SECOND: Duration = Duration::from_secs(1);

    fn report(pid: u32) -> CrashReport {
        let death = Death {
            pid,
            cause: Cause::Exited { code: 1 },
            greeted: true,
            usage: Usage::default(),
            facts: None,
            running: Vec::new(),
            culprit: None,
            stderr_tail: String::new(),
            stderr_dropped: 0,
        };
        CrashReport { death: Arc::new(death), function: None, involvement: Involvement::NotRun }
    }

    fn pids(ward: &Ward, module: &str) -> Option<Vec<u32>> {
        Some(ward.reports(module)?.iter().map(CrashReport::pid).collect())
    }

    #[test]
    fn the_last_of_the_crashes_puts_a_module_into_quarantine_with_all_their_reports() {
        let (mut ward, now) = (Ward::new(Some(Quarantine::after(3, 60 * SECOND))), Instant::now());
        for (pid, puts) in [(1, false), (2, false), (3, true), (4, false)] {
            assert_eq!(ward.crashed(now + pid * SECOND, "a", &report(pid)), puts, "crash {pid}");
        }
        assert_eq!(pids(&ward, "a"), Some(vec![2, 3, 4]), "a call that was on its way still counts");
        assert_eq!(pids(&ward, "b"), None);
        assert_eq!(ward.quarantined(), ["a"]);
    }

    #[test]
    fn crashes_outside_of_the_window_do_not_count() {
        let (mut ward, now) = (Ward::new(Some(Quarantine::after(2, 60 * SECOND))), Instant::now());
        for crash in 0..10 {
            assert!(!ward.crashed(now + crash * 60 * SECOND, "a", &report(crash)));
        }
        assert!(ward.crashed(now + 599 * SECOND, "a", &report(10)));
    }

    #[test]
    fn quarantine_lasts_until_it_is_released_and_then_counts_anew() {
        let (mut ward, now) = (Ward::new(Some(Quarantine::after(1, SECOND))), Instant::now());
        assert!(ward.crashed(now, "a", &report(1)));
        assert!(ward.crashed(now + 999 * SECOND, "b", &report(2)));
        assert_eq!(pids(&ward, "a"), Some(vec![1]), "time does not heal it");
        assert!(ward.release("a") && !ward.release("a"));
        assert_eq!((pids(&ward, "a"), pids(&ward, "b")), (None, Some(vec![2])));
        assert!(ward.crashed(now + 1000 * SECOND, "a", &report(3)));
    }

    #[test]
    fn modules_that_crashed_long_ago_are_forgotten() {
        let (mut ward, now) = (Ward::new(Some(Quarantine::after(2, SECOND))), Instant::now());
        for module in 0..1000 {
            ward.crashed(now + module * SECOND, &module.to_string(), &report(module));
        }
        assert_eq!(ward.modules.len(), 1);
    }

    #[test]
    fn without_a_policy_nothing_is_kept() {
        let mut ward = Ward::new(None);
        assert!(!ward.crashed(Instant::now(), "a", &report(1)));
        assert!(ward.modules.is_empty());
    }

    #[test]
    fn another_spelling_of_a_path_is_the_same_module() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let plain = module_key(None, &here.join("Cargo.toml").to_string_lossy());
        assert_eq!(module_key(Some(here), "./src/../Cargo.toml"), plain);
        assert_eq!(module_key(Some(here), "libm.so.6"), "libm.so.6");
        assert_eq!(module_key(None, "/no/such/module.so"), "/no/such/module.so");
    }
}
