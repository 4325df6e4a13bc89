//! Counts and gauges for the recorder that the host has installed with the `metrics` crate.
//!
//! They are told on the thread of the events, after each event of a supervisor, as differences to what was told before. So no event that was dropped for a slow listener is missing, and
//! several supervisors add up.

use super::events::SupervisorEvent;
use super::{Inner, Totals};
use crate::monitor;
use metrics::{counter, gauge};
use std::sync::Arc;

/// Tells of this supervisor from now on.
pub(super) fn attach(inner: &Arc<Inner>) {
    let supervisor = Arc::downgrade(inner);
    let mut told = Told::default();
    inner.emitter.on(&SupervisorEvent::ALL, false, true, move |_| {
        if let Some(supervisor) = supervisor.upgrade() {
            let (totals, gauges) = supervisor.metered();
            told.tell(&totals, gauges);
        }
    });
}

/// What is open at a moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gauges {
    pub(super) workers: usize,
    pub(super) sessions: usize,
    pub(super) quarantined: usize,
}

/// What the recorder knows.
#[derive(Debug, Default)]
struct Told {
    totals: Totals,
    gauges: Gauges,
}

impl Told {
    fn tell(&mut self, totals: &Totals, gauges: Gauges) {
        let before = std::mem::replace(&mut self.totals, totals.clone());
        counter!("hotcell_sessions_opened_total").increment(totals.sessions_opened - before.sessions_opened);
        counter!("hotcell_sessions_refused_total")
            .increment(totals.sessions_refused - before.sessions_refused);
        counter!("hotcell_workers_started_total").increment(totals.workers_started - before.workers_started);
        counter!("hotcell_starts_failed_total").increment(totals.starts_failed - before.starts_failed);
        counter!("hotcell_restarts_total").increment(totals.restarts - before.restarts);
        for (cause, count) in &totals.ends {
            let more = count - before.ends.get(cause).copied().unwrap_or(0);
            counter!("hotcell_worker_ends_total", "cause" => cause.clone()).increment(more);
        }
        self.set(gauges);
    }

    fn set(&mut self, now: Gauges) {
        // Exact: there are fewer than 2^53 of anything.
        let difference = |now: usize, before: usize| now as f64 - before as f64;
        gauge!("hotcell_workers").increment(difference(now.workers, self.gauges.workers));
        gauge!("hotcell_sessions").increment(difference(now.sessions, self.gauges.sessions));
        gauge!("hotcell_modules_quarantined").increment(difference(now.quarantined, self.gauges.quarantined));
        self.gauges = now;
    }
}

impl Drop for Told {
    /// A supervisor that is gone has nothing open.
    fn drop(&mut self) {
        monitor::guarded(|| self.set(Gauges::default()));
    }
}
